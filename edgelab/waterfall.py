"""From the article's naive service to `edgelab.Pipeline`, one improvement at a time, each timed.

`Way` is one way from a photo to a label, with any of the improvements in `SWITCHES` on. Without
any, it does for each request what the article's code does: compile the guest, load the model, write
the pixels as a JSON array of 150,528 floats, let the guest parse it, prepare the tensor with plain
code, run the model behind a host that copies, and answer in JSON. With all of them, it does what
`Pipeline` does. `walk` switches them on one after the other, and times all steps in turns.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgelab import images, preprocess
from edgelab.build import guest_path
from edgelab.classify import KERNELS, PARAMS, PREDICTION, Classifier
from edgelab.errors import EdgelabError, GuestError, ModelError
from edgelab.measure import (
    Comparison,
    Fingerprint,
    Ratio,
    Summary,
    Watch,
    compare,
    duration,
    html_table,
    interleaved,
    ratio,
    row_named,
    text_table,
)
from edgelab.models import Model, example_image, load
from edgelab.pipeline import STAGES as PIPELINE_STAGES
from edgelab.pipeline import Pipeline
from edgelab.runtime import Guest
from edgelab.wasinn import WasiNN
from edgelab.wasinn.backends import view
from edgelab.wasinn.backends.onnx import OnnxGraph, session_options

STAGES = ("decode", "load", "exchange", "preprocess", "infer", "postprocess")
"""What a request passes. ``load``: the guest and the model. ``exchange``: JSON, at both ends."""

NAIVE = "naive"
"""Name of the first step, where nothing is switched on."""


class Switch(NamedTuple):
    """An improvement.

    Attributes
    ----------
    off, on : str
        What each request does without and with it.
    claims : tuple of str
        Which of the article's claims it is about.
    """

    off: str
    on: str
    claims: tuple[str, ...]


SWITCHES: Mapping[str, Switch] = {
    "aot": Switch("compile the guest", "load its machine code", ("C1", "C9")),
    "instance": Switch("start the guest", "call the one that stays", ("C1", "C6")),
    "model": Switch("load the model", "use the one that stays", ("C1",)),
    "binary": Switch("exchange JSON", "pixels and logits as they are", ("C4",)),
    "simd": Switch("normalise with plain code", "normalise with SIMD", ("C2",)),
    "resize": Switch("resize with Pillow, then copy", "resize in the guest, with SIMD", ("C2",)),
    "zero-copy": Switch(
        "copy the tensor to the backend", "let the backend read it where it is", ("C3", "C4")
    ),
    "int8": Switch("run the model in float32", "run it in int8", ("C11",)),
}
"""The improvements, in the order in which `walk` switches them on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request.

    Attributes
    ----------
    index : int
        The most probable class.
    probability : float
    logits : numpy.ndarray
        ``float32``, ``(classes,)``.
    stages_ms : dict of str to float
        By stage, see `STAGES`.
    json_bytes : int
        Of the request; 0 without JSON.
    origin : str or None
        Where the guest's machine code came from, ``compiled`` or ``cache``; None if it was there.
    loaded : bool
        Whether the model was loaded for this request.
    """

    index: int
    probability: float
    logits: NDArray[np.float32]
    stages_ms: dict[str, float]
    json_bytes: int
    origin: str | None
    loaded: bool

    @property
    def total_ms(self) -> float:
        """Sum of the stages."""
        return sum(self.stages_ms.values())


class Way:
    """One way from a photo to a label.

    Parameters
    ----------
    model : Model
        An ONNX model in float32.
    on : iterable of str
        Which of `SWITCHES` are on.
    small : Model, optional
        The model in int8, for ``int8``.
    threads : int, optional
        Threads of the inference backend; the default is the number of cores.

    Raises
    ------
    ValueError
        If there is no such switch, or it needs something that is not there.
    ModelError
        If `small` is fed in another way than `model`, or has other labels.

    Examples
    --------
    >>> from edgelab import models
    >>> answer = Way(models.load("signs")).classify(models.example_image().read_bytes())
    >>> models.load("signs").spec.labels[answer.index], answer.origin, answer.loaded
    ('stop', 'compiled', True)
    """

    def __init__(
        self,
        model: Model,
        on: Iterable[str] = (),
        *,
        small: Model | None = None,
        threads: int | None = None,
    ) -> None:
        self.on = frozenset(on)
        if unknown := self.on - set(SWITCHES):
            raise ValueError(
                f"no switch is named {min(unknown)!r}; there are {', '.join(SWITCHES)}"
            )
        if "resize" in self.on and "binary" not in self.on:
            raise ValueError(
                "resize needs binary: the JSON interface takes pixels of one size only"
            )
        if "int8" in self.on:
            if small is None:
                raise ValueError("int8 needs the model in int8: pass small=")
            _require_same_use(model, small)
            model = small
        self.model = model
        self._threads = threads
        self._kernel = "simd128" if "simd" in self.on else "scalar"
        self._wasm = guest_path("classify_nn").path
        self._graph: OnnxGraph | _CopyingGraph | None = None
        self._nn: WasiNN | None = None
        self._classifier: Classifier | None = None
        self._slot: int | None = None

    def classify(self, encoded: bytes) -> Answer:
        """Answer one request.

        Parameters
        ----------
        encoded : bytes
            A picture's file.

        Raises
        ------
        ImageError
            If it can't be decoded.
        GuestError
            If the guest refuses it.
        """
        clock, spec = time.perf_counter, self.model.spec
        begin = clock()
        pixels = images.decode(encoded)
        decoded = clock()
        classifier, origin, loaded = self._ready()
        ready = clock()
        if "resize" in self.on:
            tensor = classifier.preprocess(pixels, spec, self._kernel)
        else:
            pixels = preprocess.resize_crop(pixels, spec.resize, spec.crop)
            resized = clock()
            if "binary" not in self.on:
                reply, size = self._in_json(classifier, pixels)
                end, inside = clock(), reply["stages_ms"]
                stages = {
                    "decode": (decoded - begin) * 1e3,
                    "load": (ready - decoded) * 1e3 + inside["load"],
                    "exchange": (end - resized) * 1e3 - sum(inside.values()),
                    "preprocess": (resized - ready) * 1e3 + inside["preprocess"],
                    "infer": inside["infer"],
                    "postprocess": inside["postprocess"],
                }
                logits = np.array(reply["logits"], np.float32)
                return Answer(
                    reply["index"], reply["confidence"], logits, stages, size, origin, loaded
                )
            tensor = classifier.normalize(pixels, spec, self._kernel)[None]
        prepared = clock()
        assert self._slot is not None
        logits = classifier.compute(self._slot, tensor, len(spec.labels))
        inferred = clock()
        ((index, probability),) = classifier.top_k(logits, 1)
        end = clock()
        times = _elapsed_ms(begin, decoded, ready, ready, prepared, inferred, end)
        stages = dict(zip(STAGES, times, strict=True))
        return Answer(index, probability, logits.copy(), stages, 0, origin, loaded)

    def _ready(self) -> tuple[Classifier, str | None, bool]:
        """Load what does not stay: the model, and the guest."""
        loaded = self._graph is None or "model" not in self.on
        if loaded:
            graph = OnnxGraph(self.model.data, self._threads)
            self._graph = graph if "zero-copy" in self.on else _CopyingGraph(graph)
        assert self._graph is not None
        name, origin = self.model.spec.name, None
        if self._classifier is None or self._nn is None or "instance" not in self.on:
            self._nn = WasiNN({name: self._graph})
            guest = Guest(self._wasm, host=[self._nn], cache="aot" in self.on)
            self._classifier, self._slot = Classifier(guest.instantiate()), None
            origin = guest.compiled.origin
        elif loaded:
            self._nn.add_model(name, self._graph)
        if "binary" in self.on and (self._slot is None or loaded):
            if self._slot is not None:
                self._classifier.unload(self._slot)
            self._slot = self._classifier.load_graph(name)
        return self._classifier, origin, loaded

    def _in_json(
        self, classifier: Classifier, pixels: NDArray[np.uint8]
    ) -> tuple[dict[str, Any], int]:
        """Exchange JSON with the guest: numbers of pixels in, logits out."""
        height, width = pixels.shape[:2]
        request = {
            "image_data": pixels.astype(np.float32).ravel().tolist(),
            "width": width,
            "height": height,
            "model_id": self.model.spec.name,
        }
        text = json.dumps(request).encode()
        reply = classifier.nn_infer(text, self.model.spec, self._kernel)
        if "error" in reply:
            raise GuestError(f"{reply['error']['id']}: {reply['error']['message']}")
        return reply, len(text)

    def __repr__(self) -> str:
        on = ", ".join(name for name in SWITCHES if name in self.on)
        return f"Way({self.model.spec.name!r}, {on or NAIVE})"


def _elapsed_ms(*marks: float) -> list[float]:
    """Milliseconds between one reading of the clock, in seconds, and the next."""
    return [(after - before) * 1e3 for before, after in pairwise(marks)]


def _require_same_use(model: Model, small: Model) -> None:
    for name in ("labels", "resize", "crop", "mean", "std"):
        if getattr(model.spec, name) != getattr(small.spec, name):
            raise ModelError(
                f"the model in int8 has another {name} than {model.spec.name!r}: it is no smaller "
                "version of it. Make one: python -m edgelab quantize"
            )


class _CopyingGraph:
    """A model behind a host that copies, as most do: the tensor to the backend, the logits back."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.metadata: dict[str, str] = {}  # so that the host does not look for mistakes
        self._session = graph.session

    def context(self) -> _CopyingContext:
        return _CopyingContext(self._session, [info.name for info in self.inputs])


