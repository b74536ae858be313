"""TFLite models, made here: small ones op by op, and MobileNetV2 out of its ONNX form.

Needs ``edgelab[litert,quantize]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgelab.errors import ModelError, one_line

TYPES = {
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float64): schema.TensorType.FLOAT64,
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
    np.dtype(np.complex64): schema.TensorType.COMPLEX64,
}


def table(kind: str, **fields: Any) -> Any:
    """Make a table of the schema's object API, with some fields set."""
    made = getattr(schema, f"{kind}T")()
    for name, value in fields.items():
        if not hasattr(made, name):
            raise AttributeError(f"{kind} has no field {name}")
        setattr(made, name, value)
    return made


class Builder:
    """Collects tensors and operators; ``model`` gives the bytes."""

    def __init__(self) -> None:
        self._buffers = [table("Buffer")]  # number 0 means: no data
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: list[int] = []

    def _buffer(self, data: bytes) -> int:
        self._buffers.append(table("Buffer", data=np.frombuffer(data, np.uint8)))
        return len(self._buffers) - 1

    def tensor(self, name: str, shape: Sequence[int], dtype: Any = np.float32, **more: Any) -> int:
        """Add a tensor, -1 for a free dimension; return its number."""
        free = min(shape, default=0) < 0
        fields = {
            "name": name,
            "shape": [abs(d) for d in shape],
            "shapeSignature": list(shape) if free else None,
            "type": TYPES[np.dtype(dtype)],
            "buffer": 0,
        }
        self._tensors.append(table("Tensor", **fields, **more))
        return len(self._tensors) - 1

    def constant(self, name: str, array: NDArray[Any]) -> int:
        """Add a tensor with data; return its number."""
        number = self.tensor(name, array.shape, array.dtype)
        self._tensors[number].buffer = self._buffer(array.tobytes())
        return number

    def operator(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any
    ) -> None:
        """Add a builtin operator, such as ``"CONV_2D"``, with the fields of its options."""
        code = getattr(schema.BuiltinOperator, name)
        if code not in self._codes:
            self._codes.append(code)
        made = table("Operator", opcodeIndex=self._codes.index(code))
        made.inputs, made.outputs = list(inputs), list(outputs)
        kind = OPTIONS.get(name)
        if kind:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            made.builtinOptions = table(kind, **options)
        self._operators.append(made)

    def model(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        metadata: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """Return the model."""
        entries = [
            table("Metadata", name=name, buffer=self._buffer(data))
            for name, data in (metadata or {}).items()
        ]
        graph = table("SubGraph", tensors=self._tensors, operators=self._operators)
        graph.inputs, graph.outputs = list(inputs), list(outputs)
        codes = [
            table("OperatorCode", builtinCode=c, deprecatedBuiltinCode=min(c, 127), version=1)
            for c in self._codes
        ]
        made = table("Model", version=3, operatorCodes=codes, subgraphs=[graph])
        made.buffers, made.metadata = self._buffers, entries or None
        return packed(made)


def packed(model: Any) -> bytes:
    """Turn the schema's object into a file."""
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def changed(data: bytes, change: Callable[[Any], None]) -> bytes:
    """Return a model in which something was changed, for better or worse."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    change(model)
    return packed(model)


OPTIONS = {
    "ADD": "AddOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MEAN": "ReducerOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
}


def double(dtype: Any, shape: Sequence[int], metadata: Mapping[str, bytes] | None = None) -> bytes:
    """Return a model that computes x + x, in float32."""
    made = Builder()
    x, y = made.tensor("x", shape, dtype), made.tensor("y", shape, dtype)
    single, sums = made.tensor("single", shape), made.tensor("sums", shape)
    made.operator("CAST", [x], [single])
    made.operator("ADD", [single, single], [sums])
    made.operator("CAST", [sums], [y])
    return made.model([x], [y], metadata)


def from_onnx(data: bytes) -> bytes:
    """Translate a MobileNetV2: convolutions, clips, sums, a mean and a matrix; NCHW to NHWC.

    The weights stay as they are, in float32. Compare the logits before you trust the result: a
    model of another form may be refused, or not be understood.

    Raises
    ------
    ModelError
        If the model has anything else.
    """
    try:
        return _from_onnx(onnx.load_model_from_string(data))
    except Exception as error:  # whatever a file that is no MobileNetV2 leads to
        raise ModelError(
            "this model has no .tflite form here: only a plain MobileNetV2 in float32 does "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def _require(fits: bool, why: str) -> None:
    if not fits:
        raise ValueError(why)


def _from_onnx(model: onnx.ModelProto) -> bytes:
    graph = model.graph
    weights = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    clips = {node.input[0]: node for node in graph.node if node.op_type == "Clip"}
    made = Builder()
    shapes: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}

    def add(name: str, *shape: int) -> int:
        shapes[name], numbers[name] = list(shape), made.tensor(name, shape)
        return numbers[name]

    batch, channels, *sides = (d.dim_value or -1 for d in graph.input[0].type.tensor_type.shape.dim)
    add(graph.input[0].name, batch, *sides, channels)
    for node in graph.node:
        x, y = node.input[0], node.output[0]
        fields = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        operands = [weights[name] for name in node.input[1:] if name in weights]
        if node.op_type == "Conv":
            clip = clips.get(y)
            _conv(made, add, numbers[x], shapes[x], clip.output[0] if clip else y, fields, operands,
                 clip is not None)  # fmt: skip
        elif node.op_type == "Clip":
            _require(y in numbers, "a clip that follows no convolution")
            limits = [float(limit) for limit in operands]
            _require(limits == [0, 6], f"a clip to {limits}")
        elif node.op_type == "Add":
            made.operator("ADD", [numbers[name] for name in node.input], [add(y, *shapes[x])])
        elif node.op_type in ("ReduceMean", "GlobalAveragePool"):
            axes = made.constant(f"{y}/axes", np.array([1, 2], np.int32))
            made.operator("MEAN", [numbers[x], axes], [add(y, batch, shapes[x][-1])])
        elif node.op_type in ("Flatten", "Reshape"):  # to what the mean has already
            numbers[y], shapes[y] = numbers[x], shapes[x]
        else:
            _require(node.op_type == "Gemm" and fields["transB"] == 1, f"operator {node.op_type}")
            matrix, bias = (made.constant(f"{y}/{k}", array) for k, array in enumerate(operands))
            out = add(y, batch, len(operands[1]))
            made.operator("FULLY_CONNECTED", [numbers[x], matrix, bias], [out])
    metadata = {pair.key: pair.value.encode() for pair in model.metadata_props}
    metadata["layout"] = b"NHWC"
    inputs, outputs = ([numbers[v.name] for v in side] for side in (graph.input, graph.output))
    return made.model(inputs, outputs, metadata)


def _conv(
    made: Builder,
    add: Any,
    x: int,
    shape: list[int],
    name: str,
    fields: dict[str, Any],
    operands: list[NDArray[Any]],
    clipped: bool,
) -> None:
    """Add a convolution, by channels or full, perhaps with a clip to 0 … 6."""
    weight, bias = operands
    (step, _), pad, kernel = fields["strides"], fields["pads"][0], weight.shape[2]
    by_channel = fields["group"] > 1
    plain = set(fields["pads"]) == {pad} and set(fields.get("dilations", [1])) == {1}
    _require(plain and pad in (0, kernel // 2), f"{name}: padding or dilation")
    batch, *sides, channels = shape
    out_sides = [(side + 2 * pad - kernel) // step + 1 for side in sides]
    if pad and step > 1:  # TFLite's SAME would pad one side only
        padding = np.array([(0, 0), (pad, pad), (pad, pad), (0, 0)], np.int32)
        padded = made.tensor(f"{name}/pad", [batch, *(side + 2 * pad for side in sides), channels])
        made.operator("PAD", [x, made.constant(f"{name}/pads", padding)], [padded])
        x, pad = padded, 0
    order = (1, 2, 3, 0) if by_channel else (0, 2, 3, 1)
    made.operator(
        "DEPTHWISE_CONV_2D" if by_channel else "CONV_2D",
        [
            x,
            made.constant(f"{name}/weight", weight.transpose(order)),
            made.constant(f"{name}/bias", bias),
        ],
        [add(name, batch, *out_sides, len(bias))],
        padding=schema.Padding.SAME if pad else schema.Padding.VALID,
        strideH=step,
        strideW=step,
        fusedActivationFunction=schema.ActivationFunctionType.RELU6 if clipped else 0,
        **({"depthMultiplier": 1} if by_channel else {}),
    )
