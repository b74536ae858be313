"""ONNX Runtime behind WASI-NN, reading tensors where the guest keeps them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab.aot import available_cores
from edgelab.errors import ModelError, one_line
from edgelab.wasinn.backends import TensorInfo

_DTYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OnnxGraph:
    """An ONNX model in an ONNX Runtime session.

    Parameters
    ----------
    model : bytes
        A whole ONNX model. Weights in other files are refused: a model from a guest must not make
        the host open paths.
    threads : int, optional
        Threads for one operator. The default is the number of cores that this process may use.

    Attributes
    ----------
    session : onnxruntime.InferenceSession

    Raises
    ------
    ModelError
        If the bytes are no ONNX model, refer to other files, or ONNX Runtime refuses them.
    """

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        import onnxruntime

        check_onnx(model)
        self.session: Any
        try:
            self.session = onnxruntime.InferenceSession(
                model,
                session_options(threads),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it prints, and tries the same once more
                read_config_from_model=0,
            )
            self.inputs = tuple(_info(value) for value in self.session.get_inputs())
            self.outputs = tuple(_info(value) for value in self.session.get_outputs())
            self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        # The pybind module has a class for each status, none public; and a name may be no UTF-8.
        except Exception as error:
            raise ModelError(f"E3: ONNX Runtime refused the model: {one_line(error)}") from None
        free = {d for i in self.inputs for d in i.shape if isinstance(d, str)}
        # The model says that its output shapes follow from its input shapes.
        self._fixed_outputs = all(
            isinstance(d, int) or d in free for o in self.outputs for d in o.shape
        ) and all(o.dtype is not None for o in self.outputs)

    def context(self) -> OnnxContext:
        """Prepare an execution."""
        return OnnxContext(self)


class OnnxContext:
    """One IO binding: inputs read from where they are, outputs kept and reused."""

    def __init__(self, graph: OnnxGraph) -> None:
        import onnxruntime

        self._graph = graph
        self._session = graph.session
        self._binding = self._session.io_binding()
        self._options = onnxruntime.RunOptions()
        # To look for an entry that is not there would take longer than a small model.
        self._options.add_run_config_entry("gpu_graph_id", "-1")
        self._outputs: list[NDArray[Any]] = []
        self._prepared = False
        self._shapes: dict[int, tuple[int, ...]] = {}

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Read input `index` from host memory at `address` on each `compute`, without a copy."""
        name = self._graph.inputs[index].name
        self._binding.bind_input(name, "cpu", 0, dtype.type, shape, address)
        if self._shapes.get(index) != shape:
            self._shapes[index] = shape
            self._prepared = False

    def compute(self) -> None:
        """Run the model on the bound inputs."""
        self._options.terminate = False
        if self._prepared:
            try:
                self._run()
                return
            except Exception:  # perhaps its shapes depend on the data all the same
                if self._options.terminate:
                    raise
                self._prepared = self._graph._fixed_outputs = False
        self._binding.clear_binding_outputs()
        for info in self._graph.outputs:
            self._binding.bind_output(info.name, "cpu")
        self._run()
        self._outputs = [np.ascontiguousarray(v.numpy()) for v in self._binding.get_outputs()]
        if self._graph._fixed_outputs:  # from now on, write to the same arrays
            self._binding.clear_binding_outputs()
            self._outputs = [array.copy() for array in self._outputs]
            for info, array in zip(self._graph.outputs, self._outputs, strict=True):
                self._binding.bind_output(
                    info.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
                )
            self._prepared = True

    def _run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def stop(self) -> None:
        """Make a `compute` that runs in another thread fail at its next operator."""
        self._options.terminate = True

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`."""
        return self._outputs[index]


def session_options(threads: int | None = None) -> Any:
    """Return the session options that edgelab uses, for a fair bare baseline too.

    Parameters
    ----------
    threads : int, optional
        Threads for one operator; the default is the number of cores that this process may use.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    # Idle threads that spin steal time from the guest and from neighbours on shared cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never guess
    options.log_severity_level = 4  # problems come back as exceptions
    return options


def _info(value: Any) -> TensorInfo:
    kind = _DTYPES.get(value.type)
    return TensorInfo(value.name, None if kind is None else np.dtype(kind), tuple(value.shape))


# --- just enough protobuf to look before loading --------------------------------------------------

# Message → {field: message}, along every path of onnx.proto that leads to a tensor.
_ONNX = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
}  # fmt: skip
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_MAX_DEPTH = 64
_MAX_FIELDS = 2_000_000  # models of 100,000 operators have fewer
_SMALL = 4096  # bytes


def looks_like_onnx(data: bytes) -> bool:
    """Tell whether bytes have the outer form of an ONNX model: a version, opsets and a graph."""
    fields = outer_fields(data)
    return fields.get(1) == 0 and fields.get(7) == 2 and fields.get(8) == 2


def outer_fields(data: bytes) -> dict[int, int]:
    """Return field number → wire type of a protobuf message; nothing if it is none."""
    try:
        start = itertools.islice(_fields(data), _MAX_FIELDS)
        return {number: kind for number, kind, _ in start}
    except ValueError:
        return {}


def check_onnx(data: bytes) -> None:
    """Refuse what is not one whole ONNX model, before a library opens the files it refers to.

    Raises
    ------
    ModelError
        If the bytes are no ONNX model, or keep weights in other files.
    """
    if not looks_like_onnx(data):
        raise ModelError(
            "E3: these bytes are not an ONNX model: damaged, cut off, or another format"
        )
    if _has_external_data(data):
        raise ModelError(
            "the model keeps weights in other files (external data), which is refused. Save it "
            "as one file: onnx.save(onnx.load(path), path, save_as_external_data=False)"
        )


def onnx_metadata(data: bytes) -> dict[str, str]:
    """Read ``metadata_props`` of an ONNX model without loading it.

    Raises
    ------
    ModelError
        If the bytes are damaged.
    """
    metadata: dict[str, str] = {}
    try:
        for number, _, entry in _fields(memoryview(data)):
            if number == 14 and isinstance(entry, memoryview):
                pair = {n: bytes(v) for n, _, v in _fields(entry) if isinstance(v, memoryview)}
                metadata[pair.get(1, b"").decode()] = pair.get(2, b"").decode()
    except ValueError as error:  # includes UnicodeDecodeError
        raise ModelError(f"E3: damaged ONNX model: {error}") from None
    return metadata


def _has_external_data(data: bytes) -> bool:
    return _refers_to_file(data, 0, len(data), "model", 0, itertools.count())


def _refers_to_file(
    data: bytes, at: int, end: int, message: str, depth: int, seen: Iterator[int]
) -> bool:
    if depth > _MAX_DEPTH:
        raise ModelError(f"the model nests deeper than {_MAX_DEPTH} levels; refused")
    children = _ONNX.get(message, {})
    try:
        while at < end:
            number, kind, value, at = _field(data, at, end)
            if next(seen) >= _MAX_FIELDS:  # to walk on could take minutes
                raise ModelError(f"the model has more than {_MAX_FIELDS:,} fields; refused")
            if message == "tensor":
                if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value == 1):
                    return True
            elif kind == 2 and (child := children.get(number)):
                # Each reference to a file has the key "location". Large fields are mostly weights,
                # where looking for the word would take longer than walking around them.
                if at - value <= _SMALL and data.find(b"location", value, at) < 0:
                    continue
                if _refers_to_file(data, value, at, child, depth + 1, seen):
                    return True
    except ValueError as error:
        raise ModelError(f"E3: damaged ONNX model: {error}") from None
    return False


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of one protobuf message."""
    at, end, view = 0, len(data), memoryview(data)
    while at < end:
        number, kind, value, at = _field(data, at, end)
        yield number, kind, view[value:at] if kind == 2 else value


def _field(data: bytes | memoryview, at: int, end: int) -> tuple[int, int, int, int]:
    """Read one field: its number, its wire type, its value or where that starts, and its end."""
    tag, at = _varint(data, at, end)
    number, kind = tag >> 3, tag & 7
    if kind == 0:
        value, at = _varint(data, at, end)
    elif kind == 2:
        length, value = _varint(data, at, end)
        at = value + length
    elif kind in (1, 5):
        value, at = 0, at + (8 if kind == 1 else 4)
    else:
        raise ValueError(f"wire type {kind} at byte {at}")
    if at > end or number == 0:
        raise ValueError(f"field {number} runs past the end")
    return number, kind, value, at


def _varint(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        if byte < 0x80:
            return value | byte << shift, at
        value |= (byte & 0x7F) << shift
        shift += 7
    raise ValueError(f"cut off at byte {at}")
