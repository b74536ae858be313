"""The article's stdin → stdout program, under three runtimes: wasmtime, WasmEdge, Node.js."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from edgelab import runtimes
from edgelab.build import guest_path
from edgelab.datasets import Signs
from edgelab.errors import ToolchainError
from edgelab.models import load
from edgelab.runtime import Guest

MODEL = load("signs-tiny")
RUNTIMES = ("wasmtime", "wasmedge", "node")


def run_cli(
    runtime: str, stdin: bytes, *, args: tuple[str, ...] = ("--model", "/models/tiny.safetensors"),
    opened: bool = True,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    wasm = guest_path("cli").path
    dirs: dict[str, str | Path] = {"/models": MODEL.path.parent} if opened else {}
    if runtime == "wasmtime":
        instance = Guest(wasm).instantiate(args=args, stdin=stdin, dirs=dirs)
        code = instance.run()
        return subprocess.CompletedProcess(args, code, instance.stdout, instance.stderr)
    try:
        found = getattr(runtimes, runtime)()
    except ToolchainError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{runtime} can't be had here: {error}")
    answer: subprocess.CompletedProcess[bytes] = found.run(wasm, args, stdin=stdin, dirs=dirs)
    return answer


def request(size: int = 96) -> bytes:
    image = Signs("test", 32, size=size)[9].image
    return json.dumps(
        {
            "image_data": image.ravel().tolist(),
            "width": size,
            "height": size,
            "model_id": "signs-tiny",
        }
    ).encode()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_runtimes_give_the_same_answer(runtime: str) -> None:
    done = run_cli(runtime, request())
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    reference = json.loads(run_cli("wasmtime", request()).stdout)
    assert answer["label"] == reference["label"]
    assert answer["confidence"] == pytest.approx(reference["confidence"], abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_truncated_json_is_e8_with_exit_code_1(runtime: str) -> None:
    done = run_cli(runtime, request()[:1000])
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["id"] == "E8"
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_folder_that_is_not_pre_opened_is_e9(runtime: str) -> None:
    done = run_cli(runtime, request(), opened=False)
    assert done.returncode == 1
    answer = json.loads(done.stdout)["error"]
    assert answer["id"] == "E9"
    assert "/models/tiny.safetensors" in answer["message"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_wrong_arguments_are_exit_code_2(runtime: str) -> None:
    done = run_cli(runtime, b"", args=("--fly",))
    assert done.returncode == 2
    assert b"usage:" in done.stderr
