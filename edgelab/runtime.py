"""Run a WebAssembly guest from Python: quickly, within limits, and without sharing more than asked.

`Guest` is a compiled module; `Instance` is one running copy of it with its own memory. The calls go
through wasmtime's unchecked entry point, which does not look at types: so each signature is read
once, here, and every argument is packed to it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import os
import signal
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import wasmtime
from numpy.typing import DTypeLike, NDArray
from wasmtime import _ffi as ffi

from edgelab.aot import DEFAULT_ENGINE, Compiled, EngineConfig, compile_module, load_artifact
from edgelab.errors import GuestError, LimitError
from edgelab.imports import explain_imports
from edgelab.wasm import Signature

_TICK_S = 0.02  # how often a running guest looks at the clock, and at Ctrl-C
_RAW_BYTES = ctypes.sizeof(ffi.wasmtime_val_raw_t)
# Wasm value type → struct code, padded to one raw slot. i32 is kept zero-extended in its slot.
_CODES = {"i32": "I", "i64": "Q", "f32": "f", "f64": "d"}
_WIDTH = {"I": 4, "Q": 8, "f": 4, "d": 8}
_UNLIMITED_FUEL = 2**63 - 1
_TABLES, _TABLE_ELEMENTS = 8, 1 << 20  # of function pointers, which the host keeps
_WASI = "wasi_snapshot_preview1"
_ENTRY = Signature((), ())  # of _start and _initialize

# What each call needs. wasmtime's own bindings convert every argument, and `signal` makes enums,
# which takes longer than the call itself.
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_invoke = ctypes.CFUNCTYPE(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER)(
    ("wasmtime_func_call_unchecked", ffi.dll)
)
# PYFUNCTYPE keeps the interpreter lock, which is right for calls that return at once.
_set_deadline = ctypes.PYFUNCTYPE(None, _POINTER, ctypes.c_uint64)(
    ("wasmtime_context_set_epoch_deadline", ffi.dll)
)
_memory_size = ctypes.PYFUNCTYPE(_SIZE, _POINTER, _POINTER)(("wasmtime_memory_data_size", ffi.dll))
_TEXT = ctypes.c_char_p
_define_function = ctypes.PYFUNCTYPE(
    _POINTER, _POINTER, _TEXT, _SIZE, _TEXT, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER
)(("wasmtime_linker_define_func_unchecked", ffi.dll))
_ERROR, _TRAP = ctypes.POINTER(ffi.wasmtime_error_t), ctypes.POINTER(ffi.wasm_trap_t)
_SIGNALS: Any = importlib.import_module("_signal")
_SIGINT = int(signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a guest may use.

    Attributes
    ----------
    memory_bytes : int
        Largest size of the linear memory. Growth beyond it fails inside the guest (E4).
    seconds : float
        Wall time of one call. Time inside host functions counts, but only guest code is stopped.
        Ctrl-C stops it earlier.
    fuel : int or None
        Instructions (roughly) over the life of the instance; None is unlimited. Setting it needs
        a guest that was loaded with ``fuel=True``.
    output_bytes : int
        How much of stdout, and of stderr, is kept; see `Instance.dropped_bytes`.

    Raises
    ------
    ValueError
        If a limit is negative, or the time is not positive.
    """

    memory_bytes: int = 512 << 20
    seconds: float = 60.0
    fuel: int | None = None
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        counts = (self.memory_bytes, self.output_bytes, self.fuel or 0)
        if not all(0 <= count <= _UNLIMITED_FUEL for count in counts) or not self.seconds > 0:
            raise ValueError(f"{self} is impossible: the counts go from 0 to 2**63 - 1")


_DEFAULT_LIMITS = Limits()


class HostModule(Protocol):
    """A set of host functions that guests can import, such as `edgelab.wasinn.WasiNN`."""

    name: str
    """The import module's name."""

    def functions(self) -> Mapping[str, tuple[str, Callable[..., int]]]:
        """Return name → (signature such as ``"iiii->i"``, function).

        Parameters, and the one result or none, are i32. A function is called as
        ``function(instance, *arguments)`` with unsigned ints, and returns an int. An exception
        that it raises stops the guest and reaches the caller of `Instance.call` unchanged.
        """


