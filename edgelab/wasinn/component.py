"""Components that import ``wasi:nn``: the WIT form of WASI-NN, with wasmtime's component model.

A component speaks in types, not in pointers: wasmtime checks them, copies lists and strings in and
out, and knows who owns a resource. What is left to a host is to keep the resources, and to move the
bytes quickly: ``adapter.wat`` beside this file says how those of ``wasi:nn`` move, and
`edgelab.wasinn.values` those of a component's own functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import wasmtime
from numpy.typing import NDArray
from wasmtime import _ffi as ffi
from wasmtime import component as wit

from edgelab.aot import EngineConfig, compile_module
from edgelab.errors import GuestError, LimitError, ModelError, one_line
from edgelab.runtime import _NO_FINALIZER, Limits, Sandbox, _local, _stop
from edgelab.wasinn.abi import MAX_DIMS, Encoding, Errno, NNError, Target
from edgelab.wasinn.backends import Context, Graph, load_graph
from edgelab.wasinn.explain import check_fit
from edgelab.wasinn.host import WasiNN, _as_bytes, _backend_failed, _check_target, compute
from edgelab.wasinn.values import (
    Codec,
    UnsupportedType,
    Val,
    codec,
    items,
    new_items,
    numbers,
    set_text,
    text,
)

VERSION = "0.2.0-rc-2024-10-28"
"""The version of ``wasi:nn`` that components can import."""

# For the guest and the two adapters. wit-component makes several small modules of one guest.
_INSTANCES, _TABLES, _MEMORIES = 64, 16, 3

_DTYPES: dict[str, np.dtype[Any]] = {
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}  # NumPy has no BF16
_TYPES = {dtype: name for name, dtype in _DTYPES.items()}
_ENCODINGS = {encoding.name.lower().replace("_", ""): encoding for encoding in Encoding}
_CODES = {errno: errno.name.lower().replace("_", "-") for errno in Errno}
_ERROR, _TENSOR, _GRAPH, _CONTEXT = range(4)  # wasmtime's numbers for the types of resources

_ENUM, _LIST, _RESOURCE, _RESULT, _STRING, _TUPLE = (
    getattr(ffi, f"WASMTIME_COMPONENT_{name}").value
    for name in ("ENUM", "LIST", "RESOURCE", "RESULT", "STRING", "TUPLE")
)
_POINTER, _SIZE, _U32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
_HostCallback = ctypes.CFUNCTYPE(
    _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE
)
_ErrorPointer = ctypes.POINTER(ffi.wasmtime_error_t)
_DropCallback = ctypes.CFUNCTYPE(_SIZE, _POINTER, _POINTER, _U32)


def _short(name: str, result: Any, *parameters: Any) -> Callable[..., Any]:
    """A function of wasmtime that returns at once, so it can keep the interpreter lock."""
    return ctypes.PYFUNCTYPE(result, *parameters)((f"wasmtime_component_{name}", ffi.dll))


_host_new = _short("resource_host_new", _POINTER, ctypes.c_bool, _U32, _U32)
_host_rep = _short("resource_host_rep", _U32, _POINTER)
_host_delete = _short("resource_host_delete", None, _POINTER)
_host_to_any = _short("resource_host_to_any", _POINTER, _POINTER, _POINTER, _POINTER)
_any_to_host = _short("resource_any_to_host", _POINTER, _POINTER, _POINTER, _POINTER)
_dimensions = numbers(wit.U32)


class ComponentError(GuestError):
    """A component's function returned an error.

    Attributes
    ----------
    value : object
        What it returned.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(f"{name} returned an error: {value!r:.1000}")
        self.value = value


