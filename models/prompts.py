"""From a valid request to token ids and picture tensors.

User text never becomes a control token, in any role: the chat template is rendered around placeholders, its own
pieces are encoded with the full tokenizer, and each content with a copy that has no added vocabulary at all.
(`split_special_tokens` would not do: it leaves added tokens that are not marked special, such as `<tool_call>`.)

Pictures: `AutoImageProcessor`, and the placeholder of each expanded by ourselves to the number of visual tokens. The
library's combined processor is not used: it insists on torchvision for videos, which we do not take. What the engine
needs besides pixels (rotary positions, where each picture stands, a key of its content) is made here as well, in the
request's thread: the loop has no time for it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from config import Limits
from models.engine.sequence import PictureSpan, SamplingOptions
from models.engine.vision import VisionInputs
from models.errors import InternalError, LoadError, PromptTooLong
from models.grammars import GrammarCompiler
from models.images import decode
from models.schemas import ImageRequest, Message, SamplingParams, TextRequest

# Every letter a user is likely to type, and none that a normalizer would change.
_PROBE = "Plain text 0123456789, простой текст: ёжик! 漢字 🎉"


# (ids (1, tokens), token types (1, tokens), image grids (pictures, 3)) -> (positions (3, 1, tokens), delta (1, 1))
RopeIndex = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class EncodedPrompt:
    """What the engine takes: see `engine.sequence.Sequence` for `pictures` and `prefix_ids`.

    :param ids: token ids of the whole prompt, picture placeholders expanded.
    :param vision: None for text, as is `prefix_ids`.
    """

    ids: tuple[int, ...]
    vision: VisionInputs | None = None
    pictures: tuple[PictureSpan, ...] = ()
    prefix_ids: tuple[int, ...] | None = None


class TextTokenizer:
    """Encodes trusted template text and untrusted content apart; decodes answers. Any thread may call it.

    :param tokenizer: a fast tokenizer of transformers with a chat template.
    :raise LoadError: it is not a fast byte-level BPE, or has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise LoadError("the tokenizer must be a fast one (tokenizer.json)")
        if not tokenizer.chat_template:
            raise LoadError("the snapshot has no chat template")
        self._tokenizer = tokenizer
        self._template: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer.json may carry settings of its training, which would cut prompts silently.
        self._template.no_truncation()
        self._template.no_padding()
        self._content, self._added_ids = _without_added_vocabulary(self._template)

    def encode_chat(self, messages: tuple[Message, ...], num_images: int = 0) -> list[int]:
        """Token ids of a chat up to the place where the answer begins; one placeholder id for each picture."""
        # Placeholders that nobody can guess; letters only, so that no template trims or splits them.
        marks = [f"content{secrets.token_hex(16)}end" for _ in messages]
        turns = []
        for index, (message, mark) in enumerate(zip(messages, marks, strict=True)):
            content: object = mark
            if num_images and index == len(messages) - 1:
                content = [{"type": "image"}] * num_images + [{"type": "text", "text": mark}]
            turns.append({"role": message.role, "content": content})
        rest = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise InternalError("the model's chat template dropped a message")
            ids += self._template.encode(before, add_special_tokens=False).ids
            ids += self.encode_content(message.content)
        return ids + self._template.encode(rest, add_special_tokens=False).ids

    def encode_content(self, text: str) -> list[int]:
        """Token ids of a user's text, none of them of the added vocabulary."""
        ids: list[int] = self._content.encode(text, add_special_tokens=False).ids
        if not self._added_ids.isdisjoint(ids):
            raise InternalError("the tokenizer made a control token of plain text; the request was refused")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._template.decode(list(ids), skip_special_tokens=True)
        return text


