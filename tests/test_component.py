"""The component row: wasi:nn in WIT, for a guest that is built here, and for hostile ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasmtime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_wasinn import (
    CLASSIFIER,
    IDENTITY,
    Value,
    bare,
    encoded,
    floats,
    identity,
    onnx_model,
    resident_bytes,
)

import edgelab.wasinn.component as subject
from edgelab.build import guest_path
from edgelab.errors import GuestError, LimitError
from edgelab.paths import source_root
from edgelab.runtime import Limits
from edgelab.toolchain import Toolchain
from edgelab.wasinn import NNLimits, TensorInfo, WasiNN, backends
from edgelab.wasinn.component import VERSION, Component, ComponentError, ComponentInstance

MODELS = "edgelab:component/models#"


class Client:
    """The guest of guest/component, with its functions as methods."""

    def __init__(self, wasm: Path, nn: WasiNN, limits: Limits | None = None) -> None:
        self.nn = nn
        self.instance = Component(wasm, nn).instantiate(limits=limits)

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self.instance.call(MODELS + name, *arguments)

    def load(self, *parts: bytes) -> int:
        number: int = self("load", list(parts), "autodetect", "cpu")
        return number

    def compute(self, model: int, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return dict(self("compute", model, list(inputs.items())))

    def failure(self, name: str, *arguments: Any) -> tuple[str, str]:
        """Call what must fail; return code and message, which the host has in its log, too."""
        with pytest.raises(ComponentError) as caught:
            self(name, *arguments)
        code, message = caught.value.value["code"], caught.value.value["message"]
        assert f": {code}: {message}" in self.nn.errors[-1]
        assert message in str(caught.value)
        return code, message


@pytest.fixture(scope="session")
def wasm(rust: Toolchain) -> Path:
    return guest_path("component").path


@pytest.fixture
def client(wasm: Path) -> Client:
    return Client(wasm, WasiNN({"identity": IDENTITY, "klein": CLASSIFIER}, threads=1))


# --- what it is there for -------------------------------------------------------------------------


def test_a_model_computes_what_it_computes_without_a_guest(client: Client) -> None:
    image = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    (want,) = bare(CLASSIFIER, image)
    for model in (client.load(CLASSIFIER), client("load-by-name", "klein")):
        (got,) = client.compute(model, x=image).values()
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
        scores = client("classify", model, "x", [2, 3, 8, 8], image)
        np.testing.assert_array_equal(scores, want.reshape(-1))


def test_the_embedded_model_computes_the_same(wasm: Path) -> None:
    root = source_root()
    assert root is not None
    signs = root / "models" / "signs" / "signs.onnx"
    client = Client(wasm, WasiNN({"signs": signs}))
    image = np.random.default_rng(2).standard_normal((1, 3, 224, 224), np.float32)
    (want,) = bare(signs.read_bytes(), image)
    model = client("load-by-name", "signs")
    np.testing.assert_allclose(client.compute(model, input=image)["logits"], want, rtol=1e-5)
    scores = client("classify", model, "input", [1, 3, 224, 224], image)
    np.testing.assert_allclose(scores, want.reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i4", "i8"])
def test_every_tensor_type_passes(client: Client, dtype: str) -> None:
    given = np.frombuffer(np.random.default_rng(3).bytes(160), dtype)
    (got,) = client.compute(client.load(identity(dtype)), x=given).values()
    assert got.dtype == given.dtype
    assert got.tobytes() == given.tobytes()


def test_inputs_and_outputs_have_names(client: Client) -> None:
    model = encoded(
        onnx_model(
            [
                helper.make_node("Sub", ["left", "right"], ["difference"]),
                helper.make_node("Cast", ["count"], ["größe"], to=TensorProto.DOUBLE),
            ],
            [
                ("left", TensorProto.FLOAT, ("n",)),
                ("right", TensorProto.FLOAT, ("n",)),
                ("count", TensorProto.INT64, (2,)),
            ],
            [("difference", TensorProto.FLOAT, ("n",)), ("größe", TensorProto.DOUBLE, (2,))],
        )
    )
    left, right, count = floats(5, 7), floats(1, 2), np.array([3, 4])
    number = client.load(model)
    for order in (("left", "right", "count"), ("count", "right", "left")):
        values = {"left": left, "right": right, "count": count}
        outputs = client.compute(number, **{name: values[name] for name in order})
        assert list(outputs) == ["difference", "größe"]
        assert outputs["difference"].tolist() == [4, 5]
        assert outputs["größe"].tolist() == [3, 4]
        assert outputs["größe"].dtype == np.float64


def test_scalars_and_empty_tensors_pass(client: Client) -> None:
    # In WIT a single value has the dimensions [1].
    scalar = client.load(identity(shape=()))
    for given in (np.array(7, np.float32), floats(7)):
        assert client.compute(scalar, x=given)["y"].tolist() == [7]
    assert client("classify", scalar, "x", [1], [7.0]).tolist() == [7]
    line = client.load(IDENTITY)
    assert client.compute(line, x=floats())["y"].shape == (0,)
    assert client("classify", line, "x", [0], []).shape == (0,)
    client.nn.add_model("probe", Probe("", ValueError()))
    assert client.compute(client("load-by-name", "probe"), x=floats(1))["x"].tolist() == [5]
    table = client.load(identity(shape=("n", "m")))
    assert client.compute(table, x=np.empty((0, 5), np.float32))["y"].shape == (0, 5)


def test_the_host_s_array_and_the_guest_s_tensor_are_apart(client: Client) -> None:
    given = floats(1, 2)
    first = client.compute(client.load(IDENTITY), x=given)["y"]
    given[:] = 0
    assert first.tolist() == [1, 2]


# --- bytes ----------------------------------------------------------------------------------------


def test_each_byte_arrives_as_it_was(client: Client) -> None:
    """They cross as text in latin1; half of them have two bytes on the way."""
    given = (
        np.arange(256, dtype=np.uint8).repeat(4).view(np.float32)
    )  # all bytes, all finite or NaN
    given = np.concatenate([given, np.random.default_rng(5).standard_normal(1000, np.float32)])
    scores = client("classify", client.load(IDENTITY), "x", [len(given)], given)
    assert scores.tobytes() == given.tobytes()


def test_more_than_wasmtime_moves_by_the_piece(client: Client) -> None:
    """A list<u8> of 4 MiB is too much for wasmtime's own way. Through the adapters it is not."""
    code, message = client.failure("load", [bytes(4 << 20)], "onnx", "cpu")
    assert code == "invalid-encoding"
    assert "unknown" in message


