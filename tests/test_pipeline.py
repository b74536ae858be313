"""The whole path against the oracle and bare ONNX Runtime, on the embedded model and a toy."""

import dataclasses
import doctest
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgelab import models
from edgelab.datasets import SIGNS, Signs
from edgelab.errors import GuestError, ImageError, ModelError
from edgelab.models import Model, Spec
from edgelab.paths import source_root
from edgelab.pipeline import STAGES, Pipeline
from edgelab.preprocess import preprocess, softmax
from edgelab.runtime import Limits

FULL = bool(os.environ.get("EDGELAB_FULL"))

# The guest's tensor and the oracle's differ by float32 rounding only, 1e-6 at most.
LOGITS_BOUND = 1e-4


# --- the embedded model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signs() -> Pipeline:
    return Pipeline("signs")


def test_logits_are_those_of_the_oracle_and_bare_onnx_runtime(signs: Pipeline) -> None:
    bare = onnxruntime.InferenceSession(signs.model.data, providers=["CPUExecutionProvider"])
    for sample in Signs("test", 2592)[2560:]:
        expected = bare.run(None, {"input": preprocess(sample.image, signs.model.spec)})[0][0]
        logits = signs.logits(sample.image)
        assert logits.shape == (32,)
        assert np.abs(logits - expected).max() <= LOGITS_BOUND
        top = signs.classify(sample.image).top
        seen = [p.index for p in top]
        assert seen[0] == expected.argmax()
        # Of the next two, near ties may change places.
        assert np.abs(expected[seen] - np.sort(expected)[:-4:-1]).max() <= LOGITS_BOUND
        assert [p.label for p in top] == [SIGNS[k] for k in seen]
        assert [p.probability for p in top] == pytest.approx(softmax(expected)[seen], abs=1e-4)


def test_the_embedded_model_knows_its_test_renders(signs: Pipeline) -> None:
    count = 2560 if FULL else 320
    right = sum(
        signs.classify(sample.image, 1).top[0].index == sample.label
        for sample in Signs("test", count)
    )
    print(f"top-1 {right / count:.4f} on {count} test renders")
    assert right / count >= (0.93 if FULL else 0.90)
    if FULL:
        assert right / count <= 0.99  # else a loss from quantization could not be seen


def test_the_example_in_the_documentation_holds() -> None:
    example = doctest.DocTestFinder().find(Pipeline, "Pipeline")[0]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_all_kernels_give_the_same_logits(signs: Pipeline) -> None:
    image = Signs("test", 10)[9].image
    for kernel in ("scalar", "relaxed_simd"):
        logits = Pipeline(signs.model, kernel=kernel).logits(image)
        assert np.abs(logits - signs.logits(image)).max() <= LOGITS_BOUND


# --- a toy whose answer is known: each logit is the mean of one channel ---------------------------


def toy_model(
    shape: tuple[int | str, ...] = ("N", 3, 8, 8),
    kind: int = TensorProto.FLOAT,
    inputs: int = 1,
    extra_class: bool = False,
) -> bytes:
    """Mean over height and width of the sum of all inputs (and of a zero, if there are none)."""
    taken = [f"input{k}" for k in range(inputs)]
    nodes = [
        *(helper.make_node("Cast", [n], [f"float {n}"], to=TensorProto.FLOAT) for n in taken),
        helper.make_node("Sum", [*(f"float {n}" for n in taken), "zero"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "axes"], ["means"], keepdims=0),
        helper.make_node("Concat", ["means", "one"][: 1 + extra_class], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, kind, shape) for name in taken],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", None])],
        [
            numpy_helper.from_array(np.array([2, 3]), "axes"),
            numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "zero"),
            numpy_helper.from_array(np.ones((1, 1), np.float32), "one"),
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


TOY_SPEC = Spec("toy", "1", ("red", "green", "blue"), 8, 8, (0.0, 0.0, 0.0), (0.1, 0.1, 0.1))


