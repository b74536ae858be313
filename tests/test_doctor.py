"""Each of the article's fifteen failures: made to happen, recognised, and cured."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasmtime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelab import Classifier, Guest, Limits, Pipeline, WasiNN, guest_path, runtimes
from edgelab.aot import NATIVE_TARGET, EngineConfig, compile_module, engine, this_machine
from edgelab.artifact import inspect_artifact
from edgelab.datasets import Signs
from edgelab.doctor import FAILURES, OTHER, Findings, diagnose, table
from edgelab.errors import EdgelabError, ToolchainError
from edgelab.models import example_image, load
from edgelab.snippet import compile_rust
from edgelab.toolchain import Toolchain

ROOT = Path(__file__).parent.parent
ARTICLE = {*(f"P{k}" for k in range(1, 6)), *(f"E{k}" for k in range(1, 11))}
SOURCE = '#[unsafe(no_mangle)] pub extern "C" fn answer() -> i32 { 42 }'
SEVEN = b'(module (func (export "f") (result i32) i32.const 7))'


@dataclass
class Case:
    """What a test of a failure hands over.

    Attributes
    ----------
    broken : list
        Exceptions, bytes and paths, each of which must be recognised.
    cure : callable
        Does it right. If it returns bytes or a path, doctor must find nothing wrong with it.
    """

    broken: list[BaseException | bytes | Path]
    cure: Callable[[], bytes | Path | None]


REPRODUCED: dict[str, str] = {}


def reproduces(id: str) -> Callable[[Callable[..., Case]], Callable[..., None]]:
    """Make a test of a function that lets a failure happen."""

    def decorate(make: Callable[..., Case]) -> Callable[..., None]:
        REPRODUCED[id] = make.__name__

        @functools.wraps(make)
        def test(*args: Any, **more: Any) -> None:
            case = make(*args, **more)
            assert case.broken
            for evidence in case.broken:
                found = diagnose(evidence)
                assert found.ids == (id,), evidence
                assert all(finding.what and finding.cause and finding.cure for finding in found)
            healed = case.cure()
            if healed is not None:
                assert diagnose(healed) == ()

        test.__annotations__ = {**make.__annotations__, "return": None}
        return test

    return decorate


def raised(function: Callable[..., Any], *args: Any, **more: Any) -> BaseException:
    try:
        function(*args, **more)
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


def wat(text: str | bytes) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def link(wasm: bytes, *, wasi: bool = False) -> wasmtime.Instance:
    """Instantiate a module as wasmtime does it, without edgelab."""
    linker = wasmtime.Linker(engine())
    if wasi:
        linker.define_wasi()
    return linker.instantiate(wasmtime.Store(engine()), wasmtime.Module(engine(), wasm))


def foreign(name: str) -> bytes:
    """Real machine code of SEVEN; see ``foreign`` in test_aot."""
    return lzma.decompress((Path(__file__).parent / "artifacts" / f"{name}.cwasm.xz").read_bytes())


def child(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=False
    )
    done.check_returncode()
    return done


def runtime(name: str) -> runtimes.Runtime:
    try:
        found: runtimes.Runtime = getattr(runtimes, name)()
    except ToolchainError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} can't be had here: {error}")
    return found


def request(size: int = 24, **more: Any) -> bytes:
    image = Signs("test", 32, size=size)[9].image
    whole = {"image_data": image.ravel().tolist(), "width": size, "height": size}
    return json.dumps({**whole, "model_id": "signs-tiny", **more}).encode()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    made = Classifier(Guest(guest_path("classify").path).instantiate())
    made.load_model(load("signs-tiny").data)
    return made


# --- build ----------------------------------------------------------------------------------------


@reproduces("P1")
def test_p1_target_not_installed(rust: Toolchain) -> Case:
    """The real compiler, told to look for libraries where there are none."""
    error = raised(compile_rust, SOURCE, rustflags=["--sysroot=nowhere"])
    no_wasi = wat('(module (global (export "__heap_base") i32 (i32.const 0)) (global (export '
                  '"__data_end") i32 (i32.const 0)) (func (export "f")))')  # fmt: skip
    return Case([error, str(error).encode(), no_wasi], lambda: compile_rust(SOURCE))


@reproduces("E1")
def test_e1_target_not_found(rust: Toolchain) -> Case:
    error = raised(compile_rust, SOURCE, target="wasm32-wasi")
    said = "error: toolchain 'x' does not support target 'wasm32-wasip9'\n"
    return Case([error, said.encode()], lambda: compile_rust(SOURCE, target="wasm32-wasip1"))


# --- load -----------------------------------------------------------------------------------------


@reproduces("E2")
def test_e2_damaged_module(tmp_path: Path) -> Case:
    whole = guest_path("classify").path.read_bytes()
    page = tmp_path / "page.wasm"
    page.write_bytes(b"<html>404 Not Found</html>")
    empty = tmp_path / "empty.wasm"
    empty.touch()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    broken: list[BaseException | bytes | Path] = [
        whole[:-1000],
        whole[:5],
        b"\0asn" + whole[4:],
        page,
        empty,
        raised(wasmtime.Module, engine(), whole[:-1000]),
        raised(wasmtime.Module, engine(), b"\0asn" + whole[4:]),
        raised(Guest, whole[:-1000], cache=False),
    ]

    def cure() -> Path:
        built = guest_path("classify")
        assert hashlib.sha256(built.path.read_bytes()).hexdigest() == built.sha256
        return built.path

    return Case(broken, cure)


def fat() -> bytes:
    """A module with 33 MB in it, as a model would be."""
    head = b'(module (memory (export "memory") 600) (func (export "f")) (data (i32.const 0) "'
    return wat(head + b"w" * (33 << 20) + b'"))')


@reproduces("P2")
def test_p2_module_over_32_mb() -> Case:
    def cure() -> Path:
        """The model beside the module, by its name."""
        path = guest_path("classify_nn").path
        guest = Guest(path, host=[WasiNN({"signs": load("signs").path})])
        assert Classifier(guest.instantiate()).load_graph("signs") >= 0
        return path

    return Case([fat()], cure)


# --- link -----------------------------------------------------------------------------------------


class Doubler:
    """A host module with one function."""

    name = "env"

    def functions(self) -> Mapping[str, tuple[str, Callable[..., int]]]:
        return {"double": ("i->i", lambda _, x: 2 * x)}


@reproduces("E5")
def test_e5_undefined_symbol() -> Case:
    wants = wat('(module (import "env" "double" (func $d (param i32) (result i32)))'
                '(func (export "f") (result i32) (call $d (i32.const 21))))')  # fmt: skip
    other = wat('(module (import "env" "double" (func (param i64))) (func (export "f")))')
    linker = wasmtime.Linker(engine())
    linker.define_func("env", "double", wasmtime.FuncType([], []), lambda: None)
    mixed = raised(linker.instantiate, wasmtime.Store(engine()), wasmtime.Module(engine(), wants))
    broken: list[BaseException | bytes | Path] = [
        raised(link, wants),
        mixed,
        raised(Guest, wants),
        raised(Guest, other, host=[Doubler()]),
        raised(Guest(SEVEN).instantiate().call, "infer", 1, 2),
        wants,
        wat('(module (memory (export "memory") 1))'),
        wat('(module (func (export "infer") (param i32 i32) (result i32) (i32.const 0)))'),
        wat('(module (func (export "_start") (param i32)))'),
    ]

    def cure() -> None:
        assert Guest(wants, host=[Doubler()]).instantiate().call("f") == 42

    return Case(broken, cure)


COMPONENT = '(component (import "wasi:cli/environment@0.2.3" (instance)))'


@reproduces("E7")
def test_e7_wrong_target() -> Case:
    cli = guest_path("cli").path.read_bytes()
    browser = '(module (import "__wbindgen_placeholder__" "__wbindgen_throw" (func (param i32))))'
    broken: list[BaseException | bytes | Path] = [
        raised(link, cli),
        raised(link, wat(browser)),
        raised(Guest, wat(browser)),
        raised(wasmtime.Module, engine(), wat(COMPONENT)),
        raised(Guest, wat(COMPONENT)),
        wat(browser),
        wat(COMPONENT),
    ]

    def cure() -> Path:
        assert Guest(cli).instantiate(args=["--fly"]).run() == 2  # it prints its usage
        return guest_path("cli").path

    return Case(broken, cure)


@reproduces("P3")
def test_p3_no_wasi_nn_here() -> Case:
    path = guest_path("classify_nn").path
    broken: list[BaseException | bytes | Path] = [
        raised(Guest, path),
        raised(link, path.read_bytes(), wasi=True),
        wat('(module (import "wasi_nn" "load" (func)) (func (export "f")))'),
    ]

    def cure() -> Path:
        assert Pipeline("signs").classify(example_image()).label == "stop"
        return path

    return Case(broken, cure)


# --- run ------------------------------------------------------------------------------------------


def external() -> bytes:
    """A model whose weights are in another file."""
    import onnx

    weights = onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights.bin")
    info = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1000])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [info], [weights])
    return bytes(onnx.helper.make_model(graph).SerializeToString())


@reproduces("E3")
def test_e3_graph_loading_failed(tmp_path: Path) -> Case:
    import onnxruntime

    model = load("signs")
    guest = Guest(guest_path("classify_nn").path, host=[WasiNN()])
    misnamed = tmp_path / "model.tflite"
    misnamed.write_bytes(model.data)
    pointer = tmp_path / "model.onnx"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    inside = bytearray(model.data)
    inside[100:4000] = bytes(3900)
    broken: list[BaseException | bytes | Path] = [
        raised(Classifier(guest.instantiate()).load_graph, model.data[:-1000]),
        raised(onnxruntime.InferenceSession, model.data[:-1000]),
        model.data[:-1000],
        bytes(inside),
        external(),
        b"PK\x03\x04" + bytes(100),  # as PyTorch saves models
        b"\x1c\0\0\0TFL3" + bytes(100),
        misnamed,
        pointer,
    ]

    def cure() -> Path:
        assert Classifier(guest.instantiate()).load_graph(model.data) >= 0
        return model.path

    return Case(broken, cure)


@reproduces("E4")
def test_e4_linear_memory_full() -> Case:
    guest = Guest(guest_path("classify").path)
    limits = Limits(memory_bytes=4 << 20)

    def leak() -> None:
        classifier = Classifier(guest.instantiate(limits=limits))
        for _ in range(100):
            classifier.buffer(1 << 20)

    def cure() -> None:
        classifier = Classifier(guest.instantiate(limits=limits))
        for _ in range(100):
            with classifier.buffer(1 << 20):
                pass

    too_small = raised(guest.instantiate, limits=Limits(memory_bytes=1 << 16))
    hungry = wat('(module (memory (export "memory") 60000) (func (export "f")))')
    return Case([raised(leak), too_small, hungry], cure)


INSTANCES = """
import resource, sys
from edgelab import Guest, guest_path
guest = Guest(guest_path("classify").path)
resource.setrlimit(resource.RLIMIT_AS, (32 << 30,) * 2)
kept = []
for _ in range(30):
    instance = guest.instantiate()
    if "keep" in sys.argv:
        kept.append(instance)