def test_a_list_of_numbers_has_a_limit_that_is_named(client: Client) -> None:
    line = client.load(IDENTITY)
    with pytest.raises(LimitError, match="P2: more data at a time"):
        client("classify", line, "x", [4 << 20], np.zeros(4 << 20, np.float32))


# --- errors ---------------------------------------------------------------------------------------


def failing() -> bytes:
    """A model that fails when it runs: 3 floats don't make a shape of (-1, 2)."""
    shape = {"shape": np.array([-1, 2])}
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    inputs: list[Value] = [("x", TensorProto.FLOAT, ("n",))]
    return encoded(onnx_model([node], inputs, [("y", TensorProto.FLOAT, ("a", 2))], shape))


def truth() -> bytes:
    node = helper.make_node("Greater", ["x", "x"], ["y"])
    return encoded(
        onnx_model([node], [("x", TensorProto.FLOAT, (1,))], [("y", TensorProto.BOOL, (1,))])
    )


X = [("x", floats(1))]
ERRORS: dict[str, tuple[str, str, Callable[[Client], tuple[Any, ...]]]] = {
    "no part": (
        "invalid-argument", "one or two parts, not 0",
        lambda c: ("load", [], "onnx", "cpu"),
    ),
    "three parts": (
        "invalid-argument", "one or two parts, not 3",
        lambda c: ("load", [b"x"] * 3, "onnx", "cpu"),
    ),
    "another shape": (
        "invalid-argument", "input 'x' has shape",
        lambda c: ("compute", c.load(CLASSIFIER), [("x", np.zeros((1, 8, 8, 3), np.float32))]),
    ),
    "another type": (
        "invalid-argument", "input 'x' is float32, the tensor is float64",
        lambda c: ("compute", c.load(IDENTITY), [("x", np.zeros(1))]),
    ),
    "no input": ("invalid-argument", "without ['x']", lambda c: ("compute", c.load(IDENTITY), [])),
    "another input": (
        "invalid-argument", "input 'X': there is none",
        lambda c: ("compute", c.load(IDENTITY), [("X", floats(1)), *X]),
    ),
    "an input twice": (
        "invalid-argument", "given twice", lambda c: ("compute", c.load(IDENTITY), [*X, *X]),
    ),
    "too few bytes": (
        "invalid-argument", "FP32 of [3] has 12 bytes, not 8",
        lambda c: ("classify", c.load(IDENTITY), "x", [3], [1.0, 2.0]),
    ),
    "sizes beyond 64 bits": (
        "invalid-argument", f"has {2**32 * (2**32 - 1) ** 2 * 4} bytes, not 4",
        lambda c: ("classify", c.load(IDENTITY), "x", [2**31, 2, 2**32 - 1, 2**32 - 1], [1.0]),
    ),
    "a product of 0 in 64 bits": (
        "invalid-argument", "bytes, not 0",
        lambda c: ("classify", c.load(IDENTITY), "x", [2**31, 2**31, 2**2], []),
    ),
    "no model": ("invalid-encoding", "E3", lambda c: ("load", [b"junk" * 9], "onnx", "cpu")),
    "a cut-off model": (
        "invalid-encoding", "E3", lambda c: ("load", [CLASSIFIER[:-1]], "onnx", "cpu"),
    ),
    "a model that fails": (
        "runtime-error", "Reshape",
        lambda c: ("compute", c.load(failing()), [("x", floats(1, 2, 3))]),
    ),
    "a model whose file is gone": (
        "runtime-error", "cannot read model 'gone'", lambda c: ("load-by-name", "gone"),
    ),
    "the GPU": (
        "unsupported-operation", "target gpu", lambda c: ("load", [IDENTITY], "onnx", "gpu"),
    ),
    "an output of truth values": (
        "unsupported-operation", "a type that WASI-NN can't name",
        lambda c: ("compute", c.load(truth()), X),
    ),
    "a large model": (
        "too-large", "the limit is 5,000",
        lambda c: ("load", [bytes(3000), bytes(2001)], "onnx", "cpu"),
    ),
    "an unknown name": (
        "not-found", "no model is named 'ß'; there are: gone", lambda c: ("load-by-name", "ß"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(wasm: Path, case: str) -> None:
    nn = WasiNN({"gone": Path("gone")}, limits=NNLimits(model_bytes=5000), threads=1)
    client = Client(wasm, nn)
    code, message, wrong = ERRORS[case]
    arguments = wrong(client)
    got_code, got_message = client.failure(*arguments)
    assert got_code == code
    assert message in got_message
    # It goes on, and nothing of the failed call is left with the host.
    assert client.compute(client.load(IDENTITY), x=floats(3))["y"].tolist() == [3]
    errors, tensors, _, _ = client.instance._session._resources
    assert not errors
    assert not tensors


def test_names_of_formats_do_not_matter_the_bytes_do(client: Client) -> None:
    for encoding in ("openvino", "tensorflow", "pytorch", "tensorflowlite", "ggml", "autodetect"):
        client("load", [IDENTITY], encoding, "cpu")


class Probe:
    """A backend that fails as it is told to."""

    inputs: tuple[TensorInfo, ...] = (TensorInfo("x", np.dtype(np.float32), ("n",)),)
    outputs = inputs

    def __init__(self, fails: str, error: BaseException) -> None:
        self.fails, self.error = fails, error
        self.metadata: dict[str, str] = {}

    def context(self) -> Probe:
        return self._fail("context")

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._fail("bind_input")

    def compute(self) -> None:
        self._fail("compute")

    def stop(self) -> None:
        pass

    def output(self, index: int) -> NDArray[Any]:
        return np.array(index + 5, np.float32)

    def _fail(self, name: str) -> Probe:
        if name == self.fails:
            raise self.error
        return self


@pytest.mark.parametrize("where", ["context", "bind_input", "compute"])
def test_whatever_a_backend_raises_is_an_error_code(wasm: Path, where: str) -> None:
    client = Client(wasm, WasiNN({"probe": Probe(where, ZeroDivisionError("one\nline"))}))
    if where == "context":
        assert client.failure("load-by-name", "probe") == ("runtime-error", "one line")
    else:
        model = client("load-by-name", "probe")
        assert client.failure("compute", model, X) == ("runtime-error", "one line")


def test_what_stops_python_stops_the_guest(wasm: Path) -> None:
    stop = KeyboardInterrupt("stop")
    client = Client(wasm, WasiNN({"probe": Probe("compute", stop)}))
    model = client("load-by-name", "probe")
    with pytest.raises(KeyboardInterrupt) as caught:
        client("compute", model, X)
    assert caught.value is stop
    with pytest.raises(GuestError, match="stopped before"):
        client("unload", model)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("classify", (0, "x", [1]), "takes 4 arguments, got 3"),
        ("classify", (-1, "x", [1], []), "argument 0: -1 is no u32"),
        ("classify", (2**32, "x", [1], []), "argument 0: 4294967296 is no u32"),
        ("classify", ("0", "x", [1], []), "argument 0"),
        ("classify", (0, b"x", [1], []), "argument 1: b'x' is no str"),
        ("classify", (0, "\ud800", [1], []), "argument 1: .*surrogates"),
        ("classify", (0, "x", [-1], []), "argument 2: not all of these are uint32"),
        ("classify", (0, "x", [1.0], []), "argument 2: not all of these are uint32"),
        ("classify", (0, "x", [2**64], []), "argument 2: not all of these are uint32"),
        ("classify", (0, "x", [1], ["1"]), "argument 3"),
        ("classify", (0, "x", [1], b"1234"), "argument 3: bytes are no list of float32"),
        ("classify", (0, "x", [1], [[1], [1, 2]]), "argument 3"),
        ("load", (b"bytes", "onnx", "cpu"), "argument 0: b'bytes' is no list"),
        ("load", ([b""], "ONNX", "cpu"), "argument 1: 'ONNX' is none of openvino, onnx"),
        ("compute", (0, [("x", [1.0])]), "argument 1: .* is no NumPy array of FP16"),
        ("compute", (0, [("x", np.zeros(1, bool))]), "argument 1: .* is no NumPy array of FP16"),
        ("compute", (0, [["x", floats(1)]]), "argument 1: .* is no tuple of 2"),
        ("compute", (0, [("x",)]), "argument 1: .* is no tuple of 2"),
    ],
)
def test_wrong_arguments_are_refused(
    client: Client, name: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        client(name, *arguments)
    assert client.compute(client.load(IDENTITY), x=floats(3))["y"].tolist() == [3]


def test_tensors_come_back_from_a_call_that_did_not_begin(client: Client) -> None:
    model = client.load(IDENTITY)
    before = client.instance._session._room
    for _ in range(3):
        with pytest.raises(TypeError):
            client("compute", model, [("x", floats(1)), ("y", floats(2)), ("z", None)])
    assert client.instance._session._room == before
    assert not client.instance._session._resources[1]


def test_an_unknown_function_is_named_with_the_known_ones(client: Client) -> None:
    with pytest.raises(GuestError, match=r"E5: .*no function 'load'; it has: edgelab.*#load,"):
        client.instance.call("load")


# --- limits and lifetimes -------------------------------------------------------------------------


def test_what_the_guest_drops_is_freed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[weakref.ref[Any]] = []
    load_graph = backends.load_graph

    def spying(*parts: bytes, **options: Any) -> Any:
        graph = load_graph(*parts, **options)
        graphs.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(subject, "load_graph", spying)
    first, second = client.load(CLASSIFIER), client.load(IDENTITY)
    assert client("unload", first)
    gc.collect()
    assert graphs[0]() is None
    assert graphs[1]() is not None
    assert client.compute(second, x=floats(1))["y"].tolist() == [1]
    assert not client("unload", first)
    client.instance = None  # type: ignore[assignment]
    gc.collect()
    assert graphs[1]() is None


def test_models_and_contexts_are_bounded(wasm: Path) -> None:
    nn = WasiNN({"identity": IDENTITY}, limits=NNLimits(graphs=2, contexts=3), threads=1)
    client = Client(wasm, nn)
    numbers = [client.load(IDENTITY), client.load(IDENTITY)]
    # The guest dropped the models themselves; their contexts keep them.
    assert client.failure("load", [IDENTITY], "onnx", "cpu")[0] == "too-large"
    client("unload", numbers.pop())
    numbers += [client("load-by-name", "identity")]
    client("unload", numbers.pop(0))
    numbers += [client("load-by-name", "identity"), client("load-by-name", "identity")]
    code, message = client.failure("load-by-name", "identity")
    assert (code, "the limit is 3" in message) == ("too-large", True)


def test_a_thousand_calls_take_no_more_memory_than_a_hundred(client: Client) -> None:
    model = client.load(IDENTITY)
    given = np.random.default_rng(7).standard_normal(5000, np.float32)

    def calls(count: int) -> int:
        for _ in range(count // 4):
            client.compute(model, x=given)
            client("classify", model, "x", [len(given)], given)
            client.failure("compute", model, [("y", given)])
            client.failure("load", [given.tobytes()], "onnx", "cpu")
        return resident_bytes()

    before = calls(100)
    assert calls(1000) < before + 2_000_000  # each call moves 20 kB, several times


def test_the_guest_s_memory_is_bounded(wasm: Path) -> None:
    client = Client(wasm, WasiNN(threads=1), Limits(memory_bytes=4 << 20))
    with pytest.raises(GuestError, match=r"the guest trapped: .* memory than 4194304 bytes \(E4\)"):
        client("load", [bytes(5 << 20)], "onnx", "cpu")
    with pytest.raises(LimitError, match="E4: the guest's initial memory"):
        Client(wasm, WasiNN(), Limits(memory_bytes=65536))


def test_tensors_with_the_host_are_bounded(wasm: Path) -> None:
    client = Client(wasm, WasiNN({"identity": IDENTITY}, threads=1), Limits(memory_bytes=4 << 20))
    model = client("load-by-name", "identity")
    fits, too_large = np.zeros(500_000, np.float32), np.zeros((4 << 20) // 4 + 1, np.float32)
    assert client.compute(model, x=fits)["y"].shape == (500_000,)
    with pytest.raises(LimitError, match="E4: the guest keeps more than 4194304 bytes of tensors"):
        client.compute(model, x=too_large)
    most = np.zeros(1 << 20, np.float32)  # and again as its own output
    assert client.compute(model, x=most)["y"].shape == (1 << 20,)
    double = identity_twice()
    assert client.failure("compute", client.load(double), [("x", most)])[0] == "too-large"
    assert client.compute(model, x=fits)["y"].shape == (500_000,)


def identity_twice() -> bytes:
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in "yz"]
    inputs: list[Value] = [("x", TensorProto.FLOAT, ("n",))]
    outputs: list[Value] = [(name, TensorProto.FLOAT, ("n",)) for name in "yz"]
    return encoded(onnx_model(nodes, inputs, outputs))


def test_instances_in_threads_do_not_mix(wasm: Path) -> None:
    component = Component(wasm, WasiNN({"identity": IDENTITY}, threads=1))
    wrong = []

    def work(number: int) -> None:
        instance = component.instantiate()
        model = instance.call(MODELS + "load-by-name", "identity")
        for step in range(50):
            given = np.full(1000, number * 100 + step, np.float32)
            got = instance.call(MODELS + "classify", model, "x", [1000], given)
            if not np.array_equal(got, given):
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_instance_serves_one_thread_at_a_time(wasm: Path) -> None:
    reached, leave = threading.Event(), threading.Event()

    class Slow(Probe):
        def compute(self) -> None:
            reached.set()
            assert leave.wait(60)

    client = Client(wasm, WasiNN({"slow": Slow("", ValueError())}))
    model = client("load-by-name", "slow")
    thread = threading.Thread(target=client, args=("compute", model, X))
    thread.start()
    assert reached.wait(60)
    with pytest.raises(GuestError, match="already running a call"):
        client("unload", model)
    leave.set()
    thread.join()
    assert client("unload", model)


def test_a_model_without_end_is_stopped(wasm: Path) -> None:
    from test_hostile import loop_model

    nn = WasiNN({"endless": loop_model(None)}, threads=1)
    client = Client(wasm, nn, Limits(seconds=1))
    model, got = client("load-by-name", "endless"), list[str]()

    def call() -> None:
        with pytest.raises((ComponentError, LimitError)) as caught:
            client("compute", model, [("x", np.ones(1, np.float32))])
        got.append(str(caught.value))

    thread = threading.Thread(target=call, daemon=True)  # one that the test can give up
    thread.start()
    thread.join(100)
    assert "terminate flag" in nn.errors[-1]
    assert len(got) == 1


def test_machine_code_comes_from_the_cache(
    wasm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path))
    for origin in ("compiled", "cache"):
        component = Component(wasm, WasiNN({"identity": IDENTITY}))
        assert component.compiled.origin == origin
        instance = component.instantiate()
        model = instance.call(MODELS + "load-by-name", "identity")
        assert instance.call(MODELS + "classify", model, "x", [1], [5.0]).tolist() == [5]


# --- guests that are not as they should be --------------------------------------------------------

PRELUDE = f"""
  (import "wasi:nn/errors@{VERSION}" (instance $errors
    (export "error" (type $error (sub resource)))
    (export "[method]error.data" (func (param "self" (borrow $error)) (result string)))))
  (alias export $errors "error" (type $error))
  (import "wasi:nn/tensor@{VERSION}" (instance $tensors
    (type $kind' (enum "FP16" "FP32" "FP64" "BF16" "U8" "I32" "I64"))
    (export "tensor-type" (type $kind (eq $kind')))
    (export "tensor" (type $tensor (sub resource)))
    (export "[constructor]tensor" (func (param "dimensions" (list u32)) (param "ty" $kind)
      (param "data" (list u8)) (result (own $tensor))))
    (export "[method]tensor.data" (func (param "self" (borrow $tensor)) (result (list u8))))))
  (alias export $tensors "tensor" (type $tensor))
  (import "wasi:nn/inference@{VERSION}" (instance $inference
    (export "graph-execution-context" (type $context (sub resource)))
    (alias outer 1 $tensor (type $tensor))
    (alias outer 1 $error (type $error))
    (type $named (tuple string (own $tensor)))
    (export "[method]graph-execution-context.compute" (func (param "self" (borrow $context))
      (param "inputs" (list $named)) (result (result (list $named) (error (own $error))))))))
  (alias export $inference "graph-execution-context" (type $context))
  (import "wasi:nn/graph@{VERSION}" (instance $graphs
    (alias outer 1 $context (type $context))
    (alias outer 1 $error (type $error))
    (type $encoding' (enum "openvino" "onnx" "tensorflow" "pytorch" "tensorflowlite" "ggml"
      "autodetect"))
    (export "graph-encoding" (type $encoding (eq $encoding')))
    (type $target' (enum "cpu" "gpu" "tpu"))
    (export "execution-target" (type $target (eq $target')))
    (export "graph" (type $graph (sub resource)))
    (export "[method]graph.init-execution-context" (func (param "self" (borrow $graph))
      (result (result (own $context) (error (own $error))))))
    (export "load" (func (param "builder" (list (list u8))) (param "encoding" $encoding)
      (param "target" $target) (result (result (own $graph) (error (own $error))))))
    (export "load-by-name" (func (param "name" string)
      (result (result (own $graph) (error (own $error))))))))
  (alias export $graphs "graph" (type $graph))
  (core module $libc
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 131072))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.set $top (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
      (global.get $top)
      (global.set $top (i32.add (global.get $top) (local.get 3)))))
  (core instance $libc (instantiate $libc))
  (alias core export $libc "memory" (core memory $memory))
  (alias core export $libc "realloc" (core func $realloc))
  (core func $new (canon lower (func $tensors "[constructor]tensor") (memory $memory)))
  (core func $data (canon lower (func $tensors "[method]tensor.data") (memory $memory)
    (realloc $realloc)))
  (core func $load (canon lower (func $graphs "load") (memory $memory)))
  (core func $by-name (canon lower (func $graphs "load-by-name") (memory $memory)))
  (core func $context (canon lower (func $graphs "[method]graph.init-execution-context")
    (memory $memory)))
  (core func $compute (canon lower
    (func $inference "[method]graph-execution-context.compute") (memory $memory)
    (realloc $realloc)))
  (core func $message (canon lower (func $errors "[method]error.data") (memory $memory)
    (realloc $realloc)))
  (core func $drop-tensor (canon resource.drop $tensor))
  (core func $drop-graph (canon resource.drop $graph))
  (core func $drop-error (canon resource.drop $error))
"""
IMPORTED = """
    (import "libc" "memory" (memory 4))
    (import "nn" "new" (func $new (param i32 i32 i32 i32 i32) (result i32)))
    (import "nn" "data" (func $data (param i32 i32)))
    (import "nn" "load" (func $load (param i32 i32 i32 i32 i32)))
    (import "nn" "by-name" (func $by-name (param i32 i32 i32)))
    (import "nn" "context" (func $context (param i32 i32)))
    (import "nn" "compute" (func $compute (param i32 i32 i32 i32)))
    (import "nn" "message" (func $message (param i32 i32)))
    (import "nn" "drop-tensor" (func $drop-tensor (param i32)))
    (import "nn" "drop-graph" (func $drop-graph (param i32)))
    (import "nn" "drop-error" (func $drop-error (param i32)))
    (data (i32.const 16) "identity")
    (data (i32.const 32) "x")
"""


def written(body: str, result: str = "(list u8)") -> bytes:
    """A component written by hand: ``run(n: u32) -> list<u8>`` is `body`, which returns where the
    address and the length of its result are. It has ``$n``, and ``$a`` to ``$c`` for itself."""
    names = "new data load by-name context compute message drop-tensor drop-graph drop-error"
    offered = " ".join(f'(export "{name}" (func ${name}))' for name in names.split())
    return f"""(component {PRELUDE}
  (core module $main {IMPORTED}
    (func (export "run") (param $n i32) (result i32)
      (local $a i32) (local $b i32) (local $c i32)
      {body}))
  (core instance $main (instantiate $main
    (with "libc" (instance $libc)) (with "nn" (instance {offered}))))
  (func (export "run") (param "n" u32) (result {result})
    (canon lift (core func $main "run") (memory $memory) (realloc $realloc))))""".encode()


NOTHING = "(i32.const 8)"  # an empty list: zeros at 8 and 12
NAMED = "(call $by-name (i32.const 16) (i32.const 8) (i32.const 48))"  # result at 48, handle at 52
TENSOR = """(call $new (i32.const 64) (i32.const 1) (i32.const 1) (i32.const 80) (i32.const 4))"""
LOOP = """(loop $again
  {} (local.set $n (i32.sub (local.get $n) (i32.const 1)))
  (br_if $again (i32.gt_s (local.get $n) (i32.const 0))))"""


def by_hand(body: str, limits: Limits | None = None) -> ComponentInstance:
    nn = WasiNN({"identity": IDENTITY}, threads=1)
    return Component(written(body), nn).instantiate(limits=limits)


def test_data_need_not_be_aligned() -> None:
    """The adapters copy them to where latin1 wants them."""
    echo = by_hand(
        """
        (i32.store (i32.const 64) (i32.const 5))
        (i64.store (i32.const 81) (i64.const 0xfedcba9876543210))
        (local.set $a (call $new
          (i32.const 64) (i32.const 1) (i32.const 4) (i32.add (i32.const 80) (local.get $n))
          (i32.const 5)))
        (call $data (local.get $a) (i32.const 48))
        (i32.const 48)"""
    )
    assert echo.call("run", 1) == bytes.fromhex("1032547698")
    assert echo.call("run", 2) == bytes.fromhex("32547698ba")


def test_a_large_tensor_comes_back() -> None:
    """8 MiB out and in again, more than twice what wasmtime's own way has room for."""
    instance = by_hand(
        """
        (drop (memory.grow (i32.const 300)))
        (memory.fill (i32.const 1000000) (i32.const 0xe9) (local.get $n))
        (local.set $a (call $new
          (i32.const 64) (i32.const 1) (i32.const 4) (i32.const 1000000) (local.get $n)))
        (call $data (local.get $a) (i32.const 48))
        (i32.store (i32.const 52) (i32.load8_u (i32.add (i32.load (i32.const 48)) (i32.sub
          (i32.load (i32.const 52)) (i32.const 1)))))
        (i32.store8 (i32.const 100) (i32.load (i32.const 52)))
        (i32.store (i32.const 48) (i32.const 100))
        (i32.store (i32.const 52) (i32.const 1))
        (i32.const 48)"""
    )
    assert instance.call("run", 8 << 20) == b"\xe9"


def test_bf16_is_known_and_not_available() -> None:
    instance = by_hand(
        f"""
        {NAMED}
        (call $context (i32.load (i32.const 52)) (i32.const 48))
        (local.set $a (i32.load (i32.const 52)))
        (i32.store (i32.const 64) (i32.const 2))
        (i32.store (i32.const 100) (i32.const 32))
        (i32.store (i32.const 104) (i32.const 1))
        (i32.store (i32.const 108) (call $new
          (i32.const 64) (i32.const 1) (i32.const 3) (i32.const 80) (i32.const 4)))
        (call $compute (local.get $a) (i32.const 100) (i32.const 1) (i32.const 48))
        (call $message (i32.load (i32.const 52)) (i32.const 48))
        (i32.const 48)"""
    )
    assert instance.call("run", 0) == b"input 'x': BF16 is not available here"
    assert instance.component.nn.errors[-1].startswith("compute: unsupported-operation: ")


def test_a_component_s_functions_may_use_every_type() -> None:
    """Outside of an interface, too, where they have no names of their own."""
    prelude = PRELUDE.replace(
        '(export "error" (type $error (sub resource)))',
        '(export "error" (type $error (sub resource))) '
        '(type $code\' (enum "invalid-argument" "invalid-encoding" "timeout" "runtime-error" '
        '"unsupported-operation" "too-large" "not-found" "security" "unknown")) '
        '(export "error-code" (type $code (eq $code\')))',
    )
    used = {
        "code": "$errors", "kind": "$tensors", "encoding": "$graphs", "target": "$graphs",
    }  # fmt: skip
    names = {"code": "error-code", "kind": "tensor-type", "encoding": "graph-encoding"}
    aliases = "".join(
        f'(alias export {interface} "{names.get(name, "execution-target")}" (type ${name}))'
        for name, interface in used.items()
    )
    owned = ("tensor", "graph", "context", "error")
    parameters = "".join(f'(param "{name}" ${name})' for name in used)
    parameters += "".join(f'(param "{name}" (own ${name}))' for name in owned)
    text = f"""(component {prelude} {aliases}
      (core module $f (func (export "f") (param i32 i32 i32 i32 i32 i32 i32 i32)))
      (core instance $f (instantiate $f))
      (func (export "f") {parameters} (canon lift (core func $f "f"))))"""
    instance = Component(text.encode()).instantiate()
    with pytest.raises(GuestError, match="E5: f has a type that is not supported here: a resource"):
        instance.call("f", *range(8))


def test_tensors_go_in_and_out_of_a_component_as_arrays() -> None:
    text = f"""(component {PRELUDE}
      (core module $f (func (export "f") (param i32) (result i32) (local.get 0)))
      (core instance $f (instantiate $f))
      (func (export "f") (param "x" (own $tensor)) (result (own $tensor))
        (canon lift (core func $f "f"))))"""
    instance = Component(text.encode()).instantiate()
    table = np.arange(12, dtype=np.int64).reshape(3, 4)
    for given in (
        table,
        table.T,
        table[::2, 1:],
        np.empty((0, 3), np.uint8),
        np.array([1], np.float16),
    ):
        got = instance.call("f", given)
        np.testing.assert_array_equal(got, given)
        assert (got.dtype, got.shape) == (given.dtype, given.shape)
    assert instance.call("f", np.array(7.0)).shape == (1,)  # as WIT has single values
    with pytest.raises(TypeError):
        instance.call("f", np.array([1], ">i4"))


def test_a_tensor_that_comes_out_must_be_one() -> None:
    body = """
      (i32.store (i32.const 64) (i32.const 2))
      (i32.store (i32.const 68) (i32.const 3))
      (i64.store (i32.const 80) (i64.const 0x0605040302010099))
      (call $new (i32.const 64) (i32.const 2) (local.get $n) (i32.const 81) (i32.const 6))"""
    component = Component(written(body, "(own $tensor)"))
    instance = component.instantiate()
    assert instance.call("run", 4).tolist() == [[0, 1, 2], [3, 4, 5]]
    for kind, name in enumerate(("FP16", "FP32", "FP64", "BF16")):
        with pytest.raises(GuestError, match=rf"a tensor of {name}, \[2, 3\] and 6 bytes"):
            instance.call("run", kind)
    assert not instance._session._resources[1]
    huge = body.replace("(i32.const 2)", "(i32.const 0)", 1).replace(
        "(i32.const 3)", "(i32.const -1)"
    )
    huge = huge.replace("(i32.const 64) (i32.const 2)", "(i32.const 64) (i32.const 4)")
    instance = Component(written(huge.replace("6)", "0)"), "(own $tensor)")).instantiate()
    assert instance.call("run", 4).shape == (0, 2**32 - 1, 0, 0)


# A handle is an index into the component's own table, and wasmtime looks there.
MISUSE = {
    "a graph as a tensor": f"{NAMED} (call $data (i32.load (i32.const 52)) (i32.const 48))",
    "a tensor as a graph": f"(call $context {TENSOR} (i32.const 48))",
    "a handle that never was": "(call $data (i32.const 77) (i32.const 48))",
    "a dropped tensor": (
        f"(local.set $a {TENSOR}) (call $drop-tensor (local.get $a)) "
        "(call $data (local.get $a) (i32.const 48))"
    ),
    "dropped twice": (
        f"(local.set $a {TENSOR}) (call $drop-tensor (local.get $a)) "
        "(call $drop-tensor (local.get $a))"
    ),
    "dropped as another": f"(call $drop-graph {TENSOR})",
    "given away twice": f"""
        {NAMED}
        (call $context (i32.load (i32.const 52)) (i32.const 48))
        (local.set $a (i32.load (i32.const 52)))
        (i32.store (i32.const 108) {TENSOR})
        (i32.store (i32.const 120) (i32.load (i32.const 108)))
        (call $compute (local.get $a) (i32.const 100) (i32.const 2) (i32.const 48))""",
    "data beyond the memory": (
        "(drop (call $new (i32.const 64) (i32.const 1) (i32.const 4) (i32.const 0) "
        "(i32.const 262145)))"
    ),
    "data around the end of 32 bits": (
        "(drop (call $new (i32.const 64) (i32.const 1) (i32.const 4) (i32.const -2) (i32.const 4)))"
    ),
    "dimensions beyond the memory": (
        "(drop (call $new (i32.const 8) (i32.const 0x3fffffff) (i32.const 4) (i32.const 0) "
        "(i32.const 1)))"
    ),
    "dimensions that are not aligned": (
        "(drop (call $new (i32.const 65) (i32.const 1) (i32.const 4) (i32.const 80) (i32.const 4)))"
    ),
    "a type that does not exist": (
        "(drop (call $new (i32.const 64) (i32.const 1) (i32.const 7) (i32.const 80) (i32.const 4)))"
    ),
    "a name that is no UTF-8": (
        "(i32.store8 (i32.const 16) (i32.const 255)) "
        "(call $by-name (i32.const 16) (i32.const 8) (i32.const 48))"
    ),
    "a result to nowhere": "(call $by-name (i32.const 16) (i32.const 8) (i32.const -4))",
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_stops_the_guest_and_not_the_host(case: str) -> None:
    instance = by_hand(f"{MISUSE[case]} {NOTHING}")
    with pytest.raises(GuestError, match="the guest trapped: "):
        instance.call("run", 0)
    with pytest.raises(GuestError, match="stopped before"):
        instance.call("run", 0)
    assert by_hand(NOTHING).call("run", 0) == b""


def test_a_model_of_many_large_parts_is_bounded() -> None:
    """Each part is the same 64 KiB of the guest: 4 GiB in all, which nobody has to copy."""
    body = """
        (loop $again
          (i32.store (i32.add (i32.const 65536) (i32.shl (local.get $a) (i32.const 3)))
            (i32.const 0))
          (i32.store (i32.add (i32.const 65540) (i32.shl (local.get $a) (i32.const 3)))
            (i32.const 65536))
          (local.set $a (i32.add (local.get $a) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $a) (local.get $n))))
        (call $load (i32.const 65536) (local.get $n) (i32.const 1) (i32.const 0) (i32.const 48))
        (call $message (i32.load (i32.const 52)) (i32.const 48))
        (i32.const 48)"""
    many = by_hand("(drop (memory.grow (i32.const 16)))" + body, Limits(memory_bytes=16 << 20))
    with pytest.raises(GuestError, match="the guest trapped"):
        many.call("run", 65536)
    few = by_hand(body)
    assert few.call("run", 100) == b"a model has one or two parts, not 100"


@pytest.mark.parametrize("dimensions", [17, 60_000])
def test_a_tensor_has_no_more_dimensions_than_any_model(dimensions: int) -> None:
    instance = by_hand(
        f"""(drop (call $new
          (i32.const 128) (local.get $n) (i32.const 4) (i32.const 0) (i32.const 0))) {NOTHING}"""
    )
    assert instance.call("run", 16) == b""
    with pytest.raises(LimitError, match=f"a tensor of {dimensions} dimensions; 16 at most"):
        instance.call("run", dimensions)


def test_models_that_are_never_dropped_are_bounded() -> None:
    instance = by_hand(LOOP.format(NAMED) + NOTHING)
    assert instance.call("run", 16) == b""
    assert not instance.component.nn.errors
    assert instance.call("run", 200) == b""
    assert "has 16 models loaded, the limit is 16" in instance.component.nn.errors[-1]
    assert len(instance._session._resources[2]) == 16
    # The errors pile up in their turn, until wasmtime has enough of handles.
    with pytest.raises(LimitError, match=r"keeps too much with the host: .*handle limit"):
        instance.call("run", 110_000)


def test_tensors_that_are_never_dropped_are_bounded() -> None:
    """Four bytes of a small guest, again and again, must not fill the host's memory."""
    body = """(drop (call $new
        (i32.const 64) (i32.const 1) (i32.const 4) (i32.const 0) (i32.const 131072)))"""
    instance = by_hand(LOOP.format(body) + NOTHING, Limits(memory_bytes=4 << 20))
    assert instance.call("run", 32) == b""
    with pytest.raises(LimitError, match="E4: the guest keeps more than 4194304 bytes of tensors"):
        instance.call("run", 1)
    dropping = body.replace("(drop", "(call $drop-tensor", 1)
    instance = by_hand(LOOP.format(dropping) + NOTHING, Limits(memory_bytes=4 << 20))
    assert instance.call("run", 1000) == b""


def test_a_component_that_loops_is_stopped() -> None:
    for body in ("(loop $again (br $again))", LOOP.format(NAMED + "(local.set $n (i32.const 2))")):
        instance = by_hand(body + NOTHING, Limits(seconds=0.1))
        with pytest.raises(LimitError, match=r"ran longer than 0\.1 s"):
            instance.call("run", 1)


def test_a_start_function_has_the_same_limits() -> None:
    module = "(core module $m (func $s (loop $l (br $l))) (start $s))"
    endless = f"{module} (core instance (instantiate $m))"
    component = Component(f"(component {endless})".encode())
    with pytest.raises(LimitError, match=r"ran longer than 0\.1 s"):
        component.instantiate(limits=Limits(seconds=0.1))
    traps = endless.replace("(loop $l (br $l))", "unreachable")
    with pytest.raises(GuestError, match=r"the guest trapped: .*unreachable"):
        Component(f"(component {traps})".encode()).instantiate()
    hoard = "(core module $m (memory 1)) " + "(core instance (instantiate $m)) " * 4
    with pytest.raises(GuestError, match="memor"):
        Component(f"(component {hoard})".encode()).instantiate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '(import "wasi:cli/environment@0.2.3" (instance (export "x" (func))))',
            r"E7: .*wasi:cli/",
        ),
        (
            '(import "wasi:nn/tensor@0.2.0-rc-2024-06-25" (instance))',
            r"P3: .*provides version 0.2.0",
        ),
        (
            f'(import "wasi:nn/tensor@{VERSION}" (instance (export "foo" (func))))',
            "E5: wasi:nn/tensor.* not the published one: missing expected export `foo`",
        ),
        (
            f'(import "wasi:nn/tensor@{VERSION}" (instance'
            ' (export "tensor" (type $t (sub resource)))'
            ' (export "[method]tensor.data" (func (param "self" (borrow $t)) (result string)))))',
            "E5: wasi:nn/tensor.* not the published one: .*expected string, found list",
        ),
        ('(import "f" (func))', "E5: the component imports f, which nobody provides"),
        ('(export "x" (func 0))', "E2"),
        (
            '(core module $m (func (export "f") (result i32) (i32.const 0))'
            ' (func (export "g") (param i32 i32 i32) (result i32) (i32.const 0)))'
            ' (core instance $m (instantiate $m)) (func (export "f") async (canon lift'
            ' (core func $m "f") async (callback (core func $m "g"))))',
            "E2: .*async",
        ),
    ],
)
def test_what_a_component_can_not_have_is_explained(text: str, message: str) -> None:
    with pytest.raises(GuestError, match=message):
        Component(f"(component {text})".encode(), cache=False)


