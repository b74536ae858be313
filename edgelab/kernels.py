"""The kernels that prepare a picture, against each other: Wasm, native code, NumPy and the usual
libraries, on one photo, in the same rounds.

`kernel_table` times one step, `waterfall` all of them. The crate ``guest/study`` has the kernels
of the guests with a number of repeats: so a time is the kernel's, and what a call costs is
a number of its own. It is built on demand (`edgelab.build.RECIPES`). Without a Rust, the shipped
guest takes its place where it can, and the table says what is missing and why.

``python -m edgelab.kernels`` prints both.

Notes
-----
All rows run on one thread and on the same data again and again, which then lie in the CPU's caches:
the best case for each of them, and the same one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab import images, preprocess
from edgelab.build import guest_path
from edgelab.classify import KERNELS, PARAMS
from edgelab.errors import EdgelabError, one_line
from edgelab.inspection import Inspection, inspect
from edgelab.measure import (
    Comparison,
    Ratio,
    Summary,
    compare,
    duration,
    html_table,
    ratio,
    row_named,
    text_table,
)
from edgelab.models import Spec, example_image
from edgelab.runtime import Guest, Instance

STEPS = ("normalize", "resize", "preprocess")
"""What can be timed: the article's step; the step before it; and both, as a pipeline has them."""

IMAGENET = Spec(
    "imagenet", "1", ("-",), 256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)  # fmt: skip
"""Shorter side to 256, crop of 224: what most classifiers take, and the embedded model."""

BASELINE = "simd128"
"""The row that the others are compared with."""

