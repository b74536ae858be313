"""Guests that attack the WASI-NN host. ``pytest tests/test_hostile.py -v`` reads as the list.

Each line says what the guest does and what it gets: a WASI-NN error code, or the exception that the
caller of the guest gets. Behind the end of a guest's memory lies memory that nobody may touch, so a
host that reads or writes there crashes. After each attack, the host still computes right.
"""

from __future__ import annotations

import functools
import importlib
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward import NN, Heap, forwarder
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_eras import as_ir
from test_wasinn import (
    BEYOND,
    CLASSIFIER,
    FUZZ,
    IDENTITY,
    PAGES,
    SIZE,
    Client,
    bare,
    encoded,
    external,
    floats,
    identity,
    onnx_model,
    resident_bytes,
    with_external_data,
)

from edgelab.aot import available_cores
from edgelab.errors import EdgelabError
from edgelab.runtime import Guest, Limits
from edgelab.wasinn import Errno, NNLimits, WasiNN

Outcome = Errno | str
OK = Errno.SUCCESS
MANY = 100_000
ATTACKS: list[Any] = []


def attack(line: str, *gets: str) -> Callable[[Any], Any]:
    """Add a function that attacks with the client it gets, and yields what comes of it."""

    def add(run: Callable[[Client], Iterator[Outcome]]) -> Callable[[Client], Iterator[Outcome]]:
        ATTACKS.append(pytest.param(run, set(gets), id=f"{line} -> {', '.join(gets)}"))
        return run

    return add


def caught(act: Callable[[], Any]) -> str:
    """Name what a call raises, which must be one of ours; or what it returns."""
    try:
        return str(act())
    except EdgelabError as error:
        return type(error).__name__


@pytest.fixture
def client() -> Client:
    return Client(WasiNN({"identity": IDENTITY, "klein": CLASSIFIER}, threads=1))


def computes_right() -> None:
    image = np.random.default_rng(1).random((1, 3, 8, 8), np.float32)
    other = Client(WasiNN(threads=1))
    context = other.context(CLASSIFIER)
    other.run(context, image)
    np.testing.assert_allclose(other.output(context), bare(CLASSIFIER, image)[0].ravel(), rtol=1e-5)


# --- pointers and lengths -------------------------------------------------------------------------


