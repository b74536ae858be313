"""What runs a model. A backend turns model bytes into a graph; a graph makes contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import ModelError
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

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`, C-contiguous; valid until the next one."""


class Graph(Protocol):
    """A loaded model. May be shared by contexts in several threads."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: dict[str, str]

    def context(self) -> Context:
        """Prepare an execution."""


def load_graph(
    *parts: bytes,
    threads: int | None = None,
    claimed: Encoding = Encoding.AUTODETECT,
    backend: str | None = None,
) -> Graph:
    """Load a model with the backend for its format.

    Parameters
    ----------
    *parts : bytes
        The model's files: one for ONNX.
    threads : int, optional
        Threads for one operator.
    claimed : Encoding
        What the guest says. The bytes decide; the claim is only named in the message (E3).
    backend : str, optional
        Which backend to prefer, where several run the format.

    Raises
    ------
    ModelError
        If no backend takes the format, or the model is damaged.
    """
    kind = sniff(parts[0])
    if kind == "onnx" and len(parts) == 1:
        from edgelab.wasinn.backends.onnx import OnnxGraph

        return OnnxGraph(parts[0], threads)
    raise ModelError(
        f"E3: the guest says {claimed.name.lower()}, the {len(parts)} part(s) look like {kind}; "
        "this host runs ONNX models of one part. Convert the model to ONNX."
    )


def sniff(data: bytes) -> str:
    """Name the format of a model from its bytes, whatever anybody says it is.

    Returns
    -------
    str
        ``"onnx"``, ``"openvino"``, ``"tensorflowlite"``, ``"pytorch"``, ``"gguf"``, ``"ort"`` or
        ``"unknown"``.
    """
    from edgelab.wasinn.backends.onnx import looks_like_onnx

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
    return "onnx" if looks_like_onnx(data) else "unknown"