# In one call: short kernels run more often, so that the call itself does not count.
_REPEATS = {"normalize": 16, "resize": 2, "preprocess": 2}


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One implementation of a step.

    Attributes
    ----------
    name : str
    summary : Summary
        Time of one run, without the call into Wasm or into the library.
    ratio : Ratio
        Its time over that of the baseline.
    fuel : int or None
        Instructions that one run executes in Wasm, as wasmtime counts them: the same on every
        machine. None outside of Wasm.
    instructions, simd, relaxed_simd : int or None
        In the code of its inner loops: all, those on vectors, and those of them that are relaxed.
    error : float or None
        Largest difference from `edgelab.preprocess`; of the resize, in levels of 255.
    """

    name: str
    summary: Summary
    ratio: Ratio
    fuel: int | None
    instructions: int | None
    simd: int | None
    relaxed_simd: int | None
    error: float | None


@dataclass(frozen=True, slots=True)
class Goal:
    """What a ratio was to be.

    Attributes
    ----------
    what : str
    ratio : Ratio
    bound : float
    at_least : bool
        Whether the ratio has to reach the bound, or to stay within it.
    """

    what: str
    ratio: Ratio
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        """Return ``met``, ``missed``, or ``open`` if the bound lies in the interval."""
        if self.ratio.low <= self.bound <= self.ratio.high:
            return "open"
        return "met" if (self.ratio.low > self.bound) == self.at_least else "missed"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.what}: {self.ratio}, goal {sign} {self.bound:g}: {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class KernelTable:
    """One step, as everybody does it.

    Attributes
    ----------
    step : str
        One of `STEPS`.
    width, height, resize, crop : int
        Of the photo, of its shorter side after the resize, and of the crop, in pixels.
    touched_bytes : int
        What the step reads and writes at least; the row ``memcpy`` copies as much.
    rows : tuple of KernelRow
    missing : dict of str to str
        Row → why it is not there.
    entry_us : dict of str to float
        What a call costs before anything is done, in microseconds, by machine.
    comparison : Comparison
        The measurement behind it.
    """

    step: str
    width: int
    height: int
    resize: int
    crop: int
    touched_bytes: int
    rows: tuple[KernelRow, ...]
    missing: dict[str, str]
    entry_us: dict[str, float]
    comparison: Comparison

    def __getitem__(self, name: str) -> KernelRow:
        return row_named(self.rows, name)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    def ratio(self, name: str, other: str) -> Ratio:
        """Return the time of one row over that of another, paired by round."""
        samples = self.comparison.samples_ms
        return ratio(samples[self[name].name], samples[self[other].name])

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What this project wants of the normalisation, and what it got."""
        wanted = [
            ("scalar", BASELINE, 5.0, True),
            ("autovectorised", BASELINE, 5.0, True),
            ("NumPy", BASELINE, 12.0, True),
            (BASELINE, "native SSE4.1", 1.3, False),
            (BASELINE, "memcpy", 2.0, False),
        ]
        if self.step != "normalize":
            return ()
        return tuple(
            Goal(f"{a} / {b}", self.ratio(a, b), bound, at_least)
            for a, b, bound, at_least in wanted
            if a in self and b in self
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        names = ("step", "width", "height", "resize", "crop", "touched_bytes", "missing")
        return {
            **{name: getattr(self, name) for name in names},
            "entry_us": dict(self.entry_us),
            "rows": [
                {**asdict(row), "ratio": row.ratio.to_dict()} for row in self.rows
            ],
            "goals": [goal.to_dict() for goal in self.goals],
            "comparison": self.comparison.to_dict(),
        }  # fmt: skip

    _COLUMNS = (
        "", "median", "p95", f"row / {BASELINE}", "verdict", "fuel", "instructions", "SIMD",
        "difference",
    )  # fmt: skip

    def _cells(self) -> list[tuple[str, ...]]:
        def count(number: int | None) -> str:
            return "" if number is None else f"{number:,}"

        return [
            (
                row.name,
                duration(row.summary.median_ms),
                duration(row.summary.p95_ms),
                *(("1", "") if row.name == BASELINE else (str(row.ratio), row.ratio.verdict)),
                count(row.fuel),
                count(row.instructions),
                count(row.simd),
                "" if row.error is None else f"{row.error:.2g}",
            )
            for row in self.rows
        ]

    def _title(self) -> str:
        size = f"{self.width} x {self.height}"
        return {
            "normalize": f"Normalise {self.crop} x {self.crop} pixels",
            "resize": f"Resize {size} pixels to {self.resize}, crop {self.crop}",
            "preprocess": f"Resize {size} pixels to {self.resize}, crop {self.crop}, normalise",
        }[self.step]

    def _notes(self) -> list[str]:
        entry = ", ".join(f"{name} {us:.1f} µs" for name, us in self.entry_us.items())
        return [
            f"{self.comparison.rounds} paired rounds in random order, medians; in brackets 95 %",
            f"not in these times: a call ({entry})",
            "instructions, SIMD: in the inner loops' code; fuel: what one run executes",
            *map(str, self.goals),
            *_absent(self.missing),
            *(f"warning: {each}" for each in self.comparison.warnings),
        ]

    def __str__(self) -> str:
        table = text_table(self._COLUMNS, self._cells())
        return "\n".join([self._title(), "", *table, *self._notes()])

    def _repr_html_(self) -> str:
        caption = "; ".join([self._title(), *self._notes()])
        return html_table(caption, self._COLUMNS, self._cells())


@dataclass(frozen=True, slots=True)
class Waterfall:
    """Where the time goes before a model sees a picture.

    Attributes
    ----------
    width, height, resize, crop : int
        As in `KernelTable`.
    encoded_bytes : int
        Size of the picture's file.
    rows : dict of str to dict of str to Summary
        Implementation → ``decode``, ``resize``, ``normalize``, each alone; and ``preprocess``, the
        last two in one go. All decode with Pillow.
    missing : dict of str to str
        Implementation → why it is not there.
    comparison : Comparison
        The measurement behind it.
    """

    width: int
    height: int
    resize: int
    crop: int
    encoded_bytes: int
    rows: dict[str, dict[str, Summary]]
    missing: dict[str, str]
    comparison: Comparison

    def parts(self) -> dict[str, dict[str, float]]:
        """Return the medians in milliseconds, by implementation and step."""
        steps = ("decode", "resize", "normalize")
        return {
            name: {step: row[step].median_ms for step in steps} for name, row in self.rows.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        names = ("width", "height", "resize", "crop", "encoded_bytes", "missing")
        return {
            **{name: getattr(self, name) for name in names},
            "rows": {
                name: {step: summary.to_dict() for step, summary in row.items()}
                for name, row in self.rows.items()
            },
            "comparison": self.comparison.to_dict(),
        }

    _COLUMNS = ("", "decode", "resize", "normalise", "sum", "the last two at once")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                *map(duration, steps.values()),
                duration(sum(steps.values())),
                duration(self.rows[name]["preprocess"].median_ms),
            )
            for name, steps in self.parts().items()
        ]

    def _title(self) -> str:
        return (
            f"From a file of {self.encoded_bytes:,} bytes, {self.width} x {self.height} pixels, to "
            f"a tensor of 3 x {self.crop} x {self.crop}"
        )

    def _notes(self) -> list[str]:
        return [
            f"{self.comparison.rounds} paired rounds in random order, medians",
            *_absent(self.missing),
            *(f"warning: {each}" for each in self.comparison.warnings),
        ]

    def __str__(self) -> str:
        table = text_table(self._COLUMNS, self._cells())
        return "\n".join([self._title(), "", *table, *self._notes()])

    def _repr_html_(self) -> str:
        caption = "; ".join([self._title(), *self._notes()])
        return html_table(caption, self._COLUMNS, self._cells())