"""


@reproduces("P4")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_p4_out_of_memory_on_the_host() -> Case:
    def cure() -> None:
        child(INSTANCES)

    return Case([raised(child, INSTANCES, "keep"), raised(bytearray, 1 << 60)], cure)


@reproduces("E8")
def test_e8_truncated_request(classifier: Classifier) -> Case:
    whole = request()
    answer = classifier.infer(whole[:-9])
    broken: list[BaseException | bytes | Path] = [
        whole[:-9],
        whole[:1000],
        json.dumps(answer).encode(),
        answer["error"]["message"].encode(),
        raised(json.loads, whole[:-9]),
        raised(json.loads, b""),
    ]

    def cure() -> bytes:
        assert "label" in classifier.infer(whole)
        return whole

    return Case(broken, cure)


@reproduces("E9")
def test_e9_folder_not_pre_opened() -> Case:
    cli, folder = Guest(guest_path("cli").path), load("signs-tiny").path.parent
    args = ("--model", "/models/tiny.safetensors")
    closed = cli.instantiate(args=args, stdin=request())
    assert closed.run() == 1
    other = cli.instantiate(
        args=("--model", "/models/../registry.toml"), stdin=request(), dirs={"/models": folder}
    )
    assert other.run() == 1

    def cure() -> bytes:
        instance = cli.instantiate(args=args, stdin=request(), dirs={"/models": folder})
        assert instance.run() == 0
        return instance.stdout

    return Case([closed.stdout, closed.stderr, other.stdout], cure)


# --- deploy ---------------------------------------------------------------------------------------


def here_again(tmp_path: Path) -> Path:
    """The cure of all three: the module, compiled on this machine."""
    compiled = Guest(SEVEN, cache=False).compiled
    compiled.save(tmp_path / "seven.cwasm")
    assert Guest(tmp_path / "seven.cwasm").instantiate().call("f") == 7
    return tmp_path / "seven.cwasm"


@reproduces("P5")
def test_p5_another_architecture(tmp_path: Path) -> Case:
    code = foreign("wasmtime49" if this_machine().machine == "aarch64" else "aarch64")
    refused = raised(wasmtime.Module.deserialize, engine(), code)  # before anything of it runs
    return Case([code, raised(Guest, code), refused], lambda: here_again(tmp_path))


@reproduces("E6")
def test_e6_another_version(tmp_path: Path) -> Case:
    if this_machine().machine == "x86_64":
        code = foreign("wasmtime49")
    else:  # the version is a text after its length
        code = bytes(compile_module(wat(SEVEN), cache=False).module.serialize())
        code = code.replace(b"\2" + this_machine().wasmtime.encode(), b"\x0249", 1)
    slow = bytes(compile_module(wat(SEVEN), EngineConfig(fuel=True)).module.serialize())
    broken: list[BaseException | bytes | Path] = [
        code,
        raised(Guest, code),
        raised(wasmtime.Module.deserialize, engine(), code),
        raised(wasmtime.Module.deserialize, engine(), slow),  # of another configuration
    ]
    return Case(broken, lambda: here_again(tmp_path))


def with_lacking_feature() -> bytes:
    """Machine code of this machine whose header says that it uses what this CPU lacks."""
    code = bytes(compile_module(wat(SEVEN), cache=False).module.serialize())
    return re.sub(rb"(has_\w+\x02)\x00", lambda found: found[1] + b"\1", code, count=1)


ILLEGAL = """
import ctypes, mmap, sys
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex(sys.argv[1]))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
UNDEFINED = {"x86_64": "0f0b", "aarch64": "00000000"}  # what each CPU promises never to know