class Component:
    """A compiled component, from which any number of instances can be made.

    Parameters
    ----------
    wasm : bytes, str or pathlib.Path
        The component, or a path to it. It can import ``wasi:nn`` in `VERSION`, and nothing else.
    nn : WasiNN, optional
        Models by name, threads, limits, and the log of errors.
    cache : bool
        Use the ahead-of-time cache, see `edgelab.aot`.

    Attributes
    ----------
    exports : tuple of str
        The functions: ``"name"``, or ``"package:name/interface#name"`` for one in an interface.

    Raises
    ------
    GuestError
        If the component is invalid (E2), or imports anything else (P3, E7).

    Notes
    -----
    A component that imports WASI 0.2 is refused; so is each whose Rust has ``std``.

    Examples
    --------
    >>> Component(b"(component)").exports
    ()
    """

    def __init__(
        self, wasm: bytes | str | Path, nn: WasiNN | None = None, *, cache: bool = True
    ) -> None:
        if isinstance(wasm, (str, Path)):
            try:
                wasm = Path(wasm).read_bytes()
            except (OSError, ValueError) as error:
                raise GuestError(f"cannot read the component: {error}") from None
        if wasm.lstrip()[:1] == b"(":
            try:
                wasm = bytes(wasmtime.wat2wasm(wasm))
            except wasmtime.WasmtimeError as error:
                raise GuestError(f"E2: not valid WebAssembly text: {error!s:.1000}") from None
        if wasm[:8] != _HEADER:
            raise GuestError(
                "E7: this is no WebAssembly component. edgelab.runtime.Guest runs core modules; "
                "guest/component shows how one becomes a component."
            )
        self.nn = nn or WasiNN()
        before, after = _adapter()
        try:
            self.compiled = compile_module(
                before + _section(wasm) + after, EngineConfig(component=True), cache=cache
            )
        except GuestError as error:
            raise GuestError(_explain_import(str(error)) or str(error)) from None
        self._component: Any = self.compiled.module
        self._callbacks: list[Any] = []  # ctypes trampolines must outlive every instance
        self._linker = wit.Linker(self.compiled.engine)
        with self._linker.root() as root:
            for interface, functions in _HOST.items():
                with root.add_instance(interface) as instance:
                    for name, provided in functions.items():
                        if isinstance(provided, int):
                            self._define_resource(instance, name, provided)
                        else:
                            self._define_function(instance, name, provided)
        self.exports = tuple(self._list_exports())

    def _define_function(
        self,
        instance: wit.LinkerInstance,
        name: str,
        function: Callable[[_Session, Any, Any], None],
    ) -> None:
        def trampoline(
            _env: int, context: int, _type: int, arguments: int, count: int, result: int, _one: int
        ) -> int:
            running: Sandbox | None = None
            try:
                thread = _local.thread
                running = thread.instance
                assert isinstance(running, ComponentInstance)
                try:
                    thread.in_host = True
                    running._session.context = context
                    values = (Val * count).from_address(arguments)
                    function(running._session, values, Val.from_address(result))
                finally:
                    thread.in_host = False
                return 0
            except BaseException as error:  # must not unwind into Rust
                return _stop(running, error, ffi.wasmtime_error_new(b"host function"))

        callback = _HostCallback(trampoline)
        self._callbacks.append(callback)
        encoded = name.encode()
        error = ffi.wasmtime_component_linker_instance_add_func(
            instance.ptr(),
            ctypes.create_string_buffer(encoded),
            len(encoded),
            ctypes.cast(callback, ffi.wasmtime_component_func_callback_t),
            None,
            _NO_FINALIZER,
        )
        if error:
            raise wasmtime.WasmtimeError._from_ptr(error)

    def _define_resource(self, instance: wit.LinkerInstance, name: str, kind: int) -> None:
        def drop(_env: int, _context: int, number: int) -> int:
            running: Sandbox | None = None
            try:
                running = _local.thread.instance
                assert isinstance(running, ComponentInstance)
                running._session.take(kind, number)
                return 0
            except BaseException as error:  # must not unwind into Rust
                return _stop(running, error, ffi.wasmtime_error_new(b"host resource"))

        callback, host_type = _DropCallback(drop), wit.ResourceType.host(kind)
        self._callbacks.append(callback)
        encoded = name.encode()
        error = ffi.wasmtime_component_linker_instance_add_resource(
            instance.ptr(),
            ctypes.create_string_buffer(encoded),
            len(encoded),
            host_type.ptr(),
            ctypes.cast(callback, ffi.wasmtime_component_resource_destructor_t),
            None,
            _NO_FINALIZER,
        )
        if error:
            raise wasmtime.WasmtimeError._from_ptr(error)

    def _list_exports(self) -> Iterator[str]:
        engine = self.compiled.engine
        guest: Any = self._component.type.exports(engine)["guest"].ty
        for name, export in guest.exports(engine).items():
            kind = export.ty
            if isinstance(kind, wit.FuncType):
                yield name
            elif isinstance(kind, wit.ComponentInstanceType):
                for inner, function in kind.exports(engine).items():
                    if isinstance(function.ty, wit.FuncType):
                        yield f"{name}#{inner}"

    def instantiate(self, *, limits: Limits | None = None) -> ComponentInstance:
        """Make a running copy with fresh memory.

        Parameters
        ----------
        limits : Limits, optional
            The memory limit holds for the guest's memory, for each of the two that hold bytes on
            their way to the host, and for the tensors that the guest keeps with the host.

        Raises
        ------
        GuestError
            If the component can't start.
        LimitError
            If its initial memory is over the limit.
        """
        return ComponentInstance(self, limits or Limits())

    def __repr__(self) -> str:
        made = self.compiled
        return f"Component({len(self.exports)} exports, {made.origin} in {made.load_ms:.1f} ms)"