def kernel_table(
    image: bytes | str | Path | NDArray[np.uint8] | None = None,
    *,
    step: str = "normalize",
    spec: Spec = IMAGENET,
    repeats: int = 30,
    seed: int = 0,
) -> KernelTable:
    """Time one step in every implementation that is here.

    Parameters
    ----------
    image : bytes, str, pathlib.Path or numpy.ndarray, optional
        What `edgelab.images.decode` takes. Default: the picture that the package ships.
    step : str
        One of `STEPS`.
    spec : Spec
        Sizes, means and deviations.
    repeats : int
        Paired rounds.
    seed : int
        Seed of the rounds' order and of the bootstrap.

    Raises
    ------
    ImageError
        If the image can't be decoded.
    EdgelabError
        If a kernel fails, or the step is unknown.
    """
    if step not in STEPS:
        raise EdgelabError(f"unknown step {step!r}; there are {', '.join(STEPS)}")
    bench = _Bench(_Photo.of(image, spec))
    inner = _REPEATS[step]
    with _one_thread():
        jobs = {name: job.times(step, inner) for name, job in bench.jobs(step).items()}
        entries = {f"entry: {name}": entry for name, entry in bench.entries(step).items()}
        measured = compare({**jobs, **entries}, baseline=BASELINE, repeats=repeats, seed=seed)
        rows = tuple(
            KernelRow(
                name,
                _scaled(measured.summaries[name], inner),
                measured.ratios[name],
                *bench.counts(name, step),
                bench.jobs(step)[name].error(step),
            )
            for name in jobs
        )
    entry_us = {name: measured.summaries[f"entry: {name}"].median_ms * 1e3
                for name in bench.entries(step)}  # fmt: skip
    photo = bench.photo
    return KernelTable(
        step,
        photo.pixels.shape[1],
        photo.pixels.shape[0],
        spec.resize,
        spec.crop,
        sum(array.nbytes for array in photo.touched(step)),
        rows,
        dict(bench.missing),
        entry_us,
        _of_one_run(measured, jobs, inner),
    )


def waterfall(
    image: bytes | str | Path | None = None,
    *,
    spec: Spec = IMAGENET,
    repeats: int = 20,
    seed: int = 0,
) -> Waterfall:
    """Time every step from an encoded picture to a model's input.

    Parameters
    ----------
    image : bytes, str or pathlib.Path, optional
        An encoded image or its path. Default: the picture that the package ships.
    spec : Spec
    repeats, seed : int
        As in `kernel_table`.

    Raises
    ------
    ImageError
        If the image can't be decoded.
    """
    encoded = image if isinstance(image, bytes) else Path(image or example_image()).read_bytes()
    bench = _Bench(_Photo.of(encoded, spec))
    wanted = (
        "Pillow + NumPy", "OpenCV", "torchvision", "scalar", "autovectorised", "simd128",
        "native SSE4.1", "native AVX2",
    )  # fmt: skip
    with _one_thread():
        steps = {step: bench.jobs(step) for step in STEPS}
        # The libraries' steps have names of their own.
        alone = {"Pillow + NumPy": {"resize": "Pillow", "normalize": "NumPy"}}
        jobs: dict[str, Callable[[], Any]] = {"decode": lambda: images.decode(encoded)}
        names = [
            name
            for name in wanted
            if all(alone.get(name, {}).get(step, name) in steps[step] for step in STEPS)
        ]
        for name in names:
            for step in STEPS:
                job = steps[step][alone.get(name, {}).get(step, name)]
                jobs[f"{name}: {step}"] = job.times(step, 1)
        measured = compare(jobs, baseline=f"{BASELINE}: preprocess", repeats=repeats, seed=seed)
    summaries = measured.summaries
    rows = {
        name: {
            "decode": summaries["decode"],
            **{
                step: summaries[f"{name}: {step}"] for step in ("resize", "normalize", "preprocess")
            },
        }
        for name in names
    }
    missing = {
        name: bench.missing.get(name, "it lacks a step") for name in wanted if name not in rows
    }
    height, width = bench.photo.pixels.shape[:2]
    return Waterfall(
        width, height, spec.resize, spec.crop, len(encoded), rows, missing, measured
    )  # fmt: skip


