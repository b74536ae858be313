"""Accuracy in pairs: the statistics against hand-made cases, the runs against bare libraries."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgelab import evaluate, models, plots
from edgelab.cli import main
from edgelab.datasets import Batch, Signs, prepare
from edgelab.errors import ModelError
from edgelab.evaluate import (
    Difference,
    Flip,
    Proportion,
    compare,
    cross_validate,
    difference,
    divergence,
    logits,
    mcnemar_p,
    peak_memory,
)
from edgelab.models import Model, Spec
from edgelab.paths import source_root
from edgelab.preprocess import preprocess

REAL = Path(source_root() or ".").parent / "shared" / "real"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"needs the real photos and models in {REAL}, which do not ship"
)
FULL = bool(os.environ.get("EDGELAB_FULL"))
BACKENDS = ("onnxruntime", "openvino")

# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        # None of n: the upper end is z² / (n + z²), here 3.8415 / 13.8415.
        (0, 10, 0.0, 27.75),
        (10, 10, 72.25, 100.0),
    ],
)
def test_wilsons_interval_is_the_published_one(
    count: int, total: int, low: float, high: float
) -> None:
    got = Proportion(count, total).interval_percent
    assert got == pytest.approx((low, high), abs=0.006)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_wilsons_interval_are_where_the_score_test_turns(
    drawn: tuple[int, int],
) -> None:
    count, total = drawn
    share = Proportion(count, total)
    low, high = share.interval_percent
    assert 0 <= low <= share.percent <= high <= 100
    for edge in (low / 100, high / 100):
        if 0 < edge < 1:
            z = abs(count / total - edge) / math.sqrt(edge * (1 - edge) / total)
            assert z == pytest.approx(1.959964, abs=1e-4)


@pytest.mark.parametrize("counts", [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_proportion_is_an_error(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        Proportion(*counts)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 1.0), (8, 0, 2 / 256), (0, 8, 2 / 256),
     (5, 0, 2 / 32), (6, 0, 2 / 64), (3, 9, 598 / 4096), (2, 10, 158 / 4096)],
)  # fmt: skip
def test_mcnemars_p_is_the_one_computed_by_hand(lost: int, gained: int, p: float) -> None:
    assert mcnemar_p(lost, gained) == p


def test_mcnemars_p_counts_all_tosses_as_uneven_as_this_one() -> None:
    for total in range(1, 13):
        heads = [sum(toss) for toss in itertools.product((0, 1), repeat=total)]
        for lost in range(total + 1):
            uneven = abs(2 * lost - total)
            as_uneven = sum(abs(2 * h - total) >= uneven for h in heads)
            assert mcnemar_p(lost, total - lost) == as_uneven / 2**total


def test_mcnemars_p_stays_exact_for_many_pictures() -> None:
    def tail(total: int, few: int) -> Fraction:
        term = whole = Fraction(1)
        for k in range(few):
            term = term * (total - k) / (k + 1)
            whole += term
        return 2 * whole / Fraction(2) ** total

    assert mcnemar_p(900, 1100) == pytest.approx(float(tail(2000, 900)), rel=1e-12)
    assert 0 < mcnemar_p(30_000, 31_000) < 0.001
    with pytest.raises(ValueError, match="need counts"):
        mcnemar_p(-1, 3)


def rights(lost: int, gained: int, both: int, neither: int) -> tuple[Any, Any]:
    first = [True] * lost + [False] * gained + [True] * both + [False] * neither
    second = [False] * lost + [True] * gained + [True] * both + [False] * neither
    return np.array(first), np.array(second)


def quantile(total: int, share: Fraction, at: Fraction) -> int:
    """The smallest k that a binomial does not exceed with probability `at`, in exact fractions."""
    below = Fraction(0)
    for k in range(total + 1):
        below += math.comb(total, k) * share**k * (1 - share) ** (total - k)
        if below >= at:
            return k
    raise AssertionError


@pytest.mark.parametrize(("lost", "total"), [(8, 200), (3, 500), (40, 100), (1, 50)])
def test_the_bootstrap_of_losses_alone_is_a_binomial(lost: int, total: int) -> None:
    got = difference(*rights(lost, 0, total - lost, 0))
    share = Fraction(lost, total)
    few, many = (quantile(total, share, Fraction(k, 1000)) for k in (25, 975))
    one = 100 / total  # points of one picture: a draw more or less at the edge
    assert got.low_points == pytest.approx(-many * one, abs=one)
    assert got.high_points == pytest.approx(-few * one, abs=one)
    assert (got.lost, got.gained, got.total) == (lost, 0, total)
    assert got.points == pytest.approx(-100 * lost / total)


def test_the_bootstrap_is_that_of_drawing_pictures_with_replacement() -> None:
    first, second = rights(30, 12, 400, 58)
    drawn = np.random.default_rng(7).integers(0, 500, (4000, 500))
    literal = (second.astype(int) - first)[drawn].mean(1) * 100
    got = difference(first, second)
    low, high = np.percentile(literal, (2.5, 97.5))
    assert got.low_points == pytest.approx(low, abs=0.25)
    assert got.high_points == pytest.approx(high, abs=0.25)
    assert difference(first, second) == got  # the seed is fixed
    mirrored = difference(second, first)
    assert mirrored.points == -got.points
    assert mirrored.p == got.p


def test_if_nothing_changed_sides_the_interval_is_not_empty() -> None:
    got = difference(*rights(0, 0, 300, 20))
    share = got.high_points / 100
    assert (1 - share) ** 320 == pytest.approx(0.025)  # to see none of 320 is just that likely
    assert got.low_points == -got.high_points
    assert (got.points, got.p, got.verdict) == (0, 1, "no difference shown")


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((8, 0, 192, 0), "worse"),
        ((0, 8, 192, 0), "better"),
        ((5, 5, 190, 0), "no difference shown"),
        ((12, 6, 182, 0), "no difference shown"),
        # The bootstrap leaves out 0 (no loss in a draw: 1.8 %), McNemar's p is 0.125.
        ((4, 0, 196, 0), "no difference shown"),
    ],
)
def test_a_difference_is_called_only_if_both_tests_see_it(
    counts: tuple[int, int, int, int], verdict: str
) -> None:
    assert difference(*rights(*counts)).verdict == verdict


def test_a_difference_says_itself() -> None:
    text = str(Difference(8, 0, 200, -7.0, -1.5, 2 / 256))
    assert text == "-4.00 [-7.00, -1.50]"
    plain = Difference(8, 0, 200, -7.0, -1.5, 2 / 256).to_dict()
    assert (plain["points"], plain["verdict"]) == (-4.0, "worse")
    with pytest.raises(ValueError, match="no pairs"):
        difference(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="no pairs"):
        difference(np.ones(0, bool), np.ones(0, bool))


def test_the_divergence_is_the_one_computed_by_hand() -> None:
    # P = (1/2, 1/2), Q = (3/4, 1/4): KL = ln(4/3) / 2; and 0 for the second picture.
    p = np.array([[0.0, 0.0], [1.0, 2.0]])
    q = np.array([[math.log(3), 0.0], [11.0, 12.0]])
    assert divergence(p, q) == pytest.approx(math.log(4 / 3) / 4)
    assert divergence(q, p) != pytest.approx(divergence(p, q))
    assert divergence(p, p) == 0


def test_the_divergence_of_large_logits_is_finite() -> None:
    p, q = np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])
    assert divergence(p, q) == pytest.approx(2e4)
    with pytest.raises(ValueError, match="no pairs"):
        divergence(p, q[:, :2])


# --- running --------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "grey")
SPEC = Spec("toy", "1", COLOURS, 8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def colour_model(
    weights: Sequence[Sequence[float]], *, name: str = "toy", spec: Spec = SPEC, padding: int = 0
) -> Model:
    """Mean of each channel, then a dense layer: its logits can be computed by hand."""
    dense = np.array(weights, np.float32).T
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    weights_ = [numpy_helper.from_array(dense, "w")]
    if padding:
        rng = np.random.default_rng(0)
        weights_ += [
            numpy_helper.from_array(rng.normal(size=(len(spec.labels), padding)).astype("f"), "up"),
            numpy_helper.from_array(np.zeros((padding, len(spec.labels)), "f"), "down"),
        ]
        nodes += [
            helper.make_node("MatMul", ["logits", "up"], ["wide"]),
            helper.make_node("MatMul", ["wide", "down"], ["nothing"]),
            helper.make_node("Add", ["logits", "nothing"], ["sum"]),
        ]
    return wrap(nodes, weights_, "sum" if padding else "logits", name=name, spec=spec)


def wrap(
    nodes: list[Any],
    weights: list[Any],
    output: str,
    *,
    name: str = "toy",
    spec: Spec = SPEC,
    dtype: int = TensorProto.FLOAT,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    outputs: Sequence[int | str] | None = None,
    domain: str = "",
) -> Model:
    inputs = [helper.make_tensor_value_info("input", dtype, shape)]
    classes = ("n", len(spec.labels)) if outputs is None else outputs
    made = helper.make_model(
        helper.make_graph(
            nodes, name, inputs,
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, classes)], weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)]
        + ([helper.make_opsetid(domain, 1)] if domain else []),
        ir_version=9,
    )  # fmt: skip
    helper.set_model_props(made, spec.to_metadata())
    data = made.SerializeToString()
    return Model(Path(f"{name}.onnx"), data, "0" * 64, spec)


def painted(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.array([np.full((8, 8, 3), colour, np.uint8) for colour in colours])


RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
PLAIN = ((9, 0, 0), (0, 9, 0), (0, 0, 9), (-1, -1, -1))  # each class its channel
SWAPPED = ((9, 0, 0), (0, 0, 9), (0, 9, 0), (-1, -1, -1))  # green and blue confused


@pytest.fixture(scope="module")
def paint() -> Batch:
    """Eight red, six green and four blue pictures, two of the green ones labelled blue."""
    images = painted(*[RGB[0]] * 8, *[RGB[1]] * 6, *[RGB[2]] * 4)
    labels = np.array([0] * 8 + [1, 1, 1, 1, 2, 2] + [2] * 4, np.int64)
    return Batch(images, labels, SPEC, "paint")


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_computed_by_hand(paint: Batch, backend: str) -> None:
    got = logits(colour_model(PLAIN), paint, backend=backend, threads=1)
    want = np.array(PLAIN) @ np.array(RGB).T / 255
    np.testing.assert_allclose(got[[0, 8, 14]], want.T, atol=1e-5)
    assert got.shape == (18, 4)
    assert got.dtype == np.float32
    done: list[int] = []
    again = logits(colour_model(PLAIN).data, paint.tensors(), backend=backend, progress=done.append)
    np.testing.assert_array_equal(again, got)
    assert sum(done) == 18


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_the_real_model_are_those_of_bare_onnx_runtime(backend: str) -> None:
    signs, samples = models.load("signs"), Signs("test", 40)
    got = logits(signs, prepare(samples, signs.spec), backend=backend)
    bare = onnxruntime.InferenceSession(signs.data, providers=["CPUExecutionProvider"])
    for row, sample in zip(got, samples, strict=True):
        given_ = preprocess(sample.image, signs.spec)
        want = bare.run(None, {bare.get_inputs()[0].name: given_})[0][0]
        np.testing.assert_allclose(row, want, atol=2e-3)


def test_a_file_will_do(tmp_path: Path, paint: Batch) -> None:
    (tmp_path / "m.onnx").write_bytes(colour_model(PLAIN).data)
    assert logits(tmp_path / "m.onnx", paint).shape == (18, 4)
    with pytest.raises(ModelError, match="cannot read"):
        logits(tmp_path / "none.onnx", paint)


def node(kind: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), ["y"], **attributes)


BAD: dict[str, tuple[Callable[[], Model | bytes], str]] = {
    "no model": (lambda: b"no model at all", "look like unknown"),
    "cut": (lambda: colour_model(PLAIN).data[:-60], "E3"),
    "other size": (
        lambda: wrap([node("Flatten", "input")], [], "y", shape=("n", 3, 9, 9)),
        r"float32 \['n', 3, 9, 9\], and the pictures are float32 \[1, 3, 8, 8\]",
    ),
    "other type": (
        lambda: wrap([node("Cast", "input", to=1)], [], "y", dtype=TensorProto.DOUBLE),
        "float64",
    ),
    "a feature map": (
        lambda: wrap([node("Relu", "input")], [], "y", outputs=("n", 3, 8, 8)),
        r"gives float32 \[1, 3, 8, 8\]; need logits",
    ),
    "NaN": (
        lambda: colour_model(((math.nan, 0, 0), *PLAIN[1:])),
        "NaN or infinity for 18 of 18 pictures, picture 0 the first",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_model_that_can_not_be_evaluated_says_why(paint: Batch, what: str) -> None:
    make, message = BAD[what]
    with pytest.raises(ModelError, match=message):
        logits(make(), paint)


def test_an_unknown_backend_is_an_error(paint: Batch) -> None:
    with pytest.raises(ModelError, match="choose onnxruntime or openvino"):
        logits(colour_model(PLAIN), paint, backend="tensorrt")


# --- comparing ------------------------------------------------------------------------------------


def toys() -> dict[str, Model]:
    return {"plain": colour_model(PLAIN), "swapped": colour_model(SWAPPED, padding=100)}


def test_a_comparison_counts_what_can_be_counted_by_hand(paint: Batch) -> None:
    seen = compare(toys(), paint, baseline="plain", repeats=0, memory_repeats=0)
    # plain: 8 red, 4 green and 4 blue right; 2 green pictures that are labelled blue are wrong.
    # swapped calls green blue and blue green: 8 red and those 2 are right.
    plain, swapped = seen["plain"], seen["swapped"]
    assert (plain.top1.count, swapped.top1.count, plain.top1.total) == (16, 10, 18)
    assert (swapped.difference.lost, swapped.difference.gained) == (8, 2)
    assert swapped.difference.p == 2 * (1 + 10 + 45) / 1024
    assert (plain.difference.lost, plain.difference.gained) == (0, 0)
    assert swapped.agreement.count == 8
    assert plain.agreement.count == 18
    assert swapped.top5.count == 18  # there are only four classes
    assert plain.kl_nats == 0
    # Red: equal. Green and blue: two logits, 9 and 0, change places.
    z = math.exp(9) + 1 + 1 + math.exp(-1)
    one = (math.exp(9) - 1) / z * 9
    assert swapped.kl_nats == pytest.approx(one * 10 / 18, rel=1e-5)
    assert swapped.size_ratio == seen["swapped"].size_bytes / seen["plain"].size_bytes > 1
    flips = seen.flips("swapped")
    assert len(flips) == 10
    assert flips[0] == Flip(8, 1, 1, 2)
    assert flips[4] == Flip(12, 2, 1, 2)  # gained
    assert seen.between("swapped", "plain").points == -swapped.difference.points
    assert not seen.timings
    assert not seen.memory


def test_flips_that_change_no_side_are_listed_on_request(paint: Batch) -> None:
    grey = colour_model(((9, 0, 0), (0, 9, 0), (0, 0, 0), (0, 0, 9)))
    labels = np.where(np.arange(18) >= 14, 0, paint.labels)  # blue pictures, labelled red
    batch = Batch(paint.images, labels, SPEC, "paint")
    seen = compare({"plain": colour_model(PLAIN), "grey": grey}, batch, baseline="plain",
                   repeats=0, memory_repeats=0)  # fmt: skip
    assert seen.flips("grey") == []
    assert [f.after for f in seen.flips("grey", sides=False)] == [3] * 4


def test_top5_is_that_of_sorting() -> None:
    spec = Spec("ten", "1", tuple("abcdefghij"), 8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rng = np.random.default_rng(3)
    batch = Batch(rng.integers(0, 256, (60, 8, 8, 3), np.uint8), rng.integers(0, 10, 60), spec, "x")
    rows = rng.normal(size=(60, 10)).astype(np.float32)
    model = colour_model(rng.normal(size=(10, 3)).tolist(), spec=spec)
    seen = compare({"m": model}, batch, baseline="m", repeats=0, memory_repeats=0,
                   given={"m": rows})  # fmt: skip
    want = sum(label in sorted(range(10), key=lambda k: -row[k])[:5]
               for label, row in zip(batch.labels, rows, strict=True))  # fmt: skip
    assert seen["m"].top5.count == want
    assert seen["m"].top1.count == int((rows.argmax(1) == batch.labels).sum())


def test_tables_and_json_say_the_same(paint: Batch) -> None:
    seen = compare(
        toys(), paint, baseline="plain", backends=BACKENDS, threads=1, repeats=6, memory_repeats=1
    )
    plain = json.loads(json.dumps(seen.to_dict()))
    assert plain["pictures"] == {"count": 18, "source": "paint"}
    swapped = plain["scores"]["swapped"]
    assert swapped["difference"]["verdict"] == seen["swapped"].difference.verdict
    assert swapped["flips"][0] == {
        "index": 8, "picture": "8", "label": "green", "before": "green", "after": "blue",
    }  # fmt: skip
    assert set(plain["timings"]) == set(BACKENDS)
    for backend in BACKENDS:
        assert set(plain["timings"][backend]["ratios"]) == {"plain", "swapped"}
        assert plain["memory"][backend]["plain"]["peak_bytes"] > 10 << 20
    text, page = str(seen), seen._repr_html_()
    assert repr(seen) == "Evaluation(plain, swapped on 18 pictures, baseline plain)"
    for shown in (str(seen["plain"].top1), str(seen["swapped"].difference)):
        assert shown in text
        assert shown in page
    assert page.count("<table><caption>") == 2
    assert "1 thread(s)" in text
    drawn = plots.pareto(seen)
    assert drawn.png.startswith(b"\x89PNG")
    assert [row[1] for row in drawn.table.rows] == ["plain", "swapped"]
    gallery = plots.flips(seen, "swapped", 4)
    assert [row[0] for row in gallery.table.rows] == [8, 9, 10, 11]
    assert "8 are right only in plain, and 2 only in swapped" in gallery.alt
    assert plots.flips(seen, "plain").table.rows == ()


def test_a_model_that_one_backend_refuses_is_told_and_loses_nothing(paint: Batch) -> None:
    # An operator that ONNX Runtime has added to ONNX; OpenVINO does not know it.
    weights = [numpy_helper.from_array(np.array(PLAIN, np.float32), "points")]
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("CDist", ["flat", "points"], ["y"], domain="com.microsoft"),
    ]
    own = wrap(nodes, weights, "y", domain="com.microsoft")
    chosen = {"plain": colour_model(PLAIN), "own": own}
    seen = compare(chosen, paint, baseline="plain", backends=BACKENDS, repeats=6, memory_repeats=1)
    assert list(seen.refused["openvino"]) == ["own"]
    assert seen.refused["onnxruntime"] == {}
    assert set(seen.timings["openvino"].ratios) == {"plain"}
    assert set(seen.memory["openvino"]) == {"plain"}
    assert set(seen.timings["onnxruntime"].ratios) == {"plain", "own"}
    assert "own does not run in openvino" in str(seen)
    assert plots.pareto(seen, "openvino").table.rows[0][1] == "plain"
    with pytest.raises(ModelError, match="own does not run in openvino"):
        compare(chosen, paint, baseline="own", backends=BACKENDS, repeats=0, memory_repeats=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("red", "green", "blue")}, r"different labels \(3 and 4\)"),
        ({"crop": 4}, r"different crop \(4 and 8\)"),
        ({"mean": (0.5, 0.5, 0.5)}, "different mean"),
    ],
)
def test_models_that_want_other_pictures_are_not_compared(
    paint: Batch, change: dict[str, Any], message: str
) -> None:
    from dataclasses import replace

    other = colour_model(PLAIN, spec=replace(SPEC, **change))
    with pytest.raises(ModelError, match=message):
        compare({"a": colour_model(PLAIN), "b": other}, paint, baseline="a", repeats=0)


def test_pictures_without_labels_are_not_scored(paint: Batch) -> None:
    batch = Batch(paint.images, paint.labels - 1, SPEC, "paint")
    with pytest.raises(ModelError, match="no label"):
        compare(toys(), batch, baseline="plain", repeats=0)
    with pytest.raises(ValueError, match="none of plain, swapped"):
        compare(toys(), paint, baseline="fp32")


def test_logits_of_another_model_are_refused(paint: Batch) -> None:
    with pytest.raises(ModelError, match="7 logits"):
        compare(toys(), paint, baseline="plain", repeats=0, memory_repeats=0,
                given={"swapped": np.zeros((18, 7), np.float32)})  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="not measured on Windows")
def test_peak_memory_is_the_models_own() -> None:
    heap = np.ones(60_000_000)  # 480 MB here must not show up in the processes that are measured
    large = 4_000_000  # two matrices of 4 x 4,000,000 float32: 128 MB
    small, big = (
        peak_memory(colour_model(PLAIN, padding=n), crop=8, repeats=1) for n in (0, large)
    )
    assert small.baseline_bytes < 300 << 20 < heap.nbytes
    assert 0 < small.added_bytes < 64 << 20
    assert 128_000_000 < big.added_bytes < 8 * 128_000_000
    assert big.to_dict()["added_bytes"] == big.peak_bytes - big.baseline_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="not measured on Windows")
def test_a_model_that_fails_in_its_process_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"the process .* ended with 1: .*look like unknown"):
        peak_memory(b"no model", crop=8, repeats=1)


# --- calibrating on other pictures than those that are scored -------------------------------------


def test_cross_validation_never_calibrates_on_what_it_scores(tmp_path: Path) -> None:
    signs = models.load("signs")
    batch = prepare(Signs("calibrate", 15), signs.spec)
    made = cross_validate(signs, batch, "int8-minmax", folds=3, count=8, folder=tmp_path, seed=3)
    assert len(made.models) == len(made.folds) == len(made.calibrated_on) == 3
    assert sorted(np.concatenate(made.folds)) == list(range(15))
    for held_out, others in zip(made.folds, made.calibrated_on, strict=True):
        assert not set(held_out) & set(others)
        assert len(set(others)) == 8
    # Each picture's logits are those that its fold's model gives, in bare ONNX Runtime.
    for model, held_out in zip(made.models, made.folds, strict=True):
        bare = onnxruntime.InferenceSession(model.data, providers=["CPUExecutionProvider"])
        for index in held_out:
            tensor = batch.take([index]).tensors()
            want = bare.run(None, {bare.get_inputs()[0].name: tensor})[0][0]
            np.testing.assert_allclose(made.logits[index], want, atol=0.3)
            assert made.logits[index].argmax() == want.argmax()
    assert len({model.sha256 for model in made.models}) == 3  # each has seen other pictures
    assert {path.name for path in tmp_path.iterdir()} == {
        f"signs-int8-minmax-fold{k}.onnx" for k in range(3)
    }


def test_int8_keeps_the_accuracy_of_the_model_that_ships() -> None:
    """The goal, on 192 renders; with EDGELAB_FULL=1 on 2,560."""
    count, calibrate = (2560, 256) if FULL else (192, 64)
    seen, skipped = evaluate.evaluate(
        ["signs"], schemes=["int8"], count=count, calibrate=calibrate, repeats=0, memory_repeats=0
    )
    assert skipped == {}
    score = seen["int8"]
    print(f"int8 on {count} held-out renders: {score.difference} points, {score.size_ratio:.1%}")
    assert seen.batch.source == f"Signs('test', count={count}, size=256)"
    assert f"Signs('calibrate', count={calibrate}, size=256)" in score.notes[-1]
    assert score.size_ratio <= 0.26
    assert score.difference.points >= -0.5 if FULL else score.difference.points >= -1.5
    assert score.agreement.percent > 95
    assert 0 < score.kl_nats < 0.1


@needs_real
def test_published_scores_on_imagenet_200_are_found_again() -> None:
    files = [REAL / name for name in ("mobilenetv2-fp32-rebuilt.onnx", "mobilenetv2-12-int8.onnx")]
    seen, skipped = evaluate.evaluate(
        files, images=REAL / "imagenet-200", labels=REAL / "imagenet-synsets.txt", repeats=0,
        memory_repeats=0,
    )  # fmt: skip
    fp32, int8 = seen.scores.values()
    assert skipped == {}
    assert (fp32.top1.percent, fp32.top5.percent) == pytest.approx((84.5, 96), abs=0.5)
    assert (int8.top1.percent, int8.top5.percent) == pytest.approx((80.5, 96), abs=1)
    assert int8.difference.verdict == "worse"


@needs_real
@pytest.mark.skipif(not FULL, reason="quantizes five times: EDGELAB_FULL=1")
def test_our_int8_beats_the_zoos_on_pictures_it_was_not_calibrated_with() -> None:
    files = [REAL / name for name in ("mobilenetv2-fp32-rebuilt.onnx", "mobilenetv2-12-int8.onnx")]
    seen, _ = evaluate.evaluate(
        files, images=REAL / "imagenet-200", labels=REAL / "imagenet-synsets.txt",
        schemes=["int8"], folds=5, repeats=0, memory_repeats=0,
    )  # fmt: skip
    print(seen)
    assert seen["int8, 5 folds"].top1.count > seen["mobilenetv2-12-int8"].top1.count


# --- in one call, and from the command line -------------------------------------------------------


def edgelab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgelab", "evaluate", *arguments],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip


def write_toys(folder: Path) -> list[str]:
    """Two models of colours, and a folder of pictures with a stray file."""
    for name, model in toys().items():
        (folder / f"{name}.onnx").write_bytes(model.data)
    for k, colour in enumerate(COLOURS[:3]):
        for number in range(k + 1):
            path = folder / "pictures" / colour / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(painted(RGB[k])[0]).save(path)
    (folder / "pictures" / "red" / "notes.txt").touch()
    return [str(folder / "plain.onnx"), str(folder / "swapped.onnx")]


def test_the_command_compares_models_on_a_folder(tmp_path: Path) -> None:
    names, plot = write_toys(tmp_path), tmp_path / "plot.png"
    options = ("--images", str(tmp_path / "pictures"), "--repeats", "6", "--memory", "0")
    done = edgelab(*names, *options, "--threads", "1", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "skipped 1 files: no picture by the name" in done.stderr
    assert "6 pictures" in done.stdout
    assert "100.0 %" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    done = edgelab(*names, *options, "--baseline", names[1], "--count", "3", "--json")
    plain = json.loads(done.stdout)
    assert plain["baseline"] == "swapped"
    assert plain["pictures"]["count"] == 3  # one of each class, in turns
    assert plain["scores"]["plain"]["top1"]["count"] == 3
    assert plain["scores"]["plain"]["difference"]["gained"] == 2
    flipped = [flip["picture"] for flip in plain["scores"]["plain"]["flips"]]
    assert flipped == ["green/0.png", "blue/0.png"]


def test_the_command_needs_no_folder_for_the_model_that_ships() -> None:
    done = edgelab("signs", "--count", "33", "--repeats", "0", "--memory", "0", "--json")
    plain = json.loads(done.stdout)
    assert plain["pictures"]["source"] == "Signs('test', count=33, size=256)"
    assert plain["scores"]["signs"]["top1"]["count"] >= 28
    assert plain["timings"] == plain["memory"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "no model 'none.onnx'"),
        (["signs", "signs"], "the same model is named twice"),
        (["signs", "--baseline", "tiny"], "the baseline 'tiny' is none of the models: signs"),
        (["signs", "--folds", "5"], "add --to int8"),
        (["signs", "--to", "int7"], "int7"),
        (["signs", "--images", "x", "--to", "int8"], "would flatter"),
        (["signs", "--images", "x", "--imagenette"], "exclude each other"),
        (["signs", "--images", "no/such/folder"], "cannot read the folder"),
        (["signs", "--imagenette"], "does not have the labels of ImageNet"),
    ],
)
def test_options_that_make_no_sense_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments, "--count", "4", "--repeats", "0", "--memory", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("edgelab: error: ")
    assert message in error


def test_a_model_without_labels_says_how_to_give_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = onnx.load_model_from_string(colour_model(PLAIN).data)
    del bare.metadata_props[:]
    path = tmp_path / "bare.onnx"
    path.write_bytes(bare.SerializeToString())
    assert main(["evaluate", str(path)]) == 1
    assert "--labels FILE" in capsys.readouterr().err


def test_a_model_of_other_pictures_needs_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_toys(tmp_path)
    assert main(["evaluate", *names]) == 1
    assert "does not know the rendered signs. Give --images DIR" in capsys.readouterr().err
