"""Building guests, knowing when not to, and the guests that the package ships."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgelab import build as build_module
from edgelab import paths
from edgelab.build import GUESTS, RECIPES, BuiltGuest, build, guest_path, ready_guest, source_hash
from edgelab.errors import BuildError, ToolchainError
from edgelab.runtime import Guest
from edgelab.toolchain import Toolchain, find

ROOT = Path(__file__).parent.parent

MANIFEST = """\
[workspace]
resolver = "3"
members = ["classify", "classify_nn", "cli"]

[profile.release]
strip = true
panic = "abort"
"""
LIBRARY = """\
#[unsafe(no_mangle)]
pub extern "C" fn twice(number: u32) -> u32 {
    number * 2
}
"""
PROGRAM = """\
fn main() {
    let words: Vec<String> = std::env::args().collect();
    println!("{}", words[1]); // its panic names this file
}
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGELAB_TOOLCHAIN", "CARGO_TARGET_DIR"):
        monkeypatch.delenv(name, raising=False)


def make_workspace(folder: Path) -> Path:
    """Write a workspace with the guests' names and next to nothing in them."""
    folder.mkdir(parents=True)
    (folder / "Cargo.toml").write_text(MANIFEST)
    lock = "version = 4\n"
    for name in GUESTS:
        (folder / name / "src").mkdir(parents=True)
        library = name != "cli"
        crate = f'[package]\nname = "{name}"\nversion = "0.1.0"\nedition = "2024"\n'
        kind = '[lib]\ncrate-type = ["cdylib"]\n' if library else ""
        (folder / name / "Cargo.toml").write_text(crate + kind)
        code = folder / name / "src" / ("lib.rs" if library else "main.rs")
        code.write_text(LIBRARY if library else PROGRAM)
        lock += f'\n[[package]]\nname = "{name}"\nversion = "0.1.0"\n'
    (folder / "Cargo.lock").write_text(lock)
    return folder