class _CopyingContext:
    def __init__(self, session: Any, names: list[str]) -> None:
        self._session, self._names = session, names
        self._bound: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self._outputs: list[NDArray[Any]] = []

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._bound[self._names[index]] = address, shape, dtype

    def compute(self) -> None:
        copies = {name: view(*where).copy() for name, where in self._bound.items()}
        self._outputs = [np.ascontiguousarray(each) for each in self._session.run(None, copies)]

    def stop(self) -> None:
        """It can't be stopped."""

    def output(self, index: int) -> NDArray[Any]:
        return self._outputs[index]


# --- the walk -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One more improvement.

    Attributes
    ----------
    name : str
        What was switched on last, a name from `SWITCHES`; or `NAIVE`.
    does : str
        What each request does that it did not in the step before.
    claims : tuple of str
    summary : Summary
        One request, from the file to the label.
    gain : Ratio or None
        How many times as fast as the step before, paired by round. None for the first.
    total : Ratio
        How many times as fast as the first step.
    stages : dict of str to Summary
        By stage, see `STAGES`.
    label : str
    off_by : float
        Largest difference of a logit to bare ONNX Runtime on the same model, with the tensor that
        Pillow and NumPy prepare.
    origin, loaded, json_bytes
        As in `Answer`: what each request has to do.
    """

    name: str
    does: str
    claims: tuple[str, ...]
    summary: Summary
    gain: Ratio | None
    total: Ratio
    stages: dict[str, Summary]
    label: str
    off_by: float
    origin: str | None
    loaded: bool
    json_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One of the article's four rows, and what became of it here.

    Attributes
    ----------
    claim : str
    stages : tuple of str
        Which of `STAGES` belong to it.
    article_ms : (float, float)
        Before and after, in the article.
    article_reason : str
        The article's.
    switch : str
        Which of `SWITCHES` that is.
    before, after : Summary
        In the first and in the last step.
    factor : Ratio
        Before over after, paired by round.
    alone : Ratio
        The step before the article's switch over the one with it.
    saved_ms : dict of str to float
        Switch → by how much it made the median shorter; negative: longer.
    """

    claim: str
    stages: tuple[str, ...]
    article_ms: tuple[float, float]
    article_reason: str
    switch: str
    before: Summary
    after: Summary
    factor: Ratio
    alone: Ratio
    saved_ms: dict[str, float]

    @property
    def cause(self) -> str:
        """The switch that saved most."""
        return max(self.saved_ms, key=lambda name: self.saved_ms[name])

    @property
    def verdict(self) -> str:
        """Say whether the article's factor is reached, and by its own switch.

        ``holds`` if the whole interval of `alone` reaches the factor; ``not by … alone`` if only
        that of `factor` does; ``does not`` if all of that stays below.
        """
        wanted = self.article_ms[0] / self.article_ms[1]
        if self.alone.low >= wanted:
            return "holds"
        if self.factor.low >= wanted:
            return f"not by {self.switch} alone"
        return "does not" if self.factor.high < wanted else "can't be told"


