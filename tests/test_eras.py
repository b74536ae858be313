"""Guests built with each published crate of WASI-NN, all doing the same through their crate's API.

``pytest tests/test_eras.py -v -k test_function`` reads as the table of crates, functions and
backends; ``-k test_failure`` as that of crates and errors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward import WASI_NN, WASMEDGE
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_wasinn import CLASSIFIER, IDENTITY, Client, bare, encoded, floats, identity, onnx_model

from edgelab.errors import GuestError
from edgelab.runtime import Guest, Instance
from edgelab.toolchain import TARGET, Toolchain
from edgelab.wasinn import Encoding, Era, Errno, NNLimits, WasiNN

SOURCES = Path(__file__).parent / "guests"
# As the guests number them, which is not how each crate does.
KINDS = [np.dtype(name) for name in ("f2", "f4", "f8", "u1", "i4", "i8")]
OLD_KINDS = [np.dtype(name) for name in ("f2", "f4", "u1", "i4")]

# What each era's own sources say about its codes.
TEXT_2021 = {
    1: "Caller module passed an invalid argument.",
    2: "Caller module is missing a memory export.",
    3: "Device or resource busy.",
}
UPPER = {1: "INVALID_ARGUMENT", 2: "INVALID_ENCODING", 3: "MISSING_MEMORY", 4: "BUSY",
         5: "RUNTIME_ERROR"}  # fmt: skip
CAMEL_0_4 = {code: name.title().replace("_", "") for code, name in UPPER.items()}
CAMEL = {**CAMEL_0_4, 6: "UnsupportedOperation", 7: "TooLarge", 8: "NotFound"}
CAMEL_WASMEDGE = {**CAMEL, 100: "EndOfSequence", 101: "ContextFull", 102: "PromptTooLong",
                  103: "ModelNotFound"}  # fmt: skip

# What went wrong → the code for it, or the nearest that the era has.
CODES_2021 = {"invalid argument": 1, "invalid encoding": 1, "missing memory": 2,
              "runtime error": 3, "unsupported operation": 1, "too large": 2}  # fmt: skip
CODES_0_4 = {"invalid argument": 1, "invalid encoding": 2, "missing memory": 3,
             "runtime error": 5, "unsupported operation": 5, "too large": 3}  # fmt: skip
CODES = {**CODES_0_4, "unsupported operation": 6, "too large": 7, "not found": 8}
CODES_WASMEDGE = {**CODES, "end of sequence": 100}


@dataclass(frozen=True)
class Crate:
    """A published crate, and what a guest that is built with it expects."""

    era: Era
    told: Era  # as far as the module alone tells
    functions: tuple[str, ...]
    kinds: list[np.dtype[Any]]
    codes: Mapping[str, int]
    words: Mapping[int, str]
    form: str  # how the crate prints an error

    def prints(self, code: int) -> str:
        return self.form.format(code=code, words=self.words[code])


FIRST = ("load", "init_execution_context", "set_input", "compute", "get_output")
NAMED, ALL = (*FIRST, "load_by_name"), (*WASI_NN, *WASMEDGE)
_2021, _0_4, _0_5, _0_6 = Era.WITX_2021, Era.CRATE_0_4, Era.CRATE_0_5, Era.CRATE_0_6
LIBRARY, GENERATED = "Error {{ code: {code}, message: {words!r} }}", "code: {code}, name: {words!r}"
ENUM = "BackendError({words})"

CRATES = {
    "wasi_nn_0_1": Crate(_2021, _2021, FIRST, OLD_KINDS, CODES_2021, TEXT_2021, LIBRARY),
    "wasi_nn_0_2": Crate(_0_4, _0_4, FIRST, OLD_KINDS, CODES_0_4, UPPER, GENERATED),
    "wasi_nn_0_3": Crate(_0_4, _0_4, FIRST, OLD_KINDS, CODES_0_4, UPPER, GENERATED),
    "wasi_nn_0_4": Crate(_0_4, _0_4, FIRST, OLD_KINDS, CODES_0_4, CAMEL_0_4, ENUM),
    "wasi_nn_0_5": Crate(_0_5, _0_6, NAMED, OLD_KINDS, CODES, CAMEL, ENUM),
    "wasi_nn_0_6": Crate(_0_6, _0_6, NAMED, KINDS, CODES, CAMEL, ENUM),
    "wasmedge_0_7": Crate(_0_6, _0_6, ALL, KINDS, CODES_WASMEDGE, CAMEL_WASMEDGE, ENUM),
    "wasmedge_0_8": Crate(_0_6, _0_6, ALL, KINDS, CODES_WASMEDGE, CAMEL_WASMEDGE, ENUM),
}


@pytest.fixture(scope="module")
def guests(rust: Toolchain) -> dict[str, bytes]:
    """The crates' guests, built together."""
    build = ("build", "--release", "--locked", "--workspace", "--target", TARGET)
    # Without network, cargo tries for long: so what is here first.
    for flags in ((*build, "--offline"), build):
        done = rust.run(flags, SOURCES, title="cargo builds a guest for each crate of WASI-NN")
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout
    folder = rust.target_dir(SOURCES) / TARGET / "release"
    return {name: (folder / f"{name}.wasm").read_bytes() for name in CRATES}


