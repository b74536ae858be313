"""Labelled pictures: rendered traffic signs, folders of photos, and Imagenette.

A rendered sample is a pure function of ``(split, index, size)``, with the same versions of Pillow,
NumPy and matplotlib (which ships the font). The splits draw from different seed
spaces, so a sample of one split never occurs in another one. Renders are synthetic: a score on
them says how well a model handles *these* renders, and nothing about photographs of real streets.

Every set is a sequence of `Sample`. `prepare` turns one into a `Batch`: decoded, resized and
cropped once, then reused for every model that is compared.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import os
import re
import secrets
import shutil
import stat
import tarfile
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from edgelab import images, models, preprocess
from edgelab.errors import DownloadError, ImageError, ModelError, one_line
from edgelab.paths import cache_dir, locked

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Split = Literal["train", "calibrate", "test"]

# The first word of every seed. Changing one changes that whole split.
_SPLIT_SEED: dict[str, int] = {"train": 11, "calibrate": 23, "test": 37}

SIGNS: tuple[str, ...] = (
    *(f"speed limit {v}" for v in (20, 30, 40, 50, 60, 70, 80, 100, 120)),
    "stop",
    "give way",
    "no entry",
    "no overtaking",
    "no parking",
    "priority road",
    "parking",
    "ahead only",
    "turn left ahead",
    "turn right ahead",
    "ahead or left",
    "ahead or right",
    "keep left",
    "keep right",
    "roundabout",
    "danger",
    "bend to the left",
    "bend to the right",
    "crossroads",
    "road narrows",
    "traffic lights",
    "two-way traffic",
    "bumpy road",
)
"""The class names, in the order of the model's outputs."""

_RED, _BLUE, _WHITE = (190, 22, 34), (20, 80, 160), (245, 245, 245)
_BLACK, _YELLOW = (20, 20, 20), (248, 196, 20)
_FACE = 512  # side of the drawing that each sign face is made from, in pixels


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture and what it shows.

    Attributes
    ----------
    image : numpy.ndarray
        RGB, ``uint8``, shape ``(height, width, 3)``.
    label : int
        Index into the model's labels; for renders, into `SIGNS`. -1 if nobody said.
    """

    image: NDArray[np.uint8]
    label: int


class _Samples(Sequence[Sample], ABC):
    """A sequence whose samples are made on access; a slice is a list of them."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(i) for i in range(*index.indices(len(self)))]
        return self._sample(index)

    @abstractmethod
    def _sample(self, index: int) -> Sample: ...


class Signs(_Samples):
    """A split of the rendered signs, made on access.

    Parameters
    ----------
    split : {"train", "calibrate", "test"}
        Which seed space to draw from.
    count : int
        Number of samples. Sample ``i`` shows class ``i % len(SIGNS)``, so every class occurs
        equally often.
    size : int
        Side of the picture in pixels.

    Raises
    ------
    ValueError
        If the split is unknown, or `count` or `size` is not positive.
    """

    def __init__(self, split: Split, count: int, size: int = 256) -> None:
        if split not in _SPLIT_SEED:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_SPLIT_SEED)}")
        if count < 1 or size < 16:
            raise ValueError(f"need count >= 1 and size >= 16, got {count} and {size}")
        self.split, self.size, self._count = split, size, count

    def __len__(self) -> int:
        return self._count

    def _sample(self, index: int) -> Sample:
        if not -self._count <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        index %= self._count
        label = index % len(SIGNS)
        rng = np.random.default_rng([_SPLIT_SEED[self.split], index])
        return Sample(render_sign(label, rng, self.size), label)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(self._count))

    def __repr__(self) -> str:
        return f"Signs({self.split!r}, count={self._count}, size={self.size})"