_ROWS = (
    ("C1", ("load",), (30.0, 2.0), "AOT", "aot"),
    ("C2", ("preprocess",), (20.0, 5.0), "SIMD", "simd"),
    ("C3", ("infer",), (40.0, 2.0), "WASI-NN", "zero-copy"),
    ("C4", ("exchange", "postprocess"), (10.0, 1.0), "zero-copy serialization", "binary"),
)


@dataclass(frozen=True, slots=True)
class Walk:
    """All steps from the naive way to the last one, from the same rounds.

    Attributes
    ----------
    model : str
    steps : tuple of Step
    rows : tuple of Row
        The article's four.
    missing : dict of str to str
        Switch → why it is not among the steps.
    noise : Ratio
        The last step over itself: the A/A check.
    warnings : tuple of str
    environment : Fingerprint
        Taken before the first round.
    comparison : Comparison
        The measurement behind it, with the time of each round.
    """

    model: str
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    missing: dict[str, str]
    noise: Ratio
    warnings: tuple[str, ...]
    environment: Fingerprint
    comparison: Comparison = field(repr=False)

    def __getitem__(self, name: str) -> Step:
        """Return a step by its name."""
        return row_named(self.steps, name)

    @property
    def total(self) -> Ratio:
        """How many times as fast the last step is as the first."""
        return self.steps[-1].total

    @property
    def verdicts(self) -> dict[str, str]:
        """Claim → whether it holds: the four rows, the whole (C5) and the latency (C7)."""
        rows = {row.claim: row.verdict for row in self.rows}
        return {**rows, **{claim[:2]: told for claim, (_, told) in self._overall().items()}}

    def _overall(self) -> dict[str, tuple[str, str]]:
        first, last, total = self.steps[0].summary, self.steps[-1].summary, self.total
        told = "holds" if total.low >= 10 else "does not" if total.high < 10 else "can't be told"
        both = f"{duration(first.median_ms)} → {duration(last.median_ms)}, {total} times as fast"
        return {
            "C5 (100 → 10 ms)": (both, told),
            "C7 (Wasmtime 15 ms)": (
                f"{duration(last.median_ms)}, p95 {duration(last.p95_ms)}",
                "holds" if last.median_ms <= 15 else "does not",
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.model,
            "steps": [
                {
                    **asdict(step),
                    "claims": list(step.claims),
                    "gain": step.gain.to_dict() if step.gain else None,
                    "total": step.total.to_dict(),
                }
                for step in self.steps
            ],
            "rows": [
                {
                    **asdict(row),
                    "factor": row.factor.to_dict(),
                    "alone": row.alone.to_dict(),
                    "cause": row.cause,
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
            "verdicts": self.verdicts,
            "total": self.total.to_dict(),
            "missing": dict(self.missing),
            "noise": self.noise.to_dict(),
            "warnings": list(self.warnings),
            "environment": self.environment.to_dict(),
            "comparison": self.comparison.to_dict(samples=True),
        }

    _COLUMNS = (
        "step", "each request", "median", "p95", "of 100", "times as fast", "than naive", "off by",
    )  # fmt: skip

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                step.name,
                step.does,
                duration(step.summary.median_ms),
                duration(step.summary.p95_ms),
                f"{100 / step.total.median:.1f}",
                "" if step.gain is None else str(step.gain),
                "1" if step.gain is None else str(step.total),
                f"{step.off_by:.1e}",
            )
            for step in self.steps
        ]

    _ROW_COLUMNS = (
        "", "stages", "article", "by", "here", "factor", "by that alone",
        "most by", "verdict",
    )  # fmt: skip

    def _row_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.claim,
                " + ".join(row.stages),
                f"{row.article_ms[0]:g} → {row.article_ms[1]:g} ms",
                row.article_reason,
                f"{duration(row.before.median_ms)} → {duration(row.after.median_ms)}",
                str(row.factor),
                str(row.alone),
                row.cause,
                row.verdict,
            )
            for row in self.rows
        ]

    def _notes(self) -> list[str]:
        here = self.environment
        threads = here.threads["threads"]
        return [
            f"{self.total.count} paired rounds on {here.cpu}, {here.cores} core(s), threads "
            f"{threads}; in brackets 95 % intervals",
            f"every step sees {self.steps[0].label!r}",
            *(f"{claim}: {here}: {told}" for claim, (here, told) in self._overall().items()),
            f"A/A check, the last step / itself: {self.noise}, {self.noise.verdict}",
            *(f"without {name}: {why}" for name, why in self.missing.items()),
            *(f"warning: {each}" for each in self.warnings),
        ]

    def __str__(self) -> str:
        steps = text_table(self._COLUMNS, self._cells(), left=(0, 1, 5, 6))
        rows = text_table(self._ROW_COLUMNS, self._row_cells(), left=tuple(range(9)))
        return "\n".join([*steps, "", *rows, "", *self._notes()])

    def _repr_html_(self) -> str:
        caption = f"From naive to fast, model {self.model}"
        return html_table(caption, self._COLUMNS, self._cells()) + html_table(
            "; ".join(["The article's four rows", *self._notes()]),
            self._ROW_COLUMNS,
            self._row_cells(),
        )