class Recorder:
    """A host that notes each code which goes to the guest."""

    def __init__(self, nn: WasiNN) -> None:
        self.nn, self.name = nn, nn.name
        self.codes: list[int] = []

    def functions(self) -> Mapping[str, tuple[str, Callable[..., int]]]:
        def noting(function: Callable[..., int]) -> Callable[..., int]:
            def answer(instance: Instance, *arguments: int) -> int:
                self.codes.append(int(function(instance, *arguments)))
                return self.codes[-1]

            return answer

        found = self.nn.functions().items()
        return {name: (signature, noting(function)) for name, (signature, function) in found}


@dataclass(frozen=True)
class Model:
    """A classifier in one format, with an image, and what a bare runtime makes of it."""

    parts: tuple[bytes, ...]
    encoding: int
    image: NDArray[np.float32]
    want: NDArray[np.float32]


class Program:
    """A guest of one crate. Its calls return what they are for, or -1."""

    def __init__(self, wasm: bytes, nn: WasiNN) -> None:
        self.nn, self.host = nn, Recorder(nn)
        self.instance = Guest(wasm, host=[self.host]).instantiate()
        self.memory = self.instance.memory

    def put(self, data: bytes) -> int:
        place: int = self.instance.call("alloc", len(data) + 8)
        self.memory.write(place, data)
        return place

    def __call__(self, name: str, *arguments: int) -> int:
        result: int = self.instance.call(name, *arguments)
        return result

    def must(self, name: str, *arguments: int) -> int:
        result = self(name, *arguments)
        assert result >= 0, (self.said(), self.nn.errors)
        return result

    def said(self) -> str:
        """The last error in the crate's own words."""
        place = self.put(bytes(1000))
        return self.memory.read(place, self.must("said", place, 1000)).decode()

    def try_load(self, *parts: bytes, encoding: int = Encoding.ONNX, target: int = 0) -> int:
        placed = [number for part in parts for number in (self.put(part), len(part))]
        return self("load", *placed, *[0] * (4 - len(placed)), encoding, target)

    def load(self, *parts: bytes, encoding: int = Encoding.ONNX) -> int:
        graph = self.try_load(*parts, encoding=encoding)
        assert graph >= 0, (self.said(), self.nn.errors)
        return graph

    def context(self, *parts: bytes, encoding: int = Encoding.ONNX) -> int:
        return self.must("init_execution_context", self.load(*parts, encoding=encoding))

    def by_name(self, name: bytes) -> int:
        return self("load_by_name", self.put(name), len(name))

    def with_config(self, name: bytes, config: bytes) -> int:
        places = (self.put(name), len(name), self.put(config), len(config))
        return self("load_by_name_with_config", *places)

    def set_input(self, context: int, array: NDArray[Any], index: int = 0) -> int:
        dims = self.put(np.array(array.shape, "<u4").tobytes())
        data = self.put(array.tobytes())
        kind = KINDS.index(array.dtype)
        return self("set_input", context, index, kind, dims, array.ndim, data, array.nbytes)

    def set(self, context: int, array: NDArray[Any]) -> None:
        assert self.set_input(context, array) == 0, (self.said(), self.nn.errors)

    def output(
        self, context: int, dtype: Any = np.float32, function: str = "get_output"
    ) -> NDArray[Any]:
        place = self.put(bytes(4096))
        size = self.must(function, context, 0, place, 4096)
        count = size // np.dtype(dtype).itemsize
        return np.array(self.memory.array(place, count, dtype))

    def run(self, context: int, array: NDArray[Any], dtype: Any = np.float32) -> NDArray[Any]:
        self.set(context, array)
        self.must("compute", context)
        return self.output(context, dtype)


