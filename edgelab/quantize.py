"""Smaller numbers: FP16, INT8 and INT4 versions of an ONNX model, and where they lose precision.

`quantize` uses ONNX Runtime's quantizers and calibrators where they do the job, and
`edgelab.onnxgraph` for the rest: checks, ranges, a compact file, 4-bit convolutions.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelab import models
from edgelab.errors import EdgelabError, ModelError, one_line
from edgelab.measure import fingerprint, html_table
from edgelab.models import Model, Spec
from edgelab.paths import write_atomic

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgelab.datasets import Sample
    from edgelab.onnxgraph import Layer

Tensor = NDArray[np.float32]

SCHEMES: Mapping[str, str] = {
    "fp16": "weights and arithmetic in float16, inputs and outputs in float32",
    "int8": "int8 per channel, ranges averaged over the pictures, biases corrected: the best here",
    "int8-minmax": "int8 per channel, activation ranges from the smallest to the largest value",
    "int8-entropy": "int8 per channel, ranges that lose the least information (KL divergence)",
    "int8-percentile": "int8 per channel, ranges that hold 99.999 % of the values",
    "int8-per-tensor": "int8 with one scale for a whole weight tensor: the naive way",
    "int8-dynamic": "int8 weights, activation ranges measured anew in each run",
    "int4-weights": "4-bit weights in blocks, arithmetic in float32",
}
"""What `quantize` can do, by name."""

CALIBRATED = tuple(name for name in SCHEMES if name.startswith("int8") and name != "int8-dynamic")
"""Schemes that need pictures."""

_OPERATORS = [
    "Conv", "Gemm", "MatMul", "Add", "Mul", "Clip", "Relu", "LeakyRelu", "Sigmoid", "MaxPool",
    "GlobalAveragePool", "AveragePool", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Transpose", "Split", "Slice", "Resize", "Pad",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What became of one kind of layers.

    Attributes
    ----------
    kind : str
        Such as ``"depthwise convolution"``.
    count : int
        Layers of this kind.
    weights : str
        How their weights are stored, such as ``"int8 per channel"``.
    source_bytes, size_bytes : int
        Of their weights and biases, before and after, scales included.
    """

    kind: str
    count: int
    weights: str
    source_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Quantized:
    """A model that `quantize` wrote.

    Attributes
    ----------
    path : pathlib.Path
    scheme : str
    source_bytes, size_bytes : int
        Of the files before and after.
    sha256 : str
        Of the new file. The same input, versions and machine give the same bytes.
    calibration_images : int
        How many were fed to find the activations' ranges; 0 if the scheme needs none.
    layers : tuple of LayerKind
    reason : str
        Why this is faster or slower on this CPU, from the file's operators; see `speed_reason`.
    seconds : float
    """

    path: Path
    scheme: str
    source_bytes: int
    size_bytes: int
    sha256: str
    calibration_images: int
    layers: tuple[LayerKind, ...]
    reason: str
    seconds: float

    @property
    def size_ratio(self) -> float:
        """New size over old."""
        return self.size_bytes / self.source_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "path": str(self.path), "size_ratio": self.size_ratio}

    _COLUMNS = ("layers", "count", "weights now", "bytes before", "after")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (k.kind, str(k.count), k.weights, f"{k.source_bytes:,}", f"{k.size_bytes:,}")
            for k in self.layers
        ]

    def _title(self, arrow: str) -> str:
        return (
            f"{self.scheme}: {self.source_bytes:,} {arrow} {self.size_bytes:,} bytes "
            f"({self.size_ratio:.2%})"
        )

    def __str__(self) -> str:
        line = "{:<24} {:>5}  {:<22} {:>12} {:>11}".format
        lines = [self._title("->"), *(line(*row) for row in (self._COLUMNS, *self._cells()))]
        if self.calibration_images:
            lines.append(f"calibrated on {self.calibration_images:,} images")
        return "\n".join([*lines, self.reason])

    def _repr_html_(self) -> str:
        return html_table(self._title("→"), self._COLUMNS, self._cells())


