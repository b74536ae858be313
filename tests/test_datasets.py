"""Rendered signs: repeatable, disjoint, balanced, told apart. Folders and archives: hostile."""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgelab import datasets, models
from edgelab.datasets import (
    SIGNS,
    Batch,
    ImageFolder,
    Sample,
    Signs,
    Split,
    _face,
    class_names,
    extract,
    imagenette,
    prepare,
    render_sign,
    tensors,
)
from edgelab.errors import DownloadError, ImageError, ModelError
from edgelab.models import Spec
from edgelab.paths import source_root

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


def test_held_out_renders_share_no_picture_with_those_that_calibrate() -> None:
    """At the size and the count that `evaluate` uses; only the first words of the seeds differ."""
    spec = toy_spec(crop=24, resize=24, labels=SIGNS)
    held_out = prepare(Signs("test", 2048, 32), spec)
    calibrate = prepare(Signs("calibrate", 512, 32), spec)
    rows = [hashlib.sha256(picture.tobytes()).digest() for picture in held_out.images]
    others = [hashlib.sha256(picture.tobytes()).digest() for picture in calibrate.images]
    assert len(set(rows)) == 2048
    assert not set(rows) & set(others)
    seeds = datasets._SPLIT_SEED
    assert len(set(seeds.values())) == len(seeds)


# --- batches --------------------------------------------------------------------------------------

REAL = Path(source_root() or ".").parent / "shared" / "real"


def toy_spec(*, crop: int = 16, resize: int = 20, labels: tuple[str, ...] = ("cat", "dog")) -> Spec:
    return Spec("toy", "1", labels, resize, crop, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def test_tensors_are_what_pillow_and_numpy_give() -> None:
    spec = models.load("signs").spec
    samples = Signs("test", 5)
    got = tensors(samples, spec)
    assert got.shape == (5, 3, 224, 224)
    assert got.dtype == np.float32
    for tensor, sample in zip(got, samples, strict=True):
        # By hand: the sides are 256 already, so nothing is resized, and 16 pixels are cut off.
        cut = sample.image[16:240, 16:240].astype(np.float64) / 255
        want = (cut - spec.mean) / spec.std
        np.testing.assert_allclose(tensor, want.transpose(2, 0, 1), atol=1e-5)


def test_a_batch_does_not_depend_on_the_number_of_threads() -> None:
    spec, samples = toy_spec(labels=SIGNS), Signs("calibrate", 70, 48)
    one, many = (prepare(samples, spec, threads=n) for n in (1, 7))
    np.testing.assert_array_equal(one.images, many.images)
    np.testing.assert_array_equal(one.labels, [k % 32 for k in range(70)])
    np.testing.assert_array_equal(many.labels, one.labels)
    assert one.images.dtype == np.uint8
    assert repr(one) == ("Batch(70 pictures of 16 x 16, Signs('calibrate', count=70, size=48))")


def test_chunks_put_together_are_the_tensors() -> None:
    batch = prepare(Signs("test", 70, 32), toy_spec(labels=SIGNS))
    parts = list(batch.chunks(32))
    assert [start for start, _ in parts] == [0, 32, 64]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), batch.tensors())
    some = batch.take([3, 1])
    np.testing.assert_array_equal(some.images, batch.images[[3, 1]])
    np.testing.assert_array_equal(some.labels, [3, 1])
    assert some.names == ("3", "1")
    assert batch.take(slice(2, 4)).names == ("2", "3")


def test_folds_hold_every_picture_once_and_are_mixed() -> None:
    batch = prepare(Signs("test", 53, 16), toy_spec(labels=SIGNS))
    parts = batch.folds(5, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(53))
    assert {len(part) for part in parts} == {10, 11}
    assert not np.array_equal(parts[0], batch.folds(5, seed=2)[0])
    np.testing.assert_array_equal(parts[3], batch.folds(5, seed=1)[3])
    for count in (1, 54):
        with pytest.raises(ValueError, match="can't split 53 pictures"):
            batch.folds(count)


