"""WasmEdge's ahead-of-time compiler, on the article's stdin → stdout program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wasmtime

from edgelab import models, runtimes
from edgelab.aot import NATIVE_TARGET
from edgelab.build import guest_path
from edgelab.datasets import Signs
from edgelab.errors import GuestError, ToolchainError
from edgelab.runtimes import Runtime

TINY = models.load("signs-tiny").path
ARGUMENTS = ("--model", "/models/tiny.safetensors")


@pytest.fixture(scope="module")
def wasmedge() -> Runtime:
    try:
        return runtimes.wasmedge()
    except ToolchainError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"WasmEdge can't be had here: {error}")


@pytest.fixture(scope="module")
def compiled(wasmedge: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ü aot") / "cli.so"
    wasmedge.compile(guest_path("cli").path, path)
    return path


def request(index: int) -> bytes:
    image = Signs("test", 32, size=96)[index].image
    pixels = {"image_data": image.ravel().tolist(), "width": 96, "height": 96}
    return json.dumps({**pixels, "model_id": "signs-tiny"}).encode()


def test_machine_code_gives_the_interpreters_answer(wasmedge: Runtime, compiled: Path) -> None:
    assert compiled.read_bytes()[:4] != b"\0asm"
    answers = []
    for program in (guest_path("cli").path, compiled):
        done = wasmedge.run(program, ARGUMENTS, stdin=request(9), dirs={"/models": TINY.parent})
        assert (done.returncode, done.stderr) == (0, b"")
        answers.append(json.loads(done.stdout))
    interpreted, native = answers
    assert native["label"] == interpreted["label"] == "stop"
    assert native["confidence"] == pytest.approx(interpreted["confidence"], abs=1e-5)


def test_machine_code_is_in_the_sandbox_too(wasmedge: Runtime, compiled: Path) -> None:
    """Compiled from a guest, it reaches no more than that: nothing is pre-opened here."""
    done = wasmedge.run(compiled, ("--model", str(TINY)), stdin=request(0))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["id"] == "E9"
    done = wasmedge.run(compiled, ("--fly",))
    assert (done.returncode, done.stderr[:6]) == (2, b"usage:")


@pytest.mark.skipif(NATIVE_TARGET[:6] != "x86_64", reason="changes a constant in x86 instructions")
def test_machine_code_that_hides_in_a_module_is_not_run(wasmedge: Runtime, tmp_path: Path) -> None:
    """WasmEdge takes machine code from a custom section of a module, whoever put it there."""
    text = """(module
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (func (export "_start") (call $exit (i32.const 0x01020307))))"""
    honest, library, hidden = (tmp_path / name for name in ("a.wasm", "a.so", "b.wasm"))
    honest.write_bytes(wasmtime.wat2wasm(text))
    assert wasmedge.run(honest).returncode == 7
    for path in (library, hidden):
        command = [*wasmedge.command, "compile", str(honest), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        code = path.read_bytes()
        assert code.count(b"\7\3\2\1") > 0  # in the instructions; a module has another form for it
        path.write_bytes(code.replace(b"\7\3\2\1", b"\x09\3\2\1"))
    assert wasmedge.run(library).returncode == 9  # so take no .so from others
    assert wasmedge.run(hidden).returncode == 7
    disguised = tmp_path / "c.wasm"
    disguised.write_bytes(library.read_bytes())
    assert wasmedge.run(disguised).returncode == 7


def test_what_wasmedge_can_not_compile_is_a_clear_error(wasmedge: Runtime, tmp_path: Path) -> None:
    (tmp_path / "bad.wasm").write_bytes(b"no wasm")
    for module, reason in (
        (tmp_path / "bad.wasm", "magic header"),
        (tmp_path / "missing.wasm", "invalid path"),
        (guest_path("classify").path, "Relaxed SIMD"),
    ):
        with pytest.raises(GuestError, match=f"E6: WasmEdge can't compile .*{reason}"):
            wasmedge.compile(module, tmp_path / "out.so")


def test_only_a_shared_library_is_written(wasmedge: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a \.so"):
        wasmedge.compile(guest_path("cli").path, tmp_path / "out.wasm")
    assert list(tmp_path.iterdir()) == []


def test_only_wasmedge_writes_machine_code(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="node writes no machine code"):
        Runtime("node", ("node",), "v20").compile("a.wasm", tmp_path / "a.so")


@pytest.mark.skipif(sys.platform == "win32", reason="needs the program echo")
@pytest.mark.parametrize(
    ("version", "for_code", "for_module"),
    [
        ("0.13.5", [], []),
        ("0.14.1", [], ["--force-interpreter"]),
        ("0.16.4", [], ["--force-interpreter"]),
        ("0.17.0", ["--run-mode=aot"], []),
        ("0.18.1-rc.1", ["--run-mode=aot"], []),
        ("1.0", ["--run-mode=aot"], []),
    ],
)
def test_each_version_is_told_to_run_machine_code_from_a_so_only(
    version: str, for_code: list[str], for_module: list[str]
) -> None:
    """From 0.17 on they interpret it otherwise. The program echo shows what they would get."""
    runtime = Runtime("wasmedge", ("echo",), f"/opt/2.5/wasmedge version {version}")
    words = runtime.run("x.so", ["argument"]).stdout.decode().split()
    assert words == [*for_code, "x.so", "argument"]
    assert runtime.run("x.wasm").stdout.decode().split() == [*for_module, "x.wasm"]
