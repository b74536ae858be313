"""Reading, checking and rewriting ONNX graphs: what `edgelab.quantize` is built from."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import ModelError, one_line
from edgelab.wasinn.backends.onnx import OnnxGraph, check_onnx, session_options

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Array = NDArray[Any]

MAX_SOURCE_BYTES = 512 << 20
"""Largest file to quantize; several copies of it are in memory at once."""
OPSET = 13
"""The oldest operator set that can hold a scale for each channel."""

_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
    "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DynamicQuantizeMatMul", "QGemm",
    "MatMulIntegerToFloat", "QAttention",
}  # fmt: skip
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator with weights.

    Attributes
    ----------
    name : str
        Of the node.
    kind : str
        In words, such as ``"depthwise convolution"``.
    op_type, input, weight, bias, output : str
        Operator, and names of tensors; no bias is ``""``. The output is that of the activation
        function if one follows.
    sums : str
        What the operator itself writes.
    axis : int
        Output channels in the weight.
    """

    name: str
    kind: str
    op_type: str
    input: str
    weight: str
    bias: str
    output: str
    sums: str
    axis: int


# --- reading and checking -------------------------------------------------------------------------


def read_model(data: bytes) -> ModelProto:
    """Parse and check a model of float32 weights that nobody vouches for.

    Raises
    ------
    ModelError
        If it can't be quantized; says why, and what helps.
    """
    if len(data) > MAX_SOURCE_BYTES:
        raise ModelError(
            f"the model has {len(data):,} bytes; {MAX_SOURCE_BYTES:,} are the limit here. "
            "Large models are quantized with tools of their own, on machines with more memory"
        )
    check_onnx(data)
    model = parse(data)
    graph = model.graph
    version = opset(model)
    newest = _onnx().defs.onnx_opset_version()
    if version is None or not 7 <= version <= newest:
        raise ModelError(
            f"the model wants operator set {version} of ONNX; 7 to {newest} can be read here. "
            "Export it again with an opset between 13 and 21, or install a newer onnx"
        )
    if model.functions:
        raise ModelError(
            "the model defines functions of its own, which are not quantized. Inline them: "
            "onnx.inliner.inline_local_functions(model)"
        )
    found = sorted(
        {
            n.op_type
            for n in graph.node
            if n.op_type in _QUANTIZED or n.op_type.startswith("QLinear")
        }
    )
    if found:
        raise ModelError(
            f"the model is quantized already ({', '.join(found)[:100]}). Start from the float32 "
            "model that it was made from"
        )
    _require_float_weights(model)
    try:
        _onnx().checker.check_model(model)
    except Exception as error:  # ValidationError, and what damaged tensors raise
        raise ModelError(
            f"the model does not follow the ONNX standard: {one_line(error)}. Is it damaged, or "
            "does it use operators of another program?"
        ) from None
    OnnxGraph(data, 1)  # whether ONNX Runtime has all of its operators
    return model


def parse(data: bytes) -> ModelProto:
    """Parse a model whose outer form was checked.

    Raises
    ------
    ModelError
        If it is damaged.
    """
    onnx = _onnx()
    try:
        model: ModelProto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError is another one in each version
        raise ModelError(f"damaged ONNX model: {one_line(error)}") from None
    return model