def test_a_picture_of_a_class_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(ImageError, match="picture 2 shows class 2, and model 'toy' has 2"):
        prepare(Signs("test", 3, 16), toy_spec(), threads=1)
    with pytest.raises(ImageError, match="no pictures"):
        prepare([], toy_spec())


def test_tensors_that_would_fill_the_memory_are_refused() -> None:
    huge = np.broadcast_to(np.zeros((1, 224, 224, 3), np.uint8), (8000, 224, 224, 3))
    batch = Batch(huge, np.zeros(8000, np.int64), toy_spec(crop=224, resize=224), "zeros")
    with pytest.raises(ImageError, match=r"8,000 pictures .* Take fewer, or .* chunks"):
        batch.tensors()


# --- folders --------------------------------------------------------------------------------------

SYNSETS = "n00000001 tench, Tinca tinca\nn00000002 crane\nn00000003 crane\n"
BIRDS = ("tench", "crane", "crane")


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 24), (colour, 10, 200)).save(path, format="PNG")
    return path


@pytest.fixture
def synsets(tmp_path: Path) -> Path:
    path = tmp_path / "synsets.txt"
    path.write_text(SYNSETS)
    return path


def test_names_are_labels_and_wordnet_ids_but_none_that_two_classes_share(synsets: Path) -> None:
    spec = toy_spec(labels=BIRDS)
    assert class_names(spec) == {"tench": 0}
    assert class_names(spec, synsets) == {
        "tench": 0, "n00000001": 0, "n00000002": 1, "n00000003": 2,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"lists 3 classes, and model 'toy' has 2.*another model"):
        class_names(toy_spec(), synsets)


@pytest.mark.parametrize(
    "text",
    ["", "tench\n", "n1 tench\n", "n00000001 a\nn00000001 b\n", "n00000001 a\n\nn00000002 b\n",
     "n00000001 \n", "\xff"],
)  # fmt: skip
def test_a_list_of_labels_of_another_form_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="list of labels"):
        models.imagenet_spec("toy", path)
    with pytest.raises(ModelError, match="cannot read the list"):
        models.read_synset_ids(tmp_path / "none.txt")


def test_an_imagenet_spec_has_the_labels_of_the_file(synsets: Path) -> None:
    spec = models.imagenet_spec("mine", synsets)
    assert (spec.name, spec.labels, spec.resize, spec.crop) == ("mine", BIRDS, 256, 224)
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.std == (0.229, 0.224, 0.225)


def test_pictures_are_labelled_by_folder_or_name_and_come_in_turns(
    tmp_path: Path, synsets: Path
) -> None:
    root = tmp_path / "set"
    picture(root / "Tench" / "b.png", 1)
    picture(root / "Tench" / "a.png", 2)
    picture(root / "n00000002" / "x.JPEG", 3)
    picture(root / "n00000003.png", 4)
    picture(root / "n00000003_17_b.png", 5)
    folder = ImageFolder(root, class_names(toy_spec(labels=BIRDS), synsets))
    names = [path.relative_to(root.resolve()).as_posix() for path in folder.paths]
    assert names == ["Tench/a.png", "n00000002/x.JPEG", "n00000003.png", "Tench/b.png",
                     "n00000003_17_b.png"]  # fmt: skip
    assert folder.labels == (0, 1, 2, 0, 2)
    assert [sample.image[0, 0, 0] for sample in folder] == [2, 3, 4, 1, 5]
    assert folder.skipped == {}
    assert len(folder[1:3]) == 2
    assert repr(folder) == "ImageFolder('set', 5 pictures of 3 classes)"
    assert prepare(folder, toy_spec(labels=BIRDS)).names == tuple(names)
    few = ImageFolder(root, class_names(toy_spec(labels=BIRDS), synsets), count=3)
    assert few.paths == folder.paths[:3]
    with pytest.raises(ValueError, match="count >= 1"):
        ImageFolder(root, {}, count=0)