def _without_added_vocabulary(tokenizer: Tokenizer) -> tuple[Tokenizer, frozenset[int]]:
    """A copy of a tokenizer that cannot make an added token, and the ids that it must never make.

    An added token may stand in the base vocabulary and its merges too; it goes from there as well, so that a word
    which happens to be one is made of smaller pieces.

    :raise LoadError: not a BPE tokenizer, or without its added tokens it cannot encode plain text.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise LoadError(f"the tokenizer must be a byte-level BPE, got {model.get('type')}")
    added = {token["content"]: token["id"] for token in state.get("added_tokens", [])}
    state["added_tokens"] = []
    state["post_processor"] = None
    vocabulary = {token: token_id for token, token_id in model["vocab"].items() if token not in added}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model["merges"] = [[a, b] for a, b in merges if a in vocabulary and b in vocabulary and a + b in vocabulary]
    model["vocab"] = vocabulary
    if model.get("unk_token") in added:
        model["unk_token"] = None
    content = Tokenizer.from_str(json.dumps(state))
    content.no_truncation()
    content.no_padding()
    if content.decode(content.encode(_PROBE, add_special_tokens=False).ids).strip() != _PROBE:
        raise LoadError("the tokenizer loses plain text once its added tokens are taken away")
    return content, frozenset(added.values())


class PromptEncoder:
    """Requests of one model to prompts and resolved sampling options. Any thread may call it.

    :param generation_defaults: `top_p`, `top_k`, `min_p`, `repetition_penalty` of the snapshot's
        generation_config.json.
    :param context_tokens: most tokens of prompt and answer together.
    :param image_processor: an image processor of transformers; None for a text model, as are the next two.
    :param image_token_id: the placeholder of pictures.
    :param rope_index: rotary positions of a prompt with pictures, called with CPU tensors from any thread: the
        library's own `get_rope_index`, which reads only the model's configuration.
    :param grammars: compiles what structured answers must be; None: this model gives none.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        stop_ids: frozenset[int],
        generation_defaults: Mapping[str, float],
        context_tokens: int,
        limits: Limits,
        image_processor: Any = None,
        image_token_id: int | None = None,
        rope_index: RopeIndex | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.context_tokens = context_tokens
        self._stop_ids = stop_ids
        self._defaults = generation_defaults
        self._limits = limits
        self._processor = image_processor
        self._image_token_id = image_token_id
        self._rope_index = rope_index
        self._decode_slots = threading.BoundedSemaphore(limits.max_concurrent_decodes)

    def encode(self, request: TextRequest | ImageRequest, check: Callable[[], None]) -> EncodedPrompt:
        """:param check: called before and while waiting for each costly step; raises if the request has ended.
        :raise PromptTooLong: prompt and `max_tokens` together exceed the context.
        :raise InvalidImage: the pixels of a picture are truncated or broken.
        """
        if isinstance(request, TextRequest):
            ids = self.tokenizer.encode_chat(request.messages)
            self._check_length(len(ids), request.sampling.max_tokens)
            return EncodedPrompt(tuple(ids))
        return self._encode_pictures(request, check)

    def sampling_options(self, params: SamplingParams) -> SamplingOptions:
        """A request's wishes, then the snapshot's defaults, then none; a fresh seed if none was given."""

        def pick(given: float | None, name: str, neutral: float) -> float:
            return given if given is not None else self._defaults.get(name, neutral)

        return SamplingOptions(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=pick(params.top_p, "top_p", 1.0),
            top_k=int(pick(params.top_k, "top_k", 0)),
            repetition_penalty=pick(params.repetition_penalty, "repetition_penalty", 1.0),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=self._stop_ids,
            min_p=pick(params.min_p, "min_p", 0.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
        )

    def _encode_pictures(self, request: ImageRequest, check: Callable[[], None]) -> EncodedPrompt:
        ids = self.tokenizer.encode_chat(request.messages, num_images=len(request.images))
        expected = [self._visual_tokens(image.header.height, image.header.width) for image in request.images]
        # From the headers alone, before any picture is decoded.
        num_visual = sum(expected)
        self._check_length(len(ids) - len(expected) + num_visual, request.sampling.max_tokens, num_visual)
        grids, pixels, keys = [], [], []
        for image in request.images:
            with self._decode_slot(check):
                picture = decode(image.data, image.header, field=image.field)
                features = self._processor(images=[picture], return_tensors="pt")
                pixels.append(features["pixel_values"])
                grids.append(features["image_grid_thw"])
                keys.append(_picture_key(pixels[-1], grids[-1]))
        grid = torch.cat(grids)
        patches = grid.prod(-1).tolist()
        counts = [num // self._processor.merge_size**2 for num in patches]
        expanded, starts = self._expand(ids, counts)
        self._check_length(len(expanded), request.sampling.max_tokens, sum(counts))
        check()
        prefix_ids = list(expanded)
        for start, count, key in zip(starts, counts, keys, strict=True):
            prefix_ids[start : start + count] = [_prefix_id(key)] * count
        positions, delta = self._positions(expanded, grid)
        return EncodedPrompt(
            ids=tuple(expanded),
            vision=VisionInputs(tuple(pixels), grid, positions, delta),
            pictures=tuple(PictureSpan(*span) for span in zip(starts, counts, patches, keys, strict=True)),
            prefix_ids=tuple(prefix_ids),
        )

    def _positions(self, ids: list[int], grid: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(3, tokens) and the delta, as `VisionInputs` has them."""
        assert self._rope_index is not None and self._image_token_id is not None
        row = torch.tensor([ids])
        # Token types: 1 for a picture's placeholder, 0 for text.
        positions, delta = self._rope_index(row, torch.eq(row, self._image_token_id).int(), grid)
        return positions[:, 0].contiguous(), int(delta)

    @contextmanager
    def _decode_slot(self, check: Callable[[], None]) -> Iterator[None]:
        while True:
            check()
            if self._decode_slots.acquire(timeout=self._limits.client_check_interval_s):
                break
        try:
            yield
        finally:
            self._decode_slots.release()

    def _visual_tokens(self, height: int, width: int) -> int:
        """About (height / 28) * (width / 28) after scaling, by the library's own formula. The EXIF orientation may
        swap the sides, which leaves the number as it is."""
        patches: int = self._processor.get_number_of_image_patches(height, width)
        merge: int = self._processor.merge_size
        return patches // merge**2

    def _expand(self, ids: list[int], counts: list[int]) -> tuple[list[int], list[int]]:
        """The ids with each placeholder as often as its picture has tokens, and where each picture begins."""
        if ids.count(self._image_token_id or -1) != len(counts):
            raise InternalError("the model's chat template did not place every picture")
        remaining = iter(counts)
        expanded: list[int] = []
        starts: list[int] = []
        for token_id in ids:
            if token_id == self._image_token_id:
                starts.append(len(expanded))
                expanded += [token_id] * next(remaining)
            else:
                expanded.append(token_id)
        return expanded, starts

    def _check_length(self, num_prompt: int, max_tokens: int, num_visual: int = 0) -> None:
        if num_prompt + max_tokens > self.context_tokens:
            pictures = f" ({num_visual} of them for pictures)" if num_visual else ""
            raise PromptTooLong(
                f"prompt: {num_prompt} tokens{pictures} and max_tokens {max_tokens} together must be at most "
                f"{self.context_tokens} tokens, got {num_prompt + max_tokens}",
                field="prompt",
            )


def _picture_key(pixel_values: torch.Tensor, grid: torch.Tensor) -> bytes:
    """16 bytes: equal for what the vision tower cannot tell apart. The same patches in another grid are another
    picture. BLAKE2b because a user chooses the pictures, and must not find two of one key; 1 GB/s."""
    digest = hashlib.blake2b(_bytes_of(grid), digest_size=16)
    digest.update(_bytes_of(pixel_values))
    return digest.digest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")


def _prefix_id(key: bytes) -> int:
    """Stands for a picture's placeholders where prompts are compared: negative, so never a token id, and of 64 bits."""
    return -(int.from_bytes(key[:7]) + 1)
