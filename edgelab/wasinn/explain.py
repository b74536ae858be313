"""Likely mistakes: what a model was probably fed wrongly, found in the numbers themselves.

A tensor with the right shape and type is always accepted, and the model always answers; nothing
fails if the pixels lie in another order or were never normalised. What the model wants is in its
metadata (see models/README.md). What it got can be compared with that:

- Layout: in planes, neighbouring rows are alike. Pixel by pixel under the shape of planes, rows of
  one width apart belong to different places and colours, but three widths apart they are alike.
- Values: pixels have 8 bits. Undo a normalisation that was really done, and 256 levels appear; undo
  one that was not, and nothing does. Without levels, because the image was resized in floating
  point, the range still tells the gross mistakes.
- Red and blue swapped: invisible in the numbers. The model itself is asked: is it surer of its
  answer with the two exchanged? One image tells little, several tell much, so evidence adds up.
- Outputs: probabilities where logits were promised, and probabilities of probabilities.

Arrays and facts go in, findings come out; nothing here knows of guests. `edgelab.wasinn.WasiNN`
calls it.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgelab.wasinn.backends import Graph, TensorInfo

Floats: TypeAlias = "tuple[float, ...]"

MAX_EVIDENCE = 256
"""Images of one context that count for the question whether colours are swapped."""

# Where right and wrong images part; measured on rendered signs and on photos, see the tests.
_ROWS = 32  # sampled rows; the statistics don't gain from more
_COLUMNS = 512
_MIN_SIDE = 32  # pixels; smaller images have too few neighbours
_INTERLEAVED = 1.4  # right images stay below 1.25 (photos in black dots), wrong ones above 1.5
_PLANAR = 0.8  # right images stay above 1.5, but for black dots; nearly all wrong ones below
_SURER = 3.0  # log-odds; divided by the root of the number of images
_LEVELS = 16  # fewer grey levels prove no grid
_MIN_CLASSES = 10  # with fewer, an unsure model looks like a double softmax


class LikelyMistake(UserWarning):
    """A guest probably feeds its model wrongly; `edgelab.wasinn.WasiNN.explain` says more."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One likely mistake.

    Attributes
    ----------
    kind : str
        ``"shape"``, ``"dtype"``, ``"not finite"``, ``"blank"``, ``"layout"``, ``"range"``,
        ``"normalisation"``, ``"color"``, ``"probabilities"`` or ``"double softmax"``.
    certainty : {"certain", "likely"}
        Certain: right inputs can't look like this. Likely: they hardly ever do.
    text : str
        What was seen, and what the model wants.
    cure : str
        What to change.
    """

    kind: str
    certainty: Literal["certain", "likely"]
    text: str
    cure: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.certainty}): {self.text}. {self.cure}."


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a model's metadata says about its image and its answer.

    Attributes
    ----------
    layout : str
        ``"NCHW"`` or ``"NHWC"``.
    color : str
        ``"RGB"`` or ``"BGR"``.
    mean, std : tuple of float or None
        Per channel, for pixels scaled to 0 … 1. None if the metadata does not say.
    output : str or None
        ``"logits"``, ``"probabilities"``, or None if the metadata does not say.
    """

    layout: str = "NCHW"
    color: str = "RGB"
    mean: Floats | None = None
    std: Floats | None = None
    output: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Expectation | None:
        """Read what there is; a value that makes no sense counts as unsaid.

        Returns
        -------
        Expectation or None
            None if neither the normalisation nor the layout is known: perhaps no image model.
        """
        mean, std = _constants(metadata.get("mean")), _constants(metadata.get("std"))
        # For pixels in 0 … 1, as the keys are defined here. Other tools use them for 0 … 255.
        if not (mean and std and len(mean) == len(std) and all(0 <= m <= 1 for m in mean)
                and all(1e-6 <= s <= 1 for s in std)):  # fmt: skip
            mean = std = None
        layout, color = metadata.get("layout", "NCHW"), metadata.get("color", "RGB")
        if layout not in ("NCHW", "NHWC") or (mean is None and "layout" not in metadata):
            return None
        output = metadata.get("output")
        return cls(
            layout,
            "BGR" if color == "BGR" else "RGB",
            mean,
            std,
            output if output in ("logits", "probabilities") else None,
        )

    @property
    def channels(self) -> int:
        """Number of channels: as many as there are constants, else 3."""
        return len(self.mean) if self.mean else 3


