"""The guest's preprocessing against the oracle, and the oracle against the definitions."""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelab import preprocess as oracle
from edgelab.classify import KERNELS, PARAMS, Classifier
from edgelab.errors import GuestError, ImageError, ModelError
from edgelab.models import Spec
from edgelab.runtime import Guest, Limits

SPEC = Spec("test", "1", ("a",), 256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def classifier(classify_guest: Guest) -> Classifier:
    """One instance for all tests, so that none may leave it broken."""
    return Classifier(classify_guest.instantiate())


def noise(width: int, height: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([width, height])
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def weights(side: int, resized: int, crop: int) -> NDArray[np.float64]:
    """Bilinear with antialias, as it is defined: a triangle as wide as an output pixel's source.

    Row k holds the weights of the source pixels for output pixel k of the centre crop.
    """
    start = round((resized - crop) / 2)
    scale = side / resized
    centres = (np.arange(start, start + crop) + 0.5) * scale
    distance = np.abs(np.arange(side) + 0.5 - centres[:, None])
    triangle = np.maximum(0, 1 - distance / max(scale, 1))
    return np.asarray(triangle / triangle.sum(1, keepdims=True))


def resized_crop_by_definition(
    image: NDArray[np.uint8], resize: int, crop: int
) -> NDArray[np.float64]:
    height, width = image.shape[:2]
    shorter = min(width, height)
    down = weights(height, int(resize * height / shorter), crop)
    across = weights(width, int(resize * width / shorter), crop)
    return np.asarray(
        np.einsum("yh,hwc,xw->yxc", down, image.astype(np.float64), across, optimize=True)
    )


# 0.5 for each of Pillow's two roundings to whole levels, and a little for its 22-bit weights.
DEFINITION_LEVELS = 1.01

SIZES = [
    (1, 1), (2, 3), (3, 2), (7, 5), (1, 400), (400, 1), (100, 100), (224, 224), (224, 320),
    (255, 257), (256, 256), (257, 255), (257, 256), (300, 256), (301, 256), (640, 480), (481, 641),
    (1000, 333),
]  # fmt: skip
SMALL = [(256, 224), (64, 64), (65, 64), (66, 33), (224, 1), (1, 1)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_oracle_resizes_as_defined(width: int, height: int) -> None:
    image = noise(width, height)
    for resize, crop in SMALL:
        expected = resized_crop_by_definition(image, resize, crop)
        result = oracle.resize_crop(image, resize, crop)
        assert result.shape == (crop, crop, 3)
        assert result.dtype == np.uint8
        assert np.abs(result - expected).max() <= DEFINITION_LEVELS


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_guest_resizes_as_pillow_bit_for_bit(
    classifier: Classifier, width: int, height: int
) -> None:
    image = noise(width, height)
    for resize, crop in SMALL:
        spec = dataclasses.replace(SPEC, resize=resize, crop=crop)
        np.testing.assert_array_equal(
            classifier.resize_crop(image, spec), oracle.resize_crop(image, resize, crop)
        )


@pytest.mark.parametrize(("width", "height"), [(1, 4000), (4000, 1), (2, 65_535), (65_535, 3)])
def test_the_guest_resizes_slivers_that_pillow_would_blow_up(
    classifier: Classifier, width: int, height: int
) -> None:
    image = noise(width, height)
    memory = len(classifier.instance.memory)
    result = classifier.resize_crop(image, SPEC)
    expected = resized_crop_by_definition(image, SPEC.resize, SPEC.crop)
    assert np.abs(result - expected).max() <= DEFINITION_LEVELS
    assert len(classifier.instance.memory) - memory < 16 << 20


@settings(max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
@example(3, 7, 2, 1)
def test_any_size_resizes_as_pillow_within_one_level(
    classifier: Classifier, width: int, height: int, one: int, other: int
) -> None:
    resize, crop = max(one, other), min(one, other)
    # Pillow computes the whole resized picture; keep a thin one from filling the memory.
    resize = min(resize, max(crop, 4096 * min(width, height) // max(width, height)))
    image = noise(width, height)
    spec = dataclasses.replace(SPEC, resize=resize, crop=crop)
    # Not bit for bit: Pillow 13 does the vertical pass first where the height shrinks much more
    # than the width, which rounding to whole pixels makes happen in tiny pictures.
    difference = classifier.resize_crop(image, spec).astype(int) - oracle.resize_crop(
        image, resize, crop
    )
    assert np.abs(difference).max() <= 1


def test_the_oracle_normalises_as_torchvision_documents() -> None:
    # ToTensor: x / 255, channels first; Normalize: (x - mean[c]) / std[c].
    pixels = np.array([[[0, 128, 255], [255, 0, 51]]], np.uint8)
    spec = dataclasses.replace(SPEC, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    expected = np.array([[[-1, 1]], [[4 * 128 / 255 - 1, -1]], [[0.5, 0.1]]])
    result = oracle.normalize(pixels, spec)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert oracle.preprocess(noise(300, 260), SPEC).shape == (1, 3, 224, 224)


def exact(pixels: NDArray[np.uint8], spec: Spec) -> tuple[NDArray[Any], NDArray[Any]]:
    """Normalised values in float64, from float32 parameters, and the bound on a kernel's error.

    The guest computes x * scale + bias. Each of scale, bias, product and sum is rounded once, by
    at most half an epsilon of its size. So the error is at most 1.5 epsilon of
    (x / 255 + |mean|) / std.
    """
    mean, std = (np.array(v, np.float32).astype(np.float64) for v in (spec.mean, spec.std))
    scaled = pixels / 255
    bound = 1.5 * EPSILON * (scaled + abs(mean)) / std
    return ((scaled - mean) / std).transpose(2, 0, 1), bound.transpose(2, 0, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_length_is_normalised_to_the_last_pixel(classifier: Classifier, kernel: str) -> None:
    for count in [*range(1, 68), 1000, 50_176]:
        pixels = noise(count, 1)
        result = classifier.normalize(pixels, SPEC, kernel)
        expected, bound = exact(pixels, SPEC)
        assert result.shape == (3, 1, count)
        assert (np.abs(result - expected) <= bound).all()
        if kernel == "simd128":
            np.testing.assert_array_equal(
                np.array(result), classifier.normalize(pixels, SPEC, "scalar")
            )


moderate = st.floats(-3, 3, width=32)
extreme = st.floats(-1e6, 1e6, width=32)
positive = st.one_of(st.floats(2**-6, 4, width=32), st.floats(2**-19, 1e6, width=32))


@given(
    st.binary(min_size=3, max_size=150),
    st.tuples(*[st.one_of(moderate, extreme)] * 3),
    st.tuples(*[positive] * 3),
)
def test_kernels_are_within_their_bound_for_any_parameters(
    classifier: Classifier,
    data: bytes,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    pixels = np.frombuffer(data[: len(data) // 3 * 3], np.uint8).reshape(1, -1, 3)
    spec = dataclasses.replace(SPEC, mean=mean, std=std)
    expected, bound = exact(pixels, spec)
    scalar = np.array(classifier.normalize(pixels, spec, "scalar"))
    assert (np.abs(scalar - expected) <= bound).all()
    np.testing.assert_array_equal(scalar, classifier.normalize(pixels, spec, "simd128"))
    relaxed = classifier.normalize(pixels, spec, "relaxed_simd")
    assert (np.abs(relaxed - expected) <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_guest_preprocesses_as_the_oracle(classifier: Classifier, kernel: str) -> None:
    for width, height in [(1, 1), (2, 3), (224, 224), (257, 255), (640, 480)]:
        image = noise(width, height)
        tensor = classifier.preprocess(image, SPEC, kernel)
        assert tensor.shape == (1, 3, 224, 224)
        assert tensor.dtype == np.float32
        # The pixels are equal, so only float32 rounding is left: values reach 2.7 here.
        np.testing.assert_allclose(tensor, oracle.preprocess(image, SPEC), rtol=0, atol=1e-6)


def test_channels_are_not_mixed_up(classifier: Classifier) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:] = (255, 0, 102)
    spec = dataclasses.replace(SPEC, mean=(0, 0, 0), std=(1, 1, 1))
    red, green, blue = classifier.preprocess(image, spec)[0]
    assert (red == 1).all()
    assert (green == 0).all()
    np.testing.assert_allclose(blue, 0.4, rtol=1e-6)


def test_a_mirrored_view_is_read_as_it_looks(classifier: Classifier) -> None:
    image = noise(300, 260)
    mirrored = np.array(classifier.preprocess(image[:, ::-1], SPEC))
    np.testing.assert_array_equal(
        mirrored, classifier.preprocess(np.ascontiguousarray(image[:, ::-1]), SPEC)
    )


def test_a_crop_can_be_normalised_where_it_lies(classify_guest: Guest) -> None:
    classifier = Classifier(classify_guest.instantiate())
    image = noise(300, 260)
    whole = np.array(classifier.preprocess(image, SPEC, "scalar")[0])
    crop = classifier.resize_crop(image, SPEC)
    np.testing.assert_array_equal(whole, classifier.normalize(crop, SPEC, "scalar"))
    assert "pixels" not in classifier._buffers  # no copy was made
    np.testing.assert_array_equal(  # mirrored, which needs a copy
        whole[:, :, ::-1], classifier.normalize(crop[:, ::-1], SPEC, "scalar")
    )


def test_another_image_in_between_leaves_no_trace(classifier: Classifier) -> None:
    small, large = noise(30, 20), noise(900, 700)
    first = np.array(classifier.preprocess(small, SPEC))
    classifier.preprocess(large, SPEC)
    np.testing.assert_array_equal(first, classifier.preprocess(small, SPEC))


# --- what must be refused, with the instance alive afterwards -------------------------------------


@pytest.fixture
def survivor(classifier: Classifier) -> Iterator[Classifier]:
    yield classifier
    image = noise(40, 30)
    tensor = classifier.preprocess(image, SPEC)
    np.testing.assert_allclose(tensor, oracle.preprocess(image, SPEC), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.bool_),
        np.zeros((0, 4, 3), np.uint8),
        np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (8193, 8192, 3)),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_what_is_no_image_is_refused(survivor: Classifier, image: NDArray[Any]) -> None:
    for method in (survivor.resize_crop, survivor.normalize, survivor.preprocess):
        with pytest.raises(ImageError):
            method(image, SPEC)


def test_a_side_over_65535_is_refused(survivor: Classifier) -> None:
    image = np.zeros((65_536, 1, 3), np.uint8)
    with pytest.raises(GuestError, match=r"1 x 65536 .*65535.*status -3"):
        survivor.preprocess(image, SPEC)


def test_an_unknown_kernel_is_refused(survivor: Classifier) -> None:
    for method in (survivor.normalize, survivor.preprocess):
        with pytest.raises(ValueError, match="unknown kernel 'avx'; there are scalar, simd128"):
            method(noise(4, 4), SPEC, "avx")


GOOD = {
    "width": 4, "height": 3, "src_len": 36, "dst_len": 48, "resize": 3, "crop": 2,
    "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "kernel": 1,
}  # fmt: skip
NAN, INF = float("nan"), float("inf")


def call_preprocess(classifier: Classifier, **change: Any) -> None:
    """Call the export itself, past every check in Python."""
    a = {**GOOD, **change}
    with (
        classifier.buffer(64) as src,
        classifier.buffer(64) as dst,
        classifier.buffer(32) as params,
    ):
        packed = PARAMS.pack(a["resize"], a["crop"], *a["mean"], *a["std"])
        classifier.instance.memory.write(params.pointer, packed)
        classifier._checked(
            "preprocess", a.get("src", src.pointer), a["src_len"], a["width"], a["height"],
            a.get("params", params.pointer), a.get("dst", dst.pointer), a["dst_len"], a["kernel"],
        )  # fmt: skip


def test_the_raw_call_itself_is_good(survivor: Classifier) -> None:
    call_preprocess(survivor)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"src_len": 35}, -1), ({"src_len": 37}, -1), ({"src_len": 0}, -1),
        ({"dst_len": 47}, -1), ({"dst_len": 44}, -1), ({"dst_len": 52}, -1), ({"dst_len": 0}, -1),
        ({"src": 0}, -1), ({"dst": 0}, -1), ({"params": 0}, -1),
        ({"src": 2**32 - 16}, -1), ({"dst": 2**32 - 16}, -1), ({"params": 2**32 - 4}, -1),
        ({"width": 0, "src_len": 0}, -1), ({"width": 0}, -3), ({"height": 0}, -3),
        ({"width": 65_536}, -3), ({"width": 60_000, "height": 60_000}, -3),
        ({"width": 2**32 - 1, "height": 2**32 - 1}, -3),
        ({"resize": 1}, -1), ({"crop": 0}, -1), ({"resize": 4097}, -1), ({"resize": 2**32 - 1}, -1),
        ({"std": (0.2, 0.0, 0.2)}, -1), ({"std": (0.2, 0.2, -1.0)}, -1),
        ({"std": (NAN, 0.2, 0.2)}, -7), ({"std": (0.2, INF, 0.2)}, -7),
        ({"std": (1e-44, 1, 1)}, -7),
        ({"mean": (NAN, 0.5, 0.5)}, -7), ({"mean": (0.5, 0.5, -INF)}, -7),
        ({"kernel": 3}, -1), ({"kernel": 2**32 - 1}, -1),
    ],
    ids=str,
)  # fmt: skip
def test_the_guest_itself_refuses_nonsense(
    survivor: Classifier, change: dict[str, Any], status: int
) -> None:
    with pytest.raises(GuestError, match=rf"preprocess: .+\(status {status}\)"):
        call_preprocess(survivor, **change)


def test_overlap_misalignment_and_freed_blocks_are_refused(survivor: Classifier) -> None:
    with survivor.buffer(128) as block, survivor.buffer(64) as freed:
        freed.free()
        for change, reason in [
            ({"src": block.pointer, "dst": block.pointer + 32}, "overlap"),
            ({"dst": block.pointer + 2}, "align"),
            ({"dst": freed.size_bytes}, "not inside one live block"),
            ({"dst": block.pointer + 100}, "not inside one live block"),
        ]:
            with pytest.raises(GuestError, match=reason):
                call_preprocess(survivor, **change)


def test_a_block_can_be_freed_once_and_with_its_length_only(survivor: Classifier) -> None:
    block = survivor.buffer(100)
    for length in (99, 101, 0):
        with pytest.raises(GuestError, match="no live block"):
            survivor._checked("dealloc", block.pointer, length)
    survivor._checked("dealloc", block.pointer, 100)
    with pytest.raises(GuestError, match="no live block"):
        survivor._checked("dealloc", block.pointer, 100)


def test_a_block_that_was_freed_gives_no_view(survivor: Classifier) -> None:
    with survivor.buffer(16) as block:
        assert block.array(16).tolist() == [0] * 16
        with pytest.raises(GuestError, match="a view of 17 bytes on a block of 16"):
            block.array(17)
    with pytest.raises(GuestError, match="freed"):
        block.array(1)


def test_empty_and_impossible_blocks_are_refused(survivor: Classifier) -> None:
    with pytest.raises(GuestError, match="empty"):
        survivor.buffer(0)
    for size in (2**32 - 1, 2**32, 2**40):
        with pytest.raises(GuestError, match=r"E4: .*its limit is 536,870,912"):
            survivor.buffer(size)


def test_an_image_over_the_memory_limit_is_refused_and_the_guest_lives(
    classify_guest: Guest,
) -> None:
    classifier = Classifier(classify_guest.instantiate(limits=Limits(memory_bytes=8 << 20)))
    with pytest.raises(
        GuestError, match=r"E4: .*Raise Limits\.memory_bytes, or pass a smaller image"
    ):
        classifier.preprocess(noise(2000, 2000), SPEC)
    image = noise(400, 300)
    tensor = classifier.preprocess(image, SPEC)
    np.testing.assert_allclose(tensor, oracle.preprocess(image, SPEC), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"std": (0.2, 0.0, 0.2)}, {"std": (0.2, NAN, 0.2)}, {"std": (1e-40, 1, 1)},
        {"mean": (NAN, 0, 0)}, {"mean": (1e300, 0, 0)}, {"mean": (0, 0)},
        {"crop": 0}, {"crop": 257}, {"resize": 5000, "crop": 4097}, {"resize": -1, "crop": -2},
    ],
    ids=str,
)  # fmt: skip
def test_a_spec_that_no_kernel_could_follow_can_not_exist(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        dataclasses.replace(SPEC, **change)


def test_softmax_is_exact_where_float32_would_overflow() -> None:
    logits = np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32)
    np.testing.assert_allclose(oracle.softmax(logits), [[0.5, 0.5], [0.25, 0.75]], rtol=1e-7)


def test_params_have_the_layout_of_the_guest() -> None:
    assert PARAMS.size == 32
    assert PARAMS.pack(1, 2, 3, 4, 5, 6, 7, 8) == struct.pack("<2I6f", 1, 2, 3, 4, 5, 6, 7, 8)
