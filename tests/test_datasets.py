"""The rendered signs: repeatable, disjoint, balanced, and told apart."""

import hashlib
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgelab.datasets import SIGNS, Sample, Signs, Split, _face, render_sign

SPLITS: tuple[Split, ...] = ("train", "calibrate", "test")


def digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes()).hexdigest()


def test_the_same_index_gives_the_same_bytes_in_another_process() -> None:
    here = [digest(sample) for sample in Signs("test", 5, 64)]
    code = (
        "import hashlib\nfrom edgelab.datasets import Signs\n"
        "for s in Signs('test', 5, 64): print(hashlib.sha256(s.image.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == here


def test_a_sample_depends_on_its_index_only() -> None:
    few, many = Signs("train", 10, 64), Signs("train", 1000, 64)
    expected = [digest(few[k]) for k in range(10)]
    assert [digest(many[k]) for k in reversed(range(10))] == expected[::-1]
    assert [digest(sample) for sample in many[:10]] == expected
    assert [digest(sample) for sample in few] == expected


def test_no_picture_occurs_twice_within_or_across_splits() -> None:
    count = 128
    pictures = [digest(sample) for split in SPLITS for sample in Signs(split, count, 48)]
    assert len(set(pictures)) == len(SPLITS) * count


@pytest.mark.parametrize("size", [16, 64, 256])
def test_pictures_are_rgb_of_the_size_asked_for(size: int) -> None:
    sample = Signs("calibrate", 1, size)[0]
    assert sample.image.shape == (size, size, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.std() > 5  # not blank
    assert isinstance(sample.label, int)


def test_every_class_occurs_equally_often() -> None:
    labels = [sample.label for sample in Signs("test", 4 * len(SIGNS), 16)]
    assert Counter(labels) == dict.fromkeys(range(len(SIGNS)), 4)


def test_there_are_32_classes_with_names_of_their_own() -> None:
    assert len(SIGNS) == len(set(SIGNS)) == 32
    assert all(name == name.strip() and name.isprintable() for name in SIGNS)


def test_all_faces_are_drawn_and_told_apart() -> None:
    faces = []
    for label in range(len(SIGNS)):
        face = np.asarray(_face(label, 64), np.float32)
        coverage = (face[..., 3] > 128).mean()
        assert 0.3 < coverage < 1, SIGNS[label]
        faces.append(face[..., :3] * face[..., 3:] / 255)
    for a, b in itertools.combinations(range(len(SIGNS)), 2):
        differing = (np.abs(faces[a] - faces[b]).max(-1) > 64).mean()
        assert differing > 0.01, (SIGNS[a], SIGNS[b])


def test_a_picture_shows_its_own_sign_and_no_other() -> None:
    def picture(label: int) -> Any:
        return render_sign(label, np.random.default_rng(3), 128).astype(int)

    stop, way = SIGNS.index("stop"), SIGNS.index("give way")
    np.testing.assert_array_equal(picture(stop), picture(stop))
    assert (np.abs(picture(stop) - picture(way)).max(-1) > 32).mean() > 0.01


def test_a_split_is_a_sequence() -> None:
    signs = Signs("train", 40, 16)
    assert isinstance(signs, Sequence)
    assert len(signs) == 40
    assert digest(signs[-1]) == digest(signs[39])
    assert [s.label for s in signs[30:36:2]] == [30, 0, 2]
    assert [s.label for s in signs[-2:]] == [6, 7]
    assert signs[40:] == []
    assert digest(signs[int(np.int64(3))]) == digest(signs[3])
    assert repr(signs) == "Signs('train', count=40, size=16)"


@pytest.mark.parametrize("index", [40, -41, 10**9])
def test_an_index_out_of_range_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} of 40"):
        Signs("train", 40, 16)[index]


@pytest.mark.parametrize("arguments", [("train", 0), ("train", -1), ("train", 1, 15)])
def test_a_count_or_size_that_makes_no_sense_is_an_error(arguments: Any) -> None:
    with pytest.raises(ValueError, match="need count >= 1 and size >= 16"):
        Signs(*arguments)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown split 'validation': choose one of train, cal"):
        Signs("validation", 1)  # type: ignore[arg-type]