FP32_BOUND, INT8_BOUND = 1e-3, 0.5
"""How far logits may be off. In int8, a tensor's last bit can move a value by a whole step."""


def walk(
    model: Model,
    small: Model | None = None,
    *,
    image: bytes | str | Path | None = None,
    repeats: int = 20,
    threads: int | None = None,
    seed: int = 0,
) -> Walk:
    """Switch on one improvement after the other, and time all steps in turns.

    Parameters
    ----------
    model : Model
        An ONNX model in float32.
    small : Model, optional
        The same in int8; without it, the last step is missing.
    image : bytes, str or pathlib.Path, optional
        A picture's file, or a path to one. The default is the shipped one.
    repeats : int
        Paired rounds, each with a block of requests for each step.
    threads : int, optional
        Threads of the inference backend, in all steps.
    seed : int
        Seed of the rounds' order.

    Raises
    ------
    EdgelabError
        If a step's answer is not that of bare ONNX Runtime.
    ImageError, ModelError, GuestError
        As `Way`.
    """
    encoded = image if isinstance(image, bytes) else Path(image or example_image()).read_bytes()
    names = [name for name in SWITCHES if name != "int8" or small is not None]
    ways = {NAIVE: Way(model, threads=threads)}
    for count, name in enumerate(names, start=1):
        ways[name] = Way(model, names[:count], small=small, threads=threads)
    bare = {used.sha256: _bare_logits(used, encoded) for used in (model, small) if used}
    off_by = {
        name: _off_by(name, way, way.classify(encoded), bare[way.model.sha256])
        for name, way in ways.items()
    }
    runs: dict[str, list[Answer]] = {name: [] for name in ways}

    def job(name: str) -> Callable[[], None]:
        way, answers = ways[name], runs[name]
        return lambda: answers.append(way.classify(encoded))

    last = names[-1]
    # A block of the last step is several requests: what others left in the CPU's caches is gone
    # after the first.
    measured = compare(
        {name: job(name) for name in ways}, baseline=last, repeats=repeats, warmup=1,
        block_ms=20.0, seed=seed, threads=threads,
    )  # fmt: skip
    samples = measured.samples_ms
    stages = {
        name: _by_round(answers, repeats, measured.calls[name] * (1 + (name == last)))
        for name, answers in runs.items()
    }
    steps, before = [], NAIVE
    for name, way in ways.items():
        answer, switch = runs[name][-1], SWITCHES.get(name)
        steps.append(Step(
            name=name,
            does=switch.on if switch else "everything anew, in JSON, with plain code",
            claims=switch.claims if switch else (),
            summary=measured.summaries[name],
            gain=ratio(samples[before], samples[name], seed=seed) if switch else None,
            total=ratio(samples[NAIVE], samples[name], seed=seed),
            stages={stage: Summary.of(each) for stage, each in stages[name].items()},
            label=way.model.spec.labels[answer.index],
            off_by=off_by[name],
            origin=answer.origin,
            loaded=answer.loaded,
            json_bytes=answer.json_bytes,
        ))  # fmt: skip
        before = name
    return Walk(
        model=model.spec.name,
        steps=tuple(steps),
        rows=tuple(_row(row, stages, seed) for row in _ROWS),
        missing={} if small is not None else {"int8": "no model in int8 was given"},
        noise=measured.noise,
        warnings=measured.warnings,
        environment=measured.environment,
        comparison=measured,
    )


