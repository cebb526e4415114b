"""Opening, checking, converting, cropping and resizing of single images.

The same function turns every image into pixels, whether it comes from a folder, a table or another dataset: an EXIF
orientation is applied, and every mode of Pillow is converted to 8-bit grey or colour without loss, or refused by name.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from datamodules.errors import DatasetError

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of 16-bit grey; PNG files and portable grey maps of 16 bits may also be opened in the mode I."""
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
COLOUR_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes without transparency that Pillow converts to RGB; CMYK without its profile, as common readers do."""
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


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
    """Decodes an image into `mode` ("L" or "RGB"), upright by its EXIF orientation.

    16-bit grey `v` becomes `round(v / 257)`. Grey becomes colour, and colour whose channels are equal becomes grey.

    Raises:
        DatasetError: If the image is damaged, has transparent pixels, values of an unknown range, or colours that
            `mode` cannot represent.
    """
    try:
        is_cut = any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))
        image.load()
        if is_cut and image.mode not in (*SIXTEEN_BITS, "I"):
            raise DatasetError(
                f"{where} has 16 bits for each colour, of which Pillow reads 8; convert it to 8 bits first"
            )
        if getattr(image, "is_animated", False) and image.format != "MPO":  # photographs with a preview
            number = getattr(image, "n_frames", "several")
            raise DatasetError(f"{where} holds {number} images, expected one; store each in a file of its own")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == mode and "transparency" not in image.info:
            return image
        return _converted(image, mode, where)
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{where} is a damaged image ({error}); fetch the file again") from error


def _converted(image: Image.Image, mode: str, where: str) -> Image.Image:
    """Converts an upright image of any mode without loss."""
    if image.mode in (*SIXTEEN_BITS, "I"):
        return _from_integers(image, where).convert(mode)
    if image.mode not in COLOUR_MODES + ALPHA_MODES:
        raise DatasetError(
            f"{where} is an image of mode {image.mode}, whose range of values is not known; expected 8-bit grey or "
            "colour, or 16-bit grey: convert it first"
        )
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = image.convert("RGBA")
        if opaque.getchannel("A").getextrema() != (255, 255):
            raise _transparent(image, where)
        colour = opaque.convert("RGB")
    else:
        colour = image.convert("RGB")
    if mode == "RGB":
        return colour
    red, green, blue = (channel.tobytes() for channel in colour.split())
    if not red == green == blue:
        raise DatasetError(
            f"{where} is an image of mode {image.mode} with colours, expected grey (L); is this the right dataset?"
        )
    return colour.getchannel("R")


def _from_integers(image: Image.Image, where: str) -> Image.Image:
    """Scales grey values of 16 bits to 8 bits."""
    values = np.asarray(image).astype(np.int64)
    if values.size and image.info.get("transparency") is not None and (values == image.info["transparency"]).any():
        raise _transparent(image, where)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    is_clear = image.mode != "I" or image.format in SIXTEEN_BIT_FORMATS or high > 255 or high == 0
    if low < 0 or high > 65535 or not is_clear:
        raise DatasetError(
            f"{where} is an image of mode {image.mode} with values from {low} to {high}, expected 16-bit grey "
            "(0 to 65535): convert it to 8 or 16 bits first"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _transparent(image: Image.Image, where: str) -> DatasetError:
    return DatasetError(
        f"{where} is an image of mode {image.mode} with transparent pixels, which have no colour of their own; "
        "put it on a background first"
    )


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
