"""The backends behind one protocol: the same models, results and errors, whoever computes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_wasinn import (
    CLASSIFIER,
    IDENTITY,
    INVALID,
    OK,
    ONNX_TYPES,
    RUNTIME,
    UNSUPPORTED,
    Client,
    bare,
    encoded,
    floats,
    last,
    onnx_model,
    with_external_data,
)

from edgelab import models
from edgelab.aot import available_cores
from edgelab.errors import ModelError
from edgelab.images import decode
from edgelab.models import example_image
from edgelab.preprocess import preprocess
from edgelab.wasinn import Encoding, Errno, WasiNN, load_graph
from edgelab.wasinn.backends import Context, Graph, worker
from edgelab.wasinn.backends.worker import WorkerGraph

ENCODING = Errno.INVALID_ENCODING
KINDS = ["onnxruntime", "openvino", "openvino-ir", "litert"]
APART = ["openvino-apart", "openvino-ir-apart", "litert-apart"]
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert"}


def needs(backend: str) -> None:
    """Skip where a backend has no wheel, or is not installed; CI must have it."""
    if importlib.util.find_spec(MODULES[backend]) is None:
        if (backend, sys.platform, platform.machine()) == ("litert", "darwin", "x86_64"):
            pytest.skip("LiteRT has no wheel for Intel Macs")
        reason = f"needs pip install 'edgelab[{backend}]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def openvino() -> Any:
    """OpenVINO, imported as edgelab does it."""
    needs("openvino")
    from edgelab.wasinn.backends.openvino import _core

    _core()
    return importlib.import_module("openvino")


def to_ir(folder: Path, model: bytes) -> tuple[bytes, bytes]:
    """Convert ONNX to OpenVINO IR, with OpenVINO's converter."""
    ov, source = openvino(), folder / "model.onnx"
    source.write_bytes(model)
    ov.save_model(ov.convert_model(source), folder / "model.xml", compress_to_fp16=False)
    return (folder / "model.xml").read_bytes(), (folder / "model.bin").read_bytes()


Load = Callable[..., Graph]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(kind: str, model: bytes, lite: Callable[[], bytes]) -> Graph:
        """Load a model given as ONNX, and as what makes its TFLite form."""
        backend, trusted = kind.partition("-")[0], not kind.endswith("-apart")
        needs(backend)
        if backend == "litert":
            parts: tuple[bytes, ...] = (lite(),)
        else:
            parts = to_ir(tmp_path, model) if "-ir" in kind else (model,)
        graph = load_graph(*parts, threads=1, backend=backend, trusted=trusted)
        assert isinstance(graph, WorkerGraph) != trusted
        return graph

    return loaded


def client_of(graph: Graph) -> tuple[Client, int]:
    """Give a guest a context of this graph."""
    client = Client(WasiNN({"model": graph}))
    name = client.heap.put(b"model")
    loaded = client.handle("load_by_name", name, 5)
    return client, client.handle("init_execution_context", loaded)


