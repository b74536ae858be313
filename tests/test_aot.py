"""The cache of machine code: it must run nothing that this user did not write on this machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import wasmtime

from edgelab import aot
from edgelab.aot import NATIVE_TARGET, PORTABLE_TARGET, Compiled, EngineConfig, compile_module
from edgelab.errors import GuestError
from edgelab.runtime import Guest


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
    store.write(aot._entry_name(module(7), EngineConfig()), bytes(portable.module.serialize()))
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
