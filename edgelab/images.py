"""Pictures from outside: decoded within limits, always RGB, upright."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from edgelab.errors import ImageError

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
"""Largest width x height: the guest's own limit, 67 megapixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode(image: bytes | str | Path | NDArray[Any]) -> NDArray[np.uint8]:
    """Return an image as pixels.

    Parameters
    ----------
    image : bytes, str, pathlib.Path or numpy.ndarray
        An encoded file or a path to it; EXIF orientation is applied and transparency dropped. Or
        pixels: ``uint8``, shape ``(height, width, 3)``, RGB.

    Returns
    -------
    numpy.ndarray
        ``uint8``, shape ``(height, width, 3)``, RGB, C-contiguous.

    Raises
    ------
    ImageError
        If it is no image, damaged, too large, or an array of another form.
    """
    if isinstance(image, np.ndarray):
        check_pixels(image)
        return np.ascontiguousarray(image)
    data, name = _read(image)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb(picture, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} is too large: {error}; {MAX_PIXELS:,} pixels are the limit. Shrink it."
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is no image that can be read here. Is it one of {', '.join(FORMATS)}?"
        ) from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ImageError(
            f"{name} can't be decoded: {error}. It is probably damaged or cut off; copy it again."
        ) from None


def check_pixels(image: NDArray[Any]) -> None:
    """Raise ImageError unless `image` is ``uint8``, ``(height, width, 3)``, and of a sane size."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(
            f"need uint8 pixels of shape (height, width, 3) in RGB, got {image.dtype} of shape "
            f"{image.shape}"
        )
    height, width = image.shape[:2]
    if not 1 <= height * width <= MAX_PIXELS:
        raise ImageError(
            f"an image of {width} x {height} pixels: it must have 1 to {MAX_PIXELS:,} of them"
        )


def _rgb(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    if picture.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255 instead of scaling them: all but black becomes white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ImageError(
            f"{name} has 32-bit pixels, and nothing says which value is white. Save it with 8 bits."
        )
    picture.info.pop("transparency", None)  # Pillow would warn that RGB has none
    # Pillow's convert() copies even where there is nothing to convert.
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _read(image: bytes | str | Path) -> tuple[bytes, str]:
    if isinstance(image, bytes):
        data, name = image, f"the image ({len(image):,} bytes)"
    else:
        name = str(image)
        try:
            with Path(image).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)  # not all of it: a device has no end
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"cannot read {name}: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name} has more than {MAX_FILE_BYTES:,} bytes. Shrink it.")
    return data, name
