"""The cache of machine code: it must run nothing that this user did not write on this machine."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import wasmtime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wasmtime import component

from edgelab import aot
from edgelab.aot import (
    NATIVE_TARGET,
    PORTABLE_TARGET,
    Compiled,
    EngineConfig,
    compile_module,
    this_machine,
)
from edgelab.artifact import inspect_artifact
from edgelab.build import GUESTS, guest_path
from edgelab.errors import GuestError
from edgelab.paths import write_atomic
from edgelab.runtime import Guest
from edgelab.wasinn import WasiNN
from edgelab.wasm import interface


def module(number: int = 1, padding: int = 0) -> bytes:
    """A module whose function returns a number."""
    data = f'(memory 1) (data (i32.const 0) "{"x" * padding}")' if padding else ""
    text = f'(module {data} (func (export "f") (result i32) i32.const {number}))'
    return bytes(wasmtime.wat2wasm(text))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache ü"
    monkeypatch.setenv("EDGELAB_CACHE", str(folder))
    return folder


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "aot").iterdir())


def entry(cache: Path) -> Path:
    (only,) = entries(cache)
    return only


def answer(compiled: Compiled) -> int:
    store = wasmtime.Store(compiled.engine)
    store.set_epoch_deadline(1)
    if compiled.engine is aot.engine(EngineConfig(fuel=True)):
        store.set_fuel(1000)
    function = wasmtime.Instance(store, compiled.module, []).exports(store)["f"]
    assert isinstance(function, wasmtime.Func)
    result: int = function(store)
    return result


def test_the_second_time_code_comes_from_the_cache(cache: Path) -> None:
    first, second = compile_module(module(7)), compile_module(module(7))
    assert (first.origin, second.origin) == ("compiled", "cache")
    assert first.artifact_bytes == second.artifact_bytes > 0
    assert answer(first) == answer(second) == 7
    assert Guest(module(7)).compiled.origin == "cache"


def test_without_the_cache_nothing_is_written(cache: Path) -> None:
    assert compile_module(module(), cache=False).origin == "compiled"
    assert not cache.exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_only_this_user_can_read_or_write_the_cache(cache: Path) -> None:
    before = os.umask(0)
    try:
        compile_module(module())
    finally:
        os.umask(before)
    assert stat.S_IMODE((cache / "aot").stat().st_mode) == 0o700
    assert stat.S_IMODE((cache / "aot.key").stat().st_mode) == 0o600
    assert len((cache / "aot.key").read_bytes()) == 32
    assert {path.name for path in cache.iterdir()} == {"aot", "aot.key"}  # nothing temporary


def test_each_cache_has_a_key_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module(module())
    monkeypatch.setenv("EDGELAB_CACHE", str(cache / "other"))
    compile_module(module())
    assert (cache / "aot.key").read_bytes() != (cache / "other" / "aot.key").read_bytes()


def assert_rebuilt(cache: Path, message: str = "was not written by this user") -> None:
    """The next load distrusts the entry, and replaces it; the one after that trusts it again."""
    with pytest.warns(UserWarning, match=message):
        compiled = compile_module(module(7))
    assert (compiled.origin, answer(compiled)) == ("compiled", 7)
    again = compile_module(module(7))
    assert (again.origin, answer(again)) == ("cache", 7)


@pytest.mark.parametrize("position", [0, 13, 14, 45, 46, 500, -1])
def test_a_changed_byte_anywhere_is_noticed(cache: Path, position: int) -> None:
    compile_module(module(7))
    data = bytearray(entry(cache).read_bytes())
    data[position] ^= 1
    entry(cache).write_bytes(data)
    assert_rebuilt(cache)


@pytest.mark.parametrize("size", [0, 1, 13, 14, 45, 46, 47, 1000, -1])
def test_a_cut_entry_is_noticed(cache: Path, size: int) -> None:
    compile_module(module(7))
    entry(cache).write_bytes(entry(cache).read_bytes()[:size])
    assert_rebuilt(cache)


def test_appended_bytes_are_noticed(cache: Path) -> None:
    compile_module(module(7))
    with open(entry(cache), "ab") as file:
        file.write(b"\0")
    assert_rebuilt(cache)


def test_an_entry_under_another_entrys_name_is_noticed(cache: Path) -> None:
    compile_module(module(7))
    seven = entry(cache)
    compile_module(module(8))
    (eight,) = set(entries(cache)) - {seven}
    seven.write_bytes(eight.read_bytes())
    assert_rebuilt(cache)


def test_an_entry_from_another_users_cache_is_noticed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module(module(7))
    monkeypatch.setenv("EDGELAB_CACHE", str(cache / "other"))
    compile_module(module(7))
    entry(cache).write_bytes(entry(cache / "other").read_bytes())
    monkeypatch.setenv("EDGELAB_CACHE", str(cache))
    assert_rebuilt(cache)


def test_bare_machine_code_is_not_an_entry(cache: Path) -> None:
    compiled = compile_module(module(7))
    entry(cache).write_bytes(compiled.module.serialize())
    assert_rebuilt(cache)


def test_authentic_code_for_another_engine_is_rebuilt(cache: Path) -> None:
    """As after a change that the entry's name does not tell: wasmtime itself looks too."""
    portable = compile_module(module(7), EngineConfig(target=PORTABLE_TARGET))
    store = aot._Cache.open()
    assert store is not None
    name = aot._entry_name(module(7), EngineConfig())
    code = bytes(portable.module.serialize())
    store.write(name, code, EngineConfig(), portable.interface)
    assert_rebuilt(cache, "P5, E6: cached machine code does not fit this engine")