class Guest:
    """A compiled module, from which any number of instances can be made.

    Parameters
    ----------
    wasm : bytes, str or pathlib.Path
        The module, or a path to it; or machine code that `edgelab.aot.Compiled.save` wrote.
    host : iterable of HostModule
        Host functions beside WASI preview 1, which is always there (with nothing pre-opened).
    fuel : bool
        Count instructions, see `Instance.fuel_used`.
    cache : bool
        Use the ahead-of-time cache, see `edgelab.aot`.
    config : EngineConfig, optional
        Compile with this configuration; `fuel` adds to it.

    Attributes
    ----------
    wasm : bytes
        The module.
    imports : tuple of (str, str, str)
        Module, name, and what it must be: a function's signature, such as ``"(i32) -> (i64)"``, or
        ``"table"``, ``"memory"`` or ``"global"``.
    exports : tuple of (str, str)
        Name, and what it is.

    Raises
    ------
    GuestError
        If the module is invalid (E2), or imports what no host provides (P3, E5, E7); or if machine
        code is not for this machine (P5, E6, E10), or not saved by this user on it.

    Examples
    --------
    >>> guest = Guest(b'(module (func (export "add") (param i32 i32) (result i32) '
    ...               b'local.get 0 local.get 1 i32.add))')
    >>> guest.instantiate().call("add", 40, 2)
    42
    """

    def __init__(
        self,
        wasm: bytes | str | Path,
        *,
        host: Iterable[HostModule] = (),
        fuel: bool = False,
        cache: bool = True,
        config: EngineConfig | None = None,
    ) -> None:
        if isinstance(wasm, (str, Path)):
            try:
                wasm = Path(wasm).read_bytes()
            except (OSError, ValueError) as error:
                raise GuestError(
                    f"cannot read the guest: {error}. Build it: python -m edgelab guest build"
                ) from None
        if wasm[:4] != b"\0asm" and wasm.lstrip()[:1] == b"(":
            wasm = _assemble(wasm)
        self.wasm = wasm
        self.config = config or DEFAULT_ENGINE
        if fuel:
            self.config = replace(self.config, fuel=True)
        if wasm[:4] == b"\x7fELF":
            self.compiled: Compiled = load_artifact(wasm)
            if (config or fuel) and self.config != self.compiled.config:
                raise GuestError(
                    f"E6: this machine code was made with {self.compiled.config}, and what is "
                    f"wanted is {self.config}. Take the .wasm file instead."
                )
            self.config = self.compiled.config
        else:
            self.compiled = compile_module(wasm, self.config, cache=cache)
        self.host = tuple(host)
        found = self.compiled.interface
        self.imports = tuple((module, name, str(kind)) for module, name, kind in found.imports)
        self.exports = tuple((name, str(kind)) for name, kind in found.exports.items())
        self._exports = found.exports
        for name in ("_initialize", "_start"):
            if found.exports.get(name, _ENTRY) != _ENTRY:
                raise GuestError(f"E5: {name} must be a function {_ENTRY}, as WASI has it")
        self._callbacks: list[Any] = []  # ctypes trampolines must outlive every instance
        self._pre = self._link()

    def _link(self) -> wasmtime.InstancePre:
        linker = wasmtime.Linker(self.compiled.engine)
        linker.define_wasi()
        # Most time goes into definitions, so what is not imported gets none.
        imported = {(module, name) for module, name, _ in self.imports}
        if (_WASI, "poll_oneoff") in imported:
            linker.allow_shadowing = True
            self._define(linker, _WASI, "poll_oneoff", "iiii->i", _poll_oneoff)
            linker.allow_shadowing = False
        provided: dict[tuple[str, str], str] = {}
        for module in self.host:
            for name, (signature, function) in module.functions().items():
                _, text = _function_type(self.compiled.engine, signature)
                known = (module.name, name)
                if known in provided:
                    raise GuestError(f"the host can't provide {module.name}::{name} twice")
                provided[known] = text
                if known in imported or module.name == _WASI:
                    self._define(linker, module.name, name, signature, function)
        self._require_imports(provided)
        try:
            return linker.instantiate_pre(self.compiled.module)
        except wasmtime.WasmtimeError as error:
            raise GuestError(
                f"E5: an import does not fit what the host provides: {error}. Guest and host must "
                "agree on the function's name and signature; rebuild the guest against this ABI."
            ) from None

    def _require_imports(self, provided: Mapping[tuple[str, str], str]) -> None:
        if problems := explain_imports(self.imports, provided):
            raise GuestError(" ".join(str(problem) for problem in problems))

    def _define(
        self,
        linker: wasmtime.Linker,
        module: str,
        name: str,
        signature: str,
        function: Callable[..., int],
    ) -> None:
        """Define a host function behind wasmtime's unchecked trampoline (3 us instead of 10)."""
        kind, _ = _function_type(self.compiled.engine, signature)
        parameters, _, result = signature.partition("->")
        words = _RAW_BYTES // 4
        end = words * len(parameters)
        raw = ctypes.c_uint32 * max(end, words)

        def trampoline(_env: int, _caller: int, slots: int, _count: int) -> int:
            instance: Sandbox | None = None
            try:
                thread = _local.thread
                instance = thread.instance
                values = raw.from_address(slots)
                try:
                    thread.in_host = True
                    value = function(instance, *values[0:end:words])
                finally:
                    thread.in_host = False
                if result:
                    values[0] = value & 0xFFFFFFFF
                return 0
            except BaseException as error:  # must not unwind into Rust
                return _stop(instance, error, ffi.wasmtime_trap_new(b"host function", 13))

        callback = _HostCallback(trampoline)
        self._callbacks.append(callback)
        where, what = module.encode(), name.encode()
        error = _define_function(
            linker.ptr(), where, len(where), what, len(what), kind.ptr(), callback, None, None
        )
        if error:
            reason = wasmtime.WasmtimeError._from_ptr(ctypes.cast(error, _ERROR))
            raise GuestError(f"the host can't provide {module}::{name}: {reason}")

    def instantiate(
        self,
        *,
        limits: Limits | None = None,
        args: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        dirs: Mapping[str, str | Path] | None = None,
    ) -> Instance:
        """Make a running copy with fresh memory.

        Parameters
        ----------
        limits : Limits, optional
        args : iterable of str
            The program's arguments, without its name.
        env : mapping, optional
            Environment variables. Nothing of the host's environment is passed on.
        stdin : bytes
            What the guest reads from its standard input.
        dirs : mapping, optional
            Guest path → host folder, pre-opened read-only. Nothing is open otherwise (E9).

        Raises
        ------
        GuestError
            If the guest can't start, or a folder can't be opened.
        LimitError
            If its initial memory is over the limit.
        ValueError
            If an argument, a variable or a path has a NUL character.
        """
        return Instance(self, limits or _DEFAULT_LIMITS, args, env or {}, stdin, dirs or {})

    def __repr__(self) -> str:
        return (
            f"Guest({len(self.exports)} exports, {len(self.imports)} imports, "
            f"{self.compiled.origin} in {self.compiled.load_ms:.1f} ms)"
        )


