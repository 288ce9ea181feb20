"""Choosing the next token of every sequence of a batch, on their device, without waiting for it.

The noise of a token is a hash of (seed, position, token id): it needs no generator and no state, so a sequence draws
the same alone or in any batch, in a CUDA graph or out of it. A token is drawn by the exponential race: the largest
score minus log(E), E ~ Exp(1), is distributed as the softmax of the scores (the Gumbel-max trick).

Order as in transformers and vLLM: logit bias, grammar, min_tokens, repetition penalty, presence and frequency
penalties, temperature, then top-k, top-p and min-p. The last three are thresholds on the distance to the likeliest
token, so nothing is sorted; equal scores stay or go together, and the likeliest always stays.

Knows nothing of forwards, text or grammars' insides; raises nothing for a bad row, but flags it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from models.engine.sequence import SamplingOptions, TokenLogprobs

# Below this the softmax is the likeliest token anyway, and dividing by less would overflow to NaN.
_MIN_TEMPERATURE = 1e-4
_LARGEST_FLOAT = torch.finfo(torch.float32).max
# Weyl's constant, 2**32 over the golden ratio, as a signed 32-bit number.
_GOLDEN = 0x9E3779B9 - 2**32
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24

# Probabilities are summed as whole numbers of 2**-40 of the likeliest: sums of whole numbers do not depend on their
# order, so a threshold does not depend on the batch, the device or the algorithm. 2**23 words would fit 63 bits.
_MASS_UNITS = 2.0**40
# How the 31 bits of a distance are searched, from the top: (shift, width).
_DIGITS = ((18, 13), (9, 9), (0, 9))
# So many words of several rows are worked on at once: on a CPU what its caches and allocator keep at hand (measured:
# nearly twice as fast as all rows of 16 x 49,152 at once), on CUDA, for top-p alone, about 40 bytes of room a word.
_CPU_BLOCK, _CUDA_BLOCK = 2**18, 2**22
# Rows that want more than this many likeliest tokens are served apart, so that the others need not pay for them.
_FEW = 64

Race = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def noise_keys(seed: int) -> tuple[int, int]:
    """Two signed 32-bit keys from a hash of the seed, 0 <= seed < 2**64: neighbouring seeds share nothing."""
    first, second = struct.unpack("<ii", hashlib.blake2b(struct.pack("<Q", seed), digest_size=8).digest())
    return first, second


def noise_bits(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits for every (sequence, position, token id), the same on every device.

    :param keys: (batch, 2) int64, of `noise_keys`.
    :param positions: (batch,) int64, index of the token in the answer.
    :return: (batch, vocab_size) int32, uniform over all its values. Arithmetic wraps around.
    """
    state = keys.to(torch.int32) + (positions.to(torch.int32) * _GOLDEN)[:, None]
    state = _mix(state)
    words = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    return _mix(words + state[:, :1], state[:, 1:])


