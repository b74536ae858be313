"""Rendered traffic signs: a labelled image set that is made, not downloaded.

Every sample is a pure function of ``(split, index, size)``, with the same versions of Pillow,
NumPy and matplotlib (which ships the font). The splits draw from different seed
spaces, so a sample of one split never occurs in another one. Pictures are synthetic: a score on
them says how well a model handles *these* renders, and nothing about photographs of real streets.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

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
    """One rendered picture.

    Attributes
    ----------
    image : numpy.ndarray
        RGB, ``uint8``, shape ``(size, size, 3)``.
    label : int
        Index into `SIGNS`.
    """

    image: NDArray[np.uint8]
    label: int


class Signs(Sequence[Sample]):
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

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
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