@pytest.fixture(scope="module")
def built(rust: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose guests are built, in a folder with a space and an umlaut."""
    workspace = make_workspace(tmp_path_factory.mktemp("build") / "ü b" / "guest")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EDGELAB_TOOLCHAIN", raising=False)
        patch.delenv("CARGO_TARGET_DIR", raising=False)
        build(source=workspace)
    return workspace


@pytest.fixture
def workspace(built: Path, tmp_path: Path) -> Path:
    """Return a copy of the built workspace, with what cargo made, for a test to change."""
    return shutil.copytree(built, tmp_path / "ü w" / "guest")


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave PATH with one empty folder: whatever works now, works without cargo."""
    (tmp_path / "no programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


# --- The sources' hash ---


def test_source_hash(tmp_path: Path) -> None:
    one, two = make_workspace(tmp_path / "one"), make_workspace(tmp_path / "two")
    start = source_hash(one)
    assert source_hash(two) == start  # neither the place nor the order of creation matters
    for path in two.rglob("*.*"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        os.utime(path, (0, 0))
    (two / "target").mkdir()
    (two / "target" / "CACHEDIR.TAG").touch()
    (two / ".DS_Store").touch()
    assert source_hash(two) == start

    seen = {start}
    for change in ("Cargo.lock", "rust-toolchain.toml", ".cargo/config.toml", "cli/src/main.rs"):
        (one / change).parent.mkdir(exist_ok=True)
        with open(one / change, "a") as file:
            file.write("#")
        seen.add(source_hash(one))
    (one / "cli" / "src" / "main.rs").rename(one / "cli" / "src" / "other.rs")
    seen.add(source_hash(one))
    assert len(seen) == 6


# --- A guest in a workspace of its own ---

SIMD = """\
#[unsafe(no_mangle)]
pub extern "C" fn simd() -> u32 {
    cfg!(target_feature = "simd128") as u32
}

#[unsafe(no_mangle)]
pub extern "C" fn pick(index: usize) -> u32 {
    [1, 2, 3][index] // its panic names this file
}
"""


def add_workspace(folder: Path) -> Path:
    """Add a workspace with the guest ``classify_tract``, which uses ``classify``, compiled anew."""
    (folder / "classify" / "src" / "lib.rs").write_text(SIMD)
    manifest = folder / "classify" / "Cargo.toml"
    manifest.write_text(manifest.read_text().replace('["cdylib"]', '["cdylib", "rlib"]'))
    for name in ("imgproc", "inference"):
        (folder / name).mkdir()
    own = folder / "classify_tract"
    (own / "src").mkdir(parents=True)
    (own / ".cargo").mkdir()
    crate = '[package]\nname = "classify_tract"\nversion = "0.1.0"\nedition = "2024"\n'
    rest = '[workspace]\n[lib]\ncrate-type = ["cdylib"]\n[dependencies]\n'
    (own / "Cargo.toml").write_text(f'{crate}{rest}classify = {{ path = "../classify" }}\n')
    package = '\n[[package]]\nname = "{}"\nversion = "0.1.0"\n'
    packages = package.format("classify") + package.format("classify_tract")
    (own / "Cargo.lock").write_text(f'version = 4\n{packages}dependencies = [\n "classify",\n]\n')
    (own / "src" / "lib.rs").write_text("pub use classify::{pick, simd};\n")
    (own / ".cargo" / "config.toml").write_text(
        '[target.wasm32-wasip1]\nrustflags = ["-Ctarget-feature=+simd128"]\n'
    )
    return folder


def test_each_workspace_has_sources_of_its_own(tmp_path: Path) -> None:
    main = make_workspace(tmp_path / "main")
    alone = source_hash(main)
    own = main / "classify_tract"
    own.mkdir()
    (own / "Cargo.toml").write_text("[package]\n[workspace.lints]\n[lints]\n")
    (own / "more").mkdir()
    (own / "more" / "file.rs").touch()
    assert source_hash(main) == source_hash(main, "cli") == alone
    (own / "Cargo.toml").write_text("[package]\n[lints]\nworkspace = true\n")
    assert source_hash(main) != alone  # a crate like the others

    add_workspace(two := make_workspace(tmp_path / "two"))
    ours, theirs = source_hash(two), source_hash(two, "classify_tract")
    assert ours != theirs
    (two / "cli" / "src" / "main.rs").write_text("fn main() {}\n")
    assert source_hash(two) != ours
    assert source_hash(two, "classify_tract") == theirs
    ours = source_hash(two)
    seen = {theirs}
    for change in (
        "classify_tract/src/lib.rs", "classify_tract/.cargo/config.toml", "classify_tract/new",
        "classify/src/lib.rs", "imgproc/new", "inference/new", "Cargo.toml",
    ):  # fmt: skip
        with open(two / change, "a") as file:
            file.write("#")
        assert (source_hash(two) == ours) == change.startswith("classify_tract/")
        ours = source_hash(two)
        seen.add(source_hash(two, "classify_tract"))
    assert len(seen) == 8


def simd(guest: BuiltGuest) -> int:
    number: int = Guest(guest.path, cache=False).instantiate().call("simd")
    return number


@pytest.mark.usefixtures("rust")
@pytest.mark.parametrize("common", [False, True], ids=["own target folder", "common target folder"])
def test_workspaces_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, common: bool
) -> None:
    """Both build the crate ``classify``, with different flags, to files of the same name."""
    folder = add_workspace(make_workspace(tmp_path / "ü guest"))
    monkeypatch.setitem(
        RECIPES, "classify_tract", replace(RECIPES["classify_tract"], min_rust=(1, 85))
    )
    if common:
        monkeypatch.setenv("CARGO_TARGET_DIR", str(tmp_path / "target"))
    assert simd(build(["classify"], source=folder)["classify"]) == 0
    guest = build(["classify_tract"], source=folder)["classify_tract"]
    assert simd(guest) == 1
    assert guest.path == folder / "build" / "classify_tract.wasm"
    assert guest.provenance.source_hash == source_hash(folder, "classify_tract")
    wasm = guest.path.read_bytes()
    assert b"guest/classify/src/lib.rs" in wasm
    assert str(tmp_path).encode() not in wasm
    (folder / "build" / "classify.json").unlink()
    both = build(["classify_tract", "classify"], source=folder)
    assert list(both) == ["classify_tract", "classify"]
    assert [simd(guest) for guest in both.values()] == [1, 0]
    assert both["classify_tract"] == guest


def test_only_what_is_shipped_is_built_by_default(built: Path) -> None:
    assert "classify_tract" not in GUESTS
    assert set(build(source=built)) == set(GUESTS) < set(RECIPES)
    with pytest.raises(BuildError, match=r"classify_tract is no Rust workspace"):
        build(["classify_tract"], source=built)


@pytest.mark.usefixtures("rust")
def test_a_guest_may_need_a_newer_rust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_workspace(make_workspace(tmp_path / "guest"))
    monkeypatch.setitem(
        RECIPES, "classify_tract", replace(RECIPES["classify_tract"], min_rust=(9, 7))
    )
    rustc = find(folder).rustc
    with pytest.raises(BuildError) as caught:
        build(["classify_tract"], source=folder)
    message = str(caught.value)
    assert "'classify_tract' needs Rust 9.7 or newer" in message
    assert rustc in message
    assert "rustup update stable" in message
    assert simd(build(["classify"], source=folder)["classify"]) == 0


def test_a_guest_that_is_not_shipped_without_rust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_programs: None
) -> None:
    folder = add_workspace(make_workspace(tmp_path / "guest"))
    with pytest.raises(BuildError, match=r"needs Rust 1\.91 or newer, and there is none.*no cargo"):
        build(["classify_tract"], source=folder)
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    with pytest.raises(BuildError, match="does not ship the guest 'classify_tract'"):
        guest_path("classify_tract")
    assert ready_guest("classify_tract") is None


def test_the_real_workspaces_demand_the_rust_that_they_say() -> None:
    for recipe in RECIPES.values():
        manifest = (ROOT / "guest" / recipe.workspace / "Cargo.toml").read_text()
        assert f'rust-version = "{".".join(map(str, recipe.min_rust))}"' in manifest
        for part in recipe.uses:
            assert (ROOT / "guest" / part).exists()


# --- Building ---


def check(guest: BuiltGuest, source: Path) -> None:
    wasm = guest.path.read_bytes()
    assert guest.path == source / "build" / f"{guest.name}.wasm"
    assert wasm[:8] == b"\0asm\1\0\0\0"
    assert guest.size_bytes == len(wasm)
    assert guest.sha256 == hashlib.sha256(wasm).hexdigest()
    assert guest.provenance.source_hash == source_hash(source)
    assert guest.provenance.rustc.startswith("rustc 1.")
    assert "--locked" in guest.provenance.flags


def test_build(built: Path) -> None:
    guests = build(source=built)
    assert tuple(guests) == GUESTS
    for guest in guests.values():
        check(guest, built)
        assert json.dumps(guest.to_dict())
        assert guest.sha256 in guest._repr_html_()


def test_what_is_up_to_date_needs_no_cargo(workspace: Path, no_programs: None) -> None:
    for path in workspace.rglob("*.rs"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as git does on Windows
        os.utime(path)
    start = time.perf_counter()
    guests = build(source=workspace)
    assert time.perf_counter() - start < 0.3
    assert tuple(guests) == GUESTS


def test_changed_sources_are_built_again(workspace: Path) -> None:
    before = build(source=workspace)
    main = workspace / "cli" / "src" / "main.rs"
    main.write_text(PROGRAM.replace("{}", "now: {}"))
    after = build(source=workspace)
    assert after["cli"].sha256 != before["cli"].sha256
    assert b"now: " in after["cli"].path.read_bytes()
    assert after["classify"].sha256 == before["classify"].sha256
    check(after["classify"], workspace)


@pytest.mark.parametrize("damage", ["wasm", "", "[]", "{}", '{"sha256": 1, "flags": 2}'])
def test_a_damaged_build_is_made_again(workspace: Path, damage: str) -> None:
    good = build(["cli"], source=workspace)["cli"]
    if damage == "wasm":
        good.path.write_bytes(good.path.read_bytes()[:-1])
    else:
        good.path.with_suffix(".json").write_text(damage)
    assert build(["cli"], source=workspace)["cli"] == good
    check(good, workspace)


def test_the_same_sources_give_the_same_bytes_anywhere(built: Path, tmp_path: Path) -> None:
    elsewhere = make_workspace(tmp_path / "elsewhere")
    there, here = build(["cli"], source=elsewhere)["cli"], build(["cli"], source=built)["cli"]
    assert there.sha256 == here.sha256
    wasm = here.path.read_bytes()
    assert b"cli/src/main.rs" in wasm
    for private in (built.parent, Path.home() / ".cargo"):
        assert str(private).encode() not in wasm


@pytest.mark.usefixtures("rust")
def test_cargo_target_dir_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path / "guest")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARGO_TARGET_DIR", "ü target")  # relative to where the user is
    check(build(["cli"], source=workspace)["cli"], workspace)
    assert (tmp_path / "ü target" / "wasm32-wasip1" / "release" / "cli.wasm").is_file()
    assert not (workspace / "target").exists()


@pytest.mark.usefixtures("rust")
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "guest")
    code = (
        "import sys; from pathlib import Path; from edgelab.build import build\n"
        "print(build(['cli'], source=Path(sys.argv[1]))['cli'].sha256)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(workspace)], text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert sum("building cli" in stderr for _, stderr in said) == 1
    leftovers = {path.name for path in (workspace / "build").iterdir()}
    assert leftovers == {".lock", "cli.wasm", "cli.json"}


@pytest.mark.parametrize("name", GUESTS)
def test_guest_path_of_the_real_guests(name: str, request: pytest.FixtureRequest) -> None:
    guest = guest_path(name)
    check(guest, ROOT / "guest")
    for private in (ROOT, Path.home()):
        assert f"{private}{os.sep}".encode() not in guest.path.read_bytes()
    request.getfixturevalue("no_programs")
    start = time.perf_counter()
    assert guest_path(name) == guest
    assert time.perf_counter() - start < 0.3
    assert ready_guest(name) == guest


# --- Errors ---


@pytest.mark.parametrize("get", [guest_path, ready_guest, lambda name: build([name])])
def test_unknown_guest(get: object) -> None:
    assert callable(get)
    with pytest.raises(BuildError, match=r"no guest '\.\./x'.*classify, classify_nn, cli"):
        get("../x")


def test_a_folder_that_is_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"holds no Cargo\.toml"):
        build(source=tmp_path)


