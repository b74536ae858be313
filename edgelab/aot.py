"""From ``.wasm`` to machine code, and a cache of that machine code which nobody else can feed.

Deserializing an artifact means running its bytes. So only what this user wrote on this machine is
accepted: it carries an HMAC under a private key. Entries of the cache also live in a private
folder, and are named after everything that the code depends on (module, engine version,
configuration, CPU features). Whatever does not fit is compiled again.

A file of machine code is wasmtime's ELF, as it is, and after it: facts as JSON, and a trailer with
their length, the HMAC of all before it, and a magic.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import importlib.metadata
import json
import mmap
import os
import platform
import secrets
import stat
import struct
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from edgelab.artifact import Artifact, inspect_artifact
from edgelab.errors import GuestError, one_line
from edgelab.paths import cache_dir, write_atomic
from edgelab.wasm import Interface, Signature, interface, is_component

_MAGIC = b"edgelab-aot-2\n"
_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct("<Q")  # of the facts
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
        "has_avx512dq", "has_avx512vl", "has_avx512bitalg", "has_avx512vbmi", "has_avx512vnni",
        "has_avx_vnni", "has_apx",
    ),
    "aarch64": ("has_lse", "has_pauth", "has_fp16", "has_dotprod", "has_i8mm"),
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
    component : bool
        Compile components, not modules.
    """

    fuel: bool = False
    optimize: bool = True
    target: str | None = None
    flags: tuple[str, ...] = ()
    component: bool = False


DEFAULT_ENGINE = EngineConfig()


