"""The Rust side: its own tests natively and under Wasm, lints, sizes, and the shipped copies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgelab.build import GUESTS, guest_path, source_hash
from edgelab.classify import KERNELS, Classifier
from edgelab.datasets import Signs
from edgelab.models import load
from edgelab.paths import PACKAGE, source_root
from edgelab.runtime import Guest
from edgelab.toolchain import TARGET, Toolchain
from edgelab.wasinn import WasiNN

ROOT = source_root()
assert ROOT is not None, "these tests belong to a checkout"
SOURCES = ROOT / "guest"


def cargo(rust: Toolchain, *arguments: str) -> str:
    if rust.kind == "debootstrap":
        done = rust.run(arguments, SOURCES, title=f"cargo {arguments[0]}")
    else:
        done = subprocess.run(
            [*rust.cargo, *arguments], cwd=SOURCES, env=dict(rust.env),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (done.stdout or "") + (done.stderr or "")
    return (done.stdout or "") + (done.stderr or "")


@pytest.mark.timeout(900)
def test_cargo_test_natively(rust: Toolchain) -> None:
    assert "test result: ok" in cargo(rust, "test", "--locked", "--workspace", "--quiet")


@pytest.mark.timeout(900)
def test_cargo_test_under_wasm(rust: Toolchain) -> None:
    # A list in TOML and not the variable CARGO_TARGET_..._RUNNER: a path may hold a space.
    runner = json.dumps([sys.executable, str(SOURCES / "wasm_runner.py")], ensure_ascii=False)
    target = ("--target", TARGET, "--config", f"target.{TARGET}.runner={runner}")
    output = cargo(rust, "test", "--locked", "--quiet", "--release", *target)
    assert "test result: ok" in output


COMPONENTS = {
    "fmt": ("fmt", "--check"),
    "clippy": ("clippy", "--locked", "--all-targets", "--", "-D", "warnings"),
}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.timeout(600)
def test_lint(rust: Toolchain, component: str) -> None:
    probe = subprocess.run(
        [*rust.cargo, component, "--version"], cwd=SOURCES, env=dict(rust.env),
        capture_output=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        missing = f"this Rust has no cargo {component}"
        if os.environ.get("CI"):
            pytest.fail(
                f"{missing}. Cure: rustup component add {component.replace('fmt', 'rustfmt')}"
            )
        pytest.skip(missing)
    cargo(rust, *COMPONENTS[component])


def test_classify_is_at_most_160_kb() -> None:
    """Rust 1.95 makes 149 kB of it, Rust 1.85 makes 159 kB: it has a larger library."""
    assert guest_path("classify").size_bytes <= 160_000


@pytest.mark.parametrize("name", GUESTS)
def test_guests_need_nothing_but_wasi(name: str) -> None:
    guest = Guest(guest_path(name).path, host=[WasiNN()])
    modules = {module for module, _, _ in guest.imports}
    neural = {"wasi_ephemeral_nn"} if name == "classify_nn" else set()
    assert modules <= {"wasi_snapshot_preview1"} | neural


def test_shipped_guests_are_built_from_these_sources() -> None:
    manifest = json.loads((PACKAGE / "_prebuilt" / "manifest.json").read_text())
    stale = [n for n in GUESTS if manifest[n]["source_hash"] != source_hash(SOURCES)]
    assert not stale, f"run: python -m edgelab.build --ship ({stale})"


def test_shipped_guest_behaves_like_the_built_one(rust: Toolchain) -> None:
    model = load("signs-tiny")
    both = []
    for path in (guest_path("classify").path, PACKAGE / "_prebuilt" / "classify.wasm"):
        guest = Classifier(Guest(Path(path)).instantiate())
        guest.load_model(model.data)
        both.append(guest)
    for sample in Signs("test", 4, size=96):
        request = {
            "image_data": sample.image.ravel().tolist(),
            "width": 96,
            "height": 96,
            "model_id": "signs-tiny",
        }
        built, shipped = (guest.infer(request) for guest in both)
        assert built["label"] == shipped["label"]
        assert built["confidence"] == pytest.approx(shipped["confidence"], abs=1e-5)
        for kernel in KERNELS:
            tensors = [g.preprocess(sample.image, model.spec, kernel).copy() for g in both]
            np.testing.assert_allclose(tensors[0], tensors[1], atol=1e-5)