def at_each_pointer(client: Client, place: int, size: int) -> Iterator[Outcome]:
    """Pass a range in each role that a range can have."""
    put, describe, out = client.heap.put, client.describe, client.out
    graph = client.load(IDENTITY)
    context = client.handle("init_execution_context", graph)
    client.run(context, floats(1, 2))
    dims, data = put(struct.pack("<I", size // 4)), put(floats(1, 2).tobytes())
    table, name = put(struct.pack("<II", place, size)), put(b"identity")
    yield client("load", table, 1, 1, 0, out)  # a model
    yield client("load_by_name", place, size, out)
    yield client("load_by_name_with_config", place, size, name, 0, out)
    yield client("load_by_name_with_config", name, 8, place, size, out)
    yield client("set_input", context, 0, describe(dims, 1, 1, place, size))
    yield client("set_input", context, 0, describe(place, size // 4, 1, data, 4))
    yield client("get_output", context, 0, place, size, out)
    yield client("get_output_single", context, 0, place, size, out)
    if size:
        yield client("load", place, 1, 1, 0, out)  # the table of parts
        yield client("load", table, 1, 1, 0, place)  # where a handle goes
        yield client("load_by_name", name, 8, place)
        yield client("load_by_name_with_config", name, 8, name, 0, place)
        yield client("init_execution_context", graph, place)
        yield client("set_input", context, 0, place)  # a tensor
        yield client("get_output", context, 0, data, 8, place)  # how much was written
        yield client("get_output_single", context, 0, data, 8, place)


@attack("pointer + length is 7 in 32 bits, in each role", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield from at_each_pointer(client, BEYOND, 8)


@attack("a range that ends one byte behind memory, in each role", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield from at_each_pointer(client, SIZE - 3, 4)


@attack("no bytes at a pointer behind memory, in each role", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield from at_each_pointer(client, SIZE + 1, 0)
    yield from at_each_pointer(client, BEYOND, 0)


@attack("each struct and buffer at each unaligned address", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    def put(data: bytes, shift: int) -> int:
        return client.heap.put(bytes(shift) + data, 8) + shift

    model = identity(np.float64)
    for shift in range(8):
        out = put(bytes(4), shift)
        table = put(struct.pack("<II", put(model, shift), len(model)), shift)
        yield client("load", table, 1, 1, 0, out)
        graph = client.heap.number(out)
        name, config = put(b"klein", shift), put(b'{"threads": 1}', shift)
        yield client("load_by_name", name, 5, put(bytes(4), shift))
        yield client("load_by_name_with_config", name, 5, config, 14, put(bytes(4), shift))
        yield client("init_execution_context", graph, out)
        context, dims = client.heap.number(out), put(struct.pack("<I", 2), shift)
        values = struct.pack("<2d", shift, -shift)
        tensor = struct.pack("<IIIII", dims, 1, 2, put(values, shift), 16)
        yield client("set_input", context, 0, put(tensor, shift))
        yield client("compute", context)
        buffer = put(bytes(16), shift)
        yield client("get_output", context, 0, buffer, 16, out)
        assert client.heap.number(out) == 16
        assert client.memory.read(buffer, 16) == values
        for handle in (graph, graph + 1, graph + 2):
            yield client("unload", handle)


@attack("a model of 2 GB is claimed, or two parts whose sum is over 4 GB", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    yield from huge_models(client)


@attack("the same with a host that would take them", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield from huge_models(Client(WasiNN(limits=NNLimits(model_bytes=1 << 40))))


def huge_models(client: Client) -> Iterator[Outcome]:
    for lengths in ([2**31], [2**31, 2**31 + 8], [8, BEYOND], [BEYOND, 8]):
        parts = b"".join(struct.pack("<II", 64, length) for length in lengths)
        yield client("load", client.heap.put(parts), len(lengths), 1, 0, client.out)


@attack("a model of 0, 3 and 2^32 - 1 parts", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for count in (0, 3, 2**29, 2**31, BEYOND):
        yield client("load", 64, count, 1, 0, client.out)


# --- numbers --------------------------------------------------------------------------------------


@attack("tensor types 6 to 255", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    dims = client.heap.put(struct.pack("<I", 1))
    for code in range(6, 256):
        yield client("set_input", context, 0, client.describe(dims, 1, code, 64, 4))


@attack("encodings 12, 99 and 2^32 - 1", "INVALID_ENCODING")
def _(client: Client) -> Iterator[Outcome]:
    for encoding in (12, 99, 2**31, BEYOND):
        yield client.try_load(IDENTITY, encoding=encoding)


@attack("targets 4, 99 and 2^32 - 1", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for target in (4, 99, 2**31, BEYOND):
        yield client.try_load(IDENTITY, target=target)


@attack("dimensions whose product is 0 in 32 or 64 bits", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for shape in ((2**16, 2**16), (2**31, 2), (2**31, 2**31, 4), (2**30, 4), (2**31,) * 16):
        graph = client.load(identity(np.float32, (None,) * len(shape)))
        context = client.handle("init_execution_context", graph)
        dims = client.heap.put(struct.pack(f"<{len(shape)}I", *shape))
        for size in (0, 4, 16, BEYOND):
            tensor = client.describe(dims, len(shape), 1, 64, size)
            yield client("set_input", context, 0, tensor)


@attack("17, 2^30 and 2^31 dimensions", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    for rank in (17, 2**30, 2**31, BEYOND):
        yield client("set_input", context, 0, client.describe(64, rank, 1, 64, 4))


@attack("dimensions of 2^32 - 1 beside a zero", "SUCCESS", "RUNTIME_ERROR")
def _(client: Client) -> Iterator[Outcome]:
    """No bytes, as it says. ONNX Runtime takes what it can count in 64 bits."""
    for rank in (2, 3, 16):
        context = client.context(identity(np.float32, (None,) * rank))
        dims = client.heap.put(struct.pack(f"<{rank}I", 0, *[BEYOND] * (rank - 1)))
        yield client("set_input", context, 0, client.describe(dims, rank, 1, 64, 0))
        yield client("compute", context)


@attack("inputs and outputs number 1, 255 and 2^32 - 1", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    client.run(context, floats(1))
    tensor, _ = client.tensor(floats(1))
    for index in (1, 255, 2**31, BEYOND):
        yield client("set_input", context, index, tensor)
        yield client("get_output", context, index, 64, 64, client.out)


# --- buffers that overlap, move or change ---------------------------------------------------------


@attack("an output buffer of 0, 1 and n - 1 bytes", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    client.run(context, floats(1, 2))
    buffer = client.heap.put(b"\xee" * 16)
    for function in ("get_output", "get_output_single"):
        for room in (0, 1, 7):
            client.memory.write(client.out, bytes(4))
            yield client(function, context, 0, buffer, room, client.out)
            assert client.heap.number(client.out) == 8  # what it takes
            assert client.memory.read(buffer, 16) == b"\xee" * 16


@attack("the whole memory as output buffer", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    client.run(context, floats(1, 2))
    before = client.memory.read(12, SIZE - 12)
    yield client("get_output", context, 0, 0, SIZE, 8)
    assert client.memory.read(0, 12) == floats(1, 2).tobytes() + b"\x08\0\0\0"
    assert client.memory.read(12, SIZE - 12) == before


@attack("how much was written goes into the output buffer", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    context, buffer = client.context(IDENTITY), client.heap.room(64)
    client.run(context, floats(1, 2, 3))
    for place in (buffer - 2, buffer, buffer + 1, buffer + 8, buffer + 10):
        yield client("get_output", context, 0, buffer, 12, place)
        assert client.memory.read(buffer, 12) == floats(1, 2, 3).tobytes()


@attack("a tensor that is its own description, whose length is its dimension", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    context, place = client.context(identity(np.uint8)), client.heap.room(20)
    tensor = struct.pack("<IIIII", place + 16, 1, 3, place, 20)
    client.memory.write(place, tensor)
    yield client("set_input", context, 0, place)
    yield client("compute", context)
    assert client.output(context, dtype=np.uint8).tobytes() == tensor


@attack("dimensions inside the data that they describe", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    context, place = (
        client.context(identity(np.int32)),
        client.heap.put(struct.pack("<3i", 7, 3, 9)),
    )
    yield client("set_input", context, 0, client.describe(place + 4, 1, 4, place, 12))
    yield client("compute", context)
    assert client.output(context, dtype=np.int32).tolist() == [7, 3, 9]


@attack("the output over its input, the tensor, the dimensions", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    values = floats(1, 2, 3, 4, 5)
    for over in ("data", "tensor", "dims"):
        context = client.context(IDENTITY)
        tensor, data = client.tensor(values)
        place = {"data": data, "tensor": tensor, "dims": client.heap.number(tensor)}[over]
        client.run(context, values)
        yield client("set_input", context, 0, tensor)
        for _ in range(2):
            yield client("compute", context)
            yield client("get_output", context, 0, place, 20, client.out)
            assert client.memory.read(place, 20) == values.tobytes()
        if over != "data":  # what was the tensor is now something else
            assert client("set_input", context, 0, tensor) is not OK


@attack("a handle that is written over the model and the table of parts", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    for over in ("model", "table"):
        model = client.heap.put(IDENTITY)
        table = client.heap.put(struct.pack("<II", model, len(IDENTITY)))
        place = {"model": model, "table": table}[over]
        yield client("load", table, 1, 1, 0, place)
        context = client.handle("init_execution_context", client.heap.number(place))
        client.run(context, floats(4))
        assert client.output(context).tolist() == [4]


@attack("a model's bytes change after load", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    model = client.heap.put(CLASSIFIER)
    table = client.heap.put(struct.pack("<II", model, len(CLASSIFIER)))
    yield client("load", table, 1, 1, 0, client.out)
    client.memory.write(model, b"\xff" * len(CLASSIFIER))
    context = client.handle("init_execution_context", client.heap.number(client.out))
    client.memory.write(model, bytes(len(CLASSIFIER)))
    image = np.random.default_rng(2).random((1, 3, 8, 8), np.float32)
    client.run(context, image)
    np.testing.assert_allclose(client.output(context), bare(CLASSIFIER, image)[0][0], rtol=1e-5)


@attack("memory grows between set_input, compute and get_output", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    tensor, data = client.tensor(floats(1, 2))
    for pages in (1, 100, 7000):
        yield client("set_input", context, 0, tensor)
        client.instance.call("grow", pages)
        client.memory.write(data, floats(pages, 2).tobytes())
        yield client("compute", context)
        client.instance.call("grow", pages // 10)
        end = len(client.memory)
        yield client("get_output", context, 0, end - 8, 8, end - 12)  # in the new part
        assert client.memory.array(end - 8, 2, np.float32).tolist() == [pages, 2]


# --- handles and order ----------------------------------------------------------------------------


@attack("all calls in reverse order", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for handle in (0, 1):
        for name in ("unload", "fini_single", "get_output_single", "get_output", "compute_single",
                     "compute", "set_input", "init_execution_context"):  # fmt: skip
            yield client(name, handle, *[64] * (len(NN[name].partition("->")[0]) - 1))
    context = client.context(IDENTITY)
    yield client("get_output", context, 0, 64, 64, client.out)
    yield client("compute", context)


@attack("a graph is used after unload", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    graph = client.load(IDENTITY)
    assert client("unload", graph) == OK
    yield client("init_execution_context", graph, client.out)
    yield client("unload", graph)


@attack("a context is used after its graph was unloaded", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    graph = client.load(IDENTITY)
    context = client.handle("init_execution_context", graph)
    client.run(context, floats(1))
    assert client("unload", graph) == OK
    for name in ("compute", "compute_single", "fini_single"):
        yield client(name, context)
    yield client("get_output", context, 0, 64, 64, client.out)
    yield client.set_input(context, floats(1))


@attack("a graph's handle as a context, and a context's as a graph", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    graph = client.load(IDENTITY)
    context = client.handle("init_execution_context", graph)
    yield client("compute", graph)
    yield client("init_execution_context", context, client.out)
    yield client("unload", context)


@attack("handles of another instance of the same guest", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    client.run(context, floats(1))
    thief = Client(client.nn)
    for handle in range(4):
        for name in ("compute", "compute_single", "fini_single", "unload"):
            yield thief(name, handle)
        yield thief("get_output", handle, 0, 64, 64, thief.out)
        yield thief("init_execution_context", handle, thief.out)
    assert client.output(context).tolist() == [1]


@attack("two inputs are set, finished, and only one is set again", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    add = helper.make_node("Add", ["a", "b"], ["y"])
    values = [(name, TensorProto.FLOAT, ("n",)) for name in "ab"]
    model = encoded(onnx_model([add], [*values], [("y", TensorProto.FLOAT, ("n",))]))
    context = client.context(model)
    for index in (0, 1):  # unaligned: the host keeps copies, which fini_single frees
        tensor, _ = client.tensor(floats(1, 2), shift=1)
        assert client("set_input", context, index, tensor) == OK
    assert client("compute", context) == client("fini_single", context) == OK
    assert client.set_input(context, floats(1, 2)) == OK
    yield client("compute", context)
    yield client("compute_single", context)


@attack("compute_single again, after a set_input that failed", "END_OF_SEQUENCE")
def _(client: Client) -> Iterator[Outcome]:
    context = client.context(IDENTITY)
    assert client.set_input(context, floats(1)) == OK
    assert client("compute_single", context) == OK
    yield client("compute_single", context)
    assert client.set_input(context, floats(1), index=1) == Errno.INVALID_ARGUMENT
    yield client("compute_single", context)
    assert client.set_input(context, np.zeros(1)) == Errno.INVALID_ARGUMENT
    yield client("compute_single", context)


# --- names, configurations, files -----------------------------------------------------------------


def by_name(client: Client, name: bytes) -> Errno:
    return client("load_by_name", client.heap.put(name), len(name), client.out)


def with_config(client: Client, config: bytes) -> Errno:
    client.heap = Heap(client.instance)
    places = (client.heap.put(b"klein"), 5, client.heap.put(config), len(config))
    return client("load_by_name_with_config", *places, client.out)


@attack("a model's name of 5000 bytes and of 4 GB", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    for length in (4097, 5000, BEYOND):
        yield client("load_by_name", 0, length, client.out)
        yield client("load_by_name_with_config", 0, length, 0, 0, client.out)


@attack("a model's name that is no UTF-8", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for name in (b"\xff\xfe", b"klein\xc3", b"\xed\xa0\x80"):
        yield by_name(client, name)


@attack("a model's name that is a path, or has a NUL, or is almost right", "NOT_FOUND")
def _(client: Client) -> Iterator[Outcome]:
    file = str(Path(onnx.__file__)).encode()  # it exists
    for name in (b"../../x", file, b"/etc/passwd", b"file:///etc/passwd", b"klein\0", b"\0klein",
                 b"klein/../identity", b"Klein", b"klein ", b"", b"\0" * 4096):  # fmt: skip
        yield by_name(client, name)


@attack("a configuration of 64 MB", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    client.instance.call("grow", 1024)
    name = client.heap.put(b"klein")
    yield client("load_by_name_with_config", name, 5, 0, 64 << 20, client.out)


@attack("a configuration that is nested 100,000 deep", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    yield with_config(client, b"[" * MANY)
    yield with_config(client, b'{"a":' * MANY)


@attack("a configuration that is nested 10,000 deep", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for text in (b"[" * 60_000, b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000,
                 b'{"a":' * 10_000 + b"1" + b"}" * 10_000):  # fmt: skip
        yield with_config(client, text)


@attack("a configuration that is no JSON, or no JSON object", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for text in (b"x", b"{", b"\0", b"\xff\xfe", b"\xff" * 999, b"[]", b"1", b"null", b'"threads"',
                 b'{"threads": 1}}', b"{'threads': 1}", b"{}\0", b"9" * 5000):  # fmt: skip
        yield with_config(client, text)


@attack("a configuration with impossible threads", "INVALID_ARGUMENT")
def _(client: Client) -> Iterator[Outcome]:
    for value in ("0", "-1", "1e9", "1.5", "NaN", "Infinity", "true", '"1"', "[1]", "257", "2e400",
                  "9" * 4000, "9" * 9000, "-" + "9" * 4000):  # fmt: skip
        yield with_config(client, b'{"threads": ' + value.encode() + b"}")


@attack("a configuration of 10,000 strange keys", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    keys = ", ".join(f'"\\ud800{number}": {number}' for number in range(3000))
    yield with_config(client, b"{" + keys.encode() + b"}")
    yield with_config(client, b"{" + b", ".join([b'"a": 1'] * 8000) + b"}")
    assert all(len(message) < 1000 for message in client.nn.errors)


@attack("a configuration with 256 threads, for 16 models", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    process = importlib.import_module("psutil").Process()
    before, cores = process.num_threads(), available_cores()
    for _ in range(16):
        yield with_config(client, b'{"threads": 256}')
    assert process.num_threads() - before <= 16 * cores


@attack("a model that makes 4 TB of output", "RUNTIME_ERROR")
def _(client: Client) -> Iterator[Outcome]:
    fill = helper.make_node("ConstantOfShape", ["x"], ["y"])
    inputs, outputs = ("x", TensorProto.INT64, (1,)), ("y", TensorProto.FLOAT, ("n",))
    context = client.context(encoded(onnx_model([fill], [inputs], [outputs])))
    for size in (2**40, 2**62, 2**63 - 1, -1):
        assert client.set_input(context, np.array([size])) == OK
        yield client("compute", context)
    assert client.set_input(context, np.array([2])) == OK
    assert client("compute", context) == OK


@attack("a model whose metadata is wrong about its images", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    """The host looks into the tensors of models that say what they want."""
    ones, nan = "[1, 1, 1]", float("nan")
    shapes = ((), (0,), (3,), (2, 2), (1, 3, 0, 0), (1, 3, 1, 1), (0, 3, 40, 40), (1, 3, 40, 40),
              (1, 40, 40, 3), (2, 3, 33, 70), (1, 1, 1, 5000), (1, 1, 1, 1, 1, 1))  # fmt: skip
    for dtype in (np.float16, np.float32, np.float64, np.uint8, np.int32, np.int64):
        for layout, mean in (("NCHW", ones), ("NHWC", "[0]"), ("NCHW", "[1e-9, 1, 1, 1]")):
            model = onnx.load_from_string(identity(dtype, (None,) * 4))
            facts = {"layout": layout, "mean": mean, "std": mean, "output": "probabilities"}
            helper.set_model_props(model, {**facts, "color": "BGR", "name": "\x1b[2J" * 9})
            for shape in shapes:
                for values in (model.graph.input[0], model.graph.output[0]):
                    kind = values.type.tensor_type.elem_type
                    fresh = helper.make_tensor_value_info(values.name, kind, (None,) * len(shape))
                    values.CopyFrom(fresh)
                client = Client(client.nn)
                context = client.context(encoded(model))
                for value in (0, 255, nan, np.inf, -1e30):
                    with np.errstate(all="ignore"), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        yield client.set_input(context, np.full(shape, value).astype(dtype))
                        yield client("compute", context)
                        str(client.nn.explain(client.instance))


@attack("terminal commands in names", "INVALID_ENCODING", "INVALID_ARGUMENT", "NOT_FOUND")
def _(client: Client) -> Iterator[Outcome]:
    """They must not come out of the host's messages, which a person may print."""
    evil = "\x1b[2J\x9b\u202e\n"
    node = helper.make_node(evil, ["x"], ["y"], name=evil, domain="local")
    inputs, outputs = ("x", TensorProto.FLOAT, ("n",)), ("y", TensorProto.FLOAT, ("n",))
    yield client.try_load(encoded(onnx_model([node], [inputs], [outputs])))
    node = helper.make_node("Identity", [evil], ["y"], name=evil)
    inputs = (evil, TensorProto.FLOAT, (evil,))
    context = client.context(encoded(onnx_model([node], [inputs], [outputs])))
    yield client("compute", context)
    yield client.set_input(context, np.zeros((1, 1), np.float32))
    yield client.set_input(context, np.zeros(1))
    yield by_name(client, evil.encode())
    yield with_config(client, f'{{"threads": "{evil}"}}'.encode())
    assert all(message.isprintable() for message in client.nn.errors)


@attack("weights in ../secret or /etc/passwd, at each place of a model", "INVALID_ENCODING")
def _(client: Client) -> Iterator[Outcome]:
    for _, model in with_external_data():
        yield client.try_load(encoded(model))


@attack("weights in a second part of the model", "INVALID_ENCODING")
def _(client: Client) -> Iterator[Outcome]:
    for path in ("weights", "../weights", "/etc/passwd", "*/_ORT_MEM_ADDR_/*"):
        model = onnx.load_from_string(CLASSIFIER)
        external(model.graph.initializer[0], path)
        yield client.try_load(encoded(model), bytes(1000))
        yield client.try_load(encoded(model))


@attack("a model of nothing but millions of empty fields", "INVALID_ENCODING")
def _(client: Client) -> Iterator[Outcome]:
    """To walk through them takes a second for each 2 MB, and there can be 512 MB."""
    client.instance.call("grow", 4096)
    model = b"\x08\x09" * (64 << 20)
    client.memory.write(SIZE, model)
    table = client.heap.put(struct.pack("<II", SIZE, len(model)))
    yield client("load", table, 1, 1, 0, client.out)


# --- a guest without end --------------------------------------------------------------------------

LOOPS = """
    (func (export "forever") (loop (br 0)))
    (func (export "compute_then_forever") (param i32)
      (drop (call $compute (local.get 0))) (loop (br 0)))
    (func (export "compute_forever") (param i32)
      (loop (drop (call $compute (local.get 0))) (br 0)))
    (func $deep (export "deeper_and_deeper") (param i32)
      (drop (call $compute (local.get 0))) (call $deep (local.get 0)))
    (func (export "fail_and_trap") (param i32)
      (drop (call $compute (local.get 0))) unreachable)"""


def looping(limits: Limits) -> Client:
    text = forwarder({"wasi_ephemeral_nn": NN}, PAGES, LOOPS)
    nn = WasiNN({"identity": IDENTITY}, threads=1)
    return Client(nn, limits, Guest(text, host=[nn]))


BRIEF = Limits(seconds=0.1)


@attack("never returns, and never calls the host", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    yield caught(lambda: looping(BRIEF).instance.call("forever"))


@attack("never returns after a call of the host", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    client = looping(BRIEF)
    context = client.context(IDENTITY)
    assert client.set_input(context, floats(1)) == OK
    yield caught(lambda: client.instance.call("compute_then_forever", context))
    assert client.instance.state[client.nn].executions[context].computed


@attack("calls the host again and again", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    client = looping(BRIEF)
    context = client.context(IDENTITY)
    assert client.set_input(context, floats(1)) == OK
    yield caught(lambda: client.instance.call("compute_forever", context))
    yield caught(lambda: looping(BRIEF).instance.call("compute_forever", BEYOND))


def loop_model(count: int | None) -> bytes:
    """A model that copies its input `count` times, or for ever."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, ("n",)),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, ("n",)),
        ],
    )
    loop = helper.make_node("Loop", ["" if count is None else "m", "go", "x"], ["y"], body=body)
    weights: dict[str, NDArray[Any]] = {"go": np.array(True)}
    if count is not None:
        weights["m"] = np.array(count)
    vector = ("n",)
    return encoded(
        onnx_model(
            [loop], [("x", TensorProto.FLOAT, vector)], [("y", TensorProto.FLOAT, vector)], weights
        )
    )


@attack("a model that computes for longer than the guest may", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    client = looping(BRIEF)
    context = client.context(loop_model(500_000))
    assert client.set_input(context, floats(1)) == OK
    yield caught(lambda: client.instance.call("compute_then_forever", context))


@attack("a model that computes without end", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    yield from endless(loop_model(None))


@attack("the same in OpenVINO, in a process of its own", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    yield from endless(*as_ir(loop_model(None)))


def endless(*parts: bytes) -> list[str]:
    """Compute with a model, in a thread that the test can give up; say what came of it."""
    client = looping(BRIEF)
    assert client.try_load(*parts) == OK, client.nn.errors
    context = client.handle("init_execution_context", client.heap.number(client.out))
    assert client.set_input(context, floats(1)) == OK
    got: list[str] = []
    call = functools.partial(client.instance.call, "compute_then_forever", context)
    thread = threading.Thread(target=lambda: got.append(caught(call)), daemon=True)
    thread.start()
    thread.join(100)
    return got or ["no end"]


@attack("calls deeper and deeper, the host at each step", "GuestError")
def _(client: Client) -> Iterator[Outcome]:
    yield caught(lambda: looping(Limits()).instance.call("deeper_and_deeper", 0))


@attack("traps after an error of the host, and is used again", "GuestError")
def _(client: Client) -> Iterator[Outcome]:
    client = looping(Limits())
    yield caught(lambda: client.instance.call("fail_and_trap", 99))
    yield caught(lambda: client("compute", 99))


# --- a guest of another kind ----------------------------------------------------------------------


def odd_guest(text: str, limits: Limits | None = None) -> Any:
    """What ``go`` returns in a module that imports ``load_by_name`` as ``$f``."""
    imported = (
        '(import "wasi_ephemeral_nn" "load_by_name" (func $f (param i32 i32 i32) (result i32)))'
    )
    guest = Guest(f"(module {imported} {text})".encode(), host=[WasiNN({"": IDENTITY})])
    return Errno(guest.instantiate(limits=limits).call("go")).name


CALL = "(call $f (i32.const 0) (i32.const 0) (i32.const 0))"
GO = f'(func (export "go") (result i32) {CALL})'
FROM_START = f"""(global $got (mut i32) (i32.const -1))
    (func $s (global.set $got {CALL})) (start $s)
    (func (export "go") (result i32) (global.get $got))"""


@attack("calls from its start function", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield odd_guest(f'(memory (export "memory") 1) {FROM_START}')
    yield odd_guest(FROM_START)


@attack("traps in its start function after a call", "GuestError")
def _(client: Client) -> Iterator[Outcome]:
    text = f'(memory (export "memory") 1) (func $s (drop {CALL}) unreachable) (start $s)'
    yield caught(lambda: odd_guest(text))


@attack("calls from its constructors, when memory is there", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    yield odd_guest(
        f"""(memory (export "memory") 1) (global $got (mut i32) (i32.const -1))
        (func (export "_initialize") (global.set $got {CALL}))
        (func (export "go") (result i32) (global.get $got))"""
    )


@attack("exports no memory, or something else by that name", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    yield odd_guest(GO)
    yield odd_guest(f"(memory 1) {GO}")
    yield odd_guest(f'(memory (export "mem") 1) {GO}')
    yield odd_guest(f'(memory 1) (func (export "memory")) {GO}')
    yield odd_guest(f'(memory 1) (global (export "memory") i32 (i32.const 0)) {GO}')
    yield odd_guest(f'(memory 1) (table (export "memory") 1 funcref) {GO}')
    yield odd_guest(f'(memory (export "memory") 0) {GO}')


@attack("a memory of 64 bits, two memories, a shared memory", "GuestError")
def _(client: Client) -> Iterator[Outcome]:
    yield caught(lambda: odd_guest(f'(memory (export "memory") i64 1) {GO}'))
    yield caught(lambda: odd_guest(f'(memory (export "memory") 1) (memory 1) {GO}'))
    yield caught(lambda: odd_guest(f'(memory (export "memory") 1 1 shared) {GO}'))


@attack("a memory of 2 GB where 64 MB are allowed", "LimitError")
def _(client: Client) -> Iterator[Outcome]:
    limits = Limits(memory_bytes=64 << 20)
    yield caught(lambda: odd_guest(f'(memory (export "memory") 32768) {GO}', limits))


@attack("grows to 2 GB where 64 MB are allowed", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    client = Client(WasiNN(), Limits(memory_bytes=64 << 20))
    assert client.instance.call("grow", 32768) == -1
    yield client("load", 1 << 30, 1, 1, 0, client.out)


@attack("tensors at 2^31 and at the very end of 4 GB", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    """Pointers beyond 2^31 are negative numbers to some hosts."""
    client = Client(WasiNN(threads=1), Limits(memory_bytes=1 << 32))
    client.instance.call("grow", 65536 - PAGES)
    context, values = client.context(IDENTITY), floats(1, 2)
    for place in (2**31 - 4, 2**31, 2**32 - 40):
        client.memory.write(place, values.tobytes() + b"\2\0\0\0")
        tensor = client.describe(place + 8, 1, 1, place, 8)
        yield client("set_input", context, 0, tensor)
        yield client("compute", context)
        yield client("get_output", context, 0, place + 32, 8, place + 28)
        assert client.memory.array(place + 32, 2, np.float32).tolist() == [1, 2]


@attack("exports the host's functions as its own", "SUCCESS", "INVALID_ARGUMENT", "MISSING_MEMORY")
def _(client: Client) -> Iterator[Outcome]:
    text = '(memory (export "memory") 1) (export "go" (func $f))'
    imported = (
        '(import "wasi_ephemeral_nn" "load_by_name" (func $f (param i32 i32 i32) (result i32)))'
    )
    guest = Guest(f"(module {imported} {text})".encode(), host=[WasiNN({"": IDENTITY})])
    instance = guest.instantiate()
    instance.memory.write(8, b"\xff")
    for arguments in ((0, 0, 0), (8, 1, 0), (0, 0, BEYOND)):
        yield Errno(instance.call("go", *arguments))


class Reentrant:
    """A backend that calls the guest back while the guest waits for it."""

    def __init__(self, graph: Any) -> None:
        self.inputs, self.outputs, self.metadata = graph.inputs, graph.outputs, graph.metadata
        self.back: Callable[[], Any] = lambda: None

    def context(self) -> Any:
        return self

    def bind_input(self, *_: Any) -> None:
        pass

    def compute(self) -> None:
        self.back()

    def stop(self) -> None:
        pass

    def output(self, index: int) -> NDArray[Any]:
        return floats(1)


@attack("is called back while it waits for the host", "RUNTIME_ERROR")
def _(client: Client) -> Iterator[Outcome]:
    backend = Reentrant(client.nn.graph("identity"))
    client.nn.add_model("back", backend)
    assert by_name(client, b"back") == OK
    context = client.handle("init_execution_context", client.heap.number(client.out))
    assert client.set_input(context, floats(1)) == OK
    backend.back = lambda: client("unload", 0)
    yield client("compute", context)
    assert "already running a call" in client.nn.errors[-1]
    backend.back = lambda: None
    assert client("compute", context) == OK


@attack("two threads call one instance", "SUCCESS", "GuestError")
def _(client: Client) -> Iterator[Outcome]:
    context, inside, go_on = client.context(IDENTITY), threading.Event(), threading.Event()
    backend = Reentrant(client.nn.graph("identity"))
    client.nn.add_model("slow", backend)
    assert by_name(client, b"slow") == OK
    context = client.handle("init_execution_context", client.heap.number(client.out))
    assert client.set_input(context, floats(1)) == OK

    def wait() -> None:
        inside.set()
        go_on.wait(30)

    backend.back, got = wait, []
    thread = threading.Thread(target=lambda: got.append(client("compute", context)))
    thread.start()
    assert inside.wait(30)
    for name in ("compute", "unload", "fini_single"):
        yield caught(lambda name=name: client(name, context))  # type: ignore[misc]
    go_on.set()
    thread.join(30)
    yield from got


# --- again and again ------------------------------------------------------------------------------


def loop(name: str) -> str:
    """A function that makes one call many times, and counts the successes."""
    arity = len(NN[name].partition("->")[0])
    passed = " ".join(f"(local.get {k + 1})" for k in range(arity))
    return f"""(func (export "many_{name}") (param $times i32) (param {"i32 " * arity}) (result i32)
      (local $good i32)
      (loop $again
        (local.set $good (i32.add (local.get $good) (i32.eqz (call ${name} {passed}))))
        (br_if $again (local.tee $times (i32.sub (local.get $times) (i32.const 1)))))
      (local.get $good))"""


def rounds(name: str, parameters: str, *calls: str) -> str:
    """A function that makes some calls many times, and counts the successes."""
    given = " ".join(f"(param ${each} i32)" for each in parameters.split())
    counted = "".join(
        f"(local.set $good (i32.add (local.get $good) (i32.eqz (call {call}))))" for call in calls
    )
    return f"""(func (export "{name}") (param $times i32) {given} (result i32) (local $good i32)
      (loop $again {counted}
        (br_if $again (local.tee $times (i32.sub (local.get $times) (i32.const 1)))))
      (local.get $good))"""


MANY_TEXT = forwarder(
    {"wasi_ephemeral_nn": NN},
    PAGES,
    " ".join(map(loop, NN))
    + rounds(
        "infer", "context tensor buffer room out",
        "$set_input (local.get $context) (i32.const 0) (local.get $tensor)",
        "$compute (local.get $context)",
        "$get_output (local.get $context) (i32.const 0) (local.get $buffer) (local.get $room)"
        " (local.get $out)",
    )
    + rounds(
        "load_and_unload", "table out",
        "$load (local.get $table) (i32.const 1) (i32.const 1) (i32.const 0) (local.get $out)",
        "$unload (i32.load (local.get $out))",
    )
    + rounds(
        "name_and_unload", "name size context out",
        "$load_by_name (local.get $name) (local.get $size) (local.get $out)",
        "$init_execution_context (i32.load (local.get $out)) (local.get $context)",
        "$unload (i32.load (local.get $out))",
    ),
)  # fmt: skip
FLAT = 8 << 20
"""Bytes by which resident memory may differ: an allocator's slack, and far less than a leak."""


def persistent() -> Client:
    nn = WasiNN({"identity": IDENTITY, "klein": CLASSIFIER}, threads=1)
    return Client(nn, Limits(seconds=600), Guest(MANY_TEXT, host=[nn]))


def stays_flat(act: Callable[[int], Any], times: int = MANY) -> Any:
    """Do something some times, and then many times; it must not take more memory for that."""
    act(max(times // 20, 100))
    before = resident_bytes()
    result = act(times)
    grown = resident_bytes() - before
    print(f"resident memory: {before:,} bytes, {grown:+,} after {times:,} times")
    assert grown < FLAT, f"{grown:,} bytes more after {times:,} times"
    return result


@attack("100,000 loads without unload", "SUCCESS", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    client = persistent()
    model = client.heap.put(IDENTITY)
    table = client.heap.put(struct.pack("<II", model, len(IDENTITY)))
    loaded = stays_flat(
        lambda times: client.instance.call("many_load", times, table, 1, 1, 0, client.out)
    )
    assert loaded == 0  # the warm-up took all 16
    assert len(client.instance.state[client.nn].graphs) == 16
    yield client("unload", 3)
    yield client("load", table, 1, 1, 0, client.out)
    yield client("load", table, 1, 1, 0, client.out)


@attack("100,000 contexts", "SUCCESS", "TOO_LARGE")
def _(client: Client) -> Iterator[Outcome]:
    client = persistent()
    graph = client.load(IDENTITY)
    stays_flat(
        lambda times: client.instance.call("many_init_execution_context", times, graph, client.out)
    )
    assert len(client.instance.state[client.nn].executions) == 64
    yield client("init_execution_context", graph, client.out)
    yield client("unload", graph)
    yield client("init_execution_context", client.load(IDENTITY), client.out)


@attack("100,000 errors, each with a name of 4096 bytes", "NOT_FOUND")
def _(client: Client) -> Iterator[Outcome]:
    client = persistent()
    name = client.heap.put(b"x" * 4000 + "\U000e0001".encode() * 24)  # quoted, ten characters each
    stays_flat(
        lambda times: client.instance.call("many_load_by_name", times, name, 4096, client.out)
    )
    assert len(client.nn.errors) == 32
    yield by_name(client, b"nobody")


@attack("1000 instances that end with models loaded", "SUCCESS")
def _(client: Client) -> Iterator[Outcome]:
    guest = Guest(MANY_TEXT, host=[client.nn])

    def live(times: int) -> None:
        for _ in range(times):
            instance = guest.instantiate()
            instance.memory.write(64, b"klein")
            assert instance.call("many_load_by_name", 16, 64, 5, 128) == 16
            assert instance.call("many_init_execution_context", 16, 0, 128) == 16

    stays_flat(live, 1000)
    yield by_name(client, b"klein")


@pytest.mark.parametrize(("run", "gets"), ATTACKS)
def test_attack(client: Client, run: Callable[[Client], Any], gets: set[str]) -> None:
    got = {each.name if isinstance(each, Errno) else each for each in run(client)}
    assert got == gets, client.nn.errors
    computes_right()


# --- nothing is left behind -----------------------------------------------------------------------


def test_memory_is_flat_over_100_000_inferences() -> None:
    client = persistent()
    context = client.context(CLASSIFIER)
    image = np.random.default_rng(3).random((1, 3, 8, 8), np.float32)
    tensor, _ = client.tensor(image)
    buffer = client.heap.room(20)
    good = stays_flat(
        lambda n: client.instance.call("infer", n, context, tensor, buffer, 20, client.out)
    )
    assert good == 3 * MANY
    want = bare(CLASSIFIER, image)[0][0]
    np.testing.assert_allclose(client.memory.array(buffer, 5, np.float32), want, rtol=1e-5)


def test_memory_is_flat_over_100_000_loads_of_a_named_model() -> None:
    client = persistent()
    name = client.heap.put(b"klein")
    good = stays_flat(
        lambda n: client.instance.call("name_and_unload", n, name, 5, client.out + 4, client.out)
    )
    assert good == 3 * MANY


def test_memory_is_flat_over_loads_of_a_model() -> None:
    """ONNX Runtime takes about half a millisecond to load even the smallest."""
    client = persistent()
    model, times = client.heap.put(IDENTITY), 5000 * FUZZ
    table = client.heap.put(struct.pack("<II", model, len(IDENTITY)))
    good = stays_flat(
        lambda n: client.instance.call("load_and_unload", n, table, client.out), times
    )
    assert good == 2 * times