class Memory:
    """A guest's linear memory, seen from the host without copying.

    The base address is fixed for the life of the instance (`edgelab.aot.engine` sees to it), so a
    view stays valid when the memory grows; and a view keeps the memory alive.
    """

    __slots__ = ("_address_space", "_bytes", "_context", "_known_size", "_memory", "base")

    def __init__(self, store: wasmtime.Store, memory: ffi.wasmtime_memory_t) -> None:
        self._context = _address(store._context())
        self._memory = memory
        address = ffi.wasmtime_memory_data(store._context(), ctypes.byref(memory))
        self.base = _address(address)
        # All that the memory can ever grow to. Views are cut from it after a check of today's size.
        self._address_space = _AddressSpace.from_address(self.base)
        self._address_space.store = store  # which views thus keep alive
        self._bytes = memoryview(self._address_space).cast("B")
        self._known_size = len(self)

    def __len__(self) -> int:
        """Size in bytes, now."""
        size: int = _memory_size(self._context, ctypes.addressof(self._memory))
        return size

    def address(self, pointer: int, size_bytes: int) -> int:
        """Return the host address of a guest range after checking that all of it exists.

        Raises
        ------
        GuestError
            If any byte of the range lies outside of the memory; also for a zero-length range.
        """
        # As Python integers, which do not wrap: NumPy's do.
        pointer, size_bytes = index(pointer), index(size_bytes)
        end = pointer + size_bytes
        if end > self._known_size:  # a memory never shrinks, so it is enough to look when needed
            self._known_size = len(self)
        if pointer < 0 or size_bytes < 0 or end > self._known_size:
            raise GuestError(
                f"guest range {pointer:#x} + {size_bytes} lies outside of its memory of "
                f"{self._known_size} bytes"
            )
        return self.base + pointer

    def array(
        self, pointer: int, shape: int | tuple[int, ...], dtype: DTypeLike = np.uint8
    ) -> NDArray[Any]:
        """View guest memory as an array (no copy, writable).

        Parameters
        ----------
        pointer : int
            Guest address in bytes. It need not be aligned; NumPy copes, more slowly.
        shape : int or tuple of int
        dtype : dtype
            Any NumPy dtype without Python objects; the guest is little-endian.

        Raises
        ------
        GuestError
            If the array does not lie in the memory as a whole.
        """
        kind = np.dtype(dtype).newbyteorder("<")
        if kind.hasobject:
            raise TypeError(f"guest memory holds no Python objects: {kind}")
        dimensions = [index(d) for d in (shape if isinstance(shape, tuple) else (shape,))]
        size = math.prod(dimensions) * kind.itemsize
        if min(dimensions, default=0) < 0:
            raise GuestError(f"an array can't have the shape {shape}")
        self.address(pointer, size)
        try:
            view = np.ndarray(dimensions, kind, self._address_space, index(pointer))
        except (ValueError, OverflowError) as error:  # such as a dimension of 2**63 beside a 0
            raise GuestError(f"an array can't have the shape {shape}: {error}") from None
        return view  # type: ignore[no-any-return]

    def read(self, pointer: int, size_bytes: int) -> bytes:
        """Copy bytes out of the guest."""
        start = self.address(pointer, size_bytes) - self.base
        return bytes(self._bytes[start : start + size_bytes])

    def write(self, pointer: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into the guest."""
        if isinstance(data, memoryview) and (data.format != "B" or data.ndim != 1):
            data = bytes(data)
        start = self.address(pointer, len(data)) - self.base
        self._bytes[start : start + len(data)] = data


class _AddressSpace(ctypes.c_ubyte * (1 << 32)):  # type: ignore[misc]
    """What a 32-bit pointer can reach; wasmtime reserves all of it."""

    store: wasmtime.Store


class Sandbox:
    """A store within limits, and the way into it: what modules and components have in common.

    Parameters
    ----------
    engine : wasmtime.Engine
    limits : Limits
        The memory limit holds for each memory.
    instances, tables, memories : int
        How many there can be.
    """

    def __init__(
        self,
        engine: wasmtime.Engine,
        limits: Limits,
        *,
        instances: int,
        tables: int,
        memories: int,
    ) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._host_error: BaseException | None = None
        self._memory: Memory | None = None  # while a start function runs
        self._dead: str | None = None
        self._deadline = 0.0
        self._out, self._err = _Output(limits.output_bytes), _Output(limits.output_bytes)
        self._store = wasmtime.Store(engine)
        self._context = _address(self._store._context())
        self._store.set_limits(
            limits.memory_bytes,
            _TABLE_ELEMENTS,
            instances=instances,
            tables=tables,
            memories=memories,
        )
        ffi.wasmtime_store_epoch_deadline_callback(self._store.ptr(), _on_tick, None, _NO_FINALIZER)
        _ticker.engines.add(engine)

    @property
    def stopped(self) -> str | None:
        """Why no call is possible any more: a trap, an exit or a limit; None while calls are."""
        return self._dead

    @property
    def deadline(self) -> float:
        """When the running call has to be over, as `time.monotonic` counts."""
        return self._deadline

    def _enter(self, thread: _Thread) -> Sandbox | None:
        """Arm the wall-time limit and become the instance that host functions see."""
        if self._dead is not None:
            raise GuestError(
                f"this instance stopped before ({self._dead}); its state can't be trusted. Make a "
                "new one with guest.instantiate()."
            )
        _set_deadline(self._context, 1)
        self._deadline = time.monotonic() + self.limits.seconds
        if not _ticker.awake:
            _ticker.wake()
        return thread.enter(self)

    def _guarded(self, function: Callable[..., Any], *arguments: Any, trap: Any = None) -> None:
        """Run guest code within its limits; raise what it or a host function fails with."""
        thread, failure = _local.thread, None
        before = self._enter(thread)
        try:
            error = function(*arguments)
            if error:
                failure = self._explain(wasmtime.WasmtimeError._from_ptr(error))
            elif trap:
                failure = self._explain(wasmtime.Trap._from_ptr(trap))
        finally:
            thread.leave(before)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame: a cycle around the instance

    def _explain(self, failure: Exception) -> BaseException:
        """Turn a trap, an exit or a host function's exception into what the caller should see."""
        if self._host_error is not None:
            error, self._host_error = self._host_error, None
            self._dead = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            return error
        if isinstance(failure, wasmtime.ExitTrap):
            self._dead = f"it exited with code {failure.code}"
            return _Exit(failure.code)
        code = failure.trap_code if isinstance(failure, wasmtime.Trap) else None
        text = " ".join(str(failure).rpartition("Caused by:")[2].split())[:300]
        said = self._said()
        if code is wasmtime.TrapCode.OUT_OF_FUEL:
            self._dead = "fuel limit"
            return LimitError(
                f"the guest used up its fuel of {self.limits.fuel} and was stopped. Raise "
                f"Limits.fuel if it needs more.{said}"
            )
        if "memory minimum size" in text:
            return LimitError(
                f"E4: the guest's initial memory is over the limit of {self.limits.memory_bytes} "
                "bytes. Raise Limits.memory_bytes."
            )
        reason = code.name.lower().replace("_", " ") if code else text
        self._dead = f"trap: {reason[:80]}"
        size = 0 if self._memory is None else len(self._memory)
        # Rust's words, where the guest asked for much more than was left.
        full = size > 0.9 * self.limits.memory_bytes or b"memory allocation of" in self._err.kept
        hint = " E4: its memory is at the limit; raise Limits.memory_bytes." if full else ""
        return GuestError(f"the guest trapped: {reason}.{hint}{said}")

    def _out_of_time(self) -> LimitError:
        return LimitError(
            f"the guest ran longer than {self.limits.seconds} s and was stopped. Does it loop, or "
            f"wait? Raise Limits.seconds if it needs more.{self._said()}"
        )

    def _said(self) -> str:
        end = self._err.kept[-500:].decode(errors="replace")
        return f" It printed: {end!r}." if end else ""


class Instance(Sandbox):
    """One running copy of a guest. Use it from one thread at a time; make more for more threads.

    Attributes
    ----------
    memory : Memory
        The exported linear memory.
    stdout, stderr : bytes
        What the guest printed, up to ``limits.output_bytes``.
    dropped_bytes : int
        How much it printed beyond that.
    fuel_used : int
        Instructions executed so far (wasmtime's fuel): the same on every machine.
    state : dict
        Where host modules keep what belongs to this instance, by module object.
    """

    def __init__(
        self,
        guest: Guest,
        limits: Limits,
        args: Iterable[str],
        env: Mapping[str, str],
        stdin: bytes,
        dirs: Mapping[str, str | Path],
    ) -> None:
        if limits.fuel is not None and not guest.config.fuel:
            raise GuestError("a fuel limit needs a guest that counts: Guest(..., fuel=True)")
        super().__init__(guest.compiled.engine, limits, instances=1, tables=_TABLES, memories=1)
        self.guest = guest
        self.state: dict[Any, Any] = {}
        self._store.set_wasi(_wasi(args, env, stdin, dirs, self._out, self._err))
        self._fuel_given = _UNLIMITED_FUEL if limits.fuel is None else limits.fuel
        if guest.config.fuel:
            self._store.set_fuel(self._fuel_given)

        self._instance, trap = ffi.wasmtime_instance_t(), _TRAP()
        with self._lock:
            self._guarded(
                ffi.wasmtime_instance_pre_instantiate,
                guest._pre.ptr(), self._store._context(),
                ctypes.byref(self._instance), ctypes.byref(trap),
                trap=trap,
            )  # fmt: skip
        if guest._exports.get("memory") == "memory":
            self._memory = Memory(self._store, self._export("memory").memory)
        if "_initialize" in guest._exports:  # a reactor's constructors
            self.call("_initialize")

    def _export(self, name: str) -> Any:
        """Look one export up; to list them all would cost more than to instantiate."""
        item, (text, size) = ffi.wasmtime_extern_t(), _c_text(name)
        ffi.wasmtime_instance_export_get(
            self._store._context(), ctypes.byref(self._instance), text, size, ctypes.byref(item)
        )
        return item.of

    @property
    def memory(self) -> Memory:
        if self._memory is None:
            raise GuestError(
                "E5: the guest exports no memory, or its start function still runs; build it as a "
                "cdylib or a command"
            )
        return self._memory

    @property
    def stdout(self) -> bytes:
        return bytes(self._out.kept)

    @property
    def stderr(self) -> bytes:
        return bytes(self._err.kept)

    @property
    def dropped_bytes(self) -> int:
        return self._out.dropped + self._err.dropped

    @property
    def fuel_used(self) -> int:
        if not self.guest.config.fuel:
            raise GuestError("this guest does not count: load it with Guest(..., fuel=True)")
        return self._fuel_given - self._store.get_fuel()

    def call(self, name: str, *arguments: int | float) -> Any:
        """Call an export; see `function`."""
        return self.function(name)(*arguments)

    def function(self, name: str) -> Callable[..., Any]:
        """Return an export as a Python function, cheap to call (about 3 us).

        Integers are taken signed or unsigned; integer results come back signed. A function with no
        result returns None.

        Raises
        ------
        GuestError
            If there is no such function (E5). The function itself raises GuestError when the guest
            traps, LimitError when it reaches a limit, and TypeError for wrong arguments.
        """
        signature = self.guest._exports.get(name)
        if not isinstance(signature, Signature):
            known = [n for n, kind in self.guest._exports.items() if isinstance(kind, Signature)]
            raise GuestError(
                f"E5: the guest exports no function {name!r}; it has: {', '.join(known) or 'none'}."
                ' Is it #[no_mangle] pub extern "C", in a cdylib?'
            )
        parameters, results = _codes(signature.parameters), _codes(signature.results)
        if parameters is None or results is None or len(results) > 1:
            raise GuestError(
                f"E5: {name} has a signature that is not supported here: {signature}. "
                "Parameters and the one result can be i32, i64, f32 or f64."
            )
        slots = max(len(parameters), 1)
        raw = (ffi.wasmtime_val_raw_t * slots)()
        layout = struct.Struct("<" + "".join(f"{c}{_RAW_BYTES - _WIDTH[c]}x" for c in parameters))
        signed = struct.Struct("<" + results.lower()) if results else None
        arity, context, lock = len(parameters), self._context, self._lock
        trap = ctypes.c_void_p()
        enter, address = self._enter, ctypes.addressof

        def busy() -> GuestError:
            return GuestError(
                f"{name}: this instance is already running a call. An instance serves one "
                "thread at a time; make one per thread with guest.instantiate()."
            )

        if not lock.acquire(blocking=False):
            raise busy()
        try:
            function = self._export(name).func
        finally:
            lock.release()

        def call(*arguments: int | float) -> Any:
            if len(arguments) != arity:
                raise TypeError(f"{name} takes {arity} arguments, got {len(arguments)}")
            if not lock.acquire(blocking=False):
                raise busy()
            try:
                try:
                    layout.pack_into(raw, 0, *arguments)
                except (struct.error, OverflowError):
                    layout.pack_into(raw, 0, *_unsigned(name, parameters, arguments))
                thread, failure = _local.thread, None
                before = enter(thread)
                try:
                    error = _invoke(context, address(function), address(raw), slots, address(trap))
                    if error:
                        failure = self._explain(
                            wasmtime.WasmtimeError._from_ptr(ctypes.cast(error, _ERROR))
                        )
                    elif trap.value:
                        owned = wasmtime.Trap._from_ptr(ctypes.cast(trap, _TRAP))
                        trap.value = None
                        failure = self._explain(owned)
                finally:
                    thread.leave(before)
                if failure is not None:
                    try:
                        raise failure
                    finally:
                        del failure  # its traceback holds this frame: a cycle around the instance
                return signed.unpack_from(raw)[0] if signed else None
            finally:
                lock.release()

        return call

    def run(self) -> int:
        """Run a command module's ``_start`` and return its exit code.

        Raises
        ------
        GuestError
            If it is not a command, or traps.
        """
        try:
            self.call("_start")
        except _Exit as exit_:
            return exit_.code
        return 0

    def __repr__(self) -> str:
        memory = self._memory
        size = "no memory" if memory is None else f"{len(memory):,} bytes of memory"
        return f"Instance({size}{', ' + self._dead if self._dead else ''})"


class _Exit(GuestError):
    """The guest called exit()."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the guest exited with code {code}; use Instance.run() for commands")
        self.code = code


class _Thread:
    """What runs on a thread.

    A Python signal handler that raises while a ctypes callback is entered is lost there, and what
    the callback then returns is undefined. So on the main thread, the only one that handles
    signals, Ctrl-C is just noted while a guest runs, and answered where an exception is safe.
    """

    __slots__ = ("_handler", "_main", "in_host", "instance", "interrupted")

    def __init__(self) -> None:
        self.instance: Sandbox | None = None  # whose call is on the stack: host functions serve it
        self.in_host = False  # in a host function, where an exception is safe
        self.interrupted = False
        self._handler: Callable[[int, Any], Any] | None = None
        self._main = threading.current_thread() is threading.main_thread()

    def enter(self, instance: Sandbox) -> Sandbox | None:
        """Make `instance` the running one; return what to `leave` to."""
        before, self.instance = self.instance, instance
        self.in_host = False
        if before is None and self._main:
            handler = _SIGNALS.getsignal(_SIGINT)
            if callable(handler):
                self._handler = handler
                _SIGNALS.signal(_SIGINT, self._note)
        return before

    def leave(self, before: Sandbox | None) -> None:
        """Undo `enter`; answer a Ctrl-C."""
        self.instance = before
        self.in_host = before is not None
        handler = self._handler
        if before is None and handler is not None:
            self._handler = None
            _SIGNALS.signal(_SIGINT, handler)
            if self.interrupted:
                self.interrupted = False
                handler(_SIGINT, None)

    def answer(self) -> None:
        """Call the program's own handler for a Ctrl-C that was noted. It usually raises."""
        self.interrupted = False
        if self._handler is not None:
            self._handler(_SIGINT, None)

    def _note(self, _number: int, _frame: Any) -> None:
        if self.in_host:
            self.answer()
        else:
            self.interrupted = True


class _Local(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


_local = _Local()

_HostCallback = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)
_NO_FINALIZER = ctypes.cast(0, ctypes.CFUNCTYPE(None, ctypes.c_void_p))


def _stop(instance: Sandbox | None, error: BaseException, failure: Any) -> int:
    """Keep what a callback raised for the caller of the guest; return the pointer that stops it."""
    if instance is not None:
        instance._host_error = error
    return _address(failure)


@ctypes.CFUNCTYPE(  # type: ignore[untyped-decorator]
    ctypes.c_size_t,
    ctypes.POINTER(ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ffi.wasmtime_update_deadline_kind_t),
)
def _on_tick(_context: Any, _data: Any, ticks: Any, _kind: Any) -> int:
    """Ask whether a running guest may go on, at each tick."""
    instance: Sandbox | None = None
    try:
        thread = _local.thread
        instance = thread.instance
        assert instance is not None
        if thread.interrupted:
            thread.answer()
        if time.monotonic() >= instance._deadline:
            raise instance._out_of_time()
        _ticker.wake()
        ticks[0] = 1
        return 0
    except BaseException as error:  # must not unwind into Rust
        return _stop(instance, error, ffi.wasmtime_error_new(b"stopped"))


class _Ticker:
    """A thread that advances the engines' epochs while guests run, and sleeps while none does.

    Whoever enters a guest wakes it. It ticks once, and sleeps again unless a running guest answers
    that tick by waking it anew.
    """

    def __init__(self) -> None:
        self.engines: set[wasmtime.Engine] = set()
        self.restart()

    def restart(self) -> None:
        """Begin anew: a fork leaves the thread behind, and the locks as they were."""
        self.awake = False
        self._bell = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Make sure that a whole tick follows."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="edgelab-epoch", daemon=True)
                thread.start()
                self._thread = thread
            if not self.awake:
                self.awake = True
                self._bell.release()

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            self.awake = False  # from here on, who enters a guest asks for another tick
            time.sleep(_TICK_S)
            for engine in tuple(self.engines):
                engine.increment_epoch()


_ticker = _Ticker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ticker.restart)


