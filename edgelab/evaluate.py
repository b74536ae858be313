"""What a smaller model costs in accuracy, and what it saves: paired, with intervals.

Two models see the same pictures, so they are compared picture by picture. Most pictures, both get
right; only those that one gets right and the other gets wrong say anything about the difference.
McNemar's test and a paired bootstrap look at these; two separate intervals would hide nearly any
difference. "No difference shown" is a result here, and not the same as "no difference".
"""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab import datasets, measure
from edgelab import models as registry
from edgelab.aot import available_cores
from edgelab.datasets import SIGNS, Batch, ImageFolder, Sample, Signs
from edgelab.errors import EdgelabError, ModelError, one_line
from edgelab.models import Model
from edgelab.wasinn.backends import Graph, load_graph

BACKENDS = ("onnxruntime", "openvino")
"""What can run an ONNX model here, by the names of `edgelab.wasinn.backends.load_graph`."""

_Z = 1.959963984540054  # 97.5 % of a normal distribution lie below: 95 % within ± this


# --- statistics -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proportion:
    """How many of how many, with Wilson's 95 % interval.

    Attributes
    ----------
    count, total : int
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or self.total < 1:
            raise ValueError(f"{self.count} of {self.total} is no proportion")

    @property
    def percent(self) -> float:
        """The share, 0 to 100."""
        return 100 * self.count / self.total

    @property
    def interval_percent(self) -> tuple[float, float]:
        """Wilson's score interval, 0 to 100.

        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22
        (1927). Unlike share ± 1.96 deviations, it stays within 0 to 100 and holds near the ends.
        """
        n, p = self.total, self.count / self.total
        middle = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        low = 0.0 if self.count == 0 else middle - half
        high = 1.0 if self.count == n else middle + half
        return 100 * low, 100 * high

    def __str__(self) -> str:
        low, high = self.interval_percent
        return f"{self.percent:.1f} % [{low:.1f}, {high:.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            **asdict(self),
            "percent": self.percent,
            "interval_percent": list(self.interval_percent),
        }


def mcnemar_p(lost: int, gained: int) -> float:
    """Return the exact two-sided p of McNemar's test.

    If neither model is better, each picture that only one of them gets right is a toss of a fair
    coin; p is the chance of a toss at least as uneven as this one.

    Parameters
    ----------
    lost, gained : int
        Pictures that only the first model gets right, and only the second.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"need counts, got {lost} and {gained}")
    total, few = lost + gained, min(lost, gained)
    term = tail = 1  # binomial coefficients, one from the other: math.comb anew would be slow
    for k in range(few):
        term = term * (total - k) // (k + 1)
        tail += term
    p: float = 2 * tail / 2**total  # of integers of any size: exact until this division
    return min(1.0, p)


@dataclass(frozen=True, slots=True)
class Difference:
    """Top-1 of a model minus that of its baseline, on the same pictures.

    Attributes
    ----------
    lost, gained : int
        Pictures that only the baseline gets right, and only the model.
    total : int
        All pictures.
    low_points, high_points : float
        95 % interval of the difference, in percentage points.
    p : float
        McNemar's exact p.
    """

    lost: int
    gained: int
    total: int
    low_points: float
    high_points: float
    p: float

    @property
    def points(self) -> float:
        """The difference in percentage points; negative if the model is worse."""
        return 100 * (self.gained - self.lost) / self.total

    @property
    def verdict(self) -> str:
        """Return ``worse`` or ``better``; or ``no difference shown``, if that can't be told.

        It can't if the interval holds 0, or if p is 0.05 or more.
        """
        if self.low_points <= 0 <= self.high_points or self.p >= 0.05:
            return "no difference shown"
        return "better" if self.points > 0 else "worse"

    def __str__(self) -> str:
        return f"{self.points:+.2f} [{self.low_points:+.2f}, {self.high_points:+.2f}]"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "points": self.points, "verdict": self.verdict}


_DRAWS = 10_000