def test_spaces_in_a_label_may_be_underscores(tmp_path: Path) -> None:
    picture(tmp_path / "speed_limit_20_7.png")
    picture(tmp_path / "Speed Limit 30" / "1.png")
    folder = ImageFolder(tmp_path, class_names(toy_spec(labels=SIGNS)))
    assert [SIGNS[k] for k in folder.labels] == ["speed limit 20", "speed limit 30"]


def test_without_names_every_picture_counts_and_has_no_label(tmp_path: Path) -> None:
    picture(tmp_path / "anything" / "1.png", 7)
    picture(tmp_path / "2.png", 8)
    folder = ImageFolder(tmp_path)
    assert folder.labels == (-1, -1)
    assert {sample.image[0, 0, 0] for sample in folder} == {7, 8}
    assert tensors(folder, toy_spec()).shape == (2, 3, 16, 16)


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    root = tmp_path / "set"
    picture(root / "cat" / "good.png")
    picture(root / "cat" / "deeper" / "1.png")
    picture(root / "horse" / "1.png")
    picture(root / "horse" / "2.png")
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / "cat" / "text.jpg").write_text("no picture, either")
    (root / "cat" / "empty.jpg").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "cat" / "pipe.jpg")  # to open it would wait for ever
    folder = ImageFolder(root, class_names(toy_spec()))
    assert [path.name for path in folder.paths] == ["good.png"]
    assert folder.skipped == {
        "a folder in a class's folder": 1,
        "no picture by the name": 1,
        "no picture, whatever the name says": 3 if hasattr(os, "mkfifo") else 2,
        "of a class that the model does not know": 2,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    inside = picture(root / "cat" / "1.png")
    secret = picture(tmp_path / "elsewhere" / "secret.png")
    (root / "cat" / "2.png").symlink_to(inside)
    (root / "cat" / "3.png").symlink_to(secret)
    (root / "cat" / "4.png").symlink_to("../../elsewhere/secret.png")
    (root / "cat" / "5.png").symlink_to("nowhere")
    (root / "cat" / "6.png").symlink_to("6.png")
    (root / "dog").symlink_to(secret.parent)
    folder = ImageFolder(root, class_names(toy_spec()))
    assert [path.name for path in folder.paths] == ["1.png", "2.png"]
    assert folder.skipped == {"a link that leads out of the folder, or nowhere": 5}
    # The folder itself may be a link: its user named it.
    (tmp_path / "link").symlink_to(root)
    assert len(ImageFolder(tmp_path / "link", class_names(toy_spec()))) == 2


def test_a_damaged_picture_is_an_error_with_its_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = tmp_path / "cat" / "cut.png"
    path.parent.mkdir()
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    folder = ImageFolder(tmp_path, class_names(toy_spec()))
    with pytest.raises(ImageError, match=r"cut\.png can't be decoded"):
        prepare(folder, toy_spec())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"it is empty.*names of classes that the model knows, such as cat, dog.*--labels"),
        (["horse/1.png"], r"1 of a class that the model does not know"),
        (["val/cat/1.png"], r"Did you mean \S*val\?"),
    ],
)
def test_a_folder_with_nothing_to_use_says_why(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        picture(tmp_path / "set" / name)
    (tmp_path / "set").mkdir(exist_ok=True)
    with pytest.raises(ImageError, match=message):
        ImageFolder(tmp_path / "set", class_names(toy_spec()))


@pytest.mark.parametrize("name", ["none", "file", "a\0b"])
def test_what_is_no_folder_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="cannot read the folder"):
        ImageFolder(tmp_path / name, {"cat": 0})