class _Signature(NamedTuple):
    parameters: list[Codec]
    result: Codec | None
    error: Codec | None  # of a result<_, error>
    fallible: bool


class ComponentInstance(Sandbox):
    """One running copy of a component. Use it from one thread at a time."""

    def __init__(self, component: Component, limits: Limits) -> None:
        if limits.fuel is not None:
            raise GuestError("components don't count fuel here; use Limits.seconds")
        super().__init__(
            component.compiled.engine,
            limits,
            instances=_INSTANCES,
            tables=_TABLES,
            memories=_MEMORIES,
        )
        self.component = component
        self._session = _Session(component.nn, limits.memory_bytes)
        self._functions: dict[str, tuple[Any, _Signature]] = {}
        self._instance = ffi.wasmtime_component_instance_t()
        self._guarded(
            ffi.wasmtime_component_linker_instantiate,
            component._linker.ptr(),
            self._store._context(),
            component._component.ptr(),
            ctypes.byref(self._instance),
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an export.

        Parameters
        ----------
        name : str
            One of `Component.exports`.
        *arguments : object
            As `edgelab.wasinn.values` has them, and a NumPy array for a tensor of ``wasi:nn``. Its
            bytes stay with the host: this is the fast way. A list of numbers may be an array of any
            shape.

        Returns
        -------
        object
            What the function returns; of a ``result``, what it has when all went well.

        Raises
        ------
        ComponentError
            If the function returns an error.
        GuestError
            If there is no such function (E5), or the component traps.
        LimitError
            If it reaches a limit.
        TypeError
            If the arguments don't fit.
        """
        if not self._lock.acquire(blocking=False):
            raise GuestError(
                f"{name}: this instance is already running a call. An instance serves one thread "
                "at a time; make one per thread with component.instantiate()."
            )
        try:
            return self._call(name, arguments)
        finally:
            self._lock.release()

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        function, signature = self._functions.get(name) or self._find(name)
        if len(arguments) != len(signature.parameters):
            raise TypeError(
                f"{name} takes {len(signature.parameters)} arguments, got {len(arguments)}"
            )
        values, result = (Val * len(arguments))(), Val()
        session = self._session
        session.context = self._context
        try:
            with session.handing_over():
                for position, argument in enumerate(arguments):
                    try:
                        signature.parameters[position].lower(argument, values[position])
                    except (TypeError, ValueError) as error:
                        raise TypeError(f"{name}: argument {position}: {error}") from None
            self._guarded(
                ffi.wasmtime_component_func_call,
                ctypes.byref(function),
                self._store._context(),
                values,
                len(values),
                ctypes.byref(result),
                int(signature.fallible or signature.result is not None),
            )
            session.context = self._context  # instead of the last host function's
            if not signature.fallible:
                return signature.result.lift(result) if signature.result else None
            good = result.of.result.is_ok
            payload = signature.result if good else signature.error
            value = payload.lift(result.of.result.val.contents) if payload else None
            if not good:
                raise ComponentError(name, value)
            return value
        finally:
            for each in (*values, result):
                ffi.wasmtime_component_val_delete(ctypes.byref(each))

    def _find(self, name: str) -> tuple[Any, _Signature]:
        if name not in self.component.exports:
            known = ", ".join(self.component.exports) or "none"
            raise GuestError(f"E5: the component exports no function {name!r}; it has: {known}.")
        index = None
        interface, _, function = name.rpartition("#")
        for part in filter(None, ("guest", interface, function)):
            encoded = part.encode()
            found = ffi.wasmtime_component_instance_get_export_index(
                ctypes.byref(self._instance),
                self._store._context(),
                index and index.ptr(),
                ctypes.create_string_buffer(encoded),
                len(encoded),
            )
            index = wit.ExportIndex._from_ptr(found)
        raw = ffi.wasmtime_component_func_t()
        assert index is not None
        ffi.wasmtime_component_instance_get_func(
            ctypes.byref(self._instance), self._store._context(), index.ptr(), ctypes.byref(raw)
        )
        kind = wit.Func._from_raw(raw).type(self._store)
        self._functions[name] = raw, _signature(name, kind, self._session.own)
        return self._functions[name]

    def _explain(self, failure: Exception) -> BaseException:
        by_host = self._host_error is not None
        explained = super()._explain(failure)
        if by_host or isinstance(explained, LimitError):
            return explained
        if "fuel allocated for hostcalls" in str(explained):
            return LimitError(
                "P2: more data at a time than wasmtime moves between a component and its host: 128 "
                "MiB through wasi:nn, some 3 million numbers of a component's own lists. Let the "
                "component ask for a large model by its name."
            )
        # How a guest without a way to print gives up, and what the adapters' memory runs into.
        if re.search("unreachable|beyond end of memory", str(explained)):
            return GuestError(
                f"{explained} If it wanted more memory than {self.limits.memory_bytes} bytes (E4), "
                "raise Limits.memory_bytes."
            )
        return explained

    def __repr__(self) -> str:
        return f"ComponentInstance({self._dead or 'ready'})"


def _signature(name: str, kind: wit.FuncType, own: Callable[[wit.OwnType], Codec]) -> _Signature:
    try:
        parameters = [codec(parameter, own) for _, parameter in kind.params]
        result = kind.result
        if isinstance(result, wit.ResultType):
            ok, error = (codec(each, own) if each else None for each in (result.ok, result.err))
            return _Signature(parameters, ok, error, True)
        return _Signature(parameters, codec(result, own) if result else None, None, False)
    except (UnsupportedType, TypeError) as error:  # the latter for what wasmtime can't name
        raise GuestError(f"E5: {name} has a type that is not supported here: {error}") from None


# --- wasi:nn --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    dimensions: tuple[int, ...]
    kind: str
    data: bytes


class _Session:
    """The resources of one instance, and what `_HOST` offers. Numbers are never used twice.

    wasmtime has checked the types, and that what a guest lends is its own and still there.
    """

    def __init__(self, nn: WasiNN, tensor_bytes: int) -> None:
        self.nn = nn
        self.context = 0  # wasmtime's, during a call
        self._resources: tuple[dict[int, Any], ...] = ({}, {}, {}, {})
        self._next = 0
        self._room = self._limit = tensor_bytes
        self._tensor_type = wit.ResourceType.host(_TENSOR)
        self._handed: list[Any] = []  # tensors among the arguments of a call that has not begun

    def take(self, kind: int, number: int) -> Any:
        """Forget a resource, and return it."""
        thing = self._resources[kind].pop(number)
        if kind == _TENSOR:
            self._room += len(thing.data)
        return thing

    def _give(self, kind: int, thing: Any, val: Any) -> None:
        """Make `val` a new resource, which the guest owns."""
        resource = ctypes.POINTER(ffi.wasmtime_component_resource_any_t)()
        host = _host_new(True, self._next, kind)
        error = _host_to_any(self.context, host, ctypes.addressof(resource))
        _host_delete(host)
        if error:
            failure = wasmtime.WasmtimeError._from_ptr(ctypes.cast(error, _ErrorPointer))
            raise LimitError(f"the guest keeps too much with the host: {one_line(failure)}")
        val.of.resource = resource
        val.kind = _RESOURCE
        self._resources[kind][self._next] = thing
        self._next += 1
        if kind == _TENSOR:
            self._room -= len(thing.data)

    def _number(self, val: Any) -> int:
        """Return the number of a resource that the guest lends, or gives away."""
        host = _POINTER()
        resource = ctypes.addressof(val.of.resource.contents)
        error = _any_to_host(self.context, resource, ctypes.addressof(host))
        if error:
            raise wasmtime.WasmtimeError._from_ptr(ctypes.cast(error, _ErrorPointer))
        number: int = _host_rep(host)
        _host_delete(host)
        return number

    def _lent(self, kind: int, val: Any) -> Any:
        return self._resources[kind][self._number(val)]

    # --- tensors among a call's arguments and results ---

    def own(self, kind: wit.OwnType) -> Codec:
        """Make the codec of a resource that changes hands: a tensor, which is an array here."""
        if kind.ty != self._tensor_type:
            raise UnsupportedType("a resource that is no tensor of wasi:nn")
        return Codec(self._lower_tensor, self._lift_tensor)

    @contextlib.contextmanager
    def handing_over(self) -> Iterator[None]:
        """Take the tensors back if not all arguments can be handed over."""
        self._handed.clear()
        try:
            yield
        except BaseException:
            for val in self._handed:
                self.take(_TENSOR, self._number(val))
            raise

    def _lower_tensor(self, value: Any, val: Any) -> None:
        kind = _TYPES.get(value.dtype) if isinstance(value, np.ndarray) else None
        if kind is None:
            raise TypeError(f"{value!r:.100} is no NumPy array of {', '.join(_DTYPES)}")
        self._keep(_Tensor(value.shape or (1,), kind, value.tobytes()), val)
        self._handed.append(val)

    def _lift_tensor(self, val: Any) -> NDArray[Any]:
        tensor = self.take(_TENSOR, self._number(val))
        try:
            array: NDArray[Any] = np.frombuffer(tensor.data, _DTYPES[tensor.kind]).reshape(
                tensor.dimensions
            )
        except (KeyError, ValueError) as error:
            raise GuestError(
                f"the component returned a tensor of {tensor.kind}, {list(tensor.dimensions)} and "
                f"{len(tensor.data)} bytes, which is none: {error}"
            ) from None
        return array

    def _keep(self, tensor: _Tensor, val: Any) -> None:
        if len(tensor.data) > self._room:
            raise LimitError(
                f"E4: the guest keeps more than {self._limit} bytes of tensors with the host. Let "
                "it drop some, or raise Limits.memory_bytes."
            )
        self._give(_TENSOR, tensor, val)

    # --- what guests call ---

    def _answer(self, name: str, result: Any, work: Callable[[Any], None]) -> None:
        """Make `result` what `work` writes, or else an error that the guest owns."""
        payload = Val()
        result.of.result.is_ok = True
        try:
            work(payload)
        except (NNError, ModelError, MemoryError) as error:
            code = _CODES[error.errno if isinstance(error, NNError) else Errno.RUNTIME_ERROR]
            message = str(error) or "out of memory"
            self.nn.errors.append(f"{name}: {code}: {message}")
            self._give(_ERROR, (code, message), payload)
            result.of.result.is_ok = False
        result.of.result.val = ffi.wasmtime_component_val_new(ctypes.byref(payload))
        result.kind = _RESULT

    def error_code(self, values: Any, result: Any) -> None:
        set_text(result.of.enumeration, self._lent(_ERROR, values[0])[0].encode())
        result.kind = _ENUM

    def error_data(self, values: Any, result: Any) -> None:
        set_text(result.of.string, self._lent(_ERROR, values[0])[1].encode())
        result.kind = _STRING

    def tensor(self, values: Any, result: Any) -> None:
        # This can't return an error, so what is wrong with a tensor turns up in `compute`.
        rank = values[0].of.list.size
        if rank > MAX_DIMS:
            raise LimitError(f"P2: a tensor of {rank} dimensions; {MAX_DIMS} at most")
        dimensions = tuple(_dimensions.lift(values[0]).tolist())
        kind = text(values[1].of.enumeration)
        self._keep(_Tensor(dimensions, kind, _bytes(values[2])), result)

    def tensor_dimensions(self, values: Any, result: Any) -> None:
        _dimensions.lower(self._lent(_TENSOR, values[0]).dimensions, result)

    def tensor_type(self, values: Any, result: Any) -> None:
        set_text(result.of.enumeration, self._lent(_TENSOR, values[0]).kind.encode())
        result.kind = _ENUM

    def tensor_data(self, values: Any, result: Any) -> None:
        set_text(result.of.string, self._lent(_TENSOR, values[0]).data.decode("latin-1").encode())
        result.kind = _STRING

    def load(self, values: Any, result: Any) -> None:
        def work(payload: Any) -> None:
            _check_target(Target[text(values[2].of.enumeration).upper()])
            parts = [_bytes(part) for part in items(values[0].of.list)]
            if not 1 <= len(parts) <= 2:
                reason = f"a model has one or two parts, not {len(parts)}"
                raise NNError(Errno.INVALID_ARGUMENT, reason)
            size, limit = sum(map(len, parts)), self.nn.limits.model_bytes
            if size > limit:
                raise NNError(
                    Errno.TOO_LARGE, f"the model has {size:,} bytes, the limit is {limit:,}"
                )

            def make() -> Graph:
                try:
                    return load_graph(
                        *parts,
                        threads=self.nn._threads,
                        claimed=_ENCODINGS[text(values[1].of.enumeration)],
                        backend=self.nn._backend,
                        trusted=False,
                    )
                except ModelError as error:
                    raise NNError(Errno.INVALID_ENCODING, str(error)) from None

            self._give_graph(make, payload)

        self._answer("load", result, work)

    def load_by_name(self, values: Any, result: Any) -> None:
        def work(payload: Any) -> None:
            name = text(values[0].of.string)
            if name not in self.nn._named:
                known = ", ".join(sorted(self.nn._named)) or "none"
                raise NNError(
                    Errno.NOT_FOUND, f"no model is named {name!r:.100}; there are: {known}"
                )
            self._give_graph(lambda: self.nn.graph(name), payload)

        self._answer("load-by-name", result, work)

    def _give_graph(self, make: Callable[[], Graph], payload: Any) -> None:
        graphs = list(self._resources[_GRAPH].values())
        # A guest may drop a model, and keep it by a context.
        kept = {id(graph) for graph, _ in self._resources[_CONTEXT].values()} - set(map(id, graphs))
        held, limit = len(graphs) + len(kept), self.nn.limits.graphs
        if held >= limit:
            raise NNError(
                Errno.TOO_LARGE,
                f"this guest has {held} models loaded, the limit is {limit}; drop some, or raise "
                "NNLimits.graphs",
            )
        self._give(_GRAPH, make(), payload)

    def init_execution_context(self, values: Any, result: Any) -> None:
        graph: Graph = self._lent(_GRAPH, values[0])

        def work(payload: Any) -> None:
            held, limit = len(self._resources[_CONTEXT]), self.nn.limits.contexts
            if held >= limit:
                raise NNError(
                    Errno.TOO_LARGE,
                    f"this guest has {held} contexts, the limit is {limit}; drop some, or raise "
                    "NNLimits.contexts",
                )
            try:
                context = graph.context()
            except Exception as error:
                raise _backend_failed(error) from None
            self._give(_CONTEXT, (graph, context), payload)

        self._answer("init-execution-context", result, work)

    def compute(self, values: Any, result: Any) -> None:
        graph, context = self._lent(_CONTEXT, values[0])
        named = [items(pair.of.tuple) for pair in items(values[1].of.list)]
        # They are the host's now, and gone after the call, even one that fails.
        given = [
            (text(name.of.string), self.take(_TENSOR, self._number(tensor)))
            for name, tensor in named
        ]

        def work(payload: Any) -> None:
            outputs = _compute(graph, context, given)
            size = sum(len(tensor.data) for _, tensor in outputs)
            if size > self._room:
                raise NNError(
                    Errno.TOO_LARGE,
                    f"the outputs have {size:,} bytes, and the guest may keep {self._room:,} more",
                )
            for pair, (name, tensor) in zip(
                new_items(payload, _LIST, len(outputs)), outputs, strict=True
            ):
                first, second = new_items(pair, _TUPLE, 2)
                set_text(first.of.string, name.encode())
                first.kind = _STRING
                self._give(_TENSOR, tensor, second)

        self._answer("compute", result, work)


_HostFunction: TypeAlias = Callable[[_Session, Any, Any], None]
_HOST: dict[str, dict[str, int | _HostFunction]] = {
    "errors": {
        "error": _ERROR,
        "[method]error.code": _Session.error_code,
        "[method]error.data": _Session.error_data,
    },
    "tensor": {
        "tensor": _TENSOR,
        "[constructor]tensor": _Session.tensor,
        "[method]tensor.dimensions": _Session.tensor_dimensions,
        "[method]tensor.ty": _Session.tensor_type,
        "[method]tensor.data": _Session.tensor_data,
    },
    "inference": {
        "graph-execution-context": _CONTEXT,
        "[method]graph-execution-context.compute": _Session.compute,
    },
    "graph": {
        "graph": _GRAPH,
        "[method]graph.init-execution-context": _Session.init_execution_context,
        "load": _Session.load,
        "load-by-name": _Session.load_by_name,
    },
}
"""What ``adapter.wat`` imports."""


def _bytes(val: Any) -> bytes:
    """Return bytes that crossed as a string in latin1, see ``adapter.wat``."""
    return text(val.of.string).encode("latin-1")


def _compute(
    graph: Graph, context: Context, given: list[tuple[str, _Tensor]]
) -> list[tuple[str, _Tensor]]:
    places = {info.name: place for place, info in enumerate(graph.inputs)}
    missing = places.keys() - {name for name, _ in given}
    for name, tensor in given:
        place = places.pop(name, None)
        if place is None:
            wanted = ", ".join(repr(info.name) for info in graph.inputs) or "none"
            raise NNError(
                Errno.INVALID_ARGUMENT,
                f"input {name!r:.100}: there is none, or it was given twice; the inputs are: "
                f"{wanted}",
            )
        _bind(graph, context, place, tensor)
    if missing:
        raise NNError(Errno.INVALID_ARGUMENT, f"compute without {sorted(missing)}")
    running = _local.thread.instance
    assert running is not None  # whose call this is
    compute(context, running.deadline)
    outputs = []
    for place, info in enumerate(graph.outputs):
        array = context.output(place)
        data = bytes(_as_bytes(array, info))
        # WIT: one dimension of 1 is how a single value is written.
        outputs.append((info.name, _Tensor(array.shape or (1,), _TYPES[array.dtype], data)))
    return outputs


def _bind(graph: Graph, context: Context, place: int, tensor: _Tensor) -> None:
    info, shape, size = graph.inputs[place], tensor.dimensions, len(tensor.data)
    dtype = _DTYPES.get(tensor.kind)
    if dtype is None:
        raise NNError(
            Errno.UNSUPPORTED_OPERATION, f"input {info.name!r}: {tensor.kind} is not available here"
        )
    needed = math.prod(shape) * dtype.itemsize
    if needed != size:
        raise NNError(
            Errno.INVALID_ARGUMENT,
            f"input {info.name!r}: {tensor.kind} of {list(shape)} has {needed} bytes, not {size}",
        )
    if shape == (1,) and info.shape == ():
        shape = ()
    if unfit := check_fit(info, shape, dtype):
        raise NNError(Errno.INVALID_ARGUMENT, " ".join(f"{f.text}. {f.cure}." for f in unfit))
    address = np.frombuffer(tensor.data, np.uint8).ctypes.data  # `given` keeps the bytes
    try:
        context.bind_input(place, address, shape, dtype)
    except Exception as error:
        raise _backend_failed(error) from None


# --- putting a guest between its adapters ---------------------------------------------------------

_HEADER = b"\0asm\x0d\0\x01\0"  # of a component; alone, it is the empty one


def _section(component: bytes) -> bytes:
    """Return the section that holds a component inside of another one."""
    length, size = b"", len(component)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return b"\x04" + length + bytes([size]) + component


@functools.cache
def _adapter() -> tuple[bytes, bytes]:
    """Return what comes before the guest, and what comes after it."""
    source = Path(__file__).with_name("adapter.wat").read_bytes()
    before, found, after = bytes(wasmtime.wat2wasm(source)).partition(_section(_HEADER))
    assert found
    return before, after


def _explain_import(message: str) -> str | None:
    """Say what to do about an import that nobody provides, if that is what `message` is about."""
    found = re.search(
        r"(?:missing import named|mismatch for import) `([^`]+)`(.*)\(at offset", message
    )
    if found is None:
        return None
    name, details = found.groups()
    if not name.startswith("wasi:"):
        return f"E5: the component imports {name}, which nobody provides."
    if not name.startswith("wasi:nn/"):
        return (
            f"E7: the component imports {name}, and this host provides nothing but wasi:nn. Rust's "
            "std imports it; guest/component shows how to do without."
        )
    if not name.endswith(f"@{VERSION}"):
        return (
            f"P3: the component imports {name}, and this host provides version {VERSION}. Build "
            "the component with the WIT files of that version."
        )
    return f"E5: {name} as the component imports it is not the published one:{details}"