@functools.cache
def this_machine() -> Artifact:
    """Return what wasmtime makes here by default: it finds out about this CPU by itself."""
    empty = wasmtime.Module(engine(), b"\0asm\1\0\0\0")
    return inspect_artifact(bytes(empty.serialize()))


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
    if config.component:
        # What copies between two components has both memories. Without, wasmtime aborts.
        settings.wasm_multi_memory = True
        # No asynchronous calls: they could wait for ever, and nothing here makes any.
        ffi.wasmtime_config_concurrency_support_set(settings.ptr(), False)
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
        Or a `wasmtime.component.Component`, if `config` says so.
    engine : wasmtime.Engine
        What made it; a store for its instances needs the same.
    config : EngineConfig
    interface : edgelab.wasm.Interface
        What it imports and exports.
    origin : {"cache", "compiled", "artifact"}
        Where the machine code came from.
    load_ms : float
        Time from bytes to module, in milliseconds. The engine, which is made once for each
        configuration and process, does not count.
    artifact_bytes : int
        Size of the machine code.
    """

    module: wasmtime.Module
    engine: wasmtime.Engine
    config: EngineConfig
    interface: Interface
    origin: str
    load_ms: float
    artifact_bytes: int

    def save(self, path: str | Path) -> None:
        """Write the machine code to a file that `edgelab.runtime.Guest` takes instead of a .wasm.

        It is signed for this user on this machine: `load_artifact` takes no other.

        Raises
        ------
        GuestError
            If this user has no safe place for the key.
        OSError
            If the file can't be written.
        """
        try:
            cache = _Cache()
        except OSError as error:
            raise GuestError(
                f"machine code can't be signed: {error}. Set EDGELAB_CACHE to a folder that only "
                "you can write to."
            ) from None
        code = bytes(self.module.serialize())[: self.artifact_bytes]  # more if it is mapped
        write_atomic(Path(path), cache.seal(_SAVED, code, self.config, self.interface))


def compile_module(
    wasm: bytes, config: EngineConfig = DEFAULT_ENGINE, *, cache: bool = True
) -> Compiled:
    """Compile a module, or take its machine code from the cache.

    Parameters
    ----------
    wasm : bytes
        A WebAssembly core module; a component if `config` says so.
    config : EngineConfig
    cache : bool
        Use the cache on disk. A cache that can't be used safely is left alone, with a warning.

    Raises
    ------
    GuestError
        If the bytes are not a valid module (E2), are a component (E7), or are too large (P2); or if
        this machine can't run what `config` makes (P5, E10).
    """
    _check_header(wasm, config)
    maker, kind = engine(config), _kind(config)
    start = time.perf_counter()
    store = _Cache.open() if cache else None
    name = _entry_name(wasm, config)
    if store is not None and (found := store.load(name, maker, kind)):
        module, facts = found
        declared, size = _interface(facts), facts["code_bytes"]
        return Compiled(module, maker, config, declared, "cache", _ms_since(start), size)
    try:
        module = kind(maker, wasm)
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
    declared = Interface((), {}) if config.component else interface(wasm)
    code = bytes(module.serialize())
    if store is not None:
        store.write(name, code, config, declared)
    return Compiled(module, maker, config, declared, "compiled", _ms_since(start), len(code))


def load_artifact(sealed: bytes) -> Compiled:
    """Take a module from a file that `Compiled.save` wrote.

    What the file says about itself is looked at first, for an error that helps. None of it is
    executed before its signature was checked.

    Parameters
    ----------
    sealed : bytes
        The whole file.

    Raises
    ------
    GuestError
        If it is code for another machine (P5), of another wasmtime (E6), for CPU features that this
        CPU lacks (E10), or if this user did not write it on this machine.
    """
    if problem := inspect_artifact(sealed).problem(this_machine()):
        raise GuestError(problem)
    start = time.perf_counter()
    facts = _signed_facts(sealed)
    if facts is None:
        raise GuestError(
            "this machine code was not saved by this user on this machine, or was changed since. "
            "To load it is to run whatever is in it, outside of the sandbox. Take the .wasm file "
            "instead, and compile it here."
        )
    config = EngineConfig(**{**facts["config"], "flags": tuple(facts["config"]["flags"])})
    maker, size = engine(config), facts["code_bytes"]
    try:
        module = wasmtime.Module.deserialize(maker, sealed[:size])
    except wasmtime.WasmtimeError as error:
        raise GuestError(
            f"E6: this machine code does not fit this engine: {one_line(error)}. Take the .wasm "
            "file instead, and compile it here."
        ) from None
    declared = _interface(facts)
    return Compiled(module, maker, config, declared, "artifact", _ms_since(start), size)


def signed_here(sealed: bytes) -> bool:
    """Whether `Compiled.save` wrote a file, for this user on this machine. Executes nothing."""
    return _signed_facts(sealed) is not None


def _signed_facts(sealed: bytes) -> dict[str, Any] | None:
    cache = _Cache.open()
    return None if cache is None else cache.facts(_SAVED, sealed)


def _kind(config: EngineConfig) -> Any:
    """Return the class of what a configuration compiles to."""
    if config.component:
        from wasmtime.component import Component

        return Component
    return wasmtime.Module


def _check_header(wasm: bytes, config: EngineConfig) -> None:
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
    if is_component(wasm) and not config.component:
        raise GuestError(
            "E7: this is a WebAssembly component, not a core module. It was built for "
            "wasm32-wasip2; build it with --target wasm32-wasip1."
        )


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _entry_name(wasm: bytes, config: EngineConfig) -> str:
    """Everything that the machine code depends on, as one hash."""
    name = hashlib.sha256(_surroundings(config, tuple(_SETTINGS.items()), cpu_features()))
    name.update(wasm)
    return name.hexdigest()


@functools.lru_cache
def _surroundings(*given: Any) -> bytes:
    """What machine code depends on beside the module."""
    version = importlib.metadata.version("wasmtime")
    return repr((_MAGIC, version, sys.platform, platform.machine(), given)).encode()


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Feature flags of this CPU as the operating system names them, sorted; empty if unknown."""
    try:
        with open("/proc/cpuinfo") as lines:  # read no further than the first core
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return tuple(sorted(value.split()))
    except OSError:
        return tuple(filter(None, (platform.processor(),)))
    return ()


def available_cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_SAVED = "saved"  # what a file of `Compiled.save` is signed for; entries are signed for their names