def toy(data: bytes | None = None, spec: Spec = TOY_SPEC) -> Model:
    return Model(Path("toy.onnx"), toy_model() if data is None else data, "0" * 64, spec)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> NDArray[np.uint8]:
    return np.full((*size, 3), colour, np.uint8)


@pytest.fixture(scope="module")
def colours() -> Pipeline:
    return Pipeline(toy(), threads=1)


def test_the_toy_sees_colours(colours: Pipeline) -> None:
    for index, label in enumerate(TOY_SPEC.labels):
        image = plain((51, 51, 51))
        image[..., index] = 255
        seen = colours.classify(image)
        assert seen.label == label
        # Logits 10 and 2, 2: mean / 0.1.
        assert seen.top[0].probability == pytest.approx(1 / (1 + 2 * np.exp(-8)), rel=1e-4)
        assert [p.index for p in seen.top][1:] == [k for k in range(3) if k != index]
    np.testing.assert_allclose(colours.logits(plain((255, 51, 0))), [10, 2, 0], atol=1e-5)


def test_paths_bytes_and_arrays_are_the_same_to_it(colours: Pipeline, tmp_path: Path) -> None:
    image = plain((10, 200, 30))
    path = tmp_path / "grün.png"
    Image.fromarray(image).save(path)
    expected = colours.logits(image)
    for form in (path, str(path), path.read_bytes(), image[:, ::-1]):
        np.testing.assert_array_equal(colours.logits(form), expected)
        assert colours.classify(form).label == "green"


def test_logits_are_a_copy_that_the_next_call_leaves_alone(colours: Pipeline) -> None:
    first = colours.logits(plain((255, 0, 0)))
    colours.logits(plain((0, 0, 255)))
    np.testing.assert_allclose(first, [10, 0, 0], atol=1e-5)


@pytest.mark.parametrize(("top", "count"), [(1, 1), (2, 2), (3, 3), (100, 3)])
def test_top_is_at_most_the_number_of_classes(colours: Pipeline, top: int, count: int) -> None:
    assert len(colours.classify(plain((1, 2, 3)), top).top) == count


@pytest.mark.parametrize("top", [0, -1])
def test_top_below_one_is_an_error(colours: Pipeline, top: int) -> None:
    with pytest.raises(GuestError, match=f"k = {top}"):
        colours.classify(plain((1, 2, 3)), top)


def test_a_classification_is_ready_for_json_and_html(colours: Pipeline) -> None:
    seen = colours.classify(plain((255, 51, 0)))
    data = json.loads(json.dumps(seen.to_dict()))
    stages = [f"{stage}_ms" for stage in STAGES]
    assert set(data) == {"top", "total_ms", *stages}
    assert all(data[stage] > 0 for stage in stages)
    assert data["total_ms"] == pytest.approx(sum(data[stage] for stage in stages))
    assert data["top"][0] == {
        "label": "red",
        "probability": seen.top[0].probability,
        "index": 0,
    }
    assert repr(seen) == "Classification(red 100.0%, green 0.0%, blue 0.0%)"
    risky = dataclasses.replace(seen.top[0], label="<b>red</b>")
    html = dataclasses.replace(seen, top=(risky,))._repr_html_()
    assert "<table><caption>" in html
    assert "&lt;b&gt;red" in html


def test_a_bad_image_is_an_error_and_the_next_one_works(colours: Pipeline) -> None:
    for bad in (b"no image", "missing.jpg", np.zeros((4, 4), np.uint8)):
        with pytest.raises(ImageError):
            colours.classify(bad)
    with pytest.raises(GuestError, match="65535"):
        colours.classify(np.zeros((70_000, 1, 3), np.uint8))
    assert colours.classify(plain((255, 0, 0))).label == "red"


def test_an_image_over_the_memory_limit_is_an_error_and_the_next_one_works() -> None:
    pipeline = Pipeline(toy(), threads=1, limits=Limits(memory_bytes=8 << 20))
    with pytest.raises(GuestError, match="E4"):
        pipeline.classify(plain((255, 0, 0), (2000, 2000)))
    assert pipeline.classify(plain((255, 0, 0), (500, 500))).label == "red"