def opset(model: ModelProto) -> int | None:
    """Return the version of ONNX's own operator set that a model wants."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return versions[0] if len(versions) == 1 else None


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            f"quantizing needs the package onnx ({one_line(error)}). "
            "Cure: pip install 'edgelab[quantize]'"
        ) from None
    return onnx


def _require_float_weights(model: ModelProto) -> None:
    onnx = _onnx()
    kinds = Counter(t.data_type for t in model.graph.initializer if len(t.dims) > 1)
    for node in model.graph.node:
        if node.op_type == "Constant":
            kinds.update(a.t.data_type for a in node.attribute if a.name == "value")
    names = onnx.TensorProto.DataType
    if onnx.TensorProto.FLOAT not in kinds:
        held = ", ".join(names.Name(k) for k in sorted(kinds)) or "none at all"
        raise ModelError(
            f"the model holds no float32 weights ({held}). Quantize the float32 model that it was "
            "made from"
        )
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            try:
                finite = bool(np.isfinite(onnx.numpy_helper.to_array(tensor)).all())
            except (ValueError, TypeError) as error:
                raise ModelError(f"damaged weights: {one_line(error)}") from None
            if not finite:
                raise ModelError(
                    f"the weights {tensor.name!r:.60} hold infinity or NaN, so no scale fits them. "
                    "Was the training stopped by an overflow?"
                )


def single_input(model: ModelProto) -> tuple[str, tuple[int | None, ...]]:
    """Return name and shape of a model's only input; None stands for a free dimension.

    Raises
    ------
    ModelError
        If there are more, or it is not float32.
    """
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if kind is None or kind.elem_type != _onnx().TensorProto.FLOAT or not kind.HasField("shape"):
        raise ModelError(
            f"the model takes {len(inputs)} input(s); one float32 input with a shape is supported"
        )
    dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    return inputs[0].name, tuple(d if d is not None and d > 0 else None for d in dims)


# --- preparing ------------------------------------------------------------------------------------


def prepare(model: ModelProto, version: int = OPSET) -> ModelProto:
    """Return an equal model that is ready to be quantized.

    Every node has a name of its own, the operator set is `version` or newer, constants are
    folded, and batch norms are part of the convolutions before them (by ONNX Runtime).

    Raises
    ------
    ModelError
        If that can't be done.
    """
    onnx = _onnx()
    from onnxruntime.quantization import quant_pre_process

    ready = copy(model)
    graph = ready.graph
    constants = {t.name for t in graph.initializer}  # before IR version 4, they are inputs too
    kept = [i for i in graph.input if i.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)
    ready.ir_version = max(ready.ir_version, 7)
    seen: set[str] = {""}
    for k, node in enumerate(graph.node):
        if node.name in seen:
            node.name = f"{node.op_type}_{k}"
        seen.add(node.name)
    try:
        if (opset(ready) or 0) < version:
            ready = onnx.version_converter.convert_version(ready, version)
        with quiet(), tempfile.TemporaryDirectory(prefix="edgelab-") as folder:
            path, better = Path(folder, "model.onnx"), Path(folder, "prepared.onnx")
            onnx.save(ready, path)
            quant_pre_process(path, better, skip_symbolic_shape=True)
            prepared: ModelProto = onnx.load(better)
    except Exception as error:  # the converter raises RuntimeErrors, shape inference its own
        raise ModelError(f"the model can't be prepared for quantizing: {one_line(error)}") from None
    if not layers(prepared):
        raise ModelError(
            "the model has no convolution and no matrix product with constant weights, so there "
            "is nothing to quantize"
        )
    return prepared


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's prints and advice off the terminal."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def copy(model: ModelProto) -> ModelProto:
    """Return a copy that can be changed."""
    twin: ModelProto = _onnx().ModelProto()
    twin.CopyFrom(model)
    return twin


def layers(model: ModelProto) -> list[Layer]:
    """List the operators with constant weights, in the order of execution."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    readers = consumers(model.graph)
    found = []
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2 or node.input[1] not in shapes:
            continue
        shape = shapes[node.input[1]]
        bias = node.input[2] if len(node.input) > 2 else ""
        after = readers[node.output[0]]
        output = node.output[0]
        if len(after) == 1 and after[0].op_type in ("Clip", "Relu"):
            output = after[0].output[0]
        kind, axis = _kind(node, shape)
        names = (node.input[0], node.input[1], bias, output, node.output[0])
        found.append(Layer(node.name, kind, node.op_type, *names, axis))
    return found


