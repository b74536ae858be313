"""The oracle: what preprocessing must give, in Pillow and NumPy, and nothing clever.

The guest's kernels are tested against this module, and it is the baseline that they are timed
against. Semantics as in torchvision: shorter side to ``resize`` (bilinear, antialiased), centre
crop, scale to 0 … 1, normalise per channel, channels first.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgelab.models import Spec


def bare_decode(encoded: bytes) -> NDArray[np.uint8]:
    """Decode a picture as everybody does, to be timed against: no limit, no orientation.

    Parameters
    ----------
    encoded : bytes
        A file of your own. Whatever may be hostile is for `edgelab.images.decode`.

    Returns
    -------
    numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    """
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def resize_crop(pixels: NDArray[np.uint8], resize: int, crop: int) -> NDArray[np.uint8]:
    """Resize the shorter side and cut the centre.

    Parameters
    ----------
    pixels : numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    resize, crop : int
        Pixels; ``1 <= crop <= resize``.

    Returns
    -------
    numpy.ndarray
        ``uint8``, ``(crop, crop, 3)``.
    """
    height, width = pixels.shape[:2]
    if width <= height:
        size = resize, resize * height // width
    else:
        size = resize * width // height, resize
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


def normalize(pixels: NDArray[np.uint8], spec: Spec) -> NDArray[np.float32]:
    """Scale to 0 … 1, subtract the mean, divide by the deviation, channels first.

    Parameters
    ----------
    pixels : numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    spec : Spec

    Returns
    -------
    numpy.ndarray
        ``float32``, ``(3, height, width)``.
    """
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    scaled = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def preprocess(pixels: NDArray[np.uint8], spec: Spec) -> NDArray[np.float32]:
    """Turn an image into a model's input.

    Parameters
    ----------
    pixels : numpy.ndarray
        ``uint8``, ``(height, width, 3)``, RGB.
    spec : Spec

    Returns
    -------
    numpy.ndarray
        ``float32``, ``(1, 3, crop, crop)``.
    """
    return normalize(resize_crop(pixels, spec.resize, spec.crop), spec)[None]


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Turn logits into probabilities; ``float64``, same shape, sums to 1 over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return probabilities