def test_an_unknown_kernel_is_an_error(colours: Pipeline) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'avx'"):
        Pipeline(colours.model, kernel="avx").classify(plain((1, 2, 3)))


# --- models that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (toy_model(("N", 8, 8, 3)), r"takes float32 \['N', 8, 8, 3\].*NHWC instead of NCHW"),
        (toy_model((1, 3, 16, 16)), r"takes float32 \[1, 3, 16, 16\].*float32 \[1, 3, 8, 8\]"),
        (toy_model((4, 3, 8, 8)), r"takes float32 \[4, 3, 8, 8\]"),
        (toy_model(("N", 3, 8, 8), kind=TensorProto.UINT8), "takes uint8"),
        (toy_model(inputs=2), r"takes float32 .*, float32 .*; by its spec"),
        (toy_model(inputs=0), "takes nothing"),
        (toy_model((1, 3, 8, 8), extra_class=True), "gives 4 outputs for 3 labels"),
        (toy_model()[:-9], "E3|damaged|ONNX"),
        (b"", "E3"),
        (b"GGUF" + bytes(100), "look like gguf"),
    ],
    ids=["nhwc", "crop", "batch", "dtype", "two", "none", "classes", "cut", "empty", "gguf"],
)
def test_a_model_that_contradicts_its_spec_is_refused_when_loaded(data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        Pipeline(toy(data))


def test_a_free_size_and_batch_fit() -> None:
    pipeline = Pipeline(toy(toy_model(("N", "C", "H", "W"))), threads=1)
    assert pipeline.classify(plain((0, 255, 0))).label == "green"


def test_a_wrong_number_of_labels_is_noticed_even_if_the_model_does_not_say() -> None:
    data = toy_model(("N", "C", "H", "W"))
    for labels in (("a", "b"), ("a", "b", "c", "d")):
        pipeline = Pipeline(toy(data, dataclasses.replace(TOY_SPEC, labels=labels)), threads=1)
        with pytest.raises(GuestError, match=r"3 logits for 4 labels|the output has 12 bytes"):
            pipeline.classify(plain((0, 255, 0)))


def test_one_label_more_or_less_for_the_embedded_model_is_an_error() -> None:
    model = models.load("signs")
    for labels in (SIGNS[:-1], (*SIGNS, "moose")):
        spec = dataclasses.replace(model.spec, labels=labels)
        with pytest.raises(ModelError, match=f"gives 32 outputs for {len(labels)} labels"):
            Pipeline(dataclasses.replace(model, spec=spec))


def test_the_in_guest_model_is_no_onnx_and_says_so() -> None:
    with pytest.raises(ModelError, match="E3"):
        Pipeline("signs-tiny")


def test_a_nan_from_the_model_is_an_error_and_not_a_label() -> None:
    proto = onnx.load_from_string(toy_model())
    proto.graph.node.append(helper.make_node("Log", ["logits"], ["log"]))  # of a negative number
    proto.graph.output[0].name = "log"
    spec = dataclasses.replace(TOY_SPEC, mean=(0.5, 0.5, 0.5))
    pipeline = Pipeline(toy(proto.SerializeToString(), spec), threads=1)
    with pytest.raises(GuestError, match=r"logits\[2\] is NaN"):
        pipeline.classify(plain((255, 255, 0)))


def test_a_photo_in_any_format_gets_the_same_label(colours: Pipeline) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        file = io.BytesIO()
        Image.fromarray(plain((20, 30, 220))).save(file, kind)
        assert colours.classify(file.getvalue()).label == "blue"


def test_nothing_is_written_to_the_home_but_our_own_cache(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would keep the number of this device there."""
    code = "from edgelab import Pipeline; Pipeline('signs').classify('models/signs/example.jpg')"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    cache = {"EDGELAB_CACHE": str(tmp_path / "edgelab")}
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=source_root(), env={**environment, **home, **cache}, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["edgelab"]