@reproduces("E10")
@pytest.mark.skipif(sys.platform != "linux", reason="runs an instruction by hand, as on Linux")
def test_e10_illegal_instruction(tmp_path: Path) -> Case:
    code = with_lacking_feature()
    lacking = set(inspect_artifact(code).features) - set(this_machine().features)
    assert len(lacking) == 1
    flags = EngineConfig(flags=tuple(lacking))
    died = raised(child, ILLEGAL, UNDEFINED[this_machine().machine])
    assert isinstance(died, subprocess.CalledProcessError)
    assert died.returncode == -4
    broken: list[BaseException | bytes | Path] = [
        code,
        died,
        raised(Guest, code),
        raised(wasmtime.Module.deserialize, engine(), code),
        raised(compile_module, wat(SEVEN), flags, cache=False),
        b"bash: line 1: 4242 Illegal instruction     (core dumped) wasmedge guest.so",
    ]

    def cure() -> Path:
        common = compile_module(wat(SEVEN), EngineConfig(target=NATIVE_TARGET))
        assert inspect_artifact(bytes(common.module.serialize())).features == ()
        return here_again(tmp_path)

    return Case(broken, cure)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_has_the_fifteen_and_each_one_s_test() -> None:
    assert set(FAILURES) == set(REPRODUCED) == ARTICLE
    for id, failure in FAILURES.items():
        assert failure.id == id
        assert failure.test == REPRODUCED[id]
        assert callable(globals()[failure.test])


