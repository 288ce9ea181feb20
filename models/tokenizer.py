"""From chats and texts to token ids, and back: `TextTokenizer`.

User text never becomes a control token, in any role or field. The chat template is rendered around marks that nobody
can guess; in what it gives, only its own pieces are looked through for control tokens. What lies between two of them,
the template's words and the user's alike, is encoded in one go with a copy of the tokenizer that has no added
vocabulary at all: the ids are those of the library's own way, but for control tokens that a user typed, which stay
text.
(`split_special_tokens` would not do: it leaves added tokens that are not marked special, such as `<tool_call>`.)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _get_template_variables

from models.errors import InternalError, InvalidRequest, LoadError, ToolsUnsupported
from models.schemas import ChatOptions, Message

# Every letter a user is likely to type, and none that a normalizer would change.
_PROBE = "Plain text 0123456789, простой текст: ёжик! 漢字 🎉"
# Variables of a chat template that are not the user's to set.
_OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception")
)
_NO_OPTIONS = ChatOptions()
# No usual control token is made of these alone.
_PLAIN = re.compile(r"[A-Za-z0-9_.\- ]*")
TOOL_CALL_OPENING, TOOL_CALL_CLOSING = "<tool_call>", "</tool_call>"


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
        added = (str(self._template.id_to_token(token_id)) for token_id in self._added_ids)
        self._plain_added_tokens = tuple(token for token in added if _PLAIN.fullmatch(token))
        #: What the chat template may be told beside the chat.
        self.template_variables = (
            frozenset(_get_template_variables(tokenizer.chat_template))
            - _OWN_VARIABLES
            - frozenset(tokenizer.special_tokens_map)
        )
        #: Whether the chat template has a place for tools, and the model calls them as Qwen and Hermes do.
        self.has_tools = self._find_tools()

    def _find_tools(self) -> bool:
        template = self._tokenizer.chat_template
        if "tools" not in _get_template_variables(template) or TOOL_CALL_OPENING not in template:
            return False
        # Special tokens are left out of texts, and a call would not be seen.
        special = set(self._tokenizer.all_special_tokens)
        return special.isdisjoint((TOOL_CALL_OPENING, TOOL_CALL_CLOSING))

    def encode_chat(
        self, messages: Sequence[Message], num_images: int = 0, chat: ChatOptions = _NO_OPTIONS
    ) -> list[int]:
        """Token ids of a chat up to the place where the answer begins; one placeholder id for each picture.

        :raise InvalidRequest: the chat template refuses the chat, has no place for one of its messages, or does not
            know a variable.
        :raise ToolsUnsupported: there are tools and the chat template has no place for them.
        """
        unknown = sorted(set(chat.template_values) - self.template_variables)
        if unknown:
            known = ", ".join(sorted(self.template_variables)) or "none"
            raise InvalidRequest(
                f"chat_template_kwargs.{unknown[0]}: the model's chat template has no such variable; it has: {known}",
                field="chat_template_kwargs",
            )
        for name, value in chat.template_values.items():
            if isinstance(value, str) and any(token in value for token in self._plain_added_tokens):
                raise InvalidRequest(
                    f"chat_template_kwargs.{name}: has a control token of this model", field="chat_template_kwargs"
                )
        if not self.has_tools and (chat.tools or any(message.tool_calls for message in messages)):
            raise ToolsUnsupported(
                "tools: this model's chat template has none", field="tools" if chat.tools else "messages"
            )
        marks = _Marks(self._plain_added_tokens)
        has_places = any(not isinstance(message.content, str) for message in messages)
        turns = []
        for index, message in enumerate(messages):
            num_before = num_images if index == len(messages) - 1 and not has_places else 0
            turns.append(_turn(message, num_before, marks, f"messages[{index}].content"))
        values = {"tools": marks.hide(chat.tools)} if chat.tools else {}
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=chat.has_answer_opening, **values, **chat.template_values
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidRequest(
                f"messages: refused by the model's chat template: {reason}", field="messages"
            ) from None
        except (TypeError, ValueError):  # a variable, or a call's argument, of a type that it cannot print
            raise InvalidRequest(
                "messages: the model's chat template cannot show them with these variables and arguments",
                field="messages",
            ) from None
        return self._encode_rendered(rendered, marks)

    def _encode_rendered(self, rendered: str, marks: _Marks) -> list[int]:
        ids: list[int] = []
        run: list[str] = []  # what was not yet encoded since the last control token
        end = 0
        for match in _Marks.PATTERN.finditer(rendered):
            if match[1] not in marks:
                continue  # somebody typed what looks like one where plain words are left as they are
            self._read_template(rendered[end : match.start()], run, ids)
            run.append(marks.text_of(match))
            end = match.end()
        self._read_template(rendered[end:], run, ids)
        marks.check_all_used()
        return ids + self.encode_content("".join(run))

    def _read_template(self, text: str, run: list[str], ids: list[int]) -> None:
        encoding = self._template.encode(text, add_special_tokens=False)
        read = 0
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._added_ids:
                run.append(text[read:begin])
                ids += self.encode_content("".join(run))
                ids.append(token_id)
                run.clear()
                read = end
        run.append(text[read:])

    def encode_raw(self, text: str) -> list[int]:
        """A prompt of its own: what the tokenizer puts before each text (`<s>` for some), then the text as content."""
        opening: list[int] = self._template.encode("", add_special_tokens=True).ids
        return opening + self.encode_content(text)

    def encode_content(self, text: str) -> list[int]:
        """Token ids of a user's text, none of them of the added vocabulary."""
        ids: list[int] = self._content.encode(text, add_special_tokens=False).ids
        if not self._added_ids.isdisjoint(ids):
            raise InternalError("the tokenizer made a control token of plain text; the request was refused")
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._template.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, perhaps a part of a character; empty for an id without a token."""
        token = self._template.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return token.encode()
        return bytes(_BYTE_BY_CHAR[char] for char in token)


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


class _Marks:
    """Stand-ins for user text while the chat template is rendered. Letters only, so that no template trims or splits
    them; a string of a tool ends with a quotation mark, which tells whether the template printed it as JSON."""

    PATTERN = re.compile(r'usertext([0-9a-f]{32})end(\\?")?')

    def __init__(self, plain_added_tokens: Sequence[str]) -> None:
        self._plain_added_tokens = plain_added_tokens
        self._texts: dict[str, str] = {}
        self._is_quoted: set[str] = set()
        self._required: dict[str, str] = {}

    def make(self, text: str, field: str) -> str:
        """:param field: the user's name of it, for the error if the template leaves it out."""
        key = secrets.token_hex(16)
        self._texts[key] = text
        self._required[key] = field
        return f"usertext{key}end"

    def hide(self, value: Any) -> Any:
        """A decoded JSON value with every string that could hold a control token replaced."""
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, Mapping):
            return {self._quoted(key): self.hide(each) for key, each in value.items()}
        if isinstance(value, Sequence):
            return [self.hide(each) for each in value]
        return value

    def _quoted(self, text: str) -> str:
        if _PLAIN.fullmatch(text) and not any(token in text for token in self._plain_added_tokens):
            return text  # harmless; templates look for words such as "function" or "parameters"
        key = secrets.token_hex(16)
        self._texts[key] = text
        self._is_quoted.add(key)
        return f'usertext{key}end"'

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def text_of(self, match: re.Match[str]) -> str:
        key, quote = match[1], match[2] or ""
        text = self._texts[key]
        self._required.pop(key, None)
        if key not in self._is_quoted:
            return text + quote
        return json.dumps(text, ensure_ascii=False)[1:-1] if quote == '\\"' else text

    def check_all_used(self) -> None:
        """:raise InvalidRequest: the template left a content out."""
        for field in self._required.values():
            raise InvalidRequest(f"{field}: the model's chat template has no place for it", field=field)


def _turn(message: Message, num_images_before: int, marks: _Marks, field: str) -> dict[str, Any]:
    """A message as the chat template takes it."""
    content: object
    if isinstance(message.content, str):
        content = "" if message.tool_calls and not message.content else marks.make(message.content, field)
        if num_images_before:
            content = [{"type": "image"}] * num_images_before + [{"type": "text", "text": content}]
    else:
        content = [
            {"type": "text", "text": marks.make(part, field)} if isinstance(part, str) else {"type": "image"}
            for part in message.content
        ]
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": marks.hide(call.name), "arguments": marks.hide(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn


def _byte_by_char() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for letters from 256."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_BY_CHAR = _byte_by_char()