def _kind(node: NodeProto, shape: tuple[int, ...]) -> tuple[str, int]:
    if node.op_type != "Conv":
        return "fully connected", 0 if attribute(node, "transB", 0) else len(shape) - 1
    if attribute(node, "group", 1) > 1:
        return ("depthwise convolution" if shape[1] == 1 else "grouped convolution"), 0
    return ("pointwise convolution" if set(shape[2:]) == {1} else "convolution"), 0


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each tensor; a graph's output counts for none."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return the node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output}


def arrays(model: ModelProto) -> dict[str, Array]:
    """Return a model's constants by name."""
    onnx = _onnx()
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def set_arrays(model: ModelProto, values: Mapping[str, Array]) -> None:
    """Replace a model's constants by these."""
    onnx = _onnx()
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(v, order="C"), name) for name, v in values.items()
    )


# --- running on calibration data ------------------------------------------------------------------


def run_all(
    model: ModelProto, names: Iterable[str], feeds: Iterable[Array]
) -> Iterator[dict[str, Array]]:
    """Run a model on inputs, one after the other, and yield the named tensors of each run.

    One thread, and no optimization that would fuse the tensors away: the same values each time.
    """
    import onnxruntime

    onnx = _onnx()
    probe = copy(model)
    present = {o.name for o in probe.graph.output}
    wanted = list(dict.fromkeys(names))
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in present
    )
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(
            probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = session.get_inputs()[0].name
        for feed in feeds:
            yield dict(zip(wanted, session.run(wanted, {given: feed}), strict=True))
    except Exception as error:
        if isinstance(error, (ModelError, GeneratorExit)):
            raise
        raise ModelError(f"ONNX Runtime can't run the model: {one_line(error)}") from None


def observe(
    model: ModelProto, feeds: Iterable[Array], *, mean: bool = False
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """Measure every float tensor between operators, in one pass over the inputs.

    Parameters
    ----------
    model : onnx.ModelProto
        Prepared.
    feeds : iterable of numpy.ndarray
        Inputs, one for each run.
    mean : bool
        Average the smallest and the largest values of the runs, instead of taking the extremes
        of all: a value that one picture in a hundred reaches costs the others their precision.

    Returns
    -------
    ranges : dict of str to (low, high)
        Both ``float32`` without dimension.
    means : dict of str to numpy.ndarray
        ``float64``, ``(channels,)``: over all inputs and places. Channels are the second axis.
    """
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    sums: dict[str, Array] = {}
    count = 0
    for values in run_all(model, _float_tensors(model), feeds):
        count += 1
        for name, value in values.items():
            smallest, largest = float(value.min()), float(value.max())
            if mean:
                low[name] = low.get(name, 0.0) + smallest
                high[name] = high.get(name, 0.0) + largest
            else:
                low[name] = min(low.get(name, smallest), smallest)
                high[name] = max(high.get(name, largest), largest)
            if value.ndim > 1:
                others = (0, *range(2, value.ndim))
                sums[name] = sums.get(name, 0.0) + value.mean(others, dtype=np.float64)
    parts = count if mean else 1
    ranges = {
        name: (
            np.asarray(low[name] / parts, np.float32),
            np.asarray(high[name] / parts, np.float32),
        )
        for name in low
    }
    return ranges, {name: total / count for name, total in sums.items()}


def _float_tensors(model: ModelProto) -> list[str]:
    onnx = _onnx()
    typed = [*model.graph.value_info, *model.graph.output, *model.graph.input]
    floats = {v.name for v in typed if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    made = [name for node in model.graph.node for name in node.output if name in floats]
    return [*(i.name for i in model.graph.input), *made]


# --- int4 -----------------------------------------------------------------------------------------

BLOCK = 32
"""Weights that share a 4-bit scale."""
_SMALLEST_SCALE = 6.2e-5  # below, float16 loses digits


def four_bits(model: ModelProto) -> None:
    """Store weights in 4 bits, as a prepared model of operator set 21 can hold them.

    Dense convolutions get a `DequantizeLinear` with a scale for each `BLOCK` input channels, and
    depthwise ones an 8-bit one with a scale for each channel: four bits would ruin them, and they
    are a few percent of the bytes. Fully connected layers become matrix products, for
    `MatMulNBits`.
    """
    onnx = _onnx()
    values = arrays(model)
    for layer in layers(model):
        node = next(n for n in model.graph.node if n.name == layer.name)
        if node.op_type == "Conv":
            weight = values.pop(layer.weight)
            four = layer.kind != "depthwise convolution" and weight.shape[1] >= BLOCK
            stored, scale = _blocks(weight) if four else _channels(weight)
            values[f"{layer.weight}_quantized"] = stored
            values[f"{layer.weight}_scale_half"] = scale.astype(np.float16)
            dequantize = onnx.helper.make_node(
                "DequantizeLinear",
                [f"{layer.weight}_quantized", f"{layer.weight}_scale"],
                [layer.weight],
                **({"axis": 1, "block_size": BLOCK} if four else {"axis": 0}),
            )
            model.graph.node.insert(0, dequantize)
            widen = onnx.helper.make_node(
                "Cast",
                [f"{layer.weight}_scale_half"],
                [f"{layer.weight}_scale"],
                to=onnx.TensorProto.FLOAT,
            )
            model.graph.node.insert(0, widen)
        elif node.op_type == "Gemm" and not attribute(node, "transA", 0) and _plain(node):
            weight = values.pop(layer.weight)
            values[layer.weight] = weight.T if attribute(node, "transB", 0) else weight
            place = list(model.graph.node).index(node)
            middle = f"{node.output[0]}_product" if layer.bias else node.output[0]
            added = [onnx.helper.make_node("MatMul", [node.input[0], layer.weight], [middle],
                                           name=f"{layer.name}_product")]  # fmt: skip
            if layer.bias:
                added.append(onnx.helper.make_node("Add", [middle, layer.bias], node.output))
            model.graph.node.remove(node)
            for k, one in enumerate(added):
                model.graph.node.insert(place + k, one)
    set_arrays(model, values)


def _plain(node: NodeProto) -> bool:
    return all(a.f == 1 for a in node.attribute if a.name in ("alpha", "beta"))


def _blocks(weight: Array) -> tuple[Array, Array]:
    import ml_dtypes

    outs, ins, *kernel = weight.shape
    count = -(-ins // BLOCK)
    padded = np.zeros((outs, count * BLOCK, *kernel), np.float32)
    padded[:, :ins] = weight
    blocks = padded.reshape(outs, count, BLOCK, *kernel)
    scale = _half(np.maximum(np.abs(blocks).max(2) / 7, _SMALLEST_SCALE))
    steps = np.clip(np.round(blocks / scale[:, :, None]), -7, 7)
    steps = steps.reshape(padded.shape)[:, :ins]
    return steps.astype(ml_dtypes.int4), scale


def _channels(weight: Array) -> tuple[Array, Array]:
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = _half(np.maximum(largest / 127, _SMALLEST_SCALE))
    steps = np.clip(np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), -127, 127)
    return steps.astype(np.int8), scale


# --- finishing ------------------------------------------------------------------------------------


def compact(
    model: ModelProto,
    floats: Mapping[str, Array],
    known: Iterable[Layer] = (),
    means: Mapping[str, Array] | None = None,
) -> None:
    """Make a QDQ model small: what a per-channel model holds beside its weights costs a tenth.

    - Scales of weights, and biases of convolutions, are stored in float16 behind a `Cast`; every
      runtime folds that when it loads the model. Weights are rounded with the stored scale.
    - Biases of convolutions stay real numbers: ONNX Runtime >= 1.21 makes them integers itself.
    - Zero points that are zero are left out, and equal constants stored once.
    - Tensors have short names. Nodes with weights keep theirs.
    - The logits come out of a last fully connected layer as they are, not rounded to 256 steps.
    - Biases of convolutions are corrected for what rounding the weights adds to the average sum
      (Nagel et al. 2019, section 4.2), if the average inputs are given.

    Parameters
    ----------
    model : onnx.ModelProto
        From ONNX Runtime's quantizer; changed in place.
    floats : mapping of str to numpy.ndarray
        Constants of the model before.
    known : iterable of Layer
        Of the model before.
    means : mapping of str to numpy.ndarray, optional
        From `observe`.
    """
    onnx = _onnx()
    graph = model.graph
    values = arrays(model)
    _bypass_last_rounding(graph, values)
    readers = consumers(graph)
    kept: dict[str, Array] = {}
    casts, nodes = [], []
    biases: dict[str, str] = {}  # the tensor that the convolution reads: its name before
    rounded: dict[str, Array] = {}

    def half(name: str, array: Array) -> None:
        """Store an array in float16 if that loses next to nothing, and let it be float32 again."""
        size = np.abs(array[array != 0])
        smallest = _SMALLEST_SCALE if name.endswith("_scale") else 0.0
        if size.size and (size.max() > 6e4 or size.min() < smallest):
            kept[name] = array
            return
        kept[f"{name}_half"] = array.astype(np.float16)
        casts.append(
            onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT)
        )

    for node in graph.node:
        name = node.input[0].removesuffix("_quantized")
        for_conv = (
            node.op_type == "DequantizeLinear"
            and node.input[0] in values
            and name in floats
            and all(reader.op_type == "Conv" for reader in readers[node.output[0]])
        )
        if for_conv and values[node.input[0]].dtype == np.int32:
            biases[node.output[0]] = name
            continue
        if for_conv and not values[node.input[2]].any():
            weight, scale = floats[name], values[node.input[1]]
            if scale.ndim:
                half(node.input[1], scale)
                scale = scale if node.input[1] in kept else _half(scale)
                scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
            else:
                kept[node.input[1]] = scale
            steps = np.clip(np.round(weight / scale), -127, 127)
            kept[node.input[0]] = steps.astype(np.int8)
            rounded[name] = steps * scale
            del node.input[2]
        else:
            kept.update({name: values[name] for name in node.input if name in values})
        nodes.append(node)
    errors = _average_errors(known, floats, rounded, means or {})
    for output, name in biases.items():
        half(output, floats[name] - errors.get(name, np.float32(0)))
    set_arrays(model, kept)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def _average_errors(
    known: Iterable[Layer],
    floats: Mapping[str, Array],
    rounded: Mapping[str, Array],
    means: Mapping[str, Array],
) -> dict[str, Array]:
    """Return what rounding a convolution's weights adds to its sums on average, by bias.

    As if all places of the picture were inside it: at the border, padding makes it less.
    """
    readers = Counter(layer.bias for layer in known)
    found = {}
    for layer in known:
        if layer.weight in rounded and layer.input in means and readers[layer.bias] == 1:
            error = (rounded[layer.weight] - floats[layer.weight]).astype(np.float64)
            error = error.reshape(*error.shape[:2], -1).sum(2)
            groups = means[layer.input].reshape(-1, 1, error.shape[1])
            shift = (error.reshape(len(groups), -1, error.shape[1]) * groups).sum(2)
            found[layer.bias] = shift.reshape(-1).astype(np.float32)
    return found


def _half(array: Array) -> Array:
    rounded: Array = array.astype(np.float16).astype(np.float32)
    return rounded


def _bypass_last_rounding(graph: GraphProto, values: Mapping[str, Array]) -> None:
    makers = producers(graph)
    readers = consumers(graph)
    for value in graph.output:
        last = makers.get(value.name)
        rounding = (
            makers.get(last.input[0]) if last and last.op_type == "DequantizeLinear" else None
        )
        layer = makers.get(rounding.input[0]) if rounding else None
        if (
            last and rounding and layer
            and rounding.op_type == "QuantizeLinear"
            and layer.op_type in ("Gemm", "MatMul")
            and len(readers[last.input[0]]) == len(readers[rounding.input[0]]) == 1
            and not readers[value.name]
        ):  # fmt: skip
            layer.output[0] = value.name
            graph.node.remove(last)
            graph.node.remove(rounding)


def shorten(model: ModelProto, known: Iterable[Layer]) -> None:
    """Store equal constants once, drop what only people read, and give tensors short names."""
    onnx = _onnx()
    graph = model.graph
    outside = {value.name for value in (*graph.input, *graph.output)}
    kept = {layer.name for layer in known}
    values = arrays(model)
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    same = {
        name: first.setdefault((str(a.dtype), a.shape, a.tobytes()), name)
        for name, a in values.items()
        if name not in outside
    }
    _sort(graph)
    short: dict[str, str] = {}
    produced = _names(outside)

    def rename(name: str) -> str:
        name = same.get(name, name)
        if not name or name in outside:
            return name
        if name not in short:
            short[name] = next(produced)
        return short[name]

    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
        if node.name not in kept:
            node.name = ""
    del graph.value_info[:]
    graph.doc_string = ""
    set_arrays(
        model,
        {short[name]: values[name] for name in short if name in values}
        | {name: values[name] for name in outside if name in values},
    )
    domains = {node.domain for node in graph.node} | {""}
    versions = {o.domain: o.version for o in model.opset_import if o.domain in domains}
    del model.opset_import[:]
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())
    )