def test_the_docs_have_the_table() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert table() in text, "renew it: python -m edgelab doctor --table"


@pytest.mark.parametrize("id", FAILURES)
def test_recorded_messages_are_recognised(id: str) -> None:
    for said in FAILURES[id].said:
        assert diagnose(f"some\nlines\n  error: {said.text} and more\n".encode()).ids == (id,)


@pytest.mark.parametrize("name", ["node", "wasmedge"])
def test_messages_of_other_runtimes(name: str, tmp_path: Path) -> None:
    found = runtime(name)
    whole = guest_path("cli").path.read_bytes()
    start = '(memory (export "memory") 1) (func (export "_start"))'
    wanted = {
        "E2": [whole[:-1000], b"\0asn" + whole[4:]],
        "E5": [wat(f'(module (import "env" "f" (func)) {start})')],
        "E7": [
            wat("(component)"),
            wat(f'(module (import "__wbindgen_placeholder__" "f" (func)) {start})'),
            wat(f'(module (import "wasi_unstable" "fd_write" (func)) {start})'),
        ],
    }
    if name == "node":  # WasmEdge has WASI-NN's functions without a plugin
        wanted["P3"] = [wat(f'(module (import "wasi_ephemeral_nn" "load" (func)) {start})')]
    for id, modules in wanted.items():
        for wasm in modules:
            file = tmp_path / "guest.wasm"
            file.write_bytes(wasm)
            done = found.run(file)
            assert done.returncode, id
            assert diagnose(done.stdout + done.stderr).ids == (id,), done.stdout + done.stderr


