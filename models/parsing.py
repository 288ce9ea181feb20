"""The only door for user input: `RequestParser` turns bytes or form fields into frozen, valid requests.

The Pydantic models are built once from `Limits`, so that the same numbers validate, are named in errors and stand
in `/openapi.json`. Nothing behind this file checks user input again, but for the token budget, which needs the
tokenizer. Pictures are checked by `models/images.py`, which this file calls.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from config import Limits
from models.errors import InvalidImage, InvalidRequest, ServiceError, UnknownField
from models.images import read_header
from models.schemas import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_TEMPERATURE,
    ImageInput,
    ImageRequest,
    Message,
    ModelName,
    SamplingParams,
    TextRequest,
)


@dataclass(frozen=True)
class UploadedFile:
    """One file part of a form. `content_type` is what the client declared, empty if nothing."""

    name: str
    content_type: str
    data: bytes


@dataclass(frozen=True)
class ApiRequest:
    """A request of the JSON API: what is asked, and whether the answer shall come as it is made. The model layer need
    not know the latter: who waits for an answer reads it as he likes."""

    request: TextRequest | ImageRequest
    is_streamed: bool


class RequestParser:
    """Parses user input into requests. Built once; may be called from any thread.

    Every method raises `InvalidRequest`, `UnknownField`, `InvalidImage`, `ImageTooLarge` or `UnsupportedImage`, with
    the field, the limit and the value.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        text, picture = _text_fields(limits, "avibe"), _text_fields(limits, "avision")
        # Of the JSON API; `image_fields` go with uploaded files.
        self.text_body = body_model("TextGenerateRequest", text | _STREAM_FIELD)
        self.image_fields = body_model("ImageAnalyzeFields", picture | _STREAM_FIELD)
        self.image_body = body_model("ImageAnalyzeRequest", picture | _picture_fields(limits) | _STREAM_FIELD)
        # Of the pages' forms, which are answered by a page.
        self._text_form = body_model("TextForm", text)
        self._image_form = body_model("ImageForm", picture)

    def parse_text_json(self, body: bytes) -> ApiRequest:
        fields = validate(self.text_body, load_json_object(body))
        return ApiRequest(TextRequest(_messages(fields), sampling_params(fields)), fields["stream"])

    def parse_text_form(self, fields: Iterable[tuple[str, str]]) -> TextRequest:
        valid = _validate_form(self._text_form, fields)
        return TextRequest(_messages(valid), sampling_params(valid))

    def parse_image_json(self, body: bytes) -> ApiRequest:
        fields = validate(self.image_body, load_json_object(body))
        one, several = fields["image"], fields["images"]
        if one is not None and several is not None:
            raise InvalidRequest("image, images: give one of the two, not both", field="images")
        if one is None and several is None:
            raise InvalidRequest("image: is required", field="image")
        if one is not None:
            sources = [("image", one)]
        else:
            sources = [(f"images[{i}]", source) for i, source in enumerate(several)]
        pictures = [decode_picture(source, field) for field, source in sources]
        return ApiRequest(self._image_request(fields, pictures), fields["stream"])

    def parse_image_upload(self, fields: Iterable[tuple[str, str]], files: Sequence[UploadedFile]) -> ApiRequest:
        """The JSON API's request as a form."""
        request, valid = self._parse_image_form(self.image_fields, fields, files)
        return ApiRequest(request, valid["stream"])

    def parse_image_form(self, fields: Iterable[tuple[str, str]], files: Sequence[UploadedFile]) -> ImageRequest:
        return self._parse_image_form(self._image_form, fields, files)[0]

    def _parse_image_form(
        self, model: type[BaseModel], fields: Iterable[tuple[str, str]], files: Sequence[UploadedFile]
    ) -> tuple[ImageRequest, Mapping[str, Any]]:
        for file in files:
            if file.name != "image":
                raise UnknownField(f"{shown_name(file.name)}: no such field", field=shown_name(file.name))
        # A browser sends an empty part for a file input that was left alone.
        chosen = [file for file in files if file.data or file.content_type not in ("", "application/octet-stream")]
        valid = _validate_form(model, fields)
        if not chosen:
            if len(files) > 0 and any(not file.data for file in files):
                raise InvalidImage("image: is empty (0 bytes)", field="image")
            raise InvalidRequest("image: is required", field="image")
        if len(chosen) > self.limits.max_images:
            raise InvalidRequest(f"image: at most {self.limits.max_images} pictures, got {len(chosen)}", field="image")
        pictures = [
            ("image" if len(chosen) == 1 else f"image[{i}]", f.data, f.content_type) for i, f in enumerate(chosen)
        ]
        return self._image_request(valid, pictures), valid

    def _image_request(self, fields: Mapping[str, Any], pictures: Sequence[tuple[str, bytes, str]]) -> ImageRequest:
        images = tuple(
            ImageInput(data, read_header(data, declared_type=declared, field=field, limits=self.limits), field)
            for field, data, declared in pictures
        )
        return ImageRequest(_messages(fields), images, sampling_params(fields))