def _names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = np.base_repr(number, 36).lower()
        number += 1
        if name not in taken:
            yield name


def _sort(graph: GraphProto) -> None:
    """Put nodes into an order that depends on the graph alone: each right before its reader."""
    makers = producers(graph)
    done: set[int] = set()
    order: list[NodeProto] = []
    for value in graph.output:
        stack: list[tuple[NodeProto, int]] = (
            [(makers[value.name], 0)] if value.name in makers else []
        )
        while stack:
            node, place = stack.pop()
            if id(node) in done:
                continue
            if place < len(node.input):
                stack.append((node, place + 1))
                below = makers.get(node.input[place])
                if below is not None and id(below) not in done:
                    stack.append((below, 0))
            else:
                done.add(id(node))
                order.append(node)
    copies = [type(node).FromString(node.SerializeToString()) for node in order]
    del graph.node[:]
    graph.node.extend(copies)


def weight_bytes(model: ModelProto, layer: Layer) -> tuple[int, str]:
    """Return bytes of a layer's weights, biases and scales, and how the weights are stored.

    Works on names as the quantizers give them, so before `shorten`.
    """
    onnx = _onnx()
    total, how = 0, "?"
    tensors = {t.name: t for t in model.graph.initializer}
    scaled = 1
    for name, tensor in tensors.items():
        for base in filter(None, (layer.weight, layer.bias)):
            if name == base or (name.startswith(f"{base}_") and name not in (layer.bias,)):
                total += len(tensor.raw_data) or tensor.ByteSize()
                if base == layer.weight and name.removesuffix("_half").endswith("_scale"):
                    scaled = int(np.prod(tensor.dims)) if tensor.dims else 1
                elif base == layer.weight and (len(tensor.dims) > 1 or name.endswith("_Q4")):
                    how = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    if how == "float":
        how = "float32"
    if f"{layer.weight}_Q4" in "".join(tensors) or how == "int4":
        how = f"int4 in blocks of {BLOCK}"
    elif how in ("int8", "uint8"):
        how += " per channel" if scaled > 1 else " per tensor"
    return total, how