def _constants(text: str | None) -> Floats | None:
    try:
        values = json.loads(text) if text is not None and len(text) <= 1000 else None
        numbers = tuple(float(v) for v in values) if isinstance(values, list) else ()
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return numbers if 1 <= len(numbers) <= 4 and all(map(math.isfinite, numbers)) else None


# --- tensors that do not fit ----------------------------------------------------------------------

# Of four axes, the usual mistakes first.
_ORDERS = sorted(
    itertools.permutations(range(4)), key=lambda a: a[1:] not in ((3, 1, 2), (2, 3, 1))
)


def check_fit(
    info: TensorInfo, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Finding, ...]:
    """Say why a tensor does not fit an input; nothing if it does.

    Parameters
    ----------
    info : TensorInfo
        What the model wants.
    shape : tuple of int
    dtype : numpy.dtype
        What it got.
    """
    findings = []
    if info.dtype is None or dtype != info.dtype:  # NumPy takes None for float64
        cure = f"Convert it to {info.dtype}"
        if dtype == np.uint8 and info.dtype is not None and info.dtype.kind == "f":
            cure += ", and scale and normalise the pixels: a cast alone is not enough"
        text = f"input {info.name!r} is {info.dtype}, the tensor is {dtype}"
        findings.append(Finding("dtype", "certain", text, cure))
    if not info.accepts(shape):
        text, cure = _misshape(info, shape)
        findings.append(
            Finding(
                "shape",
                "certain",
                f"input {info.name!r} has shape {list(info.shape)}, the tensor {list(shape)}: "
                f"{text}",
                cure,
            )
        )
    return tuple(findings)


def _misshape(info: TensorInfo, shape: tuple[int, ...]) -> tuple[str, str]:
    """Name the difference between two shapes, and its cure."""
    want = info.shape
    texts, cures = [], []
    if len(shape) == len(want) - 1:
        shape = (1, *shape)
        texts.append("the batch dimension is missing")
        cures.append("Add it: x[None]")
        if info.accepts(shape):
            return texts[0], cures[0]
    if len(shape) != len(want):
        fixed = math.prod(d for d in want if isinstance(d, int))
        if math.prod(shape) % max(fixed, 1) or not shape:
            text = f"{len(shape)} dimension(s) where {len(want)} are wanted"
        else:
            text = "the number of elements may be right, the dimensions are not"
        return text, "Pass the dimensions that the model declares, with the data in their order"
    if len(want) == 4:
        for axes in _ORDERS:
            if info.accepts(tuple(shape[a] for a in axes)):
                texts.append(_orders(want, axes))
                cures.append(
                    f"Transpose the data, x.transpose{axes}, and make them contiguous; a reshape "
                    "would only hide the mistake"
                )
                return ", and ".join(texts), ". ".join(cures)
    wrong = [k for k, d in enumerate(want) if isinstance(d, int) and d != shape[k]]
    texts += [f"{shape[k]} where {want[k]} is wanted" for k in wrong]
    if len(wrong) == 1 and want[wrong[0]] == 3 and shape[wrong[0]] in (1, 4):
        cures.append("Convert the image to three channels, RGB, without alpha")
    elif wrong == [0] and len(want) > 1:
        cures.append(f"The model takes a batch of {want[0]}")
    else:
        cures.append("Resize or crop to the size that the model wants")
    return ", ".join(texts), ". ".join(cures)


def _orders(want: tuple[int | str | None, ...], axes: tuple[int, ...]) -> str:
    """Name two orders of axes, where ``transpose(axes)`` leads from the one to the other."""
    letters = next((x for x, at in (("NCHW", 1), ("NHWC", 3)) if want[at] in (1, 3, 4)), None)
    if letters is None:
        return "the dimensions are in another order"
    given = "".join(letters[axes.index(k)] for k in range(4))
    return f"the data are {given}, the model wants {letters}"


# --- values and layout ----------------------------------------------------------------------------

Repair: TypeAlias = "Callable[[NDArray[Any]], NDArray[Any]]"


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A way in which pixels became values: ``(pixel / 255 - mean) / std``."""

    kind: str
    text: str
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def pixels(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Undo it, for ``(channels, …)``."""
        shape = (-1, *(1,) * (values.ndim - 1))
        undone: NDArray[np.float64] = (
            values * self.std.reshape(shape) + self.mean.reshape(shape)
        ) * 255
        return undone

    def on_grid(self, values: NDArray[np.float64], epsilon: float) -> bool:
        """Tell whether undoing it gives 8-bit pixels. `epsilon` is that of the tensor's type."""
        rounding = 255 * float((self.std * np.abs(values).max(-1)).max()) * 8 * epsilon
        if rounding > 0.1:
            return False  # the type is too coarse to tell levels
        pixels = self.pixels(values)
        levels = np.rint(pixels)
        hits = (np.abs(pixels - levels) <= 0.02 + rounding) & (levels >= 0) & (levels <= 255)
        return bool(hits.mean() >= 0.99)


