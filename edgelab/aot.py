"""From ``.wasm`` to machine code, and a cache of that machine code which nobody else can feed.

Deserializing an artifact means running its bytes. So the cache accepts only what this user wrote
on this machine: entries live in a private folder, carry an HMAC under a private key, and are named
after everything that the code depends on (module, engine version, configuration, CPU features).
Whatever does not fit is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import importlib.metadata
import os
import platform
import secrets
import stat
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import wasmtime

from edgelab.errors import GuestError, one_line
from edgelab.paths import cache_dir, write_atomic

_MAGIC = b"edgelab-aot-1\n"
_MAC_BYTES = hashlib.sha256().digest_size
_KEY_BYTES = 32
_CACHE_BYTES = 1 << 30  # room for some twenty modules with a whole model inside
MAX_MODULE_BYTES = 256 << 20
"""The largest ``.wasm`` that `compile_module` takes, in bytes."""

# The guest ABIs here are 32-bit with one memory. What they don't need is off: nothing of it can be
# instantiated by accident, and a garbage-collected heap would be outside of `Limits.memory_bytes`.
_SETTINGS = {
    "epoch_interruption": True,  # wall-time limits
    "memory_may_move": False,  # NumPy views into a guest's memory stay valid when it grows
    "wasm_memory64": False,
    "wasm_multi_memory": False,
    "wasm_threads": False,
    "wasm_gc": False,
    "wasm_function_references": False,
    "wasm_exceptions": False,
    "wasm_wide_arithmetic": False,
}

# wasmtime aborts the process at a target or a flag that it doesn't know, or was built without.
_MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
_SYSTEM = {"darwin": "apple-darwin", "win32": "pc-windows-msvc"}
NATIVE_TARGET = f"{_MACHINE}-{_SYSTEM.get(sys.platform, 'unknown-linux-gnu')}"
"""The triple of this machine."""
PORTABLE_TARGET = "pulley64"
"""wasmtime's bytecode, which it interprets on every machine."""
_FLAGS = {
    "x86_64": (
        "has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt", "has_cmpxchg16b",
        "has_lzcnt", "has_bmi1", "has_bmi2", "has_avx", "has_avx2", "has_fma", "has_avx512f",
        "has_avx512dq", "has_avx512vl", "has_avx512bitalg", "has_avx512vbmi",
    ),
    "aarch64": ("has_lse", "has_pauth", "has_fp16"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How machine code is made. Guests with different configurations can't share code.

    Attributes
    ----------
    fuel : bool
        Count executed instructions. Costs some speed; needed for `Limits.fuel` and for counts.
    optimize : bool
        Let Cranelift optimise. Off compiles faster and runs slower.
    target : str or None
        `NATIVE_TARGET` is this machine with the CPU features that all of its kind have, and
        `PORTABLE_TARGET` interpreted bytecode. None is this machine with every CPU feature that it
        has. wasmtime's wheels compile for no other.
    flags : tuple of str
        CPU features to use, as Cranelift names them, such as ``"has_avx2"``.
    """

    fuel: bool = False
    optimize: bool = True
    target: str | None = None
    flags: tuple[str, ...] = ()


DEFAULT_ENGINE = EngineConfig()


@functools.cache
def engine(config: EngineConfig = DEFAULT_ENGINE) -> wasmtime.Engine:
    """Return the process-wide engine for a configuration.

    Raises
    ------
    GuestError
        If the target is another machine (P5), or a flag is unknown.
    """
    target = NATIVE_TARGET if config.target is None else config.target
    if target not in (NATIVE_TARGET, PORTABLE_TARGET):
        raise GuestError(
            f"P5: this wasmtime makes and runs code for {NATIVE_TARGET} and {PORTABLE_TARGET}, not "
            f"for {target!r}. A .wasm file is portable, machine code is not: compile it on the "
            "machine that runs it."
        )
    known = _FLAGS.get(target.partition("-")[0], ())
    if unknown := set(config.flags) - set(known):
        raise GuestError(
            f"{target} has no CPU feature {', '.join(sorted(unknown))}. Known are: "
            f"{', '.join(known) or 'none'}."
        )
    settings = wasmtime.Config()
    for name, value in _SETTINGS.items():
        setattr(settings, name, value)
    settings.consume_fuel = config.fuel
    settings.cranelift_opt_level = "speed" if config.optimize else "none"
    settings.parallel_compilation = not _forked
    if config.target is not None:
        settings.target = config.target
    for flag in config.flags:
        settings.cranelift_flag_enable(flag)
    return wasmtime.Engine(settings)


_forked = False


def _after_fork() -> None:
    """Compile on one thread from now on: those of the compiler's pool did not survive the fork."""
    global _forked
    _forked = True
    engine.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A module that is ready to be instantiated.

    Attributes
    ----------
    module : wasmtime.Module
    engine : wasmtime.Engine
        What made it; a store for its instances needs the same.
    origin : {"cache", "compiled"}
        Where the machine code came from.
    load_ms : float
        Time from bytes to module, in milliseconds.
    artifact_bytes : int
        Size of the machine code.
    """

    module: wasmtime.Module
    engine: wasmtime.Engine
    origin: str
    load_ms: float
    artifact_bytes: int


def compile_module(
    wasm: bytes, config: EngineConfig = DEFAULT_ENGINE, *, cache: bool = True
) -> Compiled:
    """Compile a module, or take its machine code from the cache.

    Parameters
    ----------
    wasm : bytes
        A WebAssembly core module.
    config : EngineConfig
    cache : bool
        Use the cache on disk. A cache that can't be used safely is left alone, with a warning.

    Raises
    ------
    GuestError
        If the bytes are not a valid module (E2), are a component, or are too large (P2); or if this
        machine can't run what `config` makes (P5, E10).
    """
    start = time.perf_counter()
    _check_header(wasm)
    maker = engine(config)
    store = _Cache.open() if cache else None
    name = _entry_name(wasm, config)
    if store is not None:
        code = store.read(name)
        if code is not None:
            try:
                module = wasmtime.Module.deserialize(maker, code)
                return Compiled(module, maker, "cache", _ms_since(start), len(code))
            except wasmtime.WasmtimeError as error:
                warnings.warn(
                    f"P5, E6: cached machine code does not fit this engine: {one_line(error)}; "
                    "compiling again",
                    stacklevel=2,
                )
    try:
        module = wasmtime.Module(maker, wasm)
    except wasmtime.WasmtimeError as error:
        if "native host" in str(error):
            raise GuestError(
                f"P5, E10: {config} makes code that this machine can't run: {one_line(error)}. "
                "Leave target and flags to EngineConfig(), which takes what this CPU has."
            ) from None
        raise GuestError(
            f"E2: not a valid WebAssembly module ({one_line(error)}). The file is damaged or "
            "uses a feature that is switched off here. Build it again: python -m edgelab guest "
            "build"
        ) from None
    code = bytes(module.serialize())
    if store is not None:
        store.write(name, code)
    return Compiled(module, maker, "compiled", _ms_since(start), len(code))


def _check_header(wasm: bytes) -> None:
    if len(wasm) > MAX_MODULE_BYTES:
        raise GuestError(
            f"P2: the module has {len(wasm):,} bytes, the limit is {MAX_MODULE_BYTES:,}. Load the "
            "model through WASI-NN instead of embedding it in the module."
        )
    if wasm[:4] != b"\0asm":
        raise GuestError(
            f"E2: not WebAssembly: the file begins with {bytes(wasm[:4])!r}, not b'\\x00asm'. "
            "It is damaged or something else. Build it again: python -m edgelab guest build"
        )
    if wasm[4:8] == b"\x0d\x00\x01\x00":
        raise GuestError(
            "E7: this is a WebAssembly component, not a core module. It was built for "
            "wasm32-wasip2; build it with --target wasm32-wasip1."
        )


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _entry_name(wasm: bytes, config: EngineConfig) -> str:
    """Everything that the machine code depends on, as one hash."""
    facts = (
        hashlib.sha256(wasm).hexdigest(),
        importlib.metadata.version("wasmtime"),
        repr(config),
        repr(_SETTINGS),
        sys.platform,
        platform.machine(),
        cpu_features(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Feature flags of this CPU as the operating system names them, sorted; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return tuple(filter(None, (platform.processor(),)))
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def available_cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Cache:
    """Authenticated files in a folder that only this user can enter."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder, self._key = folder, key

    @classmethod
    def open(cls) -> _Cache | None:
        folder = cache_dir() / "aot"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _require_private(folder, folder.lstat())
            # Beside the folder, so that copying entries from elsewhere does not bring a key along.
            return cls(folder, _private_key(cache_dir() / "aot.key"))
        except OSError as error:
            warnings.warn(
                f"no ahead-of-time cache: {error}. Guests are compiled on every start; set "
                "EDGELAB_CACHE to a folder that only you can write to.",
                stacklevel=3,
            )
            return None

    def _mac(self, name: str, code: bytes) -> bytes:
        return hmac.digest(self._key, name.encode() + code, "sha256")

    def read(self, name: str) -> bytes | None:
        path = self.folder / f"{name}.cwasm"
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(f"cannot read {path}: {error}; compiling again", stacklevel=3)
            return None
        head = len(_MAGIC) + _MAC_BYTES
        code = entry[head:]
        if entry[: len(_MAGIC)] == _MAGIC and hmac.compare_digest(
            entry[len(_MAGIC) : head], self._mac(name, code)
        ):
            with contextlib.suppress(OSError):
                os.utime(path)  # the entries that nobody used for longest go first
            return code
        warnings.warn(
            f"{path.name} in the ahead-of-time cache was not written by this user on this machine, "
            "or was changed since; it is ignored and compiled again",
            stacklevel=3,
        )
        return None

    def write(self, name: str, code: bytes) -> None:
        path = self.folder / f"{name}.cwasm"
        try:
            write_atomic(path, _MAGIC + self._mac(name, code) + code)
            self._drop_oldest(path)
        except OSError as error:  # a full disk costs speed, not the run
            warnings.warn(f"cannot write to {self.folder}: {error}", stacklevel=3)

    def _drop_oldest(self, keep: Path) -> None:
        """Keep the folder below its limit. Includes what a killed process left half written."""
        found = []
        for entry in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                info = entry.lstat()
                found.append((info.st_mtime_ns, info.st_size, entry))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= _CACHE_BYTES:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _require_private(path: Path, info: os.stat_result) -> None:
    """Refuse a folder or key that another user owns or can change."""
    if stat.S_ISLNK(info.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if os.name == "posix":
        if info.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        if info.st_mode & 0o077:
            raise PermissionError(f"{path} is open to other users (chmod go= {path})")


def _private_key(path: Path) -> bytes:
    """Read this user's key; make it on first use. Safe when several processes start at once."""
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as new:
            new.write(secrets.token_bytes(_KEY_BYTES))
        try:
            os.link(new.name, path)  # fails if another process was first; then its key counts
        except FileExistsError:
            pass
        finally:
            os.unlink(new.name)
    # What is checked must be what is read, even if the folder around it belongs to someone else.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        _require_private(path, os.fstat(handle))
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise PermissionError(f"{path} is damaged: not {_KEY_BYTES} bytes; delete it")
    return key