def difference(
    baseline_right: NDArray[np.bool_], right: NDArray[np.bool_], *, seed: int = 0
) -> Difference:
    """Compare two models on the same pictures.

    Parameters
    ----------
    baseline_right, right : numpy.ndarray
        ``bool``, ``(n,)``: whether the baseline and the model get picture ``i`` right.
    seed : int
        Seed of the bootstrap.

    Raises
    ------
    ValueError
        If the two are not of one length, or empty.

    Notes
    -----
    The interval is the percentile bootstrap over pictures, with 10,000 draws. To draw n pictures
    with replacement is to draw how many of them are lost and gained: a multinomial. If no picture
    changed sides, a bootstrap could only draw that again; then the interval is the exact one for
    none of n (Clopper and Pearson), to either side.
    """
    if baseline_right.shape != right.shape or right.ndim != 1 or not right.size:
        raise ValueError(f"{baseline_right.shape} and {right.shape} are no pairs")
    total = len(right)
    lost = int(np.sum(baseline_right & ~right))
    gained = int(np.sum(~baseline_right & right))
    if lost + gained == 0:
        high = 100 * (1 - 0.025 ** (1 / total))
        low = -high
    else:
        shares = (lost / total, gained / total, (total - lost - gained) / total)
        drawn = np.random.default_rng(seed).multinomial(total, shares, _DRAWS)
        moved = (drawn[:, 1] - drawn[:, 0]) / total * 100
        low, high = (float(edge) for edge in np.percentile(moved, (2.5, 97.5)))
    return Difference(lost, gained, total, low, high, mcnemar_p(lost, gained))


def divergence(baseline: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return the mean KL(softmax(baseline) || softmax(other)), in nats a picture.

    How much the probabilities moved, though the first place may be the same. 0 if they are equal.

    Parameters
    ----------
    baseline, other : numpy.ndarray
        Logits, ``(n, classes)``.
    """
    if baseline.shape != other.shape or baseline.ndim != 2:
        raise ValueError(f"logits of {baseline.shape} and {other.shape} are no pairs")
    log_p, log_q = _log_softmax(baseline), _log_softmax(other)
    each = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return max(0.0, float(each.mean()))


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


# --- running a model ------------------------------------------------------------------------------


def _opened(model: Model | bytes | str | Path, backend: str, threads: int | None) -> Graph:
    if backend not in BACKENDS:
        raise ModelError(f"unknown backend {backend!r}: choose {' or '.join(BACKENDS)}")
    if isinstance(model, Model):
        data = model.data
    elif isinstance(model, bytes):
        data = model
    else:
        try:
            data = Path(model).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"cannot read {model}: {reason}") from None
    graph = load_graph(data, threads=threads, backend=backend)
    if len(graph.inputs) != 1 or not graph.outputs:
        raise ModelError(
            f"the model takes {len(graph.inputs)} inputs and gives {len(graph.outputs)} outputs; "
            "only models of one picture and one list of logits can be evaluated"
        )
    return graph


class Runner:
    """A model with one input array bound: fill `input`, call `run`, read the result.

    Parameters
    ----------
    graph : Graph
        With one input. `run` returns its first output, which the next `run` overwrites.
    shape : tuple of int
        Of the input.

    Attributes
    ----------
    input : numpy.ndarray
        ``float32``. Read at each `run`, where it is.

    Raises
    ------
    ModelError
        If the model does not take that.
    """

    def __init__(self, graph: Graph, shape: tuple[int, ...]) -> None:
        info = graph.inputs[0]
        if info.dtype != np.float32 or not info.accepts(shape):
            raise ModelError(
                f"the model takes {info.dtype} {list(info.shape)}, and the pictures are float32 "
                f"{list(shape)}. Was it made for another size, layout (NHWC) or type?"
            )
        self.input = np.zeros(shape, np.float32)
        self._context = graph.context()
        self._context.bind_input(0, self.input.ctypes.data, shape, self.input.dtype)

    def run(self) -> NDArray[Any]:
        """Run the model once."""
        self._context.compute()
        return self._context.output(0)


def logits(
    model: Model | bytes | str | Path,
    pictures: Batch | NDArray[np.float32],
    *,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """Run a model on every picture.

    Parameters
    ----------
    model : edgelab.models.Model, bytes, str or pathlib.Path
        An ONNX model with one input and one output of logits.
    pictures : edgelab.datasets.Batch or numpy.ndarray
        Prepared pictures; or tensors, ``float32``, ``(n, 3, crop, crop)``.
    backend : {"onnxruntime", "openvino"}
    threads : int, optional
        The default is the number of cores.
    progress : callable, optional
        Called with the number of pictures done since the last call.

    Returns
    -------
    numpy.ndarray
        ``float32``, ``(n, classes)``.

    Raises
    ------
    ModelError
        If the model can't be loaded or run, or gives something else than finite logits.

    Notes
    -----
    One picture at a time, as at the edge, and because some models take no more.
    """
    graph = _opened(model, backend, threads)
    if isinstance(pictures, Batch):
        shape = (1, 3, pictures.spec.crop, pictures.spec.crop)
        chunks = pictures.chunks()
    else:
        shape = (1, *pictures.shape[1:])
        chunks = iter([(0, pictures)])
    runner = Runner(graph, shape)
    rows = np.empty((len(pictures), 0), np.float32)
    for start, chunk in chunks:
        for place, tensor in enumerate(chunk):
            runner.input[0] = tensor
            try:
                got = np.asarray(runner.run())
            except EdgelabError:
                raise
            except Exception as error:  # each library has classes of its own
                raise ModelError(f"{backend} failed on the model: {one_line(error)}") from None
            if got.ndim != 2 or got.shape[0] != 1 or got.shape[1] < 2 or got.dtype.kind != "f":
                raise ModelError(
                    f"the model gives {got.dtype} {list(got.shape)}; need logits, [1, classes]"
                )
            if not rows.shape[1]:
                rows = np.empty((len(pictures), got.shape[1]), np.float32)
            rows[start + place] = got[0]
        if progress is not None:
            progress(len(chunk))
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if bad.size:
        raise ModelError(
            f"the model gives NaN or infinity for {bad.size:,} of {len(rows):,} pictures, picture "
            f"{bad[0]} the first. Did float16 overflow?"
        )
    return rows


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """What loading a model and running it adds to a process's memory, at its peak.

    Attributes
    ----------
    peak_bytes : int
        Median over processes of the highest resident set size.
    baseline_bytes : int
        The same of processes that import the same libraries and load no model.
    """

    peak_bytes: int
    baseline_bytes: int

    @property
    def added_bytes(self) -> int:
        """The model's own share: file, packed weights, tensors, code that ran, threads."""
        return self.peak_bytes - self.baseline_bytes

    def to_dict(self) -> dict[str, int]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "added_bytes": self.added_bytes}


