"""Pictures: the header first (format, size, frames), then, much later, decoding to upright RGB.

`read_header` looks at bytes and declared sizes only; nothing is decompressed, so that a 20 kB file of 30000 x 30000
pixels costs nothing. `decode` runs after a place in the queue is reserved. The only file that imports Pillow.

Nothing here fetches anything or knows how many tokens a picture costs in a model: see `models/prompts.py`.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from config import Limits
from models.errors import ImageTooLarge, InvalidImage, UnsupportedImage

ImageFormat = Literal["PNG", "JPEG", "WebP", "GIF", "BMP"]

# Pillow's plug-ins are called directly and not through Image.open: its own pixel limit is process-wide state and
# refuses without telling the size, and its JPEG opener turns many phone pictures into another format (MPO).
_OPENERS: dict[ImageFormat, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
_MEDIA_TYPES: dict[str, ImageFormat] = {
    "image/png": "PNG",
    "image/apng": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/pjpeg": "JPEG",
    "image/webp": "WebP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
    "image/x-ms-bmp": "BMP",
    "image/x-bmp": "BMP",
}
_TAKEN = "PNG, JPEG, WebP, GIF, BMP"
# What a damaged file can make Pillow's header and pixel readers raise.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError,
           ZeroDivisionError, AttributeError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of itself. `width` and `height` in pixels as stored, before the EXIF orientation."""

    format: ImageFormat
    width: int
    height: int
    num_frames: int
    num_bytes: int
    sha256: str


def read_header(data: bytes, *, declared_type: str, field: str, limits: Limits) -> ImageHeader:
    """Check an encoded picture by its header alone.

    :param declared_type: the media type that the client stated, empty if none.
    :param field: the request's field, for messages.
    :raise InvalidImage: empty, truncated in the header, too elongated, or declared as another type than its bytes.
    :raise UnsupportedImage: a format that we do not take.
    :raise ImageTooLarge: more pixels or frames than the limits.
    """
    if not data:
        raise InvalidImage(f"{field}: is empty (0 bytes)", field=field)
    kind = _format_of(data)
    if kind is None:
        raise UnsupportedImage(f"{field}: must be one of {_TAKEN}, got {_guess(data)} ({len(data)} bytes)", field=field)
    declared = declared_type.partition(";")[0].strip().lower()
    if declared not in ("", "application/octet-stream") and _MEDIA_TYPES.get(declared) != kind:
        shown = declared if declared in _MEDIA_TYPES else "another type"
        raise InvalidImage(f"{field}: was declared as {shown}, but its bytes are {kind}", field=field)

    width, height, num_frames = _read_size(kind, data, field, limits)
    if width < 1 or height < 1:
        raise InvalidImage(f"{field}: has no pixels ({width}x{height})", field=field)
    if width * height > limits.max_image_px:
        raise ImageTooLarge(
            f"{field}: must have at most {limits.max_image_px} pixels, got {width}x{height} = {width * height}",
            field=field,
        )
    if num_frames > limits.max_image_frames:
        raise ImageTooLarge(
            f"{field}: must have at most {limits.max_image_frames} frames, got {num_frames}", field=field
        )
    if max(width, height) > limits.max_image_aspect_ratio * min(width, height):
        raise InvalidImage(
            f"{field}: the longer side must be at most {limits.max_image_aspect_ratio} times the shorter, "
            f"got {width}x{height}",
            field=field,
        )
    return ImageHeader(kind, width, height, num_frames, len(data), hashlib.sha256(data).hexdigest())


def decode(data: bytes, header: ImageHeader, *, field: str) -> Image.Image:
    """Decode the first frame: upright (EXIF orientation applied), RGB, alpha flattened onto white, 16 bits scaled to 8.

    :raise InvalidImage: the pixels are truncated or broken.
    """
    try:
        with _OPENERS[header.format](io.BytesIO(data)) as picture:
            if picture.width > header.width or picture.height > header.height:
                raise ValueError("the decoder sees a larger picture than the header check did")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except _BROKEN as error:
        raise InvalidImage(
            f"{field}: the {header.format} of {header.width}x{header.height} pixels is truncated or broken "
            f"({len(data)} bytes)",
            field=field,
        ) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        # 16-bit grey: Pillow's own conversion to 8 bits clips at 255 instead of scaling.
        wide = picture.convert("I")
        picture = wide.point(lambda value: value * (1 / 256)).convert("L")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")


def _format_of(data: bytes) -> ImageFormat | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def _guess(data: bytes) -> str:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in (
        (b"%pdf", "a PDF"),
        (b"ii*\x00", "a TIFF"),
        (b"mm\x00*", "a TIFF"),
        (b"\x00\x00\x01\x00", "an icon"),
        (b"pk\x03\x04", "a ZIP archive"),
    ):
        if head.startswith(magic):
            return name
    if head.startswith((b"<svg", b"<?xml", b"<!doctype svg")) or b"<svg" in head:
        return "an SVG or XML text"
    if data[4:8] == b"ftyp":
        return "an HEIF, AVIF or video file"
    return "an unknown format"


def _read_size(kind: ImageFormat, data: bytes, field: str, limits: Limits) -> tuple[int, int, int]:
    """Width, height in pixels and the number of frames, counted no further than one past the limit."""
    try:
        if kind == "WebP":
            # Pillow's WebP plug-in allocates whole canvases when it opens a file, so the header is read here.
            return _webp_size(data, limits.max_image_frames)
        if kind == "GIF":
            return _gif_size(data, limits.max_image_frames)
        with _OPENERS[kind](io.BytesIO(data)) as picture:
            return picture.width, picture.height, int(getattr(picture, "n_frames", 1))
    except (*_BROKEN, UnidentifiedImageError) as error:
        raise InvalidImage(
            f"{field}: the {kind} header is truncated or broken ({len(data)} bytes)", field=field
        ) from error


def _webp_size(data: bytes, max_frames: int) -> tuple[int, int, int]:
    """From the container's first chunk (RFC 9649): VP8X canvas, VP8 key frame header, or VP8L header.

    Only the first counts, as for libwebp: what follows a VP8 or VP8L chunk is not looked at.
    """
    tag, body = data[12:16], data[20:36]
    if tag == b"VP8X":
        width = int.from_bytes(body[4:7], "little") + 1
        height = int.from_bytes(body[7:10], "little") + 1
        return width, height, max(1, _webp_frames(data, max_frames))
    if tag == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(body[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return width, height, 1
    if tag == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1, 1
    raise ValueError("no size")


def _webp_frames(data: bytes, max_frames: int) -> int:
    num_frames, offset = 0, 12
    while offset + 8 <= len(data) and num_frames <= max_frames:
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        num_frames += data[offset : offset + 4] == b"ANMF"
        offset += 8 + size + (size & 1)
    return num_frames


def _gif_size(data: bytes, max_frames: int) -> tuple[int, int, int]:
    """From the blocks (GIF89a, W3C): the canvas is as large as the screen or any frame; pixels are skipped over.

    Pillow would count the frames too, but by seeking through them with a Python object each.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    offset = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    num_frames = 0
    while num_frames <= max_frames and offset < len(data) and data[offset] != 0x3B:
        if data[offset] == 0x2C:
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, offset + 1)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            offset += 10 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0) + 1
            num_frames += 1
        elif data[offset] == 0x21:
            offset += 2
        else:
            break  # trailing bytes: the frames so far count
        while offset < len(data) and data[offset]:
            offset += data[offset] + 1
        offset += 1
    if num_frames == 0:
        raise ValueError("no frame")
    return width, height, num_frames