def render_sign(label: int, rng: np.random.Generator, size: int = 256) -> NDArray[np.uint8]:
    """Render one sign in a cluttered scene, as a poor camera would see it.

    Parameters
    ----------
    label : int
        Index into `SIGNS`.
    rng : numpy.random.Generator
        Source of all randomness: the same state gives the same picture.
    size : int
        Side of the picture in pixels.

    Returns
    -------
    numpy.ndarray
        RGB, ``uint8``, shape ``(size, size, 3)``.
    """
    from PIL import Image

    scene = _background(rng, size)
    _paste_sign(scene, label, rng, size)
    pixels = np.asarray(scene, np.float32)
    pixels = _lighting(pixels, rng)
    camera = _blur(Image.fromarray(pixels.astype(np.uint8)), rng, size)
    pixels = np.asarray(camera, np.float32)
    grain = rng.normal(0.0, rng.uniform(0.0, 12.0), (size, size, 3)).astype(np.float32)
    pixels = np.clip(pixels + grain, 0, 255)
    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(
        encoded, "JPEG", quality=int(rng.integers(12, 92)), subsampling=int(rng.integers(0, 3))
    )
    return np.asarray(Image.open(encoded).convert("RGB"))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Colour noise in several octaves under random shapes: texture without meaning."""
    from PIL import Image, ImageDraw

    noise = np.zeros((size, size, 3), np.float32)
    for octave in (2, 5, 12, 30):
        coarse = rng.integers(0, 256, (octave, octave, 3), np.uint8)
        grown = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noise += np.asarray(grown, np.float32) * rng.uniform(0.1, 1.0) / octave**0.5
    grey = noise.mean(2, keepdims=True)
    noise = grey + (noise - grey) * np.float32(rng.uniform(0.1, 0.9))
    low, high = noise.min(), noise.max()
    tint = rng.uniform(0.5, 1.0, 3).astype(np.float32)
    scene = Image.fromarray(((noise - low) / (high - low + 1e-6) * 255 * tint).astype(np.uint8))
    draw = ImageDraw.Draw(scene)
    for _ in range(int(rng.integers(4, 22))):
        x, y = rng.uniform(-0.1, 1.0, 2) * size
        w, h = rng.uniform(0.02, 0.45, 2) * size
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        kind = rng.integers(4)
        if kind == 0:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        elif kind == 1:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        elif kind == 2:
            draw.line((x, y, x + w, y + h), fill=colour, width=max(1, int(0.02 * size)))
        else:
            corners = rng.uniform(-0.25, 0.25, (3, 2)) * size + (x, y)
            draw.polygon([(float(px), float(py)) for px, py in corners], fill=colour)
    return scene


def _paste_sign(scene: Image.Image, label: int, rng: np.random.Generator, size: int) -> None:
    """Put the sign, seen from an angle, on its pole into the scene; then hide parts of it."""
    from PIL import Image, ImageDraw

    side = rng.uniform(0.28, 0.74) * size
    centre = (0.5 + rng.uniform(-0.13, 0.13, 2)) * size
    quad = _projected_square(rng) * side / 2 + centre
    draw = ImageDraw.Draw(scene)
    if rng.random() < 0.7:
        pole = side * rng.uniform(0.03, 0.06)
        grey = int(rng.integers(70, 190))
        x, y = centre
        draw.rectangle((x - pole, y, x + pole, size), fill=(grey, grey, grey))

    # A face much larger than its image on screen would alias: take one just large enough.
    level = 64
    while level < 1.4 * side and level < _FACE:
        level *= 2
    face = _face(label, level)
    coefficients = _homography(quad, level)
    warped = face.transform(
        (size, size), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC
    )
    # Dirt and sun: the paint loses saturation and contrast.
    fade = rng.uniform(0.0, 0.4)
    rgb, alpha = warped.convert("RGB"), warped.getchannel("A")
    dirt = tuple(int(c) for c in rng.integers(60, 200, 3))
    rgb = Image.blend(rgb, Image.new("RGB", rgb.size, dirt), fade)
    scene.paste(rgb, (0, 0), alpha)

    # Leaves, branches and stickers in front of the sign.
    for _ in range(int(rng.integers(0, 4))):
        x, y = centre + rng.uniform(-0.55, 0.55, 2) * side
        w, h = rng.uniform(0.03, 0.2, 2) * side
        colour = tuple(int(c) for c in rng.integers(0, 200, 3))
        draw.ellipse((x - w, y - h, x + w, y + h), fill=colour)
    if rng.random() < 0.25:
        x0, x1 = (centre[0] + rng.uniform(-0.8, 0.8, 2) * side).tolist()
        width = max(1, int(rng.uniform(0.02, 0.07) * side))
        draw.line((x0, centre[1] - side, x1, centre[1] + side), fill=(40, 30, 20), width=width)


def _projected_square(rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners of the square [-1, 1]^2 after a random 3-D rotation, by pinhole projection."""
    yaw, pitch, roll = rng.uniform((-0.85, -0.5, -0.28), (0.85, 0.5, 0.28))
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64)
    x, y = corners.T
    x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
    x, z = x * math.cos(yaw), x * math.sin(yaw)
    y, z = y * math.cos(pitch) - z * math.sin(pitch), y * math.sin(pitch) + z * math.cos(pitch)
    distance = 4.0
    projected: NDArray[np.float64] = np.stack([x, y], 1) * (distance / (distance + z))[:, None]
    return projected


def _homography(quad: NDArray[np.float64], face: int) -> list[float]:
    """Coefficients that map the scene's pixels back to the face's (Pillow's order)."""
    target = np.array([(0, 0), (face, 0), (face, face), (0, face)], np.float64)
    rows, values = [], []
    for (x, y), (u, v) in zip(quad, target, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows), np.array(values))]