# --- crates × functions × backends ----------------------------------------------------------------


def in_onnx() -> Model:
    image = np.random.default_rng(1).random((1, 3, 8, 8), np.float32)
    return Model((CLASSIFIER,), Encoding.ONNX, image, bare(CLASSIFIER, image)[0].ravel())


def as_ir(model: bytes) -> tuple[bytes, bytes]:
    """Convert an ONNX model to OpenVINO's own form, which is two files."""
    from edgelab.wasinn.backends.openvino import _core  # imports it without its telemetry

    network = _core().read_model(model)
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, "x.xml"), Path(folder, "x.bin")
        openvino.serialize(network, xml, weights)
        return xml.read_bytes(), weights.read_bytes()


def in_ir() -> Model:
    given = in_onnx()
    return Model(as_ir(CLASSIFIER), Encoding.OPENVINO, given.image, given.want)


def in_tflite() -> Model:
    """A sum instead, since nothing here turns convolutions into TFLite's."""
    from edgelab import tflite

    image = np.random.default_rng(1).random((2, 3), np.float32)
    data = tflite.double(np.float32, image.shape)
    return Model((data,), Encoding.TENSORFLOW_LITE, image, image.ravel() * 2)


FORMATS: dict[str, Callable[[], Model]] = {
    "onnxruntime": in_onnx,
    "openvino": in_ir,
    "litert": in_tflite,
}


@cache
def model(backend: str) -> Model:
    try:
        return FORMATS[backend]()
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI runs every backend: {error}")
        pytest.skip(f"{backend} is not installed: {error}")


