"""Finding a Rust that targets wasm32-wasip1, and getting one."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgelab import toolchain
from edgelab.errors import ToolchainError
from edgelab.toolchain import (
    TARGET,
    Source,
    find,
    has_wasm_packages,
    parse_sources,
    pick_mirror,
    remove_tree,
    run_live,
    source_files,
)

ROOT = Path(__file__).parent.parent
GUEST = ROOT / "guest"

posix = pytest.mark.skipif(sys.platform == "win32", reason="uses shell scripts as programs")
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux"
)


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGELAB_TOOLCHAIN", raising=False)


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave PATH with one empty folder."""
    folder = tmp_path / "no programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- Which distributions have the packages ---


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, False),
        ({"ID": "debian", "VERSION_ID": "13"}, True),
        ({"ID": "debian", "VERSION_CODENAME": "forky"}, True),  # testing has no VERSION_ID
        ({"ID": "ubuntu", "VERSION_ID": "24.04"}, False),
        ({"ID": "ubuntu", "VERSION_ID": "25.04"}, False),
        ({"ID": "ubuntu", "VERSION_ID": "25.10"}, True),
        ({"ID": "ubuntu", "VERSION_ID": "26.04"}, True),
        ({"ID": "fedora", "VERSION_ID": "42"}, False),
        ({}, False),
    ],
)
def test_has_wasm_packages(release: dict[str, str], expected: bool) -> None:
    assert has_wasm_packages(release) is expected


# --- The mirror in apt's sources ---


def test_parse_sources_list() -> None:
    text = """\
# deb http://mirror.example/commented bookworm main
deb http://mirror.example/debian bookworm main contrib  # the main one
deb-src http://mirror.example/debian bookworm main
  deb [arch=amd64 signed-by=/k.gpg] https://vendor.example/apt/ bookworm stable
deb http://mirror.example/debian-security bookworm-security main
deb broken
"""
    assert parse_sources(text, deb822=False) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("https://vendor.example/apt/", "bookworm", ("stable",)),
        Source("http://mirror.example/debian-security", "bookworm-security", ("main",)),
    ]


def test_parse_deb822_sources() -> None:
    text = """\
Types: deb deb-src
# a comment inside the stanza
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://mirror.example/off
Suites: bookworm
Components: main

types: deb-src
uris: http://mirror.example/only-sources
suites: bookworm
components: main


"""
    assert parse_sources(text, deb822=True) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://mirror.example/debian", "bookworm-updates", ("main", "contrib")),
    ]


@pytest.mark.parametrize("deb822", [False, True])
@pytest.mark.parametrize("text", ["", "\n\n", ":", "deb", "Types: deb", "\0\n \n:::", "Enabled:\n"])
def test_parse_sources_of_rubbish(text: str, deb822: bool) -> None:
    assert parse_sources(text, deb822=deb822) == []


def test_pick_mirror() -> None:
    main = Source("http://mirror.example/debian/", "bookworm", ("main",))
    others = [
        Source("http://mirror.example/debian-security", "bookworm-security", ("main",)),
        Source("https://vendor.example/node", "nodistro", ("main",)),
        Source("https://vendor.example/docker", "bookworm", ("stable",)),
        Source("https://vendor.example/tools", "bookworm", ("main",)),
        Source("cdrom:[Debian]/debian", "bookworm", ("main",)),
    ]
    assert pick_mirror([*others, main], "bookworm") == "http://mirror.example/debian"
    assert pick_mirror(others[:3], "bookworm") is None


# --- The files of a workspace ---


def test_source_files(tmp_path: Path) -> None:
    wanted = [".cargo/config.toml", "Cargo.lock", "Cargo.toml", "a/Cargo.toml", "a/src/build/x.rs"]
    unwanted = ["target/x", "build/a.wasm", "a/target/x", ".git/config", ".DS_Store", "a/.swp"]
    for name in wanted + unwanted:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)] == wanted


# --- The ways, on this machine ---


