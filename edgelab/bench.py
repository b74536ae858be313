"""Two tables of paired timings, guest against bare Python in turns.

`stage_table` takes one picture through all stages. Its baseline does the same work without Wasm:
Pillow decodes, `edgelab.preprocess` prepares with Pillow and NumPy, ONNX Runtime infers with the
same session options, NumPy takes the softmax. `host_table` looks at the WASI-NN host alone.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgelab import images, preprocess
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import EdgelabError, ModelError
from edgelab.measure import Fingerprint, Ratio, Summary, fingerprint, interleaved, ratio
from edgelab.models import models_dir
from edgelab.pipeline import STAGES, Classification, Pipeline, Prediction
from edgelab.runtime import Guest
from edgelab.wasinn import Encoding, WasiNN
from edgelab.wasinn.backends.onnx import OnnxGraph, session_options


@dataclass(frozen=True, slots=True)
class StageTable:
    """Stage timings of the guest's path and of bare Python's, from the same rounds.

    Attributes
    ----------
    guest, bare : dict of str to Summary
        By stage, and ``total``.
    total_ratio : Ratio
        Guest's total over bare Python's.
    same_label : bool
        Whether both paths see the same label.
    classification : Classification
        The guest's last answer.
    environment : Fingerprint
    """

    guest: dict[str, Summary]
    bare: dict[str, Summary]
    total_ratio: Ratio
    same_label: bool
    classification: Classification
    environment: Fingerprint

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{'stage':<12} {'guest median':>13} {'p95':>8} {'bare median':>13} {'p95':>8}"
        lines = [head, "-" * len(head)]
        for stage in (*STAGES, "total"):
            guest, bare = self.guest[stage], self.bare[stage]
            lines.append(
                f"{stage:<12} {guest.median_ms:>10.2f} ms {guest.p95_ms:>8.2f} "
                f"{bare.median_ms:>10.2f} ms {bare.p95_ms:>8.2f}"
            )
        lines.append(
            f"total, guest / bare: {self.total_ratio} (median and 95 % interval of "
            f"{self.guest['total'].count} paired rounds)"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{stage}</td>"
            + "".join(
                f"<td>{summary.median_ms:.2f}</td><td>{summary.p95_ms:.2f}</td>"
                for summary in (self.guest[stage], self.bare[stage])
            )
            + "</tr>"
            for stage in (*STAGES, "total")
        )
        return (
            f"<table><caption>Milliseconds; total guest / bare: {self.total_ratio}</caption>"
            "<tr><th>stage</th><th>guest median</th><th>p95</th><th>bare median</th><th>p95</th>"
            f"</tr>{rows}</table>"
        )


EXAMPLE_LABEL = "stop"
"""What the shipped picture shows."""


def example_image() -> Path:
    """Path of the picture that ships with the embedded model: a rendered sign, JPEG."""
    return models_dir() / "signs" / "example.jpg"


def stage_table(
    pipeline: Pipeline, image: bytes | str | Path, *, repeats: int = 50, threads: int | None = None
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

    Raises
    ------
    ImageError
        If the image can't be decoded.
    """
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    bare_path = _BarePath(pipeline, threads)
    guest_runs: list[Classification] = []
    bare_runs: list[Classification] = []
    samples = interleaved(
        {
            "guest": lambda: guest_runs.append(pipeline.classify(encoded)),
            "bare": lambda: bare_runs.append(bare_path.classify(encoded)),
        },
        repeats=repeats,
    )
    return StageTable(
        guest=_summaries(guest_runs[-repeats:]),
        bare=_summaries(bare_runs[-repeats:]),
        total_ratio=ratio(samples["guest"], samples["bare"]),
        same_label=guest_runs[-1].label == bare_runs[-1].label,
        classification=guest_runs[-1],
        environment=fingerprint(),
    )


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


def _summaries(runs: list[Classification]) -> dict[str, Summary]:
    return {
        stage: Summary.of([getattr(run, f"{stage}_ms") for run in runs])
        for stage in (*STAGES, "total")
    }