def test_machine_code_of_wasmedge(tmp_path: Path) -> None:
    """Its library names no CPU features, so E10 can't be seen in it; machine and version can."""
    edge = runtime("wasmedge")
    module, library = tmp_path / "seven.wasm", tmp_path / "seven.so"
    module.write_bytes(wat(SEVEN))
    edge.compile(module, library)
    code = library.read_bytes()
    assert diagnose(library) == ()
    other = 183 if this_machine().machine == "x86_64" else 62
    elsewhere = code[:18] + other.to_bytes(2, "little") + code[20:]
    assert diagnose(elsewhere).ids == ("P5",)
    library.write_bytes(elsewhere)
    done = edge.run(library)
    assert diagnose(done.stdout + done.stderr).ids == ("P5",)


# --- files ----------------------------------------------------------------------------------------


def test_machine_code_that_nobody_signed_is_not_loaded(tmp_path: Path) -> None:
    bare = bytes(compile_module(wat(SEVEN), cache=False).module.serialize())
    (finding,) = diagnose(bare)
    assert finding.id == OTHER
    assert "was not saved by this user" in finding.what
    path = here_again(tmp_path)
    assert diagnose(path) == ()
    sealed = bytearray(path.read_bytes())
    sealed[sealed.index(b"\7\0\0\0")] ^= 1  # the seven
    assert diagnose(bytes(sealed)).ids == (OTHER,)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (request(width=25), "1,728 values; 25 x 24 x 3 are 1,800"),
        (request(width=-1), "positive numbers"),
        (request(image_data=[-1] * 1728), "from 0 to 255"),
        (request(image_data=[float("nan")] * 1728), "NaN"),
        (request(image_data="x"), "list of numbers"),
        (request() + b" " * (16 << 20), "more than 16,777,216 bytes"),
    ],
)
def test_requests_that_the_guest_refuses(text: bytes, what: str, classifier: Classifier) -> None:
    (finding,) = diagnose(text)
    assert finding.id == OTHER
    assert what in finding.what
    if len(text) < 1 << 20:
        assert "error" in classifier.infer(text)