def _lighting(pixels: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Exposure, contrast, colour temperature, and the edge of a shadow."""
    size = len(pixels)
    if rng.random() < 0.4:
        angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.3)
        axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        side = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle) > offset
        pixels = np.where(side[..., None], pixels * np.float32(rng.uniform(0.3, 0.8)), pixels)
    temperature = np.array([1 + rng.uniform(-0.2, 0.2), 1.0, 1 + rng.uniform(-0.2, 0.2)])
    gain = np.float32(math.exp(rng.uniform(-0.75, 0.4)))
    contrast = np.float32(rng.uniform(0.55, 1.15))
    lit = (pixels * temperature.astype(np.float32) - 110) * contrast + 110
    clipped: NDArray[np.float32] = np.clip(lit * gain, 0, 255).astype(np.float32)
    return clipped


def _blur(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Out of focus, moving, or far away."""
    from PIL import Image, ImageFilter

    kind = rng.random()
    if kind < 0.45:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.011) * size))
    if kind < 0.7:
        steps = max(2, int(rng.uniform(0.01, 0.055) * size))
        angle = rng.uniform(0, math.pi)
        pixels = np.asarray(image, np.float32)
        shifts = np.linspace(-steps / 2, steps / 2, steps)
        moved = np.zeros_like(pixels)
        for s in shifts:
            shift = round(s * math.sin(angle)), round(s * math.cos(angle))
            moved += np.roll(pixels, shift, (0, 1))
        return Image.fromarray((moved / steps).astype(np.uint8))
    if kind < 0.85:
        small = max(8, int(size * rng.uniform(0.25, 0.7)))
        return image.resize((small, small), Image.Resampling.BILINEAR).resize(
            (size, size), Image.Resampling.BILINEAR
        )
    return image


# --- sign faces: each is drawn once, in a square of 100 x 100 units -------------------------------


@functools.lru_cache(maxsize=256)
def _face(label: int, side: int) -> Image.Image:
    """The face of a sign, RGBA, ``side`` pixels square."""
    from PIL import Image

    if side < _FACE:
        return _face(label, _FACE).resize((side, side), Image.Resampling.LANCZOS)
    pen = _Pen()
    name = SIGNS[label]
    if name.startswith("speed limit "):
        _speed_limit(pen, name.removeprefix("speed limit "))
    else:
        _DRAW[name](pen)
    return pen.image


class _Pen:
    """Draws in units of 1/100 of the face's side."""

    def __init__(self) -> None:
        from PIL import Image, ImageDraw

        self.image: Image.Image = Image.new("RGBA", (_FACE, _FACE), (128, 128, 128, 0))
        self.draw: ImageDraw.ImageDraw = ImageDraw.Draw(self.image)

    def disc(self, radius: float, colour: tuple[int, int, int]) -> None:
        s = _FACE / 100
        box = ((50 - radius) * s, (50 - radius) * s, (50 + radius) * s, (50 + radius) * s)
        self.draw.ellipse(box, fill=colour)

    def polygon(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        s = _FACE / 100
        self.draw.polygon([(x * s, y * s) for x, y in points], fill=colour)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        width: float,
        colour: tuple[int, int, int],
    ) -> None:
        s = _FACE / 100
        self.draw.line(
            [(x * s, y * s) for x, y in points], fill=colour, width=int(width * s), joint="curve"
        )

    def arrow(
        self,
        points: Sequence[tuple[float, float]],
        colour: tuple[int, int, int],
        width: float = 9,
        head: float = 13,
    ) -> None:
        """A line with an arrow head at its last point."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        base = (x1 - dx * head, y1 - dy * head)
        self.line([*points[:-1], base], width, colour)
        self.polygon(
            [
                (x1, y1),
                (base[0] - dy * head, base[1] + dx * head),
                (base[0] + dy * head, base[1] - dx * head),
            ],
            colour,
        )

    def text(self, text: str, height: float, colour: tuple[int, int, int]) -> None:
        s = _FACE / 100
        self.draw.text((50 * s, 50 * s), text, fill=colour, font=_font(height * s), anchor="mm")


def _font(size: float) -> Any:
    """DejaVu Sans Bold, which matplotlib ships."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)


def _speed_limit(pen: _Pen, digits: str) -> None:
    pen.disc(49, _RED)
    pen.disc(38, _WHITE)
    pen.text(digits, 44 if len(digits) == 2 else 34, _BLACK)


def _stop(pen: _Pen) -> None:
    octagon = [math.pi / 8 + k * math.pi / 4 for k in range(8)]
    pen.polygon([(50 + 49 * math.cos(a), 50 + 49 * math.sin(a)) for a in octagon], _WHITE)
    pen.polygon([(50 + 46 * math.cos(a), 50 + 46 * math.sin(a)) for a in octagon], _RED)
    pen.text("STOP", 29, _WHITE)


