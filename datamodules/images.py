"""Opening, checking, cropping and resizing of single 8-bit images."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.errors import DatasetError


def open_image(data: bytes, where: str) -> Image.Image:
    """Reads the header of an encoded image; the pixels are decoded at their first use.

    Raises:
        DatasetError: If the bytes are not an image; the message names their location `where`.
    """
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where} is not a readable image ({error}); fetch the file again") from error


def decode(image: Image.Image, mode: str, where: str) -> Image.Image:
    """Decodes an image into `mode` ("L" or "RGB") if that is lossless, such as grey digits stored as RGB.

    Raises:
        DatasetError: If the image is damaged, or has colours or transparency that `mode` cannot represent.
    """
    try:
        image.load()
        if image.mode == mode:
            return image
        converted = image.convert(mode)
        lossless = converted.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{where} is a damaged image ({error}); fetch the file again") from error
    if not lossless:
        raise DatasetError(f"{where} is an image of mode {image.mode}, expected {mode}; is this the right dataset?")
    return converted


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops the central square of `size` pixels, with torchvision's rounding."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes to a square of `size` pixels: bilinear with antialiasing on 8 bits, as torchvision does to PIL images."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels as `(C, H, W)`."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