def test_an_entry_that_can_not_be_read_or_written_costs_only_time(cache: Path) -> None:
    compile_module(module(7))
    path = entry(cache)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot read"), pytest.warns(match="cannot write"):
        assert answer(compile_module(module(7))) == 7


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda cache: (cache / "aot").chmod(0o755),
        lambda cache: (cache / "aot.key").chmod(0o644),
        lambda cache: (cache / "aot.key").write_bytes(b"short"),
        lambda cache: (cache / "aot.key").write_bytes(b"x" * 33),
        lambda cache: replace_by_link(cache / "aot"),
        lambda cache: replace_by_link(cache / "aot.key"),
    ],
    ids=["folder open", "key open", "key short", "key long", "folder linked", "key linked"],
)
def test_a_cache_that_others_could_feed_is_left_alone(
    cache: Path, spoil: object, request: pytest.FixtureRequest
) -> None:
    assert callable(spoil)
    compile_module(module(7))
    spoil(cache)
    before = entry(cache).read_bytes()
    for number in (7, 8):
        with pytest.warns(UserWarning, match=r"no ahead-of-time cache.*EDGELAB_CACHE"):
            compiled = compile_module(module(number))
        assert (compiled.origin, answer(compiled)) == ("compiled", number)
    assert entry(cache).read_bytes() == before


def replace_by_link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no user ids")
def test_a_cache_of_another_user_is_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module(module(7))
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # only root could really give files away
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert compile_module(module(7)).origin == "compiled"


def test_where_nothing_can_be_written_guests_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # permissions would not stop root
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="no ahead-of-time cache"):
        assert answer(compile_module(module(7))) == 7


def test_other_configurations_and_machines_have_entries_of_their_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        EngineConfig(),
        EngineConfig(fuel=True),
        EngineConfig(optimize=False),
        EngineConfig(target=NATIVE_TARGET),
        EngineConfig(target=PORTABLE_TARGET),
    ]
    for config in configs:
        assert compile_module(module(7), config).origin == "compiled"
    assert len(entries(cache)) == len(configs)
    for config in configs:
        again = compile_module(module(7), config)
        assert (again.origin, answer(again)) == ("cache", 7)
    monkeypatch.setattr(aot, "cpu_features", lambda: ("another", "cpu"))
    assert compile_module(module(7)).origin == "compiled"
    monkeypatch.undo()
    monkeypatch.setenv("EDGELAB_CACHE", str(cache))
    monkeypatch.setattr(aot, "_SETTINGS", {**aot._SETTINGS, "another": True})
    assert compile_module(module(7)).origin == "compiled"