def peak_memory(
    model: Model | bytes | str | Path,
    *,
    crop: int = 224,
    backend: str = "onnxruntime",
    threads: int | None = None,
    repeats: int = 3,
    baseline_bytes: int | None = None,
) -> Memory:
    """Load and run a model in fresh processes, and read how much memory they had at most.

    Counted are all resident pages: also the model file itself, which is read before it is loaded,
    and the libraries' code that only a run touches. What a process without a model has (Python,
    NumPy, the backend's library) is taken off.

    Parameters
    ----------
    model : edgelab.models.Model, bytes, str or pathlib.Path
    crop : int
        Side of its pictures in pixels.
    backend : {"onnxruntime", "openvino"}
    threads : int, optional
        The default is the number of cores.
    repeats : int
        Processes with the model, and as many without; the medians are returned.
    baseline_bytes : int, optional
        The peak without a model, if it was measured before with this backend.

    Raises
    ------
    ModelError
        If the model fails.
    EdgelabError
        On Windows, where this is not measured.
    """
    if sys.platform == "win32":
        raise EdgelabError("peak memory is read from the kernel on Linux and macOS only")
    with contextlib.ExitStack() as stack:
        if isinstance(model, (Model, bytes)):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder) / "model.onnx"
            path.write_bytes(model.data if isinstance(model, Model) else model)
        else:
            path = Path(model)
        cores = threads or available_cores()
        peaks = [_peak_of(backend, str(path), crop, cores) for _ in range(repeats)]
        if baseline_bytes is None:
            bare = [_peak_of(backend, "", crop, cores) for _ in range(repeats)]
            baseline_bytes = int(median(bare))
    return Memory(int(median(peaks)), baseline_bytes)


def _peak_of(backend: str, path: str, crop: int, threads: int) -> int:
    code = "import sys; from edgelab.evaluate import _probe; _probe(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, backend, path, str(crop), str(threads)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"the process that ran the model with {backend} ended with {done.returncode}: "
            f"{one_line(Exception(last))}"
        )
    return int(done.stdout.split()[-1])


def _probe(backend: str, path: str, crop: str, threads: str) -> None:
    """In a process of its own: import, perhaps load and run a model, and print the peak."""
    if backend == "openvino":
        from edgelab.wasinn.backends.openvino import _core

        _core()
    else:
        import onnxruntime  # noqa: F401
    if path:
        runner = Runner(_opened(path, backend, int(threads)), (1, 3, int(crop), int(crop)))
        for _ in range(3):
            runner.run()
    print(_own_peak_bytes())