def test_a_folder_with_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MAX_FILES", 5)
    monkeypatch.setattr(datasets._entries, "__defaults__", (5,))
    for k in range(4):
        picture(tmp_path / "cat" / f"{k}.png")
    assert len(ImageFolder(tmp_path, {"cat": 0})) == 4
    picture(tmp_path / "cat" / "5.png")
    with pytest.raises(ImageError, match="more than 5 files"):
        ImageFolder(tmp_path, {"cat": 0})


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real photos in {REAL}, which do not ship")
def test_the_real_photos_get_the_class_of_their_wordnet_id() -> None:
    synsets = REAL / "imagenet-synsets.txt"
    spec = models.imagenet_spec("real", synsets)
    folder = ImageFolder(REAL / "imagenet-200", class_names(spec, synsets))
    lines = synsets.read_text().splitlines()
    assert len(folder) == 200
    assert all(
        lines[k].startswith(p.stem) for p, k in zip(folder.paths, folder.labels, strict=True)
    )
    # Imagenette's ten classes lead to the classes of the same WordNet ids.
    named = datasets._IMAGENETTE
    assert {w: lines[spec.labels.index(label)][:9] for w, label in named.items()} == {
        wnid: wnid for wnid in named
    }


# --- archives -------------------------------------------------------------------------------------


def tar_of(*members: tuple[tarfile.TarInfo | str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=form) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data.ljust(info.size, b"\0")))
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def unpack(data: bytes, folder: Path, **limits: int) -> None:
    archive = folder.with_name("toy.tgz")
    archive.write_bytes(data)
    extract(archive, folder, **{"max_bytes": 100_000, "max_files": 10, **limits})


def test_an_archive_is_unpacked_into_its_folder(tmp_path: Path) -> None:
    data = tar_of((special("toy/", tarfile.DIRTYPE), b""), ("toy/val/a.jpg", b"A"),
                  ("./toy/train/n1/ILSVRC2012_val_1.JPEG", b"B" * 9000))  # fmt: skip
    unpack(data, tmp_path / "toy")
    assert (tmp_path / "toy" / "val" / "a.jpg").read_bytes() == b"A"
    assert (tmp_path / "toy/train/n1/ILSVRC2012_val_1.JPEG").read_bytes() == b"B" * 9000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy", "toy.tgz"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    "name",
    ["/toy/a", "../a", "toy/../a", "toy/../../a", "toy", "other/a", "toy/a/../../b", "toy/C:a",
     "toy/..\\a", "toy/a\nb", "toy/-rf", "toy/a ", "toy/a.", "toy/con.jpg", "toy/LPT1",
     "toy/a/b/c/d/e/f/g", "toy/\u202egpj.exe", "toy/" + "long/" * 200 + "a"],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str, form: int) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(DownloadError, match=r"toy\.tgz was not unpacked: "):
        unpack(tar_of(("toy/good", b"1"), (name, b"evil"), form=form), inner / "toy")
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "toy.tgz"]