def _give_way(pen: _Pen) -> None:
    pen.polygon([(1, 8), (99, 8), (50, 94)], _RED)
    pen.polygon([(20, 19), (80, 19), (50, 72)], _WHITE)


def _no_entry(pen: _Pen) -> None:
    pen.disc(49, _RED)
    pen.polygon([(14, 40), (86, 40), (86, 60), (14, 60)], _WHITE)


def _no_overtaking(pen: _Pen) -> None:
    pen.disc(49, _RED)
    pen.disc(39, _WHITE)
    for x, colour in ((34, _RED), (66, _BLACK)):
        pen.polygon([(x - 13, 50), (x + 13, 50), (x + 13, 62), (x - 13, 62)], colour)
        pen.polygon([(x - 8, 50), (x - 5, 41), (x + 5, 41), (x + 8, 50)], colour)
        for wheel in (x - 9, x + 5):
            pen.polygon([(wheel, 62), (wheel + 4, 62), (wheel + 4, 67), (wheel, 67)], colour)


def _no_parking(pen: _Pen) -> None:
    pen.disc(49, _RED)
    pen.disc(40, _BLUE)
    pen.line([(19, 19), (81, 81)], 9, _RED)


def _priority_road(pen: _Pen) -> None:
    pen.polygon([(50, 1), (99, 50), (50, 99), (1, 50)], _WHITE)
    pen.polygon([(50, 13), (87, 50), (50, 87), (13, 50)], _YELLOW)


def _parking(pen: _Pen) -> None:
    pen.polygon([(3, 3), (97, 3), (97, 97), (3, 97)], _BLUE)
    pen.text("P", 74, _WHITE)


def _mandatory(*arrows: Sequence[tuple[float, float]]) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.disc(49, _WHITE)
        pen.disc(46, _BLUE)
        for arrow in arrows:
            pen.arrow(arrow, _WHITE)

    return draw


def _roundabout(pen: _Pen) -> None:
    _mandatory()(pen)
    for turn in range(3):
        start = turn * 2 * math.pi / 3
        angles = [start + k * 0.25 for k in range(7)]
        pen.arrow([(50 + 25 * math.cos(a), 50 + 25 * math.sin(a)) for a in angles], _WHITE, 7, 11)


def _warning(symbol: Callable[[_Pen], None]) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.polygon([(50, 6), (99, 92), (1, 92)], _RED)
        pen.polygon([(50, 26), (82, 82), (18, 82)], _WHITE)
        symbol(pen)

    return draw


def _danger(pen: _Pen) -> None:
    pen.polygon([(45, 38), (55, 38), (53, 65), (47, 65)], _BLACK)
    pen.polygon([(46, 69), (54, 69), (54, 77), (46, 77)], _BLACK)


def _bend(side: int) -> Callable[[_Pen], None]:
    def draw(pen: _Pen) -> None:
        pen.arrow([(50 - 8 * side, 79), (50 - 8 * side, 62), (50 + 9 * side, 45)], _BLACK, 7, 9)

    return draw


def _crossroads(pen: _Pen) -> None:
    pen.line([(40, 46), (60, 76)], 6, _BLACK)
    pen.line([(60, 46), (40, 76)], 6, _BLACK)


def _road_narrows(pen: _Pen) -> None:
    pen.line([(40, 79), (40, 66), (46, 58), (46, 44)], 4, _BLACK)
    pen.line([(60, 79), (60, 66), (54, 58), (54, 44)], 4, _BLACK)


def _traffic_lights(pen: _Pen) -> None:
    pen.polygon([(43, 40), (57, 40), (57, 79), (43, 79)], _BLACK)
    s = _FACE / 100
    for y, colour in ((47, (220, 30, 30)), (59.5, (240, 190, 20)), (72, (30, 160, 60))):
        pen.draw.ellipse([45.5 * s, (y - 4.5) * s, 54.5 * s, (y + 4.5) * s], fill=colour)


def _two_way(pen: _Pen) -> None:
    pen.arrow([(43, 44), (43, 78)], _BLACK, 5, 8)
    pen.arrow([(57, 78), (57, 44)], _BLACK, 5, 8)


def _bumpy_road(pen: _Pen) -> None:
    s = _FACE / 100
    for x in (38, 62):
        pen.draw.pieslice([(x - 12) * s, 62 * s, (x + 12) * s, 86 * s], 180, 360, fill=_BLACK)
    pen.polygon([(24, 73), (76, 73), (76, 78), (24, 78)], _BLACK)