@pytest.mark.usefixtures("rust")
def test_what_find_returns_can_run_cargo() -> None:
    found = find(GUEST)
    assert found.cargo, f"these tests need a Rust: {found.tried}"
    assert found.rustc.startswith("rustc 1.")
    assert found.rustc in found.reason
    done = found.run(["--version"], GUEST, title="cargo's version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "cargo")


def test_unknown_kind_is_an_error_that_lists_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "docker")
    with pytest.raises(ToolchainError, match="installed, rustup, apt, debootstrap, prebuilt"):
        find(GUEST)


def test_without_programs_it_falls_through_to_prebuilt(no_programs: Path) -> None:
    found = find(GUEST)
    assert found.kind == "prebuilt"
    why_not = dict(found.tried)
    assert list(why_not) == ["installed", "rustup", "apt", "debootstrap"]
    assert "no cargo" in why_not["installed"]
    assert "no rustup" in why_not["rustup"]
    assert all("Cure: " in reason for reason in why_not.values())
    with pytest.raises(ToolchainError, match="no cargo"):
        found.run(["build"], GUEST, title="build")


@pytest.mark.parametrize("kind", ["installed", "rustup", "apt", "debootstrap"])
def test_forced_kind_that_is_impossible(
    kind: str, no_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", kind)
    with pytest.raises(ToolchainError, match=rf"EDGELAB_TOOLCHAIN={kind} is impossible.*Cure: "):
        find(GUEST)


def test_forced_prebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    found = find(GUEST)
    assert (found.kind, found.cargo, found.tried) == ("prebuilt", (), ())
    assert "forced" in found.reason


@posix
def test_a_rust_that_is_too_old_says_so(no_programs: Path) -> None:
    script(no_programs / "cargo", "exit 1")
    script(no_programs / "rustc", "echo 'rustc 1.70.0 (90c541806 2023-05-31)'")
    with pytest.raises(ToolchainError, match=r"1\.70\.0.*the guests need 1\.85"):
        toolchain.installed(GUEST)


@posix
def test_a_rust_without_the_target_names_e1(no_programs: Path) -> None:
    script(no_programs / "cargo", "exit 1")
    script(no_programs / "rustc", "echo 'rustc 1.95.0 (59807616e 2026-04-14)'")
    with pytest.raises(ToolchainError, match=rf"{TARGET} \(E1, P1\).*rustup target add"):
        toolchain.installed(GUEST)


@posix
@pytest.mark.usefixtures("rust")
def test_a_second_rust_on_path_is_used_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = toolchain.installed(GUEST)
    script(tmp_path / "cargo", "exit 1")
    script(tmp_path / "rustc", "echo broken >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = toolchain.installed(GUEST)
    assert found.cargo == usual.cargo
    assert f"PATH also holds Rust in {tmp_path}" in found.reason
    first_on_path = found.env["PATH"].split(os.pathsep)[0]
    assert first_on_path == str(Path(found.cargo[0]).parent)


@pytest.mark.usefixtures("rust")
def test_the_users_rustflags_are_not_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSTFLAGS", "-C target-cpu=native")
    monkeypatch.setenv("RUSTUP_UPDATE_ROOT", "kept")
    found = toolchain.installed(GUEST)
    assert "RUSTFLAGS" not in found.env
    assert found.env["RUSTUP_UPDATE_ROOT"] == "kept"
    assert "kept" not in repr(found)


@pytest.mark.skipif(shutil.which("rustup") is None, reason="no rustup here")
def test_rustup_adds_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ``rustup target add``; it needs no network if the target is there."""
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "rustup")
    found = find(GUEST)
    assert found.kind == "rustup"
    assert f"rustup added {TARGET}" in found.reason


@posix
def test_a_failing_rustup_is_passed_over_with_its_reason(no_programs: Path) -> None:
    script(
        no_programs / "rustup",
        "echo 'info: downloading' >&2; echo 'error: component download failed' >&2; exit 1",
    )
    found = find(GUEST)
    assert found.kind == "prebuilt"
    assert "error: component download failed" in dict(found.tried)["rustup"]


@pytest.mark.skipif(
    sys.platform != "linux" or has_wasm_packages(platform.freedesktop_os_release()),
    reason="would install packages here",
)
def test_apt_on_a_system_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "apt")
    with pytest.raises(ToolchainError, match="EDGELAB_TOOLCHAIN=apt is impossible here"):
        find(GUEST)


@needs_root
def test_a_debian_that_others_can_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "debian13"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "debootstrap")
    with pytest.raises(ToolchainError, match="can be written by others"):
        find(GUEST)


@needs_root
def test_a_cache_folder_that_can_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "debootstrap")
    with pytest.raises(ToolchainError, match="Not a directory"):
        find(GUEST)


@needs_root
@pytest.mark.skipif(
    os.environ.get("EDGELAB_TEST_DEBOOTSTRAP") != "1",
    reason="opt-in by EDGELAB_TEST_DEBOOTSTRAP=1: downloads 300 MB and may install debootstrap",
)
@pytest.mark.timeout(900)
def test_debootstrap_makes_a_debian_that_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make a real Debian 13 and build a guest in it. Slow: some 2 minutes and 1.3 GB on disk.

    It may install the package debootstrap on this system, so it only runs with
    EDGELAB_TEST_DEBOOTSTRAP=1.
    """
    cache = tmp_path / "ü cache"
    monkeypatch.setenv("EDGELAB_CACHE", str(cache))
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "debootstrap")
    crate = tmp_path / "ü crate"
    (crate / "src").mkdir(parents=True)
    (crate / "Cargo.toml").write_text('[package]\nname = "tiny"\nedition = "2024"\n')
    (crate / "src" / "main.rs").write_text("fn main() {}")
    try:
        found = find(crate)
        assert found.root == cache / "debian13"
        again = time.monotonic()
        assert find(crate) == found
        assert time.monotonic() - again < 5
        done = found.run(["build", "--target", TARGET], crate, title="cargo builds")
        assert done.returncode == 0, done.stdout
        wasm = found.target_dir(crate) / TARGET / "debug" / "tiny.wasm"
        assert wasm.read_bytes()[:4] == b"\0asm"
        assert str(cache) not in Path("/proc/self/mounts").read_text()
        assert sorted(path.name for path in cache.iterdir()) == ["debian13", "debian13.lock"]
    finally:
        remove_tree(cache)


# --- Removing folders ---


def test_remove_tree(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    (folder / "c").mkdir(parents=True)
    (folder / "c" / "out").symlink_to(tmp_path)
    remove_tree(folder)
    assert not folder.exists()
    assert tmp_path.exists()


@needs_root
def test_remove_tree_does_not_reach_through_a_mount(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    (folder / "proc").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from edgelab.toolchain import remove_tree\n"
        "remove_tree(Path(sys.argv[1]))"
    )
    # The mount is in a namespace of its own, so that it ends with the process.
    shell = 'mount -t tmpfs none "$1/proc" && touch "$1/proc/kept" || exit 77\n"$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{shell}; ls "$1/proc"', "sh", folder, sys.executable,
         code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mounts allowed here: {done.stderr}")
    assert f"{folder / 'proc'} is mounted in it" in done.stderr
    assert done.stdout == "kept\n"


# --- Running programs ---


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_live_returns_status_and_output(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('ü', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    done = run_live(python(code), "quick", 60, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout.splitlines()) == (3, ["ü", "err"])
    assert capfd.readouterr().err == ""


def test_run_live_shows_what_takes_longer_than_2_s(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import time; print('early', flush=True); time.sleep(2.3); print('late')"
    done = run_live(python(code), "something slow", 60)
    assert done.stdout.splitlines() == ["early", "late"]
    assert capfd.readouterr().err.splitlines() == ["edgelab: something slow …", "early", "late"]


@posix
def test_run_live_ends_a_program_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    start = time.monotonic()
    done = run_live(["sh", "-c", f"(sleep 1; touch '{mark}') & sleep 30"], "hangs", 0.3)
    assert done.returncode == 124
    assert "ended after" in done.stdout
    assert time.monotonic() - start < 5
    time.sleep(1.2)
    assert not mark.exists()


def test_run_live_of_a_program_that_is_missing(tmp_path: Path) -> None:
    done = run_live([str(tmp_path / "nothing")], "missing", 60)
    assert done.returncode == 127
    assert "nothing" in done.stdout


def test_import_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import edgelab.toolchain\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        python(code), cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "['edgelab']"