def test_broken_rust_gives_the_compilers_message(workspace: Path) -> None:
    old = build(["cli"], source=workspace)["cli"].path.read_bytes()
    (workspace / "cli" / "src" / "main.rs").write_text('fn main() { let x: u8 = "ü"; }\n')
    with pytest.raises(BuildError, match=r"error\[E0308\]: mismatched types") as caught:
        build(["cli"], source=workspace)
    assert "main.rs:1:25" in str(caught.value)
    assert "'cli'" in str(caught.value)
    assert (workspace / "build" / "cli.wasm").read_bytes() == old


def test_a_lock_file_that_does_not_match(workspace: Path) -> None:
    manifest = workspace / "cli" / "Cargo.toml"
    manifest.write_text(
        manifest.read_text() + '[dependencies]\nclassify = { path = "../classify" }\n'
    )
    with pytest.raises(BuildError, match=r"Cargo\.lock does not match.*cargo update"):
        build(["cli"], source=workspace)


@pytest.mark.usefixtures("rust")
def test_missing_crates_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path / "guest")
    nowhere = "sparse+http://127.0.0.1:9/"
    (workspace / ".cargo").mkdir()
    (workspace / ".cargo" / "config.toml").write_text(f'[registries]\nnone.index = "{nowhere}"\n')
    manifest = workspace / "cli" / "Cargo.toml"
    with open(manifest, "a") as file:
        file.write('[dependencies]\nmissing = { version = "1", registry = "none" }\n')
    lock = (workspace / "Cargo.lock").read_text().removesuffix("\n")
    (workspace / "Cargo.lock").write_text(
        f'{lock}\ndependencies = [\n "missing",\n]\n\n[[package]]\nname = "missing"\n'
        f'version = "1.0.0"\nsource = "{nowhere}"\nchecksum = "{"0" * 64}"\n'
    )
    monkeypatch.setenv("CARGO_NET_RETRY", "0")
    with pytest.raises(BuildError, match=r"network does not answer.*cargo fetch") as caught:
        build(["cli"], source=workspace)
    assert "127.0.0.1" in str(caught.value)


