"""The stage table: one picture through the guest and through bare Python, in turns.

The baseline does the same work without Wasm: Pillow decodes, `edgelab.preprocess` prepares with
Pillow and NumPy, ONNX Runtime infers with the same session options, NumPy takes the softmax.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgelab import images, preprocess
from edgelab.measure import Fingerprint, Ratio, Summary, fingerprint, interleaved, ratio
from edgelab.models import models_dir
from edgelab.pipeline import STAGES, Classification, Pipeline, Prediction
from edgelab.wasinn.backends.onnx import session_options


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
