"""Model files: pins, and the specs that hostile metadata try to be."""

import dataclasses
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from edgelab import models
from edgelab.datasets import SIGNS
from edgelab.errors import ModelError
from edgelab.models import Spec, read_spec

GOOD = {
    "name": "toy",
    "version": "2",
    "labels": '["red", "grün"]',
    "resize": "256",
    "crop": "224",
    "mean": "[0.1, 0.2, 0.3]",
    "std": "[1, 2, 3]",
    "layout": "NCHW",
    "color": "RGB",
    "output": "logits",
}
SPEC = Spec("toy", "2", ("red", "grün"), 256, 224, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def as_safetensors(metadata: Any, **extra: Any) -> bytes:
    header = json.dumps({"__metadata__": metadata, **extra}).encode()
    return struct.pack("<Q", len(header)) + header


def as_onnx(metadata: dict[str, str]) -> bytes:
    graph = onnx.helper.make_graph([], "empty", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, metadata)
    return bytes(model.SerializeToString())


# --- the registry ---------------------------------------------------------------------------------

SHIPPED = [name for name, entry in models.registry().items() if "path" in entry]
PINS_OF_THE_ZOO = {  # as published
    "mobilenetv2-12": (
        13_964_571,
        "c0c3f76d93fa3fd6580652a45618618a220fced18babf65774ed169de0432ad5",
    ),
    "mobilenetv2-12-int8": (
        3_655_033,
        "cc028fe6cae7bc11a4ff53cfc9b79c920e8be65ce33a904ec3e2a8f66d77f95f",
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_loads_and_matches_its_pin(name: str) -> None:
    model = models.load(name)
    data = model.path.read_bytes()
    entry = models.registry()[name]
    assert model.data == data
    assert model.sha256 == entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert model.size_bytes == entry["size_bytes"] == len(data)
    assert model.spec.name == name
    assert model.spec.labels == SIGNS
    assert (model.spec.resize, model.spec.crop) == (256, 224)


def test_the_shipped_models_are_small() -> None:
    assert SHIPPED == ["signs", "signs-tiny"]
    assert models.load("signs").size_bytes <= 10_000_000


@pytest.mark.parametrize("name", PINS_OF_THE_ZOO)
def test_a_downloadable_model_is_pinned_as_published(name: str) -> None:
    entry = models.registry()[name]
    assert (entry["size_bytes"], entry["sha256"]) == PINS_OF_THE_ZOO[name]
    assert len(entry["urls"]) >= 2
    assert all(url.startswith("https://") for url in entry["urls"])


def test_names_are_the_registry_without_its_helpers() -> None:
    assert models.names() == ["signs", "signs-tiny", *PINS_OF_THE_ZOO]
    assert all("license" in entry and "title" in entry for entry in models.registry().values())


@pytest.fixture
def copied_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    shutil.copytree(models.models_dir(), folder, ignore=lambda *_: [n for n in _[1] if n == "work"])
    monkeypatch.setattr(models, "models_dir", lambda: folder)
    return folder


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("damage", ["flip", "cut", "append"])
def test_a_tampered_file_is_refused(copied_models: Path, name: str, damage: str) -> None:
    path = copied_models / models.registry()[name]["path"]
    data = bytearray(path.read_bytes())
    assert models.load(name).data == data
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[-1]
    else:
        data += b"\0"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"is not the pinned file.*Restore it"):
        models.load(name)
    with pytest.raises(ModelError, match="is not the pinned file"):
        models.load(name, spec=SPEC)


@pytest.mark.parametrize("name", ["sings", "", "_specs", "no/such/file.onnx", "a\0b"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ModelError, match="Known names: signs, signs-tiny, mobilenetv2-12"):
        models.load(name)
    with pytest.raises(ModelError, match=r"no model is named .*; known: signs, signs-tiny"):
        models.fetch(name)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model .*(directory|denied)"):
        models.load(tmp_path)


# --- files of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [as_onnx, as_safetensors])
def test_a_file_carries_its_spec(tmp_path: Path, encode: Any) -> None:
    path = tmp_path / "eigenes Modell.bin"
    path.write_bytes(encode(GOOD))
    model = models.load(path)
    assert model.spec == SPEC
    assert model.path == path
    assert model.data == path.read_bytes()
    assert models.load(str(path)).spec == SPEC


@pytest.mark.parametrize("encode", [as_onnx, as_safetensors])
def test_a_file_without_a_spec_needs_one_from_the_user(tmp_path: Path, encode: Any) -> None:
    path = tmp_path / "model"
    path.write_bytes(encode({}))
    with pytest.raises(ModelError, match=r"lacks name, labels, .*Pass a Spec"):
        models.load(path)
    assert models.load(path, spec=SPEC).spec == SPEC


def test_a_user_spec_goes_before_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(as_onnx(GOOD))
    other = dataclasses.replace(SPEC, name="other")
    assert models.load(path, spec=other).spec == other


def test_files_of_the_real_libraries_are_read() -> None:
    assert read_spec(save({"x": np.zeros(2, np.float32)}, GOOD)) == SPEC
    assert read_spec(as_onnx(GOOD)) == SPEC


def test_layout_color_output_and_version_have_defaults() -> None:
    short = {k: GOOD[k] for k in ("name", "labels", "resize", "crop", "mean", "std")}
    assert Spec.from_metadata(short) == dataclasses.replace(SPEC, version="0")


# --- hostile metadata -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["name", "labels", "resize", "crop", "mean", "std"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks {key}, so its input can't be prepared"):
        Spec.from_metadata({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""}, {"name": "a\x1b[2Jb"}, {"name": "two\nlines"},
        {"version": "\x07"},
        {"labels": "[]"}, {"labels": "[1]"}, {"labels": '["a", ""]'}, {"labels": '["a", null]'},
        {"labels": '{"a": 1}'}, {"labels": '"abc"'}, {"labels": "abc"}, {"labels": ""},
        {"labels": '["\\u001b[31mred"]'}, {"labels": '["\\ud800"]'}, {"labels": '["a"'},
        {"labels": "[" * 100_000}, {"labels": "7"},
        {"resize": "0"}, {"resize": "223"}, {"resize": "4097"}, {"resize": "2.5"},
        {"resize": "x"}, {"resize": ""}, {"resize": "9" * 5000}, {"resize": "inf"},
        {"crop": "0"}, {"crop": "-1"}, {"crop": "257"},
        {"mean": "[0, 0]"}, {"mean": "[0, 0, 0, 0]"}, {"mean": "0"}, {"mean": '"012"'},
        {"mean": "[NaN, 0, 0]"}, {"mean": "[0, Infinity, 0]"}, {"mean": "[1e300, 0, 0]"},
        {"mean": "[1" + "0" * 400 + ", 0, 0]"}, {"mean": "[null, 0, 0]"}, {"mean": "[[], 0, 0]"},
        {"std": "[0, 1, 1]"}, {"std": "[1, 1, -1]"}, {"std": "[1e-50, 1, 1]"}, {"std": "[NaN,1,1]"},
        {"std": '{"r": 1, "g": 1, "b": 1}'},
        {"layout": "NHWC"}, {"color": "BGR"}, {"output": "probabilities"}, {"layout": ""},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_value_without_sense_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ModelError) as caught:
        Spec.from_metadata({**GOOD, **change})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "metadata",
    [None, 7, "name labels resize crop mean std", list(GOOD), [], True, {**GOOD, "resize": 256}],
    ids=str,
)
def test_metadata_of_another_type_is_refused(metadata: Any) -> None:
    with pytest.raises(ModelError):
        read_spec(as_safetensors(metadata))


def only_model_errors(data: bytes) -> None:
    try:
        spec = read_spec(data)
    except ModelError:
        return
    assert spec.labels
    assert 1 <= spec.crop <= spec.resize <= 4096


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
value = st.sampled_from(sorted(GOOD.values())) | anything.map(json.dumps) | st.text()
metadata = st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, value))