def test_what_is_no_component_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"E7: .*no WebAssembly component"):
        Component(b"(module)")
    with pytest.raises(GuestError, match="E2: not valid WebAssembly text"):
        Component(b"(component")
    with pytest.raises(GuestError, match="cannot read the component"):
        Component(tmp_path / "none")
    with pytest.raises(GuestError, match="fuel"):
        Component(b"(component)").instantiate(limits=Limits(fuel=1))


def test_components_inside_of_a_component_do_not_abort(client: Client) -> None:
    """What wasmtime makes between two of them has two memories, and it must be allowed to."""
    part = """(component {imports}
      (core module $m (memory (export "memory") 1)
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 64))
        (func (export "f") (param i32 i32) (result i32) (local.get 1)))
      (core instance $m (instantiate $m))
      (func (export "f") (param "x" (list u8)) (result u32) (canon lift
        (core func $m "f") (memory (core memory $m "memory"))
        (realloc (core func $m "realloc")))) {more})"""
    inner = part.format(imports="", more="")
    text = f"(component (component $c {inner[11:]} (instance $i (instantiate $c))"
    instance = Component(f'{text} (export "i" (instance $i)))'.encode()).instantiate()
    assert instance.component.exports == ("i#f",)
    assert instance.call("i#f", b"abc") == 3


