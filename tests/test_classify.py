"""The guest's postprocessing, its JSON ABI and its WASI-NN calls, against NumPy and bare ONNX."""

import json
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save

from edgelab import models
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.datasets import Signs
from edgelab.errors import GuestError, LimitError
from edgelab.preprocess import preprocess
from edgelab.runtime import Guest, Limits
from edgelab.wasinn import WasiNN

TINY: Path = models.load("signs-tiny").path
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def classifier(classify_guest: Guest) -> Classifier:
    """One instance for all tests, so that none may leave it broken."""
    return Classifier(classify_guest.instantiate())


# --- top_k ----------------------------------------------------------------------------------------


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - float(np.max(logits)))
    return np.asarray(shifted / shifted.sum())


def check_top_k(classifier: Classifier, logits: NDArray[np.float32], k: int) -> None:
    best = classifier.top_k(logits, k)
    probabilities = softmax(logits)
    # float32 probabilities, then the lower index: so that ties of the rounded values are ties.
    order = np.lexsort((np.arange(len(logits)), -probabilities.astype(np.float32)))[:k]
    assert [index for index, _ in best] == order.tolist()
    np.testing.assert_allclose([p for _, p in best], probabilities[order], rtol=1e-6, atol=1e-40)


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40), st.data())
def test_top_k_is_softmax_and_a_stable_sort(
    classifier: Classifier, logits: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(logits)))
    check_top_k(classifier, np.array(logits, np.float32), k)


@pytest.mark.parametrize(
    "logits",
    [
        [0.0],
        [5.0] * 7,
        [1.0, 3.0, 3.0, 1.0, 3.0],
        [3e38, 3e38, -3e38],
        [-3e38, -3.1e38],
        [0.0, -INF, 1.0],
        [-0.0, 0.0],
    ],
)
def test_top_k_of_ties_and_extremes(classifier: Classifier, logits: list[float]) -> None:
    check_top_k(classifier, np.array(logits, np.float32), len(logits))