def _recipes(mean: NDArray[np.float64], std: NDArray[np.float64]) -> list[_Recipe]:
    """The usual ways to get it wrong, simplest first."""
    one, none = np.ones_like(std), np.zeros_like(mean)
    unscaled = "the division by 255 is missing"
    recipes = [
        _Recipe("range", "plain pixels, 0 to 255", none, one / 255),
        _Recipe("normalisation", "pixels / 255, without mean and std", none, one),
        _Recipe("normalisation", "pixels scaled to -1 … 1", one / 2, one / 2),
        _Recipe(
            "range", f"mean and std were applied to 0 … 255: {unscaled}", mean / 255, std / 255
        ),
        _Recipe("range", f"255 * mean was subtracted, no more: {unscaled}", mean, one / 255),
        _Recipe("range", f"255 * mean subtracted, but divided by std: {unscaled}", mean, std / 255),
        _Recipe("normalisation", "the mean was subtracted, but not divided by std", mean, one),
        _Recipe("normalisation", "divided by std, but the mean was not subtracted", none, std),
        _Recipe("color", "mean and std of red and of blue are exchanged", mean[::-1], std[::-1]),
        _Recipe("normalisation", "normalised twice", mean + mean * std, std * std),
        _Recipe("range", "divided by 255 twice", mean * 255, std * 255),
        _Recipe("range", "divided by 255 twice, without mean and std", none, one * 255),
    ]
    if len(mean) == 3:
        imagenet = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        recipes.append(_Recipe("normalisation", "ImageNet's mean and std were used", *imagenet))
    return [r for r in recipes if max(*abs(r.mean - mean), *abs(r.std - std)) > 1e-6]


@dataclass(frozen=True, slots=True)
class _Suspicion:
    finding: Finding
    repair: Repair | None = None


def check_input(tensor: NDArray[Any], wants: Expectation) -> tuple[Finding, ...] | None:
    """Look at an image for a fraction of a millisecond.

    Parameters
    ----------
    tensor : numpy.ndarray
        What the guest passed, with a batch dimension or without. Only the first image is looked at,
        and of that, sampled rows.
    wants : Expectation

    Returns
    -------
    tuple of Finding or None
        None if there is nothing to see, as in an image of one colour (a warm-up, perhaps): look at
        the next one.

    Notes
    -----
    Not to be seen this way: red and blue swapped before a normalisation in place (see `ask`); other
    constants than the model's, if the image was resized in floating point; rows and columns
    exchanged. A false alarm about the layout needs a picture whose rows repeat every three pixels.
    """
    suspicions = _suspicions(tensor, wants)
    return None if suspicions is None else tuple(s.finding for s in suspicions)


def _suspicions(tensor: NDArray[Any], wants: Expectation) -> list[_Suspicion] | None:
    image = _first_image(tensor, wants)
    if image is None:
        return []
    with np.errstate(all="ignore"):  # hostile numbers
        values = _sample(image)
        if not np.isfinite(values).all():
            return [
                _Suspicion(
                    Finding(
                        "not finite",
                        "certain",
                        "the image holds NaN or infinite values",
                        "Look for a division by zero, or for a buffer that was not filled",
                    )
                )
            ]
        if (values.max((1, 2)) == values.min((1, 2))).all():
            return None
        suspicions = []
        if layout := _layout(tensor, image, wants):
            suspicions.append(layout)
            assert layout.repair is not None
            image = _first_image(layout.repair(tensor), wants)
            assert image is not None
            values = _sample(image)
        if wants.mean is not None and tensor.dtype.kind == "f":
            epsilon = float(np.finfo(tensor.dtype).eps)
            suspicions += _values(values, epsilon, wants)
    return suspicions


def _first_image(tensor: NDArray[Any], wants: Expectation) -> NDArray[Any] | None:
    """View the first image as ``(channels, height, width)``; None if the tensor holds no image."""
    if tensor.ndim not in (3, 4) or not tensor.size:
        return None
    image = tensor[0] if tensor.ndim == 4 else tensor
    if wants.layout == "NHWC":
        image = image.transpose(2, 0, 1)
    return image if len(image) == wants.channels and min(image.shape[1:]) >= 2 else None