# WASI preview 1: what to wait for, and what happened.
_SUBSCRIPTION_LAYOUT: Any = {
    "names": ["userdata", "kind", "clock", "timeout_ns", "flags"],
    "formats": ["<u8", "u1", "<u4", "<u8", "<u2"],
    "offsets": [0, 8, 16, 24, 40],
    "itemsize": 48,
}
_SUBSCRIPTION = np.dtype(_SUBSCRIPTION_LAYOUT)
_EVENT = np.dtype([("userdata", "<u8"), ("errno", "<u2"), ("kind", "u1"), ("rest", "V21")])
_FAULT, _INVALID, _NOT_SUPPORTED = 21, 28, 58


def _poll_oneoff(instance: Instance, wanted: int, happened: int, count: int, total: int) -> int:
    """Sleep for a guest: wasmtime's own would sleep on past the time limit and through Ctrl-C.

    Waits for times from now, which is what sleeping is; all else is not supported.
    """
    if not 1 <= count <= 1024:
        return _INVALID
    try:
        memory = instance.memory
        subscriptions = memory.array(wanted, count, _SUBSCRIPTION).copy()
        events = memory.array(happened, count, _EVENT)
        number = memory.array(total, 1, np.uint32)
    except GuestError:
        return _FAULT
    supported = (subscriptions["kind"] == 0) & (subscriptions["flags"] & 1 == 0)
    waits = np.where(supported, subscriptions["timeout_ns"] / 1e9, 0)
    end = time.monotonic() + waits.min()
    while (left := min(end, instance._deadline) - time.monotonic()) > 0:
        time.sleep(min(left, 3600))
    if end > instance._deadline:
        raise instance._out_of_time()
    due = waits <= waits.min()
    number[0] = np.count_nonzero(due)
    for event, subscription, known in zip(events, subscriptions[due], supported[due], strict=False):
        event["userdata"], event["kind"] = subscription["userdata"], subscription["kind"]
        event["errno"] = 0 if known else _NOT_SUPPORTED
        event["rest"] = b""
    return 0