def in_int8(model: Model, pictures: Path | None = None, *, count: int = 64) -> Model:
    """Quantize a model for the last step.

    Parameters
    ----------
    model : Model
    pictures : pathlib.Path, optional
        Folder with pictures to calibrate with; the default is, for a model of the rendered signs,
        renders for this purpose.
    count : int
        Pictures, at most.

    Raises
    ------
    EdgelabError
        If there are no pictures, the extra ``quantize`` is not installed, or it fails.
    """
    from edgelab.datasets import tensors
    from edgelab.quantize import calibration_pictures, quantize

    samples, spec = calibration_pictures(model, pictures, count)
    with tempfile.TemporaryDirectory(prefix="edgelab-") as folder:
        made = quantize(
            model, Path(folder, f"{spec.name}-int8.onnx"), "int8",
            calibration=(tensors([sample], spec) for sample in samples),
        )  # fmt: skip
        return load(made.path)


def _bare_logits(model: Model, encoded: bytes) -> NDArray[np.float32]:
    """What Pillow, NumPy and bare ONNX Runtime answer."""
    session = onnxruntime.InferenceSession(
        model.data, session_options(), providers=["CPUExecutionProvider"]
    )
    tensor = preprocess.preprocess(images.decode(encoded), model.spec)
    logits: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: tensor})[0][0]
    return logits


