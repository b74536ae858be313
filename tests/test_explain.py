"""Each mistake made on purpose, on the embedded model and on a real one; and right inputs, which
must raise no alarm. The mistakes are made with NumPy; what they are called is written here.

``pytest tests/test_explain.py -s -k rates`` prints how often each is found.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward import NN, Heap, forwarder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import helper
from PIL import Image

from edgelab import models
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.datasets import SIGNS, Signs
from edgelab.errors import GuestError
from edgelab.images import decode
from edgelab.models import Model, Spec, read_synset_labels
from edgelab.paths import source_root
from edgelab.pipeline import Pipeline
from edgelab.preprocess import resize_crop, softmax
from edgelab.runtime import Guest
from edgelab.wasinn import Explanation, LikelyMistake, TensorInfo, WasiNN, load_graph
from edgelab.wasinn.backends import Graph
from edgelab.wasinn.explain import (
    Expectation,
    ask,
    check_fit,
    check_input,
    check_output,
    explain,
    is_distribution,
    swap_colors,
)

FULL = bool(os.environ.get("EDGELAB_FULL"))
REAL = Path(source_root() or ".").parent / "shared" / "real"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"needs the real photos and models in {REAL}, which do not ship"
)

Tensor = NDArray[Any]
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
WANTS = Expectation("NCHW", "RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "logits")


def planes(pixels: Tensor) -> Tensor:
    """A batch of one, channels first, of pixels with the channels last."""
    return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)[None])


def normal(pixels: Tensor) -> Tensor:
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


def right(pixels: Tensor) -> Tensor:
    return planes(normal(pixels))


# Mistake → what it does to pixels, and what it is to be called.
VISIBLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "HWC under CHW": (lambda p: normal(p).reshape(1, 3, *p.shape[:2]), "layout"),
    "no /255, no mean, std": (planes, "range"),
    "no /255": (lambda p: planes((p - MEAN) / STD), "range"),
    "mean of 0…255 only": (lambda p: planes(p - 255 * MEAN), "range"),
    "/255 twice": (lambda p: right(p.astype(np.float32) / 255), "range"),
    "no mean, std": (lambda p: planes(p.astype(np.float32) / 255), "normalisation"),
    "no std": (lambda p: planes(p.astype(np.float32) / 255 - MEAN), "normalisation"),
    "no mean": (lambda p: planes(p.astype(np.float32) / 255 / STD), "normalisation"),
    "to -1…1": (lambda p: planes(p.astype(np.float32) / 127.5 - 1), "normalisation"),
    "normalised twice": (lambda p: planes((normal(p) - MEAN) / STD), "normalisation"),
    "BGR with its constants": (lambda p: planes(normal(p)[..., ::-1]), "color"),
    "RGB, constants of BGR": (
        lambda p: planes((p.astype(np.float32) / 255 - MEAN[::-1]) / STD[::-1]),
        "color",
    ),
}


def swapped(pixels: Tensor) -> Tensor:
    """BGR pixels with RGB's constants: nothing in the numbers tells."""
    return right(pixels[..., ::-1])


@functools.cache
def signs() -> list[Tensor]:
    """200 rendered signs as pixels of a model's size."""
    return [resize_crop(s.image, 256, 224) for s in Signs("test", 200)]


@functools.cache
def photos() -> list[Tensor]:
    files = [*sorted((REAL / "imagenet-200").iterdir()), *sorted((REAL / "photos").iterdir())]
    return [resize_crop(decode(f), 256, 224) for f in files]


def kinds(tensor: Tensor, wants: Expectation = WANTS) -> str:
    findings = check_input(tensor, wants)
    return "nothing to see" if findings is None else " ".join(f.kind for f in findings) or "none"


def in_floating_point(pixels: Tensor) -> Tensor:
    """The same picture, resized without rounding to whole pixel values; overshoots a little."""
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    grown = [c.resize((256, 256), Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(c)[16:240, 16:240] for c in grown], -1)


def grey(pixels: Tensor, mode: str = "L") -> Tensor:
    levels = Image.fromarray(pixels).convert(mode).convert("L")
    return np.repeat(np.asarray(levels)[..., None], 3, 2)


# --- how often: the numbers alone -----------------------------------------------------------------


@pytest.mark.parametrize("source", [signs, pytest.param(photos, marks=needs_real)])
def test_rates_of_the_automatic_check(source: Callable[[], list[Tensor]]) -> None:
    pixels = source()
    print(f"\n{len(pixels)} {source.__wrapped__.__name__}")  # type: ignore[attr-defined]
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "8-bit": lambda p: p,
        "grey": grey,
        "resized in float": in_floating_point,
    }
    for variant, change in variants.items():
        images = [change(p) for p in pixels[:: 1 if FULL or variant == "8-bit" else 4]]
        seen = Counter(kinds(right(p)) for p in images)
        print(f"  {variant}: right inputs: {dict(seen)}")
        assert seen == {"none": len(images)}
        assert {kinds(swapped(p)) for p in images} == {"none"}  # honest: only `ask` may tell
        for name, (make, kind) in VISIBLE.items():
            called = Counter(kinds(make(p)) for p in images)
            found = called[kind]
            print(f"  {variant}: {name}: {found / len(images):.1%} called {kind}")
            assert set(called) <= {kind, "none", "range"}, name  # never a wrong colour
            if variant != "resized in float":
                assert found == len(images), name
            elif kind in ("layout", "range"):
                assert found >= 0.99 * len(images), name