def near(got: NDArray[np.float32], want: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def loaded(program: Program, model: Model) -> int:
    return program.context(*model.parts, encoding=model.encoding)


def does_load(program: Program, model: Model) -> None:
    graphs = [program.load(*model.parts, encoding=model.encoding) for _ in range(2)]
    assert graphs[0] != graphs[1]
    context = program.must("init_execution_context", graphs[0])
    near(program.run(context, model.image), model.want)


def does_load_by_name(program: Program, model: Model) -> None:
    graph = program.by_name(b"klein")
    assert graph >= 0, program.nn.errors
    near(program.run(program.must("init_execution_context", graph), model.image), model.want)
    assert program.by_name(b"gross") == -1


def does_load_by_name_with_config(program: Program, model: Model) -> None:
    for config in (b"", b"{}", b'{"threads": 1}', b'{"threads": 1, "device": "NPU"}'):
        graph = program.with_config(b"klein", config)
        assert graph >= 0, program.nn.errors
        near(program.run(program.must("init_execution_context", graph), model.image), model.want)
    assert "ignored: 'device'" in program.nn.errors[-1]
    for config in (b"[]", b"1", b"{", b"null", b'{"threads": 0}', b'{"threads": "2"}'):
        assert program.with_config(b"klein", config) == -1
        assert "InvalidArgument" in program.said()


def does_unload(program: Program, model: Model) -> None:
    graph = program.load(*model.parts, encoding=model.encoding)
    context = program.must("init_execution_context", graph)
    assert program("unload", graph) == 0
    assert program("unload", graph) == program("init_execution_context", graph) == -1
    assert program.set_input(context, model.image) == program("compute", context) == -1
    assert program.host.codes[-4:] == [1] * 4
    near(program.run(loaded(program, model), model.image), model.want)


def does_init_execution_context(program: Program, model: Model) -> None:
    graph = program.load(*model.parts, encoding=model.encoding)
    contexts = [program.must("init_execution_context", graph) for _ in range(2)]
    program.run(contexts[0], model.image)
    program.run(contexts[1], np.zeros_like(model.image))
    near(program.output(contexts[0]), model.want)
    assert not np.allclose(program.output(contexts[1]), model.want)


def does_set_input(program: Program, model: Model) -> None:
    context = loaded(program, model)
    program.set(context, np.zeros_like(model.image))
    program.set(context, model.image)  # the last one counts
    program.must("compute", context)
    near(program.output(context), model.want)


def does_compute(program: Program, model: Model) -> None:
    context = loaded(program, model)
    for image in (np.zeros_like(model.image), model.image):
        program.set(context, image)
        assert program("compute", context) == program("compute", context) == 0
    near(program.output(context), model.want)


def does_compute_single(program: Program, model: Model) -> None:
    context = loaded(program, model)
    for _ in range(2):
        program.set(context, model.image)
        assert program("compute_single", context) == 0
        for _ in range(2):
            assert program("compute_single", context) == -1
            assert program.host.codes[-1] == 100
            near(program.output(context), model.want)


def does_get_output(program: Program, model: Model, function: str = "get_output") -> None:
    context = loaded(program, model)
    program.run(context, model.image)
    size = model.want.nbytes
    place = program.put(b"\xee" * (size + 16))
    for room in (size, size + 16):
        assert program(function, context, 0, place, room) == size
        near(program.memory.array(place, model.want.size, np.float32), model.want)
        assert program.memory.read(place + size, 16) == b"\xee" * 16
    assert program(function, context, 0, place, size - 1) == -1
    assert program(function, context, 1, place, size) == -1


def does_get_output_single(program: Program, model: Model) -> None:
    does_get_output(program, model, "get_output_single")


def does_fini_single(program: Program, model: Model) -> None:
    context = loaded(program, model)
    program.set(context, model.image)
    program.must("compute_single", context)
    assert program("fini_single", context) == 0
    place = program.put(bytes(64))
    assert program("get_output_single", context, 0, place, 64) == -1
    assert program("compute_single", context) == program("compute", context) == -1
    assert program.host.codes[-3:] == [1, 1, 1]
    near(program.run(context, model.image), model.want)


TABLE = [
    pytest.param(name, function, backend, id=f"{name}-{function}-{backend}")
    for name, crate in CRATES.items()
    for function in crate.functions
    for backend in FORMATS
]


@pytest.mark.parametrize(("name", "function", "backend"), TABLE)
@pytest.mark.timeout(900)
def test_function(guests: dict[str, bytes], name: str, function: str, backend: str) -> None:
    chosen = model(backend)
    program = Program(guests[name], WasiNN({"klein": chosen.parts}, threads=1, backend=backend))
    globals()[f"does_{function}"](program, chosen)


# --- crates × tensor types ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in CRATES for dtype in CRATES[name].kinds], ids=str
)
def test_type(guests: dict[str, bytes], name: str, dtype: np.dtype[Any]) -> None:
    program = Program(guests[name], WasiNN(threads=1))
    context = program.context(identity(dtype))
    for values in ([1, 2, 3, 200, 255], [], [7]):  # no bytes tell nothing about the era
        array = np.array(values).astype(dtype)
        assert program.run(context, array, dtype).tolist() == array.tolist()


def test_an_empty_tensor_comes_first(guests: dict[str, bytes]) -> None:
    """Type 3 without a byte is u8 in one era and i32 in the other: the model decides."""
    for name, crate in CRATES.items():
        for dtype in crate.kinds:
            program = Program(guests[name], WasiNN(threads=1))
            context = program.context(identity(dtype))
            assert program.run(context, np.array([], dtype), dtype).size == 0


# --- crates × errors ------------------------------------------------------------------------------

GATHER = encoded(
    onnx_model(
        [helper.make_node("Gather", ["w", "x"], ["y"])],
        [("x", TensorProto.INT32, ("n",))],
        [("y", TensorProto.FLOAT, ("n",))],
        {"w": floats(1, 2, 3)},
    )
)
IS_POSITIVE = encoded(
    onnx_model(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BOOL)],
        [("x", TensorProto.FLOAT, ("n",))],
        [("y", TensorProto.BOOL, ("n",))],
    )
)
LIMITS = NNLimits(graphs=3, contexts=3, model_bytes=1 << 20)


