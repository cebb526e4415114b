"""Every pixel mode of Pillow becomes the right pixels, or is refused by name; an orientation is applied once."""

from __future__ import annotations

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules import DatasetError
from datamodules.images import decode, open_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
SIXTEEN = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)  # the exact 16-bit values of GREY
DARK = SIXTEEN // 257
COLOUR = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
OPAQUE = np.dstack([COLOUR, np.full((16, 16), 255, np.uint8)])


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def palette(transparency: int | bytes | None = None) -> Image.Image:
    image = Image.fromarray(COLOUR // 64 * 64).quantize(64)
    image.info.pop("transparency", None)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def from_mode(mode: str) -> Image.Image:
    return Image.fromarray(COLOUR).convert(mode)


def grey_with_alpha() -> Image.Image:
    return Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (16, 16), 255)))


EXACT = {
    "1": (Image.fromarray(GREY > 99), "L", np.where(GREY > 99, 255, 0)),
    "L": (Image.fromarray(GREY), "L", GREY),
    "L in colour": (Image.fromarray(GREY), "RGB", np.dstack([GREY] * 3)),
    "grey stored as RGB": (Image.fromarray(np.dstack([GREY] * 3)), "L", GREY),
    "LA, opaque": (grey_with_alpha(), "L", GREY),
    "PA, opaque": (palette().convert("PA"), "RGB", np.asarray(palette().convert("RGB"))),
    "P": (palette(), "RGB", np.asarray(palette().convert("RGB"))),
    "grey palette": (Image.fromarray(GREY).convert("P"), "L", GREY),
    "palette whose transparent entry is not used": (
        palette(255),
        "RGB",
        np.asarray(palette().convert("RGB")),
    ),
    "RGB": (Image.fromarray(COLOUR), "RGB", COLOUR),
    "RGBA, opaque": (Image.fromarray(OPAQUE), "RGB", COLOUR),
    "RGBX": (from_mode("RGBX"), "RGB", COLOUR),
    "CMYK": (from_mode("CMYK"), "RGB", COLOUR),
    "YCbCr": (from_mode("YCbCr"), "RGB", np.asarray(from_mode("YCbCr").convert("RGB"))),
    "HSV": (from_mode("HSV"), "RGB", np.asarray(from_mode("HSV").convert("RGB"))),
    "I;16": (Image.fromarray(SIXTEEN), "L", GREY),
    "I;16 in colour": (Image.fromarray(SIXTEEN), "RGB", np.dstack([GREY] * 3)),
    "I;16 between two values": (
        Image.fromarray(np.array([[128, 129, 65406, 65407]], np.uint16)),
        "L",
        [[0, 1, 254, 255]],
    ),
    "I;16B": (Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes()), "L", GREY),
    "I": (Image.fromarray(SIXTEEN.astype(np.int32)), "L", GREY),
    "16-bit PNG": (open_image(encoded(Image.fromarray(SIXTEEN)), "a"), "L", GREY),
    "dark 16-bit PNG": (open_image(encoded(Image.fromarray(DARK)), "a"), "L", GREY > 128),
    "16-bit grey map": (open_image(b"P5 16 16 65535 " + SIXTEEN.astype(">u2").tobytes(), "a"), "L", GREY),
    "dark 16-bit grey map": (open_image(b"P5 16 16 65535 " + DARK.astype(">u2").tobytes(), "a"), "L", GREY > 128),
    "16-bit TIFF": (open_image(encoded(Image.fromarray(SIXTEEN), "TIFF"), "a"), "L", GREY),
    "CMYK TIFF": (open_image(encoded(from_mode("CMYK"), "TIFF"), "a"), "RGB", COLOUR),
}


@pytest.mark.parametrize("case", EXACT)
def test_every_mode_is_converted_exactly(case: str) -> None:
    image, mode, expected = EXACT[case]
    found = decode(image, mode, "image")
    assert found.mode == mode
    assert np.array_equal(np.asarray(found), np.asarray(expected, np.uint8))


