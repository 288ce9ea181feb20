"""Choosing the next token of one sequence on its device.

The noise is fixed by (seed, position), whatever else runs or ran: each draw seeds a generator of its own, never the
process-wide one. Order as in transformers: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import hashlib
import struct

import torch

from models.engine.sequence import SamplingOptions
from models.errors import NumericError

# Below this the softmax is the likeliest token anyway, and dividing by less would overflow to NaN.
_MIN_TEMPERATURE = 1e-4


class Sampler:
    """The sampling state of one sequence.

    :param prompt_ids: the prompt, which the repetition penalty counts as seen.
    :param vocab_size: width of the logits.
    """

    def __init__(
        self, options: SamplingOptions, prompt_ids: tuple[int, ...], vocab_size: int, device: torch.device
    ) -> None:
        self._options = options
        self._generator = torch.Generator(device)
        self._seen: torch.Tensor | None = None
        if options.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_ids, device=device)] = True

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """The next token id.

        :param logits: (vocab_size,), any float dtype.
        :param position: index of the new token in the answer, from 0.
        :raise NumericError: NaN or Inf among the logits.
        """
        if not bool(torch.isfinite(logits).all()):
            raise NumericError("the model gave NaN or Inf; the request was ended")
        scores = logits.float()
        if self._seen is not None:
            scores = self._penalise(scores)
        is_greedy = self._options.temperature < _MIN_TEMPERATURE
        token_id = int(scores.argmax()) if is_greedy else self._draw(scores, position)
        if self._seen is not None:
            self._seen[token_id] = True
        return token_id

    def _penalise(self, scores: torch.Tensor) -> torch.Tensor:
        """CTRL's penalty (arXiv:1909.05858, section 4.1) with the sign rule of transformers."""
        penalty = self._options.repetition_penalty
        assert self._seen is not None
        return torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    def _draw(self, scores: torch.Tensor, position: int) -> int:
        options = self._options
        scores = scores / options.temperature
        if 0 < options.top_k < scores.numel():
            smallest_kept = scores.topk(options.top_k).values[-1]
            scores = scores.masked_fill(scores < smallest_kept, float("-inf"))
        if options.top_p < 1.0:
            ordered, order = scores.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # A token stays if those before it have not reached top_p yet; so the likeliest always stays.
            is_cut = probabilities.cumsum(-1) - probabilities >= options.top_p
            scores = scores.masked_fill(torch.zeros_like(is_cut).scatter(0, order, is_cut), float("-inf"))
        probabilities = scores.softmax(-1)
        # argmax(p / Exp(1)) draws from p (the exponential race), without a host round trip for the cumulative sum.
        self._generator.manual_seed(_noise_seed(options.seed, position))
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return int((probabilities / noise).argmax())


def _noise_seed(seed: int, position: int) -> int:
    """63 bits from a hash: neighbouring seeds or positions share nothing."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