# --- comparing ------------------------------------------------------------------------------------


def label(model: ModelProto, known: Iterable[Layer]) -> None:
    """Give the node that makes a layer's sums the layer's name, whatever a quantizer made of it.

    Works on tensor names of the source, so before `shorten`.
    """
    makers = producers(model.graph)
    taken = {node.name for node in model.graph.node}
    for layer in known:
        if layer.name not in taken and layer.sums in makers:
            makers[layer.sums].name = layer.name


def stored_weights(model: ModelProto, known: Iterable[Layer]) -> dict[str, Array]:
    """Return the weights of a labelled, quantized model as real numbers, by layer."""
    nodes = {node.name: node for node in model.graph.node if node.name}
    makers = producers(model.graph)
    values = arrays(model)
    found: dict[str, Array] = {}
    computed: dict[str, str] = {}
    for layer in known:
        node = nodes.get(layer.name)
        while node is not None and node.op_type in ("Add", "Mul", "Cast"):
            node = next((makers[i] for i in node.input if i in makers), None)
        if node is None:
            continue
        if node.op_type == "MatMulNBits":
            found[layer.name] = _product_with_identity(node, values)
        elif node.op_type in ("ConvInteger", "MatMulInteger"):
            zero = values[node.input[3]].astype(np.float32) if len(node.input) > 3 else 0
            scale = _integer_scale(node, model.graph, values)
            found[layer.name] = (values[node.input[1]].astype(np.float32) - zero) * scale
        elif node.input[1] in values:
            found[layer.name] = values[node.input[1]].astype(np.float32)
        else:
            computed[layer.name] = node.input[1]
    weights = _constants(model, list(dict.fromkeys(computed.values())))
    return found | {name: weights[tensor].astype(np.float32) for name, tensor in computed.items()}


