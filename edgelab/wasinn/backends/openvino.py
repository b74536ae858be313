"""OpenVINO behind WASI-NN, reading tensors where the guest keeps them."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab.aot import available_cores
from edgelab.errors import ModelError, one_line
from edgelab.wasinn.backends import TensorInfo, view
from edgelab.wasinn.backends.onnx import check_onnx

_DTYPES = {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "u8": np.uint8,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
    "boolean": np.bool_,
}
# Where in OpenVINO's sources an error comes from.
_TRACE = re.compile(r"Exception from \S+:\d+:|Check '[^\n]*' failed at \S+:\d+:")


class OpenVinoGraph:
    """A model that OpenVINO has compiled for the CPU, once for all contexts.

    Parameters
    ----------
    *parts : bytes
        OpenVINO IR, first the ``.xml``, then the ``.bin``; or one whole ONNX model.
    threads : int, optional
        Threads for one inference. The default is the number of cores that this process may use.

    Raises
    ------
    ModelError
        If OpenVINO refuses the model.
    ImportError
        If OpenVINO is not installed.

    Notes
    -----
    float16 and float32 are computed in float32, so that a CPU with bfloat16 gives the same numbers
    as others. OpenVINO's CPU plugin also computes float64 in float32, and int64 in int32: a value
    that does not fit becomes another number. In an input that is an error here; what a model has
    inside can't be seen.
    """

    def __init__(self, *parts: bytes, threads: int | None = None) -> None:
        if len(parts) == 1:
            check_onnx(parts[0])
        core = _core()
        try:
            model = core.read_model(*parts)
            self._compiled = core.compile_model(
                model,
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": threads or available_cores(),
                    "INFERENCE_PRECISION_HINT": "f32",
                    "ENABLE_CPU_PINNING": False,  # several graphs would share the first cores
                },
            )
            self.inputs = tuple(_info(port) for port in model.inputs)
            self.outputs = tuple(_info(port) for port in model.outputs)
            self.metadata = _metadata(model)
            # OpenVINO can view its outputs, or copies them all; strings it can only copy.
            self._plain = all(info.dtype is not None for info in self.outputs)
        except Exception as error:  # RuntimeError, UnicodeDecodeError and others
            raise ModelError(f"E3: OpenVINO refused the model: {_reason(error)}") from None

    def context(self) -> OpenVinoContext:
        """Prepare an execution."""
        return OpenVinoContext(self)


class OpenVinoContext:
    """One infer request: inputs read from where they are, outputs viewed."""

    def __init__(self, graph: OpenVinoGraph) -> None:
        self._graph = graph
        self._request = graph._compiled.create_infer_request()
        self._inputs: dict[int, NDArray[Any]] = {}
        self._outputs: list[NDArray[Any]] = []

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Read input `index` from host memory at `address` on each `compute`, without a copy."""
        import openvino

        array = view(address, shape, dtype)
        self._request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
        self._inputs[index] = array

    def compute(self) -> None:
        """Run the model on the bound inputs.

        Raises
        ------
        ModelError
            If OpenVINO fails, or an int64 input has values that it would change.
        """
        for index, array in self._inputs.items():
            if not _fits(array):
                raise ModelError(
                    f"input {self._graph.inputs[index].name!r} has values beyond 32 bits, and "
                    "OpenVINO computes int64 in int32. Use ONNX Runtime for this model"
                )
        try:
            self._request.infer(share_outputs=self._graph._plain)
        except Exception as error:
            raise ModelError(f"OpenVINO failed: {_reason(error)}") from None
        self._outputs = [self._view(index) for index in range(len(self._graph.outputs))]

    def _view(self, index: int) -> NDArray[Any]:
        if self._graph.outputs[index].dtype is None:
            return np.empty(0)
        array: NDArray[Any] = self._request.get_output_tensor(index).data
        # A model may return an input as it is. The guest's memory can change or move from now on.
        if any(np.may_share_memory(array, given) for given in self._inputs.values()):
            array = array.copy()
        return array

    def stop(self) -> None:
        """Do nothing: an inference here can't be stopped. In a worker it can."""

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`; empty if its type has no NumPy form."""
        return self._outputs[index]


@functools.cache
def _core() -> Any:
    """Start OpenVINO, once for the process."""
    # Importing OpenVINO imports its telemetry, which sends a message and writes to the home folder.
    # Without that package, it does neither.
    name = "openvino_telemetry"
    blocked = name not in sys.modules
    if blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if blocked:
            sys.modules.pop(name, None)
    return openvino.Core()


def _info(port: Any) -> TensorInfo:
    name = port.node.friendly_name
    # An input also has the names of tensors that were merged into it; its node kept its own.
    if port.names and name not in port.names:
        name = port.any_name
    kind = _DTYPES.get(port.element_type.get_type_name())
    return TensorInfo(
        name,
        None if kind is None else np.dtype(kind),
        tuple(d.get_length() if d.is_static else None for d in port.partial_shape),
    )


def _metadata(model: Any) -> dict[str, str]:
    """Read what the model says of itself: ONNX metadata are under "framework", also in IR."""
    metadata = {}
    for section in ("model_info", "framework"):
        if model.has_rt_info(section):
            values = model.get_rt_info(section).value
            if isinstance(values, dict):
                metadata.update({k: v for k, v in values.items() if isinstance(v, str)})
    return metadata


def _fits(array: NDArray[Any]) -> bool:
    """Tell whether values stay what they are in the types that OpenVINO computes in."""
    if array.dtype != np.int64 or not array.size:
        return True
    limits = np.iinfo(np.int32)
    return bool(limits.min <= array.min() and array.max() <= limits.max)


def _reason(error: Exception) -> str:
    return one_line(Exception(_TRACE.sub("", str(error))))