def _sample(image: NDArray[Any]) -> NDArray[np.float32]:
    """Copy some rows of each channel: ``(channels, rows, columns)``."""
    rows = np.linspace(0, image.shape[1] - 1, min(_ROWS, image.shape[1])).astype(int)
    left = max(0, (image.shape[2] - _COLUMNS) // 2)
    return image[:, rows, left : left + _COLUMNS].astype(np.float32)


def _layout(tensor: NDArray[Any], image: NDArray[Any], wants: Expectation) -> _Suspicion | None:
    """Compare rows that lie one, two and three widths apart in memory."""
    channels, height, width = image.shape
    if channels != 3 or min(height, width) < _MIN_SIDE:
        return None
    rows = (tensor[0] if tensor.ndim == 4 else tensor).reshape(3 * height, width)
    places = np.linspace(0, 3 * height - 4, _ROWS).astype(int)
    base, *others = (
        rows[(places + k) % len(rows), :_COLUMNS].astype(np.float32)
        for k in (0, 1, 2, 3, len(rows) // 2)
    )
    one, two, three, far = (float(np.abs(other - base).mean()) for other in others)
    if wants.layout == "NCHW" and min(one, two) > _INTERLEAVED * three:
        seen, declared, axes = "pixel by pixel (HWC)", "as planes (CHW)", (0, 3, 1, 2)
        lie, source, target = (height, width, 3), -1, -3
    # (Neighbouring rows of black dots are less alike than distant ones.)
    elif wants.layout == "NHWC" and one < _PLANAR * three and three < far:
        seen, declared, axes = "as planes (CHW)", "pixel by pixel (HWC)", (0, 2, 3, 1)
        lie, source, target = (3, height, width), -3, -1
    else:
        return None
    return _Suspicion(
        Finding(
            "layout",
            "likely",
            f"the values lie {seen}, under a shape that says {declared}, as the model wants. (Rows "
            f"one, two and three widths apart differ by {one:.2g}, {two:.2g} and {three:.2g})",
            f"Move the data, don't just name other dimensions: x.transpose{axes}, made contiguous",
        ),
        lambda x: np.moveaxis(x.reshape(*x.shape[:-3], *lie), source, target),
    )


def _values(values: NDArray[np.float32], epsilon: float, wants: Expectation) -> list[_Suspicion]:
    """Find out how the pixels became values; ``(channels, rows, columns)``, not constant."""
    mean, std = np.array(wants.mean), np.array(wants.std)
    low, high = (0 - mean) / std, (1 - mean) / std
    right = _Recipe("", "", mean, std)
    unknown = _Recipe("range", "no pixel becomes that", mean, std)
    flat = values.reshape(len(values), -1)
    few = flat[:, :: max(1, flat.shape[1] // 512)].astype(np.float64)
    if right.on_grid(few, epsilon):
        return []

    def suspect(recipe: _Recipe, certainty: Literal["certain", "likely"], how: str) -> _Suspicion:
        cure = f"Compute {_formula(wants)} once, in float, from pixels 0 … 255 in {wants.color}"
        if recipe.kind == "color":
            cure = (
                f"Bring the channels into the order {wants.color}; if they have it, bring mean and "
                "std into it"
            )
        return _Suspicion(
            Finding(
                recipe.kind,
                certainty,
                f"values go from {values.min():.4g} to {values.max():.4g}: {recipe.text} ({how}). "
                f"The model wants {_formula(wants)}, {low.min():.3g} to {high.max():.3g}",
                cure,
            ),
            None if recipe is unknown else _renormalise(recipe, right, wants),
        )

    recipes = _recipes(mean, std)
    for recipe in recipes:
        if recipe.on_grid(few, epsilon) and np.ptp(recipe.pixels(few), axis=1).max() >= _LEVELS:
            return [suspect(recipe, "certain", "undoing that gives whole pixel values")]

    # No levels: the image was resized in floating point, or the type is coarse. Interpolation goes
    # beyond the range of pixels by a quarter at most.
    pixels = right.pixels(few)
    beyond = ((pixels < -64) | (pixels > 319)).mean() > 0.01
    if beyond or np.ptp(pixels) < 2:
        fitting = [(64.0, unknown)] if beyond else []
        for recipe in recipes:
            undone = recipe.pixels(few)
            if recipe.kind != "color" and ((undone >= -64) & (undone <= 319)).mean() >= 0.99:
                fitting.append((float(np.ptp(undone)), recipe))
        span, best = max(fitting, key=lambda pair: pair[0], default=(0.0, unknown))
        if span >= 64:
            gross = ((pixels < -255) | (pixels > 510)).mean() > 0.01
            return [suspect(best, "certain" if gross else "likely", "judged by the range")]
    smooth = np.abs(np.diff(values, axis=2)).mean() < 0.8 * flat.std(1).mean()  # noise has > 1.1
    # A right image would have no pixel darker than 109 or brighter than 195, for ImageNet's values.
    unsigned = few.min() > -0.25 and few.max() < 1.25 and np.ptp(few) > 0.6
    if smooth and unsigned and (low < -0.5).all() and (high > 1.5).all():
        plain = next(r for r in recipes if not r.mean.any() and (r.std == 1).all())
        return [suspect(plain, "likely", "hardly any value is negative")]
    return []


def _formula(wants: Expectation) -> str:
    assert wants.mean is not None
    assert wants.std is not None
    if not any(wants.mean) and set(wants.std) == {1.0}:
        return "pixels / 255"
    mean, std = (", ".join(f"{v:g}" for v in vs) for vs in (wants.mean, wants.std))
    return f"(pixels / 255 - [{mean}]) / [{std}]"


def _renormalise(done: _Recipe, right: _Recipe, wants: Expectation) -> Repair:
    """Undo one recipe and do the other."""
    shape = (-1, 1, 1) if wants.layout == "NCHW" else (-1,)
    scale, shift = done.std / right.std, (done.mean - right.mean) / right.std

    def repair(tensor: NDArray[Any]) -> NDArray[Any]:
        return (tensor * scale.reshape(shape) + shift.reshape(shape)).astype(tensor.dtype)

    return repair


def swap_colors(tensor: NDArray[Any], wants: Expectation) -> NDArray[Any]:
    """Exchange the first and the last channel as they were before the normalisation.

    Parameters
    ----------
    tensor : numpy.ndarray
        Normalised image or images, in the layout that `wants` says.
    wants : Expectation

    Returns
    -------
    numpy.ndarray
        Same shape and dtype, a copy.
    """
    axis = -3 if wants.layout == "NCHW" else -1
    swapped = np.flip(tensor, axis)
    if wants.mean is None or tensor.dtype.kind != "f":
        return np.ascontiguousarray(swapped)
    mean, std = np.array(wants.mean), np.array(wants.std)
    backwards = _Recipe("", "", mean[::-1], std[::-1])
    return np.ascontiguousarray(_renormalise(backwards, _Recipe("", "", mean, std), wants)(swapped))


# --- outputs --------------------------------------------------------------------------------------


def is_distribution(output: NDArray[Any]) -> bool:
    """Tell whether values are probabilities: none negative, and 1 in sum along the last axis."""
    if output.dtype.kind != "f" or output.ndim < 1 or output.shape[-1] < 2 or not output.size:
        return False
    tolerance = 1e-3 if output.dtype.itemsize > 2 else 1e-2
    with np.errstate(all="ignore"):
        sums = output.sum(-1, dtype=np.float64)
        return bool(output.min() >= 0 and np.abs(sums - 1).max() <= tolerance)


def check_output(output: NDArray[Any], wants: Expectation | None) -> tuple[Finding, ...]:
    """Look at a model's answer for softmax in the wrong place.

    Parameters
    ----------
    output : numpy.ndarray
        The classes along the last axis.
    wants : Expectation or None
    """
    if not is_distribution(output):
        return ()
    findings = []
    if wants is not None and wants.output == "logits":
        findings.append(probabilities("its metadata says logits"))
    scores = output.reshape(-1, output.shape[-1])[0].astype(np.float64)
    # If these are a softmax of probabilities, then their logarithms, moved until they sum to 1, are
    # those probabilities again: none is negative.
    if scores.size >= _MIN_CLASSES and scores.max() >= 1.02 * scores.min() > 0:
        logs = np.log(scores)
        inner = logs + (1 - logs.sum()) / scores.size
        if inner.min() >= -8 * float(np.finfo(output.dtype).eps):
            findings.append(
                Finding(
                    "double softmax",
                    "likely",
                    f"all {scores.size} outputs lie within {scores.min():.3g} … "
                    f"{scores.max():.3g}: a softmax of probabilities (the best class has "
                    f"{inner.max():.1%} before the last one)",
                    "Remove one of the two softmax layers",
                )
            )
    return tuple(findings)


def probabilities(why: str) -> Finding:
    """The finding that softmax would be applied to what is probabilities already."""
    return Finding(
        "probabilities",
        "certain",
        "the model's outputs are probabilities already (none negative, 1 in sum), but "
        f"{why}; softmax applied again flattens them",
        "Use the outputs as they are, or remove the softmax from the model",
    )


# --- asking the model -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What the model says about the last input, as it is or changed.

    Attributes
    ----------
    change : str
    label : str
        The best class of the first image.
    probability : float
        0 … 1.
    """

    change: str
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What `ask` got to know.

    Attributes
    ----------
    what_ifs : tuple of WhatIf
        Empty if the model's output is not one score for each class.
    findings : tuple of Finding
        What `check_input` finds, and swapped colours, if the model is much surer with them the
        other way round.
    odds : float
        By which factor the odds of the best class rise when red and blue are exchanged; geometric
        mean over all the evidence.
    """

    what_ifs: tuple[WhatIf, ...]
    findings: tuple[Finding, ...] = ()
    odds: float = 1.0


def ask(
    run: Callable[[NDArray[Any]], NDArray[Any]],
    tensor: NDArray[Any],
    wants: Expectation,
    evidence: MutableMapping[int, float] | None = None,
    labels: Sequence[str] = (),
) -> Answers:
    """Ask the model about its input as it is, with the mistakes cured, and with colours swapped.

    Parameters
    ----------
    run : callable
        Takes a tensor, returns the model's scores.
    tensor : numpy.ndarray
    wants : Expectation
    evidence : mutable mapping of int to float, optional
        What earlier images told about colours: checksum → rise in log-odds. This one is added; the
        same image counts once.
    labels : sequence of str, optional
    """
    evidence = {} if evidence is None else evidence
    what_ifs: list[WhatIf] = []

    def tell(change: str, x: NDArray[Any]) -> NDArray[np.float64] | None:
        scores = _probabilities(run(np.ascontiguousarray(x)), len(x) if x.ndim == 4 else 1)
        if scores is not None:
            best = int(scores[0].argmax())
            label = labels[best] if best < len(labels) else f"class {best}"
            what_ifs.append(WhatIf(change, label, float(scores[0, best])))
        return scores

    if _first_image(tensor, wants) is None:
        return Answers(())
    suspicions = _suspicions(tensor, wants)
    if suspicions is None:
        return Answers((), (_BLANK,))
    findings = tuple(s.finding for s in suspicions)
    base = tell("as it is", tensor)
    if base is None or any(s.repair is None for s in suspicions):
        return Answers(tuple(what_ifs), findings)
    for suspicion in suspicions:
        assert suspicion.repair is not None
        tensor = suspicion.repair(tensor)
    if suspicions:
        base = tell("cured: " + ", ".join(f.kind for f in findings), tensor)
    if base is None or wants.channels != 3:
        return Answers(tuple(what_ifs), findings)
    swapped = tell("red and blue exchanged", swap_colors(tensor, wants))
    if swapped is None:
        return Answers(tuple(what_ifs), findings)
    images = tensor if tensor.ndim == 4 else tensor[None]
    for image, rise in zip(images, _log_odds(swapped) - _log_odds(base), strict=True):
        if len(evidence) < MAX_EVIDENCE:
            evidence[zlib.crc32(image.tobytes())] = float(rise)
    mean = sum(evidence.values()) / len(evidence)
    odds = math.exp(mean)
    if mean <= _SURER / math.sqrt(len(evidence)):
        return Answers(tuple(what_ifs), findings, odds)
    found = Finding(
        "color",
        "likely",
        f"with red and blue exchanged, the model is surer of its answer: {odds:.3g} times the odds "
        f"({len(evidence)} image(s) asked). The pixels seem to be {wants.color[::-1]}, the model "
        f"wants {wants.color}",
        "Exchange the first and the last channel before the normalisation: pixels[..., ::-1]",
    )
    return Answers(tuple(what_ifs), (*findings, found), odds)


_BLANK = Finding(
    "blank",
    "likely",
    "each channel holds one single value, so there is nothing to see",
    "Fill the buffer before set_input; for a warm-up, all is well",
)


def _probabilities(output: NDArray[Any], images: int) -> NDArray[np.float64] | None:
    """Return ``(images, classes)``; None if the output is not one score for each class."""
    classes, rest = divmod(output.size, images)
    if output.dtype.kind != "f" or rest or classes < 2 or classes not in output.shape:
        return None
    scores = output.reshape(images, classes).astype(np.float64)
    if not np.isfinite(scores).all():
        return None
    if is_distribution(scores):
        return scores
    raised = np.exp(scores - scores.max(1, keepdims=True))
    result: NDArray[np.float64] = raised / raised.sum(1, keepdims=True)
    return result


def _log_odds(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    best = probability.max(1).clip(1e-9, 1 - 1e-9)
    odds: NDArray[np.float64] = np.log(best / (1 - best))
    return odds


# --- all of it, for a reader ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor that went in or came out.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
    channels : tuple of (min, mean, max)
        One for each channel of an image; else one for the whole tensor, none if it was refused.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    channels: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a model wants, what it got last, and what is likely wrong with that.

    Attributes
    ----------
    model : str
    inputs, outputs : tuple of TensorInfo
        As the model declares them.
    wants : Expectation or None
        What its metadata says; None if nothing.
    seen : tuple of Seen
        The last inputs, then the last outputs if there are any.
    what_ifs : tuple of WhatIf
        What the model says to the input as it is, with the mistakes cured, and with red and blue
        exchanged.
    findings : tuple of Finding
        Likely mistakes; empty if nothing looks wrong.
    notes : tuple of str
        What was not checked, and why.
    """

    model: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    wants: Expectation | None
    seen: tuple[Seen, ...]
    what_ifs: tuple[WhatIf, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON (a value of a tensor may be NaN)."""
        data = asdict(self)
        for info in (*data["inputs"], *data["outputs"]):
            info["dtype"] = str(info["dtype"])
        return data

    def _tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """(title, rows) of what is to be shown before the findings."""
        declared = [
            (kind, _printable(info.name), str(info.dtype), _shape(info.shape))
            for kind, infos in (("input", self.inputs), ("output", self.outputs))
            for info in infos
        ]
        wants = []
        if self.wants is not None:
            wants = [("layout", self.wants.layout), ("color", self.wants.color)]
            if self.wants.mean is not None:
                wants.append(("values", _formula(self.wants)))
            wants.append(("output", self.wants.output or "not said"))
        seen = []
        for tensor in self.seen:
            letters = self.wants.color if self.wants and len(tensor.channels) == 3 else "    "
            for letter, values in zip(letters, tensor.channels, strict=False):
                what = tensor.name, letter, tensor.dtype, _shape(tensor.shape)
                seen.append((*what, *(f"{value:.4g}" for value in values)))
        asked = [(w.change, w.label, f"{w.probability:.1%}") for w in self.what_ifs]
        tables: list[tuple[str, list[tuple[str, ...]]]] = [
            ("declared", [*declared]),
            ("wanted by the metadata", [*wants]),
            ("seen last (min, mean, max)", [*seen]),
            ("what if", [*asked]),
        ]
        return [(title, rows) for title, rows in tables if rows]

    def __str__(self) -> str:
        lines = [f"model {self.model}"]
        for title, rows in self._tables():
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines.append(f"{title}:")
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("findings:" if self.findings else "findings: none")
        lines += [f"  {finding}" for finding in self.findings]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def table(title: str, rows: Sequence[Sequence[str]]) -> str:
            cells = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            return f"<table><caption>{escape(title)}</caption>{cells}</table>"

        findings = [(f.kind, f.certainty, f"{f.text}. {f.cure}.") for f in self.findings]
        parts = [f"<p>model <b>{escape(self.model)}</b></p>"]
        parts += [table(title, rows) for title, rows in self._tables()]
        parts.append(table("findings", findings or [("none",)]))
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        return "".join(parts)


def explain(
    graph: Graph,
    inputs: Mapping[int, NDArray[Any]],
    output: NDArray[Any] | None = None,
    refused: tuple[int, tuple[int, ...], np.dtype[Any]] | None = None,
    evidence: MutableMapping[int, float] | None = None,
) -> Explanation:
    """Explain what a model got and gave.

    Parameters
    ----------
    graph : Graph
        It runs up to four times, in contexts of its own.
    inputs : mapping of int to numpy.ndarray
        What was set last, by input.
    output : numpy.ndarray, optional
        Output 0 that the model gave to these inputs.
    refused : (int, tuple of int, numpy.dtype), optional
        Input, shape and type of a tensor that did not fit: then only this is explained.
    evidence : mutable mapping, optional
        See `ask`.
    """
    wants = Expectation.from_metadata(graph.metadata)
    seen = [_seen(graph.inputs[k].name, x, wants) for k, x in sorted(inputs.items())]
    if refused is not None:
        index, shape, dtype = refused
        seen, output = [Seen(_printable(graph.inputs[index].name), shape, str(dtype), ())], None
    if output is not None:
        seen.append(_seen(graph.outputs[0].name, output, None))
    findings: list[Finding] = []
    notes: list[str] = []
    what_ifs: tuple[WhatIf, ...] = ()
    if refused is not None:
        findings += check_fit(graph.inputs[index], shape, dtype)
        notes.append("The tensor was refused; what is in it was not looked at.")
    elif wants is None:
        notes.append(_NO_FACTS)
    elif 0 not in inputs:
        notes.append("No input is set.")
    elif len(graph.inputs) != 1 or _first_image(inputs[0], wants) is None:
        notes.append(
            "The input is not one image as the metadata says; its values were not checked."
        )
    else:
        what_ifs = _explain_image(graph, inputs[0], output, wants, evidence, findings, notes)
    if output is not None:
        found = check_output(output, wants)
        findings += found
        if is_distribution(output) and not found:
            notes.append(
                "The outputs are probabilities already: a guest that applies softmax again "
                "flattens them."
            )
    return Explanation(
        _printable(graph.metadata.get("name", "")) or "without a name",
        graph.inputs,
        graph.outputs,
        wants,
        tuple(seen),
        what_ifs,
        tuple(findings),
        tuple(notes),
    )


_NO_FACTS = (
    "The model's metadata says nothing about its image, so layout, values and colours were not "
    "checked. Add the keys of models/README.md to the file, or to the loaded model: "
    "host.graph(name).metadata.update(...)."
)


def _explain_image(
    graph: Graph,
    tensor: NDArray[Any],
    output: NDArray[Any] | None,
    wants: Expectation,
    evidence: MutableMapping[int, float] | None,
    findings: list[Finding],
    notes: list[str],
) -> tuple[WhatIf, ...]:
    """The part of `explain` for a model with one image as its input."""

    def run(x: NDArray[Any]) -> NDArray[Any]:
        context = graph.context()
        context.bind_input(0, x.ctypes.data, x.shape, x.dtype)
        context.compute()
        return np.array(context.output(0))

    # The guest may have reused the buffer since; then what is in it may be no image at all.
    again = run(tensor)
    if output is not None and not (
        again.shape == output.shape
        and (output.dtype.kind != "f" or np.allclose(again, output, 1e-3, 1e-3, equal_nan=True))
    ):
        notes.append(
            "The tensor was changed or set anew since the last compute, so it was not checked. "
            "Explain right after a compute."
        )
        return ()
    if wants.mean is None or tensor.dtype.kind != "f":
        notes.append("The range was not checked: it needs mean and std, and a float tensor.")
    evidence = {} if evidence is None else evidence
    answers = ask(run, tensor, wants, evidence, _labels(graph.metadata.get("labels", "")))
    findings += answers.findings
    if evidence and answers.odds <= math.exp(_SURER / math.sqrt(len(evidence))):
        notes.append(
            f"Red and blue: exchanged, the model's odds are {answers.odds:.2g} times as high "
            f"({len(evidence)} image(s)); a mistake is reported above "
            f"{math.exp(_SURER / math.sqrt(len(evidence))):.2g}. One image tells little: explain "
            "more of them, the evidence adds up."
        )
    return answers.what_ifs


def _seen(name: str, tensor: NDArray[Any], wants: Expectation | None) -> Seen:
    image = _first_image(tensor, wants) if wants is not None else None
    with np.errstate(all="ignore"):
        channels = tuple(
            (float(c.min()), float(c.mean(dtype=np.float64)), float(c.max()))
            for c in ([tensor] if image is None else image)
            if c.size and c.dtype.kind in "biuf"
        )
    return Seen(_printable(name), tensor.shape, str(tensor.dtype), channels)


def _labels(text: str) -> tuple[str, ...]:
    try:
        labels = json.loads(text) if len(text) <= 1 << 20 else ()
    except (ValueError, RecursionError):
        return ()
    return tuple(_printable(str(label)) for label in labels) if isinstance(labels, list) else ()


def _printable(text: str) -> str:
    """Text from a model, safe for a terminal."""
    return "".join(c for c in text[:80] if c.isprintable())


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if d is None else _printable(str(d)) for d in shape) + "]"