# --- values ---------------------------------------------------------------------------------------


def echo(kind: str, types: str = "") -> ComponentInstance:
    """A component that returns a list as it got it."""
    return Component(
        f"""(component {types}
      (core module $m
        (memory (export "memory") 4)
        (global $top (mut i32) (i32.const 64))
        (func (export "realloc") (param i32 i32 i32 i32) (result i32)
          (global.set $top (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
          (global.get $top)
          (global.set $top (i32.add (global.get $top) (local.get 3))))
        (func (export "f") (param i32 i32) (result i32)
          (i32.store (i32.const 8) (local.get 0)) (i32.store (i32.const 12) (local.get 1))
          (i32.const 8))
        (func (export "done") (param i32) (global.set $top (i32.const 64))))
      (core instance $m (instantiate $m))
      (func (export "f") (param "x" (list {kind})) (result (list {kind}))
        (canon lift (core func $m "f") (memory (core memory $m "memory"))
          (realloc (core func $m "realloc"))
          (post-return (core func $m "done")))))""".encode()
    ).instantiate()


INTEGERS = [(f"{sign}{bits}", sign, bits) for sign in "us" for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize(("kind", "sign", "bits"), INTEGERS)
def test_integers_in_lists(kind: str, sign: str, bits: int) -> None:
    instance = echo(kind)
    low, high = (0, 2**bits - 1) if sign == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    dtype = np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}")
    for given in ([low, high, 7], np.array([[low, 1], [2, high]], dtype)):
        got = instance.call("f", given)
        assert list(got) == np.ravel(given).tolist()
        if kind == "u8":
            assert type(got) is bytes
        else:
            assert got.dtype == dtype
    assert len(instance.call("f", [])) == 0
    wider = [np.array([value]) for value in (low - 1, high + 1) if -(2**63) <= value < 2**64]
    beyond = [array for array in wider if array.dtype.kind in "iu"]
    for wrong in ([low - 1], [high + 1], [1.5], ["1"], np.ones(2), 7, *beyond):
        with pytest.raises(TypeError):
            instance.call("f", wrong)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_floats_in_lists(kind: str, dtype: Any) -> None:
    instance = echo(kind)
    given = np.array([0.1, -0.0, np.inf, np.nan, 1e-40, 3], dtype)
    got = instance.call("f", given[::-1])  # a view with strides
    assert got.dtype == dtype
    assert got.tobytes() == given[::-1].tobytes()
    assert instance.call("f", [1, 2]).tolist() == [1, 2]
    assert instance.call("f", []).dtype == dtype
    with pytest.raises(TypeError):
        instance.call("f", [1j])


