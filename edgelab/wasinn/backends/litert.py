"""LiteRT (TensorFlow Lite) behind WASI-NN, copying inputs to where the interpreter wants them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab.aot import available_cores
from edgelab.errors import ModelError, one_line
from edgelab.wasinn.backends import TensorInfo, view

_DTYPES = frozenset(
    np.dtype(kind)
    for kind in (
        np.float16, np.float32, np.float64, np.uint8, np.int8, np.int32, np.int64, np.bool_
    )
)  # fmt: skip


class LiteRtGraph:
    """A TFLite model. LiteRT's interpreters can't be shared, so each context has its own.

    Parameters
    ----------
    model : bytes
        A whole ``.tflite`` file.
    threads : int, optional
        Threads for one operator. The default is the number of cores that this process may use.

    Raises
    ------
    ModelError
        If LiteRT refuses the model.
    ImportError
        If LiteRT is not installed.

    Notes
    -----
    Contexts share the model's bytes; each has its own tensors, and weights in the order that the
    kernels want.
    """

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = functools.partial(
            Interpreter, model_content=model, num_threads=threads or available_cores()
        )
        try:
            interpreter = self._interpreter()
            interpreter.allocate_tensors()  # finds what it can't run
            self.inputs = tuple(_info(details) for details in interpreter.get_input_details())
            self.outputs = tuple(_info(details) for details in interpreter.get_output_details())
            self.metadata = _metadata(model)
        except Exception as error:  # ValueError, RuntimeError, UnicodeDecodeError and others
            raise ModelError(f"E3: LiteRT refused the model: {one_line(error)}") from None
        self._spare = [interpreter]  # for the first context

    def context(self) -> LiteRtContext:
        """Prepare an execution."""
        try:
            return LiteRtContext(self, self._spare.pop())
        except IndexError:
            return LiteRtContext(self, self._interpreter())


class LiteRtContext:
    """One interpreter. Each ``compute`` copies the inputs in and the outputs out."""

    def __init__(self, graph: LiteRtGraph, interpreter: Any) -> None:
        self._graph, self._interpreter = graph, interpreter
        details = interpreter.get_input_details()
        self._places = [detail["index"] for detail in details]
        self._shapes = [tuple(int(d) for d in detail["shape"]) for detail in details]
        self._sources = [detail["index"] for detail in interpreter.get_output_details()]
        self._inputs: dict[int, NDArray[Any]] = {}
        self._outputs: list[NDArray[Any]] = []
        self._prepared = False

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Read input `index` from host memory at `address` on each `compute`."""
        self._inputs[index] = view(address, shape, dtype)

    def compute(self) -> None:
        """Run the model on the bound inputs.

        Raises
        ------
        ModelError
            If LiteRT fails.
        """
        try:
            for index, array in self._inputs.items():
                if array.shape != self._shapes[index]:
                    self._interpreter.resize_tensor_input(
                        self._places[index], array.shape, strict=True
                    )
                    self._shapes[index], self._prepared = array.shape, False
            if not self._prepared:
                self._interpreter.allocate_tensors()
                self._prepared = True
            for index, array in self._inputs.items():
                self._interpreter.set_tensor(self._places[index], array)
            self._interpreter.invoke()
            self._outputs = [
                np.empty(0, np.uint8)
                if info.dtype is None
                else self._interpreter.get_tensor(source)
                for info, source in zip(self._graph.outputs, self._sources, strict=True)
            ]
        except Exception as error:
            raise ModelError(f"LiteRT failed: {one_line(error)}") from None

    def stop(self) -> None:
        """Do nothing: an interpreter can't be stopped. In a worker it can."""

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`; empty if its type has no NumPy form."""
        return self._outputs[index]


def _info(details: dict[str, Any]) -> TensorInfo:
    dtype = np.dtype(details["dtype"])
    return TensorInfo(
        details["name"],
        dtype if dtype in _DTYPES else None,
        tuple(int(d) if d >= 0 else None for d in details["shape_signature"]),
    )


def _metadata(model: bytes) -> dict[str, str]:
    """Read the metadata that are text. LiteRT has verified the offsets that lead to them."""
    from ai_edge_litert import schema_py_generated

    root = schema_py_generated.Model.GetRootAs(model)
    metadata = {}
    for entry in map(root.Metadata, range(root.MetadataLength())):
        if entry.Name() and entry.Buffer() < root.BuffersLength():
            data = root.Buffers(entry.Buffer())
            with contextlib.suppress(UnicodeDecodeError):  # binary
                value = data.DataAsNumpy().tobytes() if data.DataLength() else b""
                metadata[entry.Name().decode()] = value.decode().rstrip("\0")
    return metadata