_DRAW: dict[str, Callable[[_Pen], None]] = {
    "stop": _stop,
    "give way": _give_way,
    "no entry": _no_entry,
    "no overtaking": _no_overtaking,
    "no parking": _no_parking,
    "priority road": _priority_road,
    "parking": _parking,
    "ahead only": _mandatory([(50, 82), (50, 17)]),
    "turn left ahead": _mandatory([(62, 82), (62, 47), (18, 47)]),
    "turn right ahead": _mandatory([(38, 82), (38, 47), (82, 47)]),
    "ahead or left": _mandatory([(60, 84), (60, 16)], [(60, 62), (20, 62)]),
    "ahead or right": _mandatory([(40, 84), (40, 16)], [(40, 62), (80, 62)]),
    "keep left": _mandatory([(76, 24), (26, 74)]),
    "keep right": _mandatory([(24, 24), (74, 74)]),
    "roundabout": _roundabout,
    "danger": _warning(_danger),
    "bend to the left": _warning(_bend(-1)),
    "bend to the right": _warning(_bend(1)),
    "crossroads": _warning(_crossroads),
    "road narrows": _warning(_road_narrows),
    "traffic lights": _warning(_traffic_lights),
    "two-way traffic": _warning(_two_way),
    "bumpy road": _warning(_bumpy_road),
}


# --- batches: prepared once, used for every model -------------------------------------------------

_CHUNK = 32  # pictures that are worked on at a time
MAX_TENSOR_BYTES = 4 << 30
"""Largest array of normalised pictures: 7,100 of 224 x 224."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pictures ready for a model: resized and cropped, not yet normalised.

    Attributes
    ----------
    images : numpy.ndarray
        ``uint8``, ``(n, crop, crop, 3)``, RGB. Four times smaller than the tensors.
    labels : numpy.ndarray
        ``int64``, ``(n,)``: indices into the model's labels; -1 if nobody said.
    spec : edgelab.models.Spec
    source : str
        What the pictures are, in words.
    names : tuple of str
        Of each picture: its path in its folder, or its number.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    spec: models.Spec
    source: str
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return (
            f"Batch({len(self):,} pictures of {self.spec.crop} x {self.spec.crop}, {self.source})"
        )

    def take(self, indices: Sequence[int] | NDArray[np.integer[Any]] | slice) -> Batch:
        """Return some of the pictures, in the order asked for."""
        names = tuple(np.array(self.names, object)[indices]) if self.names else ()
        return Batch(self.images[indices], self.labels[indices], self.spec, self.source, names)

    def tensors(self) -> NDArray[np.float32]:
        """Normalise all: ``float32``, ``(n, 3, crop, crop)``, 588 KiB a picture of 224 x 224.

        Raises
        ------
        ImageError
            If they would take more than `MAX_TENSOR_BYTES`.
        """
        crop = self.spec.crop
        size = len(self) * 3 * crop * crop * 4
        if size > MAX_TENSOR_BYTES:
            raise ImageError(
                f"{len(self):,} pictures make tensors of {size:,} bytes; {MAX_TENSOR_BYTES:,} are "
                "the limit. Take fewer, or go through them with chunks()"
            )
        whole = np.empty((len(self), 3, crop, crop), np.float32)
        for start, chunk in self.chunks():
            whole[start : start + len(chunk)] = chunk
        return whole

    def chunks(self, size: int = _CHUNK) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield ``(start, tensors)`` for `size` pictures at a time, so that memory stays small."""
        for start in range(0, len(self), size):
            some = self.images[start : start + size]
            yield start, np.stack([preprocess.normalize(image, self.spec) for image in some])

    def folds(self, count: int = 5, *, seed: int = 0) -> list[NDArray[np.int64]]:
        """Split the indices at random into `count` parts of equal size, give or take one.

        Raises
        ------
        ValueError
            If there are fewer pictures than parts, or fewer than two parts.
        """
        if not 2 <= count <= len(self):
            raise ValueError(f"can't split {len(self)} pictures into {count} parts of one or more")
        order = np.random.default_rng(seed).permutation(len(self))
        return [np.sort(part).astype(np.int64) for part in np.array_split(order, count)]