@pytest.mark.parametrize(
    ("kind", "types", "given"),
    [
        ("bool", "", [True, False]),
        ("string", "", ["", "größe", "日本\0語"]),
        ("(list u8)", "", [b"", b"abc", bytes(range(256))]),
        ("(list (list string))", "", [[], [["a"], []]]),
        ("(tuple u8 string (tuple s64))", "", [(1, "x", (-5,)), (2, "", (2**62,))]),
        ("(option u32)", "", [None, 7]),
        ("(option string)", "", ["x", None]),
        ("$e", '(type $e\' (enum "a" "b-c")) (export $e "e" (type $e\'))', ["b-c", "a"]),
        (
            "$r", '(type $r\' (record (field "a-b" u8) (field "c" (option (list u8)))))'
            ' (export $r "r" (type $r\'))',
            [{"a-b": 1, "c": None}, {"c": b"xy", "a-b": 2}],
        ),
    ],
)  # fmt: skip
def test_other_values(kind: str, types: str, given: list[Any]) -> None:
    instance = echo(kind, types)
    for _ in range(50):  # whoever frees twice, or never, is found out
        assert instance.call("f", given) == given
    for wrong in (given[0:1] * 3 + [object()], object(), [None, object()]):
        with pytest.raises(TypeError):
            instance.call("f", wrong)
    assert instance.call("f", given) == given