def _off_by(name: str, way: Way, answer: Answer, expected: NDArray[np.float32]) -> float:
    """How far an answer is from that of bare ONNX Runtime; raise if too far."""
    off = float(np.abs(answer.logits - expected).max())
    if answer.index != expected.argmax() or off > (INT8_BOUND if "int8" in way.on else FP32_BOUND):
        raise EdgelabError(
            f"step {name}: class {answer.index}, logits off by {off:.2g}; bare ONNX Runtime sees "
            f"class {expected.argmax()}. If these are near ties, take another picture; else please "
            "report this"
        )
    return off


def _by_round(answers: list[Answer], rounds: int, calls: int) -> dict[str, tuple[float, ...]]:
    """Mean time of each stage in each of the last rounds, which had so many calls."""
    times = np.array([[a.stages_ms[stage] for stage in STAGES] for a in answers[-rounds * calls :]])
    means = times.reshape(rounds, calls, len(STAGES)).mean(1)
    return {stage: tuple(map(float, means[:, k])) for k, stage in enumerate(STAGES)}


def _row(
    row: tuple[str, tuple[str, ...], tuple[float, float], str, str],
    found: Mapping[str, Mapping[str, tuple[float, ...]]],
    seed: int,
) -> Row:
    times = {name: np.sum([each[s] for s in row[1]], axis=0) for name, each in found.items()}
    medians = {name: float(np.median(each)) for name, each in times.items()}
    (first, *_, last), names = times.values(), list(times)
    without = names[names.index(row[4]) - 1]
    return Row(
        *row,
        before=Summary.of(first),
        after=Summary.of(last),
        factor=ratio(first, last, seed=seed),
        alone=ratio(times[without], times[row[4]], seed=seed),
        saved_ms={name: medians[before] - medians[name] for before, name in pairwise(medians)},
    )