def test_top_k_of_a_thousand_classes_sums_to_one(classifier: Classifier) -> None:
    logits = np.random.default_rng(0).normal(0, 5, 1000).astype(np.float32)
    check_top_k(classifier, logits, 1000)
    assert sum(p for _, p in classifier.top_k(logits, 1000)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("k", [0, -1, 4, 2**31, 2**40])
def test_top_k_refuses_k_outside_of_1_to_n(classifier: Classifier, k: int) -> None:
    with pytest.raises(GuestError, match=rf"k = {k}, but there are 3 logits"):
        classifier.top_k(np.zeros(3, np.float32), k)


@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
def test_top_k_names_the_logit_that_is_not_finite(classifier: Classifier, bad: float) -> None:
    with pytest.raises(GuestError, match=r"logits\[2\] is (NaN|inf).*status -7"):
        classifier.top_k(np.array([0, 1, bad, bad], np.float32), 1)
    check_top_k(classifier, np.array([1, 2], np.float32), 2)


def test_top_k_of_nothing_but_minus_infinity_is_an_error(classifier: Classifier) -> None:
    with pytest.raises(GuestError, match="status -7"):
        classifier.top_k(np.full(3, -INF, np.float32), 1)


def test_top_k_takes_other_dtypes_by_value(classifier: Classifier) -> None:
    logits: Any = np.array([1.0, 3.0, 2.0])  # float64: its bytes would be nonsense as float32
    assert [index for index, _ in classifier.top_k(logits.astype(np.float32), 3)] == [1, 2, 0]
    assert classifier.top_k(logits, 3) == classifier.top_k(logits.astype(np.float32), 3)


# --- the JSON ABI ---------------------------------------------------------------------------------


def tiny_by_numpy(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits of the in-guest model, computed from its file without any code of the guest."""
    with safe_open(TINY, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pool = int(file.metadata()["pool"])
    x = preprocess(image, models.load("signs-tiny").spec)[0].astype(np.float64)
    side = x.shape[1] // pool
    x = x.reshape(3, side, pool, side, pool).mean((2, 4))
    layer = 1
    while f"conv{layer}.weight" in tensors:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
        x = np.einsum("iyxkl,oikl->oyx", windows, tensors[f"conv{layer}.weight"])
        x = np.maximum(x + tensors[f"conv{layer}.bias"][:, None, None], 0)
        layer += 1
    return np.asarray(tensors["fc.weight"] @ x.ravel() + tensors["fc.bias"])


def request(image: NDArray[np.uint8], **change: Any) -> dict[str, Any]:
    fields = {
        "image_data": image.ravel().tolist(),
        "width": image.shape[1],
        "height": image.shape[0],
        "model_id": "signs-tiny",
    }
    return {**fields, **change}


@pytest.fixture(scope="module")
def loaded(classify_guest: Guest) -> Classifier:
    classifier = Classifier(classify_guest.instantiate())
    classifier.load_model(TINY.read_bytes())
    return classifier


def test_the_tiny_model_answers_as_numpy_does(loaded: Classifier) -> None:
    spec = models.load("signs-tiny").spec
    images = [sample.image for sample in Signs("test", 24, 256)]
    images += [Signs("test", 4, 100)[3].image, images[0][:200, ::2], images[1][:1, :1]]
    for image in images:
        response = loaded.infer(request(image))
        probabilities = softmax(tiny_by_numpy(image).astype(np.float32))
        assert set(response) == {"label", "confidence", "latency_ms", "model_version"}
        assert response["label"] == spec.labels[int(np.argmax(probabilities))]
        assert response["confidence"] == pytest.approx(np.max(probabilities), abs=1e-5)
        assert response["model_version"] == spec.version
        assert 0 < response["latency_ms"] < 60_000


def test_numbers_with_a_fraction_are_rounded_to_pixels(loaded: Classifier) -> None:
    image = Signs("test", 1, 64)[0].image
    whole = loaded.infer(request(image))
    near = loaded.infer(request(image, image_data=(image.ravel() * 0.999).round(3).tolist()))
    assert near["label"] == whole["label"]
    assert near["confidence"] == pytest.approx(whole["confidence"], abs=1e-6)


SMALL = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(3, 4, 3)
GOOD = json.dumps(request(SMALL)).encode()


def error(loaded: Classifier, text: bytes) -> tuple[str, str]:
    response = loaded.infer(text)
    assert set(response) == {"error"}
    assert set(response["error"]) == {"id", "message"}
    return response["error"]["id"], response["error"]["message"]


def test_json_cut_off_anywhere_is_e8(loaded: Classifier) -> None:
    assert "label" in loaded.infer(GOOD)
    for length in range(1, len(GOOD)):
        number, message = error(loaded, GOOD[:length])
        assert number == "E8"
        assert "EOF" in message


@pytest.mark.parametrize(
    ("change", "number", "reason"),
    [
        ({"model_id": "resnet"}, "model_not_found", "signs-tiny"),
        ({"model_id": ""}, "model_not_found", "signs-tiny"),
        ({"model_id": 7}, "invalid_request", "model_id"),
        ({"model_id": None}, "invalid_request", "model_id"),
        ({"image_data": [0] * 35}, "invalid_request", "35 bytes"),
        ({"image_data": [0] * 37}, "invalid_request", "37 bytes"),
        ({"image_data": []}, "invalid_request", "0 bytes"),
        ({"image_data": [0] * 35 + [256]}, "invalid_request", r"image_data\[35\]"),
        ({"image_data": [0] * 5 + [-0.5] + [0] * 30}, "invalid_request", r"image_data\[5\]"),
        ({"image_data": [1e300] * 36}, "invalid_request", r"image_data\[0\]"),
        ({"image_data": [0] * 35 + [True]}, "invalid_request", "image_data"),
        ({"image_data": [0] * 35 + ["0"]}, "invalid_request", "image_data"),
        ({"image_data": [[0, 0, 0]] * 12}, "invalid_request", "image_data"),
        ({"image_data": "AAAA"}, "invalid_request", "image_data"),
        ({"width": 0}, "invalid_request", "0 x 3"),
        ({"width": -4}, "invalid_request", "width"),
        ({"width": 4.5}, "invalid_request", "width"),
        ({"width": 2**32 + 4}, "invalid_request", "width"),
        ({"width": 1e300}, "invalid_request", "width"),
        ({"width": 65_536}, "invalid_request", "65536 x 3"),
        ({"width": 60_000, "height": 60_000}, "invalid_request", "60000 x 60000"),
        ({"extra": 1}, "invalid_request", "extra"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_is_named(
    loaded: Classifier, change: dict[str, Any], number: str, reason: str
) -> None:
    got, message = error(loaded, json.dumps(request(SMALL, **change)).encode())
    assert got == number
    assert re.search(reason, message), message


@pytest.mark.parametrize("missing", ["image_data", "width", "height", "model_id"])
def test_a_missing_field_is_named(loaded: Classifier, missing: str) -> None:
    fields = request(SMALL)
    del fields[missing]
    number, message = error(loaded, json.dumps(fields).encode())
    assert number == "invalid_request"
    assert missing in message


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace(b"[0,", b"[NaN,").replace(b"[0, ", b"[NaN, "),
        GOOD.replace(b"[0, ", b"[Infinity, "),
        GOOD.replace(b"[0, ", b"[1e999, "),
        GOOD.replace(b"[0, ", b"[" + b"9" * 5000 + b", "),
        GOOD.replace(b'"width": 4', b'"width": 4, "width": 4'),
        GOOD + b"x",
        GOOD + GOOD,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        GOOD.replace(b"signs-tiny", b"\xff\xff"),
        GOOD.replace(b"signs-tiny", b"\\ud800"),
        b"\0" * 100,
    ],
    ids=lambda text: text[:20].decode("ascii", "replace"),
)
def test_other_nonsense_is_an_invalid_request(loaded: Classifier, text: bytes) -> None:
    assert text != GOOD
    assert error(loaded, text)[0] == "invalid_request"
    assert "label" in loaded.infer(GOOD)


@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_get_an_error_in_json(loaded: Classifier, text: bytes) -> None:
    assert error(loaded, text)[0] in ("E8", "invalid_request")


def test_an_empty_request_is_refused_on_this_side(loaded: Classifier) -> None:
    with pytest.raises(GuestError, match="empty"):
        loaded.infer(b"")


def test_without_a_model_the_answer_says_so(classifier: Classifier) -> None:
    assert error(classifier, GOOD)[0] == "no_model"


def test_memory_stays_flat_over_many_requests(classify_guest: Guest) -> None:
    classifier = Classifier(classify_guest.instantiate())
    model, image = TINY.read_bytes(), Signs("test", 1, 64)[0].image
    cheap = [GOOD[:50], b"[" * 1000] * 30  # so many that even leaked answers would fill a page
    for turn in range(60):
        classifier.load_model(model)
        for text in (json.dumps(request(image)).encode(), GOOD, *cheap):
            classifier.infer(text)
        if turn == 5:
            size = len(classifier.instance.memory)
    # A page or two is the allocator's fragmentation; leaked answers would make five.
    assert len(classifier.instance.memory) <= size + 2 * 65_536


# --- model files ----------------------------------------------------------------------------------


def tiny_file(**change: Any) -> bytes:
    """The tiny model with tensors or metadata (by key, as text) replaced; None removes one."""
    with safe_open(TINY, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for key, value in change.items():
        place: dict[str, Any] = tensors if "." in key else metadata
        if value is None:
            del place[key]
        else:
            place[key] = value
    return bytes(save(tensors, metadata))


def poisoned() -> NDArray[np.float32]:
    weight = np.zeros((16, 3, 3, 3), np.float32)
    weight[1, 0, 0, 0] = NAN
    return weight


GOOD_FILE = tiny_file()
HEADER = int.from_bytes(GOOD_FILE[:8], "little")


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}",
        GOOD_FILE[:-1],
        GOOD_FILE[: 8 + HEADER],
        GOOD_FILE[:100],
        b"\x08" + GOOD_FILE,
        tiny_file(labels=None),
        tiny_file(labels="[]"),
        tiny_file(labels='["one"]'),
        tiny_file(labels="[1, 2]"),
        tiny_file(std="[1, 0, 1]"),
        tiny_file(std="[1, 1]"),
        tiny_file(mean="[NaN, 0, 0]"),
        tiny_file(crop="0"),
        tiny_file(crop="300"),
        tiny_file(crop="-1"),
        tiny_file(resize="1e3"),
        tiny_file(pool="0"),
        tiny_file(pool="5"),
        tiny_file(layout="NHWC"),
        tiny_file(color="BGR"),
        tiny_file(**{"fc.bias": None}),
        tiny_file(**{"conv1.weight": None}),
        tiny_file(**{"conv1.weight": np.zeros((16, 3, 5, 5), np.float32)}),
        tiny_file(**{"conv1.weight": np.zeros((16, 3, 3, 3), np.float64)}),
        tiny_file(**{"conv1.weight": poisoned()}),
        tiny_file(**{"conv9.weight": np.zeros((1, 1, 3, 3), np.float32)}),
    ],
    ids=range(29),
)
def test_a_damaged_or_contradictory_model_is_refused_and_the_old_one_stays(
    loaded: Classifier, data: bytes
) -> None:
    with pytest.raises(GuestError, match=r"model_load: .{10,}\(status -4\)"):
        loaded.load_model(data)
    assert "label" in loaded.infer(GOOD)


def test_a_good_copy_of_the_model_loads(loaded: Classifier) -> None:
    loaded.load_model(GOOD_FILE)
    assert "label" in loaded.infer(GOOD)


def test_an_empty_model_is_refused_on_this_side(loaded: Classifier) -> None:
    with pytest.raises(GuestError, match="empty"):
        loaded.load_model(b"")


def test_the_reason_why_a_guest_died_is_not_hidden_by_the_clean_up() -> None:
    guest = Guest(guest_path("classify").path, fuel=True)
    model = TINY.read_bytes()
    trial = Classifier(guest.instantiate())
    with trial.buffer(len(model)):
        before = trial.instance.fuel_used
    classifier = Classifier(guest.instantiate(limits=Limits(fuel=before + 1000)))
    with pytest.raises(LimitError, match="fuel"):
        classifier.load_model(model)


def test_too_little_memory_for_a_model_or_a_request_is_e4(classify_guest: Guest) -> None:
    classifier = Classifier(classify_guest.instantiate(limits=Limits(memory_bytes=2 << 20)))
    with pytest.raises(GuestError, match="E4"):
        classifier.load_model(b"\0" * (4 << 20))
    with pytest.raises(GuestError, match="E4"):
        classifier.infer(b" " * (4 << 20))
    assert error(classifier, GOOD)[0] == "no_model"


# --- WASI-NN --------------------------------------------------------------------------------------


def channel_sums(classes: int = 3) -> bytes:
    """A model whose logits are the sums over each channel's plane."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["input", "axes"], ["logits"], keepdims=0)],
        "sums",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", classes, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture
def nn() -> Classifier:
    host = WasiNN({"sums": channel_sums()}, threads=1)
    guest = Guest(guest_path("classify_nn").path, host=[host])
    return Classifier(guest.instantiate())


def test_a_model_by_name_and_one_by_bytes_give_the_same(nn: Classifier) -> None:
    tensor = np.random.default_rng(0).normal(size=(1, 3, 5, 7)).astype(np.float32)
    for graph in (nn.load_graph("sums"), nn.load_graph(channel_sums())):
        logits = nn.compute(graph, tensor, 3)
        expected = tensor.astype(np.float64).sum((0, 2, 3))
        assert np.abs(logits - expected).max() < 1e-5


def test_a_tensor_from_preprocess_is_used_where_it_lies_and_others_are_copied(
    nn: Classifier,
) -> None:
    spec = models.load("signs-tiny").spec
    graph = nn.load_graph("sums")
    tensor = nn.preprocess(Signs("test", 1, 64)[0].image, spec)
    copy = np.array(tensor)
    expected = copy.sum((0, 2, 3), dtype=np.float64)
    variants: list[Any] = [tensor, copy, tensor[..., ::-1], copy.astype(np.float64)]
    for given_ in variants:
        np.testing.assert_allclose(nn.compute(graph, given_, 3), expected, rtol=1e-3)
    nn._buffers.pop("input").free()
    part = tensor.ravel()[1000 : 1000 + 3 * 7 * 224].reshape(1, 3, 7, 224)
    expected = np.array(part).sum((0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(nn.compute(graph, part, 3), expected, rtol=1e-3)
    assert "input" not in nn._buffers  # no copy was made
    np.testing.assert_array_equal(tensor, copy)  # and it is still what it was


def test_a_tensor_above_the_guests_memory_is_copied_into_it() -> None:
    high = mmap.mmap(-1, 1 << 20)  # mapped before the guest, so most likely above it
    tensor = np.frombuffer(high, np.float32, 3 * 8 * 8).reshape(1, 3, 8, 8)
    host = WasiNN({"sums": channel_sums()}, threads=1)
    nn = Classifier(Guest(guest_path("classify_nn").path, host=[host]).instantiate())
    nn.preprocess(Signs("test", 1, 64)[0].image, models.load("signs-tiny").spec)
    np.testing.assert_array_equal(nn.compute(nn.load_graph("sums"), tensor, 3), [0, 0, 0])


def test_a_part_of_the_logits_can_be_ranked_where_it_lies(nn: Classifier) -> None:
    graph = nn.load_graph("sums")
    tensor = np.array([1, 3, 2], np.float32).reshape(1, 3, 1, 1)
    assert [i for i, _ in nn.top_k(nn.compute(graph, tensor, 3), 3)] == [1, 2, 0]
    assert [i for i, _ in nn.top_k(nn.compute(graph, tensor, 3)[1:], 2)] == [0, 1]
    assert "values" not in nn._buffers  # no copy was made
    assert [i for i, _ in nn.top_k(nn.compute(graph, tensor, 3)[::2], 2)] == [1, 0]


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_logits_is_an_error(nn: Classifier, classes: int) -> None:
    graph = nn.load_graph("sums")
    tensor = np.ones((1, 3, 2, 2), np.float32)
    with pytest.raises(GuestError, match=r"12 bytes|3 logits for 4 labels"):
        nn.compute(graph, tensor, classes)
    np.testing.assert_array_equal(nn.compute(graph, tensor, 3), [4, 4, 4])


def test_a_tensor_that_the_model_refuses_is_explained(nn: Classifier) -> None:
    graph = nn.load_graph("sums")
    with pytest.raises(GuestError, match=r"set_input.*has shape.*the tensor \[1, 2, 2, 3\]"):
        nn.compute(graph, np.ones((1, 2, 2, 3), np.float32), 3)


def test_a_model_that_is_none_or_unknown_is_explained(nn: Classifier) -> None:
    with pytest.raises(GuestError, match=r"nn_load_by_name: .*'other'; there are: sums"):
        nn.load_graph("other")
    with pytest.raises(GuestError, match=r"nn_load: .*E3"):
        nn.load_graph(b"not a model")
    with pytest.raises(GuestError, match="empty"):
        nn.load_graph(b"")


def test_an_unloaded_model_can_not_run(nn: Classifier) -> None:
    graph = nn.load_graph("sums")
    nn.unload(graph)
    tensor = np.ones((1, 3, 2, 2), np.float32)
    for slot in (graph, 99):
        with pytest.raises(GuestError, match=f"slot {slot} holds no model.*status -5"):
            nn.compute(slot, tensor, 3)
        with pytest.raises(GuestError, match=f"slot {slot} holds no model"):
            nn.unload(slot)
    np.testing.assert_array_equal(nn.compute(nn.load_graph("sums"), tensor, 3), [4, 4, 4])


def test_the_guest_without_wasi_nn_says_that_it_has_no_such_call(classifier: Classifier) -> None:
    with pytest.raises(GuestError, match="E5: the guest exports no function 'nn_load'"):
        classifier.load_graph(b"model")