def _own_peak_bytes() -> int:
    try:
        # Not getrusage's ru_maxrss: on Linux that one begins with the peak of the parent process.
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # macOS: bytes, and of this process only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- comparing models -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flip:
    """A picture that a model and its baseline see differently.

    Attributes
    ----------
    index : int
        Place in the batch.
    label, before, after : int
        The right class, the baseline's and the model's.
    """

    index: int
    label: int
    before: int
    after: int


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One model on the pictures.

    Attributes
    ----------
    name : str
    size_bytes : int
        Of the file.
    size_ratio : float
        Over the baseline's.
    top1, top5 : Proportion
        The right class is the first, or among the first five.
    difference : Difference
        Top-1 against the baseline; the baseline's own is 0.
    agreement : Proportion
        Pictures with the same first class as the baseline, right or wrong.
    kl_nats : float
        See `divergence`.
    predictions : numpy.ndarray
        ``int64``, ``(n,)``: the first class.
    notes : tuple of str
    """

    name: str
    size_bytes: int
    size_ratio: float
    top1: Proportion
    top5: Proportion
    difference: Difference
    agreement: Proportion
    kl_nats: float
    predictions: NDArray[np.int64] = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; without the predictions."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "size_ratio": self.size_ratio,
            "top1": self.top1.to_dict(),
            "top5": self.top5.to_dict(),
            "difference": self.difference.to_dict(),
            "agreement": self.agreement.to_dict(),
            "kl_nats": self.kl_nats,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Evaluation:
    """Models on the same pictures, against one of them.

    Attributes
    ----------
    baseline : str
    scores : dict of str to Score
    batch : edgelab.datasets.Batch
        What they were scored on.
    backend : str
        What the accuracy was measured with.
    threads : int
    timings : dict of str to edgelab.measure.Comparison
        By backend: time of one picture, interleaved with the baseline on the same backend.
    memory : dict of str to dict of str to Memory
        By backend and model.
    refused : dict of str to dict of str to str
        By backend and model: why it did not run there.
    environment : edgelab.measure.Fingerprint
    """

    baseline: str
    scores: dict[str, Score]
    batch: Batch = field(repr=False)
    backend: str
    threads: int
    timings: dict[str, measure.Comparison] = field(repr=False)
    memory: dict[str, dict[str, Memory]] = field(repr=False)
    refused: dict[str, dict[str, str]] = field(repr=False)
    environment: measure.Fingerprint = field(repr=False)

    def __repr__(self) -> str:
        names = ", ".join(self.scores)
        return f"Evaluation({names} on {len(self.batch):,} pictures, baseline {self.baseline})"

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def between(self, first: str, second: str) -> Difference:
        """Compare any two of the models: `second` minus `first`."""
        labels = self.batch.labels
        return difference(
            self.scores[first].predictions == labels, self.scores[second].predictions == labels
        )

    def flips(self, name: str, *, sides: bool = True) -> list[Flip]:
        """List the pictures that a model and the baseline see differently.

        Parameters
        ----------
        name : str
        sides : bool
            Only those that changed sides: one of the two is right.
        """
        before, after = self.scores[self.baseline].predictions, self.scores[name].predictions
        found = [
            Flip(int(i), int(self.batch.labels[i]), int(before[i]), int(after[i]))
            for i in np.flatnonzero(before != after)
        ]
        return [f for f in found if f.label in (f.before, f.after)] if sides else found

    def _pairs(self) -> list[tuple[str, str]]:
        others = [name for name in self.scores if name != self.baseline]
        return list(itertools.combinations(others, 2))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        names, pictures = self.batch.spec.labels, self.batch.names
        return {
            "baseline": self.baseline,
            "pictures": {"count": len(self.batch), "source": self.batch.source},
            "backend": self.backend,
            "threads": self.threads,
            "scores": {
                name: {
                    **score.to_dict(),
                    "flips": [
                        {
                            "index": flip.index,
                            "picture": pictures[flip.index] if pictures else str(flip.index),
                            "label": names[flip.label],
                            "before": names[flip.before],
                            "after": names[flip.after],
                        }
                        for flip in self.flips(name)
                    ],
                }
                for name, score in self.scores.items()
            },
            "pairs": [
                {"first": a, "second": b, **self.between(a, b).to_dict()} for a, b in self._pairs()
            ],
            "timings": {backend: t.to_dict() for backend, t in self.timings.items()},
            "memory": {
                backend: {name: each.to_dict() for name, each in by_name.items()}
                for backend, by_name in self.memory.items()
            },
            "refused": {backend: dict(each) for backend, each in self.refused.items() if each},
            "environment": self.environment.to_dict(),
        }

    def _accuracy_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        columns = ("", "bytes", "of baseline", "top-1 [95 %]", "top-5", "points [95 %]",
                   "lost, gained", "p", "agree", "KL, nats", "verdict")  # fmt: skip
        rows: list[tuple[str, ...]] = []
        for name, score in self.scores.items():
            base, d = name == self.baseline, score.difference
            paired = (
                ("", "", "", "", "", "baseline")
                if base
                else (str(d), f"{d.lost}, {d.gained}", f"{d.p:.2g}",
                      f"{score.agreement.percent:.1f} %", f"{score.kl_nats:.4f}", d.verdict)
            )  # fmt: skip
            rows.append((name, f"{score.size_bytes:,}", f"{score.size_ratio:.1%}",
                         str(score.top1), f"{score.top5.percent:.1f} %", *paired))  # fmt: skip
        return columns, rows

    def _cost_rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        columns = ("backend", "", "p50", "p95", "time / baseline", "verdict", "memory")
        rows: list[tuple[str, ...]] = []
        for backend in dict.fromkeys((*self.timings, *self.memory)):
            timing, memory = self.timings.get(backend), self.memory.get(backend, {})
            for name in self.scores:
                if name in self.refused.get(backend, {}):
                    rows.append((backend, name, "-", "-", "-", "does not run", "-"))
                    continue
                cells = ("", "", "", "")
                if timing is not None:
                    each, told = timing.summaries[name], timing.ratios[name]
                    paired = (
                        (str(told), told.verdict) if name != self.baseline else ("", "baseline")
                    )
                    cells = (
                        measure.duration(each.median_ms), measure.duration(each.p95_ms), *paired
                    )  # fmt: skip
                used = f"{memory[name].added_bytes / 2**20:,.1f} MiB" if name in memory else ""
                rows.append((backend, name, *cells, used))
        return columns, rows

    def _captions(self) -> tuple[str, str]:
        here = self.environment
        features = " ".join(here.features) or "none that matter here"
        accuracy = (
            f"Accuracy of {len(self.scores)} models on {len(self.batch):,} pictures "
            f"({self.batch.source}), computed by {self.backend}; differences are paired with "
            f"{self.baseline}"
        )
        cost = (
            f"One picture at a time, {self.threads} thread(s), {here.cpu} ({features}). Memory is "
            "what a fresh process has more at its peak with the model than without"
        )
        return accuracy, cost

    def _notes(self) -> list[str]:
        notes = [f"{name}: {note}" for name, s in self.scores.items() for note in s.notes]
        if len(self.scores) == 3:  # with more, there would be too many pairs; they are in the JSON
            for first, second in self._pairs():
                d = self.between(first, second)
                notes.append(
                    f"{second} minus {first}: {d} points, {d.lost} lost, {d.gained} gained, "
                    f"p = {d.p:.2g}: {d.verdict}"
                )
        for backend, by_name in self.refused.items():
            notes += [f"{name} does not run in {backend}: {why}" for name, why in by_name.items()]
        for backend, timing in self.timings.items():
            notes.append(
                f"{backend}, the baseline against itself: {timing.noise}, {timing.noise.verdict}; "
                f"{timing.rounds} rounds"
            )
            notes += [f"warning: {each}" for each in timing.warnings]
        return notes

    def __str__(self) -> str:
        accuracy, cost = self._captions()
        lines = [accuracy, "", *measure.text_table(*self._accuracy_rows(), left=(0, 10))]
        columns, rows = self._cost_rows()
        if rows:
            lines += ["", cost, "", *measure.text_table(columns, rows, left=(0, 1, 5)), ""]
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        accuracy, cost = self._captions()
        page = measure.html_table(accuracy, *self._accuracy_rows())
        columns, rows = self._cost_rows()
        if rows:
            page += measure.html_table(cost, columns, rows)
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._notes())
        return page + (f"<ul>{notes}</ul>" if notes else "")


def compare(
    models: Mapping[str, Model],
    batch: Batch,
    *,
    baseline: str,
    backends: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    repeats: int = 30,
    memory_repeats: int = 3,
    given: Mapping[str, NDArray[np.float32]] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Score models on the same pictures, and time them in turns.

    Parameters
    ----------
    models : mapping of str to edgelab.models.Model
    batch : edgelab.datasets.Batch
        Prepared once, for all of them.
    baseline : str
        One of the models, usually the one in float32.
    backends : sequence of str
        What to time them with. The first one also computes the accuracy.
    threads : int, optional
        For one inference; the default is the number of cores.
    repeats : int
        Rounds of timing; 0 for no timing.
    memory_repeats : int
        Processes for the peak memory; 0 not to measure it.
    given : mapping of str to numpy.ndarray, optional
        Logits that are known already, ``(n, classes)``, such as those of `cross_validate`.
    notes : mapping of str to sequence of str, optional
        What to say about a model below the tables.
    seed : int
        Seed of the intervals and of the order of timing.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    ModelError
        If the baseline does not run, or a model takes other pictures or has other labels. A model
        that only one backend refuses is noted in `Evaluation.refused`; the first must run it.
    """
    if baseline not in models:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(models)}")
    if not backends:
        raise ValueError("need a backend")
    if (batch.labels < 0).any():
        raise ModelError("some pictures have no label, so accuracy can't be measured on them")
    for name, model in models.items():
        _require_same_pictures(name, model, batch)
    threads = threads or available_cores()
    known = dict(given or {})
    from tqdm.auto import tqdm

    work = (len(models) - len(known)) * len(batch)
    with tqdm(total=work, unit=" pictures", disable=not progress, delay=1) as bar:
        for name, model in models.items():
            if name not in known:
                bar.set_description(name)
                known[name] = logits(
                    model, batch, backend=backends[0], threads=threads, progress=bar.update
                )
    for name, rows in known.items():
        if rows.shape != (len(batch), len(batch.spec.labels)):
            raise ModelError(
                f"{name} gives {rows.shape[1]} logits for {len(rows):,} pictures; there are "
                f"{len(batch.spec.labels)} labels and {len(batch):,} pictures"
            )
    scores = {
        name: _score(name, model, known[name], models[baseline], known[baseline], batch, seed,
                     (*_speed_reason(name, model, baseline), *(notes or {}).get(name, ())))
        for name, model in models.items()
    }  # fmt: skip
    timings: dict[str, measure.Comparison] = {}
    memory: dict[str, dict[str, Memory]] = {}
    refused: dict[str, dict[str, str]] = {}
    crop = batch.spec.crop
    _, first = next(batch.chunks(1))
    for backend in backends:
        refused[backend] = {}
        runners = {}
        for name, model in models.items():
            try:
                runners[name] = Runner(_opened(model, backend, threads), (1, 3, crop, crop))
                runners[name].input[:] = first
                runners[name].run()
            except Exception as error:  # each library has classes of its own
                if name == baseline:
                    raise ModelError(f"{name} does not run in {backend}: {error}") from None
                runners.pop(name, None)
                refused[backend][name] = one_line(error)
        if repeats:
            timings[backend] = measure.compare(
                {name: runner.run for name, runner in runners.items()},
                baseline=baseline, repeats=repeats, seed=seed, threads=threads,
                block_ms=_ONE_CALL,
            )  # fmt: skip
        if memory_repeats and sys.platform != "win32":
            memory[backend] = {}
            bare: int | None = None
            for name in runners:
                used = memory[backend][name] = peak_memory(
                    models[name], crop=crop, backend=backend, threads=threads,
                    repeats=memory_repeats, baseline_bytes=bare,
                )  # fmt: skip
                bare = used.baseline_bytes
    return Evaluation(
        baseline=baseline,
        scores=scores,
        batch=batch,
        backend=backends[0],
        threads=threads,
        timings=timings,
        memory=memory,
        refused=refused,
        environment=measure.fingerprint(),
    )


