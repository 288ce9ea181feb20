"""The only door for user input: every rule, small, at the limit and one over."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from config import Limits
from models.errors import ImageTooLarge, InvalidImage, InvalidRequest, ServiceError, UnknownField, UnsupportedImage
from models.parsing import RequestParser, UploadedFile
from models.schemas import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE, TextRequest
from tests.test_images import png

LIMITS = Limits(max_prompt_chars=10, max_tokens=20, max_stop_strings=2, max_stop_chars=3, max_images=2)


@pytest.fixture(scope="module")
def parser() -> RequestParser:
    return RequestParser(LIMITS)


def text(parser: RequestParser, **fields: Any) -> TextRequest:
    request = parser.parse_text_json(json.dumps({"prompt": "hi", **fields}).encode()).request
    assert isinstance(request, TextRequest)
    return request


def refused(parser: RequestParser, **fields: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        text(parser, **fields)
    return caught.value


def test_absent_fields_get_the_defaults(parser: RequestParser) -> None:
    sampling = text(parser).sampling
    assert (sampling.max_tokens, sampling.temperature) == (DEFAULT_MAX_TOKENS["avibe"], DEFAULT_TEMPERATURE)
    assert (sampling.top_p, sampling.top_k, sampling.repetition_penalty, sampling.seed) == (None,) * 4
    assert sampling.stop == ()
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (None, 0, 0)
    assert (sampling.min_tokens, sampling.ignore_eos) == (0, False)


def test_image_request_has_its_own_default_length(parser: RequestParser) -> None:
    body = {"prompt": "hi", "image": base64.b64encode(png()).decode()}
    assert parser.parse_image_json(json.dumps(body).encode()).request.sampling.max_tokens == 200


@pytest.mark.parametrize(
    ("field", "passes", "fails", "limit"),
    [
        ("prompt", "x" * 10, "x" * 11, "10"),
        ("prompt", "x", "", "1"),
        ("max_tokens", 20, 21, "20"),
        ("max_tokens", 1, 0, "1"),
        ("temperature", 0, -0.01, "0"),
        ("temperature", 2, 2.01, "2"),
        ("top_p", 1, 1.01, "1"),
        ("top_p", 0.001, 0, "0"),
        ("top_k", 0, -1, "0"),
        ("top_k", 1000, 1001, "1000"),
        ("repetition_penalty", 0.5, 0.49, "0.5"),
        ("repetition_penalty", 2, 2.01, "2"),
        ("min_p", 0, -0.01, "0"),
        ("min_p", 1, 1.01, "1"),
        ("presence_penalty", -2, -2.01, "-2"),
        ("presence_penalty", 2, 2.01, "2"),
        ("frequency_penalty", -2, -2.01, "-2"),
        ("frequency_penalty", 2, 2.01, "2"),
        ("min_tokens", 0, -1, "0"),
        ("min_tokens", 20, 21, "20"),
        ("seed", 0, -1, "0"),
        ("seed", 2**63 - 1, 2**63, ""),
        ("stop", ["a", "b"], ["a", "b", "c"], "2"),
        ("stop", ["abc"], ["abcd"], "3"),
        ("stop", ["a"], [""], "1"),
    ],
)
def test_limit_passes_and_one_over_names_field_limit_and_value(
    parser: RequestParser, field: str, passes: Any, fails: Any, limit: str
) -> None:
    text(parser, **{field: passes})
    error = refused(parser, **{field: fails})
    assert isinstance(error, InvalidRequest)
    assert error.field is not None and error.field.startswith(field)
    assert error.message.startswith(field) and limit in error.message
    if isinstance(fails, str) and len(fails) > 1:
        assert fails not in error.message and str(len(fails)) in error.message


@pytest.mark.parametrize("field", ["prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"])
@pytest.mark.parametrize("value", [None, True, {}, [1]], ids=["null", "bool", "object", "list"])
def test_wrong_type_is_an_error_of_its_field(parser: RequestParser, field: str, value: Any) -> None:
    error = refused(parser, **{field: value})
    assert error.code == "invalid_request" and error.field is not None and error.field.startswith(field)


def test_number_as_text_is_refused_in_json_and_taken_in_a_form(parser: RequestParser) -> None:
    assert refused(parser, max_tokens="5").field == "max_tokens"
    assert parser.parse_text_form([("prompt", "hi"), ("max_tokens", "5")]).sampling.max_tokens == 5


def test_unknown_field_is_named_first_and_cut(parser: RequestParser) -> None:
    error = refused(parser, promt="x", max_tokens="bad")
    assert isinstance(error, UnknownField) and error.field == "promt"
    long_name = refused(parser, **{"a\n" * 200: 1})
    assert long_name.field is not None and len(long_name.field) < 80 and "\n" not in long_name.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_broken_json_is_a_clear_error(parser: RequestParser, body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parser.parse_text_json(body)
    assert len(caught.value.message) < 200


def test_empty_form_field_counts_as_absent_but_an_empty_prompt_does_not(parser: RequestParser) -> None:
    fields = [("prompt", "hi"), ("max_tokens", ""), ("temperature", "")]
    assert parser.parse_text_form(fields).sampling.max_tokens == DEFAULT_MAX_TOKENS["avibe"]
    with pytest.raises(InvalidRequest, match="prompt: must have at least 1 character"):
        parser.parse_text_form([("prompt", "")])


@pytest.mark.parametrize("value", ["nan", "inf", "1,5", "x", "1e999"])
def test_form_number_must_be_finite(parser: RequestParser, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parser.parse_text_form([("prompt", "hi"), ("temperature", value)])
    assert caught.value.field == "temperature"


def test_repeated_form_field_is_an_error_and_repeated_stop_a_list(parser: RequestParser) -> None:
    assert parser.parse_text_form([("prompt", "hi"), ("stop", "a"), ("stop", "b")]).sampling.stop == ("a", "b")
    with pytest.raises(InvalidRequest, match="more than once"):
        parser.parse_text_form([("prompt", "hi"), ("prompt", "ho")])
    with pytest.raises(UnknownField):
        parser.parse_text_form([("prompt", "hi"), ("x", "")])


def test_line_ends_of_a_text_area_are_those_of_the_api(parser: RequestParser) -> None:
    assert parser.parse_text_form([("prompt", "a\r\nb\r\nc\r\nd")]).messages[0].content == "a\nb\nc\nd"


def test_stream_is_a_boolean_and_off_unless_asked_for(parser: RequestParser) -> None:
    for fields, expected in (({}, False), ({"stream": False}, False), ({"stream": True}, True)):
        body = {"prompt": "hi", **fields}
        assert parser.parse_text_json(json.dumps(body).encode()).is_streamed is expected
        body["image"] = encoded(png())
        assert parser.parse_image_json(json.dumps(body).encode()).is_streamed is expected


@pytest.mark.parametrize("value", [1, 0, "true", "false", None, [], {}, 1.0])
def test_stream_of_another_type_is_refused(parser: RequestParser, value: Any) -> None:
    error = refused(parser, stream=value)
    assert (error.code, error.field) == ("invalid_request", "stream")
    assert error.message.startswith("stream: must be a boolean, got ")


def test_stream_in_a_form_is_true_or_false(parser: RequestParser) -> None:
    for value, expected in (("true", True), ("false", False), ("", False)):
        fields = [("prompt", "hi"), ("stream", value)]
        assert parser.parse_image_upload(fields, [upload(png())]).is_streamed is expected
    with pytest.raises(InvalidRequest, match="stream: must be true or false, got text"):
        parser.parse_image_upload([("prompt", "hi"), ("stream", "maybe")], [upload(png())])


def test_forms_of_the_pages_do_not_stream(parser: RequestParser) -> None:
    fields = [("prompt", "hi"), ("stream", "true")]
    with pytest.raises(UnknownField, match="stream"):
        parser.parse_text_form(fields)
    with pytest.raises(UnknownField, match="stream"):
        parser.parse_image_form(fields, [upload(png())])


def image(parser: RequestParser, **fields: Any) -> Any:
    return parser.parse_image_json(json.dumps({"prompt": "hi", **fields}).encode()).request


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_base64_and_data_url_give_the_same_picture(parser: RequestParser) -> None:
    data = png()
    spaced = " " + encoded(data)[:20] + "\r\n" + encoded(data)[20:]
    for given in ({"image": encoded(data)}, {"image": "data:image/png;base64," + encoded(data)}, {"images": [spaced]}):
        (picture,) = image(parser, **given).images
        assert picture.data == data
        assert picture.header.format == "PNG"


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "https://example.com/x.png", "file:///etc/passwd", "ftp://x/y", "FILE:/x",
     " http://x/", "blob:abc", "gopher://x"],
)  # fmt: skip
def test_any_other_url_is_refused_by_name(parser: RequestParser, url: str) -> None:
    with pytest.raises(InvalidRequest, match="never fetched") as caught:
        image(parser, image=url)
    assert caught.value.field == "image"
    assert "passwd" not in caught.value.message and "169" not in caught.value.message


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("not base64!", InvalidImage),
        ("data:image/png,abc", InvalidImage),
        ("data:image/png;base64", InvalidImage),
        ("data:;base64,", InvalidImage),
        ("QUJD", UnsupportedImage),
        ("data:image/jpeg;base64," + encoded(png()), InvalidImage),
        ("data:image/svg+xml;base64," + encoded(b"<svg/>"), UnsupportedImage),
    ],
)
def test_bad_picture_text_is_a_clear_error(parser: RequestParser, value: str, error: type[ServiceError]) -> None:
    with pytest.raises(error) as caught:
        image(parser, images=[encoded(png()), value])
    assert caught.value.field == "images[1]"
    assert len(caught.value.message) < 200


def test_one_or_several_but_not_both_or_none(parser: RequestParser) -> None:
    one = encoded(png())
    with pytest.raises(InvalidRequest, match="not both"):
        image(parser, image=one, images=[one])
    with pytest.raises(InvalidRequest, match="image: is required"):
        image(parser)
    assert len(image(parser, images=[one, one]).images) == 2
    with pytest.raises(InvalidRequest, match="images: must have at most 2 items, got 3"):
        image(parser, images=[one] * 3)


def upload(data: bytes, content_type: str = "image/png", name: str = "image") -> UploadedFile:
    return UploadedFile(name, content_type, data)


def test_form_takes_several_files_up_to_the_limit(parser: RequestParser) -> None:
    fields = [("prompt", "hi")]
    assert len(parser.parse_image_form(fields, [upload(png()), upload(png())]).images) == 2
    with pytest.raises(InvalidRequest, match="at most 2 pictures, got 3"):
        parser.parse_image_form(fields, [upload(png())] * 3)


def test_form_without_a_picture_says_so(parser: RequestParser) -> None:
    fields = [("prompt", "hi")]
    with pytest.raises(InvalidRequest, match="image: is required"):
        parser.parse_image_form(fields, [])
    with pytest.raises(InvalidImage, match="0 bytes"):
        parser.parse_image_form(fields, [upload(b"", "application/octet-stream")])
    with pytest.raises(InvalidImage, match="0 bytes"):
        parser.parse_image_form(fields, [upload(b"")])


def test_file_under_another_name_is_an_unknown_field(parser: RequestParser) -> None:
    with pytest.raises(UnknownField, match="photo"):
        parser.parse_image_form([("prompt", "hi")], [upload(png(), name="photo")])


def test_too_many_pixels_are_refused_from_the_header() -> None:
    parser = RequestParser(Limits(max_image_px=99))
    with pytest.raises(ImageTooLarge, match="at most 99 pixels, got 10x10 = 100"):
        image(parser, image=encoded(png(10, 10)))