def quantize(
    model: str | Path | Model,
    output: str | Path,
    scheme: str = "int8",
    *,
    calibration: Tensor | Iterable[Tensor] | None = None,
    keep_float: Sequence[str] = (),
) -> Quantized:
    """Write a smaller version of an ONNX model.

    Parameters
    ----------
    model : str, pathlib.Path or edgelab.models.Model
        A registry name, a path to an ONNX file (a spec in its metadata is kept, none is needed),
        or a loaded model (its spec is written into the new file).
    output : str or pathlib.Path
        Where to write. An existing file is replaced, at once and only when all is done.
    scheme : str
        One of `SCHEMES`.
    calibration : numpy.ndarray or iterable of numpy.ndarray, optional
        Prepared inputs, ``float32``, ``(n, channels, height, width)``; or an iterable of such
        arrays with one or more images each, of which one at a time is in memory. Needed by the
        schemes in `CALIBRATED`, unused by the others. 100 to 500 pictures of the kind that the
        model will see; never those that it is scored on.
    keep_float : sequence of str
        Names of layers (see `sensitivity`) that stay in float32; for the schemes in `CALIBRATED`.

    Raises
    ------
    ModelError
        If the model can't be quantized; says why. Nothing is written then.
    EdgelabError
        If scheme, calibration or output make no sense.
    """
    begin = time.perf_counter()
    if scheme not in SCHEMES:
        raise EdgelabError(f"no scheme is named {scheme!r:.60}; there are {', '.join(SCHEMES)}")
    if scheme in CALIBRATED and calibration is None:
        raise EdgelabError(
            f"{scheme} needs pictures to find the range of each activation: pass calibration=, or "
            "--calibrate DIR on the command line. int8-dynamic and fp16 need none"
        )
    if keep_float and scheme not in CALIBRATED:
        raise EdgelabError(f"keep_float works with {', '.join(CALIBRATED)}, not with {scheme}")
    path, data, spec = _source(model)
    output = Path(output)
    _require_other(output, path)
    from edgelab import onnxgraph
    from edgelab.wasinn.backends.onnx import OnnxGraph

    source = onnxgraph.read_model(data)
    _, shape = onnxgraph.single_input(source)
    prepared = onnxgraph.prepare(source, 21 if scheme == "int4-weights" else onnxgraph.OPSET)
    before = onnxgraph.copy(prepared)
    layers = onnxgraph.layers(prepared)
    known = [layer.name for layer in layers]
    if missing := sorted(set(keep_float) - set(known)):
        raise EdgelabError(
            f"the model has no layer {', '.join(missing)[:200]}; the first ones are "
            f"{', '.join(known[:3])}. edgelab.quantize.sensitivity() lists all"
        )
    feeds = _Feeds(calibration, shape) if scheme in CALIBRATED and calibration is not None else None
    try:
        made = _make(scheme, prepared, feeds, keep_float)
    except EdgelabError:
        raise
    except Exception as error:  # whatever a quantizer raises on a graph that it did not expect
        raise ModelError(f"{scheme} failed on this model: {one_line(error)}") from None
    kinds = _layer_kinds(before, made, layers)
    onnxgraph.label(made, layers)
    onnxgraph.shorten(made, layers)
    _finish(made, source, scheme, data, spec, feeds.count if feeds else 0)
    result = made.SerializeToString(deterministic=True)
    OnnxGraph(result, 1)  # it runs before it gets its name
    try:
        write_atomic(output, result)
    except OSError as error:
        raise EdgelabError(f"can't write {output}: {error.strerror or error}") from None
    return Quantized(
        path=output,
        scheme=scheme,
        source_bytes=len(data),
        size_bytes=len(result),
        sha256=hashlib.sha256(result).hexdigest(),
        calibration_images=feeds.count if feeds else 0,
        layers=kinds,
        reason=speed_reason(result),
        seconds=time.perf_counter() - begin,
    )