def prepare(samples: Sequence[Sample], spec: models.Spec, *, threads: int | None = None) -> Batch:
    """Decode or render, resize and crop every sample, once for all models.

    Parameters
    ----------
    samples : sequence of Sample
        `Signs`, `ImageFolder`, or a list.
    spec : edgelab.models.Spec
        The model's size of pictures and its labels.
    threads : int, optional
        The default is the number of cores; the result does not depend on it.

    Raises
    ------
    ImageError
        If a picture can't be decoded, or its label is none of the model's.
    """
    from edgelab.aot import available_cores

    count, crop = len(samples), spec.crop
    if count == 0:
        raise ImageError("there are no pictures to prepare")
    cut = np.empty((count, crop, crop, 3), np.uint8)
    labels = np.empty(count, np.int64)

    def work(index: int) -> None:
        sample = samples[index]
        if not -1 <= sample.label < len(spec.labels):
            raise ImageError(
                f"picture {index} shows class {sample.label}, and model {spec.name!r} has "
                f"{len(spec.labels)}. Was this set labelled for another model?"
            )
        cut[index] = preprocess.resize_crop(sample.image, spec.resize, crop)
        labels[index] = sample.label

    with ThreadPoolExecutor(threads or available_cores()) as pool:
        try:
            for _ in pool.map(work, range(count)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = tuple(map(str, range(count)))
    if isinstance(samples, ImageFolder):
        root = samples.folder.resolve()
        names = tuple(path.relative_to(root).as_posix() for path in samples.paths)
    source = "a list" if isinstance(samples, list) else repr(samples)
    return Batch(cut, labels, spec, source, names)


def tensors(samples: Sequence[Sample], spec: models.Spec) -> NDArray[np.float32]:
    """Turn samples into a model's input with the NumPy oracle.

    Parameters
    ----------
    samples : sequence of Sample
    spec : edgelab.models.Spec

    Returns
    -------
    numpy.ndarray
        ``float32``, ``(n, 3, crop, crop)``.

    Raises
    ------
    ImageError
        If a picture can't be decoded, or all of them are more than `MAX_TENSOR_BYTES`.
    """
    return prepare(samples, spec).tensors()


# --- folders of photos ----------------------------------------------------------------------------

MAX_FILES = 200_000
"""Most entries that are looked at in a folder of pictures; ImageNet's validation set has 50,000."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def class_names(spec: models.Spec, synsets: Path | None = None) -> dict[str, int]:
    """Return the names that a folder of pictures may give a model's classes.

    Parameters
    ----------
    spec : edgelab.models.Spec
    synsets : pathlib.Path, optional
        A list of lines such as ``n01440764 tench, Tinca tinca``, line ``k`` for class ``k``; its
        WordNet ids become names too.

    Returns
    -------
    dict of str to int
        Name → class index. Case and ``_`` for a space do not matter (see `ImageFolder`). A name
        that two classes share (ImageNet has two cranes) is left out.

    Raises
    ------
    ModelError
        If the list is not one of this model's classes.
    """
    counts = Counter(_key(label) for label in spec.labels)
    names = {label: k for k, label in enumerate(spec.labels) if counts[_key(label)] == 1}
    if synsets is not None:
        ids = models.read_synset_ids(synsets)
        if len(ids) != len(spec.labels):
            raise ModelError(
                f"{synsets} lists {len(ids)} classes, and model {spec.name!r} has "
                f"{len(spec.labels)}. It is another model's list"
            )
        names.update({wnid: k for k, wnid in enumerate(ids)})
    return names


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


class ImageFolder(_Samples):
    """Photos in a folder, labelled by their folder's or by their own name.

    ``FOLDER/tench/1.jpg``, ``FOLDER/n01440764/1.jpg``, ``FOLDER/n01440764.jpg`` and
    ``FOLDER/n01440764_1.jpg`` all show class ``tench``. Files are sorted by name, and taken from
    the classes in turn, so that the first ones show as many classes as there are.

    Parameters
    ----------
    folder : str or pathlib.Path
    names : mapping of str to int, optional
        Name → class index, from `class_names`. Without it every picture is taken, with label -1:
        enough to calibrate.
    count : int, optional
        Take that many at most.

    Attributes
    ----------
    paths : tuple of pathlib.Path
    labels : tuple of int
    skipped : dict of str to int
        Why files were left out → how many.

    Raises
    ------
    ImageError
        If there is no such folder, it has too many files, or none that can be used. A file that
        begins like a picture and is damaged raises it on access, with the file's name.

    Notes
    -----
    A link that leads out of the folder is skipped: a set of pictures from elsewhere must not make
    this process read other files.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Mapping[str, int] | None = None,
        *,
        count: int | None = None,
    ) -> None:
        if count is not None and count < 1:
            raise ValueError(f"need count >= 1, got {count}")
        self.folder = Path(folder)
        known = None if names is None else {_key(name): k for name, k in names.items()}
        skipped: Counter[str] = Counter()
        found = _labelled(self.folder, known, skipped)
        turns: list[tuple[Path, int]] = []
        for turn in range(max(map(len, found.values()), default=0)):
            turns += [(paths[turn], k) for k, paths in sorted(found.items()) if turn < len(paths)]
        chosen = []
        for path, label in turns:
            if _begins_like_a_picture(path):
                chosen.append((path, label))
            else:
                skipped["no picture, whatever the name says"] += 1
            if count is not None and len(chosen) == count:
                break
        self.skipped = dict(sorted(skipped.items()))
        if not chosen:
            raise ImageError(self._nothing(known))
        self.paths = tuple(path for path, _ in chosen)
        self.labels = tuple(label for _, label in chosen)

    def __len__(self) -> int:
        return len(self.paths)

    def _sample(self, index: int) -> Sample:
        return Sample(images.decode(self.paths[index]), self.labels[index])

    def __repr__(self) -> str:
        classes = len(set(self.labels))
        return f"ImageFolder({self.folder.name!r}, {len(self):,} pictures of {classes} classes)"

    def _nothing(self, known: Mapping[str, int] | None) -> str:
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped.items())
        inner = next((s for s in ("val", "test", "train") if (self.folder / s).is_dir()), None)
        if inner is not None and inner not in (known or {}):
            cure = f"Did you mean {self.folder / inner}?"
        elif known is None:
            cure = f"It must hold pictures ({', '.join(sorted(_SUFFIXES))}), or folders of them"
        else:
            some = ", ".join(list(known)[:3])
            cure = (
                "Its folders, or its files, must have the names of classes that the model knows, "
                f"such as {some}. For WordNet ids (n01440764) the model's list of them is needed: "
                "--labels FILE"
            )
        return f"{self.folder} has no picture to use ({why or 'it is empty'}). {cure}"