def load_json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no NaN or Infinity, no duplicate keys.

    :raise InvalidRequest: with the place, never with the content.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"body: must be UTF-8, byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"body: must be valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise InvalidRequest("body: JSON is nested too deeply") from None
    except ValueError:  # json hands int() a number of more than 4,300 digits
        raise InvalidRequest("body: a number has too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body: must be a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InvalidRequest(f"{shown_name(key)}: is given more than once", field=shown_name(key))
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise InvalidRequest(f"body: {name} is not JSON")


def whole_number(value: object) -> object:
    """JSON has one kind of number: 5.0 is an integer there, and for JSON Schema too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _penalty(limits: Limits, description: str) -> Any:
    return Annotated[
        float,
        Field(ge=-limits.max_penalty, le=limits.max_penalty, allow_inf_nan=False, description=description),
    ]


def _text_fields(limits: Limits, model: ModelName) -> dict[str, Any]:
    text = Annotated[str, Field(min_length=1, max_length=limits.max_prompt_chars, description="The user's text.")]
    return {"prompt": (text, ...), **sampling_fields(limits, model)}


def sampling_fields(limits: Limits, model: ModelName) -> dict[str, Any]:
    """Name -> (type, default) of what every door takes beside its prompt."""
    stop_string = Annotated[str, Field(min_length=1, max_length=limits.max_stop_chars)]
    return {
        "max_tokens": (
            Annotated[
                int,
                Field(ge=1, le=limits.max_tokens, description="Most tokens to generate."),
                BeforeValidator(whole_number),
            ],
            DEFAULT_MAX_TOKENS[model],
        ),
        "temperature": (
            Annotated[
                float,
                Field(ge=0, le=limits.max_temperature, allow_inf_nan=False, description="0 takes the likeliest token."),
            ],
            DEFAULT_TEMPERATURE,
        ),
        "top_p": (
            Annotated[
                float,
                Field(gt=0, le=1, allow_inf_nan=False, description="Keep the likeliest tokens that sum up to this."),
            ],
            None,
        ),
        "top_k": (
            Annotated[
                int,
                Field(ge=0, le=limits.max_top_k, description="Keep so many of the likeliest; 0: all."),
                BeforeValidator(whole_number),
            ],
            None,
        ),
        "repetition_penalty": (
            Annotated[
                float,
                Field(
                    ge=limits.min_repetition_penalty,
                    le=limits.max_repetition_penalty,
                    allow_inf_nan=False,
                    description="Above 1 makes tokens that were seen less likely (CTRL, arXiv:1909.05858).",
                ),
            ],
            None,
        ),
        "min_p": (
            Annotated[
                float,
                Field(
                    ge=0,
                    le=1,
                    allow_inf_nan=False,
                    description="Drop tokens less likely than this share of the likeliest (arXiv:2407.01082); 0: off.",
                ),
            ],
            None,
        ),
        "presence_penalty": (_penalty(limits, "Above 0 makes tokens of the answer so far less likely, once."), 0.0),
        "frequency_penalty": (_penalty(limits, "The same, for each time that a token was given."), 0.0),
        "min_tokens": (
            Annotated[
                int,
                Field(
                    ge=0,
                    le=limits.max_tokens,
                    description="The answer does not end before so many tokens, or max_tokens.",
                ),
                BeforeValidator(whole_number),
            ],
            0,
        ),
        "ignore_eos": (
            Annotated[bool, Field(description="Go on to max_tokens whatever the model says; for measurements.")],
            False,
        ),
        "seed": (
            Annotated[
                int,
                Field(ge=0, le=limits.max_seed, description="Same seed, same request, same answer."),
                BeforeValidator(whole_number),
            ],
            None,
        ),
        "stop": (
            Annotated[
                list[stop_string],
                Field(max_length=limits.max_stop_strings, description="Texts before which the answer ends."),
            ],
            (),
        ),
    }


_STREAM_FIELD: dict[str, Any] = {
    "stream": (Annotated[bool, Field(description="Send the answer as it is made: text/event-stream.")], False)
}


def _picture_fields(limits: Limits) -> dict[str, Any]:
    text = "Base64 of a PNG, JPEG, WebP, GIF or BMP, or a data URL with it; other URLs are refused."
    source = Annotated[str, Field(min_length=1, max_length=limits.max_body_bytes)]
    return {
        "image": (Annotated[str, Field(min_length=1, max_length=limits.max_body_bytes, description=text)], None),
        "images": (
            Annotated[
                list[source], Field(min_length=1, max_length=limits.max_images, description="Several, in order.")
            ],
            None,
        ),
    }


def body_model(name: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    # A default of None is never checked, so that `null` stays an error while the field may be absent.
    config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)
    return cast(type[BaseModel], create_model(name, __config__=config, **cast(Any, dict(fields))))


def validate(model: type[BaseModel], fields: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    # Before Pydantic, which would make an error object for each of a million unknown fields.
    for name in fields:
        if name not in model.model_fields:
            raise UnknownField(f"{shown_name(name)}: no such field", field=shown_name(name))
    try:
        return dict(model.model_validate(fields, strict=strict))
    except ValidationError as error:
        raise _as_service_error(error, fields) from None


def _validate_form(model: type[BaseModel], fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Form values are strings. An empty one, which is what a browser sends for an empty input, counts as absent."""
    given: dict[str, str | list[str]] = {}
    for name, value in fields:
        if name == "stop" and value:
            cast("list[str]", given.setdefault("stop", [])).append(value)
        elif name in given:
            raise InvalidRequest(f"{shown_name(name)}: is given more than once", field=shown_name(name))
        elif name == "prompt":
            # Browsers send the line ends of a text area as CRLF; the same text through the API has LF.
            given[name] = value.replace("\r\n", "\n")
        elif value != "" or name not in model.model_fields:
            given[name] = value
    return validate(model, given, strict=False)


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message("user", fields["prompt"]),)