def log_exponentials(bits: torch.Tensor) -> torch.Tensor:
    """log(E) of E ~ Exp(1), float32 and finite, by inverting its distribution at u = (bits + 0.5) / 2**32.

    The smallest E win races, so they are the ones that keep their precision: -log1p(-u), not -log(u). The largest E is
    16.6, where float32 knows no u between it and 1.
    """
    # Signed to unsigned by the fraction: exact for small u, and no unsigned type is needed.
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    u = u.sub_(u.floor()).clamp_(max=_LARGEST_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_()


def race_rows(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """What `race` does to some rows at once. Tensor operations alone, of shapes known beforehand: may be compiled, and
    captured in a CUDA graph."""
    is_greedy = temperature < _MIN_TEMPERATURE
    scores = logits.float() / temperature.masked_fill(is_greedy, 1.0)[:, None]
    noise = log_exponentials(noise_bits(keys, positions, logits.shape[1]))
    return torch.addcmul(scores, noise, (is_greedy.float() - 1.0)[:, None]).argmax(-1)


def race(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    run: Race = race_rows,
) -> torch.Tensor:
    """Draw a token for each row from softmax(logits / temperature); the likeliest where that is below 1e-4.

    The noise has the same bits everywhere; the last digits of its logarithm are the device's.

    :param logits: (batch, vocab_size), any float type. A row with NaN gives any token; see `is_finite`.
    :param temperature: (batch,) float32.
    :param keys: (batch, 2) int64, of `noise_keys`.
    :param positions: (batch,) int64, index of the token in the answer.
    :param run: `race_rows`, or a compiled form of it.
    :return: (batch,) int64.
    """
    block = _block_rows(logits)
    if logits.device.type != "cpu" or len(logits) <= block:
        return run(logits, temperature, keys, positions)
    split = (torch.split(each, block) for each in (logits, temperature, keys, positions))
    return torch.cat([run(*rows) for rows in zip(*split, strict=True)])


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row; the first of several. (batch, vocab_size) -> (batch,) int64."""
    return logits.argmax(-1)


def is_finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether a row has neither NaN nor Inf; a (batch,) bool. One sum: it spares a table of bools, and would be wrong
    only for logits around 1e33."""
    return logits.sum(-1, dtype=torch.float32).isfinite()


def _block_rows(table: torch.Tensor) -> int:
    return max(1, (_CPU_BLOCK if table.device.type == "cpu" else _CUDA_BLOCK) // table.shape[1])


def _mix(x: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
    """triple32, a bijection of 32 bits (C. Wellons, "Prospecting for Hash Functions", 2018), in signed numbers. The
    key, if any, is added after the first of its three rounds. `x` is overwritten."""
    x = _xor_shift(x, 17).mul_(0xED5AD4BB - 2**32)
    x = _xor_shift(x, 11)
    if key is not None:
        x += key
    x = _xor_shift(x.mul_(0xAC4C1B51 - 2**32), 15)
    return _xor_shift(x.mul_(0x31848BAB), 14)


def _xor_shift(x: torch.Tensor, shift: int) -> torch.Tensor:
    # The shift of a signed number copies its sign; the mask makes it the shift of an unsigned one.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


class Row(NamedTuple):
    """What the host knows of one row of a batch.

    :param allowed_mask: of `TokenConstraint.allowed_mask`; None allows everything.
    :param num_output: ids given out so far.
    """

    options: SamplingOptions
    allowed_mask: Any | None = None
    num_output: int = 0


@dataclass(frozen=True)
class _Logprobs:
    """Of the rows that asked. `row_of`: batch row -> row here. chosen (rows,), top and top_ids (rows, most asked)."""

    row_of: dict[int, int]
    num_top: list[int]
    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor


@dataclass(frozen=True)
class Sampled:
    """Tensors on the device, perhaps not computed yet.

    :param token_ids: (batch,) int64. Any token where one of the next two is False.
    :param is_finite: (batch,) bool: the logits had neither NaN nor Inf.
    :param has_choice: (batch,) bool: the grammar and min_tokens left something to choose.
    """

    token_ids: torch.Tensor
    is_finite: torch.Tensor
    has_choice: torch.Tensor
    _logprobs: _Logprobs | None = None

    def start_copy(self) -> HostSampled:
        """Queue the copies to the host on the current stream and return at once. On CUDA, record an event afterwards,
        and wait for it before reading."""
        table = torch.stack([self.token_ids, self.is_finite.long(), self.has_choice.long()])
        logprobs = self._logprobs
        if logprobs is not None:
            logprobs = _Logprobs(
                logprobs.row_of,
                logprobs.num_top,
                _to_host(logprobs.chosen),
                _to_host(logprobs.top),
                _to_host(logprobs.top_ids),
            )
        return HostSampled(_to_host(table), logprobs)


class HostSampled:
    """What `Sampled.start_copy` copies; to be read once the copy is done."""

    def __init__(self, table: torch.Tensor, logprobs: _Logprobs | None) -> None:
        self._table = table
        self._logprobs = logprobs

    def tokens(self) -> list[int]:
        tokens: list[int] = self._table[0].tolist()
        return tokens

    def is_finite(self) -> list[bool]:
        return [bool(value) for value in self._table[1].tolist()]

    def has_choice(self) -> list[bool]:
        return [bool(value) for value in self._table[2].tolist()]

    def logprobs(self, row: int) -> TokenLogprobs | None:
        """None for a row that did not ask."""
        found = self._logprobs
        if found is None or row not in found.row_of:
            return None
        here = found.row_of[row]
        num = found.num_top[here]
        top = zip(found.top_ids[here, :num].tolist(), found.top[here, :num].tolist(), strict=True)
        return TokenLogprobs(float(found.chosen[here]), tuple(top))


class BatchSampler:
    """Samples rows of logits by options and history kept in tables on the device, one slot for each sequence.

    One thread, one stream. Takes 5 bytes of device memory for each slot and word; while `sample` works, about 30 for
    each word of the rows with options, and on CUDA 170 MB for top-p. Nothing here waits for the device.

    :param vocab_size: width of the logits.
    :param race: `race`, or a compiled form of it.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, race: Race = race) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.race = race
        self._floats = torch.zeros(num_slots, 6, device=device)
        self._ints = torch.zeros(num_slots, 4, dtype=torch.int64, device=device)
        self._is_seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stop_ids: dict[int, torch.Tensor] = {}
        # What to add to the scores of 8 words for a byte of a grammar's mask: 0 where its bit is set, else -inf.
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        self._octet_scores = bits.float().log_().to(device)

    @staticmethod
    def is_plain(options: SamplingOptions) -> bool:
        """Whether `draw` is enough for such a sequence, as long as it has no grammar: nothing but a temperature."""
        return (
            options.num_logprobs is None
            and not options.logit_bias
            and not _awaits_min_tokens(options, 0)
            and not _has_penalty(options)
            and not _has_filter(options)
        )

    def set_slot(
        self, slot: int, options: SamplingOptions, prompt_ids: Sequences[int], output_ids: Sequences[int]
    ) -> None:
        """Give a slot to a sequence that enters, or that comes back with the ids it has given out so far.

        :raise ValueError: a biased or, with penalties, a past id outside the vocabulary; on CUDA it would end all.
        """
        floats = [
            options.temperature,
            options.top_p,
            options.min_p,
            options.repetition_penalty,
            options.presence_penalty,
            options.frequency_penalty,
        ]
        self._floats[slot].copy_(self._upload(floats, torch.float32))
        self._ints[slot].copy_(self._upload([*noise_keys(options.seed), len(output_ids), options.top_k]))
        if options.repetition_penalty != 1.0:
            self._is_seen[slot].zero_().index_fill_(0, self._upload_ids({*prompt_ids, *output_ids}), True)
        if _has_count_penalty(options):
            ids = self._upload_ids(output_ids)
            self._counts[slot].zero_().index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self._biases.pop(slot, None)
        if options.logit_bias:
            values = self._upload([value for _, value in options.logit_bias], torch.float32)
            self._biases[slot] = (self._upload_ids([token_id for token_id, _ in options.logit_bias]), values)
        self._stop_ids.pop(slot, None)
        if _awaits_min_tokens(options, 0):
            # A tokenizer may know ids that the model cannot give.
            self._stop_ids[slot] = self._upload_ids([stop for stop in options.stop_ids if stop < self._vocab_size])

    def draw(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The next tokens of plain sequences, and on to their next position. May be captured in a CUDA graph.

        :param logits: (batch, vocab_size), any float type.
        :param slots: (batch,) int64, on the device.
        :return: (batch,) int64.
        """
        token_ids = self.race(logits, *self._race_arguments(slots))
        self._advance(slots)
        return token_ids

    def sample(
        self, logits: torch.Tensor, slots: Sequences[int], slots_tensor: torch.Tensor, rows: Sequences[Row]
    ) -> Sampled:
        """The next tokens of any sequences, and on to their next position. A row's token does not depend on the other
        rows, and what they ask for costs it nothing.

        :param logits: (batch, vocab_size), any float type; not changed.
        :param slots: a slot for each row, none twice.
        :param slots_tensor: the same on the device, (batch,) int64.
        :raise ValueError: a mask of another length than this vocabulary's.
        """
        shaped = [index for index, row in enumerate(rows) if _is_shaped(row)]
        plain = sorted({*range(len(rows))} - {*shaped})
        asking = [index for index, row in enumerate(rows) if row.options.num_logprobs is not None]
        # On a CPU a few rows at a time go faster, see `_CPU_BLOCK`.
        step = _block_rows(logits) if logits.device.type == "cpu" else len(rows)
        blocks = [shaped[start : start + step] for start in range(0, len(shaped), step)]
        plain_index, asking_index, *block_indices = self._upload_lists(plain, asking, *blocks)
        token_ids = torch.empty_like(slots_tensor)
        has_choice = torch.ones_like(slots_tensor, dtype=torch.bool)
        for block, index in zip(blocks, block_indices, strict=True):
            their_slots = _take(slots_tensor, index)
            scores, can_choose = self.shape(
                _take(logits, index), [slots[i] for i in block], their_slots, [rows[i] for i in block]
            )
            # The scores are divided by the temperature already: 1 for who draws, 0 for who does not.
            temperature, *noise = self._race_arguments(their_slots)
            arguments = ((temperature >= _MIN_TEMPERATURE).float(), *noise)
            is_any_drawn = any(_is_drawn(rows[i].options) for i in block)
            _put(token_ids, index, self.race(scores, *arguments) if is_any_drawn else greedy(scores))
            _put(has_choice, index, can_choose)
        if plain:
            their_logits = _take(logits, plain_index)
            is_any_drawn = any(_is_drawn(rows[i].options) for i in plain)
            arguments = self._race_arguments(_take(slots_tensor, plain_index))
            _put(token_ids, plain_index, self.race(their_logits, *arguments) if is_any_drawn else greedy(their_logits))
        self._advance(slots_tensor)
        if any(_has_penalty(row.options) for row in rows):
            words = slots_tensor * self._vocab_size + token_ids
            self._is_seen.view(-1).index_fill_(0, words, True)
            self._counts.view(-1).index_add_(0, words, torch.ones_like(words, dtype=torch.int32))
        logprobs = None
        if asking:
            num_top = [rows[i].options.num_logprobs or 0 for i in asking]
            logprobs = self._logprobs(_take(logits, asking_index), _take(token_ids, asking_index), asking, num_top)
        return Sampled(token_ids, is_finite(logits), has_choice, logprobs)

    def shape(
        self, logits: torch.Tensor, slots: Sequences[int], slots_tensor: torch.Tensor, rows: Sequences[Row]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `sample` draws from, of any rows. Parameters as there; changes nothing.

        :return: (batch, vocab_size) float32 scores of which the softmax is the distribution, the likeliest at 0, those
            that cannot be chosen at -1e20 or less (greedy rows: only the likeliest matters); and (batch,) bool, whether
            anything could be chosen.
        """
        options = [row.options for row in rows]
        scores = logits.to(torch.float32, copy=True)
        for index, slot in enumerate(slots):
            if options[index].logit_bias:
                scores[index].index_add_(0, *self._biases[slot])
        masks = {index: row.allowed_mask for index, row in enumerate(rows) if row.allowed_mask is not None}
        masked, repeating, counting = self._upload_lists(
            [*masks],
            [index for index, each in enumerate(options) if each.repetition_penalty != 1.0],
            [index for index, each in enumerate(options) if _has_count_penalty(each)],
        )
        if masks:
            _put(scores, masked, _take(scores, masked) + self._unpack([*masks.values()]))
        for index, slot in enumerate(slots):
            if _awaits_min_tokens(options[index], rows[index].num_output):
                scores[index].index_fill_(0, self._stop_ids[slot], -torch.inf)
        # Each (batch, 1), to go with (batch, vocab_size).
        temperature, top_p, min_p, repetition, presence, frequency = self._floats[slots_tensor].chunk(6, dim=1)
        if len(repeating):
            is_seen = self._is_seen[_take(slots_tensor, repeating)]
            _put(scores, repeating, _penalise(_take(scores, repeating), is_seen, _take(repetition, repeating)))
        if len(counting):
            counts = self._counts[_take(slots_tensor, counting)]
            lost = counts.float() * _take(frequency, counting)
            lost += counts.clamp_(max=1).float() * _take(presence, counting)
            _put(scores, counting, _take(scores, counting) - lost)

        likeliest = scores.amax(-1, keepdim=True)
        can_choose = (likeliest > -torch.inf).squeeze(1)
        # NaN in a row without a choice, and in one that is not finite: harmless, they are told of.
        distance = torch.sub(likeliest, scores, out=scores)
        distance /= temperature.masked_fill(temperature < _MIN_TEMPERATURE, 1.0)
        if any(_has_filter(each) for each in options):
            distance = self._filter(distance, slots_tensor, options, top_p, min_p)
        return distance.neg_(), can_choose

    def _filter(
        self,
        distance: torch.Tensor,
        slots: torch.Tensor,
        options: Sequences[SamplingOptions],
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> torch.Tensor:
        """Put out of reach what top-k, top-p and min-p cut.

        :param distance: (batch, vocab_size), how far a score is below the likeliest; its probability is exp(-distance)
            of the likeliest's.
        :param top_p, min_p: (batch, 1).
        """
        few: list[int] = []
        many: list[int] = []
        nucleus: list[int] = []
        for index, each in enumerate(options):
            if not _is_drawn(each):
                continue
            if 0 < each.top_k < self._vocab_size:
                (few if each.top_k <= _FEW else many).append(index)
            elif each.top_p < 1.0:
                nucleus.append(index)
        limit = -min_p.log()
        few_index, many_index, nucleus_index = self._upload_lists(few, many, nucleus)
        for group, group_index in ((few, few_index), (many, many_index)):
            if group:
                top_k = self._ints[_take(slots, group_index), 3:]
                largest = max(options[index].top_k for index in group)
                found = _top_k_limit(_take(distance, group_index), top_k, largest, _take(top_p, group_index))
                _put(limit, group_index, torch.minimum(_take(limit, group_index), found))
        if nucleus:
            found = _top_p_limit(_take(distance, nucleus_index), _take(top_p, nucleus_index))
            _put(limit, nucleus_index, torch.minimum(_take(limit, nucleus_index), found))
        # Where a distance is above its limit, add so much that no noise makes up for it. Selecting by a table of bools
        # does the same, 20 times slower on a CPU.
        excess = (distance - limit.clamp_(max=_LARGEST_FLOAT)).clamp_(min=0)
        return torch.add(distance, excess, alpha=_LARGEST_FLOAT)

    def _race_arguments(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Temperature (batch,), keys (batch, 2), positions (batch,)."""
        ints = self._ints[slots]
        return self._floats[slots, 0], ints[:, :2], ints[:, 2]

    def _advance(self, slots: torch.Tensor) -> None:
        self._ints[:, 2].index_add_(0, slots, torch.ones_like(slots))

    def _logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, asking: list[int], num_top: list[int]
    ) -> _Logprobs:
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
        top, top_ids = logprobs.topk(min(max(num_top), self._vocab_size))
        return _Logprobs({row: here for here, row in enumerate(asking)}, num_top, chosen, top, top_ids)

    def _unpack(self, masks: list[Any]) -> torch.Tensor:
        """(rows, vocab_size) float32: 0 for what is allowed, else -inf."""
        words = np.empty((len(masks), -(-self._vocab_size // 32)), dtype=np.int32)
        for row, mask in enumerate(masks):
            if mask.shape != words.shape[1:]:
                raise ValueError(f"a mask of {mask.shape} words for {words.shape[1]}")
            words[row] = mask
        octets = self._move(torch.from_numpy(words.view(np.uint8))).long()
        return self._octet_scores[octets].view(len(masks), -1)[:, : self._vocab_size]

    def _upload_ids(self, ids: Iterable[int]) -> torch.Tensor:
        listed = list(ids)
        if listed and not 0 <= min(listed) <= max(listed) < self._vocab_size:
            raise ValueError(f"a token id outside of 0 to {self._vocab_size - 1}")
        return self._upload(listed)

    def _upload_lists(self, *lists: list[int]) -> tuple[torch.Tensor, ...]:
        """All in one copy."""
        together = self._upload([value for each in lists for value in each])
        return torch.split_with_sizes(together, [len(each) for each in lists])

    def _upload(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._move(torch.tensor(values, dtype=dtype))

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        # From ordinary memory the copy would wait for all that the device has to do before it.
        if self._device.type == "cuda" and tensor.numel():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _is_drawn(options: SamplingOptions) -> bool:
    return options.temperature >= _MIN_TEMPERATURE


def _has_filter(options: SamplingOptions) -> bool:
    return _is_drawn(options) and (options.top_k > 0 or options.top_p < 1.0 or options.min_p > 0.0)


def _has_count_penalty(options: SamplingOptions) -> bool:
    return options.presence_penalty != 0.0 or options.frequency_penalty != 0.0


def _has_penalty(options: SamplingOptions) -> bool:
    return options.repetition_penalty != 1.0 or _has_count_penalty(options)


def _awaits_min_tokens(options: SamplingOptions, num_output: int) -> bool:
    return num_output < options.min_tokens and bool(options.stop_ids)


def _is_shaped(row: Row) -> bool:
    """Whether more than a temperature stands between the row's logits and its distribution."""
    options = row.options
    return (
        row.allowed_mask is not None
        or bool(options.logit_bias)
        or _awaits_min_tokens(options, row.num_output)
        or _has_penalty(options)
        or _has_filter(options)
    )


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of an index without repetition, in order; the tensor itself if these are all."""
    return tensor if len(index) == len(tensor) else tensor.index_select(0, index)


def _put(tensor: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write back what `_take` took."""
    if len(index) == len(tensor):
        tensor.copy_(rows)
    else:
        tensor.index_copy_(0, index, rows)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _penalise(scores: torch.Tensor, is_seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """CTRL's repetition penalty (arXiv:1909.05858, section 4.1) with the sign rule of transformers."""
    seen = is_seen.float()
    factor = (1.0 - seen).add_(seen.mul_(penalty))
    # One of the two halves is 0, so the sum is exact; on a CPU far faster than choosing between them.
    return (scores.clamp(min=0) / factor).add_(scores.clamp(max=0).mul_(factor))


def _mass(distance: torch.Tensor) -> torch.Tensor:
    """Probabilities as whole numbers, int64, in 2**-40 of the likeliest's."""
    return distance.neg().exp_().mul_(_MASS_UNITS).long()


def _share(mass: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The mass that must be reached, at least 1. (batch, 1) each."""
    return (mass.double() * top_p).ceil_().long().clamp_(min=1)


def _top_k_limit(distance: torch.Tensor, top_k: torch.Tensor, largest_k: int, top_p: torch.Tensor) -> torch.Tensor:
    """Largest distance that top-k, and then top-p of what is left, keep.

    :param distance: (rows, vocab_size) float32.
    :param top_k: (rows, 1) int64, from 1 to `largest_k`.
    :param top_p: (rows, 1) float32; 1 for none.
    :return: (rows, 1) float32.
    """
    nearest = distance.topk(largest_k, largest=False).values
    last = top_k - 1
    kth = nearest.gather(1, last)
    is_kept = torch.arange(largest_k, device=distance.device) <= last
    # What ties with the k-th stays too, and counts.
    num_tied = (distance == kth).sum(-1, keepdim=True) - ((nearest == kth) & is_kept).sum(-1, keepdim=True)
    mass = _mass(nearest) * is_kept
    share = _share(mass.sum(-1, keepdim=True) + num_tied * _mass(kth), top_p)
    num_short = (mass.cumsum(-1) < share).sum(-1, keepdim=True)
    return torch.where(top_p < 1.0, nearest.gather(1, torch.minimum(num_short, last)), kth)


def _top_p_limit(distance: torch.Tensor, top_p: torch.Tensor, is_compacting: bool | None = None) -> torch.Tensor:
    """Largest distance that top-p keeps: the smallest within which the probabilities reach `top_p` of their sum.

    A radix search instead of a sort: the distance's bits, in the order of its value since it is not negative, are found
    digit by digit from a histogram of the probabilities.

    :param distance: (rows, vocab_size) float32, not negative.
    :param top_p: (rows, 1) float32.
    :param is_compacting: drop what is out of the search after each digit, which is fast on a CPU; on CUDA its size
        would have to be waited for. By default as the device is.
    :return: (rows, 1) float32.
    """
    if is_compacting is None:
        is_compacting = distance.device.type == "cpu"
    block = _block_rows(distance)
    parts = zip(torch.split(distance, block), torch.split(top_p, block), strict=True)
    return torch.cat([_search(part, share, is_compacting) for part, share in parts])


def _search(distance: torch.Tensor, top_p: torch.Tensor, is_compacting: bool) -> torch.Tensor:
    num_rows = len(distance)
    bits, mass = distance.contiguous().view(torch.int32), _mass(distance)
    row = torch.arange(num_rows, dtype=torch.int32, device=distance.device)[:, None]
    missing = _share(mass.sum(-1, keepdim=True), top_p)
    found = torch.zeros_like(missing)
    for shift, width in _DIGITS:
        # The mask also keeps the bits of a NaN within the histogram.
        digit = (bits >> shift).bitwise_and_((1 << width) - 1)
        histogram = mass.new_zeros(num_rows << width)
        histogram.scatter_add_(0, (digit + (row << width)).long().flatten(), mass.flatten())
        sums = histogram.view(num_rows, -1).cumsum(-1)
        best = (sums < missing).sum(-1, keepdim=True).clamp_(max=(1 << width) - 1)
        missing -= sums.gather(1, best) - histogram.view(num_rows, -1).gather(1, best)
        found = (found << width) | best
        is_inside = digit == best.int().squeeze(1)[row]
        if is_compacting:
            inside = is_inside.nonzero(as_tuple=True)
            row, bits, mass = row.expand_as(is_inside)[inside], bits[inside], mass[inside]
        else:
            mass = mass * is_inside
    return found.int().view(torch.float32)