@pytest.mark.parametrize("wrong", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 2}, [1, 2]])
def test_a_record_has_all_its_fields_and_no_other(wrong: Any) -> None:
    types = '(type $r\' (record (field "a" u8) (field "b" u8))) (export $r "r" (type $r\'))'
    with pytest.raises(TypeError, match="is no dict with the keys a, b"):
        echo("$r", types).call("f", [wrong])


def test_numbers_alone() -> None:
    cases: list[tuple[str, str, Any, Any]] = [
        ("u8", "i32", 255, 256), ("s8", "i32", -128, 128), ("u16", "i32", 65535, -1),
        ("s16", "i32", -32768, 32768), ("u32", "i32", 2**32 - 1, 2**32),
        ("s32", "i32", -(2**31), 2**31),
        ("u64", "i64", 2**64 - 1, 2**64), ("s64", "i64", -(2**63), 2**63), ("f32", "f32", 0.5, "1"),
        ("f64", "f64", 0.1, None), ("bool", "i32", True, 1),
    ]  # fmt: skip
    for kind, core, right, wrong in cases:
        text = f"""(component
          (core module $m (func (export "f") (param {core}) (result {core}) (local.get 0)))
          (core instance $m (instantiate $m))
          (func (export "f") (param "x" {kind}) (result {kind}) (canon lift (core func $m "f")))
          (func (export "g") (param "x" {kind}) (canon lift (core func $n "g"))))"""
        text = text.replace(
            "(core instance $m",
            f'(core module $n (func (export "g") (param {core}))) '
            "(core instance $n (instantiate $n)) (core instance $m",
        )
        instance = Component(text.encode()).instantiate()
        assert instance.call("f", right) == right
        assert type(instance.call("f", right)) is type(right)
        assert instance.call("g", right) is None
        with pytest.raises(TypeError, match="f: argument 0"):
            instance.call("f", wrong)


def test_a_type_that_is_not_supported_is_named() -> None:
    with pytest.raises(GuestError, match="E5: f has a type that is not supported here: FlagsType"):
        echo("$e", '(type $e\' (flags "a" "b")) (export $e "e" (type $e\'))').call("f", [])


def test_wasmtime_reads_what_is_lowered_here() -> None:
    """The C form, checked by wasmtime's own slow conversion."""
    from wasmtime import component as wit

    from edgelab.wasinn.values import Val, codec

    engine = wasmtime.Engine()
    text = """(component (import "f" (func (param "a" (list u8)) (param "b" (list f32))
      (param "c" (tuple string (option (list s64)))))))"""
    function: Any = wit.Component(engine, text).type.imports(engine)["f"].ty
    given = (bytes(range(256)), [0.5, -2.0], ("größe", [-(2**63), 7]))
    for (_, kind), value in zip(function.params, given, strict=True):
        val = Val()
        codec(kind, lambda _: pytest.fail("no resource here")).lower(value, val)
        assert kind.convert_from_c(val) == value