def test_the_key_of_the_process_that_was_first_counts(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(source: str, target: Path) -> None:
        target.write_bytes(b"k" * 32)  # another process, at the last moment
        target.chmod(0o600)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    compile_module(module(7))
    assert (cache / "aot.key").read_bytes() == b"k" * 32
    assert compile_module(module(7)).origin == "cache"


def test_processes_that_start_at_once_share_the_cache(cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edgelab.aot import compile_module\n"
        "for path in sys.argv[1:]: print(compile_module(Path(path).read_bytes()).origin)"
    )
    cache.mkdir()
    paths = []
    for number in range(12):
        paths.append(cache / f"{number}.wasm")
        paths[-1].write_bytes(module(number, 1000))
    command = [sys.executable, "-W", "error", "-c", script, *map(str, paths)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process, (out, err) in [(each, each.communicate(timeout=100)) for each in running]:
        assert (process.returncode, err, len(out.split())) == (0, "", 12)
    assert len(entries(cache)) == 12
    for number in range(12):
        compiled = compile_module(module(number, 1000))
        assert (compiled.origin, answer(compiled)) == ("cache", number)


def test_the_cache_drops_what_was_not_used_for_longest(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module(module(0))
    size = entry(cache).stat().st_size
    monkeypatch.setattr(aot, "_CACHE_BYTES", 4 * size)
    leftover = cache / "aot" / ".half-written"
    leftover.write_bytes(bytes(size))
    os.utime(leftover, (1, 1))
    by_number = {0: entries(cache)[-1]}
    for number in (1, 2):
        known = set(entries(cache))
        compile_module(module(number))
        (by_number[number],) = set(entries(cache)) - known
    for number, path in by_number.items():
        os.utime(path, (10 + number, 10 + number))
    assert leftover.exists()
    assert compile_module(module(0)).origin == "cache"  # used just now, so not the oldest any more
    for number in (3, 4):
        compile_module(module(number))
    assert not leftover.exists()
    assert not by_number[1].exists()
    assert len(entries(cache)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [compile_module(module(k)).origin for k in (0, 2, 3, 4)] == ["cache"] * 4


def test_one_entry_may_be_larger_than_the_limit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_CACHE_BYTES", 10)
    compile_module(module(1))
    compile_module(module(2))
    assert len(entries(cache)) == 1
    assert compile_module(module(2)).origin == "cache"


@pytest.mark.parametrize(
    "target", ["s390x-unknown-linux-gnu", "x86_64-unknown-freebsd", "foo", "", "x86_64\0"]
)
def test_code_for_another_machine_is_a_clear_error(target: str) -> None:
    """wasmtime aborts the process at some of these names."""
    with pytest.raises(GuestError, match=r"P5: this wasmtime makes and runs code for .*portable"):
        Guest(module(), config=EngineConfig(target=target))


def test_code_that_this_machine_can_not_run_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign = f"{NATIVE_TARGET.partition('-')[0]}-unknown-freebsd"
    monkeypatch.setattr(aot, "NATIVE_TARGET", foreign)
    with pytest.raises(GuestError, match=r"P5, E10: EngineConfig.*this machine can't run"):
        compile_module(module(), EngineConfig(target=foreign))


@pytest.mark.parametrize("target", [None, NATIVE_TARGET, PORTABLE_TARGET])
def test_unknown_cpu_features_are_a_clear_error(target: str | None) -> None:
    """wasmtime aborts the process at them."""
    for flag in ("nonsense", "opt_level", "has_avx2\0", "has_neon", ""):
        with pytest.raises(GuestError, match="has no CPU feature"):
            Guest(module(), config=EngineConfig(target=target, flags=(flag,)))


def test_every_listed_cpu_feature_is_known_to_wasmtime() -> None:
    """In a process of its own, for an unknown one would abort it."""
    script = (
        "from edgelab.aot import _FLAGS, EngineConfig, NATIVE_TARGET, engine\n"
        "for flag in _FLAGS[NATIVE_TARGET.partition('-')[0]]:\n"
        "    engine(EngineConfig(target=NATIVE_TARGET, flags=(flag,)))\n"
        "print('all')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr


def test_portable_code_computes_the_same() -> None:
    portable = Guest(module(7), config=EngineConfig(target=PORTABLE_TARGET))
    assert portable.instantiate().call("f") == 7


def test_a_huge_module_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "MAX_MODULE_BYTES", len(module()) - 1)
    with pytest.raises(GuestError, match=r"P2: the module has .*WASI-NN"):
        compile_module(module())


def test_fuel_adds_to_a_configuration() -> None:
    guest = Guest(module(), fuel=True, config=EngineConfig(optimize=False))
    assert guest.config == EngineConfig(fuel=True, optimize=False)
    instance = guest.instantiate()
    instance.call("f")
    assert instance.fuel_used > 0


# --- What of the cache is mapped, and what it tells -----------------------------------------------


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names an open file by a path")
def test_only_a_file_that_nobody_else_can_write_to_is_mapped(cache: Path) -> None:
    compile_module(module(7))
    path = entry(cache)
    path.chmod(0o600)
    first = compile_module(module(7))
    assert mapped(path)
    assert (first.origin, answer(first)) == ("cache", 7)
    del first
    assert not mapped(path)
    for mode in (0o620, 0o602):
        path.chmod(mode)  # as it is in a folder that lets others in, or under a strange umask
        copied = compile_module(module(7))
        assert not mapped(path)
        assert (copied.origin, answer(copied)) == ("cache", 7)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names an open file by a path")
def test_a_mapped_entry_may_be_replaced_or_removed(cache: Path) -> None:
    compile_module(module(7))
    used = compile_module(module(7))
    path = entry(cache)
    write_atomic(path, b"other bytes" * 1000)
    assert answer(used) == 7
    path.unlink()
    assert answer(used) == 7


def test_where_nothing_can_be_executed_entries_are_copied(tmp_path: Path) -> None:
    script = (
        "import sys; from edgelab.aot import compile_module; wasm = bytes.fromhex(sys.argv[1])\n"
        "print(compile_module(wasm).origin, end=' '); compiled = compile_module(wasm)\n"
        "print(compiled.origin, 'aot/' in open('/proc/self/maps').read())"
    )
    mount = 'mount -t tmpfs -o noexec none "$1" && EDGELAB_CACHE="$1" "$2" -c "$3" "$4"'
    arguments = ["sh", "-c", mount, "sh", str(tmp_path), sys.executable, script, module(7).hex()]
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    done = subprocess.run(["unshare", "--mount", *arguments], capture_output=True, text=True)
    if done.stderr.startswith(("mount: ", "unshare: ")):
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    assert (done.stdout, done.stderr) == ("compiled cache False\n", "")


@pytest.mark.parametrize("name", GUESTS)
def test_an_entry_tells_the_interface(name: str) -> None:
    wasm = guest_path(name).path.read_bytes()
    for origin in ("compiled", "cache"):
        compiled = compile_module(wasm)
        assert compiled.origin == origin
        assert compiled.interface == interface(wasm)


def test_machine_code_for_a_cpu_with_avx_512_is_not_for_one_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it, without = ("avx2", "avx512f", "sse2"), ("avx2", "sse2")
    monkeypatch.setattr(aot, "cpu_features", lambda: with_it)
    assert [compile_module(module(7)).origin for _ in range(2)] == ["compiled", "cache"]
    monkeypatch.setattr(aot, "cpu_features", lambda: without)
    assert compile_module(module(7)).origin == "compiled"
    assert len(entries(cache)) == 2
    monkeypatch.setattr(aot, "cpu_features", lambda: with_it)
    assert compile_module(module(7)).origin == "cache"


# --- Files of machine code ------------------------------------------------------------------------

NOT_OURS = "was not saved by this user on this machine, or was changed since"


def foreign(name: str) -> bytes:
    """Real machine code of ``(module (func (export "f") (result i32) i32.const 7))``.

    ``aarch64``: wasmtime 50 for that machine. ``wasmtime49``: that version, for x86-64.
    """
    return lzma.decompress((Path(__file__).parent / "artifacts" / f"{name}.cwasm.xz").read_bytes())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "seven.cwasm"
    compile_module(module(7)).save(path)
    return path


def test_saved_machine_code_needs_no_module(saved: Path) -> None:
    guest = Guest(saved)
    assert guest.compiled.origin == "artifact"
    assert guest.exports == (("f", "() -> (i32)"),)
    assert guest.instantiate().call("f") == 7
    assert guest.compiled.artifact_bytes == compile_module(module(7)).artifact_bytes
    assert Guest(saved.read_bytes()).instantiate().call("f") == 7
    sealed = saved.read_bytes()
    for origin in (guest.compiled, compile_module(module(7))):  # also from a file or the cache
        origin.save(saved)
        assert saved.read_bytes() == sealed
    assert Guest(str(saved)).instantiate().call("f") == 7


def test_a_saved_guest_gets_its_host_functions(tmp_path: Path) -> None:
    path = tmp_path / "nn.cwasm"
    Guest(guest_path("classify_nn").path, host=[WasiNN()]).compiled.save(path)
    with pytest.raises(GuestError, match="P3"):
        Guest(path)
    guest = Guest(path, host=[WasiNN()])
    assert guest.imports == Guest(guest_path("classify_nn").path, host=[WasiNN()]).imports
    name = b"nobody"
    instance = guest.instantiate()
    pointer = instance.call("alloc", len(name))
    instance.memory.write(pointer, name)
    assert instance.call("nn_load_by_name", pointer, len(name)) == -6


def test_saved_machine_code_keeps_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "portable.cwasm"
    config = EngineConfig(fuel=True, target=PORTABLE_TARGET)
    compile_module(module(7), config).save(path)
    guest = Guest(path)
    assert guest.config == config
    instance = guest.instantiate()
    assert (instance.call("f"), instance.fuel_used > 0) == (7, True)
    Guest(path, config=config)
    with pytest.raises(GuestError, match=r"E6: this machine code was made with .*pulley64"):
        Guest(path, fuel=True)


def test_saved_machine_code_tells_what_it_is(saved: Path) -> None:
    artifact = inspect_artifact(saved.read_bytes())
    code = wasmtime.Module(aot.engine(), module(7)).serialize()
    assert artifact == inspect_artifact(bytes(code))
    assert artifact.kind == "module"
    assert artifact.target.startswith(f"{artifact.machine}-")
    assert artifact.problem(this_machine()) is None
    if shutil.which("readelf"):
        said = subprocess.run(
            ["readelf", "--file-header", "--sections", "--wide", saved],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        text = said.index(".text")
        assert int(said[text + 4], 16) == artifact.code_bytes
        machine = {"x86_64": "X86-64", "aarch64": "AArch64"}.get(artifact.machine, "")
        assert machine in said[said.index("Machine:") + 1 :][:5]


def test_portable_code_says_so(tmp_path: Path) -> None:
    path = tmp_path / "portable.cwasm"
    compile_module(module(7), EngineConfig(target=PORTABLE_TARGET)).save(path)
    artifact = inspect_artifact(path.read_bytes())
    assert (artifact.machine, artifact.features) == ("pulley64", ())
    for machine in (this_machine(), replace(this_machine(), machine="aarch64", features=())):
        assert artifact.problem(machine) is None


def test_other_settings_are_no_cpu_features() -> None:
    code = foreign("aarch64")
    place = code.index(b"use_bti") + len("use_bti") + 1
    changed = code[:place] + b"\1" + code[place + 1 :]
    assert inspect_artifact(changed) == inspect_artifact(code)
    assert "has_lse" in inspect_artifact(code).features


def test_a_component_says_so() -> None:
    made = component.Component(aot.engine(), "(component)").serialize()
    assert inspect_artifact(bytes(made)).kind == "component"
    with pytest.raises(GuestError, match=NOT_OURS):
        Guest(bytes(made))


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that lets wasmtime take machine code."""
    this_machine()

    def refuse(*_: object) -> None:
        raise AssertionError("wasmtime got machine code that nobody vouches for")

    for name in ("deserialize", "deserialize_file"):
        monkeypatch.setattr(wasmtime.Module, name, refuse)


@pytest.mark.usefixtures("never_run")
def test_a_changed_byte_of_saved_code_is_noticed(saved: Path) -> None:
    good = saved.read_bytes()
    places = [*range(0, 64, 5), *range(64, len(good), 997), *range(len(good) - 500, len(good), 7)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        with pytest.raises(GuestError, match=f"{NOT_OURS}|E2: |P5: |E6: |E10: "):
            Guest(bytes(bad))
    for cut in (good[:-1], good + b"\0", good[:-100]):
        with pytest.raises(GuestError, match=NOT_OURS):
            Guest(cut)


@pytest.mark.usefixtures("never_run")
def test_code_that_nobody_signed_is_refused() -> None:
    with pytest.raises(GuestError, match=NOT_OURS):
        Guest(bytes(wasmtime.Module(aot.engine(), module(7)).serialize()))


@pytest.mark.usefixtures("never_run")
def test_code_that_another_user_saved_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "another user's"))
    with pytest.raises(GuestError, match=NOT_OURS):
        Guest(saved)


def test_an_entry_is_no_saved_file_nor_a_saved_file_an_entry(saved: Path, cache: Path) -> None:
    with pytest.raises(GuestError, match=NOT_OURS):
        Guest(entry(cache))
    entry(cache).write_bytes(saved.read_bytes())
    assert_rebuilt(cache)


def test_without_a_safe_key_nothing_is_saved_or_loaded(saved: Path, cache: Path) -> None:
    compiled = Guest(saved).compiled
    (cache / "aot.key").chmod(0o644)
    with pytest.raises(GuestError, match=r"can't be signed: .*open to other users.*EDGELAB_CACHE"):
        compiled.save(saved)
    with pytest.warns(UserWarning, match="no ahead"), pytest.raises(GuestError, match=NOT_OURS):
        Guest(saved)


@pytest.mark.usefixtures("never_run")
def test_code_for_another_machine_is_p5() -> None:
    """Real files: nothing of them can run here, and wasmtime is not asked."""
    here = this_machine().machine
    name, machine = ("wasmtime49", "x86_64") if here == "aarch64" else ("aarch64", "aarch64")
    assert inspect_artifact(foreign(name)).machine == machine
    with pytest.raises(GuestError, match=f"P5: this is machine code for {machine}, .*{here}.*wasm"):
        Guest(foreign(name))


def test_the_elf_header_counts_too() -> None:
    """wasmtime itself does not look there."""
    code = bytearray(wasmtime.Module(aot.engine(), module(7)).serialize())
    code[18:20] = (183 if this_machine().machine == "x86_64" else 62).to_bytes(2, "little")
    wasmtime.Module.deserialize(aot.engine(), bytes(code))  # our own code
    with pytest.raises(GuestError, match="P5"):
        Guest(bytes(code))


def test_code_for_another_system_is_p5(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    elsewhere = replace(this_machine(), target=f"{this_machine().machine}-unknown-freebsd")
    monkeypatch.setattr(aot, "this_machine", lambda: elsewhere)
    with pytest.raises(GuestError, match=r"P5: .*this machine is .*freebsd"):
        Guest(saved)


@pytest.mark.usefixtures("never_run")
def test_code_of_another_wasmtime_is_e6(saved: Path) -> None:
    real = foreign("wasmtime49")
    assert inspect_artifact(real).wasmtime == "49"
    version = this_machine().wasmtime
    counted = bytes([len(version)]) + version.encode()
    changed = saved.read_bytes().replace(b"\0" + counted, b"\0" + counted[:-1] + b"x", 1)
    files = [changed] if this_machine().machine != "x86_64" else [changed, real]
    for code in files:
        with pytest.raises(
            GuestError, match=rf"E6: this machine code is of .*, and here is {version}"
        ):
            Guest(code)


def lacking_feature() -> bytes:
    """Name a CPU feature that machine code can claim to use, and that this CPU lacks."""
    own, known = this_machine().features, aot._FLAGS[this_machine().machine]
    lacking = [name for name in known if name not in own]
    if not lacking:
        pytest.skip("this CPU has every feature that wasmtime knows")
    return lacking[-1].encode()


def test_code_for_cpu_features_that_this_cpu_lacks_is_e10(saved: Path) -> None:
    name = lacking_feature()
    code = saved.read_bytes()
    place = code.index(bytes([len(name)]) + name) + 1 + len(name)
    assert code[place : place + 2] == b"\2\0"  # a switch, and it is off
    code = code[: place + 1] + b"\1" + code[place + 2 :]
    assert name.decode() in inspect_artifact(code).features
    with pytest.raises(GuestError, match=f"E10: this machine code uses {name.decode()}, .*SIGILL"):
        Guest(code)
    with pytest.raises(wasmtime.WasmtimeError, match="native host"):  # a second line of defence
        wasmtime.Module.deserialize(aot.engine(), code)


def test_what_this_machine_made_is_e10_on_one_that_can_less(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = replace(this_machine(), features=())
    if poor == this_machine():
        pytest.skip("wasmtime uses no special features of this CPU")
    monkeypatch.setattr(aot, "this_machine", lambda: poor)
    with pytest.raises(GuestError, match="E10"):
        Guest(saved)
    plain = saved.with_name("plain.cwasm")
    compile_module(module(7), EngineConfig(target=NATIVE_TARGET)).save(plain)
    assert Guest(plain).instantiate().call("f") == 7


def test_to_compile_for_features_that_this_cpu_lacks_is_e10() -> None:
    config = EngineConfig(flags=(lacking_feature().decode(),))
    with pytest.raises(GuestError, match=r"P5, E10: .* this machine can't run"):
        Guest(module(7), config=config)


# --- Hostile files --------------------------------------------------------------------------------


def long_section(code: bytes) -> bytes:
    """Let the first section go on far behind the end of the file."""
    size = int.from_bytes(code[40:48], "little") + 64 + 32
    return code[:size] + (1 << 40).to_bytes(8, "little") + code[size + 8 :]


MAKERS: list[Callable[[bytes], bytes]] = [
    lambda code: code[:40] + b"\xff" * 8 + code[48:],  # the section table far behind the end
    lambda code: code[:40] + (2**63 - 8).to_bytes(8, "little") + code[48:],
    lambda code: code[:58] + b"\0\0" + code[60:],  # sections of no size
    lambda code: code[:60] + b"\xff\xff" + code[62:],  # many sections
    lambda code: code[:62] + b"\xff\xff" + code[64:],  # no names
    lambda code: code[:4] + b"\1" + code[5:],  # 32 bits
    lambda code: code[:7] + b"\0" + code[8:],  # an ordinary program
    lambda code: code.replace(b".wasmtime.engine", b".wasmtime.engina"),
    lambda code: code[:64] + b"\7" + code[65:],
    lambda code: code[:65] + b"\xff" * 10 + code[75:],  # a version of 2**70 bytes
    lambda code: code[:4],
    lambda code: b"\x7fELF" + bytes(1000),
    long_section,
]


@pytest.mark.parametrize("make", MAKERS)
def test_files_that_are_no_machine_code_are_e2(make: Callable[[bytes], bytes]) -> None:
    code = bytes(wasmtime.Module(aot.engine(), module(7)).serialize())
    with pytest.raises(GuestError, match="E2: this is not wasmtime's machine code"):
        Guest(make(code))


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF program")
def test_a_program_is_no_machine_code_of_wasmtime() -> None:
    with pytest.raises(GuestError, match="E2: this is not wasmtime's machine code"):
        Guest(Path(sys.executable).resolve())


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 17), st.binary(min_size=1, max_size=9))),
    size=st.integers(0, 1 << 17),
)
def test_any_bytes_are_machine_code_or_a_clear_error(
    changes: list[tuple[int, bytes]], size: int
) -> None:
    code = bytearray(wasmtime.Module(aot.engine(), module(7)).serialize())
    tables = int.from_bytes(code[40:48], "little")
    for place, new in changes:
        # Half of them into the headers, where it matters.
        start = place % 128 if place % 2 else (tables + place) % len(code)
        code[start : start + len(new)] = new
    try:
        artifact = inspect_artifact(bytes(code[: max(size, 64)]))
    except GuestError:
        return
    assert artifact.problem(this_machine()) is None or artifact.code_bytes <= len(code)