@dataclass(frozen=True, slots=True)
class HostTable:
    """What the WASI-NN host adds to ONNX Runtime, from the same rounds.

    Attributes
    ----------
    model : str
    threads : int or None
        Of both sides; None is one for each core.
    round_trip, bare_run : Summary
        ``set_input``, ``compute`` and ``get_output`` from a guest; and one run of the same session
        with prepared IO binding, on arrays of the host.
    round_trip_ratio : Ratio
        Guest over bare.
    added_us : float
        Median of the paired differences, in microseconds.
    load, bare_load : Summary
        From a model's name to a handle and back, for a guest; and a session from the same bytes.
    load_ratio : Ratio
    load_bytes : Summary
        The same from bytes in guest memory, which ONNX Runtime's Python API makes the host copy.
    load_bytes_ratio : Ratio
        To `bare_load`.
    start, instantiate : Summary
        From the guest's file to the return of its first call, with its machine code in the cache;
        and the same for one more instance of a guest that is loaded.
    environment : Fingerprint
    """

    model: str
    threads: int | None
    round_trip: Summary
    bare_run: Summary
    round_trip_ratio: Ratio
    added_us: float
    load: Summary
    bare_load: Summary
    load_ratio: Ratio
    load_bytes: Summary
    load_bytes_ratio: Ratio
    start: Summary
    instantiate: Summary
    environment: Fingerprint

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, Summary, Summary | None, str]]:
        paired = f"{self.round_trip_ratio}, {self.added_us:+.0f} us"
        return [
            ("inference", self.round_trip, self.bare_run, paired),
            ("load by name", self.load, self.bare_load, f"{self.load_ratio}"),
            ("load from bytes", self.load_bytes, self.bare_load, f"{self.load_bytes_ratio}"),
            ("file to first call", self.start, None, ""),
            ("one more instance", self.instantiate, None, ""),
        ]

    def __str__(self) -> str:
        columns = f"{'guest median':>13} {'p95':>8} {'bare median':>13}  guest / bare"
        head = f"{'WASI-NN host':<20} {columns}"
        lines = [head, "-" * len(head)]
        for name, guest, bare, paired in self._rows():
            other = f"{bare.median_ms:>10.3f} ms" if bare else " " * 13
            lines.append(
                f"{name:<20} {guest.median_ms:>10.3f} ms {guest.p95_ms:>8.3f} {other}  {paired}"
            )
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{guest.median_ms:.3f}</td><td>{guest.p95_ms:.3f}</td>"
            f"<td>{f'{bare.median_ms:.3f}' if bare else ''}</td><td>{paired}</td></tr>"
            for name, guest, bare, paired in self._rows()
        )
        return (
            "<table><caption>The WASI-NN host on ONNX Runtime, in milliseconds</caption>"
            "<tr><th></th><th>guest median</th><th>p95</th><th>bare median</th>"
            f"<th>guest / bare</th></tr>{rows}</table>"
        )


def host_table(
    model: bytes, *, name: str = "model", repeats: int = 200, threads: int | None = None
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

    inference = interleaved(
        {
            "guest": lambda: compute(*arguments),
            "bare": lambda: session.run_with_iobinding(binding),
        },
        repeats=repeats,
    )
    text = classifier.buffer(len(model))
    instance.memory.write(text.pointer, model)

    def load_by_name() -> None:
        nn.add_model("again", model)
        classifier.unload(classifier.load_graph("again"))

    load = interleaved(
        {
            "bare": lambda: onnxruntime.InferenceSession(
                model, session_options(threads), providers=["CPUExecutionProvider"]
            ),
            "name": load_by_name,
            "bytes": lambda: classifier.unload(
                instance.call("nn_load", text.pointer, len(model), int(Encoding.ONNX))
            ),
        },
        repeats=max(repeats // 4, 3),
    )
    start = interleaved(
        {
            "file": lambda: Guest(path, host=[nn]).instantiate().call("alloc", 16),
            "instance": lambda: guest.instantiate().call("alloc", 16),
        },
        repeats=repeats,
    )
    return HostTable(
        model=name,
        threads=threads,
        round_trip=Summary.of(inference["guest"]),
        bare_run=Summary.of(inference["bare"]),
        round_trip_ratio=ratio(inference["guest"], inference["bare"]),
        added_us=1e3 * float(np.median(np.subtract(inference["guest"], inference["bare"]))),
        load=Summary.of(load["name"]),
        bare_load=Summary.of(load["bare"]),
        load_ratio=ratio(load["name"], load["bare"]),
        load_bytes=Summary.of(load["bytes"]),
        load_bytes_ratio=ratio(load["bytes"], load["bare"]),
        start=Summary.of(start["file"]),
        instantiate=Summary.of(start["instance"]),
        environment=fingerprint(),
    )