def _absent(missing: Mapping[str, str]) -> Iterator[str]:
    """Say what is not there, with each reason once."""
    for reason in dict.fromkeys(missing.values()):
        yield f"no {', '.join(name for name in missing if missing[name] == reason)}: {reason}"


def _scaled(summary: Summary, runs: int) -> Summary:
    return replace(summary, median_ms=summary.median_ms / runs, p95_ms=summary.p95_ms / runs)


def _of_one_run(measured: Comparison, names: Iterable[str], runs: int) -> Comparison:
    """The times of one run instead of one call; the ratios are the same."""
    return replace(
        measured,
        summaries={name: _scaled(measured.summaries[name], runs) for name in names},
        ratios={name: measured.ratios[name] for name in names},
        calls={name: measured.calls[name] * runs for name in names},
        warnings=tuple(each for each in measured.warnings if not each.startswith("entry: ")),
        samples_ms={
            name: tuple(each / runs for each in measured.samples_ms[name]) for name in names
        },
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV and PyTorch use one thread, as all other rows do."""
    restore: list[Callable[[], Any]] = []
    if _importable("cv2"):
        import cv2

        before = cv2.getNumThreads()
        cv2.setNumThreads(1)
        restore.append(lambda: cv2.setNumThreads(before))
    if _importable("torchvision"):
        torch = importlib.import_module("torch")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        restore.append(lambda: torch.set_num_threads(threads))
    try:
        yield
    finally:
        for undo in restore:
            undo()


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


# --- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Photo:
    """The data that all rows work on, and what they should find."""

    pixels: NDArray[np.uint8]
    spec: Spec
    crop: NDArray[np.uint8]
    tensor: NDArray[np.float32]

    @classmethod
    def of(cls, image: bytes | str | Path | NDArray[np.uint8] | None, spec: Spec) -> _Photo:
        pixels = images.decode(example_image() if image is None else image)
        crop = _aligned(preprocess.resize_crop(pixels, spec.resize, spec.crop))
        return cls(_aligned(pixels), spec, crop, _aligned(preprocess.normalize(crop, spec)))

    def source(self, step: str) -> NDArray[np.uint8]:
        return self.crop if step == "normalize" else self.pixels

    def expected(self, step: str) -> NDArray[Any]:
        return self.crop if step == "resize" else self.tensor

    def touched(self, step: str) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.source(step), self.expected(step)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a cache line, as the kernels' own buffers do."""
    block = np.empty(array.nbytes + 64, np.uint8)
    start = -block.ctypes.data % 64
    copy: NDArray[Any] = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


class _Job:
    """One row: how to run it, and what it gives."""

    photo: _Photo

    def times(self, step: str, repeats: int) -> Callable[[], Any]:
        """Return a function that runs the step so many times."""
        raise NotImplementedError

    def result(self, step: str) -> NDArray[Any] | None:
        """Run it once; None if the result is not an image's."""
        raise NotImplementedError

    def error(self, step: str) -> float | None:
        found = self.result(step)
        if found is None:
            return None
        wanted = self.photo.expected(step)
        return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max())


