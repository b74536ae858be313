"""The guest ``classify_tract``: a whole model inside the sandbox, with the crate tract."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgelab import images, models
from edgelab.aot import EngineConfig
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.datasets import Signs
from edgelab.errors import BuildError, GuestError
from edgelab.models import example_image
from edgelab.paths import PACKAGE
from edgelab.runtime import Guest, Limits
from edgelab.toolchain import Toolchain
from edgelab.wasinn import WasiNN

# Without a finished build, the first test builds the guest (some minutes) and compiles it.
pytestmark = pytest.mark.timeout(2400)

SIGNS = models.load("signs")
ONNX = Path(SIGNS.path).read_bytes()
CLASSES = len(SIGNS.spec.labels)
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def wasm(rust: Toolchain) -> Path:
    try:
        return guest_path("classify_tract").path
    except BuildError as error:
        if os.environ.get("CI") or "needs Rust" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def guest(wasm: Path) -> Guest:
    return Guest(wasm)


@pytest.fixture(scope="module")
def tract(guest: Guest) -> Classifier:
    return Classifier(guest.instantiate())


@pytest.fixture(scope="module")
def signs(tract: Classifier) -> int:
    """The embedded model's slot."""
    return tract.load_graph(ONNX)


@pytest.fixture(scope="module")
def bare() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ONNX, providers=["CPUExecutionProvider"])


def logits_of(bare: onnxruntime.InferenceSession, tensor: NDArray[np.float32]) -> Any:
    return bare.run(None, {"input": np.array(tensor)})[0][0]