def test_logs_in_all_their_forms(tmp_path: Path) -> None:
    cargo = "\x1b[31merror[E0463]\x1b[0m: can't find crate for `\x1b[1mstd\x1b[0m`\n"
    assert diagnose(cargo.encode()).ids == ("P1",)
    assert diagnose(("\ufeff" + cargo).encode("utf-16-le")).ids == ("P1",)  # PowerShell
    lines = '{"log": "E4: the guest has no 99 bytes left"}\n{"log": "std::bad_alloc"}\n'
    assert diagnose(lines.encode()).ids == ("P4",)  # its own id is within a string
    both = b"edgelab: error: E2: this is JSON\nedgelab: error: P5, E6: machine code\n"
    assert diagnose(both).ids == ("E2", "P5", "E6")
    unknown = "unknown import: `{}` has not been defined\n"
    imports = unknown.format("env::f") + unknown.format("wasi_ephemeral_nn::load")
    assert diagnose(imports.encode()).ids == ("E5", "P3")
    assert diagnose(b"E11: no such thing. ME4: nor this\nall is well: 3 passed\n") == ()
    assert diagnose(b"error[E0463]: can't find crate for `serde`") == ()
    first = diagnose(b"x\n" + b"Exec format error\n" * 3)
    assert [finding.what for finding in first] == ["Exec format error"]


def test_exceptions_with_what_caused_them() -> None:
    def start() -> None:
        try:
            Guest(b"\0asm")
        except EdgelabError as error:
            raise RuntimeError("start-up failed") from error

    assert diagnose(raised(start)).ids == ("E2",)
    assert diagnose(ValueError("nothing")) == ()
    assert diagnose(raised(json.loads, "[1, }")) == ()  # wrong, but complete
    program = "import sys; sys.exit('Exec format error')"
    assert diagnose(raised(child, program)).ids == ("P5",)


def test_what_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(EdgelabError, match=r"cannot read .* doctor -"):
            diagnose(path)


def test_healthy_files() -> None:
    for name in ("classify", "classify_nn", "cli"):
        assert diagnose(guest_path(name).path) == ()
    for name in ("signs", "signs-tiny"):
        assert diagnose(load(name).path) == diagnose(load(name).data) == ()
    assert diagnose(request()) == ()
    assert diagnose(b"") == ()  # a program that printed nothing


def test_findings_show_themselves() -> None:
    found = diagnose(b"Exec format error <b>")
    assert isinstance(found, Findings)
    assert repr(found) == "Findings(P5)"
    assert str(found).startswith("P5 another architecture\n  found: Exec format error <b>\n  why:")
    html = found._repr_html_()
    assert "<table><caption>Diagnosis" in html
    assert "&lt;b&gt;" in html
    assert json.loads(json.dumps(found.to_dict()))[0]["id"] == "P5"
    assert str(diagnose(b"fine")) == "nothing that doctor knows"
    assert repr(diagnose(b"fine")) == "Findings(nothing)"


# --- hostile --------------------------------------------------------------------------------------

HEADS = (
    b"", b"\0asm\1\0\0\0", b"\0asm\x0d\0\1\0", b"\x7fELF\2\1\1\xc8", b"\x7fELF\2\1\1\0", b"{", b"[",
    b'{"image_data": [', b"\xff\xfe", b"\x08\x08\x12", b"PK\3\4", b"GGUF", b"\1\0\0\0\0\0\0\0{",
)  # fmt: skip