def _source(model: str | Path | Model) -> tuple[Path, bytes, Spec | None]:
    """Return path and bytes of a model, and the spec that it was loaded with."""
    from edgelab.onnxgraph import MAX_SOURCE_BYTES

    if isinstance(model, str) and model in models.registry():
        model = models.load(model)
    if isinstance(model, Model):
        return model.path, model.data, model.spec
    path = Path(model)
    data = models.read_file(path, max_bytes=MAX_SOURCE_BYTES)
    try:
        spec = models.read_spec(data)
    except ModelError:  # it has none, or is no model, which read_model explains
        spec = None
    return path, data, spec


def _require_other(output: Path, source: Path) -> None:
    if "\0" in str(output):
        raise EdgelabError(f"can't write {str(output)!r:.200}: no file has a NUL in its name")
    try:
        if output.is_dir():
            raise EdgelabError(f"{output} is a folder; give the name of the file to write")
        same = output.exists() and source.exists() and output.samefile(source)
    except (OSError, ValueError) as error:
        raise EdgelabError(f"can't write {str(output)!r:.200}: {error}") from None
    if same:
        raise EdgelabError(
            f"the output {output} is the model itself, which is never overwritten. Choose another "
            "name"
        )


def load_source(name: str | Path, labels: Path | None = None) -> Model | Path:
    """Load a model for the command line.

    Parameters
    ----------
    name : str or pathlib.Path
        A registry name, or an ONNX file.
    labels : pathlib.Path, optional
        ImageNet's list of classes: feed the model as usual for ImageNet, whatever it says itself.

    Returns
    -------
    Model or pathlib.Path
        The path alone if the file does not say how to feed it.

    Raises
    ------
    ModelError
        If there is no such model.
    """
    if labels is not None:
        return models.load(name, spec=models.imagenet_spec(Path(name).stem, labels))
    if str(name) in models.registry():
        return models.load(name)
    path, _, spec = _source(name)
    return path if spec is None else models.load(path)


def calibration_pictures(
    source: Model | Path, folder: Path | None = None, count: int = 256
) -> tuple[Sequence[Sample], Spec]:
    """Choose the pictures to calibrate with, and say how to prepare them.

    Parameters
    ----------
    source : Model or pathlib.Path
        From `load_source`.
    folder : pathlib.Path, optional
        Any pictures of the kind that the model will see, with or without classes. The default is,
        for a model of the rendered signs, the split ``"calibrate"``, which shares no picture with
        the one that is scored.
    count : int
        At most so many.

    Raises
    ------
    EdgelabError
        If there are none, or the model does not say how to prepare them.
    """
    from edgelab.datasets import SIGNS, ImageFolder, Signs

    if isinstance(source, Path):
        raise ModelError(
            f"{source} does not say how to prepare a picture, so it can't be calibrated with some. "
            "Add its spec (models/README.md shows how); if it is an ImageNet model that is fed as "
            "usual: --labels FILE, with lines such as 'n01440764 tench, Tinca tinca'"
        )
    if folder is not None:
        return ImageFolder(folder, count=count), source.spec
    if source.spec.labels != SIGNS:
        raise EdgelabError(
            f"no pictures for model {source.spec.name!r}: it does not know the rendered signs. "
            "Give --calibrate DIR with 100 or more pictures of the kind that it will see"
        )
    return Signs("calibrate", count), source.spec


