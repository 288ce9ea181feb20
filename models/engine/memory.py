"""Who gets how much of the device: weights first, then working room, then pages of the KV cache for each model.

Plain arithmetic on sizes that the loader measured; one ledger for all models, because they share one card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.errors import LoadError

_GIB = 1024**3
# What a model must be able to hold at least, so that the other one's share cannot starve it.
FLOOR_TOKENS = 4096


@dataclass(frozen=True)
class ModelNeeds:
    """What one loaded model takes of its device.

    :param weights_bytes: parameters as they are on the device.
    :param workspace_bytes: activations of the largest step, sampling tables, captured graphs, the picture cache.
    :param kv_bytes_per_token: keys and values of one token in all layers.
    :param page_tokens: tokens of one page.
    :param max_context_tokens: most tokens of one request.
    """

    weights_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    page_tokens: int
    max_context_tokens: int

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes_per_token * self.page_tokens

    @property
    def floor_pages(self) -> int:
        """The fewest pages to serve with, page 0 included, which belongs to nobody."""
        return -(-min(FLOOR_TOKENS, self.max_context_tokens) // self.page_tokens) + 1


@dataclass(frozen=True)
class ModelShare:
    """What the ledger gives a model. `num_pages` counts page 0."""

    weights_bytes: int
    workspace_bytes: int
    cache_bytes: int
    num_pages: int
    page_tokens: int

    @property
    def capacity_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_tokens


@dataclass(frozen=True)
class Ledger:
    """The whole of it. `budget_bytes`: what may be taken; `free_bytes`: what rounding to pages left."""

    budget_bytes: int
    shares: Mapping[str, ModelShare]

    @property
    def free_bytes(self) -> int:
        shares = self.shares.values()
        return self.budget_bytes - sum(s.weights_bytes + s.workspace_bytes + s.cache_bytes for s in shares)

    def lines(self) -> list[str]:
        """For the log at start."""
        lines = [f"memory: {self.budget_bytes / _GIB:.2f} GiB may be taken"]
        for name, share in self.shares.items():
            lines.append(
                f"memory: {name}: weights {share.weights_bytes / _GIB:.2f} GiB, "
                f"working room {share.workspace_bytes / _GIB:.2f} GiB, KV cache {share.cache_bytes / _GIB:.2f} GiB "
                f"= {share.num_pages - 1} pages of {share.page_tokens} tokens = {share.capacity_tokens} tokens"
            )
        lines.append(f"memory: {self.free_bytes / _GIB:.2f} GiB left over")
        return lines


def plan_memory(budget_bytes: int, needs: Mapping[str, ModelNeeds], weights: Mapping[str, float]) -> Ledger:
    """Divide the budget.

    :param weights: each model's claim to the pages, relative to the others'; a model left alone gets all.
    :raise LoadError: weights, working room and the least number of pages do not fit.
    """
    fixed = sum(need.weights_bytes + need.workspace_bytes for need in needs.values())
    floors = {name: need.floor_pages * need.page_bytes for name, need in needs.items()}
    room = budget_bytes - fixed
    if room < sum(floors.values()):
        raise LoadError(
            f"{budget_bytes / _GIB:.2f} GiB of memory may be taken, but weights and working room need "
            f"{fixed / _GIB:.2f} GiB and the smallest KV cache {sum(floors.values()) / _GIB:.2f} GiB"
        )
    given = _split(room, floors, weights)
    shares = {}
    for name, need in needs.items():
        num_pages = given[name] // need.page_bytes
        shares[name] = ModelShare(
            need.weights_bytes, need.workspace_bytes, num_pages * need.page_bytes, num_pages, need.page_tokens
        )
    return Ledger(budget_bytes, shares)


def _split(room: int, floors: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Bytes for each in proportion to its weight, but no less than its floor; the others share the rest."""
    open_names, given = list(floors), dict.fromkeys(floors, 0)
    while open_names:
        total = sum(weights[name] for name in open_names)
        below = [n for n in open_names if room * weights[n] < floors[n] * total or total == 0]
        if not below:
            return given | {name: int(room * weights[name] / total) for name in open_names}
        for name in below:
            given[name] = floors[name]
            room -= floors[name]
            open_names.remove(name)
    return given