class _Python(_Job):
    def __init__(self, photo: _Photo, function: Callable[[], Any], compares: bool = True) -> None:
        self.photo, self._function, self._compares = photo, function, compares

    def times(self, step: str, repeats: int) -> Callable[[], Any]:
        function = self._function
        if repeats == 1:
            return function

        def run() -> None:
            for _ in range(repeats):
                function()

        return run

    def result(self, step: str) -> NDArray[Any] | None:
        found = self._function()
        return np.asarray(found) if self._compares else None


class _Library:
    """The functions of ``guest/study``, as Wasm or as native code."""

    def __init__(self, photo: _Photo) -> None:
        spec = photo.spec
        self.photo = photo
        statistics = np.array([*spec.mean, *spec.std], np.float32)
        inputs: dict[str, NDArray[Any]] = {
            "image": photo.pixels,
            "pixels": photo.crop,
            "params": statistics,
        }
        outputs: dict[str, NDArray[Any]] = {"crop": photo.crop, "tensor": photo.tensor}
        self._at = {name: self.place(array) for name, array in inputs.items()}
        self._out = {name: self.place(np.zeros_like(array)) for name, array in outputs.items()}

    def place(self, array: NDArray[Any]) -> int:
        """Copy an array to where the functions can see it; return its address."""
        raise NotImplementedError

    def view(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError

    def function(self, name: str) -> Callable[..., int] | None:
        """Return a function, or None if there is none of this name."""
        raise NotImplementedError

    def call(self, step: str, kernel: str, repeats: int) -> Callable[[], Any] | None:
        function = self.function(f"{step}_{kernel}")
        if function is None:
            return None
        spec, (height, width) = self.photo.spec, self.photo.pixels.shape[:2]
        picture = (self._at["image"], width, height, spec.resize, spec.crop)
        arguments = {
            "normalize": (self._at["pixels"], spec.crop**2, self._at["params"]),
            "resize": picture,
            "preprocess": (*picture, self._at["params"]),
        }[step]
        last = (self._out["crop" if step == "resize" else "tensor"], repeats)
        return lambda: function(*arguments, *last)

    def output(self, step: str) -> NDArray[Any]:
        name = "crop" if step == "resize" else "tensor"
        return self.view(self._out[name], self.photo.expected(step))


class _Wasm(_Library):
    def __init__(self, photo: _Photo, wasm: Path, *, fuel: bool = False) -> None:
        self.instance: Instance = Guest(wasm, fuel=fuel).instantiate()
        super().__init__(photo)

    def place(self, array: NDArray[Any]) -> int:
        address: int = self.instance.call("alloc", array.nbytes) & 0xFFFFFFFF
        if address == 0:
            raise EdgelabError("E4: the guest has no memory for this picture; take a smaller one")
        np.copyto(self.instance.memory.array(address, array.shape, array.dtype), array)
        return address

    def view(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        return self.instance.memory.array(address, like.shape, like.dtype)

    def function(self, name: str) -> Callable[..., int] | None:
        there = name in dict(self.instance.guest.exports)
        return self.instance.function(name) if there else None

    def fuel(self, step: str, kernel: str) -> int:
        """Instructions of one run. The first run is not counted: it makes the memory grow."""
        once, never = self.call(step, kernel, 1), self.call(step, kernel, 0)
        assert once is not None
        assert never is not None
        used = []
        for call in (once, once, never):
            before = self.instance.fuel_used
            call()
            used.append(self.instance.fuel_used - before)
        return used[1] - used[2]


class _Shipped(_Wasm):
    """The guest ``classify``, which has no repeats: for those without a Rust."""

    def __init__(self, photo: _Photo, wasm: Path, *, fuel: bool = False) -> None:
        super().__init__(photo, wasm, fuel=fuel)
        spec = photo.spec
        packed = PARAMS.pack(spec.resize, spec.crop, *spec.mean, *spec.std)
        self._params = self.place(np.frombuffer(packed, np.uint8))

    def call(self, step: str, kernel: str, repeats: int) -> Callable[[], Any] | None:
        photo, spec = self.photo, self.photo.spec
        height, width = photo.pixels.shape[:2]
        if step == "resize" and kernel != "simd128":
            return None
        picture = (self._at["image"], photo.pixels.nbytes, width, height)
        tensor = (self._out["tensor"], photo.tensor.nbytes)
        name, arguments = {
            "normalize": (
                f"normalize_{kernel}",
                (self._at["pixels"], photo.crop.nbytes, self._params, *tensor),
            ),
            "resize": (
                "resize_crop",
                (*picture, spec.resize, spec.crop, self._out["crop"], photo.crop.nbytes),
            ),
            "preprocess": (
                "preprocess",
                (*picture, self._params, *tensor, KERNELS.index(kernel)),
            ),
        }[step]
        function = self.instance.function(name)

        def run() -> int:
            return max((abs(function(*arguments)) for _ in range(repeats)), default=0)

        return run


_POINTER, _SIZE, _U32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
_NATIVE_TYPES = {
    "normalize": (_POINTER, _SIZE, _POINTER, _POINTER, _U32),
    "resize": (_POINTER, _U32, _U32, _U32, _U32, _POINTER, _U32),
    "preprocess": (_POINTER, _U32, _U32, _U32, _U32, _POINTER, _POINTER, _U32),
}


class _Native(_Library):
    def __init__(self, photo: _Photo, library: Path) -> None:
        self._library = ctypes.CDLL(str(library.resolve()))
        self._arrays: dict[int, NDArray[Any]] = {}
        super().__init__(photo)

    def place(self, array: NDArray[Any]) -> int:
        copy = _aligned(array)
        self._arrays[copy.ctypes.data] = copy
        return copy.ctypes.data

    def view(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        return self._arrays[address]

    def function(self, name: str) -> Callable[..., int] | None:
        try:
            function = self._library[name]
        except AttributeError:
            return None
        function.argtypes = _NATIVE_TYPES[name.partition("_")[0]]
        function.restype = ctypes.c_int32
        return function


class _Compiled(_Job):
    """A kernel of a library."""

    def __init__(self, library: _Library, kernel: str) -> None:
        self.library, self.kernel, self.photo = library, kernel, library.photo

    def times(self, step: str, repeats: int) -> Callable[[], Any]:
        call = self.library.call(step, self.kernel, repeats)
        assert call, "asked for before"
        return call

    def result(self, step: str) -> NDArray[Any]:
        output = self.library.output(step)
        output.fill(0)  # another kernel's result may be there
        if self.times(step, 1)() != 0:
            raise EdgelabError(f"the kernel {self.kernel} refused the picture ({step})")
        return output


# Name of the row → recipe, kernel.
_WASM_ROWS = {
    "scalar": ("study", "scalar"),
    "autovectorised": ("study_vectorised", "scalar"),
    "simd128": ("study", "simd128"),
    "relaxed SIMD": ("study", "relaxed_simd"),
}
_NATIVE_ROWS = {
    "native, compiler's vectors": "scalar",
    "native SSE4.1": "sse41",
    "native AVX2": "avx2",
}


class _Bench:
    """Everything that can prepare a photo here."""

    def __init__(self, photo: _Photo) -> None:
        self.photo = photo
        self.missing: dict[str, str] = {}
        self._jobs: dict[str, dict[str, _Job]] = {}
        self._paths: dict[str, Path] = {}
        self._wasm: dict[str, _Wasm] = {}
        self._kind: type[_Wasm] = _Wasm
        for recipe in ("study", "study_vectorised"):
            self._add_wasm(recipe, recipe)
        if "study" not in self._wasm:
            self._kind = _Shipped
            self._add_wasm("study", "classify")
        self._native: _Native | None = None
        try:
            self._native = _Native(photo, guest_path("study_native").path)
        except (EdgelabError, OSError) as error:
            self._no_native = one_line(error)
        self._inspected: dict[str, Inspection] = {}

    def _add_wasm(self, recipe: str, guest: str) -> None:
        try:
            self._paths[recipe] = guest_path(guest).path
            self._wasm[recipe] = self._kind(self.photo, self._paths[recipe])
        except EdgelabError as error:
            self._paths.pop(recipe, None)
            self._why = one_line(error)

    def jobs(self, step: str) -> dict[str, _Job]:
        """Return the rows of a step, by name; those that can't be are in `missing`."""
        if step not in self._jobs:
            self._jobs[step] = self._find(step)
        return self._jobs[step]

    def _find(self, step: str) -> dict[str, _Job]:
        found: dict[str, _Job] = {}
        for name, (recipe, kernel) in _WASM_ROWS.items():
            library = self._wasm.get(recipe)
            if library is None:
                self.missing[name] = self._why
            elif library.call(step, kernel, 1) is None:
                self.missing[name] = "the shipped guest has no such export, and there is no Rust"
            else:
                found[name] = _Compiled(library, kernel)
        for name, kernel in _NATIVE_ROWS.items():
            if self._native is None:
                self.missing[name] = self._no_native
                continue
            call = self._native.call(step, kernel, 1)
            if call is None:
                self.missing[name] = f"only on x86-64, and this is {platform.machine()}"
            elif call() != 0:
                self.missing[name] = "this CPU has not these instructions"
            else:
                found[name] = _Compiled(self._native, kernel)
        found |= _python_rows(step, self.photo, self.missing)
        copies = [(array, _aligned(array)) for array in self.photo.touched(step)]

        def memcpy() -> None:
            for array, copy in copies:
                np.copyto(copy, array)

        found["memcpy"] = _Python(self.photo, memcpy, compares=False)
        return found

    def entries(self, step: str) -> dict[str, Callable[[], Any]]:
        """Return calls that do nothing, by machine."""
        found: dict[str, Callable[[], Any]] = {}
        libraries = (("Wasm", self._wasm["study"]), ("native", self._native))
        for name, library in libraries:
            if isinstance(library, _Shipped):
                found[name] = library.instance.function("last_error")
            elif library is not None and (call := library.call(step, "scalar", 0)) is not None:
                found[name] = call
        return found

    def counts(self, name: str, step: str) -> tuple[int | None, int | None, int | None, int | None]:
        """Return fuel, instructions, SIMD, relaxed SIMD of a row."""
        if name not in _WASM_ROWS:
            return None, None, None, None
        recipe, kernel = _WASM_ROWS[name]
        path = self._paths[recipe]
        fuel = self._kind(self.photo, path, fuel=True).fuel(step, kernel)
        if recipe not in self._inspected:
            self._inspected[recipe] = inspect(path)
        if self._kind is _Shipped and step != "normalize":
            return fuel, None, None, None  # one export has all kernels
        total, simd, relaxed = kernel_instructions(self._inspected[recipe], f"{step}_{kernel}")
        return fuel, None if self._kind is _Shipped else total, simd, relaxed


def kernel_instructions(module: Inspection, export: str) -> tuple[int, int, int]:
    """Count the instructions in the code of the kernels that an export reaches.

    Parameters
    ----------
    module : Inspection
        Of ``guest/study``, which keeps its functions' names; or of another guest.
    export : str

    Returns
    -------
    instructions, simd, relaxed_simd : int
        In the inner loops of ``imgproc``; in a guest without names, in all that the export reaches.

    Notes
    -----
    Why not all: once one function of a module has vectors, the compiler moves structures with
    them everywhere. Those moves say nothing about a kernel.
    """
    reached = module.reached(export)
    named = [
        f for f in reached if "imgproc::simd::" in f.name or "imgproc::kernel::Scalar" in f.name
    ]
    # What a vector kernel leaves to the scalar one, for short rows, is not its own.
    own = [f for f in named if "imgproc::simd::" in f.name] or named or list(reached)
    return (
        sum(f.instructions for f in own),
        sum(f.simd for f in own),
        sum(f.relaxed_simd for f in own),
    )


# --- the libraries --------------------------------------------------------------------------------


def normalize_in_place(
    pixels: NDArray[np.uint8], spec: Spec, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Do what `edgelab.preprocess.normalize` does as fast as NumPy can: no temporary arrays.

    Parameters
    ----------
    pixels : numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    spec : Spec
    out : numpy.ndarray
        ``float32``, ``(3, height, width)``: is written to.

    Returns
    -------
    numpy.ndarray
        `out`.
    """
    np.copyto(out, pixels.transpose(2, 0, 1))
    for plane, mean, std in zip(out, spec.mean, spec.std, strict=True):
        plane *= np.float32(1 / (255 * std))
        plane += np.float32(-mean / std)
    return out


def _python_rows(step: str, photo: _Photo, missing: dict[str, str]) -> dict[str, _Job]:
    pixels, crop, spec = photo.pixels, photo.crop, photo.spec
    out = np.empty_like(photo.tensor)

    def pillow() -> NDArray[np.uint8]:
        return preprocess.resize_crop(pixels, spec.resize, spec.crop)

    functions: dict[str, dict[str, Callable[[], Any]]] = {
        "normalize": {
            "NumPy": lambda: preprocess.normalize(crop, spec),
            "NumPy in place": lambda: normalize_in_place(crop, spec, out),
        },
        "resize": {"Pillow": pillow},
        "preprocess": {
            "Pillow + NumPy": lambda: preprocess.preprocess(pixels, spec)[0],
            "Pillow + NumPy in place": lambda: normalize_in_place(pillow(), spec, out),
        },
    }
    rows = dict(functions[step])
    for name, module, make in (
        ("OpenCV", "cv2", _opencv),
        ("torchvision", "torchvision", _torchvision),
    ):
        if _importable(module):
            rows[name] = make(photo)[step]
        else:
            missing[name] = "not installed"
    return {name: _Python(photo, function) for name, function in rows.items()}


def _resized(photo: _Photo) -> tuple[int, int, int, int]:
    """Width and height after the resize, and where the crop begins: as in `edgelab.preprocess`."""
    (height, width), spec = photo.pixels.shape[:2], photo.spec
    shorter = min(width, height)
    size = width * spec.resize // shorter, height * spec.resize // shorter
    left, top = (round((side - spec.crop) / 2) for side in size)
    return *size, left, top


def _opencv(photo: _Photo) -> dict[str, Callable[[], Any]]:
    """OpenCV as its users have it: area averages to shrink, which are close to Pillow's filter."""
    import cv2

    spec, (width, height, left, top) = photo.spec, _resized(photo)
    shrinks = width <= photo.pixels.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    blob = cv2.dnn.Image2BlobParams()
    blob.scalefactor = tuple(1 / (255 * std) for std in (*spec.std, 1.0))
    blob.mean = tuple(255 * mean for mean in (*spec.mean, 0.0))
    blob.size = (spec.crop, spec.crop)

    def resize() -> NDArray[Any]:
        resized = cv2.resize(photo.pixels, (width, height), interpolation=how)
        return np.ascontiguousarray(resized[top : top + spec.crop, left : left + spec.crop])

    return {
        "resize": resize,
        "normalize": lambda: cv2.dnn.blobFromImageWithParams(photo.crop, blob)[0],
        "preprocess": lambda: cv2.dnn.blobFromImageWithParams(resize(), blob)[0],
    }


def _torchvision(photo: _Photo) -> dict[str, Callable[[], Any]]:
    """torchvision on a tensor of bytes, for which it has SIMD of its own."""
    torch: Any = importlib.import_module("torch")
    functional: Any = importlib.import_module("torchvision.transforms.v2.functional")
    spec = photo.spec
    image, crop = (torch.from_numpy(a).permute(2, 0, 1) for a in (photo.pixels, photo.crop))

    def resize() -> Any:
        resized = functional.resize(image, [spec.resize], antialias=True)
        return functional.center_crop(resized, [spec.crop, spec.crop])

    def normalize(pixels: Any) -> Any:
        scaled = functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(scaled, spec.mean, spec.std, inplace=True).contiguous()

    return {
        "resize": lambda: resize().permute(1, 2, 0).numpy(),
        "normalize": lambda: normalize(crop).numpy(),
        "preprocess": lambda: normalize(resize()).numpy(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line. Default: that of this process.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m edgelab.kernels", description="Time the kernels that prepare a picture."
    )
    parser.add_argument("image", nargs="?", help="a picture; default: the one that ships")
    parser.add_argument("--step", choices=(*STEPS, "waterfall"), help="only this one")
    parser.add_argument("--repeats", type=int, default=30, help="paired rounds [30]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    try:
        tables: Mapping[str, KernelTable | Waterfall] = {
            step: waterfall(options.image, repeats=options.repeats)
            if step == "waterfall"
            else kernel_table(options.image, step=step, repeats=options.repeats)
            for step in ([options.step] if options.step else [*STEPS, "waterfall"])
        }
    except (EdgelabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({name: table.to_dict() for name, table in tables.items()}, indent=2))
    else:
        print("\n\n".join(map(str, tables.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