def run(graph: Graph, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
    """Run a graph without a guest."""
    context = bound(graph, *inputs)
    context.compute()
    return [context.output(k).copy() for k in range(len(graph.outputs))]


def bound(graph: Graph, *inputs: NDArray[Any]) -> Context:
    context = graph.context()
    for index, array in enumerate(inputs):
        context.bind_input(index, array.ctypes.data, array.shape, array.dtype)
    return context


def double(dtype: Any, shape: Sequence[int | None]) -> bytes:
    """Return a model that computes x + x, in float32."""
    kind = ONNX_TYPES[np.dtype(dtype)]
    nodes = [
        helper.make_node("Cast", ["x"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["single", "single"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["y"], to=kind),
    ]
    return encoded(onnx_model(nodes, [("x", kind, shape)], [("y", kind, shape)]))


def double_lite(dtype: Any, shape: Sequence[int | None], **metadata: bytes) -> bytes:
    from edgelab import tflite

    return tflite.double(dtype, [-1 if d is None else d for d in shape], metadata)


def double_in(load: Load, kind: str, dtype: Any, shape: Sequence[int | None]) -> Graph:
    return load(kind, double(dtype, shape), lambda: double_lite(dtype, shape))


# --- the same everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (None, 3)], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dtype", ONNX_TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_type_passes(
    load: Load, kind: str, dtype: np.dtype[Any], shape: Sequence[int | None]
) -> None:
    graph = double_in(load, kind, dtype, shape)
    (x,), (y,) = graph.inputs, graph.outputs
    assert (x.name, y.name) == ("x", "y")
    assert (x.dtype, y.dtype) == (dtype, dtype)
    assert [isinstance(d, int) for d in x.shape] == [d is not None for d in shape]
    client, context = client_of(graph)
    for batch in (2, 5, 1, 2) if shape[0] is None else (2, 2):
        values = np.arange(3 * batch).reshape(batch, 3).astype(dtype)
        client.run(context, values)
        assert client.output(context, dtype=dtype).tolist() == (2 * values).ravel().tolist()


@pytest.mark.parametrize("kind", APART)
def test_every_tensor_type_passes_between_processes(load: Load, kind: str) -> None:
    """One worker for each backend: that they carry every type is the worker's own doing."""
    dtypes: list[Any] = [*ONNX_TYPES] if kind == "litert-apart" else [np.dtype(np.float32)]
    for dtype in dtypes:
        client, context = client_of(double_in(load, kind, dtype, (None, 3)))
        for batch in (2, 5, 0, 1):
            values = np.arange(3 * batch).reshape(batch, 3).astype(dtype)
            client.run(context, values)
            assert client.output(context, dtype=dtype).tolist() == (2 * values).ravel().tolist()


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_scalars_and_empty_tensors_pass(load: Load, kind: str) -> None:
    client, context = client_of(double_in(load, kind, np.float32, ()))
    client.run(context, np.array(2.5, np.float32))
    assert client.output(context).tolist() == [5]
    client, context = client_of(double_in(load, kind, np.float32, (None, 3)))
    for batch in (0, 2, 0):
        client.run(context, np.ones((batch, 3), np.float32))
        assert client.output(context).tolist() == [2, 2, 2] * batch


def difference_and_sum() -> bytes:
    """(a, b) → (b - a, Σ a), where a and b have different shapes."""
    nodes = [
        helper.make_node("Sub", ["b", "a"], ["difference"]),
        helper.make_node("ReduceSum", ["a", "axes"], ["sum"], keepdims=0),
    ]
    inputs = [("a", TensorProto.FLOAT, (1, 3)), ("b", TensorProto.FLOAT, (None, 3))]
    outputs = [("difference", TensorProto.FLOAT, (None, 3)), ("sum", TensorProto.FLOAT, (1,))]
    weights = {"axes": np.array([1], np.int64)}
    return encoded(onnx_model(nodes, inputs, outputs, weights))  # type: ignore[arg-type]


def difference_and_sum_lite() -> bytes:
    from edgelab import tflite

    made = tflite.Builder()
    a, b = made.tensor("a", (1, 3)), made.tensor("b", (-1, 3))
    difference, total = made.tensor("difference", (-1, 3)), made.tensor("sum", (1,))
    made.operator("SUB", [b, a], [difference])
    made.operator("SUM", [a, made.constant("axes", np.array([1], np.int32))], [total])
    return made.model([a, b], [difference, total])


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_a_model_may_have_several_inputs_and_outputs(load: Load, kind: str) -> None:
    graph = load(kind, difference_and_sum(), difference_and_sum_lite)
    assert [info.name for info in graph.inputs] == ["a", "b"]
    assert [info.name for info in graph.outputs] == ["difference", "sum"]
    client, context = client_of(graph)
    a, b = floats(1, 2, 4).reshape(1, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert client.set_input(context, b, 1) == OK  # in any order
    assert client("compute", context) == INVALID
    assert last(client).endswith("compute before set_input of ['a']")
    assert client.set_input(context, a, 0) == OK
    assert client("compute", context) == OK
    assert client.output(context, 0).tolist() == (b - a).ravel().tolist()
    assert client.output(context, 1).tolist() == [7]
    for index, errno in ((2, INVALID), (2**32 - 1, INVALID)):
        assert client.set_input(context, a, index) == errno
        assert client("get_output", context, index, client.out, 4, client.out) == errno


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_refused(load: Load, kind: str) -> None:
    client, context = client_of(double_in(load, kind, np.float32, (None, 3)))
    for wrong in (np.ones((2, 4)), np.ones(3), np.ones((1, 2, 3)), np.ones((3, 2))):
        assert client.set_input(context, wrong.astype(np.float32)) == INVALID
        assert "has shape" in last(client)
    assert client.set_input(context, np.ones((2, 3), np.int32)) == INVALID
    assert "is float32, the tensor is int32" in last(client)
    client.run(context, np.ones((2, 3), np.float32))
    assert client.output(context).tolist() == [2] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_types_that_wasi_nn_cannot_name_cannot_cross(load: Load, kind: str) -> None:
    """int8 and bool: a model may have them inside, not at its ends."""
    kinds = TensorProto.INT8, TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=kinds[0])]
    model = encoded(onnx_model(nodes, [("x", kinds[1], (3,))], [("y", kinds[0], (3,))]))

    def lite() -> bytes:
        from edgelab import tflite

        made = tflite.Builder()
        x, y = made.tensor("x", (3,)), made.tensor("y", (3,), np.int8)
        made.operator("CAST", [x], [y])
        return made.model([x], [y])

    graph = load(kind, model, lite)
    assert graph.outputs[0].dtype == np.int8
    client, context = client_of(graph)
    client.run(context, floats(1, 2, 3))
    assert client("get_output", context, 0, client.out, 4, client.out) == UNSUPPORTED
    assert run(graph, floats(1, 2, 3))[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_metadata_come_along(load: Load, kind: str) -> None:
    facts = {"name": "klein", "größe": "5", "labels": json.dumps(["<a>", "&", '"'])}
    model = onnx.load_model_from_string(double(np.float32, (3,)))
    helper.set_model_props(model, facts)

    def lite() -> bytes:
        text = {k: v.encode() + bytes(3) for k, v in facts.items()}  # often padded
        return double_lite(np.float32, (3,), **text, unreadable=b"\xff\xfe")

    assert load(kind, encoded(model), lite).metadata == facts


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_an_input_is_read_at_compute_and_never_written(load: Load, kind: str) -> None:
    graph = double_in(load, kind, np.float32, (None, 3))
    client, context = client_of(graph)
    tensor, data = client.tensor(np.ones((2, 3), np.float32))
    assert client("set_input", context, 0, tensor) == OK
    for values in (floats(1, 2, 3, 4, 5, 6), floats(-1, 0, 1, 0, 7, 8)):
        client.memory.write(data, values.tobytes())
        assert client("compute", context) == OK
        assert client.memory.read(data, 24) == values.tobytes()
        client.memory.write(data, bytes(24))  # comes too late
        assert client.output(context).tolist() == (2 * values).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_at_the_very_end_of_memory_is_read(load: Load, kind: str) -> None:
    """Behind it lies memory that nobody may touch: kernels must not read ahead."""
    for count in (1, 3, 7, 17, 1025):
        graph = double_in(load, kind, np.float32, (count,))
        client, context = client_of(graph)
        data = len(client.memory) - 4 * count
        client.memory.write(data, np.arange(count, dtype=np.float32).tobytes())
        dims = client.heap.put(count.to_bytes(4, "little"))
        assert client("set_input", context, 0, client.describe(dims, 1, 1, data, 4 * count)) == OK
        assert client("compute", context) == OK
        room = client.heap.room(4 * count)
        assert client("get_output", context, 0, room, 4 * count, client.out) == OK
        assert client.memory.array(room, count, np.float32).tolist() == list(range(0, 2 * count, 2))


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino", "litert"])
def test_outputs_that_are_inputs_do_not_follow_the_guests_memory(load: Load, kind: str) -> None:
    def lite() -> bytes:
        from edgelab import tflite

        made = tflite.Builder()
        x = made.tensor("x", (3,))
        return made.model([x], [x])

    value: Any = ("x", TensorProto.FLOAT, (3,))
    graph = load(kind, encoded(onnx_model([], [value], [value])), lite)
    client, context = client_of(graph)
    tensor, data = client.tensor(floats(1, 2, 3))
    assert client("set_input", context, 0, tensor) == OK
    assert client("compute", context) == OK
    client.memory.write(data, bytes(12))
    assert client.output(context).tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [*KINDS, "litert-apart"])
def test_contexts_of_one_graph_run_in_several_threads(load: Load, kind: str) -> None:
    graph = double_in(load, kind, np.float32, (None, 3))
    wrong: list[Any] = []

    def work(number: int) -> None:
        array = np.full((1 + number, 3), number, np.float32)
        context = bound(graph, array)
        for _ in range(50):
            context.compute()
            got = context.output(0)
            if got.shape != array.shape or (got != 2 * number).any():
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_the_embedded_model_says_the_same_everywhere(load: Load, kind: str) -> None:
    model = models.load("signs")
    image = preprocess(decode(example_image()), model.spec)
    (want,) = bare(model.data, image)

    def lite() -> bytes:
        from edgelab import tflite

        return tflite.from_onnx(model.data)

    graph = load(kind, model.data, lite)
    given = image
    if graph.metadata["layout"] == "NHWC":
        given = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    client, context = client_of(graph)
    client.run(context, given)
    logits = client.output(context)
    assert model.spec.labels[logits.argmax()] == "stop"
    np.testing.assert_allclose(logits, want[0], atol=1e-4)
    assert json.loads(graph.metadata["labels"]) == list(model.spec.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_may_bring_the_model_itself(tmp_path: Path, kind: str) -> None:
    """OpenVINO IR in two parts, the others in one; whatever the guest says that it is."""
    backend = kind.partition("-")[0]
    needs(backend)
    if kind == "litert":
        parts: tuple[bytes, ...] = (double_lite(np.float32, (None, 3)),)
    else:
        model = double(np.float32, (None, 3))
        parts = to_ir(tmp_path, model) if kind == "openvino-ir" else (model,)
    client = Client(WasiNN(backend=backend, threads=1))
    for encoding in (Encoding.OPENVINO, Encoding.ONNX, Encoding.TENSORFLOW_LITE):
        assert client.try_load(*parts, encoding=encoding) == OK, client.nn.errors
        context = client.handle("init_execution_context", client.heap.number(client.out))
        client.run(context, floats(1, 2, 3).reshape(1, 3))
        assert client.output(context).tolist() == [2, 4, 6]


# --- what each does in its own way ----------------------------------------------------------------


def test_openvino_compiles_once_and_reads_guest_memory_in_place(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelab.wasinn.backends import openvino as module

    ov, calls = openvino(), []

    class Counting(ov.Core):  # type: ignore[misc, name-defined]
        def compile_model(self, *arguments: Any) -> Any:
            calls.append(arguments)
            return super().compile_model(*arguments)

    monkeypatch.setattr(module, "_core", Counting)
    graph = double_in(load, "openvino", np.float32, (None, 3))
    client, context = client_of(graph)
    execution = client.instance.state[client.nn].executions[context]
    for batch in (1, 4, 2):
        tensor, data = client.tensor(np.ones((batch, 3), np.float32))
        assert client("set_input", context, 0, tensor) == OK
        assert client("compute", context) == OK
        given = execution.context._request.get_input_tensor(0).data
        assert given.ctypes.data == client.memory.address(data, 12)
        made = execution.context._request.get_output_tensor(0).data
        assert execution.context.output(0).ctypes.data == made.ctypes.data
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_compute_copies_no_output(load: Load, kind: str) -> None:
    graph = double_in(load, kind, np.float32, (None, 3))
    array = np.ones((200_000, 3), np.float32)
    context = bound(graph, array)
    for _ in range(2):  # then ONNX Runtime knows the output's shape
        context.compute()
    tracemalloc.start()  # sees what NumPy allocates
    context.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 2


@pytest.mark.parametrize("threads", [None, 1])
def test_openvino_runs_as_the_others_do(threads: int | None) -> None:
    openvino()
    graph: Any = load_graph(IDENTITY, threads=threads, backend="openvino")
    get = graph._compiled.get_property
    assert get("INFERENCE_NUM_THREADS") == (threads or available_cores())
    assert get("INFERENCE_PRECISION_HINT") == openvino().Type.f32
    assert str(get("PERFORMANCE_HINT")) == "LATENCY"
    assert get("ENABLE_CPU_PINNING") is False


def test_openvino_refuses_numbers_that_it_would_change() -> None:
    openvino()
    model = double(np.int64, (None,))
    graph = load_graph(model, backend="openvino")
    for fine in ([0, 2**31 - 1], [0, -(2**31)], []):
        run(graph, np.array(fine, np.int64))
    client, context = client_of(graph)
    for value in (2**31, -(2**31) - 1):
        assert client.set_input(context, np.array([0, value])) == OK
        assert client("compute", context) == RUNTIME
        assert "input 'x' has values beyond 32 bits" in last(client)
        run(load_graph(model), np.array([0, value]))


def test_openvino_names_tensors_not_layers(tmp_path: Path) -> None:
    xml, weights = to_ir(tmp_path, CLASSIFIER)
    layers = xml.replace(b'name="x" type', b'name="layer" type').replace(b"y/sink", b"layer/sink")
    assert layers.count(b'"layer') == 2
    graph = load_graph(layers, weights, threads=1)
    assert (graph.inputs[0].name, graph.outputs[0].name) == ("x", "y")


def test_openvino_metadata_may_be_of_its_own_kind(tmp_path: Path) -> None:
    xml, weights = to_ir(tmp_path, CLASSIFIER)
    more = b'<rt_info><model_info><labels value="a b" /><deep><er value="1" /></deep></model_info>'
    graph = load_graph(xml.replace(b"<rt_info>", more, 1), weights, threads=1)
    assert graph.metadata == {"name": "klein", "größe": "5", "labels": "a b"}


@pytest.mark.parametrize("trusted", [True, False])
def test_contexts_have_their_own_state(tmp_path: Path, trusted: bool) -> None:
    ov = openvino()
    operators = importlib.import_module("openvino.opset15")
    x = operators.parameter([1], ov.Type.f32, name="x")
    before = operators.read_value(operators.constant(floats(0)), "sum", ov.Type.f32, [1])
    total = operators.add(before, x)
    keep = operators.assign(total, "sum")
    ov.save_model(ov.Model([operators.result(total)], [keep], [x], "sums"), tmp_path / "m.xml")
    parts = ((tmp_path / f"m.{part}").read_bytes() for part in ("xml", "bin"))
    graph, given = load_graph(*parts, threads=1, trusted=trusted), floats(2)
    first, second = bound(graph, given), bound(graph, given)
    for context, want in ((first, 2), (first, 4), (second, 2), (first, 6), (second, 4)):
        context.compute()
        assert context.output(0).tolist() == [want]


def test_openvino_passes_strings_over(tmp_path: Path) -> None:
    """An output may have a type that nobody here can name; the others are as useful as ever."""
    ov = openvino()
    operators = importlib.import_module("openvino.opset15")
    number = operators.parameter([-1], ov.Type.f32, name="number")
    results = [ov.op.Constant(ov.Tensor(np.array(["text"]))), operators.relu(number)]
    ov.save_model(ov.Model(results, [number], "mixed"), tmp_path / "m.xml")
    graph = load_graph(*((tmp_path / f"m.{part}").read_bytes() for part in ("xml", "bin")))
    assert [info.dtype for info in graph.outputs] == [None, np.float32]
    client, context = client_of(graph)
    client.run(context, floats(-1, 2))
    assert client("get_output", context, 0, client.out, 4, client.out) == UNSUPPORTED
    assert client.output(context, 1).tolist() == [0, 2]


def test_openvino_sends_no_telemetry(tmp_path: Path) -> None:
    """Its import would, and leave files in the home folder."""
    needs("openvino")
    probe = (
        "import sys; from edgelab.wasinn import load_graph; "
        f"graph = load_graph({IDENTITY!r}, backend='openvino'); import openvino; "
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry')]; "
        "assert openvino.convert_model"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment["HOME"] = environment["USERPROFILE"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", probe], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_litert_has_one_interpreter_for_each_context(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("litert")
    module = importlib.import_module("ai_edge_litert.interpreter")
    made: list[Any] = []

    class Counting(module.Interpreter):  # type: ignore[misc, name-defined]
        def __init__(self, **arguments: Any) -> None:
            made.append(arguments)
            super().__init__(**arguments)

    monkeypatch.setattr(module, "Interpreter", Counting)
    graph = double_in(load, "litert", np.float32, (None, 3))
    contexts = [graph.context() for _ in range(3)]
    assert len(made) == len(contexts)
    assert {id(arguments["model_content"]) for arguments in made} == {id(made[0]["model_content"])}
    assert [arguments["num_threads"] for arguments in made] == [1, 1, 1]


def test_litert_finds_at_load_what_it_cannot_run(load: Load) -> None:
    needs("litert")
    from edgelab import tflite

    made = tflite.Builder()
    a, b, total = (made.tensor(name, (size,)) for name, size in (("a", 3), ("b", 4), ("c", 4)))
    made.operator("ADD", [a, b], [total])
    with pytest.raises(ModelError, match=r"E3: .* LiteRT refused the model: .*failed to prepare"):
        load("litert", b"", lambda: made.model([a, b], [total]))


def test_litert_passes_complex_numbers_over(load: Load) -> None:
    needs("litert")
    from edgelab import tflite

    made = tflite.Builder()
    x, y, z = made.tensor("x", (2,)), made.tensor("y", (2,), np.complex64), made.tensor("z", (2,))
    made.operator("CAST", [x], [y])
    made.operator("NEG", [x], [z])
    graph = load("litert", b"", lambda: made.model([x], [y, z]))
    assert [info.dtype for info in graph.outputs] == [None, np.float32]
    client, context = client_of(graph)
    client.run(context, floats(1, 2))
    assert client("get_output", context, 0, client.out, 4, client.out) == UNSUPPORTED
    assert client.output(context, 1).tolist() == [-1, -2]


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [("name", None, {}), ("buffer", 1 << 20, {}), ("buffer", 0, {"bad": ""})],
)
def test_damaged_tflite_metadata_are_passed_over(
    load: Load, field: str, value: Any, kept: dict[str, str]
) -> None:
    needs("litert")
    from edgelab import tflite

    def damage(model: Any) -> None:
        setattr(model.metadata[0], field, value)

    model = double_lite(np.float32, (3,), bad=b"1", good=b"2", empty=b"")
    graph = load("litert", b"", lambda: tflite.changed(model, damage))
    assert graph.metadata == {**kept, "good": "2", "empty": ""}


def test_quantized_tensors_pass_as_they_are(load: Load) -> None:
    needs("litert")
    from edgelab import tflite

    made, scale = tflite.Builder(), tflite.table("QuantizationParameters")
    scale.scale, scale.zeroPoint = [0.5], [10]
    x, y = (made.tensor(name, (-1, 2), np.uint8, quantization=scale) for name in "xy")
    made.operator("ADD", [x, x], [y])
    graph = load("litert", b"", lambda: made.model([x], [y]))
    client, context = client_of(graph)
    client.run(context, np.array([[10, 30], [11, 255]], np.uint8))
    # (q - 10) / 2, doubled, is 2 (q - 10) / 2: at 255 it saturates
    assert client.output(context, dtype=np.uint8).tolist() == [10, 50, 12, 255]


# --- what does not load (E3) ----------------------------------------------------------------------


def saved_model() -> bytes:
    return b"\x08\x01\x12\x04\x0a\x02\x08\x01"


WRONG: list[Any] = [
    pytest.param((b"PK\3\4model",), 1, "the guest says onnx, the 1 part(s) look like pytorch; "
                 "this host runs ONNX, OpenVINO IR and TFLite. Cure: export", id="pytorch"),
    pytest.param((b"GGUF\3\0\0\0",), 6, "says ggml, the 1 part(s) look like gguf; .*can't be "
                 "converted", id="gguf"),
    pytest.param((saved_model(),), 2, "says tensorflow, the 1 part(s) look like tensorflow; .*"
                 "tf2onnx", id="saved model"),
    pytest.param((b"\x0a\x02\x0a\0\x22\0",), 2, "look like tensorflow; ", id="frozen graph"),
    pytest.param((b"\x18\0\0\0ORTM\0\0",), 1, "look like ort; .*the .onnx file", id="ort"),
    pytest.param((b"\0\1\2",), 0, "says openvino, the 1 part(s) look like unknown; .*damaged",
                 id="unknown"),
    pytest.param((b"",), 4, "look like unknown", id="empty"),
    pytest.param((b"<net/>",), 0, "look like openvino; OpenVINO IR has two parts: first the .xml",
                 id="ir without weights"),
    pytest.param((b"weights", b"<net/>"), 0, "the 2 part(s) look like unknown + openvino; "
                 "OpenVINO IR has two parts", id="ir swapped"),
    pytest.param((b"<net/>", b"<net/>"), 0, "look like openvino + openvino; OpenVINO IR has",
                 id="ir twice"),
    pytest.param((IDENTITY, b"\0\1"), 1, "look like onnx + unknown; such a model has one part",
                 id="onnx in two parts"),
    pytest.param((IDENTITY[:-3],), 1, "look like unknown; .*cut off", id="onnx cut off"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "encoding", "says"), WRONG)
def test_a_guest_learns_what_its_bytes_are(
    parts: tuple[bytes, ...], encoding: int, says: str
) -> None:
    client = Client(WasiNN())
    assert client.try_load(*parts, encoding=encoding) == ENCODING
    assert "load: invalid_encoding: E3: " in last(client)
    for piece in says.split(".*"):
        assert piece in last(client)


@pytest.mark.parametrize(
    ("backend", "parts", "able"),
    [
        ("litert", (IDENTITY,), "onnxruntime and openvino can"),
        ("tensorrt", (IDENTITY,), "onnxruntime and openvino can"),
        ("onnxruntime", (b"<net/>", b"weights"), "openvino can"),
        ("openvino", (b"\x1c\0\0\0TFL3",), "litert can"),
    ],
)
def test_a_preference_that_cannot_be_met_is_an_error(
    backend: str, parts: tuple[bytes, ...], able: str
) -> None:
    with pytest.raises(ModelError, match=f"^E3: .*which {backend} does not run here; {able}$"):
        load_graph(*parts, backend=backend)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("module", "extra", "parts"),
    [
        ("openvino", "openvino", (b"<net/>", b"weights")),
        ("ai_edge_litert", "litert", (b"\x1c\0\0\0TFL3",)),
    ],
)
def test_a_missing_backend_names_its_extra(
    tmp_path: Path, module: str, extra: str, parts: tuple[bytes, ...], trusted: bool
) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ImportError('no {module} here')")
    probe = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from edgelab.wasinn import Encoding, load_graph\n"
        f"try: load_graph(*{parts!r}, claimed=Encoding.ONNX, trusted={trusted})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ModelError E3: the guest says onnx, the ")
    assert f", and {extra} is missing (no {module} here). Cure: " in done.stdout
    assert done.stdout.strip().endswith(f"pip install 'edgelab[{extra}]'")


def test_the_host_imports_no_backend() -> None:
    probe = (
        "import sys, edgelab.wasinn; "
        "heavy = {'onnxruntime', 'openvino', 'ai_edge_litert', 'flatbuffers', 'onnx'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


@pytest.mark.parametrize(
    "model", [pytest.param(encoded(model), id=where) for where, model in with_external_data()]
)
def test_openvino_opens_no_other_files_either(model: bytes) -> None:
    needs("openvino")
    with pytest.raises(ModelError, match="external data"):
        load_graph(model, backend="openvino")


# --- models that mean harm ------------------------------------------------------------------------


def pad(*sizes: int) -> bytes:
    """(n, 4) → padded; negative sizes cut."""
    inputs: list[Any] = [("x", TensorProto.FLOAT, (None, 4))]
    outputs: list[Any] = [("y", TensorProto.FLOAT, None)]
    weights = {"sizes": np.array(sizes, np.int64)}
    return encoded(
        onnx_model([helper.make_node("Pad", ["x", "sizes"], ["y"])], inputs, outputs, weights)
    )


def transpose_by_nothing() -> bytes:
    from edgelab import tflite

    made = tflite.Builder()
    x, y = made.tensor("x", (1, 4)), made.tensor("y", (4, 1))
    made.operator("TRANSPOSE", [x, -1], [y])
    return made.model([x], [y])


def convolution_without_bias() -> bytes:
    from edgelab import tflite

    made = tflite.Builder()
    x, y = made.tensor("x", (1, 4, 4, 1)), made.tensor("y", (1, 4, 4, 1))
    weight = made.constant("w", np.ones((1, 3, 3, 1), np.float32))
    made.operator("DEPTHWISE_CONV_2D", [x, weight], [y], strideH=1, strideW=1, depthMultiplier=1)
    return made.model([x], [y])


# Each kills the process that runs it, with the versions of this time: at load, or at compute.
DEADLY = [
    pytest.param("openvino", lambda: pad(-100_000, 0, 100_001, 0), (1, 4), id="openvino pad"),
    pytest.param("litert", transpose_by_nothing, (1, 4), id="litert transpose"),
    pytest.param("litert", convolution_without_bias, (1, 4, 4, 1), id="litert convolution"),
]


@pytest.mark.parametrize(("backend", "make", "shape"), DEADLY)
def test_the_host_survives_a_deadly_model(
    backend: str, make: Callable[[], bytes], shape: tuple[int, ...]
) -> None:
    needs(backend)
    harmless = load_graph(IDENTITY, threads=1)
    try:
        graph = load_graph(make(), backend=backend, threads=1, trusted=False)
        client, context = client_of(graph)
        assert client.set_input(context, np.ones(shape, np.float32)) == OK
        errno = client("compute", context)
        if errno != OK:  # a later version may know better
            assert errno == RUNTIME
            assert "the model's process died" in last(client)
            assert "(Killed)" not in last(client)  # the host came second
            assert client("compute", context) == RUNTIME
            assert "the model's process has ended" in last(client)
    except ModelError as error:
        assert "the model's process died" in str(error) or "refused" in str(error)  # noqa: PT017
    assert run(harmless, floats(1, 2))[0].tolist() == [1, 2]


def endless() -> bytes:
    """Return a loop of 2^62 rounds."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("Add", ["a", "a"], ["b"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, (1,)),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, (1,)),
        ],
    )
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    value = ("x", TensorProto.FLOAT, (1,))
    weights = {"rounds": np.array(2**62)}
    return encoded(onnx_model([node], [value], [("y", *value[1:])], weights))


def test_a_worker_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SECONDS", 2)
    graph = WorkerGraph(endless(), backend="onnxruntime", threads=1)
    context = bound(graph, floats(1))
    with pytest.raises(ModelError, match=r"the model's process died \(took more than 2 s\)"):
        context.compute()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_worker_that_takes_too_much_memory_gets_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "MEMORY", 3 << 30)
    graph = WorkerGraph(pad(0, 0, 0, 1 << 30), backend="onnxruntime", threads=1)
    context = bound(graph, np.ones((1, 4), np.float32))
    with pytest.raises(ModelError, match=r"(?i)alloc"):
        context.compute()
    graph = WorkerGraph(pad(0, 0, 0, 1 << 20), backend="onnxruntime", threads=1)
    assert run(graph, np.ones((1, 4), np.float32))[0].shape == (1, 4 + (1 << 20))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a signal on time")
def test_an_interrupted_run_ends_its_worker() -> None:
    graph = WorkerGraph(endless(), backend="onnxruntime", threads=1)
    context = bound(graph, floats(1))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            context.compute()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert graph._process.returncode is not None
    with pytest.raises(ModelError, match="has ended"):
        context.compute()


def test_a_worker_forgets_contexts_and_ends_with_its_graph() -> None:
    graph = WorkerGraph(double(np.float32, (None, 3)), backend="onnxruntime", threads=1)
    array, process = np.ones((1_000_000, 3), np.float32), graph._process
    size = importlib.import_module("psutil").Process(process.pid).memory_info
    run(graph, array)
    before = size().rss
    for _ in range(20):
        run(graph, array)
    assert size().rss < before + 5 * array.nbytes
    context = bound(graph, array)
    del graph
    context.compute()  # a context keeps its graph
    del context
    assert process.returncode is not None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a signal that Ctrl-C sends")
def test_a_worker_leaves_the_keyboard_to_its_host() -> None:
    graph = WorkerGraph(IDENTITY, backend="onnxruntime", threads=1)
    os.kill(graph._process.pid, signal.SIGINT)
    assert run(graph, floats(1, 2))[0].tolist() == [1, 2]


def test_a_worker_ends_with_its_host() -> None:
    probe = (
        "import os, sys; from edgelab.wasinn.backends.worker import WorkerGraph; "
        f"graph = WorkerGraph({IDENTITY!r}, backend='onnxruntime'); "
        "print(graph._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True)
    psutil = importlib.import_module("psutil")
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(done.stdout))
        while process.status() != psutil.STATUS_ZOMBIE:  # or the test times out
            time.sleep(0.05)


SILENT = [b"", b"no line", b'{"arrays": [["<f4", [2]]]}\n1234']
NONSENSE = [
    b"no json\n",
    b"[]\n",
    b"{}\n",
    b'{"arrays": 3}\n',
    b'{"arrays": [["<f4", [-1, -1]]]}\n',
    b'{"arrays": [["<f4", [1.5]]]}\n',
    b'{"arrays": [["<f4", ["1"]]]}\n',
    b'{"arrays": [["<f4", [1099511627776]]]}\n',
    b'{"arrays": [["O", [1]]]}\n12345678',
    b'{"arrays": []}\n',
    b'{"arrays": [], "inputs": [], "outputs": []}\n',
    b'{"arrays": [], "inputs": [1], "outputs": [], "metadata": {}}\n',
    b'{"arrays": [], "inputs": [], "outputs": [], "metadata": 7}\n',
    b'{"arrays": [], "inputs": [[7, "<f4", []]], "outputs": [], "metadata": {}}\n',
    b'{"arrays": [], "inputs": [["x", "<f4", [[]]]], "outputs": [], "metadata": {}}\n',
    b'{"arrays": [], "inputs": [["x", [], []]], "outputs": [], "metadata": {}}\n',
    b"[" * 50_000 + b"\n",
]


def lying(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> None:
    """Let workers answer so, whatever they are asked: a model could take its worker over."""
    code = f"import sys\nfor answer in {answers!r}:\n sys.stdin.buffer.readline(); "
    code += "sys.stdout.buffer.write(answer); sys.stdout.flush()"
    real = subprocess.Popen

    def start(command: list[str], **more: Any) -> Any:
        return real([*command[:2], code], **more)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.parametrize("answer", SILENT + NONSENSE, ids=lambda answer: answer[:50].decode())
def test_the_host_believes_no_worker(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    lying(monkeypatch, answer)
    says = "answers nonsense" if answer in NONSENSE else "died"
    with pytest.raises(ModelError, match=f"the model's process {says}"):
        WorkerGraph(IDENTITY, backend="onnxruntime")


@pytest.mark.parametrize("answer", [b'{"arrays": []}\n', b'{"arrays": [["<f4", []], []]}\n1234'])
def test_the_host_believes_no_worker_later_either(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    good = b'{"arrays": [], "inputs": [], "outputs": [["y", "<f4", []]], "metadata": {}}\n'
    lying(monkeypatch, good, answer)
    graph = WorkerGraph(b"", backend="onnxruntime")
    with pytest.raises(ModelError, match="the model's process answers nonsense"):
        graph.context().compute()


def test_what_libraries_print_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("print('noise', flush=True); raise ImportError('no')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^no$"):
        WorkerGraph(b"<net/>", b"weights", backend="openvino")


BOMB = b"".join(
    b'<!ENTITY e%d "%s">' % (level, b"&e%d;" % (level - 1) * 10 if level else b"boom")
    for level in range(12)
)
WEIGHTS = re.compile(rb' offset="(\d+)" size="(\d+)"')


def ir_attack(name: str, xml: bytes, weights: bytes) -> tuple[bytes, bytes]:
    """Return IR that is hostile in a way."""
    head, body = b'<?xml version="1.0"?>', xml.split(b"?>", 1)[1]
    called = body.replace(b'<net name="', b'<net name="&e11;', 1)
    offsets = {
        "weights beyond the end": (len(weights), 4),
        "weights far beyond": (1 << 62, 4),
        "offset that wraps": (2**64 - 16, 432),
        "size that wraps": (0, 2**64 - 4),
        "negative offset": (-16, 432),
    }
    if name in offsets:
        return WEIGHTS.sub(b' offset="%d" size="%d"' % offsets[name], xml, count=1), weights
    return {
        "entity bomb": (head + b"<!DOCTYPE net [" + BOMB + b"]>" + called, weights),
        "external entity": (
            head + b'<!DOCTYPE net [<!ENTITY e11 SYSTEM "file:///etc/passwd">]>' + called, weights
        ),
        "deep nesting": (head + b"<net>" + b"<a>" * 1_000_000 + b"</a>" * 1_000_000, weights),
        "deep metadata": (
            xml.replace(b"<rt_info>", b"<rt_info>" + b"<a>" * 100_000 + b"</a>" * 100_000, 1),
            weights,
        ),
        "weights cut off": (xml, weights[:10]),
        "no weights": (xml, b""),
        "shape larger than its weights": (
            re.sub(rb'shape="4,\s*3,\s*3,\s*3"', b'shape="4000,3,3,3"', xml, count=1), weights
        ),
        "input of 2^60 bytes": (re.sub(rb"\?,3,8,8", b"1073741824,3,8192,8192", xml), weights),
        "not closed": (xml[:-200], weights),
    }[name]  # fmt: skip


REFUSED, HARMLESS = "refused", "harmless"
ATTACKS = {
    "weights beyond the end": REFUSED,
    "weights far beyond": REFUSED,
    "offset that wraps": REFUSED,
    "size that wraps": REFUSED,
    "negative offset": REFUSED,
    "weights cut off": REFUSED,
    "no weights": REFUSED,
    "shape larger than its weights": REFUSED,
    "input of 2^60 bytes": REFUSED,
    "deep nesting": REFUSED,
    "not closed": REFUSED,
    "entity bomb": HARMLESS,  # entities are not expanded
    "external entity": HARMLESS,
    "deep metadata": HARMLESS,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_ir_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    xml, weights = to_ir(tmp_path, CLASSIFIER)
    attack = ir_attack(name, xml, weights)
    assert attack != (xml, weights)
    if ATTACKS[name] == REFUSED:
        with pytest.raises(ModelError, match="OpenVINO refused the model") as caught:
            load_graph(*attack, threads=1, trusted=False)
        assert "src/" not in str(caught.value)  # the reason, not where it is in the sources
    else:
        image = np.random.default_rng(6).random((1, 3, 8, 8), np.float32)
        graph = load_graph(*attack, threads=1, trusted=False)
        np.testing.assert_allclose(run(graph, image)[0], bare(CLASSIFIER, image)[0], rtol=1e-4)
        assert len(str(graph.metadata)) < 10_000