@pytest.mark.parametrize(
    ("source", "alarms"), [(signs, 0), pytest.param(photos, 0, marks=needs_real)]
)
def test_rates_with_half_precision(source: Callable[[], list[Tensor]], alarms: int) -> None:
    """Too coarse for levels: what is left is the range."""
    images = [right(p).astype(np.float16) for p in source()]
    assert sum(kinds(x) != "none" for x in images) == alarms
    for name in ("no /255, no mean, std", "no /255", "mean of 0…255 only"):
        make, kind = VISIBLE[name]
        assert {kinds(make(p).astype(np.float16)) for p in source()} == {kind}, name


def test_what_is_no_photo_raises_no_alarm() -> None:
    draw = np.random.default_rng(3)
    for side in (8, 32, 224):
        for _ in range(30):
            assert kinds(draw.random((1, 3, side, side), np.float32)) == "none"
            assert kinds(draw.normal(size=(1, 3, side, side)).astype(np.float32)) == "none"
            assert kinds(right(draw.integers(0, 256, (side, side, 3)))) == "none"
            many = draw.random((4, 3, side, side), np.float32)
            assert kinds(many) == "none"
    for pixels in signs()[:64]:
        assert kinds(right(grey(pixels, "1"))) == "none"  # black and white dots
        loud = pixels + draw.normal(0, 40, pixels.shape)
        assert kinds(right(loud.clip(0, 255).astype(np.uint8))) == "none"
    stripes = np.zeros((224, 224, 3), np.uint8)
    for period in (2, 4, 5, 7):
        for axis in (0, 1):
            striped = stripes.copy()
            np.moveaxis(striped, axis, 0)[::period] = 200, 30, 90
            assert kinds(right(striped)) == "none", (period, axis)
    ramp = np.linspace(0, 255, 224).astype(np.uint8)
    assert kinds(right(np.stack([np.tile(ramp, (224, 1))] * 3, -1))) == "none"


def test_a_letterboxed_image_raises_no_alarm() -> None:
    for pixels in signs()[:32]:
        tensor = right(pixels)
        tensor[:, :, :40] = 0  # padded after the normalisation
        tensor[:, :, -40:] = 0
        assert kinds(tensor) == "none"