class _Cache:
    """This user's signed machine code, in a folder that only this user can enter.

    Raises
    ------
    OSError
        If folder and key can't be had, or are not this user's alone.
    """

    def __init__(self) -> None:
        home = cache_dir()
        self.folder = home / "aot"
        try:
            info = self.folder.lstat()
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            info = self.folder.lstat()
        _require_private(self.folder, info)
        # Beside the folder, so that copying entries from elsewhere does not bring a key along.
        self._key = _private_key(home / "aot.key")

    @classmethod
    def open(cls) -> _Cache | None:
        try:
            return cls()
        except OSError as error:
            warnings.warn(
                f"no ahead-of-time cache: {error}. Guests are compiled on every start; set "
                "EDGELAB_CACHE to a folder that only you can write to.",
                stacklevel=3,
            )
            return None

    def seal(self, purpose: str, code: bytes, config: EngineConfig, declared: Interface) -> bytes:
        """Add to machine code what its use takes, and sign all of it."""
        facts = {
            "purpose": purpose,
            "code_bytes": len(code),
            "config": asdict(config),
            "imports": [(module, name, _plain(kind)) for module, name, kind in declared.imports],
            "exports": {name: _plain(kind) for name, kind in declared.exports.items()},
        }
        text = json.dumps(facts).encode()
        signed = b"".join((code, text, _LENGTH.pack(len(text))))
        return signed + hmac.digest(self._key, signed, "sha256") + _MAGIC

    def facts(self, purpose: str, sealed: bytes | mmap.mmap) -> dict[str, Any] | None:
        """Return the facts beside machine code, if this user signed it for this purpose."""
        end = len(sealed) - _MAC_BYTES - len(_MAGIC)
        if end < _LENGTH.size or sealed[end + _MAC_BYTES :] != _MAGIC:
            return None
        with memoryview(sealed) as view, view[:end] as signed:
            mac = hmac.digest(self._key, signed, "sha256")
        if not hmac.compare_digest(mac, sealed[end : end + _MAC_BYTES]):
            return None
        end -= _LENGTH.size
        (length,) = _LENGTH.unpack(sealed[end : end + _LENGTH.size])
        found: dict[str, Any] = json.loads(sealed[end - length : end])
        return found if found["purpose"] == purpose else None

    def load(
        self, name: str, maker: wasmtime.Engine, kind: Any = wasmtime.Module
    ) -> tuple[wasmtime.Module, dict[str, Any]] | None:
        """Return an entry's module and facts; None if there is no entry, or none to trust."""
        path = self.folder / f"{name}.cwasm"
        try:
            with open(path, "rb", opener=_no_follow) as file:
                found = self._load(name, maker, kind, file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = f"cannot read {path}: {error}"
        except wasmtime.WasmtimeError as error:
            problem = f"P5, E6: cached machine code does not fit this engine: {one_line(error)}"
        else:
            if found is not None:
                with contextlib.suppress(OSError):
                    os.utime(path)  # the entries that nobody used for longest go first
                return found
            problem = (
                f"{path.name} in the ahead-of-time cache was not written by this user on this "
                "machine, or was changed since"
            )
        warnings.warn(f"{problem}; compiling again", stacklevel=3)
        return None

    def _load(
        self, name: str, maker: wasmtime.Engine, kind: Any, handle: int
    ) -> tuple[wasmtime.Module, dict[str, Any]] | None:
        """Check a file and use it through one handle: it is the same, whatever its name becomes."""
        info = os.fstat(handle)
        if info.st_size == 0:  # can't be mapped
            return None
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as sealed:
            facts = self.facts(name, sealed)
            if facts is None:
                return None
            # The module may be mapped, not copied, if no other user can write to the file: it must
            # not change after the check. This user has the key anyway.
            if sys.platform == "linux" and info.st_uid == os.getuid() and not info.st_mode & 0o022:
                # Fails without /proc, or where the file system lets nothing be executed.
                with contextlib.suppress(wasmtime.WasmtimeError):
                    path = f"/proc/self/fd/{handle}"
                    return kind.deserialize_file(maker, path), facts
            return kind.deserialize(maker, sealed[: facts["code_bytes"]]), facts

    def write(self, name: str, code: bytes, config: EngineConfig, declared: Interface) -> None:
        path = self.folder / f"{name}.cwasm"
        try:
            write_atomic(path, self.seal(name, code, config, declared))
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


def _no_follow(path: str, flags: int) -> int:
    """Open a file, but not through a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _plain(kind: Signature | str) -> Any:
    return kind if isinstance(kind, str) else (kind.parameters, kind.results)


_signature = functools.lru_cache(Signature)  # few functions have one of their own


def _interface(facts: dict[str, Any]) -> Interface:
    def kind(plain: Any) -> Signature | str:
        return plain if isinstance(plain, str) else _signature(*map(tuple, plain))

    return Interface(
        tuple((module, name, kind(plain)) for module, name, plain in facts["imports"]),
        {name: kind(plain) for name, plain in facts["exports"].items()},
    )


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
    try:
        return _read_key(path)
    except FileNotFoundError:
        pass
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as new:
        new.write(secrets.token_bytes(_KEY_BYTES))
    try:
        os.link(new.name, path)  # fails if another process was first; then its key counts
    except FileExistsError:
        pass
    finally:
        os.unlink(new.name)
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    # What is checked must be what is read, even if the folder around it belongs to someone else.
    with open(path, "rb", opener=_no_follow) as file:
        _require_private(path, os.fstat(file.fileno()))
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise PermissionError(f"{path} is damaged: not {_KEY_BYTES} bytes; delete it")
    return key