class _Output:
    """Keeps the first bytes that a guest prints, and counts the rest."""

    __slots__ = ("__weakref__", "_limit", "dropped", "kept")

    def __init__(self, limit: int) -> None:
        self.kept = bytearray()
        self.dropped = 0
        self._limit = limit
        _outputs[id(self)] = self

    def add(self, data: bytes) -> None:
        room = self._limit - len(self.kept)
        self.kept += data[:room]
        self.dropped += max(0, len(data) - room)


# wasmtime's own binding gives Rust a Python finalizer, which a worker thread calls when the store
# ends: at Python's exit that thread can't have the interpreter any more, and panics. Without a
# finalizer, the number that Rust holds may outlive its output; then it finds nothing here.
_outputs: weakref.WeakValueDictionary[int, _Output] = weakref.WeakValueDictionary()


def _collect(number: int, data: Any, size: int) -> int:
    output = _outputs.get(number)
    if output is not None:
        output.add(ctypes.string_at(data, size))
    return size


_on_output = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_void_p, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_size_t
)(_collect)


def _wasi(
    args: Iterable[str],
    env: Mapping[str, str],
    stdin: bytes,
    dirs: Mapping[str, str | Path],
    out: _Output,
    err: _Output,
) -> wasmtime.WasiConfig:
    arguments = ["guest", *args]
    for text in chain(arguments, *env.items(), dirs, map(str, dirs.values())):
        if "\0" in text:  # C would cut it there
            raise ValueError(f"a NUL character in {text!r}")
    wasi = wasmtime.WasiConfig()
    wasi.argv = arguments
    if env:
        wasi.env = list(env.items())
    if stdin:
        vector = ffi.wasm_byte_vec_t()
        buffer = ctypes.create_string_buffer(stdin, len(stdin))
        ffi.wasm_byte_vec_new(
            ctypes.byref(vector), len(stdin), ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ubyte))
        )
        ffi.wasi_config_set_stdin_bytes(wasi.ptr(), ctypes.byref(vector))
    ffi.wasi_config_set_stdout_custom(wasi.ptr(), _on_output, id(out), _NO_FINALIZER)
    ffi.wasi_config_set_stderr_custom(wasi.ptr(), _on_output, id(err), _NO_FINALIZER)
    for guest_path, folder in dirs.items():
        try:
            wasi.preopen_dir(str(folder), guest_path, fs_mutable=False)
        except (wasmtime.WasmtimeError, ValueError):  # the latter for a name that is no UTF-8
            raise GuestError(f"cannot pre-open {folder}: it is not a readable folder") from None
    return wasi