def _speed_reason(name: str, model: Model, baseline: str) -> tuple[str, ...]:
    if name == baseline:
        return ()
    from edgelab.quantize import speed_reason

    try:
        return (speed_reason(model.data),)
    except EdgelabError:  # the onnx package is not installed, or can't read what a backend can
        return ()


_ONE_CALL = 1e-6  # ms: one inference a block, so that p95 is that of single calls


def _require_same_pictures(name: str, model: Model, batch: Batch) -> None:
    for what in ("resize", "crop", "mean", "std", "labels"):
        mine, theirs = getattr(model.spec, what), getattr(batch.spec, what)
        if mine != theirs:
            shown = f"{len(mine)} and {len(theirs)}" if what == "labels" else f"{mine} and {theirs}"
            raise ModelError(
                f"{name} and the pictures have different {what} ({shown}), so they can't be "
                "compared. Were the models made from one another?"
            )


def _score(
    name: str,
    model: Model,
    rows: NDArray[np.float32],
    base_model: Model,
    base_rows: NDArray[np.float32],
    batch: Batch,
    seed: int,
    notes: tuple[str, ...],
) -> Score:
    labels, total = batch.labels, len(batch)
    predictions, base = rows.argmax(1), base_rows.argmax(1)
    most = min(5, rows.shape[1])
    five = np.argsort(-rows, axis=1, kind="stable")[:, :most]
    return Score(
        name=name,
        size_bytes=model.size_bytes,
        size_ratio=model.size_bytes / base_model.size_bytes,
        top1=Proportion(int(np.sum(predictions == labels)), total),
        top5=Proportion(int(np.sum((five == labels[:, None]).any(1))), total),
        difference=difference(base == labels, predictions == labels, seed=seed),
        agreement=Proportion(int(np.sum(predictions == base)), total),
        kl_nats=divergence(base_rows, rows),
        predictions=predictions.astype(np.int64),
        notes=notes,
    )