HALF = np.dstack([COLOUR, np.full((16, 16), 128, np.uint8)])


def png_of_16_bits(kind: int, channels: int) -> Image.Image:
    """An image whose colours have 16 bits each, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + np.full(4 * channels, 1000, ">u2").tobytes() for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return open_image(b"\x89PNG\r\n\x1a\n" + parts, "a")


def frames(format_: str) -> Image.Image:
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    return open_image(encoded(pages[0], format_, save_all=True, append_images=pages[1:]), "a")


REFUSED = {
    "16-bit RGB": (png_of_16_bits(2, 3), "RGB", "x.png has 16 bits for each colour, of which Pillow reads 8; convert"),
    "16-bit RGBA": (png_of_16_bits(6, 4), "RGB", "x.png has 16 bits for each colour"),
    "16-bit LA": (png_of_16_bits(4, 2), "L", "x.png has 16 bits for each colour"),
    "GIF of two frames": (frames("GIF"), "L", "x.png holds 2 images, expected one; store each in a file of its own"),
    "TIFF of two pages": (frames("TIFF"), "L", "x.png holds 2 images"),
    "animated PNG": (frames("PNG"), "L", "x.png holds 2 images"),
    "animated WebP": (frames("WEBP"), "RGB", "x.png holds 2 images"),
    "RGBA": (Image.fromarray(HALF), "RGB", r"x.png is an image of mode RGBA with transparent pixels, .* background"),
    "LA": (Image.fromarray(HALF).convert("LA"), "L", "mode LA with transparent pixels"),
    "PA": (Image.merge("PA", (Image.fromarray(GREY), Image.fromarray(GREY))), "RGB", "PA with transparent pixels"),
    "palette with transparency": (palette(3), "RGB", "mode P with transparent pixels"),
    "palette with a table of transparency": (palette(bytes(range(64))), "RGB", "mode P with transparent pixels"),
    "a transparent grey value": (
        open_image(encoded(Image.fromarray(GREY), transparency=7), "a"),
        "L",
        "mode L with transparent pixels",
    ),
    "a transparent colour": (
        open_image(encoded(Image.fromarray(COLOUR), transparency=tuple(map(int, COLOUR[0, 0]))), "a"),
        "RGB",
        "mode RGB with transparent pixels",
    ),
    "F": (Image.fromarray(GREY.astype(np.float32)), "L", "mode F, whose range of values is not known"),
    "LAB": (Image.new("LAB", (4, 4)), "RGB", "mode LAB, whose range"),
    "I of 32 bits": (Image.fromarray(np.array([[0, 70_000]], np.int32)), "L", "mode I with values from 0 to 70000"),
    "I below zero": (Image.fromarray(np.array([[-1, 9_000]], np.int32)), "L", "mode I with values from -1 to 9000"),
    "I that may be of 8 bits": (Image.fromarray(GREY.astype(np.int32)), "L", "mode I with values from 0 to 255"),
    "colours": (Image.fromarray(COLOUR), "L", r"mode RGB with colours, expected grey \(L\)"),
    "colours in CMYK": (from_mode("CMYK"), "L", "mode CMYK with colours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_exactly_is_refused_by_name(case: str) -> None:
    image, mode, match = REFUSED[case]
    with pytest.raises(DatasetError, match=match):
        decode(image, mode, "x.png")


def oriented(orientation: int, format_: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(COLOUR[:8]), format_, exif=exif)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_once_whatever_the_way_in(orientation: int, format_: str) -> None:
    data = oriented(orientation, format_)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (expected.shape[:2] == (16, 8)) is (orientation > 4)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}]}).cast_column("image", datasets.Image())
    for image in (open_image(data, "a"), rows[0]["image"], decode(open_image(data, "a"), "RGB", "a")):
        assert np.array_equal(np.asarray(decode(image, "RGB", "a")), expected)