def fetch(program: Program, context: int, room: int = 64, index: int = 0) -> int:
    return program("get_output", context, index, program.put(bytes(64)), room)


def ready(program: Program, model: bytes = IDENTITY, *values: float) -> int:
    """A context that has computed."""
    context = program.context(model)
    program.run(context, floats(*values or (1, 2)))
    return context


def wild_input(program: Program) -> int:
    dims, end = program.put(b"\2\0\0\0"), len(program.memory)
    return program("set_input", program.context(IDENTITY), 0, 1, dims, 1, end - 4, 8)


def compute_out_of_range(program: Program) -> int:
    context = program.context(GATHER)
    program.set(context, np.array([9], np.int32))
    return program("compute", context)


def no_bool(program: Program) -> int:
    context = program.context(IS_POSITIVE)
    program.set(context, floats(1))
    program.must("compute", context)
    return fetch(program, context)


def compute_twice(program: Program) -> int:
    context = program.context(IDENTITY)
    program.set(context, floats(1))
    program.must("compute_single", context)
    return program("compute_single", context)


def use_after_unload(program: Program) -> int:
    graph = program.load(IDENTITY)
    program.must("unload", graph)
    return program("init_execution_context", graph)


def too_many(program: Program) -> int:
    for _ in range(3):
        program.load(IDENTITY)
    return program.try_load(IDENTITY)


FAILURES: dict[str, tuple[str, str, Callable[[Program], int]]] = {
    "load garbage": ("invalid encoding", "load", lambda p: p.try_load(b"junk" * 9)),
    "load a cut-off model": ("invalid encoding", "load", lambda p: p.try_load(IDENTITY[:-1])),
    "load beyond memory": (
        "missing memory", "load", lambda p: p("load", len(p.memory) - 4, 8, 0, 0, 1, 0)
    ),
    "load over the limit": ("too large", "load", lambda p: p.try_load(bytes(1 << 20 | 1))),
    "load too many": ("too large", "load", too_many),
    "load for a GPU": ("unsupported operation", "load", lambda p: p.try_load(IDENTITY, target=1)),
    "load an unknown name": ("not found", "load_by_name", lambda p: p.by_name(b"nobody")),
    "load a damaged named model": ("runtime error", "load_by_name", lambda p: p.by_name(b"bad")),
    "a name of 5000 bytes": ("too large", "load_by_name", lambda p: p.by_name(b"x" * 5000)),
    "no JSON": (
        "invalid argument", "load_by_name_with_config", lambda p: p.with_config(b"klein", b"x")
    ),
    "a context of an unloaded graph": ("invalid argument", "unload", use_after_unload),
    "another shape": (
        "invalid argument", "set_input",
        lambda p: p.set_input(p.context(CLASSIFIER), np.zeros((1, 8, 8, 3), np.float32)),
    ),
    "another type": (
        "invalid argument", "set_input",
        lambda p: p.set_input(p.context(IDENTITY), np.zeros(2, np.uint8)),
    ),
    "another input": (
        "invalid argument", "set_input", lambda p: p.set_input(p.context(IDENTITY), floats(1), 1)
    ),
    "an input beyond memory": ("missing memory", "set_input", wild_input),
    "compute before set_input": (
        "invalid argument", "compute", lambda p: p("compute", p.context(IDENTITY))
    ),
    "compute what fails": ("runtime error", "compute", compute_out_of_range),
    "compute_single twice": ("end of sequence", "compute_single", compute_twice),
    "get_output before compute": (
        "invalid argument", "get_output", lambda p: fetch(p, p.context(IDENTITY))
    ),
    "another output": ("invalid argument", "get_output", lambda p: fetch(p, ready(p), index=1)),
    "a short buffer": ("too large", "get_output", lambda p: fetch(p, ready(p), room=7)),
    "a bool output": ("unsupported operation", "get_output", no_bool),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        pytest.param(name, failure, id=f"{name}-{failure}")
        for name, crate in CRATES.items()
        for failure, (_, function, _) in FAILURES.items()
        if function in crate.functions
    ],
)
def test_failure(guests: dict[str, bytes], name: str, failure: str) -> None:
    """The guest gets its own era's code, and the crate says what it means."""
    crate, (meaning, _, provoke) = CRATES[name], FAILURES[failure]
    for era in (None, crate.era):  # told from the guest, or by the user
        nn = WasiNN({"klein": CLASSIFIER, "bad": b"junk"}, threads=1, limits=LIMITS, era=era)
        program = Program(guests[name], nn)
        assert provoke(program) == -1
        assert program.host.codes[-1] == crate.codes[meaning], nn.errors
        assert crate.prints(crate.codes[meaning]) in program.said().replace('"', "'")