@settings(max_examples=300)
@given(metadata)
def test_random_metadata_raise_only_model_errors(metadata: dict[str, str]) -> None:
    only_model_errors(as_safetensors(metadata))


@given(anything)
def test_any_json_as_metadata_raises_only_model_errors(metadata: Any) -> None:
    only_model_errors(as_safetensors(metadata))


@given(anything)
def test_any_json_as_safetensors_header_raises_only_model_errors(header: Any) -> None:
    text = json.dumps(header).encode()
    only_model_errors(struct.pack("<Q", len(text)) + text)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_only_model_errors(data: bytes) -> None:
    with pytest.raises(ModelError):
        read_spec(data)


@settings(max_examples=300)
@given(
    st.sampled_from([as_onnx(GOOD), as_safetensors(GOOD)]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_mutated_models_raise_only_model_errors(
    victim: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(victim)
    for place, byte in changes:
        data[place % len(data)] = byte
    only_model_errors(bytes(data))


@pytest.mark.parametrize("encode", [as_onnx, as_safetensors])
def test_a_model_cut_off_anywhere_raises_only_model_errors(encode: Any) -> None:
    data = encode(GOOD)
    for length in range(len(data)):
        only_model_errors(data[:length])


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**63, 2**64 - 1])
def test_a_header_length_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(ModelError, match="neither an ONNX nor a safetensors file"):
        read_spec(struct.pack("<Q", length) + as_safetensors(GOOD)[8:])


def test_a_header_that_nests_too_deep_is_refused() -> None:
    header = b"[" * 100_000
    with pytest.raises(ModelError, match="damaged safetensors header"):
        read_spec(struct.pack("<Q", len(header)) + header)


def test_synset_lines_give_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "synset.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    assert models.read_synset_labels(path) == ("tench", "crane", "crane")


def test_a_model_shows_itself_in_one_line() -> None:
    model = models.load("signs-tiny")
    assert repr(model) == (
        f"Model('signs-tiny', {model.size_bytes:,} bytes, 32 labels, sha256 {model.sha256[:12]}…)"
    )