@pytest.mark.parametrize(
    "member",
    [
        special("toy/link", tarfile.SYMTYPE, "/etc/passwd"),
        special("toy/link", tarfile.SYMTYPE, "good"),
        special("toy/hard", tarfile.LNKTYPE, "toy/good"),
        special("toy/dev", tarfile.CHRTYPE),
        special("toy/dev", tarfile.BLKTYPE),
        special("toy/pipe", tarfile.FIFOTYPE),
        special("toy/cont", tarfile.CONTTYPE),
        special("toy/odd", b"Z"),
    ],
    ids=lambda member: f"{member.name}-{member.type!r}",
)
def test_links_and_devices_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(DownloadError, match="is a link, a device, or something else"):
        unpack(tar_of(("toy/good", b"1"), (member, b"")), tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy.tgz"]


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("toy/sparse")
    info.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,1"}
    with pytest.raises(DownloadError, match="not unpacked"):
        unpack(tar_of((info, b"x")), tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy.tgz"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tar_of(*((f"toy/{k}", b"") for k in range(11))), "more than 10 files"),
        (tar_of(("toy/a", b"0" * 60_000), ("toy/b", b"0" * 60_000)), "100,000 bytes"),
        (tar_of(("toy/a", b"1"), ("toy/a", b"2")), "exists"),
        (tar_of(("toy/a", b"1"), ("toy/a/b", b"2")), "not unpacked"),
        (tar_of(("toy/a", b"A" * 5000))[:-300], "not unpacked"),
        (gzip.compress(b"no tar at all" * 100), "not unpacked"),
        (gzip.compress(b""), "not unpacked"),
        (gzip.compress(bytes(10240)), "it is empty"),
        (b"no gzip", "not unpacked"),
        (b"", "not unpacked"),
    ],
    ids=[
        "many",
        "large",
        "twice",
        "file as folder",
        "cut",
        "no tar",
        "nothing",
        "zeros",
        "no gzip",
        "empty",
    ],
)
def test_a_damaged_or_oversized_archive_leaves_nothing(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    with pytest.raises(DownloadError, match=reason):
        unpack(data, tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy.tgz"]


def test_a_bomb_is_stopped_before_it_is_blown_up(tmp_path: Path) -> None:
    """A member, a long name and a PAX header that claim 4 GiB; 400 MB of zeros behind the end."""
    claims = 4 << 30
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = special("toy/a", kind)
        header.size = claims
        data = header.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)
        with pytest.raises(DownloadError, match=r"at once|more than|goes back"):
            unpack(gzip.compress(data), tmp_path / "toy")
    padded = io.BytesIO()
    with gzip.open(padded, "wb", compresslevel=1) as file:
        file.write(tarfile.TarInfo("toy/a").tobuf())
        for _ in range(100):
            file.write(bytes(1 << 22))
    unpack(padded.getvalue(), tmp_path / "toy")  # what follows the end is not even read
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["a"]


# --- Imagenette, from a server on this machine ----------------------------------------------------

IMAGENET = REAL / "imagenet-synsets.txt"


class Server:
    """Serves one file; can break off, ignore ranges, or answer them wrongly."""

    def __init__(self, data: bytes) -> None:
        self.data, self.ranges = data, list[str | None]()
        self.break_at: int | None = None
        self.mode = "ranges"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.ranges.append(wanted)
                start = int(wanted[6:-1]) if wanted and server.mode != "whole" else 0
                body = server.data[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                if start:
                    begin = start + 1 if server.mode == "wrong" else start
                    end = len(server.data) - 1
                    self.send_header("Content-Range", f"bytes {begin}-{end}/{len(server.data)}")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body if server.break_at is None else body[: server.break_at])

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/imagenette2-160.tgz"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def jpeg(colour: int) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (40, 32), (colour, 0, 0)).save(packed, "JPEG")
    return packed.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """An archive of the real one's form, pinned, on a server; an empty cache; no pauses."""
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda _: None))
    wnids = list(datasets._IMAGENETTE)
    files = [
        (f"imagenette2-160/{split}/{wnid}/{wnid}_{k}.JPEG", jpeg(25 * place + k))
        for split, many in (("train", 3), ("val", 2))
        for place, wnid in enumerate(wnids)
        for k in range(many)
    ]
    noise = np.random.default_rng(0).bytes(400_000)  # so that the archive can be cut in two
    server = Server(tar_of(*files, ("imagenette2-160/noise.csv", noise)))
    registry = models._registry_file()
    entry = {
        **registry["_datasets"]["imagenette2-160"],
        "urls": [server.url],
        "md5": hashlib.md5(server.data).hexdigest(),
        "size_bytes": len(server.data),
    }
    toy = {**registry, "_datasets": {"imagenette2-160": entry}}
    monkeypatch.setattr(models, "_registry_file", lambda: toy)
    yield server
    server.stop()


def imagenet_like() -> Spec:
    """A model's labels that hold Imagenette's, at other places."""
    return toy_spec(labels=("first", *sorted(datasets._IMAGENETTE.values()), "last"))


def cached(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "datasets").iterdir())