@pytest.mark.parametrize("name", CRATES)
def test_the_era_is_told_from_the_module(guests: dict[str, bytes], name: str) -> None:
    assert Era.of_module(guests[name]) is CRATES[name].told


@pytest.mark.parametrize("name", ["wasi_nn_0_2", "wasi_nn_0_3"])
def test_a_code_of_another_era_is_undefined_behaviour(guests: dict[str, bytes], name: str) -> None:
    """Why the eras matter: the crate looks the name up without a check. Here the check is on."""
    program = Program(guests[name], WasiNN(threads=1, era=Era.CRATE_0_6))
    with pytest.raises(GuestError, match="unreachable_unchecked must never be reached"):
        fetch(program, ready(program), room=7)
    assert program.host.codes[-1] == 7


@pytest.mark.parametrize("era", Era)
def test_every_error_has_a_code_that_the_era_knows(era: Era) -> None:
    known = {Era.WITX_2021: 3, Era.CRATE_0_4: 5}.get(era, 8)
    for errno in Errno:
        code = era.code(errno)
        assert (code == 0) == (errno is Errno.SUCCESS)
        assert 0 <= code <= known or errno is Errno.END_OF_SEQUENCE
        assert era.code(errno) == errno or era in (Era.WITX_2021, Era.CRATE_0_4)


def test_a_guest_without_words_is_told_by_its_tensors() -> None:
    """A guest that prints no errors has no names of them. Its tensors give it away."""

    def short(client: Client, context: int) -> int:
        return int(client._functions["get_output"](context, 0, 64, 1, client.out))

    def send(client: Client, context: int, code: int, dtype: Any) -> None:
        dims = client.heap.put(b"\2\0\0\0")
        data = client.heap.put(np.zeros(2, dtype).tobytes())
        size = 2 * np.dtype(dtype).itemsize
        assert client("set_input", context, 0, client.describe(dims, 1, code, data, size)) == 0
        assert client("compute", context) == 0

    for code, dtype, large in ((2, np.uint8, 3), (3, np.int32, 3), (2, np.float64, 7),
                               (3, np.uint8, 7), (4, np.int32, 7), (1, np.float32, 7)):  # fmt: skip
        client = Client(WasiNN(threads=1))
        context = client.context(identity(dtype))
        send(client, context, code, dtype)
        assert short(client, context) == large


def test_a_tensor_that_is_refused_tells_nothing() -> None:
    """A guest that gives a wrong length does not become an old one by that."""
    client = Client(WasiNN(threads=1))
    context = client.context(identity(np.uint8))
    dims, data = client.heap.put(b"\1\0\0\0"), client.heap.put(bytes(8))
    wrong = client.describe(dims, 1, 3, data, 4)  # bytes of u8, or an i32 of an older guest
    assert client("set_input", context, 0, wrong) == Errno.INVALID_ARGUMENT
    name = client.heap.put(b"nobody")
    assert client("load_by_name", name, 6, client.out) == Errno.NOT_FOUND


def test_a_told_era_is_kept(guests: dict[str, bytes]) -> None:
    """With `era`, a tensor means what it means there, whatever else it could."""
    cases = [(_0_4, 2, 1, 0), (_0_4, 2, 8, 1), (_0_6, 2, 8, 0), (_0_6, 2, 1, 1), (_2021, 5, 8, 1)]
    for era, code, size, want in cases:
        dtype = {(2, 1): np.uint8, (2, 8): np.float64, (5, 8): np.int64}[code, size]
        client = Client(WasiNN(threads=1, era=era))
        context = client.context(identity(dtype))
        dims, data = client.heap.put(b"\1\0\0\0"), client.heap.put(bytes(8))
        tensor = client.describe(dims, 1, code, data, size)
        assert client("set_input", context, 0, tensor) == want
