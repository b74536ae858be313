"""The benchmark of the WASI-NN host, and what it can't show: how many bytes are copied."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from test_wasinn import CLASSIFIER, encoded, onnx_model

from edgelab import Guest, WasiNN
from edgelab.bench import host_table
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import ModelError
from edgelab.runtime import Memory


def test_both_sides_are_timed_in_the_same_rounds() -> None:
    table = host_table(CLASSIFIER, name="klein", repeats=8, threads=1)
    assert table.round_trip.count == table.bare_run.count == table.start.count == 8
    assert table.load.count == table.bare_load.count == table.load_bytes.count
    assert table.round_trip_ratio.low <= table.round_trip_ratio.median
    for text in (str(table), table._repr_html_()):
        assert all(row in text for row in ("inference", "load by name", "file to first call"))
    assert table.to_dict()["model"] == "klein"


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