def small_model(
    op: str = "ReduceSum",
    shape: tuple[int | str, ...] = ("N", 3, "H", "W"),
    more_inputs: int = 0,
    kind: int = FLOAT,
    operands: int = 2,
) -> bytes:
    """A model whose logits are the sums over each channel's plane."""
    inputs = [helper.make_tensor_value_info("input", kind, shape)]
    inputs += [helper.make_tensor_value_info(f"more{i}", FLOAT, [1]) for i in range(more_inputs)]
    graph = helper.make_graph(
        [helper.make_node(op, ["input", "axes"][:operands], ["logits"], keepdims=0)],
        "sums",
        inputs,
        [helper.make_tensor_value_info("logits", kind, None)],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


# --- It computes what ONNX Runtime computes -------------------------------------------------------


def test_the_logits_are_onnx_runtimes(
    tract: Classifier, signs: int, bare: onnxruntime.InferenceSession
) -> None:
    tensor = tract.preprocess(images.decode(example_image()), SIGNS.spec)
    logits = tract.compute(signs, tensor, CLASSES)
    expected = logits_of(bare, tensor)
    assert np.abs(logits - expected).max() < 1e-4
    assert expected.std() > 1  # the comparison means something
    best, probability = tract.top_k(logits, 1)[0]
    assert SIGNS.spec.labels[best] == "stop"
    assert probability > 0.5


def test_it_sees_the_same_signs_as_onnx_runtime_and_as_wasi_nn(
    tract: Classifier, signs: int, bare: onnxruntime.InferenceSession
) -> None:
    host = WasiNN({"signs": ONNX}, threads=1)
    nn = Classifier(Guest(guest_path("classify_nn").path, host=[host]).instantiate())
    graph = nn.load_graph("signs")
    seen = set()
    for sample in Signs("test", 32):
        tensor = tract.preprocess(sample.image, SIGNS.spec)
        logits = tract.compute(signs, tensor, CLASSES)
        expected = logits_of(bare, tensor)
        assert np.abs(logits - expected).max() < 1e-4
        assert logits.argmax() == expected.argmax()
        same = nn.compute(graph, nn.preprocess(sample.image, SIGNS.spec), CLASSES)
        assert np.abs(logits - same).max() < 1e-4
        seen.add(int(expected.argmax()))
    assert len(seen) > 20


def test_a_run_leaves_nothing_behind(tract: Classifier, signs: int) -> None:
    tensors = [np.full((1, 3, 224, 224), value, np.float32) for value in (0.5, -1)]
    one = [tract.compute(signs, tensor, CLASSES).copy() for tensor in tensors]
    size = len(tract.instance.memory)
    two = [tract.compute(signs, tensor, CLASSES).copy() for tensor in tensors]
    np.testing.assert_array_equal(one, two)
    assert np.abs(one[0] - one[1]).max() > 0.1
    assert len(tract.instance.memory) == size


def test_its_source_is_formatted(rust: Toolchain) -> None:
    source = PACKAGE.parent / "guest" / "classify_tract"
    if rust.run(["fmt", "--version"], source, title="").returncode and "CI" not in os.environ:
        pytest.skip("this Rust has no cargo fmt")
    done = rust.run(["fmt", "--check"], source, title="cargo looks at the style")
    assert done.returncode == 0, done.stdout


# --- It needs nothing but WASI, and has SIMD ------------------------------------------------------


def test_it_asks_the_host_for_no_inference(guest: Guest) -> None:
    assert {module for module, _, _ in guest.imports} == {"wasi_snapshot_preview1"}


def test_its_other_functions_are_those_of_classify(guest: Guest, classify_guest: Guest) -> None:
    own = {"tract_load", "tract_compute", "tract_unload"}
    assert {name for name, _ in guest.exports} == {name for name, _ in classify_guest.exports} | own
    image = Signs("test", 1, 64)[0].image
    ours = Classifier(guest.instantiate()).preprocess(image, SIGNS.spec)
    theirs = Classifier(classify_guest.instantiate()).preprocess(image, SIGNS.spec)
    np.testing.assert_array_equal(ours, theirs)


def test_it_computes_with_simd(wasm: Path) -> None:
    """It takes 0.9 thousand million instructions; built without SIMD, 3.6."""
    counting = Guest(wasm, config=EngineConfig(fuel=True, optimize=False))
    tract = Classifier(counting.instantiate())
    graph = tract.load_graph(ONNX)
    tensor = np.zeros((1, 3, 224, 224), np.float32)
    tract.compute(graph, tensor, CLASSES)
    before = tract.instance.fuel_used
    tract.compute(graph, tensor, CLASSES)
    assert tract.instance.fuel_used - before < 1_500_000_000


# --- Models and slots -----------------------------------------------------------------------------


def test_open_dimensions_become_one(guest: Guest) -> None:
    tract = Classifier(guest.instantiate())
    graph = tract.load_graph(small_model())
    tensor = np.array([1, 3, 2], np.float32).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(tract.compute(graph, tensor, 3), [1, 3, 2])
    with pytest.raises(GuestError, match=r"input is \[1, 3, 2, 2\].*takes \[1, 3, 1, 1\]"):
        tract.compute(graph, np.ones((1, 3, 2, 2), np.float32), 3)
    np.testing.assert_array_equal(tract.compute(graph, tensor, 3), [1, 3, 2])


def test_models_have_slots_of_their_own(guest: Guest) -> None:
    tract = Classifier(guest.instantiate())
    tensor = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    ops = ("ReduceSum", "ReduceMax", "ReduceMean")
    graphs = [tract.load_graph(small_model(op, (1, 3, 2, 2))) for op in ops]
    assert graphs == [0, 1, 2]
    expected = [tensor.sum((0, 2, 3)), tensor.max((0, 2, 3)), tensor.mean((0, 2, 3))]
    for graph in (2, 0, 1):
        np.testing.assert_array_equal(tract.compute(graph, tensor, 3), expected[graph])
    tract.unload(1)
    with pytest.raises(GuestError, match=r"slot 1 holds no model.*status -5"):
        tract.compute(1, tensor, 3)
    with pytest.raises(GuestError, match="slot 1 holds no model"):
        tract.unload(1)
    np.testing.assert_array_equal(tract.compute(2, tensor, 3), expected[2])
    assert tract.load_graph(small_model("ReduceMin", (1, 3, 2, 2))) == 1
    np.testing.assert_array_equal(tract.compute(1, tensor, 3), tensor.min((0, 2, 3)))
    for slot in (3, 2**32 - 1):
        with pytest.raises(GuestError, match="holds no model"):
            tract.compute(slot, tensor, 3)


def test_a_model_that_was_dropped_gives_its_memory_back(guest: Guest) -> None:
    tract = Classifier(guest.instantiate())
    sizes = []
    for _ in range(4):
        tract.unload(tract.load_graph(ONNX))
        sizes.append(len(tract.instance.memory))
    assert sizes[3] == sizes[1]


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (b"\0", "tract: "),
        (b"no model at all", "tract: "),
        (ONNX[: len(ONNX) // 2], "tract: "),
        (small_model(more_inputs=1), "the model has 2 inputs; needed 1"),
        (small_model(op="Nonsense"), "Nonsense"),
        (small_model(shape=()), "tract: "),
        (small_model(kind=TensorProto.INT64), "the input is I64; needed F32"),
    ],
    ids=["zero", "text", "half", "two inputs", "unknown operator", "scalar", "integers"],
)
def test_a_model_that_can_not_be_loaded_is_a_clear_error(
    guest: Guest, model: bytes, reason: str
) -> None:
    tract = Classifier(guest.instantiate())
    with pytest.raises(GuestError, match=rf"tract_load: .*{reason}.*\(status -4\)"):
        tract.load_graph(model)
    assert tract.load_graph(small_model()) == 0  # the guest goes on


def test_a_damaged_model_harms_nobody_but_its_guest(guest: Guest) -> None:
    random = np.random.default_rng(0)
    failed = 0
    for _ in range(12):
        model = bytearray(small_model())
        for place in random.integers(len(model), size=3):
            model[place] = random.integers(256)
        tract = Classifier(guest.instantiate(limits=Limits(memory_bytes=64 << 20, seconds=10)))
        try:
            tract.compute(tract.load_graph(bytes(model)), np.ones((1, 3, 1, 1), np.float32), 3)
        except GuestError:
            failed += 1
    assert failed > 3


def test_a_name_is_no_model_here(tract: Classifier) -> None:
    with pytest.raises(GuestError, match="E5: the guest exports no function 'nn_load_by_name'"):
        tract.load_graph("signs")


def test_too_little_memory_is_e4(guest: Guest) -> None:
    tract = Classifier(guest.instantiate(limits=Limits(memory_bytes=20 << 20)))
    with pytest.raises(GuestError, match="E4"):
        tract.load_graph(ONNX)


@pytest.mark.parametrize("classes", [1, 31, 33])
def test_another_number_of_logits_is_an_error(tract: Classifier, signs: int, classes: int) -> None:
    tensor = np.zeros((1, 3, 224, 224), np.float32)
    with pytest.raises(GuestError, match=r"gives 32 values; more|32 logits for 33 labels"):
        tract.compute(signs, tensor, classes)


def test_outputs_that_are_no_floats_are_an_error(guest: Guest) -> None:
    tract = Classifier(guest.instantiate())
    graph = tract.load_graph(small_model("ArgMax", (1, 3, 1, 1), operands=1))
    with pytest.raises(GuestError, match=r"tract_compute: tract: .*F32.*\(status -4\)"):
        tract.compute(graph, np.ones((1, 3, 1, 1), np.float32), 3)


def test_what_lies_outside_of_a_block_is_never_touched(guest: Guest) -> None:
    """As a hostile host: the same checks as for the other exports."""
    tract = Classifier(guest.instantiate())
    instance = tract.instance
    assert tract.load_graph(small_model(shape=(1, 3, 1, 1))) == 0
    dims, tensor, out = (tract.buffer(size) for size in (16, 12, 12))
    dims.array(4, "<u4")[:] = [1, 3, 1, 1]
    good = (0, dims.pointer, 4, tensor.pointer, 12, out.pointer, 12)
    assert instance.call("tract_compute", *good) == 12
    for place, bad in (
        (1, 0), (1, dims.pointer + 4), (1, dims.pointer + 1), (1, 2**32 - 4), (2, 5), (2, 2**31),
        (3, 0), (3, 8), (3, tensor.pointer + 2), (4, 0), (4, 2**32 - 4), (4, 8),
        (5, 0), (5, 16), (5, tensor.pointer), (5, dims.pointer), (6, 0), (6, 2**32 - 4), (6, 8),
    ):  # fmt: skip
        arguments = [*good]
        arguments[place] = bad
        assert instance.call("tract_compute", *arguments) == -1, (place, bad)
    for pointer, size in ((0, 0), (0, 10), (out.pointer, 13), (out.pointer, 2**32 - 1), (8, 8)):
        assert instance.call("tract_load", pointer, size) == -1
    assert instance.call("tract_compute", *good) == 12
