"""The benchmark of the WASI-NN host, and what it can't show: how many bytes are copied."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_wasinn import CLASSIFIER, encoded, onnx_model

from edgelab import Guest, Pipeline, WasiNN, models
from edgelab.bench import host_table, quantize_sections, run, stage_table
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import EdgelabError, ModelError
from edgelab.measure import Summary, ratio
from edgelab.models import example_image
from edgelab.pipeline import STAGES
from edgelab.runtime import Memory


def test_both_sides_are_timed_in_the_same_rounds() -> None:
    table = host_table(CLASSIFIER, name="klein\n\x1b[2J", repeats=8, threads=1)
    counts = {row.name: row.summary.count for row in table.section.rows}
    assert counts == {
        "inference": 8, "bare inference": 8, "file to first call": 8, "one more instance": 8,
        "read and hash": 8,
        "bare load": 3, "load by name": 3, "load from bytes": 3,
    }  # fmt: skip
    for row in table.section.rows:
        if row.baseline:
            kinds = {"load": "bare load", "inference": "bare inference"}
            assert row.baseline == kinds.get(row.name.split()[0], "read and hash")
            assert row.ratio == ratio(row.samples_ms, table.row(row.baseline).samples_ms)
        assert row.summary == Summary.of(row.samples_ms)
    assert table.section.noise is not None
    assert table.section.noise.count == 8
    for text in (str(table), table._repr_html_()):
        for part in ("inference", "load by name", "file to first call", "verdict", "A/A check",
                     "no winner"):  # fmt: skip
            assert part in text
    assert table.load_ratio.verdict == "no winner"  # 3 rounds can't tell
    assert table.section.settings["model"] == "klein \N{REPLACEMENT CHARACTER}[2J"
    assert table.section.settings["threads"] == 1
    assert table.environment.threads["threads"] == "1"
    assert json.loads(json.dumps(table.to_dict()))["model"] == "klein\n\x1b[2J"


def test_stages_are_compared_in_pairs() -> None:
    table = stage_table(Pipeline("signs"), example_image(), repeats=7)
    assert list(table.guest) == list(table.bare) == list(table.ratios) == [*STAGES, "total"]
    for stage, paired in table.ratios.items():
        guest, bare = table.samples_ms["guest"][stage], table.samples_ms["bare"][stage]
        assert len(guest) == len(bare) == 7
        assert paired == ratio(guest, bare)
        assert table.guest[stage] == Summary.of(guest)
    parts = np.sum([table.samples_ms["guest"][stage] for stage in STAGES], axis=0)
    assert np.all(parts <= table.samples_ms["guest"]["total"])
    assert table.total_ratio == table.ratios["total"]
    assert table.noise.count == 7
    assert [row.name for row in table.section.rows][:2] == ["bare decode", "decode"]
    for text in (str(table), table._repr_html_()):
        for part in ("postprocess", "guest is", "A/A check"):
            assert part in text
    plain = json.loads(json.dumps(table.to_dict()))
    assert plain["same_label"] is True
    assert "samples_ms" not in plain


def test_smaller_versions_of_a_model_are_timed(tmp_path: Path) -> None:
    model = models.load("signs")
    found = list(quantize_sections(model, tmp_path, repeats=6, threads=1))
    assert [section.name for section in found] == ["quantize_onnxruntime", "quantize_openvino"]
    rows = {row.name: row for row in found[0].rows}
    assert list(rows) == ["fp32", "fp16", "int8", "int8-dynamic", "int4-weights"]
    assert rows["fp32"].facts["size_bytes"] == model.size_bytes
    for name in list(rows)[1:]:
        file = tmp_path / f"{name}.onnx"
        assert rows[name].facts["size_bytes"] == file.stat().st_size < model.size_bytes
        assert rows[name].baseline == "fp32"
    (tmp_path / "int8.onnx").write_bytes(b"damaged")  # what is there is taken, and may not run
    section = next(quantize_sections(model, tmp_path, repeats=6, threads=1))
    assert "int8" not in [row.name for row in section.rows]
    assert any(each.startswith("int8 does not run: E3") for each in section.warnings)


def test_unknown_sections_are_refused_before_anything_is_timed() -> None:
    with pytest.raises(EdgelabError, match="no section 'wasi_mm'; the sections are stages"):
        next(iter(run(["stages", "wasi_mm"])))


def test_a_model_with_other_inputs_is_refused() -> None:
    add = onnx.helper.make_node("Add", ["a", "b"], ["y"])
    kind = onnx.TensorProto.FLOAT
    model = onnx_model([add], [("a", kind, (2,)), ("b", kind, (2,))], [("y", kind, (2,))])
    with pytest.raises(ModelError, match="one float32 input and one float32 output"):
        host_table(encoded(model))


def test_an_inference_copies_its_answer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads the input where it lies; the answer is written once, where the guest says."""
    kind = onnx.TensorProto.FLOAT
    mean = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    graph = onnx.helper.make_graph(
        [mean],
        "means",
        [onnx.helper.make_tensor_value_info("x", kind, (1, 3, 224, 224))],
        [onnx.helper.make_tensor_value_info("y", kind, (1, 3))],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    guest = Guest(guest_path("classify_nn").path, host=[WasiNN({"means": model})])
    classifier = Classifier(guest.instantiate())
    handle = classifier.load_graph("means")
    with classifier.buffer(602_112) as block:
        tensor = block.array((1, 3, 224, 224), np.float32)
        tensor[:] = np.random.default_rng(0).random(tensor.shape)
        classifier._buffers["tensor"] = block
        classifier.compute(handle, tensor, 3)  # warm: everything is bound now

        moved: Counter[str] = Counter()
        read, write, memmove = Memory.read, Memory.write, ctypes.memmove

        def counting_read(self: Memory, pointer: int, size_bytes: int) -> bytes:
            moved["read"] += size_bytes
            return read(self, pointer, size_bytes)

        def counting_write(self: Memory, pointer: int, data: Any) -> None:
            moved["written"] += len(data)
            write(self, pointer, data)

        def counting_memmove(target: Any, source: Any, count: int) -> int:
            moved["staged"] += count
            return memmove(target, source, count)

        monkeypatch.setattr(Memory, "read", counting_read)
        monkeypatch.setattr(Memory, "write", counting_write)
        monkeypatch.setattr(ctypes, "memmove", counting_memmove)
        tensor[:] *= 2  # no new binding is needed: the model reads what is there now
        answer = classifier.compute(handle, tensor, 3)
        np.testing.assert_allclose(answer, tensor.mean(axis=(0, 2, 3)), rtol=1e-5)

        head_and_dims, answer_and_size = 20 + 4 * 4, 3 * 4 + 4
        assert moved == {"read": head_and_dims, "written": answer_and_size}
        del classifier._buffers["tensor"]