def well_formed(found: Findings) -> None:
    for finding in found:
        assert finding.id in FAILURES or finding.id == OTHER
        assert finding.what
        assert str(finding).isprintable() or "\n" in str(finding)
        assert "\x1b" not in str(finding)


@given(st.sampled_from(HEADS), st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_never_crash_it(head: bytes, data: bytes) -> None:
    well_formed(diagnose(head + data))


@pytest.mark.parametrize(
    "part",
    [b". E2: x ", b"unknown import: `a", b"[0,", b'{"a":', b"\n", b"Module was compiled with "],
)
def test_long_files_take_no_quadratic_time(part: bytes) -> None:
    """A megabyte; in quadratic time, each of them would reach pytest's time limit."""
    well_formed(diagnose(part * ((1 << 20) // len(part))))


@given(st.text(max_size=300))
def test_random_text_never_crashes_it(text: str) -> None:
    well_formed(diagnose(text.encode("utf-8", "surrogatepass")))
    well_formed(diagnose(ValueError(text)))


@functools.cache
def patients() -> tuple[bytes, ...]:
    sealed = Guest(SEVEN, cache=False).compiled
    return (
        wat(SEVEN),
        guest_path("cli").path.read_bytes(),
        bytes(sealed.module.serialize()),
        request(16),
        wat(COMPONENT),
    )


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_never_crash_it(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(patients())))
    for _ in range(data.draw(st.integers(0, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    well_formed(diagnose(bytes(file[: data.draw(st.integers(1, len(file)))])))


numbers = st.one_of(st.integers(-300, 300), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.booleans())
@settings(max_examples=40)
def test_cut_requests_are_e8_exactly_where_the_guest_says_so(
    document: dict[str, Any], plain: bool
) -> None:
    """At each of their characters."""
    text = json.dumps(document, ensure_ascii=plain)
    guest = _classifier()
    for end in range(1, len(text)):
        part = text[:end].encode()
        says = guest.infer(part)["error"]["id"]
        assert (diagnose(part).ids == ("E8",)) == (says == "E8"), (part, says)


@functools.cache
def _classifier() -> Classifier:
    return Classifier(Guest(guest_path("classify").path).instantiate())


# --- the command line -----------------------------------------------------------------------------


def edgelab(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgelab", "doctor", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def test_cli_recognises_files_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "build ü.log"
    log.write_bytes(b"note: the `wasm32-wasip1` target may not be installed\n")
    cut = tmp_path / "cut.json"
    cut.write_bytes(request()[:-9])
    good = guest_path("cli").path
    done = edgelab(str(log), str(tmp_path / "none"), str(cut), str(good))
    assert done.returncode == 1
    text = done.stdout.decode()
    assert "P1 target not installed\n    found: note: the `wasm32" in text
    assert "cure:  rustup target add wasm32-wasip1" in text
    assert "E8 truncated request" in text
    assert text.endswith(f"{good}\n  nothing that doctor knows\n\n")
    assert done.stderr.count(b"cannot read") == 1
    assert b"Traceback" not in done.stderr


def test_cli_reads_standard_input_and_writes_json(tmp_path: Path) -> None:
    done = edgelab("-", "--json", stdin=b"Killed\nexit code 137\n")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert answer["file"] == "-"
    assert [finding["id"] for finding in answer["findings"]] == ["P4"]
    fine = edgelab("-", "--json", stdin=b"all is well\n")
    assert fine.returncode == 0
    assert json.loads(fine.stdout)["findings"] == []
    missing = edgelab("--json", str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "cannot read" in json.loads(missing.stdout)["error"]


def test_cli_prints_the_table() -> None:
    assert edgelab("--table").stdout.decode() == table()
