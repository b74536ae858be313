"""Image in, label out: decode, preprocess in the guest, infer through WASI-NN, postprocess."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab import images, models
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import ModelError
from edgelab.runtime import Guest, Limits
from edgelab.wasinn import WasiNN
from edgelab.wasinn.backends import Graph

STAGES = ("decode", "preprocess", "infer", "postprocess")
"""What an image passes, in this order."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label with its probability (0 … 1) and class index."""

    label: str
    probability: float
    index: int


@dataclass(frozen=True, slots=True)
class Classification:
    """What a model sees in one image, and how long each stage took.

    Attributes
    ----------
    top : tuple of Prediction
        Most probable first.
    decode_ms, preprocess_ms, infer_ms, postprocess_ms : float
        Wall time of one single run, in milliseconds. To compare, repeat: `edgelab.measure`.
    """

    top: tuple[Prediction, ...]
    decode_ms: float
    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.top[0].label

    @property
    def total_ms(self) -> float:
        """Sum of the stages, in milliseconds."""
        return self.decode_ms + self.preprocess_ms + self.infer_ms + self.postprocess_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "total_ms": self.total_ms}

    def __repr__(self) -> str:
        top = ", ".join(f"{p.label} {p.probability:.1%}" for p in self.top)
        return f"Classification({top})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(p.label)}</td><td>{p.probability:.1%}</td></tr>" for p in self.top
        )
        return (
            "<table><caption>What the model sees</caption>"
            f"<tr><th>label</th><th>probability</th></tr>{rows}</table>"
        )


class Pipeline:
    """Classify images with a guest that preprocesses, infers through WASI-NN, and postprocesses.

    Parameters
    ----------
    model : str, pathlib.Path or edgelab.models.Model
        A registry name, a path to an ONNX file with a spec in its metadata, or a loaded model.
    kernel : {"simd128", "relaxed_simd", "scalar"}
        Which normalise kernel the guest uses.
    threads : int, optional
        Threads of the inference backend; the default is the number of cores.
    limits : edgelab.runtime.Limits, optional
        What the guest may use.

    Raises
    ------
    ModelError
        If the model can't be loaded, or contradicts its spec.
    DownloadError
        If it had to be downloaded and could not.
    BuildError, ToolchainError
        If there is no guest, and none can be built.

    Notes
    -----
    Not for several threads at once: make a `replica` for each thread, or use `edgelab.Pool`.

    Examples
    --------
    >>> from edgelab.datasets import Signs
    >>> sample = Signs("test", 10)[9]
    >>> Pipeline("signs").classify(sample.image).label
    'stop'
    """

    def __init__(
        self,
        model: str | Path | models.Model = "signs",
        *,
        kernel: str = "simd128",
        threads: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model = model if isinstance(model, models.Model) else models.load(model)
        self.kernel = kernel
        self.nn = WasiNN({self.model.spec.name: self.model.data}, threads=threads)
        graph = self.nn.graph(self.model.spec.name)
        _require_fit(graph, self.model.spec)
        graph.metadata.update(self.model.spec.to_metadata())  # so that the host can explain
        self.guest = Guest(guest_path("classify_nn").path, host=[self.nn])
        self.classifier = Classifier(self.guest.instantiate(limits=limits))
        self._graph = self.classifier.load_graph(self.model.spec.name)

    def replica(self, *, limits: Limits | None = None) -> Pipeline:
        """Return a pipeline for another thread: its own instance, the same model and guest code.

        Parameters
        ----------
        limits : edgelab.runtime.Limits, optional
            The default is what this pipeline has.
        """
        other = copy.copy(self)
        limits = limits or self.classifier.instance.limits
        other.classifier = Classifier(self.guest.instantiate(limits=limits))
        other._graph = other.classifier.load_graph(self.model.spec.name)
        return other

    @property
    def stopped(self) -> str | None:
        """Why this pipeline can't run any more (a trap or a limit); None while it can."""
        return self.classifier.instance.stopped

    def classify(
        self, image: bytes | str | Path | NDArray[np.uint8], top: int = 3
    ) -> Classification:
        """Classify one image.

        Parameters
        ----------
        image : bytes, str, pathlib.Path or numpy.ndarray
            An encoded image, a path to one, or ``uint8`` RGB pixels ``(height, width, 3)``.
        top : int
            How many labels to return, at most the number of classes.

        Raises
        ------
        ImageError
            If the image can't be decoded.
        GuestError
            If the guest refuses it, or runs out of memory or time.
        """
        spec, clock = self.model.spec, time.perf_counter
        begin = clock()
        pixels = images.decode(image)
        decoded = clock()
        tensor = self.classifier.preprocess(pixels, spec, self.kernel)
        preprocessed = clock()
        logits = self.classifier.compute(self._graph, tensor, len(spec.labels))
        inferred = clock()
        best = self.classifier.top_k(logits, min(top, len(spec.labels)))
        labelled = tuple(Prediction(spec.labels[i], p, i) for i, p in best)
        end = clock()
        return Classification(
            labelled,
            decode_ms=(decoded - begin) * 1e3,
            preprocess_ms=(preprocessed - decoded) * 1e3,
            infer_ms=(inferred - preprocessed) * 1e3,
            postprocess_ms=(end - inferred) * 1e3,
        )

    def logits(self, image: bytes | str | Path | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the model's raw outputs for one image; ``float32``, ``(classes,)``."""
        spec = self.model.spec
        tensor = self.classifier.preprocess(images.decode(image), spec, self.kernel)
        return np.array(self.classifier.compute(self._graph, tensor, len(spec.labels)))

    def infer(self, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the model on inputs that are prepared already, one at a time.

        Parameters
        ----------
        tensors : numpy.ndarray
            ``float32``, ``(n, 3, crop, crop)``, normalised.

        Returns
        -------
        numpy.ndarray
            ``float32``, ``(n, classes)``.

        Raises
        ------
        GuestError
            If the model refuses them.
        """
        logits = np.empty((len(tensors), len(self.model.spec.labels)), np.float32)
        for row, tensor in zip(logits, tensors, strict=True):
            row[:] = self.classifier.compute(self._graph, tensor[None], logits.shape[1])
        return logits

    def __repr__(self) -> str:
        return f"Pipeline({self.model.spec.name!r}, kernel={self.kernel!r})"


def _require_fit(graph: Graph, spec: models.Spec) -> None:
    """Raise ModelError if what the model takes or gives is not what its spec says."""
    given = (1, 3, spec.crop, spec.crop)
    fits = [info.dtype == np.float32 and info.accepts(given) for info in graph.inputs]
    if fits != [True]:
        shapes = ", ".join(f"{info.dtype} {list(info.shape)}" for info in graph.inputs)
        raise ModelError(
            f"model {spec.name!r} takes {shapes or 'nothing'}; by its spec it should take float32 "
            f"{list(given)}. Is its layout NHWC instead of NCHW, or the crop in its spec wrong?"
        )
    classes = graph.outputs[0].shape[-1:]
    if classes and isinstance(classes[0], int) and classes[0] != len(spec.labels):
        raise ModelError(
            f"model {spec.name!r} gives {classes[0]} outputs for {len(spec.labels)} labels. "
            "Is the list of labels another model's?"
        )