def test_fog_raises_no_alarm() -> None:
    """Levels 124 to 180: after a right normalisation, hardly any value is negative or above 1."""
    for pixels in signs()[:32]:
        foggy = (124 + pixels * (56 / 255)).astype(np.uint8)
        assert right(foggy).min() > -0.1
        assert right(foggy).max() < 1.4
        assert kinds(right(foggy)) == "none"
        dark = in_floating_point(pixels // 2).clip(0, 255)
        wants = Expectation("NCHW", "RGB", (0.0,) * 3, (0.5,) * 3)  # whose values never are
        assert kinds(planes(dark / 127.5), wants) == "none"
        night = (pixels // 64).astype(np.uint8)  # 0 to 3
        assert kinds(right(night)) in ("none", "nothing to see")


def test_an_image_of_one_colour_shows_nothing() -> None:
    for colour in ((0, 0, 0), (255, 0, 12)):
        assert kinds(right(np.full((224, 224, 3), colour, np.uint8))) == "nothing to see"
    assert kinds(np.zeros((1, 3, 224, 224), np.float32)) == "nothing to see"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_reported(value: float) -> None:
    tensor = right(signs()[0])
    tensor[0, 1] = value
    assert kinds(tensor) == "not finite"


def test_other_constants_than_the_models_are_named() -> None:
    wants = Expectation("NCHW", "RGB", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    plain = Expectation("NCHW", "RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    raw = Expectation("NCHW", "RGB", (0.0,) * 3, (1 / 255,) * 3)
    for pixels in signs()[:32]:
        assert kinds(planes(pixels / 127.5 - 1), wants) == "none"
        assert kinds(right(pixels), wants) == "normalisation"
        assert kinds(planes(pixels / 255), wants) == "normalisation"
        assert kinds(planes(pixels / 255), plain) == "none"
        assert kinds(right(pixels), plain) == "normalisation"
        assert kinds(planes(pixels / 127.5 - 1), plain) == "normalisation"
        assert kinds(planes(pixels), plain) == "range"
        assert kinds(planes(pixels), raw) == "none"
        assert kinds(planes(pixels / 255), raw) == "normalisation"


def test_models_of_pixels_and_of_grey_images() -> None:
    one = Expectation("NCHW", "RGB", (0.1307,), (0.3081,))
    for pixels in signs()[:32]:
        layer = pixels.transpose(2, 0, 1)[None]
        assert kinds(np.ascontiguousarray(layer)) == "none"  # uint8: only the layout can be wrong
        assert kinds(pixels.reshape(1, 3, 224, 224)) == "layout"
        light = grey(pixels)[None, None, ..., 0].astype(np.float32)
        assert kinds((light / 255 - 0.1307) / np.float32(0.3081), one) == "none"
        assert kinds(light, one) == "range"
        assert kinds(light / 255, one) == "normalisation"


def test_the_other_layout() -> None:
    wants = Expectation("NHWC", "RGB", WANTS.mean, WANTS.std)
    seen: Counter[str] = Counter()
    for pixels in signs():
        for image in (pixels, grey(pixels), grey(pixels, "1")):
            assert kinds(normal(image)[None], wants) == "none"
        assert kinds(pixels[None].astype(np.float32), wants) == "range"
        seen[kinds(right(pixels).reshape(1, 224, 224, 3), wants)] += 1
    print(f"\nCHW under HWC: {dict(seen)}")
    assert seen["layout"] >= 190


def test_two_mistakes_are_both_named() -> None:
    for pixels in signs()[:32]:
        assert kinds(pixels.astype(np.float32).reshape(1, 3, 224, 224)) == "layout range"
        assert kinds(pixels.astype(np.float32).reshape(1, 3, 224, 224) / 255) == (
            "layout normalisation"
        )


# --- how often: asking the model ------------------------------------------------------------------


@functools.cache
def real_graph(precision: str) -> Graph:
    file = {"fp32": "mobilenetv2-fp32-rebuilt.onnx", "int8": "mobilenetv2-12-int8.onnx"}[precision]
    return load_graph((REAL / file).read_bytes())


def run(graph: Graph, tensor: Tensor) -> Tensor:
    context = graph.context()
    tensor = np.ascontiguousarray(tensor)
    context.bind_input(0, tensor.ctypes.data, tensor.shape, tensor.dtype)
    context.compute()
    return np.array(context.output(0))


@pytest.mark.parametrize(
    ("which", "least", "alarms"),
    [
        ("signs", (0.3, 0.95, 0.99), 0.0),
        pytest.param("fp32", (0.1, 0.5, 0.8), 0.02, marks=needs_real),
        pytest.param("int8", (0.1, 0.5, 0.8), 0.02, marks=needs_real),
    ],
)
def test_rates_of_swapped_colours(
    which: str, least: tuple[float, float, float], alarms: float
) -> None:
    """How often they are found from 1, 8 and 16 images."""
    graph = load_graph(models.load("signs").data) if which == "signs" else real_graph(which)
    pixels = (signs() if which == "signs" else photos())[:: 1 if FULL else 4]
    found = {}
    for name, make in (("swapped", swapped), ("right", right)):
        single, rises = 0, list[float]()
        for p in pixels:
            evidence: dict[int, float] = {}
            answers = ask(functools.partial(run, graph), make(p), WANTS, evidence)
            single += "color" in [f.kind for f in answers.findings]
            rises += evidence.values()
        # Many draws of 8 and 16, in an order that has nothing to do with the classes.
        order = np.random.default_rng(5).permuted(np.tile(np.arange(len(rises)), (2000, 1)), axis=1)
        drawn = np.array(rises)[order]
        rates = [single / len(pixels)]
        rates += [float((drawn[:, :n].mean(1) > 3 / n**0.5).mean()) for n in (8, 16)]
        found[name] = rates
        shown = ", ".join(f"{rate:.1%}" for rate in rates)
        print(f"\n{which}, {len(pixels)} {name}: called swapped from 1, 8, 16 images: {shown}")
    assert all(rate >= want for rate, want in zip(found["swapped"], least, strict=True))
    assert max(found["right"]) <= alarms


def test_evidence_adds_up_and_an_image_counts_once() -> None:
    graph = load_graph(models.load("signs").data)
    asked: Callable[..., Any] = functools.partial(ask, functools.partial(run, graph))
    evidence: dict[int, float] = {}
    for count, pixels in enumerate(signs()[:16], 1):
        for _ in range(2):
            answers = asked(swapped(pixels), WANTS, evidence)
        assert len(evidence) == count
    assert [f.kind for f in answers.findings] == ["color"]
    assert "16 image(s)" in answers.findings[0].text
    together: dict[int, float] = {}
    batch = np.concatenate([swapped(p) for p in signs()[:16]])
    assert [f.kind for f in asked(batch, WANTS, together).findings] == ["color"]
    assert sorted(together.values()) == pytest.approx(sorted(evidence.values()), abs=1e-3)


def test_swapping_twice_is_nothing_and_once_is_the_right_thing() -> None:
    pixels = signs()[9]
    for wants, make in (
        (WANTS, right),
        (Expectation("NHWC", "RGB", WANTS.mean, WANTS.std), lambda p: normal(p)[None]),
        (Expectation(), lambda p: p.transpose(2, 0, 1)[None]),
    ):
        other = swap_colors(make(pixels), wants)
        assert other.dtype == make(pixels).dtype
        np.testing.assert_allclose(other, make(pixels[..., ::-1]), atol=1e-5)
        np.testing.assert_allclose(swap_colors(other, wants), make(pixels), atol=1e-5)


@pytest.mark.parametrize("name", VISIBLE)
def test_the_cure_gives_the_right_answer(name: str) -> None:
    graph = load_graph(models.load("signs").data)
    for index in (9, 41, 137):
        make, kind = VISIBLE[name]
        (want,) = run(graph, right(signs()[index]))
        what_ifs = ask(functools.partial(run, graph), make(signs()[index]), WANTS, labels=SIGNS)
        cured = what_ifs.what_ifs[1]
        assert cured.change == f"cured: {kind}"
        if name != "BGR with its constants":  # cures the constants; the swap is another row
            assert cured.label == SIGNS[want.argmax()]
            assert cured.probability == pytest.approx(softmax(want).max(), abs=0.01)


# --- tensors that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "got", "text", "cure"),
    [
        (("N", 3, 224, 224), (1, 224, 224, 3), "NHWC.*wants NCHW", r"transpose\(0, 3, 1, 2\)"),
        ((1, 224, 224, 3), (1, 3, 224, 224), "NCHW.*wants NHWC", r"transpose\(0, 2, 3, 1\)"),
        ((1, 3, 224, 192), (1, 224, 192, 3), "NHWC.*wants NCHW", r"transpose\(0, 3, 1, 2\)"),
        ((1, 3, 224, 192), (1, 192, 224, 3), "NWHC.*wants NCHW", r"transpose\(0, 3, 2, 1\)"),
        ((1, 3, 224, 192), (1, 3, 192, 224), "NCWH.*wants NCHW", r"transpose\(0, 1, 3, 2\)"),
        ((1, 224, 192, 3), (1, 192, 224, 3), "NWHC.*wants NHWC", r"transpose\(0, 2, 1, 3\)"),
        ((1, 3, 224, 224), (224, 224, 3, 1), "HWCN.*wants NCHW", r"transpose\(3, 2, 0, 1\)"),
        ((1, 5, 6, 7), (1, 6, 7, 5), "another order", r"transpose\(0, 3, 1, 2\)"),
        (("N", 3, 224, 224), (3, 224, 224), "batch dimension is missing", r"x\[None\]"),
        (("N", 3, 224, 224), (224, 224, 3), "missing, and .*NHWC", r"x\[None\].*transpose"),
        (("N", 3, 224, 224), (1, 3, 256, 256), "256 where 224.*256 where 224", "Resize or crop"),
        (("N", 3, 224, 224), (1, 4, 224, 224), "4 where 3 is wanted", "without alpha"),
        (("N", 3, 224, 224), (1, 1, 224, 224), "1 where 3 is wanted", "three channels"),
        (("N", 3, 224, 224), (3, 256, 256), "missing, 256 where 224", "Add it.* Resize or crop"),
        ((1, 3, 224, 224), (8, 3, 224, 224), "8 where 1 is wanted", "a batch of 1"),
        ((1, 3, 224, 224), (150528,), "number of elements may be right", "declares"),
        (("N", 3, 224, 224), (2 * 150528,), "number of elements may be right", "declares"),
        ((1, 3, 224, 224), (7,), "1 dimension.*4 are wanted", "declares"),
        ((1, 3, 224, 224), (), "0 dimension", "declares"),
        ((1, 3, 224, 224), (0, 0, 0, 0), "0 where", "Resize"),
        ((0, 3), (0, 3, 3), "elements may be right", "declares"),
        ((7,), (8,), "8 where 7 is wanted", "Resize"),
    ],
)
def test_a_wrong_shape_is_named(
    want: tuple[int | str | None, ...], got: tuple[int, ...], text: str, cure: str
) -> None:
    (finding,) = check_fit(TensorInfo("x", np.dtype("f4"), want), got, np.dtype("f4"))
    assert finding.kind == "shape"
    assert f"shape {list(want)}, the tensor {list(got)}" in finding.text
    assert re.search(text, finding.text), finding.text
    assert re.search(cure, finding.cure), finding.cure


def test_a_wrong_type_is_named() -> None:
    info = TensorInfo("x", np.dtype("f4"), (1, 3, 4, 4))
    (finding,) = check_fit(info, (1, 3, 4, 4), np.dtype("u1"))
    assert finding.kind == "dtype"
    assert "a cast alone is not enough" in finding.cure
    (finding,) = check_fit(info, (1, 3, 4, 4), np.dtype("f8"))
    assert finding.cure == "Convert it to float32"
    both = check_fit(TensorInfo("x", None, (2,)), (1,), np.dtype("f8"))
    assert [f.kind for f in both] == ["dtype", "shape"]
    assert check_fit(info, (1, 3, 4, 4), np.dtype("f4")) == ()


# --- softmax in the wrong place -------------------------------------------------------------------


def test_outputs() -> None:
    draw = np.random.default_rng(8)
    free = Expectation()
    for classes in (10, 32, 1000):
        for scale in (0.1, 1.0, 6.0):
            logits = draw.normal(0, scale, (1, classes)).astype(np.float32)
            once = softmax(logits).astype(np.float32)
            twice = softmax(once).astype(np.float32)
            assert check_output(logits, WANTS) == ()
            assert [f.kind for f in check_output(once, WANTS)] == ["probabilities"]
            assert check_output(once, free) == ()
            assert check_output(once, None) == ()
            if once.max() > 0.05:
                (finding,) = check_output(twice, free)
                assert finding.kind == "double softmax"
                assert f"{once.max():.1%}" in finding.text
    assert check_output(np.full((1, 32), 1 / 32, np.float32), free) == ()  # merely unsure
    for few in ([0.5, 0.5], [0.4, 0.6], [0.3, 0.3, 0.4]):
        assert check_output(np.array([few], np.float32), free) == ()
    assert not is_distribution(np.array([0.5, 0.6], np.float32))
    assert not is_distribution(np.array([-0.5, 1.5], np.float32))
    assert not is_distribution(np.array([np.nan, 1], np.float32))
    assert not is_distribution(np.array([1], np.float32))
    assert not is_distribution(np.array([0, 1]))


def with_softmax(times: int, facts: dict[str, str] | None = None) -> bytes:
    """The embedded model with softmax behind it, and other facts in its metadata."""
    proto = onnx.load_from_string(models.load("signs").data)
    for k in range(times):
        last = proto.graph.output[0].name
        proto.graph.node.append(helper.make_node("Softmax", [last], [f"softmax {k}"], axis=-1))
        proto.graph.output[0].name = f"softmax {k}"
    metadata = {p.key: p.value for p in proto.metadata_props}
    helper.set_model_props(proto, metadata if facts is None else facts)
    return bytes(proto.SerializeToString())


# --- through the host and a real guest ------------------------------------------------------------


class Feeder:
    """A guest that passes what a test tells it to, through the crate ``wasi-nn``."""

    def __init__(self, model: bytes, **facts: str) -> None:
        self.nn = WasiNN({"model": model}, threads=1)
        self.nn.graph("model").metadata.update(facts)
        self.instance = Guest(guest_path("classify_nn").path, host=[self.nn]).instantiate()
        self.classifier = Classifier(self.instance)
        self.slot = self.classifier.load_graph("model")

    def __call__(self, tensor: Tensor, classes: int = 32) -> Tensor:
        return np.array(self.classifier.compute(self.slot, tensor, classes))

    def explain(self) -> Explanation:
        return self.nn.explain(self.instance)


@pytest.fixture
def feed() -> Feeder:
    return Feeder(models.load("signs").data)


def found(explanation: Explanation) -> list[str]:
    return [f.kind for f in explanation.findings]


@pytest.mark.parametrize("name", VISIBLE)
def test_the_host_warns_and_explains(feed: Feeder, name: str) -> None:
    make, kind = VISIBLE[name]
    with pytest.warns(LikelyMistake, match=rf"model 'signs': {kind} \(.*\): .*host.explain"):
        feed(make(signs()[9]))
    assert [m.kind for m in feed.nn.mistakes] == [kind]
    explanation = feed.explain()
    assert found(explanation)[0] == kind
    assert [w.change for w in explanation.what_ifs] == [
        "as it is", f"cured: {kind}", "red and blue exchanged"
    ]  # fmt: skip


def test_right_inputs_raise_no_warning_and_nothing_is_found() -> None:
    pipeline = Pipeline("signs")
    for sample in Signs("test", 16):
        label = pipeline.classify(sample.image).label
        explanation = pipeline.nn.explain(pipeline.classifier.instance)
        assert explanation.findings == ()
        assert explanation.what_ifs[0].label == label
        assert explanation.model == "signs"
        assert explanation.wants == WANTS
    assert not pipeline.nn.mistakes
    assert "(16 image(s))" in explanation.notes[0]


def test_swapped_colours_are_found_by_explaining_some_images(feed: Feeder) -> None:
    for pixels in signs()[:8]:
        feed(swapped(pixels))  # no warning: nothing in the numbers tells
        explanation = feed.explain()
    assert found(explanation) == ["color"]
    assert "pixels seem to be BGR, the model wants RGB" in str(explanation)


def test_one_warning_for_each_model_and_kind(feed: Feeder) -> None:
    raw = planes(signs()[0])
    with pytest.warns(LikelyMistake) as caught:  # noqa: PT031
        for _ in range(3):
            feed(raw)
        feed.slot = feed.classifier.load_graph("model")  # another handle of the same model
        for _ in range(3):
            feed(raw)
    assert len(caught) == 2
    assert len(feed.nn.mistakes) == 2


def test_a_warm_up_does_not_use_up_the_look(feed: Feeder) -> None:
    feed(np.zeros((1, 3, 224, 224), np.float32))
    assert found(feed.explain()) == ["blank"]
    with pytest.warns(LikelyMistake, match="range"):
        feed(planes(signs()[0]))
    feed(right(signs()[0]))
    assert found(feed.explain()) == []


def test_only_the_first_image_of_a_context_is_looked_at(feed: Feeder) -> None:
    feed(right(signs()[0]))
    feed(planes(signs()[0]))  # costs nothing, and warns of nothing
    assert found(feed.explain()) == ["range"]


def test_an_explanation_of_a_tensor_that_was_refused(feed: Feeder) -> None:
    with pytest.raises(GuestError, match="nothing to explain"):
        feed.explain()
    with (
        pytest.warns(LikelyMistake, match="shape .certain.*NHWC"),
        pytest.raises(GuestError, match=r"the data are NHWC.*transpose"),
    ):
        feed(normal(signs()[0])[None])
    explanation = feed.explain()
    assert found(explanation) == ["shape"]
    assert explanation.what_ifs == ()
    assert [s.shape for s in explanation.seen] == [(1, 224, 224, 3)]
    feed(right(signs()[0]))
    assert found(feed.explain()) == []


def test_a_tensor_that_was_changed_since_is_not_explained(feed: Feeder) -> None:
    feed(right(signs()[0]))
    feed.classifier._put("input", planes(signs()[1]))  # as a guest that reuses its buffer
    explanation = feed.explain()
    assert explanation.findings == ()
    assert "changed or set anew" in explanation.notes[0]


def test_what_is_set_but_not_computed_is_not_explained_as_if_it_were() -> None:
    graph = load_graph(models.load("signs").data)
    one, batch = right(signs()[0]), np.concatenate([right(p) for p in signs()[:2]])
    three = np.concatenate([batch, one])
    for set_since, computed in ((batch, one), (right(signs()[1]), one), (three, batch)):
        explanation = explain(graph, {0: set_since}, run(graph, computed))
        assert "changed or set anew" in explanation.notes[0]
    assert explain(graph, {0: batch}, run(graph, batch)).what_ifs[0].label == SIGNS[0]
    assert explain(graph, {}).notes == ("No input is set.",)


def test_an_unloaded_model_is_let_go() -> None:
    nn = WasiNN({"model": onnx_mean((1, 3, 2, 2))})
    instance = Guest(forwarder({"wasi_ephemeral_nn": NN}, 1), host=[nn]).instantiate()
    heap = Heap(instance)
    out, name = heap.room(4), heap.put(b"model")
    assert instance.call("load_by_name", name, 5, out) == 0
    assert instance.call("init_execution_context", 0, out) == 0
    dims, data = heap.put(np.array([1, 3, 2, 2], "<u4").tobytes()), heap.put(bytes(48))
    tensor = heap.put(np.array([dims, 4, 1, data, 48], "<u4").tobytes())
    assert instance.call("set_input", 1, 0, tensor) == 0
    assert instance.call("compute", 1) == 0
    assert nn.explain(instance).outputs[0].name == "z"
    assert instance.call("unload", 0) == 0
    with pytest.raises(GuestError, match="nothing to explain"):
        nn.explain(instance)


def test_a_model_that_says_nothing_gets_no_warning_until_it_is_told() -> None:
    plain = with_softmax(0, {})
    feed = Feeder(plain)
    feed(planes(signs()[0]))
    explanation = feed.explain()
    assert explanation.findings == ()
    assert "metadata.update" in explanation.notes[0]
    told = Feeder(plain, mean="[0.485, 0.456, 0.406]", std="[0.229, 0.224, 0.225]")
    with pytest.warns(LikelyMistake, match="range"):
        told(planes(signs()[0]))


def test_a_pipeline_tells_the_host_what_the_spec_says() -> None:
    model = models.load("signs")
    bare = Model(model.path, with_softmax(0, {}), model.sha256, model.spec)
    pipeline = Pipeline(bare)
    pipeline.classify(Signs("test", 10)[9].image)
    explanation = pipeline.nn.explain(pipeline.classifier.instance)
    assert explanation.wants == WANTS
    assert explanation.findings == ()
    assert Spec.from_metadata(model.spec.to_metadata()) == model.spec


def test_softmax_that_would_be_applied_twice() -> None:
    model, image = models.load("signs"), Signs("test", 10)[9].image
    with pytest.warns(LikelyMistake, match="probabilities") as caught:  # noqa: PT031
        pipeline = Pipeline(Model(model.path, with_softmax(1), model.sha256, model.spec))
        pipeline.classify(image)
        pipeline.classify(image)
    assert len(caught) == 1  # and not once more by top_k
    assert found(pipeline.nn.explain(pipeline.classifier.instance)) == ["probabilities"]

    feed = Feeder(with_softmax(1, {}))  # says nothing, so that only top_k can know
    scores = feed(right(signs()[9]))
    assert "probabilities already" in " ".join(feed.explain().notes)
    with pytest.warns(LikelyMistake, match="top_k takes them for") as caught:  # noqa: PT031
        feed.classifier.top_k(scores)
        feed.classifier.top_k(scores)
    assert len(caught) == 1


def test_softmax_of_a_softmax_inside_a_model() -> None:
    feed = Feeder(with_softmax(2), output="probabilities")
    with pytest.warns(LikelyMistake, match="double softmax"):
        feed(right(signs()[9]))
    assert found(feed.explain()) == ["double softmax"]
    feed = Feeder(with_softmax(1), output="probabilities")
    feed(right(signs()[9]))
    assert found(feed.explain()) == []
    assert feed.explain().what_ifs[0].label == "stop"


def test_a_model_with_channels_last() -> None:
    proto = onnx.load_from_string(models.load("signs").data)
    graph = proto.graph
    name = graph.input[0].name
    for node in graph.node:
        node.input[:] = ["planes" if i == name else i for i in node.input]
    graph.node.insert(0, helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
    graph.input[0].CopyFrom(helper.make_tensor_value_info(name, 1, ("N", 224, 224, 3)))
    model = bytes(proto.SerializeToString())
    feed = Feeder(model, layout="NHWC")
    feed(normal(signs()[9])[None])
    explanation = feed.explain()
    assert found(explanation) == []
    assert explanation.what_ifs[0].label == "stop"
    feed = Feeder(model, layout="NHWC")
    with pytest.warns(LikelyMistake, match=r"layout.*transpose\(0, 2, 3, 1\)"):
        feed(right(signs()[9]).reshape(1, 224, 224, 3))
    cured = feed.explain().what_ifs[1]
    assert (cured.change, cured.label) == ("cured: layout", "stop")
    with (
        pytest.warns(LikelyMistake, match="NCHW.*wants NHWC"),
        pytest.raises(GuestError, match="wants NHWC"),
    ):
        feed(right(signs()[9]))


def test_a_model_with_another_layout_than_it_says_is_left_alone() -> None:
    feed = Feeder(models.load("signs").data, layout="NHWC")
    feed(planes(signs()[0]))
    assert "not one image as the metadata says" in feed.explain().notes[0]


def test_a_guest_can_not_fill_the_log(feed: Feeder) -> None:
    raw = planes(signs()[0])[..., :64, :64]
    small = onnx_mean(("N", 3, 64, 64))
    feed = Feeder(small, mean="[0.5, 0.5, 0.5]", std="[0.5, 0.5, 0.5]")
    feed.nn.limits = type(feed.nn.limits)(graphs=1000, contexts=1000)
    with pytest.warns(LikelyMistake) as caught:  # noqa: PT031
        for _ in range(100):
            feed(raw, 3)
            feed.slot = feed.classifier.load_graph("model")
    assert len(caught) == 64


def onnx_mean(shape: tuple[int | str, ...]) -> bytes:
    """A model that gives the mean of each channel."""
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    graph = helper.make_graph(
        [node, helper.make_node("Flatten", ["y"], ["z"])],
        "mean",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("z", 1, ("N", 3))],
    )
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())


# --- what a reader sees ---------------------------------------------------------------------------


def test_an_explanation_prints_shows_and_dumps(feed: Feeder) -> None:
    with pytest.warns(LikelyMistake):
        feed(planes(signs()[9]))
    explanation = feed.explain()
    text = str(explanation)
    low, high = signs()[9][..., 0].min(), signs()[9][..., 0].max()
    for part in (
        "model signs",
        "float32  [N, 3, 224, 224]",
        "(pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]",
        "cured: range",
        "range (certain): values go from",
        "Compute (pixels / 255",
    ):
        assert part in text
    assert (explanation.seen[0].channels[0][0], explanation.seen[0].channels[0][2]) == (low, high)
    mean = signs()[9][..., 0].mean()
    assert explanation.seen[0].channels[0][1] == pytest.approx(mean, rel=1e-5)
    html = explanation._repr_html_()
    assert "<caption>findings</caption>" in html
    assert json.loads(json.dumps(explanation.to_dict()))["findings"][0]["kind"] == "range"


def test_text_from_a_model_is_no_markup_and_no_escape_sequence() -> None:
    evil = "<b>\x1b[31mx</b>"
    labels = json.dumps([evil] * 32)
    feed = Feeder(models.load("signs").data, name=evil, labels=labels, output=evil, color=evil)
    with pytest.warns(LikelyMistake) as caught:
        feed(planes(signs()[9]))
    explanation = feed.explain()
    for text in (str(explanation), str(caught[0].message), explanation._repr_html_()):
        assert "\x1b" not in text
    assert "<b>[31m" not in explanation._repr_html_()
    assert "&lt;b&gt;[31mx" in explanation._repr_html_()
    assert explanation.wants is not None
    assert (explanation.wants.color, explanation.wants.output) == ("RGB", None)


# --- hostile facts and numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"mean": "[0.5]"},
        {"mean": "[0.5, 0.5, 0.5]", "std": "[0, 1, 1]"},
        {"mean": "[123.7, 116.3, 103.5]", "std": "[58.4, 57.1, 57.4]"},  # for 0 … 255
        {"mean": "[123.7, 116.3, 103.5]", "std": "[1, 1, 1]"},
        {"mean": "0.5 0.5 0.5", "std": "[1, 1, 1]"},
        {"mean": f"[0.5{' ' * 1000}]", "std": "[1]"},
        {"mean": "[NaN, 0, 0]", "std": "[1, 1, 1]"},
        {"mean": "[1e999, 0, 0]", "std": "[1, 1, 1]"},
        {"mean": "[" * 900, "std": "[1, 1, 1]"},
        {"mean": f"[{'9' * 400}]", "std": "[1]"},
        {"mean": '["a", {}, null]', "std": "[1, 1, 1]"},
        {"mean": "[0.5, 0.5, 0.5]", "std": "[1, 1, 1]", "layout": "CHWN"},
    ],
)
def test_facts_that_make_no_sense_are_no_expectation(metadata: dict[str, str]) -> None:
    assert Expectation.from_metadata(metadata) is None


