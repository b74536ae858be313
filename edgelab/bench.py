"""Tables of paired timings, guest against bare Python in turns, and all of them as one run.

`stage_table` takes one picture through all stages. Its baseline does the same work without Wasm:
Pillow decodes, `edgelab.preprocess` prepares with Pillow and NumPy, ONNX Runtime infers with the
same session options, NumPy takes the softmax. `host_table` looks at the WASI-NN host alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgelab import images, preprocess
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import EdgelabError, ModelError, one_line
from edgelab.kernels import STEPS as KERNEL_STEPS
from edgelab.kernels import KernelTable, kernel_table
from edgelab.measure import (
    Fingerprint,
    Ratio,
    Summary,
    Watch,
    compare,
    duration,
    html_table,
    interleaved,
    plain_text,
    ratio,
    row_named,
    text_table,
)
from edgelab.models import Model, example_image
from edgelab.pipeline import STAGES, Classification, Pipeline, Prediction
from edgelab.results import Fact, Results, Row, Section, merge, read
from edgelab.runtime import Guest
from edgelab.wasinn import Encoding, WasiNN
from edgelab.wasinn.backends import load_graph
from edgelab.wasinn.backends.onnx import OnnxGraph, session_options


@dataclass(frozen=True, slots=True)
class StageTable:
    """Stage timings of the guest's path and of bare Python's, from the same rounds.

    Attributes
    ----------
    guest, bare : dict of str to Summary
        By stage, and ``total``.
    ratios : dict of str to Ratio
        Guest over bare Python, by stage, and ``total``.
    noise : Ratio
        Bare Python's total over itself: the A/A check.
    same_label : bool
        Whether both paths see the same label.
    classification : Classification
        The guest's last answer.
    warnings : tuple of str
    environment : Fingerprint
        Taken before the first round.
    settings : dict of str to Fact
        What was timed.
    samples_ms : dict of str to dict of str to tuple of float
        ``guest`` and ``bare``, by stage, by round.
    """

    guest: dict[str, Summary]
    bare: dict[str, Summary]
    ratios: dict[str, Ratio]
    noise: Ratio
    same_label: bool
    classification: Classification
    warnings: tuple[str, ...]
    environment: Fingerprint
    settings: dict[str, Fact]
    samples_ms: dict[str, dict[str, tuple[float, ...]]] = field(repr=False)

    @property
    def total_ratio(self) -> Ratio:
        """Guest's total over bare Python's."""
        return self.ratios["total"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        plain = asdict(self)
        del plain["samples_ms"]
        return {**plain, "warnings": list(self.warnings), "environment": self.environment.to_dict()}

    @property
    def section(self) -> Section:
        """The same as a section of `edgelab.results`."""
        rows = []
        for stage, paired in self.ratios.items():
            bare = f"bare {stage}"
            samples = (self.samples_ms[path][stage] for path in ("bare", "guest"))
            rows.append(Row(bare, self.bare[stage], samples_ms=next(samples)))
            rows.append(Row(stage, self.guest[stage], bare, paired, samples_ms=next(samples)))
        return Section(
            "stages",
            "One picture through all stages: guest with WASI-NN, and bare Python + ONNX Runtime",
            self.settings,
            tuple(rows),
            self.noise,
            self.warnings,
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                stage,
                *(f"{summary.median_ms:.2f}" for summary in (self.guest[stage], self.bare[stage])),
                *(f"{summary.p95_ms:.2f}" for summary in (self.guest[stage], self.bare[stage])),
                str(paired),
                paired.verdict,
            )
            for stage, paired in self.ratios.items()
        ]

    def _notes(self) -> list[str]:
        return [
            f"{self.noise.count} paired rounds; in brackets the 95 % interval of the median ratio",
            f"A/A check, bare / itself: {self.noise}, {self.noise.verdict}",
            *(f"warning: {each}" for each in self.warnings),
        ]

    def __str__(self) -> str:
        columns = ("ms", "guest", "bare", "guest p95", "bare p95", "guest / bare", "guest is")
        return "\n".join([*text_table(columns, self._cells(), left=(0, 5, 6)), *self._notes()])

    def _repr_html_(self) -> str:
        columns = (
            "stage", "guest median", "bare median", "guest p95", "bare p95", "guest / bare",
            "guest is",
        )  # fmt: skip
        return html_table("; ".join(["Milliseconds", *self._notes()]), columns, self._cells())


EXAMPLE_LABEL = "stop"
"""What the shipped picture shows."""


def stage_table(
    pipeline: Pipeline,
    image: bytes | str | Path,
    *,
    repeats: int = 50,
    threads: int | None = None,
    seed: int = 0,
) -> StageTable:
    """Time each stage of both paths on one image.

    Parameters
    ----------
    pipeline : Pipeline
    image : bytes, str or pathlib.Path
        An encoded image, or a path to one (read once, before the timing).
    repeats : int
        Paired rounds.
    threads : int, optional
        Threads of the baseline's session; pass what the pipeline uses.
    seed : int
        Seed of the rounds' order.

    Raises
    ------
    ImageError
        If the image can't be decoded.
    """
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    bare_path = _BarePath(pipeline, threads)
    watch = Watch(threads=threads)
    runs: dict[str, list[Classification]] = {"guest": [], "bare": []}
    whole = interleaved(
        {
            "guest": lambda: runs["guest"].append(pipeline.classify(encoded)),
            "bare": lambda: runs["bare"].append(bare_path.classify(encoded)),
            "again": lambda: bare_path.classify(encoded),
        },
        repeats=repeats,
        seed=seed,
    )
    samples = {
        path: {
            **{s: tuple(getattr(run, f"{s}_ms") for run in each[-repeats:]) for s in STAGES},
            "total": tuple(whole[path]),
        }
        for path, each in runs.items()
    }
    guest, bare = samples["guest"], samples["bare"]
    noise = ratio(whole["again"], whole["bare"])
    return StageTable(
        guest={stage: Summary.of(each) for stage, each in guest.items()},
        bare={stage: Summary.of(each) for stage, each in bare.items()},
        ratios={stage: ratio(guest[stage], bare[stage]) for stage in guest},
        noise=noise,
        same_label=runs["guest"][-1].label == runs["bare"][-1].label,
        classification=runs["guest"][-1],
        warnings=watch.doubts(whole["bare"], "bare Python", noise),
        environment=watch.environment,
        settings={
            **_subject(pipeline.model.spec.name, pipeline.model.data, threads),
            "image_sha256": _digest(encoded),
        },
        samples_ms=samples,
    )


def _subject(model: str, data: bytes, threads: int | None) -> dict[str, Fact]:
    return {
        "model": plain_text(model),
        "model_sha256": _digest(data),
        "threads": "default" if threads is None else threads,
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class _BarePath:
    """The same four stages without Wasm."""

    def __init__(self, pipeline: Pipeline, threads: int | None) -> None:
        self._spec = pipeline.model.spec
        self._session = onnxruntime.InferenceSession(
            pipeline.model.data, session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def classify(self, encoded: bytes) -> Classification:
        spec, clock = self._spec, time.perf_counter
        begin = clock()
        pixels = images.decode(encoded)
        decoded = clock()
        tensor = preprocess.preprocess(pixels, spec)
        preprocessed = clock()
        logits = self._session.run(None, {self._input: tensor})[0][0]
        inferred = clock()
        probabilities = preprocess.softmax(logits)
        best = np.argsort(-probabilities, kind="stable")[:3]
        top = tuple(Prediction(spec.labels[i], float(probabilities[i]), int(i)) for i in best)
        end = clock()
        return Classification(
            top,
            decode_ms=(decoded - begin) * 1e3,
            preprocess_ms=(preprocessed - decoded) * 1e3,
            infer_ms=(inferred - preprocessed) * 1e3,
            postprocess_ms=(end - inferred) * 1e3,
        )


@dataclass(frozen=True, slots=True)
class HostTable:
    """What the WASI-NN host adds to ONNX Runtime, from the same rounds.

    Attributes
    ----------
    model : str
    threads : int or None
        Of both sides; None is one for each core.
    section : Section
        The rows:

        - ``inference``: ``set_input``, ``compute`` and ``get_output`` from a guest. Its baseline
          is one run of the same session with prepared IO binding, on arrays of the host.
        - ``load by name``: from a model's name to a handle and back, for a guest. Its baseline is
          a session from the same bytes.
        - ``load from bytes``: the same from bytes in guest memory, which ONNX Runtime's Python API
          makes the host copy.
        - ``file to first call``: from the guest's file to the return of its first call, with its
          machine code in the cache. Its baseline is to read and hash the file, the least that
          anyone does who runs nothing unchecked; on one thread, as a start is.
        - ``one more instance``: the same for a guest that is loaded.
    added_us : float
        Median of the paired differences of an inference, in microseconds.
    environment : Fingerprint
        Taken before the first round.
    """

    model: str
    threads: int | None
    section: Section
    added_us: float
    environment: Fingerprint

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return row_named(self.section.rows, name)

    @property
    def round_trip_ratio(self) -> Ratio:
        """An inference from a guest, over a bare one."""
        return self._ratio("inference")

    @property
    def load_ratio(self) -> Ratio:
        """A load by name, over a bare one."""
        return self._ratio("load by name")

    def _ratio(self, name: str) -> Ratio:
        paired = self.row(name).ratio
        assert paired is not None
        return paired

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.model,
            "threads": self.threads,
            **self.section.to_dict(),
            "added_us": self.added_us,
            "environment": self.environment.to_dict(),
        }

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = []
        for row in self.section.rows:
            if row.baseline is None or row.ratio is None:
                continue
            base, added = self.row(row.baseline), f", {self.added_us:+.0f} µs"
            cells.append((
                row.name,
                duration(row.summary.median_ms),
                duration(row.summary.p95_ms),
                base.name,
                duration(base.summary.median_ms),
                f"{row.ratio}{added if row.name == 'inference' else ''}",
                row.ratio.verdict,
            ))  # fmt: skip
        return cells

    def _notes(self) -> list[str]:
        noise = self.section.noise
        assert noise is not None
        return [
            f"A/A check, bare inference / itself: {noise}, {noise.verdict}",
            *(f"warning: {each}" for each in self.section.warnings),
        ]

    def __str__(self) -> str:
        columns = ("WASI-NN host", "median", "p95", "compared with", "median", "ratio", "verdict")
        return "\n".join([*text_table(columns, self._cells(), left=(0, 3, 5, 6)), *self._notes()])

    def _repr_html_(self) -> str:
        columns = ("", "median", "p95", "compared with", "its median", "ratio", "verdict")
        caption = "; ".join(["The WASI-NN host on ONNX Runtime", *self._notes()])
        return html_table(caption, columns, self._cells())


def host_table(
    model: bytes,
    *,
    name: str = "model",
    repeats: int = 200,
    threads: int | None = None,
    seed: int = 0,
) -> HostTable:
    """Time the WASI-NN host against bare ONNX Runtime with IO binding.

    Parameters
    ----------
    model : bytes
        An ONNX model with one float32 input and one float32 output. Free dimensions are set to 1.
    name : str
        How to call it.
    repeats : int
        Paired rounds.
    threads : int, optional
        Threads of both sides; the default is one for each core.
    seed : int
        Seed of the rounds' order.

    Raises
    ------
    ModelError
        If the model can't be loaded, or has other inputs or outputs.

    Notes
    -----
    Both sides run the *same* session: two sessions of one model differ by a percent or two, by how
    their weights happen to lie in memory. The input is noise; a network's time does not depend on
    it.
    """
    nn = WasiNN({name: model}, threads=threads)
    graph = nn.graph(name)
    if [i.dtype for i in (*graph.inputs, *graph.outputs)] != [np.dtype(np.float32)] * 2:
        raise ModelError(f"{name}: this benchmark needs one float32 input and one float32 output")
    shape = tuple(d if isinstance(d, int) else 1 for d in graph.inputs[0].shape)
    tensor = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    assert isinstance(graph, OnnxGraph)
    session, logits = graph.session, graph.session.run(None, {graph.inputs[0].name: tensor})[0]
    binding, result = session.io_binding(), np.empty_like(logits)
    for bind, info, array in (
        (binding.bind_input, graph.inputs[0], tensor),
        (binding.bind_output, graph.outputs[0], result),
    ):
        bind(info.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    path = guest_path("classify_nn").path
    guest = Guest(path, host=[nn])
    instance = guest.instantiate()
    classifier = Classifier(instance)
    source, dims, out = map(classifier.buffer, (tensor.nbytes, 4 * tensor.ndim, logits.nbytes))
    source.array(shape, np.float32)[:] = tensor
    dims.array(tensor.ndim, np.uint32)[:] = shape
    compute = instance.function("nn_compute")
    arguments = (
        classifier.load_graph(name), dims.pointer, tensor.ndim,
        source.pointer, tensor.nbytes, out.pointer, logits.nbytes,
    )  # fmt: skip
    if compute(*arguments) != logits.nbytes or not np.allclose(
        out.array(logits.shape, np.float32), logits, rtol=1e-4, atol=1e-4
    ):
        raise EdgelabError(f"{name}: the guest and bare ONNX Runtime disagree; please report this")

    watch = Watch(threads=threads)

    def bare_run() -> None:
        session.run_with_iobinding(binding)

    inference = interleaved(
        {
            "bare inference": bare_run,
            "inference": lambda: compute(*arguments),
            "again": bare_run,
            "read and hash": lambda: hashlib.sha256(path.read_bytes()).digest(),
            "file to first call": lambda: Guest(path, host=[nn]).instantiate().call("alloc", 16),
            "one more instance": lambda: guest.instantiate().call("alloc", 16),
        },
        repeats=repeats,
        seed=seed,
    )
    text = classifier.buffer(len(model))
    instance.memory.write(text.pointer, model)

    def load_by_name() -> None:
        nn.add_model("again", model)
        classifier.unload(classifier.load_graph("again"))

    loads = interleaved(
        {
            "bare load": lambda: onnxruntime.InferenceSession(
                model, session_options(threads), providers=["CPUExecutionProvider"]
            ),
            "load by name": load_by_name,
            "load from bytes": lambda: classifier.unload(
                instance.call("nn_load", text.pointer, len(model), int(Encoding.ONNX))
            ),
        },
        repeats=max(repeats // 4, 3),
        seed=seed,
    )
    again, bare = inference.pop("again"), inference["bare inference"]
    samples, noise = {**inference, **loads}, ratio(again, bare)
    added_us = 1e3 * float(np.median(np.subtract(inference["inference"], bare)))

    def row(name: str) -> Row:
        base = {
            "inference": "bare inference",
            "file to first call": "read and hash",
            "one more instance": "read and hash",
            "load by name": "bare load",
            "load from bytes": "bare load",
        }.get(name)
        paired = ratio(samples[name], samples[base]) if base else None
        facts: dict[str, Fact] = {"added_us": added_us} if name == "inference" else {}
        return Row(name, Summary.of(samples[name]), base, paired, facts, tuple(samples[name]))

    return HostTable(
        model=name,
        threads=threads,
        section=Section(
            "wasi_nn",
            "The WASI-NN host on ONNX Runtime, and ONNX Runtime alone",
            _subject(name, model, threads),
            tuple(map(row, samples)),
            noise,
            watch.doubts(bare, "bare inference", noise),
        ),
        added_us=added_us,
        environment=watch.environment,
    )


def kernel_section(table: KernelTable) -> Section:
    """Return a kernel table as a section of `edgelab.results`."""
    facts: dict[str, dict[str, Fact]] = {
        row.name: {
            "fuel": row.fuel,
            "instructions": row.instructions,
            "simd": row.simd,
            "relaxed_simd": row.relaxed_simd,
            "error": row.error,
        }
        for row in table.rows
    }
    sizes = ("step", "width", "height", "resize", "crop", "touched_bytes")
    return Section.of(
        table.comparison,
        name=f"kernels_{table.step}",
        title=f"Kernels that prepare a picture, one thread: {table.step}",
        settings={name: getattr(table, name) for name in sizes},
        facts=facts,
    )


_SCHEMES = ("fp16", "int8", "int8-dynamic", "int4-weights")


def quantize_sections(
    model: Model,
    folder: Path,
    *,
    repeats: int = 50,
    threads: int | None = None,
    seed: int = 0,
) -> Iterator[Section]:
    """Time a model and smaller versions of it, in ONNX Runtime and, if installed, in OpenVINO.

    The ranges of activations come from noise, which is enough to take times: how accurate such
    versions are is the matter of `edgelab.evaluate`.

    Parameters
    ----------
    model : Model
    folder : pathlib.Path
        Where the versions are kept; those that are there are taken as they are.
    repeats : int
        Paired rounds.
    threads : int, optional
        The default is one for each core.
    seed : int
        Seed of the rounds' order.

    Yields
    ------
    Section
        One for each backend.

    Raises
    ------
    ModelError
        If the model can't be quantized, or does not run.
    """
    from edgelab.evaluate import Runner
    from edgelab.quantize import quantize

    shape = (1, 3, model.spec.crop, model.spec.crop)
    noise = np.random.default_rng(0).standard_normal((8, *shape[1:]), dtype=np.float32)
    versions = {"fp32": model.data}
    for scheme in _SCHEMES:
        file = folder / f"{scheme}.onnx"
        if not file.exists():
            quantize(model, file, scheme, calibration=noise)
        versions[scheme] = file.read_bytes()
    for backend in ("onnxruntime", "openvino"):
        if find_spec(backend) is None:
            continue
        jobs: dict[str, Callable[[], Any]] = {}
        refused = []
        for name, data in versions.items():
            try:
                graph = load_graph(data, threads=threads, backend=backend)
                runner = Runner(graph, shape)
                runner.input[:] = noise[:1]
                runner.run()
                jobs[name] = runner.run
            except EdgelabError as error:
                if name == "fp32":
                    raise
                refused.append(f"{name} does not run: {one_line(error)}")
        measured = compare(jobs, baseline="fp32", repeats=repeats, seed=seed, threads=threads)
        facts: dict[str, dict[str, Fact]] = {
            name: {"size_bytes": len(versions[name])} for name in jobs
        }
        section = Section.of(
            measured,
            name=f"quantize_{backend}",
            title=f"One model in smaller numbers, {backend}",
            settings=_subject(model.spec.name, model.data, threads),
            facts=facts,
        )
        yield replace(section, warnings=(*section.warnings, *refused))


SECTIONS: Mapping[str, str] = {
    "stages": "one picture through all stages, guest against bare Python",
    "wasi_nn": "the WASI-NN host against bare ONNX Runtime",
    "kernels": "kernels that prepare a picture: Wasm, native code, NumPy, the usual libraries",
    "quantize": "the model in float16, int8 and int4; needs edgelab[quantize] (not in the default)",
}
"""What `run` can measure, in this order."""

DEFAULT_SECTIONS = ("stages", "wasi_nn", "kernels")


def run(
    sections: Sequence[str] = DEFAULT_SECTIONS,
    *,
    model: str | Path = "signs",
    image: Path | None = None,
    repeats: int = 200,
    threads: int | None = None,
    seed: int = 0,
    scratch: Path | None = None,
) -> Iterator[tuple[object, Section]]:
    """Measure one section after the other.

    Parameters
    ----------
    sections : sequence of str
        Names from `SECTIONS`.
    model : str or pathlib.Path
        What `Pipeline` takes.
    image : pathlib.Path, optional
        Picture for the stages and the kernels; the default is the shipped one.
    repeats : int
        Paired rounds; of the kernels, which are timed in blocks, a quarter.
    threads : int, optional
        Inference threads; the default is one for each core.
    seed : int
        Seed of the rounds' order.
    scratch : pathlib.Path, optional
        Folder for quantized models, which several runs may share; the default is one of its own.

    Yields
    ------
    table, section : object, Section
        As soon as they are measured: one to be shown, one for `edgelab.results.Results`.

    Raises
    ------
    EdgelabError
        If a section has no such name, or something can't be loaded or run.
    """
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise EdgelabError(f"no section {unknown[0]!r}; the sections are {', '.join(SECTIONS)}")
    picture = image or example_image()
    if {"stages", "wasi_nn", "quantize"} & set(sections):
        pipeline = Pipeline(model, threads=threads)
    if "stages" in sections:
        stages = stage_table(pipeline, picture, repeats=repeats, threads=threads, seed=seed)
        yield stages, stages.section
        if not stages.same_label:
            raise EdgelabError("the guest and bare Python see different labels; please report this")
    if "wasi_nn" in sections:
        data, name = pipeline.model.data, pipeline.model.spec.name
        host = host_table(data, name=name, repeats=repeats, threads=threads, seed=seed)
        yield host, host.section
    if "kernels" in sections:
        for step in KERNEL_STEPS:
            kernels = kernel_table(picture, step=step, repeats=max(repeats // 4, 3), seed=seed)
            yield kernels, kernel_section(kernels)
    if "quantize" in sections:
        with tempfile.TemporaryDirectory(prefix="edgelab-bench-") as own:
            for section in quantize_sections(
                pipeline.model, scratch or Path(own), repeats=max(repeats // 4, 3),
                threads=threads, seed=seed,
            ):  # fmt: skip
                yield section, section


def in_processes(count: int, arguments: Sequence[str], *, progress: bool = False) -> Results:
    """Run the benchmark in fresh processes, one after the other, and put the results together.

    Parameters
    ----------
    count : int
        Processes.
    arguments : sequence of str
        For ``python -m edgelab bench``, without ``--json``, ``--processes`` and ``--seed``.
    progress : bool
        Say on stderr which process runs.

    Raises
    ------
    EdgelabError
        If one of them fails, with what it said.
    """
    runs = []
    with tempfile.TemporaryDirectory(prefix="edgelab-bench-") as folder:
        for place in range(count):
            if progress:
                print(f"process {place + 1} of {count} ...", end="\r", file=sys.stderr, flush=True)
            file = Path(folder, f"{place}.json")
            command = [
                sys.executable, "-m", "edgelab", "bench", *arguments, "--processes", "1",
                "--seed", str(place), "--json", str(file), "--scratch", folder,
            ]  # fmt: skip
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                errors="replace", check=False,
            )  # fmt: skip
            if done.returncode != 0:
                said = done.stderr.strip().removeprefix("edgelab: error: ")
                raise EdgelabError(said or f"a process ended with {done.returncode}")
            runs.append(read(file))
    return merge(runs)