def _labelled(
    folder: Path, known: Mapping[str, int] | None, skipped: Counter[str]
) -> dict[int, list[Path]]:
    """Class index → files, sorted; links followed within the folder only."""
    try:
        root = folder.resolve(strict=True)
        entries = sorted(_entries(root), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read the folder {folder}: {reason}") from None
    found: defaultdict[int, list[Path]] = defaultdict(list)
    seen = len(entries)

    def add(entry: os.DirEntry[str], label: int | None) -> None:
        path = Path(entry.path)
        if path.suffix.lower() not in _SUFFIXES:
            skipped["no picture by the name"] += 1
        elif label is None:
            skipped["of a class that the model does not know"] += 1
        elif not _inside(path, root):
            skipped["a link that leads out of the folder, or nowhere"] += 1
        else:
            found[label].append(path)

    for entry in entries:
        if not _is_dir(entry):
            add(entry, -1 if known is None else _label_of_file(Path(entry.name).stem, known))
            continue
        if not _inside(Path(entry.path), root):
            skipped["a link that leads out of the folder, or nowhere"] += 1
            continue
        label = -1 if known is None else known.get(_key(entry.name))
        try:
            inner = sorted(_entries(Path(entry.path), MAX_FILES - seen), key=lambda e: e.name)
        except OSError as error:
            raise ImageError(f"cannot read the folder {entry.path}: {error.strerror}") from None
        seen += len(inner)
        for file in inner:
            if _is_dir(file):
                skipped["a folder in a class's folder"] += 1
            else:
                add(file, label)
    return found


def _entries(folder: Path, limit: int = MAX_FILES) -> list[os.DirEntry[str]]:
    entries: list[os.DirEntry[str]] = []
    with os.scandir(folder) as listing:
        for entry in listing:
            if len(entries) == limit:
                raise ImageError(
                    f"there are more than {MAX_FILES:,} files up to {folder}. Give a smaller folder"
                )
            entries.append(entry)
    return entries


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        return False


def _label_of_file(stem: str, known: Mapping[str, int]) -> int | None:
    """Class of ``n01440764.jpg``, ``n01440764_12.jpg`` or ``speed_limit_20_7.jpg``."""
    parts = stem.split("_")
    for end in range(len(parts), 0, -1):
        label = known.get(_key("_".join(parts[:end])))
        if label is not None:
            return label
    return None


def _begins_like_a_picture(path: Path) -> bool:
    """Tell by the file's first bytes; never opens a pipe or a device, which could block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"II*\0", b"MM\0*")
    return head.startswith(starts) or bool(
        (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or re.match(rb"P[1-6]\s", head)
    )


# --- Imagenette: ten classes of ImageNet, free to download ----------------------------------------

# WordNet id → the label that ImageNet models have for it.
_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
IMAGENETTE_SIZES = ("160px", "320px")
"""Shorter side of the pictures. Models that resize to 256 see blurred ones with 160px."""


def imagenette(
    spec: models.Spec,
    split: Literal["train", "val"] = "val",
    *,
    size: str = "320px",
    count: int | None = None,
    progress: bool | None = None,
) -> ImageFolder:
    """Return Imagenette, downloaded and unpacked into the cache on first use.

    Ten classes of ImageNet that are easy to tell apart, published by fast.ai: 9,469 pictures to
    calibrate with (``"train"``) and 3,925 to score (``"val"``). The archives are pinned by the
    checksums that torchvision publishes.

    Parameters
    ----------
    spec : edgelab.models.Spec
        Of a model with ImageNet's labels.
    split : {"train", "val"}
    size : {"160px", "320px"}
        99 or 342 MB to download.
    count : int, optional
        Take that many at most, from the ten classes in turn.
    progress : bool, optional
        Show a progress bar; the default is yes if stderr is a terminal.

    Raises
    ------
    DownloadError
        If it can't be downloaded, or the archive holds what it must not.
    ImageError
        If the model does not know these classes.
    """
    if split not in ("train", "val") or size not in IMAGENETTE_SIZES:
        raise ValueError(f"need train or val, and {' or '.join(IMAGENETTE_SIZES)}, not {split!r}, "
                         f"{size!r}")  # fmt: skip
    place = {_key(label): k for k, label in enumerate(spec.labels)}
    names = {
        wnid: place[_key(label)] for wnid, label in _IMAGENETTE.items() if _key(label) in place
    }
    if len(names) < len(_IMAGENETTE):
        raise ImageError(
            f"model {spec.name!r} does not have the labels of ImageNet, so it can't be scored on "
            "Imagenette. Give pictures of its own classes: --images DIR"
        )
    return ImageFolder(_imagenette_folder(size, progress) / split, names, count=count)


def _imagenette_folder(size: str, progress: bool | None) -> Path:
    entry = models.pinned_dataset(f"imagenette2-{size.removesuffix('px')}")
    name = str(entry["folder"])
    folder = cache_dir() / "datasets" / name
    if folder.is_dir():  # renamed into place when it was complete
        return folder
    with locked(folder.with_name(f".{name}.lock")):
        if not folder.is_dir():
            archive = models.download(
                entry, f"{name}.tgz", folder="datasets", progress=progress, resume=True
            )
            extract(archive, folder, max_bytes=entry["unpacked_bytes"], max_files=20_000)
            archive.unlink()  # unpacked, it takes as much again
    return folder


_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +,-]*")
_MAX_DEPTH = 6
_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10))}


def extract(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpack a ``.tar.gz`` whose files all lie in one folder; that one becomes `folder`.

    Everything is written to a temporary folder, which is renamed when it is complete.

    Parameters
    ----------
    archive : pathlib.Path
    folder : pathlib.Path
        Must not exist. Its name must be that of the archive's one folder.
    max_bytes, max_files : int
        Limits on what the archive holds, unpacked.

    Raises
    ------
    DownloadError
        If the archive is damaged, larger than the limits, or has a link, a device, or a name that
        leads elsewhere. Nothing stays behind.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        temporary.mkdir(parents=True)
        # Headers and padding: three blocks of 512 bytes for a file with a long name.
        limit = max_bytes + 4096 * max_files
        with gzip.open(archive) as packed:
            _unpack(_Limited(packed, limit), temporary, folder.name, max_bytes, max_files)
        os.replace(temporary, folder)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, OSError, ValueError) as error:
        raise DownloadError(
            f"{archive.name} was not unpacked: {one_line(error)}. Nothing of it was kept; delete "
            f"{archive} and run this again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Limited(io.RawIOBase):
    """What gzip gives, up to a limit, in reads of a sane size: a header can't ask for gigabytes."""

    def __init__(self, source: gzip.GzipFile, limit: int) -> None:
        self._source, self._limit = source, limit

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 1 << 20:
            raise ValueError(f"the archive asks for {size:,} bytes at once")
        if self._source.tell() + size > self._limit + 512:
            raise ValueError(f"it holds more than {self._limit:,} bytes")
        return self._source.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or not self._source.tell() <= offset <= self._limit:
            raise ValueError(f"it holds more than {self._limit:,} bytes, or goes back")
        return self._source.seek(offset)

    def tell(self) -> int:
        return self._source.tell()


def _unpack(packed: _Limited, target: Path, root: str, max_bytes: int, max_files: int) -> None:
    written = files = 0
    with tarfile.open(fileobj=packed, mode="r:") as tar:
        for member in tar:
            files += 1
            written += max(member.size, 0)
            if files > max_files or written > max_bytes:
                raise ValueError(f"it holds more than {max_files:,} files or {max_bytes:,} bytes")
            parts = _safe_parts(member, root)
            if hasattr(tarfile, "data_filter"):  # a second opinion; not in every Python 3.10
                tarfile.data_filter(member, str(target))
            path = target.joinpath(*parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            content = tar.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name!r} has no content")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:  # "x": a second file of this name is an error
                shutil.copyfileobj(content, file, 1 << 16)
    if files == 0:
        raise ValueError("it is empty")


def _safe_parts(member: tarfile.TarInfo, root: str) -> tuple[str, ...]:
    """The member's path below the archive's folder, or an error if it is not plain."""
    shown = ascii(member.name[:80])
    if not (member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir()):
        raise ValueError(f"{shown} is a link, a device, or something else that is no file")
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("./"):
        parts = PurePosixPath(member.name[2:]).parts
    plain = all(
        _PLAIN.fullmatch(p)
        and not p.endswith((".", " "))
        and p.split(".")[0].lower() not in _RESERVED
        for p in parts
    )
    if not parts or not plain or len(parts) > _MAX_DEPTH or parts[0] != root:
        raise ValueError(f"{shown} is no plain path in {root}/")
    return parts[1:]