def test_a_missing_target_is_e1(workspace: Path) -> None:
    done = find(workspace).run(
        ["build", "--package", "cli", "--target", "s390x-unknown-linux-gnu"], workspace, title=""
    )
    assert done.returncode != 0
    message = build_module._explain("cli", done.stdout)
    assert "(E1, P1). Cure: rustup target add wasm32-wasip1" in message
    assert "error[E0463]" in message


def test_the_build_folder_can_not_be_written(workspace: Path) -> None:
    shutil.rmtree(workspace / "build")
    (workspace / "build").touch()
    with pytest.raises(BuildError, match=r"can't be written.*EDGELAB_TOOLCHAIN=prebuilt"):
        build(["cli"], source=workspace)


# --- The shipped guests. A copy of the package stands for a checkout or an installed wheel. ---


@pytest.fixture(scope="module")
def shipped(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout of a small edgelab that has shipped its guests."""
    root = tmp_path_factory.mktemp("shipped") / "ü checkout"
    (root / "edgelab").mkdir(parents=True)
    for name in ("build", "errors", "paths", "toolchain"):
        shutil.copy(ROOT / "edgelab" / f"{name}.py", root / "edgelab")
    (root / "edgelab" / "__init__.py").touch()
    (root / "pyproject.toml").touch()
    shutil.copytree(built, root / "guest")
    done = run_copy(root, "--ship")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def checkout(shipped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shipped, tmp_path / "checkout")


@pytest.fixture
def wheel(shipped: Path, tmp_path: Path) -> Path:
    shutil.copytree(shipped / "edgelab", tmp_path / "site-packages" / "edgelab")
    return tmp_path / "site-packages"


def run_copy(root: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m edgelab.build``, or ``python -c`` with code, on a copy of the package."""
    how = ["-c"] if "import" in arguments[0] else ["-m", "edgelab.build"]
    return subprocess.run(
        [sys.executable, *how, *arguments], cwd=root.parent, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUTF8": "1", **env}, check=False,
    )  # fmt: skip


GET = (
    "from edgelab.build import guest_path; guest = guest_path('cli')\n"
    "print(guest.provenance.toolchain, guest.path.parent.name, guest.sha256)"
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ship_writes_guests_and_manifest(shipped: Path) -> None:
    folder = shipped / "edgelab" / "_prebuilt"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == sorted(GUESTS)
    for name, facts in manifest.items():
        assert facts["sha256"] == sha256(folder / f"{name}.wasm")
        assert facts["size_bytes"] == (folder / f"{name}.wasm").stat().st_size
        assert facts["source_hash"] == source_hash(shipped / "guest")
        assert facts["rustc"].startswith("rustc 1.")
        assert "--release" in facts["flags"]
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert str(shipped).encode() not in everything


def test_a_guest_that_names_a_private_folder_is_not_shipped(checkout: Path) -> None:
    code = 'fn main() { println!("{}", env!("CARGO_MANIFEST_DIR")) }\n'
    (checkout / "guest" / "cli" / "src" / "main.rs").write_text(code)
    done = run_copy(checkout, "--ship")
    assert done.returncode == 1
    assert f"holds the path {checkout}" in done.stderr


def test_without_rust_a_checkout_uses_what_is_shipped(checkout: Path, no_programs: None) -> None:
    shutil.rmtree(checkout / "guest" / "build")
    first = run_copy(checkout, GET)
    expected = sha256(checkout / "edgelab" / "_prebuilt" / "cli.wasm")
    assert first.stdout.split() == ["prebuilt", "build", expected], first.stderr
    assert "no Rust; the guests that the package ships are used" in first.stderr
    assert "not rustup: PATH holds no rustup" in first.stderr
    again = run_copy(checkout, GET)
    assert (again.stdout, again.stderr) == (first.stdout, "")  # nothing is tried again


def test_build_looks_for_rust_again(checkout: Path) -> None:
    record = checkout / "guest" / "build" / "cli.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "toolchain": "prebuilt"}))
    assert run_copy(checkout, GET).stdout.startswith("prebuilt ")
    assert run_copy(checkout, "cli").returncode == 0
    assert not run_copy(checkout, GET).stdout.startswith("prebuilt ")


def test_a_stale_shipped_guest_is_not_used(checkout: Path, no_programs: None) -> None:
    with open(checkout / "guest" / "cli" / "src" / "main.rs", "a") as file:
        file.write("// changed\n")
    done = run_copy(checkout, GET)
    assert done.returncode == 1
    assert "BuildError: The shipped guest 'cli' is stale" in done.stderr
    assert "no cargo and rustc" in done.stderr  # why there is no Rust
    assert "EDGELAB_TOOLCHAIN=prebuilt" in done.stderr

    forced = run_copy(checkout, GET, EDGELAB_TOOLCHAIN="prebuilt")
    assert forced.stdout.startswith("prebuilt _prebuilt ")
    assert "StalePrebuilt: The shipped guest 'cli' is stale" in forced.stderr


def test_a_wheel_uses_what_it_ships(wheel: Path, no_programs: None) -> None:
    done = run_copy(wheel, GET)
    expected = sha256(wheel / "edgelab" / "_prebuilt" / "cli.wasm")
    assert done.stdout.split() == ["prebuilt", "_prebuilt", expected], done.stderr
    assert done.stderr == ""
    done = run_copy(wheel, "cli")
    assert done.returncode == 1
    assert "without the guests' sources" in done.stderr
    done = run_copy(wheel, GET.replace("cli", "classify_tract"))
    assert "BuildError: The package does not ship the guest 'classify_tract'" in done.stderr
    ready = "from edgelab.build import ready_guest; print(ready_guest('classify_tract'))"
    assert run_copy(wheel, ready).stdout == "None\n"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no entry", "manifest"])
def test_a_damaged_shipped_guest_is_rejected(wheel: Path, damage: str) -> None:
    wasm = wheel / "edgelab" / "_prebuilt" / "cli.wasm"
    manifest = wasm.with_name("manifest.json")
    content = wasm.read_bytes()
    if damage == "flip":
        wasm.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        wasm.write_bytes(content[:-1])
    elif damage == "remove":
        wasm.unlink()
    else:
        manifest.write_text("{}" if damage == "no entry" else "[1, 2")
    done = run_copy(wheel, GET)
    assert done.returncode == 1
    assert "is missing or damaged" in done.stderr
    assert "BuildError" in done.stderr


def test_forcing_a_toolchain_builds_with_that_one(
    workspace: Path, no_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = build(["cli"], source=workspace)["cli"].provenance.toolchain
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", made_by)
    build(["cli"], source=workspace)
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "rustup" if made_by != "rustup" else "installed")
    with pytest.raises(ToolchainError, match="is impossible here"):
        build(["cli"], source=workspace)


# --- edgelab.paths ---


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path))
    assert paths.cache_dir() == tmp_path
    monkeypatch.setenv("EDGELAB_CACHE", "relative")
    assert paths.cache_dir() == Path.cwd() / "relative"
    monkeypatch.delenv("EDGELAB_CACHE")
    assert paths.cache_dir().name == "edgelab"
    assert paths.cache_dir().is_absolute()
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert paths.cache_dir() == tmp_path / "edgelab"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert paths.cache_dir() == Path.home() / ".cache" / "edgelab"


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    paths.write_atomic(path, b"old")
    with pytest.raises(TypeError):
        paths.write_atomic(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_locked_keeps_another_process_out(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from edgelab.paths import locked\n"
        "with locked(Path(sys.argv[1])): print(Path(sys.argv[1] + '.done').exists())"
    )
    with paths.locked(lock):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert other.stderr is not None
        assert "waiting for another process" in other.stderr.readline()
        Path(f"{lock}.done").touch()
    assert other.communicate()[0] == "True\n"
