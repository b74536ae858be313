"""What a component costs: ``python tests/measure_component.py``. Not a test: it prints times.

First 602,112 bytes (the tensor of one image) each way, as wasmtime's own bindings move them and as
they move here; then the model of the traffic signs, in a component and through preview 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import wasmtime
from test_component import MODELS, NOTHING, written
from wasmtime import component as wit

from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.measure import Summary, fingerprint, interleaved
from edgelab.models import models_dir
from edgelab.runtime import Guest
from edgelab.wasinn import WasiNN
from edgelab.wasinn.backends.onnx import OnnxGraph
from edgelab.wasinn.component import VERSION, Component

SHAPE = (1, 3, 224, 224)
SIZE = 4 * 3 * 224 * 224
LISTS = """(component
  (core module $m
    (memory (export "memory") 40)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 65536))
    (func (export "take") (param i32 i32) (result i32) (local.get 1))
    (func (export "give") (param i32) (result i32)
      (i32.store (i32.const 8) (i32.const 65536)) (i32.store (i32.const 12) (local.get 0))
      (i32.const 8)))
  (core instance $m (instantiate $m))
  (alias core export $m "memory" (core memory $memory))
  (alias core export $m "realloc" (core func $realloc))
  (func (export "take") (param "x" (list {0})) (result u32)
    (canon lift (core func $m "take") (memory $memory) (realloc $realloc)))
  (func (export "give") (param "n" u32) (result (list {0}))
    (canon lift (core func $m "give") (memory $memory))))"""
KEEP, NEW, DATA = 2, 1, 0  # the tensor is of é in latin1, the worst case
TENSORS = written(f"""
  (i32.store (i32.const 64) (i32.const {SIZE}))
  (if (i32.eqz (local.get $n)) (then (call $data (i32.const 1) (i32.const 48)))
    (else
      (if (i32.eq (local.get $n) (i32.const {KEEP})) (then
        (drop (memory.grow (i32.const 1000)))
        (memory.fill (i32.const 128) (i32.const 0xe9) (i32.const {SIZE}))))
      (local.set $a (call $new (i32.const 64) (i32.const 1) (i32.const 4) (i32.const 128)
        (i32.const {SIZE})))
      (if (i32.eq (local.get $n) (i32.const {NEW})) (then
        (call $drop-tensor (local.get $a))))))
  {NOTHING}""")


def plain(text: bytes) -> Callable[..., Any]:
    """Return the caller of a component's functions, with wasmtime's own bindings throughout."""
    engine = wasmtime.Engine()
    kept: dict[int, bytes] = {}
    component, linker, store = (
        wit.Component(engine, text),
        wit.Linker(engine),
        wasmtime.Store(engine),
    )
    linker.define_unknown_imports_as_traps(component)
    linker.allow_shadowing = True

    def new(_store: Any, _dimensions: Any, _kind: str, data: bytes) -> wit.ResourceHost:
        kept[0] = data
        return wit.ResourceHost.own(0, 1)

    def data(store: Any, this: wit.ResourceAny) -> bytes:
        this.to_host(store)  # gives back what was borrowed
        return kept[0]

    with linker.root() as root, root.add_instance(f"wasi:nn/tensor@{VERSION}") as tensors:
        tensors.add_resource("tensor", wit.ResourceType.host(1), lambda _store, _number: None)
        tensors.add_func("[constructor]tensor", new)
        tensors.add_func("[method]tensor.data", data)
    instance = linker.instantiate(store, component)

    def call(name: str, *arguments: Any) -> Any:
        function = instance.get_func(store, name)
        assert function is not None
        return function(store, *arguments)

    return call


def show(rows: dict[str, Callable[[], Any]], repeats: int) -> None:
    for name, times in interleaved(rows, repeats=repeats, warmup=2).items():
        summary = Summary.of(times)
        print(f"{name:<58}{min(times):>9.2f}{summary.median_ms:>9.2f}{summary.p95_ms:>9.2f} ms")
    print()


def move_bytes() -> None:
    numbers = np.random.default_rng(0).standard_normal(SIZE // 4, np.float32)
    data, floats = numbers.tobytes(), numbers.tolist()
    rows: dict[str, Callable[[], Any]] = {}

    def add(what: str, text: bytes, theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> None:
        raw, instance = plain(text), Component(text).instantiate()
        if text is TENSORS:
            raw("run", KEEP)
            instance.call("run", KEEP)
        rows[f"{what}: wasmtime-py"] = lambda: raw(*theirs)
        rows[f"{what}: here"] = lambda: instance.call(*ours)

    for kind, raw, given, count in (("u8", data, data, SIZE), ("f32", floats, numbers, SIZE // 4)):
        text = LISTS.format(kind).encode()
        add(f"list<{kind}>, host to guest", text, ("take", raw), ("take", given))
        add(f"list<{kind}>, guest to host", text, ("give", count), ("give", count))
    add("wasi:nn, guest to host: a new tensor", TENSORS, ("run", NEW), ("run", NEW))
    add("wasi:nn, host to guest: a tensor's data", TENSORS, ("run", DATA), ("run", DATA))
    show(rows, 10)


def round_trips() -> None:
    nn = WasiNN({"signs": models_dir() / "signs" / "signs.onnx"})
    graph = nn.graph("signs")
    assert isinstance(graph, OnnxGraph)
    image = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    component = Component(guest_path("component").path, nn).instantiate()
    model = component.call(MODELS + "load-by-name", "signs")

    instance = Guest(guest_path("classify_nn").path, host=[nn]).instantiate()
    classifier = Classifier(instance)
    source, dims, out = map(classifier.buffer, (SIZE, 16, 128))
    dims.array(4, np.uint32)[:] = SHAPE
    compute, slot = instance.function("nn_compute"), classifier.load_graph("signs")

    def preview_1() -> Any:
        source.array(SHAPE, np.float32)[:] = image
        compute(slot, dims.pointer, 4, source.pointer, SIZE, out.pointer, 128)
        return out.array(32, np.float32).copy()

    rows: dict[str, Callable[[], Any]] = {
        "signs, without a guest": lambda: graph.session.run(None, {"input": image})[0],
        "signs, preview 1": preview_1,
        "signs, component: the host's array as a tensor": lambda: component.call(
            MODELS + "compute", model, [("input", image)]
        )[0][1],
        "signs, component: list<f32> in, tensor made by the guest": lambda: component.call(
            MODELS + "classify", model, "input", list(SHAPE), image
        ),
    }
    want, *others = (np.ravel(row()) for row in rows.values())
    assert all(np.allclose(want, other, atol=1e-4) for other in others)
    show(rows, 50)


if __name__ == "__main__":
    print(fingerprint(), "\n602,112 bytes each; least, median, 95th percentile\n")
    move_bytes()
    round_trips()