def test_facts_that_are_read() -> None:
    assert Expectation.from_metadata({"layout": "NHWC"}) == Expectation("NHWC")
    spec = models.load("signs").spec
    assert Expectation.from_metadata(spec.to_metadata()) == WANTS
    assert Expectation.from_metadata({"mean": "[0.1]", "std": "[0.3]", "color": "BGR"}) == (
        Expectation("NCHW", "BGR", (0.1,), (0.3,))
    )


anything = hnp.arrays(
    st.sampled_from(["f2", "f4", "f8", "u1", "i4", "i8", "?"]),
    st.one_of(
        hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5),
        st.sampled_from([(1, 3, 32, 33), (2, 32, 32, 3), (3, 40, 32), (1, 1, 9, 2)]),
    ),
    fill=st.one_of(st.just(0), st.just(1)),
)


@settings(max_examples=int(os.environ.get("EDGELAB_FUZZ", "1")) * 200)
@given(
    anything,
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from([None, ((0.5,), (0.5,)), ((0.4,) * 3, (0.2,) * 3), ((0.0,) * 4, (1e-6,) * 4)]),
)
def test_no_tensor_makes_the_checks_fail(
    tensor: Tensor, layout: str, constants: tuple[Any, Any] | None
) -> None:
    mean, std = constants or (None, None)
    wants = Expectation(layout, "RGB", mean, std, "logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_input(tensor, wants)
        check_output(tensor, wants)
        for output in (tensor, np.zeros((1, 5), np.float32)):
            ask(lambda _, output=output: output, tensor, wants)  # type: ignore[misc]
        check_fit(TensorInfo("x", tensor.dtype, (1, 3, None, "n")), tensor.shape, tensor.dtype)


# --- a real model and real photos -----------------------------------------------------------------


@needs_real
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_real_photos_and_a_real_model(precision: str) -> None:
    file = {"fp32": "mobilenetv2-fp32-rebuilt.onnx", "int8": "mobilenetv2-12-int8.onnx"}[precision]
    spec = Spec(
        f"mobilenetv2-{precision}",
        "12",
        read_synset_labels(REAL / "imagenet-synsets.txt"),
        256,
        224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    pipeline = Pipeline(models.load(REAL / file, spec=spec))
    banana = resize_crop(decode(REAL / "photos" / "photo-1.jpg"), 256, 224)
    assert pipeline.classify(banana).label == "banana"
    explanation = pipeline.nn.explain(pipeline.classifier.instance)
    assert explanation.findings == ()
    assert explanation.what_ifs[0].label == "banana"
    for name, (make, kind) in VISIBLE.items():
        feed = Feeder((REAL / file).read_bytes(), **spec.to_metadata())
        with pytest.warns(LikelyMistake, match=rf": {kind} \("):
            feed(make(banana), 1000)
        what_ifs = feed.explain().what_ifs
        assert what_ifs[1].change == f"cured: {kind}"
        assert what_ifs[1 if name != "BGR with its constants" else 2].label == "banana", name


def test_a_poor_jpeg_resized_by_nearest_neighbours() -> None:
    file = io.BytesIO()
    Image.fromarray(signs()[9]).save(file, "JPEG", quality=30)
    pixels = np.asarray(Image.open(file).resize((224, 224), Image.Resampling.NEAREST))
    assert kinds(right(pixels)) == "none"
    assert kinds(planes(pixels / 255)) == "normalisation"
