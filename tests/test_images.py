"""A corpus of pictures, valid and hostile: what is taken, what is refused, and that nothing costly happens first."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image, ImageOps

from config import Limits
from models.errors import ImageTooLarge, InvalidImage, ServiceError, UnsupportedImage
from models.images import ImageHeader, decode, read_header


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(width: int = 24, height: int = 16) -> Image.Image:
    """Four quarters in colours that every codec keeps apart."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste((255, 255, 255), (width // 2, height // 2, width, height))
    return image


def png(width: int = 24, height: int = 16) -> bytes:
    return encode(scene(width, height), "PNG")


def header(data: bytes, declared: str = "", **limits: Any) -> ImageHeader:
    return read_header(data, declared_type=declared, field="image", limits=Limits(**limits))


def pixels(data: bytes) -> Image.Image:
    return decode(data, header(data), field="image")


def is_scene(image: Image.Image) -> bool:
    expected = scene()
    if (image.mode, image.size) != ("RGB", expected.size):
        return False
    points = [(4, 4), (20, 4), (4, 12), (20, 12)]
    return all(
        abs(a - b) < 40
        for point in points
        for a, b in zip(image.getpixel(point), expected.getpixel(point), strict=True)  # type: ignore[arg-type]
    )


def rotated(orientation: int) -> Image.Image:
    """The scene as a camera that was held that way stores it."""
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
            2: Image.Transpose.FLIP_LEFT_RIGHT}[orientation]  # fmt: skip
    return scene().transpose(undo)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def grey16() -> bytes:
    """A 16-bit grey PNG from black to white."""
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 0)
    image.putpixel((1, 0), 65535)
    return encode(image, "PNG")