def sampling_params(fields: Mapping[str, Any]) -> SamplingParams:
    """From the fields of `sampling_fields`, once they are valid."""
    return SamplingParams(
        max_tokens=fields["max_tokens"],
        temperature=fields["temperature"],
        top_p=fields["top_p"],
        top_k=fields["top_k"],
        repetition_penalty=fields["repetition_penalty"],
        min_p=fields["min_p"],
        presence_penalty=fields["presence_penalty"],
        frequency_penalty=fields["frequency_penalty"],
        min_tokens=fields["min_tokens"],
        ignore_eos=fields["ignore_eos"],
        seed=fields["seed"],
        stop=tuple(fields["stop"]),
    )


def decode_picture(source: str, field: str) -> tuple[str, bytes, str]:
    """Base64 or a data URL -> (field, bytes, declared type). Nothing is ever fetched."""
    declared = ""
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.\-]{0,20}):", source)
    if scheme:
        if scheme[1].lower() != "data":
            raise InvalidRequest(
                f"{field}: must be Base64 or a data URL; a URL of scheme {scheme[1].lower()!r} is never fetched",
                field=field,
            )
        head, comma, source = source.partition(",")
        declared, _, parameters = head.strip()[len("data:") :].partition(";")
        if not comma or parameters.split(";")[-1].strip().lower() != "base64":
            raise InvalidImage(f"{field}: a data URL must look like data:image/png;base64,...", field=field)
    try:
        data = base64.b64decode(re.sub(r"[ \t\r\n]", "", source), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImage(f"{field}: is not valid Base64 ({len(source)} characters)", field=field) from None
    return field, data, declared.strip().lower()


def shown_name(name: str) -> str:
    """A name that the user chose, cut and made printable, so that it can be repeated in a message."""
    shown = "".join(c if c.isprintable() else "?" for c in name[:64])
    return shown + "..." if len(name) > 64 else shown


_TYPE_WORDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of a usual size",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "string_unicode": "valid Unicode without lone surrogates",
}
_BOUND_WORDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _as_service_error(error: ValidationError, fields: Mapping[str, Any]) -> ServiceError:
    """The first mistake as one sentence."""
    detail = error.errors(include_url=False)[0]
    kind, context = detail["type"], detail.get("ctx", {})
    field = _path(detail["loc"], fields)
    value = detail["input"]
    if kind == "missing":
        return InvalidRequest(f"{field}: is required", field=field)
    if kind == "extra_forbidden":
        return UnknownField(f"{field}: no such field", field=field)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        # Pydantic names the function that reads the tag: `_role()`.
        name = context["discriminator"].removeprefix("_").removesuffix("()").removeprefix("part_")
        field = f"{field}.{name}"
        if kind == "union_tag_not_found":
            return InvalidRequest(f"{field}: is required", field=field)
        return InvalidRequest(f"{field}: must be one of {context['expected_tags']}", field=field)
    if kind in _BOUND_WORDS:
        words, key = _BOUND_WORDS[kind]
        return InvalidRequest(f"{field}: must be {words} {context[key]:g}, got {_shown_number(value)}", field=field)
    if kind in ("string_too_short", "string_too_long", "too_short", "too_long"):
        words, key = ("at least", "min_length") if kind.endswith("short") else ("at most", "max_length")
        unit = ("character" if kind.startswith("string") else "item") + ("" if context[key] == 1 else "s")
        return InvalidRequest(f"{field}: must have {words} {context[key]} {unit}, got {len(value)}", field=field)
    if kind in _TYPE_WORDS:
        given = "text" if isinstance(value, str) else _json_type(value)
        return InvalidRequest(f"{field}: must be {_TYPE_WORDS[kind]}, got {given}", field=field)
    if kind == "literal_error":
        return InvalidRequest(f"{field}: must be {context['expected']}", field=field)
    if kind == "string_pattern_mismatch":
        return InvalidRequest(f"{field}: must match {context['pattern']}", field=field)
    if kind == "value_error":  # from a validator of ours
        return InvalidRequest(f"{field}: {context['error']}", field=field)
    return InvalidRequest(f"{field}: is not valid", field=field)


def _path(loc: tuple[int | str, ...], fields: Mapping[str, Any]) -> str:
    """`messages[0].content`: where a mistake is, without the names that Pydantic gives to the members of a union."""
    path, here = "", cast(Any, fields)
    for index, part in enumerate(loc):
        if isinstance(here, Mapping) and isinstance(part, str) and (part in here or index == len(loc) - 1):
            path += f".{shown_name(part)}" if path else shown_name(part)
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            path += f"[{part}]"
            here = here[part] if part < len(here) else None
    return path


def _shown_number(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= 32 else f"a number of {len(shown)} digits"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"{_shown_number(value)}"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "a string"