@functools.lru_cache
def _c_text(text: str) -> tuple[Any, int]:
    """Text for C, and its length in bytes."""
    encoded = text.encode()
    return ctypes.create_string_buffer(encoded, len(encoded)), len(encoded)


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


@functools.cache
def _function_type(_engine: wasmtime.Engine, signature: str) -> tuple[wasmtime.FuncType, str]:
    """The type of a host function, from its short form, and its long form.

    wasmtime aborts if two engines share a type.
    """
    parameters, _, result = signature.partition("->")
    if set(parameters + result) - {"i"} or len(result) > 1:
        raise ValueError(f"a signature is like 'ii->i', not {signature!r}")
    i32 = wasmtime.ValType.i32()
    kind = wasmtime.FuncType([i32] * len(parameters), [i32] * len(result))
    return kind, str(Signature.of(signature))


def _codes(types: Iterable[str]) -> str | None:
    """Struct codes of value types, or None if one of them has no raw form here."""
    codes = [_CODES.get(each) for each in types]
    return None if None in codes else "".join(filter(None, codes))


def _unsigned(name: str, codes: str, arguments: tuple[int | float, ...]) -> list[int | float]:
    """Map negative integers to two's complement; refuse what does not fit the signature."""
    packed: list[int | float] = []
    for position, (code, value) in enumerate(zip(codes, arguments, strict=True)):
        if code in "IQ":
            bits = _WIDTH[code] * 8
            if not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: argument {position} must be an int, got {value!r}")
            if not -(1 << (bits - 1)) <= value < 1 << bits:
                raise TypeError(f"{name}: argument {position} = {value} does not fit {bits} bits")
            packed.append(int(value) & ((1 << bits) - 1))
        else:
            try:
                struct.pack("<" + code, value)  # native form would not look at the range
            except (struct.error, OverflowError) as error:
                raise TypeError(f"{name}: argument {position} = {value!r}: {error}") from None
            packed.append(value)
    return packed


def _assemble(text: bytes) -> bytes:
    try:
        return bytes(wasmtime.wat2wasm(text))
    except wasmtime.WasmtimeError as error:
        raise GuestError(f"E2: not valid WebAssembly text: {str(error)[:1000]}") from None