class _Feeds:
    """Calibration data as the model takes them: one run's input at a time, checked, counted."""

    def __init__(
        self, calibration: Tensor | Iterable[Tensor], shape: tuple[int | None, ...]
    ) -> None:
        self._calibration, self._shape = calibration, shape
        self.count = 0

    def __iter__(self) -> Iterator[Tensor]:
        batch = self._shape[0] or 1 if self._shape else 1
        self.count = 0
        waiting: list[Tensor] = []
        for array in self._arrays():
            for image in array:
                waiting.append(image)
                if len(waiting) == batch:
                    self.count += batch
                    yield np.stack(waiting)
                    waiting = []
        if not self.count:
            raise EdgelabError(
                f"there are {len(waiting)} calibration images; the model takes {batch} at a time"
            )

    def _arrays(self) -> Iterator[Tensor]:
        given = self._calibration
        some: Iterable[Any] = [given] if isinstance(given, np.ndarray) else given
        for array in some:
            fits = isinstance(array, np.ndarray) and array.ndim == len(self._shape)
            fits = fits and all(
                want in (None, got)
                for want, got in zip(self._shape[1:], array.shape[1:], strict=True)
            )
            if not fits or array.dtype != np.float32:
                what = (
                    f"{array.dtype} {list(array.shape)}"
                    if isinstance(array, np.ndarray)
                    else type(array).__name__
                )
                want = ", ".join("any" if d is None else str(d) for d in self._shape[1:])
                raise EdgelabError(
                    f"calibration data are {what}; the model takes float32 [n, {want}]. "
                    "edgelab.datasets.tensors() prepares pictures"
                )
            if not np.isfinite(array).all():
                raise EdgelabError("calibration data hold infinity or NaN")
            yield array


def _make(
    scheme: str, prepared: ModelProto, feeds: _Feeds | None, keep_float: Sequence[str]
) -> ModelProto:
    """Return the model in its new form, with the tensor names that the quantizer gave."""
    from edgelab import onnxgraph

    if scheme == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        made: ModelProto = convert_float_to_float16(prepared, keep_io_types=True)
        return made
    if scheme == "int8-dynamic":
        return _dynamic(prepared)
    if scheme == "int4-weights":
        onnxgraph.four_bits(prepared)
        return _four_bit_products(prepared)
    assert feeds is not None
    means = None
    if scheme in ("int8-entropy", "int8-percentile"):
        found = _histogram_ranges(prepared, feeds, scheme.removeprefix("int8-"))
    elif scheme == "int8":
        found, means = onnxgraph.observe(prepared, feeds, mean=True)
    else:
        found, _ = onnxgraph.observe(prepared, feeds)
    return _with_rounding(prepared, found, scheme != "int8-per-tensor", keep_float, means)


