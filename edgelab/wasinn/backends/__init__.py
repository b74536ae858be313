"""What runs a model. A backend turns model bytes into a graph; a graph makes contexts."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import ModelError, one_line
from edgelab.wasinn.abi import Encoding


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a model.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype or None
        None for types that have no NumPy form, such as strings.
    shape : tuple
        An int for a fixed dimension, a str or None for a free one.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of `shape` fits: as many dimensions, the fixed ones equal."""
        return len(shape) == len(self.shape) and all(
            want == got or not isinstance(want, int)
            for want, got in zip(self.shape, shape, strict=True)
        )


class Context(Protocol):
    """One execution in progress, used by one thread at a time."""

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Read input `index` from host memory at `address` on each `compute`, without a copy."""

    def compute(self) -> None:
        """Run the model on the bound inputs."""

    def stop(self) -> None:
        """Make a `compute` that runs in another thread fail soon, if the library can do that."""

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`, C-contiguous; valid until the next one."""


class Graph(Protocol):
    """A loaded model. May be shared by contexts in several threads."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: dict[str, str]

    def context(self) -> Context:
        """Prepare an execution."""


def view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View host memory as an array. The caller sees to it that the memory is there."""
    memory: Any = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    array: NDArray[Any] = np.ndarray(shape, dtype, memory)
    return array


# What runs a format; the first by default.
_RUNS = {
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "tensorflowlite": ("litert",),
}
# Libraries that a damaged model can crash (tests/test_backends.py has such models).
_FRAGILE = ("openvino", "litert")
_CURES = {
    "pytorch": "export it to ONNX: torch.onnx.export(model, inputs, 'model.onnx')",
    "tensorflow": "convert it to ONNX: python -m tf2onnx.convert --saved-model FOLDER --output "
    "model.onnx; or to TFLite: tf.lite.TFLiteConverter.from_saved_model(FOLDER).convert()",
    "ort": "pass the .onnx file that it was made from",
    "gguf": "it holds a language model for llama.cpp, and can't be converted",
    "unknown": "look at the file; it is damaged, cut off, or in another format",
}


def load_graph(
    *parts: bytes,
    threads: int | None = None,
    claimed: Encoding = Encoding.AUTODETECT,
    backend: str | None = None,
    trusted: bool = True,
) -> Graph:
    """Load a model with the backend for its format.

    Parameters
    ----------
    *parts : bytes
        The model's files: one for ONNX and TFLite; for OpenVINO IR the ``.xml``, then the ``.bin``.
    threads : int, optional
        Threads for one operator. The default is the number of cores that this process may use.
    claimed : Encoding
        What the guest says. The bytes decide; the claim is only named in the message (E3).
    backend : {"onnxruntime", "openvino", "litert"}, optional
        What runs the model, if several can: ONNX runs in ONNX Runtime, or in OpenVINO.
    trusted : bool
        Whether you know who made the model. If not, backends that a damaged model can crash
        (OpenVINO, LiteRT) run in a process of their own, within limits: see
        `edgelab.wasinn.backends.worker`.

    Raises
    ------
    ModelError
        If no backend takes the format, the backend is not installed, or the model is damaged.
    """
    kinds = [sniff(part) for part in parts]
    claim = "" if claimed is Encoding.AUTODETECT else f"the guest says {claimed.name.lower()}, "
    what = f"E3: {claim}the {len(parts)} part(s) look like {' + '.join(kinds) or 'nothing'}"
    kind = "openvino" if "openvino" in kinds else kinds[0] if kinds else "unknown"
    if kind not in _RUNS:
        known = "ONNX, OpenVINO IR and TFLite"
        raise ModelError(f"{what}; this host runs {known}. Cure: {_CURES[kind]}")
    if kind == "openvino":
        if len(parts) != 2 or kinds.index("openvino") or kinds.count("openvino") != 1:
            raise ModelError(f"{what}; OpenVINO IR has two parts: first the .xml, then the .bin")
    elif len(parts) != 1:
        raise ModelError(f"{what}; such a model has one part")
    runs = _RUNS[kind]
    if backend is not None and backend not in runs:
        raise ModelError(f"{what}, which {backend} does not run here; {' and '.join(runs)} can")
    backend = backend or runs[0]
    try:
        if backend in _FRAGILE and not trusted:
            from edgelab.wasinn.backends.worker import WorkerGraph

            return WorkerGraph(*parts, backend=backend, threads=threads)
        return open_graph(backend, *parts, threads=threads)
    except ImportError as error:
        raise ModelError(
            f"{what}, and {backend} is missing ({one_line(error)}). "
            f"Cure: pip install 'edgelab[{backend}]'"
        ) from None
    except ModelError as error:
        raise ModelError(f"{what}; {str(error).removeprefix('E3: ')}") from None


def open_graph(backend: str, *parts: bytes, threads: int | None) -> Graph:
    """Load a model with this backend, in this process."""
    if backend == "onnxruntime":
        from edgelab.wasinn.backends.onnx import OnnxGraph

        return OnnxGraph(parts[0], threads)
    if backend == "openvino":
        from edgelab.wasinn.backends.openvino import OpenVinoGraph

        return OpenVinoGraph(*parts, threads=threads)
    from edgelab.wasinn.backends.litert import LiteRtGraph

    return LiteRtGraph(parts[0], threads)


def sniff(data: bytes) -> str:
    """Name the format of a model from its bytes, whatever anybody says it is.

    Returns
    -------
    str
        ``"onnx"``, ``"openvino"``, ``"tensorflowlite"``, ``"tensorflow"``, ``"pytorch"``,
        ``"gguf"``, ``"ort"`` or ``"unknown"``.
    """
    from edgelab.wasinn.backends.onnx import looks_like_onnx, outer_fields

    if data[4:8] == b"TFL3":
        return "tensorflowlite"
    if data[4:8] == b"ORTM":
        return "ort"
    if data[:4] == b"GGUF":
        return "gguf"
    if data[:4] == b"PK\x03\x04":
        return "pytorch"
    if data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<?xml", b"<net")):
        return "openvino"
    if looks_like_onnx(data):
        return "onnx"
    fields = outer_fields(data)
    saved_model = fields == {1: 0, 2: 2}  # a version and graphs
    frozen_graph = fields.get(1) == fields.get(4) == 2 and set(fields) <= {1, 2, 3, 4}
    return "tensorflow" if saved_model or frozen_graph else "unknown"