# --- the whole and its parts ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overhead:
    """`Pipeline.classify` against its bare parts, from the same rounds.

    Attributes
    ----------
    whole, parts : dict of str to Summary
        By stage, and ``total``.
    ratios : dict of str to Ratio
        Whole over parts, by stage, and ``total``.
    noise : Ratio
        The sum of the parts over itself: the A/A check.
    warnings : tuple of str
    environment : Fingerprint
        Taken before the first round.
    """

    whole: dict[str, Summary]
    parts: dict[str, Summary]
    ratios: dict[str, Ratio]
    noise: Ratio
    warnings: tuple[str, ...]
    environment: Fingerprint

    @property
    def total(self) -> Ratio:
        """The whole over the sum of its parts."""
        return self.ratios["total"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            **asdict(self),
            "ratios": {stage: each.to_dict() for stage, each in self.ratios.items()},
            "noise": self.noise.to_dict(),
            "warnings": list(self.warnings),
            "environment": self.environment.to_dict(),
        }

    _COLUMNS = ("", "Pipeline", "bare parts", "Pipeline / parts", "Pipeline is")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                stage,
                duration(self.whole[stage].median_ms),
                duration(self.parts[stage].median_ms),
                str(paired),
                paired.verdict,
            )
            for stage, paired in self.ratios.items()
        ]

    def _notes(self) -> list[str]:
        return [
            "parts: Pillow, the guest's two functions and ONNX Runtime, bare, one after the other",
            f"A/A check, the parts / themselves: {self.noise}, {self.noise.verdict}",
            *(f"warning: {each}" for each in self.warnings),
        ]

    def __str__(self) -> str:
        return "\n".join(
            [*text_table(self._COLUMNS, self._cells(), left=(0, 3, 4)), *self._notes()]
        )

    def _repr_html_(self) -> str:
        caption = "; ".join(["A photo's label, and the sum of the bare parts", *self._notes()])
        return html_table(caption, self._COLUMNS, self._cells())