@dataclass(frozen=True, slots=True, eq=False)
class CrossValidated:
    """A model quantized several times, each time scored on pictures it was not calibrated with.

    Attributes
    ----------
    models : tuple of edgelab.models.Model
        One for each fold.
    logits : numpy.ndarray
        ``float32``, ``(n, classes)``: of each picture, by the model of its own fold.
    folds : tuple of numpy.ndarray
        Which pictures were held out for each.
    calibrated_on : tuple of numpy.ndarray
        And which ones each was calibrated with: never any of its own fold.
    """

    models: tuple[Model, ...]
    logits: NDArray[np.float32] = field(repr=False)
    folds: tuple[NDArray[np.int64], ...] = field(repr=False)
    calibrated_on: tuple[NDArray[np.int64], ...] = field(repr=False)


def cross_validate(
    model: Model,
    batch: Batch,
    scheme: str = "int8",
    *,
    folds: int = 5,
    count: int | None = None,
    folder: Path | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CrossValidated:
    """Calibrate on some pictures and score on others, until every picture was scored once.

    For a set that is too small to be split in two: with five folds, each model is calibrated on
    four fifths of the pictures, and scored on the remaining fifth.

    Parameters
    ----------
    model : edgelab.models.Model
        In float32.
    batch : edgelab.datasets.Batch
    scheme : str
        One of `edgelab.quantize.SCHEMES`.
    folds : int
    count : int, optional
        Calibrate each with that many pictures at most; the default is all of the other folds.
    folder : pathlib.Path, optional
        Where to keep the models; the default is a folder that is removed at once.
    backend, threads
        As in `logits`.
    seed : int
        Of the split.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    ModelError
        If the model can't be quantized, or run.
    """
    from tqdm.auto import tqdm

    from edgelab.quantize import quantize

    parts = batch.folds(folds, seed=seed)
    rng = np.random.default_rng(seed)
    rows: NDArray[np.float32] | None = None
    made, calibrated_on = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for number in tqdm(range(folds), desc=scheme, unit=" folds", disable=not progress, delay=1):
            held_out = parts[number]
            others = np.concatenate([part for k, part in enumerate(parts) if k != number])
            if count is not None and count < len(others):
                others = rng.choice(others, count, replace=False)
            others = np.sort(others)
            output = (folder or Path(temporary)) / f"{model.spec.name}-{scheme}-fold{number}.onnx"
            quantize(model, output, scheme, calibration=batch.take(others).tensors())
            made.append(registry.load(output))
            got = logits(made[-1], batch.take(held_out), backend=backend, threads=threads)
            if rows is None:
                rows = np.empty((len(batch), got.shape[1]), np.float32)
            rows[held_out] = got
            calibrated_on.append(others)
    assert rows is not None  # there are two folds or more
    return CrossValidated(tuple(made), rows, tuple(parts), tuple(calibrated_on))


# --- everything in one call -----------------------------------------------------------------------


def evaluate(
    names: Sequence[str | Path],
    *,
    baseline: str | None = None,
    images: Path | None = None,
    imagenette: str | None = None,
    labels: Path | None = None,
    count: int | None = None,
    schemes: Sequence[str] = (),
    folds: int | None = None,
    calibrate: int = 256,
    backends: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    repeats: int = 30,
    memory_repeats: int = 3,
    progress: bool = False,
) -> tuple[Evaluation, dict[str, int]]:
    """Load models, quantize the first one if asked to, and compare all on the same pictures.

    Parameters
    ----------
    names : sequence of str or pathlib.Path
        Registry names or ONNX files.
    baseline : str, optional
        One of the names; the default is the first.
    images : pathlib.Path, optional
        A folder for `edgelab.datasets.ImageFolder`.
    imagenette : {"160px", "320px"}, optional
        Score on Imagenette instead. With neither, on the held-out renders.
    labels : pathlib.Path, optional
        List of ImageNet's classes: for models without metadata, and for folders named by WordNet
        ids.
    count : int, optional
        Pictures at most; the default is all of them, or 2,048 renders.
    schemes : sequence of str
        What to make of the first model, from `edgelab.quantize.SCHEMES`.
    folds : int, optional
        Cross-validate these: see `cross_validate`.
    calibrate : int
        Pictures to calibrate with: renders of another split, or Imagenette's training pictures,
        or, with folds, pictures of the other folds.
    backends, threads, repeats, memory_repeats, progress
        As in `compare`.

    Returns
    -------
    Evaluation
    dict of str to int
        Why files of the folder were skipped, and how many.

    Raises
    ------
    EdgelabError
        If the options contradict each other, or anything can't be read or run.
    """
    if images is not None and imagenette is not None:
        raise EdgelabError("--images and --imagenette exclude each other")
    if folds is not None and not schemes:
        raise EdgelabError("--folds is for models that are quantized here: add --to int8")
    if schemes and images is not None and folds is None:
        raise EdgelabError(
            "to calibrate and to score on the same pictures would flatter the result. Add --folds "
            "5, or make the model first: edgelab quantize MODEL --calibrate OTHER_DIR"
        )
    if schemes:
        from edgelab.quantize import SCHEMES

        if unknown := [scheme for scheme in schemes if scheme not in SCHEMES]:
            raise EdgelabError(f"unknown scheme {unknown[0]!r}: choose from {', '.join(SCHEMES)}")
    models = _load(names, labels)
    chosen = _find(baseline, names, models)
    source = next(iter(models.values()))
    samples, others = _pictures(source, images, imagenette, labels, count, calibrate)
    batch = datasets.prepare(samples, source.spec, threads=threads)
    known: dict[str, NDArray[np.float32]] = {}
    notes: dict[str, list[str]] = {}
    for scheme in dict.fromkeys(schemes):
        if folds is None:
            models[scheme], notes[scheme] = _quantized(source, scheme, others)
            continue
        name = f"{scheme}, {folds} folds"
        made = cross_validate(
            source, batch, scheme, folds=folds, count=calibrate, backend=backends[0],
            threads=threads, progress=progress,
        )  # fmt: skip
        models[name], known[name] = made.models[0], made.logits
        calibrated = len(made.calibrated_on[0])
        notes[name] = [
            f"each picture is scored by a model calibrated on {calibrated} pictures of other "
            "folds; size, time and memory are those of the first fold's model"
        ]
    seen = compare(
        models, batch, baseline=chosen, backends=backends, threads=threads, repeats=repeats,
        memory_repeats=memory_repeats, given=known, notes=notes, progress=progress,
    )  # fmt: skip
    return seen, dict(getattr(samples, "skipped", {}))


def _load(names: Sequence[str | Path], labels: Path | None) -> dict[str, Model]:
    """Load models under short names: registry names, or file names without their folder."""
    stems = [Path(name).stem if Path(name).suffix else str(name) for name in names]
    short = [
        stem if stems.count(stem) == 1 else str(n) for stem, n in zip(stems, names, strict=True)
    ]
    if len(set(short)) < len(short):
        raise EdgelabError("the same model is named twice")
    loaded = {}
    for name, path in zip(short, names, strict=True):
        try:
            loaded[name] = registry.load(path)
        except ModelError as error:
            if not Path(path).is_file():
                raise
            if labels is None:
                raise ModelError(
                    f"{path}: {error}. If it is an ImageNet model that is fed as usual (256, crop "
                    "224, ImageNet's mean and deviation): --labels FILE, with lines such as "
                    "'n01440764 tench, Tinca tinca'"
                ) from None
            loaded[name] = registry.load(path, spec=registry.imagenet_spec(name, labels))
    return loaded


def _find(baseline: str | None, names: Sequence[str | Path], models: Mapping[str, Model]) -> str:
    if baseline is None:
        return next(iter(models))
    if baseline in models:
        return baseline
    for name, path in zip(models, names, strict=True):
        if str(path) == baseline:
            return name
    raise EdgelabError(f"the baseline {baseline!r} is none of the models: {', '.join(models)}")


def _pictures(
    model: Model,
    images: Path | None,
    imagenette: str | None,
    labels: Path | None,
    count: int | None,
    calibrate: int,
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Pictures to score, and others to calibrate with; the same ones if only folds are possible."""
    spec = model.spec
    if imagenette is not None:
        return (
            datasets.imagenette(spec, "val", size=imagenette, count=count),
            datasets.imagenette(spec, "train", size=imagenette, count=calibrate),
        )
    if images is not None:
        known = registry.registry().get(spec.name, {})
        if labels is None and known.get("spec") == "imagenet":
            labels = registry.imagenet_synsets()
        folder = ImageFolder(images, datasets.class_names(spec, labels), count=count)
        return folder, folder
    if spec.labels != SIGNS:
        raise EdgelabError(
            f"no pictures for model {spec.name!r}: it does not know the rendered signs. Give "
            "--images DIR, or --imagenette for a model with ImageNet's labels"
        )
    return Signs("test", count or 2048), Signs("calibrate", calibrate)


def _quantized(source: Model, scheme: str, others: Sequence[Sample]) -> tuple[Model, list[str]]:
    from edgelab.quantize import quantize

    with tempfile.TemporaryDirectory() as folder:
        made = quantize(
            source, Path(folder) / f"{source.spec.name}-{scheme}.onnx", scheme,
            calibration=(datasets.tensors([sample], source.spec) for sample in others),
        )  # fmt: skip
        return registry.load(made.path), (
            [f"calibrated on {others!r}"] if made.calibration_images else []
        )
