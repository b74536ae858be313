"""From naive to fast: each step does what it says, and gives what bare ONNX Runtime gives."""

import dataclasses
import doctest
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgelab import images, models, plots, waterfall
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.cli import main
from edgelab.datasets import Signs
from edgelab.errors import EdgelabError, GuestError, ImageError, ModelError
from edgelab.models import Model, example_image
from edgelab.pipeline import Pipeline
from edgelab.preprocess import preprocess, resize_crop, softmax
from edgelab.runtime import Guest
from edgelab.wasinn import WasiNN, backends
from edgelab.wasinn.explain import LikelyMistake
from edgelab.waterfall import SWITCHES, Way, in_int8, overhead, walk

PHOTO = example_image().read_bytes()
FP32_BOUND, INT8_BOUND = 1e-4, 0.5
PREFIXES = [tuple(SWITCHES)[:count] for count in range(len(SWITCHES) + 1)]


@pytest.fixture(scope="module")
def signs() -> Model:
    return models.load("signs")


@pytest.fixture(scope="module")
def small(signs: Model) -> Model:
    return in_int8(signs, count=16)


def bare(model: Model, encoded: bytes) -> NDArray[np.float32]:
    """Pillow, NumPy and ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.data, providers=["CPUExecutionProvider"])
    tensor = preprocess(images.decode(encoded), model.spec)
    return np.asarray(session.run(None, {"input": tensor})[0][0])


# --- each step's answer ---------------------------------------------------------------------------


@pytest.mark.parametrize("on", PREFIXES, ids=lambda on: on[-1] if on else "naive")
def test_each_step_gives_what_bare_onnx_runtime_gives(
    on: tuple[str, ...], signs: Model, small: Model
) -> None:
    way = Way(signs, on, small=small, threads=1)
    expected = bare(small if "int8" in on else signs, PHOTO)
    for _ in range(2):  # what stays must not change the second answer
        answer = way.classify(PHOTO)
        off = np.abs(answer.logits - expected).max()
        assert off <= (INT8_BOUND if "int8" in on else FP32_BOUND)
        assert signs.spec.labels[answer.index] == "stop"
        assert answer.probability == pytest.approx(softmax(answer.logits).max(), abs=1e-5)
        assert set(answer.stages_ms) == set(waterfall.STAGES)
        assert min(answer.stages_ms.values()) >= 0
        assert (answer.json_bytes > 5 * 150_528) is ("binary" not in on)


@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "int8"])
def test_each_switch_works_alone(name: str, signs: Model) -> None:
    on = {name, "binary"} if name == "resize" else {name}
    way = Way(signs, on, threads=1)
    way.classify(PHOTO)
    assert np.abs(way.classify(PHOTO).logits - bare(signs, PHOTO)).max() <= FP32_BOUND


def test_the_last_step_is_the_pipeline(signs: Model) -> None:
    way = Way(signs, [name for name in SWITCHES if name != "int8"], threads=1)
    pipeline = Pipeline(signs, threads=1)
    np.testing.assert_array_equal(way.classify(PHOTO).logits, pipeline.logits(PHOTO))


# --- what each step really does -------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the libraries below compile, start and load; they do it all the same."""
    import wasmtime
    from wasmtime import _ffi as ffi

    count: Counter[str] = Counter()

    def count_calls(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def spy(*arguments: Any, **options: Any) -> Any:
            count[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, attribute, spy)

    count_calls(wasmtime.Module, "__init__", "compiled")
    count_calls(ffi, "wasmtime_instance_pre_instantiate", "started")
    count_calls(onnxruntime, "InferenceSession", "loaded")
    count_calls(json, "dumps", "written")
    return count


@pytest.mark.parametrize(
    ("on", "compiled", "started", "loaded", "written"),
    [
        ((), 3, 3, 3, 3),
        (("aot",), 0, 3, 3, 3),
        (("aot", "instance"), 0, 1, 3, 3),
        (("aot", "instance", "model"), 0, 1, 1, 3),
        (("aot", "instance", "model", "binary"), 0, 1, 1, 0),
        (("model",), 3, 3, 1, 3),
        (("instance",), 1, 1, 3, 3),
        (("instance", "binary"), 1, 1, 3, 0),
    ],
)
def test_three_requests_compile_start_and_load_as_often_as_they_say(
    signs: Model, counted: Counter[str], on: tuple[str, ...], compiled: int, started: int,
    loaded: int, written: int,
) -> None:  # fmt: skip
    Way(signs, ["aot"], threads=1).classify(PHOTO)  # its machine code is in the cache now
    way = Way(signs, on, threads=1)
    counted.clear()
    answers = [way.classify(PHOTO) for _ in range(3)]
    found = [counted[name] for name in ("compiled", "started", "loaded", "written")]
    assert found == [compiled, started, loaded, written]
    assert sum(answer.origin == "compiled" for answer in answers) == compiled
    assert sum(answer.origin is not None for answer in answers) == started
    assert sum(answer.loaded for answer in answers) == loaded


def test_only_zero_copy_leaves_the_tensor_in_the_guest(
    signs: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    original = backends.view

    def spy(address: int, *arguments: Any) -> Any:
        copied.append(address)
        return original(address, *arguments)

    monkeypatch.setattr("edgelab.waterfall.view", spy)
    for on, times in ((["binary"], 2), (["binary", "zero-copy"], 0), ([], 2), (["zero-copy"], 0)):
        way = Way(signs, ["instance", "model", *on], threads=1)
        copied.clear()
        way.classify(PHOTO)
        way.classify(PHOTO)
        assert len(copied) == times, on


def test_requests_leave_nothing_behind(signs: Model) -> None:
    way = Way(signs, ["aot", "instance"], threads=1)
    way.classify(PHOTO)
    classifier = way._classifier
    assert classifier is not None
    way.classify(PHOTO)
    size = len(classifier.instance.memory)
    for _ in range(20):  # above NNLimits.graphs: each request gives its model back
        way.classify(PHOTO)
    assert way._classifier is classifier
    assert len(classifier.instance.memory) == size


# --- bad input ------------------------------------------------------------------------------------


def test_bad_switches_and_models_are_told(signs: Model, small: Model) -> None:
    with pytest.raises(ValueError, match=r"no switch is named 'turbo'; there are aot, "):
        Way(signs, ["aot", "turbo"])
    with pytest.raises(ValueError, match="resize needs binary"):
        Way(signs, ["resize"])
    with pytest.raises(ValueError, match="pass small="):
        Way(signs, ["int8"])
    other = dataclasses.replace(small, spec=dataclasses.replace(small.spec, mean=(0.1, 0.2, 0.3)))
    with pytest.raises(ModelError, match=r"another mean than 'signs'.*edgelab quantize"):
        Way(signs, ["int8"], small=other)


def test_bad_pictures_stop_their_own_request_only(signs: Model) -> None:
    for on in ((), ("aot", "instance", "model", "binary", "simd", "resize")):
        way = Way(signs, on, threads=1)
        for bad in (b"", b"no picture", PHOTO[:2000]):
            with pytest.raises(ImageError):
                way.classify(bad)
        assert signs.spec.labels[way.classify(PHOTO).index] == "stop"


def test_a_step_with_another_answer_is_no_step(
    signs: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk itself looks: here the oracle sees the picture upside down."""
    upside_down = lambda pixels, spec: preprocess(pixels[::-1], spec)  # noqa: E731
    monkeypatch.setattr("edgelab.preprocess.preprocess", upside_down)
    with pytest.raises(EdgelabError, match=r"step naive: class 9, logits off by"):
        walk(signs, repeats=1)


# --- the guest's function -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(signs: Model) -> Classifier:
    nn = WasiNN({"signs": signs.data}, threads=1)
    return Classifier(Guest(guest_path("classify_nn").path, host=[nn]).instantiate())


def request(image: NDArray[np.uint8], **change: Any) -> dict[str, Any]:
    pixels = {"image_data": image.ravel().tolist(), "width": image.shape[1]}
    return {**pixels, "height": image.shape[0], "model_id": "signs", **change}


def test_json_in_json_out(classifier: Classifier, signs: Model) -> None:
    session = onnxruntime.InferenceSession(signs.data, providers=["CPUExecutionProvider"])
    for sample in Signs("test", 3, size=224):
        crop = resize_crop(sample.image, 224, 224)
        spec = dataclasses.replace(signs.spec, resize=224)
        expected = session.run(None, {"input": preprocess(crop, spec)})[0][0]
        for kernel in ("scalar", "simd128"):
            reply = classifier.nn_infer(request(crop), signs.spec, kernel)
            assert np.abs(np.array(reply["logits"]) - expected).max() <= FP32_BOUND
            assert reply["index"] == expected.argmax()
            assert reply["confidence"] == pytest.approx(softmax(expected).max(), abs=1e-5)
            assert set(reply["stages_ms"]) == {"load", "preprocess", "infer", "postprocess"}
            assert sum(reply["stages_ms"].values()) <= reply["latency_ms"]


def test_bad_requests_are_answers(classifier: Classifier, signs: Model) -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    text = json.dumps(request(image)).encode()
    for bad, name, said in [
        (text[:-20], "E8", "EOF"),
        (b"[]", "invalid_request", "not an object"),
        (json.dumps(request(image, width=223)).encode(), "invalid_request", "223 x 224 x 3 needed"),
        (json.dumps(request(image, width=2**32 - 1)).encode(), "invalid_request", "numbers"),
        (json.dumps(request(image, model_id="nobody")).encode(), "wasi_nn", "NotFound"),
        (json.dumps(request(image, model_id="a\0b")).encode(), "invalid_request", "zero byte"),
        (text.replace(b"[0", b"[256", 1), "invalid_request", "image_data[0]"),
    ]:
        error = classifier.nn_infer(bad, signs.spec)["error"]
        assert error["id"] == name
        assert said in error["message"], error
    with pytest.raises(GuestError, match="empty"):
        classifier.nn_infer(b"", signs.spec)
    with pytest.raises(ValueError, match="unknown kernel"):
        classifier.nn_infer(text, signs.spec, "fast")
    with pytest.warns(LikelyMistake, match="224 is wanted"):
        error = classifier.nn_infer(request(image[:8, :8]), signs.spec)["error"]
    assert error["id"] == "wasi_nn"
    assert "set_input" in error["message"]
    assert "logits" in classifier.nn_infer(text, signs.spec)  # it goes on


def test_a_hostile_host_gets_nothing(classifier: Classifier) -> None:
    instance = classifier.instance
    text, params = classifier.buffer(10), classifier.buffer(32)
    good = (text.pointer, 10, params.pointer, 0)
    for place, bad in ((0, 0), (0, 8), (1, 11), (1, 2**32 - 1), (2, 0), (2, text.pointer), (3, 3)):
        arguments = [*good]
        arguments[place] = bad
        assert instance.call("nn_infer", *arguments) == 0, (place, bad)
        assert instance.call("last_error") != 0


# --- the walk and the command ---------------------------------------------------------------------


def test_a_walk_has_every_step_and_the_articles_rows(signs: Model, small: Model) -> None:
    seen = walk(signs, small, repeats=2, threads=1)
    assert [step.name for step in seen.steps] == ["naive", *SWITCHES]
    assert {step.label for step in seen.steps} == {"stop"}
    assert [row.claim for row in seen.rows] == ["C1", "C2", "C3", "C4"]
    assert set(seen.verdicts) == {"C1", "C2", "C3", "C4", "C5", "C7"}
    samples = seen.comparison.samples_ms
    for step in seen.steps:
        stages = sum(each.median_ms for each in step.stages.values())
        assert 0 < stages <= 1.5 * max(samples[step.name])
        expected = np.median(np.array(samples["naive"]) / np.array(samples[step.name]))
        assert step.total.median == pytest.approx(expected)
    for row in seen.rows:
        before = sum(seen["naive"].stages[stage].median_ms for stage in row.stages)
        assert row.before.median_ms == pytest.approx(before, rel=0.3)
        saved = row.before.median_ms - row.after.median_ms
        assert sum(row.saved_ms.values()) == pytest.approx(saved, abs=1e-6)
        assert row.cause in SWITCHES
    plain = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    assert [step["name"] for step in plain["steps"]] == ["naive", *SWITCHES]
    for name in SWITCHES:
        assert name in str(seen)
        assert f"<td>{name}</td>" in seen._repr_html_()
    assert seen._repr_html_().count("<caption>") == 2
    drawn = plots.waterfall(seen)
    assert drawn.png.startswith(b"\x89PNG")
    assert len(drawn.table.rows) == len(seen.steps)


def test_verdicts_follow_from_intervals() -> None:
    from edgelab.measure import Ratio, Summary

    def about(x: float) -> Ratio:
        return Ratio(x, 0.9 * x, 1.1 * x, 9)

    def row(alone: float, factor: float) -> waterfall.Row:
        one, saved = Summary(1, 1, 9), {"aot": 1.0, "model": 2.0}
        return waterfall.Row(
            "C1", ("load",), (30, 2), "AOT", "aot", one, one, about(factor), about(alone), saved
        )

    assert row(20, 20).verdict == "holds"
    assert row(3, 20).verdict == "not by aot alone"
    assert row(3, 15).verdict == "can't be told"
    assert row(3, 10).verdict == "does not"
    assert row(3, 10).cause == "model"


def test_the_parts_see_what_the_pipeline_sees(small: Model) -> None:
    seen = overhead(Pipeline(small, threads=1), repeats=6)
    assert list(seen.ratios) == ["decode", "preprocess", "infer", "postprocess", "total"]
    parts = sum(each.median_ms for stage, each in seen.parts.items() if stage != "total")
    assert 0 < parts <= 1.5 * seen.parts["total"].p95_ms
    assert json.loads(json.dumps(seen.to_dict()))["ratios"]["total"]["count"] == 6
    assert "Pipeline / parts" in str(seen)
    assert "<caption>" in seen._repr_html_()


def test_the_command_prints_json_and_draws(small: Model, tmp_path: Path) -> None:
    file, picture = tmp_path / "small.onnx", tmp_path / "walk.png"
    file.write_bytes(small.data)
    options = ["--int8", str(file), "--repeats", "1", "--json", "--plot", str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "edgelab", "waterfall", *options],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"][-1]["name"] == "int8"
    assert found["overhead"]["ratios"]["total"]["count"] == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--int8", "no-such-model"), "Known names"),
        (("--image", "/no/such.jpg"), "cannot read /no/such.jpg"),
        (("--calibrate", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_the_command_tells_what_is_wrong(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["waterfall", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_the_example_in_the_documentation_holds() -> None:
    example = doctest.DocTestFinder().find(Way, "Way", waterfall)[0]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