def test_imagenette_is_fetched_once_and_labelled(server: Server, tmp_path: Path) -> None:
    spec = imagenet_like()
    folder = imagenette(spec, "val", size="160px")
    assert len(folder) == 20
    assert sorted({spec.labels[k] for k in folder.labels}) == list(spec.labels[1:-1])
    for path, sample in zip(folder.paths, folder, strict=True):
        assert spec.labels[sample.label] == datasets._IMAGENETTE[path.parent.name]
    assert len(set(folder.labels[:10])) == 10  # in turns
    assert len(imagenette(spec, "train", size="160px", count=12)) == 12
    assert cached(tmp_path) == [".imagenette2-160.lock", "imagenette2-160"]
    assert server.ranges == [None]
    server.stop()
    assert imagenette(spec, "val", size="160px").paths == folder.paths


def test_no_file_is_in_both_splits(server: Server) -> None:
    train, val = (imagenette(imagenet_like(), split, size="160px") for split in ("train", "val"))
    assert len(train) == 30
    assert not set(train.paths) & set(val.paths)


@pytest.mark.parametrize("mode", ["ranges", "whole"])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, mode: str) -> None:
    server.break_at, server.mode = 100_000, mode
    with pytest.raises(DownloadError, match="imagenette2-160"):
        imagenette(imagenet_like(), size="160px")
    kept = tmp_path / "cache" / "datasets" / ".imagenette2-160.tgz.part"
    at = (3 if mode == "ranges" else 1) * 65_536  # three tries; each keeps whole chunks
    assert kept.read_bytes() == server.data[:at]
    asked = len(server.ranges)
    server.break_at = None
    assert len(imagenette(imagenet_like(), size="160px")) == 20
    assert server.ranges[asked:] == [f"bytes={at}-"]
    assert not kept.exists()


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1] + b"?", lambda data: b"?" + data[1:], lambda data: data + b"?"]
)
def test_bytes_that_are_not_the_pinned_ones_are_refused(
    server: Server, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    good, server.data = server.data, spoil(server.data)
    with pytest.raises(DownloadError):
        imagenette(imagenet_like(), size="160px")
    assert "imagenette2-160" not in cached(tmp_path)
    server.data = good
    assert len(imagenette(imagenet_like(), size="160px")) == 20


def test_a_server_that_sends_another_part_is_refused(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "datasets" / ".imagenette2-160.tgz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.data[:500])
    server.mode = "wrong"
    with pytest.raises(DownloadError, match="another part"):
        imagenette(imagenet_like(), size="160px")
    server.mode = "ranges"
    assert len(imagenette(imagenet_like(), size="160px")) == 20


def test_a_spoiled_part_is_thrown_away(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "datasets" / ".imagenette2-160.tgz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 500)
    assert len(imagenette(imagenet_like(), size="160px")) == 20
    assert server.ranges == ["bytes=500-", None]  # the whole was wrong, so it began anew


def test_a_hostile_archive_with_the_right_pin_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tar_of(("imagenette2-160/../../evil", b"1"))
    server.data = evil
    entry = models._registry_file()["_datasets"]["imagenette2-160"]
    entry.update(md5=hashlib.md5(evil).hexdigest(), size_bytes=len(evil))
    with pytest.raises(DownloadError, match="no plain path"):
        imagenette(imagenet_like(), size="160px")
    assert not list(tmp_path.rglob("evil"))
    assert "imagenette2-160" not in cached(tmp_path)


def test_imagenette_needs_a_model_with_its_labels() -> None:
    with pytest.raises(ImageError, match=r"does not have the labels of ImageNet.*--images"):
        imagenette(toy_spec())
    with pytest.raises(ValueError, match="need train or val"):
        imagenette(imagenet_like(), "test")  # type: ignore[arg-type]


def test_the_pins_are_well_formed() -> None:
    for size in datasets.IMAGENETTE_SIZES:
        entry = models.pinned_dataset(f"imagenette2-{size.removesuffix('px')}")
        assert re.fullmatch("[0-9a-f]{32}", entry["md5"])
        assert entry["unpacked_bytes"] > entry["size_bytes"] > 90_000_000
        assert entry["urls"][0].endswith(f"/{entry['folder']}.tgz")