def _histogram_ranges(
    prepared: ModelProto, feeds: Iterable[Tensor], method: str
) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Let ONNX Runtime's calibrators choose ranges, on one image at a time.

    Given all at once, they would hold every activation of every image in memory: 50 MB an image
    for MobileNetV2.
    """
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    from edgelab.onnxgraph import quiet

    kind = {"entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
    with tempfile.TemporaryDirectory(prefix="edgelab-") as folder, quiet():
        path = Path(folder, "model.onnx")
        onnx.save(prepared, path)
        calibrator = create_calibrator(
            path, _OPERATORS, str(Path(folder, "more.onnx")), calibrate_method=kind[method]
        )
        given = prepared.graph.input[0].name
        for feed in feeds:
            calibrator.collect_data(_Once({given: feed}))
        return {name: tuple(data.range_value) for name, data in calibrator.compute_data().items()}


class _Once:
    """A calibration data reader that gives one input."""

    def __init__(self, feed: dict[str, Tensor]) -> None:
        self._feeds = [feed]

    def get_next(self) -> dict[str, Tensor] | None:
        return self._feeds.pop() if self._feeds else None


def _with_rounding(
    prepared: ModelProto,
    found: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    per_channel: bool,
    keep_float: Sequence[str],
    means: Mapping[str, NDArray[Any]] | None,
) -> ModelProto:
    """Let ONNX Runtime put a QuantizeLinear and a DequantizeLinear at each tensor."""
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorsData
    from onnxruntime.quantization.calibrate import CalibrationMethod

    from edgelab import onnxgraph

    floats = onnxgraph.arrays(prepared)
    known = onnxgraph.layers(prepared)
    readers = onnxgraph.consumers(prepared.graph)
    excluded = list(keep_float)
    for node in prepared.graph.node:
        if node.name in keep_float:  # its activation function stays in float with it
            excluded += [r.name for r in readers[node.output[0]] if r.op_type in ("Clip", "Relu")]
    with onnxgraph.quiet():
        quantizer = QDQQuantizer(
            prepared,
            per_channel,
            False,  # reduce_range: only AVX2 without VNNI would need weights of 7 bits
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, dict(found)),
            [],
            excluded,
            _OPERATORS,
            {},
        )
        quantizer.quantize_model()
    made: ModelProto = quantizer.model.model
    onnxgraph.compact(made, floats, known, means)
    return made


def _dynamic(prepared: ModelProto) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from edgelab.onnxgraph import quiet

    with tempfile.TemporaryDirectory(prefix="edgelab-") as folder, quiet():
        path = Path(folder, "model.onnx")
        # ConvInteger has kernels for unsigned weights only.
        quantize_dynamic(prepared, path, weight_type=QuantType.QUInt8)
        made: ModelProto = onnx.load(path)
    return made


def _four_bit_products(prepared: ModelProto) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from edgelab.onnxgraph import BLOCK, quiet

    with quiet():
        quantizer = MatMulNBitsQuantizer(prepared, 4, BLOCK, is_symmetric=True)
        quantizer.process()
    made: ModelProto = quantizer.model.model
    return made


def _layer_kinds(
    prepared: ModelProto, made: ModelProto, layers: Sequence[Layer]
) -> tuple[LayerKind, ...]:
    from edgelab import onnxgraph

    groups: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        before, _ = onnxgraph.weight_bytes(prepared, layer)
        after, weights = onnxgraph.weight_bytes(made, layer)
        sums = groups.setdefault((layer.kind, weights), [0, 0, 0])
        for k, value in enumerate((1, before, after)):
            sums[k] += value
    return tuple(
        LayerKind(kind, count, weights, before, after)
        for (kind, weights), (count, before, after) in groups.items()
    )


def _finish(
    made: ModelProto, source: ModelProto, scheme: str, data: bytes, spec: Spec | None, images: int
) -> None:
    """Give the new model its metadata: the old one's, a spec of its own, and where it is from."""
    import onnx

    facts = {entry.key: entry.value for entry in source.metadata_props}
    if spec is not None:
        facts.update(replace(spec, name=f"{spec.name}-{scheme}").to_metadata())
    facts["edgelab.quantized"] = json.dumps(
        {
            "scheme": scheme,
            "calibration_images": images,
            "source_sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    del made.metadata_props[:]
    onnx.helper.set_model_props(made, facts)
    made.producer_name, made.producer_version, made.doc_string = "edgelab", "", ""
    made.ir_version = max(source.ir_version, 10 if scheme == "int4-weights" else 7)


def speed_reason(model: str | Path | bytes, features: Sequence[str] | None = None) -> str:
    """Say in one line why a model is faster or slower than FP32 on a CPU with these features.

    Parameters
    ----------
    model : str, pathlib.Path or bytes
        An ONNX file.
    features : sequence of str, optional
        Of the CPU, as `edgelab.measure.fingerprint` names them; the default is this machine's.

    Raises
    ------
    ModelError
        If the model can't be read.
    """
    from edgelab import onnxgraph
    from edgelab.wasinn.backends.onnx import check_onnx

    data = model if isinstance(model, bytes) else _source(model)[1]
    check_onnx(data)
    graph = onnxgraph.parse(data).graph
    counts = Counter(node.op_type for node in graph.node)
    if features is None:
        features = fingerprint().features
    return _reason(counts, _element_types(graph), frozenset(features))


def _element_types(graph: Any) -> Counter[str]:
    import onnx

    return Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer
                   if len(t.dims) > 1)  # fmt: skip


_DOT_PRODUCTS = {
    "avx512_vnni": "AVX512-VNNI multiplies and adds 64 pairs of 8-bit numbers an instruction, "
    "against 16 of float32",
    "avx_vnni": "AVX-VNNI multiplies and adds 32 pairs of 8-bit numbers an instruction, against 8 "
    "of float32",
    "i8mm": "the i8mm instructions multiply and add 32 pairs of 8-bit numbers, against 4 of "
    "float32",
    "asimddp": "the dot-product instructions multiply and add 16 pairs of 8-bit numbers, against 4 "
    "of float32",
}


def _reason(counts: Counter[str], kinds: Counter[str], features: frozenset[str]) -> str:
    dot = next((text for name, text in _DOT_PRODUCTS.items() if name in features), None)
    weighted = sum(counts[op] for op in ("Conv", "Gemm", "MatMul", "MatMulNBits"))
    if counts["DynamicQuantizeLinear"]:
        return (
            f"{counts['DynamicQuantizeLinear']} DynamicQuantizeLinear and {counts['ConvInteger']} "
            "ConvInteger: each run first looks for the range of every activation, and each "
            "convolution's sums become float32 again before the next one, so most of the gain of "
            "8-bit products is lost"
        )
    if kinds["INT4"] or kinds["UINT4"] or counts["MatMulNBits"]:
        return (
            f"{counts['DequantizeLinear']} DequantizeLinear unpack the weights in each run, then "
            "the convolutions compute in float32: there are no 4-bit kernels for convolutions, so "
            f"it is slower than FP32. {counts['MatMulNBits']} MatMulNBits unpack in the kernel, "
            "which pays where reading weights is the bottleneck"
        )
    if counts["QuantizeLinear"] or any(op.startswith("QLinear") for op in counts):
        rounded = weighted + sum(n for op, n in counts.items() if op.startswith("QLinear"))
        if dot:
            return (
                f"{rounded} layers with int8 weights: {dot}; weights are a quarter of the bytes. "
                "Rounding between layers, and float layers, take part of the gain back"
            )
        return (
            f"{rounded} layers with int8 weights, and this CPU has no instruction for sums of "
            "8-bit products (VNNI, dot product): they go through 16 bits, which costs most of the "
            "speed and, on x86, can saturate and cost accuracy"
        )
    if kinds["FLOAT16"]:
        if "asimdhp" in features:
            return (
                f"{weighted} layers in float16: this CPU computes on 8 float16 at a time, against "
                "4 float32, where the runtime has kernels for it"
            )
        more = " (not even AVX512-FP16 is used)" if "avx512_fp16" in features else ""
        return (
            f"{weighted} layers in float16: ONNX Runtime has no float16 kernels for x86{more}, so "
            "it widens to float32 and back around them: half the file, and no faster"
        )
    return f"{weighted} layers in float32: the baseline"


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """How much precision one layer loses.

    Attributes
    ----------
    name : str
        Of the node, as `quantize` takes it in `keep_float`.
    kind : str
    weight_sqnr_db : float or None
        Signal to quantization noise of its weights; None if they stayed in float.
    activation_sqnr_db : float
        The same for its output on the given inputs, with everything before it quantized too.
    range_ratio : float
        Largest ``max |w|`` of an output channel over the median one: with one scale for all
        channels, the median channel gets ``range_ratio`` times fewer steps than the largest.
    """

    name: str
    kind: str
    weight_sqnr_db: float | None
    activation_sqnr_db: float
    range_ratio: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Precision lost, layer by layer in the order of execution.

    Attributes
    ----------
    layers : tuple of LayerSensitivity
    output_sqnr_db : float
        Of the model's output.
    images : int
    """

    layers: tuple[LayerSensitivity, ...]
    output_sqnr_db: float
    images: int

    def worst(self, count: int = 5) -> tuple[LayerSensitivity, ...]:
        """Layers whose own weights are the noisiest, the worst first."""
        known = [layer for layer in self.layers if layer.weight_sqnr_db is not None]
        return tuple(sorted(known, key=lambda layer: layer.weight_sqnr_db or 0.0)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    _COLUMNS = ("layer", "kind", "weights", "output", "largest channel / median")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name,
                layer.kind,
                "float" if layer.weight_sqnr_db is None else f"{layer.weight_sqnr_db:.1f}",
                f"{layer.activation_sqnr_db:.1f}",
                f"{layer.range_ratio:.1f}",
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        line = "{:<24} {:<22} {:>9} {:>9} {:>11}".format
        columns = (*self._COLUMNS[:4], "max/median")
        lines = [line(*row) for row in (columns, *self._cells())]
        head = f"SQNR in dB, {self.images} image(s)"
        return "\n".join([head, *lines, f"output: {self.output_sqnr_db:.1f} dB"])

    def _repr_html_(self) -> str:
        caption = f"Signal to quantization noise, dB; output {self.output_sqnr_db:.1f}"
        return html_table(caption, self._COLUMNS, self._cells())


def sensitivity(
    model: str | Path | Model, quantized: str | Path | Model, inputs: Tensor
) -> Sensitivity:
    """Compare a quantized model with its source, layer by layer.

    Parameters
    ----------
    model, quantized : str, pathlib.Path or edgelab.models.Model
        The FP32 model, and what `quantize` made of it.
    inputs : numpy.ndarray
        ``float32``, ``(n, channels, height, width)``; a few images are enough.

    Returns
    -------
    Sensitivity
        Signal to quantization noise: ``10 log10(sum x^2 / sum (x - x')^2)``, in dB; 6 dB are one
        bit.

    Raises
    ------
    ModelError
        If either can't be read, or the second was not made from the first.
    """
    from edgelab import onnxgraph
    from edgelab.wasinn.backends.onnx import check_onnx

    _, data, _ = _source(model)
    _, small, _ = _source(quantized)
    source = onnxgraph.read_model(data)
    _, shape = onnxgraph.single_input(source)
    prepared = onnxgraph.prepare(source)
    check_onnx(small)
    other = onnxgraph.parse(small)
    origin = _origin(other)
    if origin.get("source_sha256") != hashlib.sha256(data).hexdigest():
        raise ModelError(
            "the second model does not say that it was made from the first. Make it with "
            "edgelab.quantize.quantize(first, second)"
        )
    layers = onnxgraph.layers(prepared)
    floats = onnxgraph.arrays(prepared)
    weights = onnxgraph.stored_weights(other, layers)
    places = onnxgraph.matching_outputs(other, layers)
    feeds = _Feeds(inputs, shape)
    ours = onnxgraph.run_all(prepared, [layer.output for layer in layers], feeds)
    theirs = onnxgraph.run_all(other, places.values(), _Feeds(inputs, shape))
    signal: dict[str, float] = dict.fromkeys(places, 0.0)
    noise = dict(signal)
    for exact, rounded in zip(ours, theirs, strict=True):
        for layer in layers:
            if layer.name in places:
                x = exact[layer.output]
                signal[layer.name] += float(np.square(x, dtype=np.float64).sum())
                difference = x - rounded[places[layer.name]].astype(np.float32)
                noise[layer.name] += float(np.square(difference, dtype=np.float64).sum())
    found = []
    for layer in layers:
        weight, now = floats[layer.weight], weights.get(layer.name)
        largest = np.abs(np.moveaxis(weight, layer.axis, 0).reshape(weight.shape[layer.axis], -1))
        largest = largest.max(1)
        if now is not None:
            now = now if now.shape == weight.shape else now.T
            exact_energy = float(np.square(weight, dtype=np.float64).sum())
            lost = float(np.square(weight - now, dtype=np.float64).sum())
        found.append(
            LayerSensitivity(
                layer.name,
                layer.kind,
                None if now is None else _decibel(exact_energy, lost),
                _decibel(signal[layer.name], noise[layer.name]),
                float(largest.max() / max(float(np.median(largest)), 1e-30)),
            )
        )
    return Sensitivity(tuple(found), found[-1].activation_sqnr_db, feeds.count)


def _origin(model: ModelProto) -> dict[str, Any]:
    """Read what `_finish` wrote into a model."""
    for entry in model.metadata_props:
        if entry.key == "edgelab.quantized":
            try:
                found = json.loads(entry.value)
            except (ValueError, RecursionError):
                break
            return found if isinstance(found, dict) else {}
    return {}


def _decibel(signal: float, noise: float) -> float:
    # Beyond 150 dB lies nothing but float32's own rounding; no noise would be infinity.
    return min(float(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300))), 150.0)