def overhead(
    pipeline: Pipeline,
    image: bytes | str | Path | None = None,
    *,
    repeats: int = 100,
    seed: int = 0,
) -> Overhead:
    """Time `Pipeline.classify` against the same work without it.

    Parameters
    ----------
    pipeline : Pipeline
    image : bytes, str or pathlib.Path, optional
        A picture's file, or a path to one. The default is the shipped one.
    repeats : int
        Paired rounds.
    seed : int
        Seed of the rounds' order.

    Raises
    ------
    EdgelabError
        If both see different labels.
    """
    encoded = image if isinstance(image, bytes) else Path(image or example_image()).read_bytes()
    bare = _Parts(pipeline, encoded)
    runs: dict[str, list[list[float]]] = {"whole": [], "parts": []}
    seen = pipeline.classify(encoded)
    if (index := bare.run(encoded)[0]) != seen.top[0].index:
        raise EdgelabError(
            f"Pipeline sees class {seen.top[0].index}, its bare parts {index}; please report this"
        )

    def whole() -> None:
        one = pipeline.classify(encoded, 1)
        runs["whole"].append([getattr(one, f"{stage}_ms") for stage in PIPELINE_STAGES])

    watch = Watch()
    times = interleaved(
        {
            "whole": whole,
            "parts": lambda: runs["parts"].append(bare.run(encoded)[1]),
            "again": lambda: bare.run(encoded),
        },
        repeats=repeats,
        seed=seed,
    )
    samples = {
        name: {
            **{s: [run[k] for run in each[-repeats:]] for k, s in enumerate(PIPELINE_STAGES)},
            "total": times[name],
        }
        for name, each in runs.items()
    }
    noise = ratio(times["again"], times["parts"], seed=seed)
    summaries = {
        name: {stage: Summary.of(each) for stage, each in rows.items()}
        for name, rows in samples.items()
    }
    return Overhead(
        whole=summaries["whole"],
        parts=summaries["parts"],
        ratios={
            stage: ratio(each, samples["parts"][stage], seed=seed)
            for stage, each in samples["whole"].items()
        },
        noise=noise,
        warnings=watch.doubts(times["parts"], "the sum of the parts", noise),
        environment=watch.environment,
    )


class _Parts:
    """What `Pipeline.classify` is made of, without it: each part as bare as it can be.

    The session is the pipeline's own, since two sessions of one model differ by a percent or two.
    """

    def __init__(self, pipeline: Pipeline, encoded: bytes) -> None:
        spec = pipeline.model.spec
        graph = pipeline.nn.graph(spec.name)
        assert isinstance(graph, OnnxGraph)
        self._session, self._input = graph.session, graph.inputs[0].name
        classifier = Classifier(pipeline.guest.instantiate())
        self._preprocess = classifier.instance.function("preprocess")
        self._top_k = classifier.instance.function("top_k")
        pixels = preprocess.bare_decode(encoded)
        classes, (height, width) = len(spec.labels), pixels.shape[:2]
        sizes = (pixels.nbytes, PARAMS.size, 12 * spec.crop**2, 4 * classes, PREDICTION.itemsize)
        source, params, tensor, logits, top = self._blocks = [*map(classifier.buffer, sizes)]
        classifier.instance.memory.write(
            params.pointer, PARAMS.pack(spec.resize, spec.crop, *spec.mean, *spec.std)
        )
        self._pixels = source.array(pixels.shape)
        self._tensor = tensor.array((1, 3, spec.crop, spec.crop), np.float32)
        self._logits, self._top = logits.array(classes, np.float32), top.array(1, PREDICTION)
        self._prepare = (
            source.pointer, pixels.nbytes, width, height, params.pointer, tensor.pointer,
            tensor.size_bytes, KERNELS.index(pipeline.kernel),
        )  # fmt: skip
        self._rank = logits.pointer, classes, 1, top.pointer

    def run(self, encoded: bytes) -> tuple[int, list[float]]:
        """Return the best class, and the milliseconds of each stage."""
        marks = [time.perf_counter()]
        pixels = preprocess.bare_decode(encoded)
        marks.append(time.perf_counter())
        np.copyto(self._pixels, pixels)
        self._preprocess(*self._prepare)
        marks.append(time.perf_counter())
        logits = self._session.run(None, {self._input: self._tensor})[0]
        marks.append(time.perf_counter())
        np.copyto(self._logits, logits[0])
        self._top_k(*self._rank)
        index = int(self._top["index"][0])
        marks.append(time.perf_counter())
        return index, _elapsed_ms(*marks)
