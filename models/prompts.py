"""From a valid request to token ids and picture tensors, and from its wishes to what the engine samples by.

Text is encoded by `models/tokenizer.py`. Pictures: `AutoImageProcessor`, and the placeholder of each expanded by
ourselves to the number of visual tokens. The library's combined processor is not used: it insists on torchvision for
videos, which we do not take. What the engine needs besides pixels (rotary positions, where each picture stands, a key
of its content) is made here as well, in the request's thread: the loop has no time for it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from config import Limits
from models.engine.sequence import PictureSpan, SamplingOptions, TokenConstraint
from models.engine.vision import VisionInputs
from models.errors import InternalError, InvalidRequest, PromptTooLong
from models.grammars import GrammarCompiler
from models.images import decode
from models.schemas import ImageRequest, RawRequest, Request, SamplingParams
from models.tokenizer import TextTokenizer

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


class PromptEncoder:
    """Requests of one model to prompts and resolved sampling options. Any thread may call it.

    :param generation_defaults: `top_p`, `top_k`, `min_p`, `repetition_penalty` of the snapshot's
        generation_config.json.
    :param context_tokens: most tokens of prompt and answer together.
    :param vocab_size: ids of the model, whether the tokenizer has a token for each or not.
    :param placeholder_ids: what stands for pictures and videos in a prompt; never taken from a user.
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
        vocab_size: int,
        limits: Limits,
        placeholder_ids: frozenset[int] = frozenset(),
        image_processor: Any = None,
        image_token_id: int | None = None,
        rope_index: RopeIndex | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.context_tokens = context_tokens
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._placeholder_ids = placeholder_ids
        self._defaults = generation_defaults
        self._limits = limits
        self._processor = image_processor
        self._image_token_id = image_token_id
        self._rope_index = rope_index
        self._decode_slots = threading.BoundedSemaphore(limits.max_concurrent_decodes)

    def encode(self, request: Request, check: Callable[[], None]) -> EncodedPrompt:
        """:param check: called before and while waiting for each costly step; raises if the request has ended.
        :raise PromptTooLong: prompt and `max_tokens` together exceed the context.
        :raise InvalidImage: the pixels of a picture are truncated or broken.
        :raise InvalidRequest, ToolsUnsupported: see `TextTokenizer.encode_chat`; or a token id that cannot be taken.
        """
        if isinstance(request, ImageRequest):
            return self._encode_pictures(request, check)
        ids = self.encode_text(request)
        self._check_length(len(ids), request)
        return EncodedPrompt(tuple(ids))

    def encode_text(self, request: Request) -> list[int]:
        """Token ids of a prompt, however long; one placeholder for each picture.

        :raise InvalidRequest, ToolsUnsupported: as `encode`.
        """
        if isinstance(request, RawRequest):
            if isinstance(request.prompt, str):
                return self.tokenizer.encode_raw(request.prompt)
            return self._checked_ids(request.prompt)
        num_images = len(request.images) if isinstance(request, ImageRequest) else 0
        return self.tokenizer.encode_chat(request.messages, num_images, request.chat)

    def _checked_ids(self, ids: tuple[int, ...]) -> list[int]:
        for index, token_id in enumerate(ids):
            self.check_id(token_id, "prompt", f"prompt[{index}]")
            if token_id in self._placeholder_ids:
                raise InvalidRequest(
                    f"prompt[{index}]: token id {token_id} stands for a picture, and there is none", field="prompt"
                )
        return list(ids)

    def check_id(self, token_id: int, field: str, place: str) -> None:
        """:param place: where in the field, for the message.
        :raise InvalidRequest: the model has no such token id.
        """
        if not 0 <= token_id < self._vocab_size:
            raise InvalidRequest(
                f"{place}: a token id must be at least 0 and less than {self._vocab_size}, got {token_id}", field=field
            )

    def sampling_options(self, params: SamplingParams, num_prompt: int) -> SamplingOptions:
        """A request's wishes, then the snapshot's defaults, then none; a fresh seed if none was given.

        :param num_prompt: tokens of the prompt, which `encode` found short enough.
        :raise InvalidRequest: a token id that the model does not have.
        """

        def pick(given: float | None, name: str, neutral: float) -> float:
            return given if given is not None else self._defaults.get(name, neutral)

        for index, token_id in enumerate(params.stop_token_ids):
            self.check_id(token_id, "stop_token_ids", f"stop_token_ids[{index}]")
        for token_id, _ in params.logit_bias:
            self.check_id(token_id, "logit_bias", "logit_bias")
        room = min(self._limits.max_tokens, self.context_tokens - num_prompt)
        return SamplingOptions(
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            temperature=params.temperature,
            top_p=pick(params.top_p, "top_p", 1.0),
            top_k=int(pick(params.top_k, "top_k", 0)),
            repetition_penalty=pick(params.repetition_penalty, "repetition_penalty", 1.0),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=(frozenset() if params.ignore_eos else self._stop_ids) | frozenset(params.stop_token_ids),
            min_p=pick(params.min_p, "min_p", 0.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            logit_bias=params.logit_bias,
            num_logprobs=params.num_logprobs,
        )

    def constraint(self, params: SamplingParams, check: Callable[[], None]) -> TokenConstraint | None:
        """What holds the answer to its grammar, if it has one.

        :param check: called while waiting for a compilation; raises if the request has ended.
        :raise InvalidSchema, QueueFull: see `GrammarCompiler.compile`.
        """
        if params.grammar is None:
            return None
        if self.grammars is None:
            raise InternalError("this model was loaded without grammars")
        return self.grammars.compile(params.grammar, check).start()

    def _encode_pictures(self, request: ImageRequest, check: Callable[[], None]) -> EncodedPrompt:
        ids = self.encode_text(request)
        expected = [self._visual_tokens(image.header.height, image.header.width) for image in request.images]
        # From the headers alone, before any picture is decoded.
        num_visual = sum(expected)
        self._check_length(len(ids) - len(expected) + num_visual, request, num_visual)
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
        self._check_length(len(expanded), request, sum(counts))
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

    def _check_length(self, num_prompt: int, request: Request, num_visual: int = 0) -> None:
        max_tokens = request.sampling.max_tokens
        num_answer = 1 if max_tokens is None else max_tokens
        if num_prompt + num_answer > self.context_tokens:
            field = "prompt" if isinstance(request, RawRequest) else request.chat.field
            pictures = f" ({num_visual} of them for pictures)" if num_visual else ""
            answer = "an answer of 1" if max_tokens is None else f"max_tokens {max_tokens}"
            raise PromptTooLong(
                f"{field}: {num_prompt} tokens{pictures} and {answer} together must be at most "
                f"{self.context_tokens} tokens, got {num_prompt + num_answer}",
                field=field,
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