def _integer_scale(node: NodeProto, graph: GraphProto, values: Mapping[str, Array]) -> Array:
    """Scale of the weights of a ConvInteger: a constant factor of what its sums are scaled by."""
    readers = consumers(graph)
    makers = producers(graph)
    after = readers[node.output[0]][0]
    if after.op_type == "Cast":
        after = readers[after.output[0]][0]
    for name in after.input:
        if name in values:
            return values[name]
        for inner in makers[name].input if makers[name].op_type == "Mul" else ():
            if inner in values:
                return values[inner]
    raise ModelError(f"the scale of the integer weights of {node.name!r:.60} is not found")


def _constants(model: ModelProto, names: list[str]) -> dict[str, Array]:
    """Compute tensors that depend on constants alone."""
    onnx = _onnx()
    makers = producers(model.graph)
    stack, used = list(names), set()
    while stack:
        name = stack.pop()
        if name in makers and name not in used:
            stack += makers[name].input
        used.add(name)
    if not names:
        return {}
    part = copy(model)
    for field in (part.graph.node, part.graph.initializer, part.graph.input, part.graph.output):
        del field[:]
    part.graph.node.extend(n for n in model.graph.node if used.intersection(n.output))
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return _run_once(part, names, {})


def _product_with_identity(node: NodeProto, values: Mapping[str, Array]) -> Array:
    """Return the matrix that a MatMulNBits multiplies by: ``(inputs, outputs)``."""
    onnx = _onnx()
    size = attribute(node, "K", 0)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info(node.input[0], kind, [size, size])],
        [helper.make_tensor_value_info(node.output[0], kind, None)],
        [onnx.numpy_helper.from_array(values[n], n) for n in node.input[1:] if n in values],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    feed = {node.input[0]: np.eye(size, dtype=np.float32)}
    return _run_once(model, [node.output[0]], feed)[node.output[0]]


def _run_once(model: ModelProto, names: list[str], feed: Mapping[str, Array]) -> dict[str, Array]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
        )
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except Exception as error:
        raise ModelError(f"ONNX Runtime can't run the model: {one_line(error)}") from None


def matching_outputs(model: ModelProto, known: Iterable[Layer]) -> dict[str, str]:
    """Return the tensor of a labelled, quantized model that holds each layer's output.

    That is behind the activation function and the rounding, where those follow.
    """
    nodes = {node.name: node for node in model.graph.node if node.name}
    readers = consumers(model.graph)
    found = {}
    for layer in known:
        if layer.name not in nodes:
            continue
        tensor = nodes[layer.name].output[0]
        activated = layer.output == layer.sums
        while len(after := readers[tensor]) == 1:
            step = after[0].op_type
            if step in ("Clip", "Relu") and activated:
                break
            if step not in ("QuantizeLinear", "DequantizeLinear", "Cast", "Clip", "Relu"):
                break
            activated = activated or step in ("Clip", "Relu")
            tensor = after[0].output[0]
        found[layer.name] = tensor
    return found