VALID = {
    "png": (png(), "PNG"),
    "png palette": (encode(scene().quantize(8), "PNG"), "PNG"),
    "png alpha": (encode(scene().convert("RGBA"), "PNG"), "PNG"),
    "jpeg": (encode(scene(), "JPEG", quality=95, subsampling=0), "JPEG"),
    "jpeg progressive": (encode(scene(), "JPEG", quality=95, subsampling=0, progressive=True), "JPEG"),
    "jpeg cmyk": (encode(scene().convert("CMYK"), "JPEG", quality=95, subsampling=0), "JPEG"),
    "jpeg with exif": (encode(rotated(6), "JPEG", quality=95, subsampling=0, exif=exif(6)), "JPEG"),
    "jpeg upside down": (encode(rotated(3), "JPEG", quality=95, subsampling=0, exif=exif(3)), "JPEG"),
    "jpeg mirrored": (encode(rotated(2), "JPEG", quality=95, subsampling=0, exif=exif(2)), "JPEG"),
    "png with exif": (encode(rotated(8), "PNG", exif=exif(8)), "PNG"),
    "webp lossy": (encode(scene(), "WEBP", quality=95), "WebP"),
    "webp lossless": (encode(scene(), "WEBP", lossless=True), "WebP"),
    "webp with alpha": (encode(scene().convert("RGBA"), "WEBP", lossless=True), "WebP"),
    "webp extended": (encode(rotated(6), "WEBP", lossless=True, exif=exif(6)), "WebP"),
    "gif": (encode(scene().quantize(8), "GIF"), "GIF"),
    "bmp": (encode(scene(), "BMP"), "BMP"),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_picture_decodes_upright_to_rgb(name: str) -> None:
    data, kind = VALID[name]
    found = header(data)
    assert found.format == kind
    assert {found.width, found.height} == {24, 16}
    assert is_scene(pixels(data))


def test_grey_and_bilevel_pictures_become_rgb() -> None:
    for mode in ("1", "L", "LA"):
        image = pixels(encode(scene().convert("L").convert(mode), "PNG"))
        assert image.mode == "RGB"


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), value)
    assert [pixels(encode(image, "PNG")).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert pixels(encode(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixels(encode(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame() -> None:
    frames = [scene().quantize(8), Image.new("RGB", (24, 16)).quantize(8)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(
            frames[0].convert("RGB"), kind, save_all=True, append_images=[f.convert("RGB") for f in frames[1:]]
        )
        assert header(data).num_frames == 2
        assert is_scene(pixels(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_at_the_limit_pass_and_one_more_is_too_large(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(4)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)
    assert header(data, max_image_frames=4).num_frames == 4
    with pytest.raises(ImageTooLarge, match="at most 3 frames, got 4"):
        header(data, max_image_frames=3)


def test_pixels_at_the_limit_pass_and_one_more_is_too_large() -> None:
    for name, (data, _) in VALID.items():
        header(data, max_image_px=24 * 16)
        with pytest.raises(ImageTooLarge, match="383"):
            header(data, max_image_px=24 * 16 - 1)
        assert name


def test_elongated_picture_names_the_ratio() -> None:
    header(png(200, 1))
    with pytest.raises(InvalidImage, match="at most 200 times the shorter, got 201x1"):
        header(png(201, 1))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of that size whose rows are all zero: 30000x30000 in some kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"\0" * 100_000, 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_of_size(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0\0\0\0"
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def gif_of_size(width: int, height: int, screen: int = 1) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0, 0, 0)
    return head + b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\x00\x00\x3b"


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(scene(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(scene(), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("make", [png_bomb, webp_of_size, gif_of_size, jpeg_of_size, bmp_of_size])
def test_huge_picture_in_a_small_file_is_refused_without_memory(make: Any) -> None:
    data = make(30000, 16000)
    assert len(data) < 20_000
    tracemalloc.start()
    with pytest.raises(ImageTooLarge, match="30000x16000 = 480000000"):
        header(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_second_size_in_a_file_does_not_hide_the_first() -> None:
    """libwebp decodes what the first chunk says; a VP8X chunk behind it is not read."""
    bits = (9000 - 1) | ((9000 - 1) << 14)
    simple = b"VP8L" + struct.pack("<IB", 5, 0x2F) + struct.pack("<I", bits) + b"\0"
    body = simple + webp_of_size(64, 64)[12:]
    data = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    with pytest.raises(ImageTooLarge, match="9000x9000"):
        header(data)


def test_decoder_that_sees_more_than_the_header_is_stopped() -> None:
    data = png(24, 16)
    lied = replace(header(data), width=8)
    with pytest.raises(InvalidImage, match="truncated or broken"):
        decode(data, lied, field="image")


def test_gif_of_countless_frames_is_refused_early() -> None:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x01\x00\x00"
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame * 200_000 + b"\x3b"
    with pytest.raises(ImageTooLarge, match="at most 1000 frames, got 1001"):
        header(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"\n\n  <!-- hi --><svg></svg>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"II*\0" + bytes(20), "TIFF"),
        (b"PK\x03\x04" + bytes(20), "ZIP"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIF"),
        (b"hello", "unknown"),
        (bytes(100), "unknown"),
        (b"\x89PN", "unknown"),
    ],
)
def test_other_formats_are_unsupported_and_guessed(data: bytes, what: str) -> None:
    with pytest.raises(UnsupportedImage, match=what) as caught:
        header(data)
    assert "PNG, JPEG, WebP, GIF, BMP" in caught.value.message


def test_empty_picture_is_invalid() -> None:
    with pytest.raises(InvalidImage, match="0 bytes"):
        header(b"")


@pytest.mark.parametrize("name", VALID)
def test_every_truncation_is_an_error_and_never_a_crash(name: str) -> None:
    """What misses only check sums or a trailer may pass, but then not one pixel may be missing."""
    data, _ = VALID[name]
    whole = pixels(data)
    for size in sorted({*range(1, min(len(data), 120)), len(data) // 2, len(data) * 9 // 10}):
        try:
            part = pixels(data[:size])
        except ServiceError:
            continue
        assert part == whole, size


@pytest.mark.filterwarnings("ignore:.*EXIF data:UserWarning", "ignore:.*Skipping tag:UserWarning")
@pytest.mark.parametrize("name", VALID)
def test_damaged_bytes_are_an_error_or_a_picture(name: str) -> None:
    data, _ = VALID[name]
    for at in range(0, len(data), max(1, len(data) // 60)):
        damaged = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        try:
            assert pixels(damaged).mode == "RGB"
        except ServiceError:
            continue


@pytest.mark.parametrize(
    ("declared", "passes"),
    [
        ("", True),
        ("application/octet-stream", True),
        ("image/png", True),
        ("IMAGE/PNG; q=1", True),
        ("image/jpeg", False),
        ("image/svg+xml", False),
        ("text/plain", False),
    ],
)
def test_declared_type_must_be_what_the_bytes_are(declared: str, passes: bool) -> None:
    if passes:
        assert header(png(), declared).format == "PNG"
    else:
        with pytest.raises(InvalidImage, match="its bytes are PNG"):
            header(png(), declared)


def test_one_pixel_is_a_picture() -> None:
    assert pixels(png(1, 1)).size == (1, 1)


def test_phone_picture_with_a_second_image_inside_is_a_jpeg() -> None:
    data = encode(scene(), "MPO", save_all=True, append_images=[scene()], quality=95, subsampling=0)
    assert header(data).format == "JPEG"
    assert is_scene(pixels(data))


def test_exif_reference_agrees_with_pillow() -> None:
    data = VALID["jpeg with exif"][0]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == pixels(data).size
