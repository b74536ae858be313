"""The WASI-NN host: what a guest's calls do.

A guest is not trusted. Each pointer and length is checked against the guest's memory before use (in
Python integers, which can't wrap), each handle against the guest's own table, and everything that a
guest can pile up has a limit. A wrong call gets an error code of its own era; it never traps and
never raises.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgelab.aot import available_cores
from edgelab.errors import GuestError, ModelError, one_line
from edgelab.runtime import Guest, Instance
from edgelab.wasinn.abi import (
    BUILDER,
    DTYPES,
    MAX_DIMS,
    MODULE,
    OLD_DTYPES,
    TENSOR,
    Encoding,
    Era,
    Errno,
    NNError,
    Target,
)
from edgelab.wasinn.backends import Context, Graph, TensorInfo, load_graph
from edgelab.wasinn.explain import (
    Expectation,
    Explanation,
    Finding,
    LikelyMistake,
    check_fit,
    check_input,
    check_output,
    explain,
)

Source: TypeAlias = "bytes | str | Path | tuple[bytes | str | Path, ...]"
Model: TypeAlias = "Graph | Source"


@dataclass(frozen=True, slots=True)
class NNLimits:
    """What one guest instance may pile up.

    Attributes
    ----------
    graphs, contexts : int
        Loaded models and execution contexts alive at a time.
    model_bytes : int
        Size of one model.

    Notes
    -----
    A model that computes past the guest's time limit is stopped, if its backend can be; ONNX
    Runtime can. Its memory, and what loading takes, have no limit in this process.
    """

    graphs: int = 16
    contexts: int = 64
    model_bytes: int = 512 << 20


@dataclass(slots=True)
class _Execution:
    """A context of a guest, with what was set."""

    graph: int
    model: Graph
    context: Context
    # Input index → the bytes that described the tensor. A guest that runs a model again usually
    # passes the same buffer: then nothing has to be checked or bound again.
    bound: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    staged: dict[int, NDArray[Any]] = field(default_factory=dict)
    # Output index → the backend's array, its bytes, their number as the guest gets it.
    outputs: dict[int, tuple[NDArray[Any] | None, memoryview, bytes]] = field(default_factory=dict)
    computed: bool = False
    ended: bool = False  # compute_single gave what there is
    looked: bool = False  # for likely mistakes
    # Input, shape and type of a tensor that did not fit, until another one is set.
    refused: tuple[int, tuple[int, ...], np.dtype[Any]] | None = None
    evidence: dict[int, float] = field(default_factory=dict)  # see `edgelab.wasinn.explain.ask`


@dataclass(slots=True)
class _Guest:
    """The handles of one instance. Numbers are never used twice: a stale handle stays stale."""

    graphs: dict[int, Graph] = field(default_factory=dict)
    executions: dict[int, _Execution] = field(default_factory=dict)
    next_handle: int = 0
    era: Era | None = None  # what its tensors told
    last: _Execution | None = None  # what `explain` is about
    warned: set[tuple[int, str]] = field(default_factory=set)  # model and kind of mistake


class WasiNN:
    """WASI-NN for guests, to pass as ``Guest(..., host=[WasiNN()])``.

    Parameters
    ----------
    models : mapping of str to Graph, bytes, str or pathlib.Path, optional
        Models that guests can load by name. Loaded on first use and shared by all instances. A
        model of several parts is a tuple; beside ``x.xml`` (OpenVINO), ``x.bin`` is found.
    threads : int, optional
        Threads for one operator; the default is the number of cores that this process may use.
    limits : NNLimits, optional
    era : Era, optional
        Which codes the guests use. The default is to tell it for each guest: by the error names in
        the module (`Era.of_module`), and by the bytes per element of its tensors, which differ
        where the codes do. Only a guest of 2021 that prints no errors can't be told.
    backend : {"onnxruntime", "openvino", "litert"}, optional
        What runs a model that several backends can run; see `edgelab.wasinn.load_graph`.

    Notes
    -----
    ``set_input`` does not copy: the model reads the tensor from guest memory at ``compute``, so the
    guest keeps the buffer unchanged until then. (A tensor that is not aligned to its element size
    is copied.) ``get_output`` copies once, because only then the guest says where to.
    """

    name = MODULE

    def __init__(
        self,
        models: Mapping[str, Model] | None = None,
        *,
        threads: int | None = None,
        limits: NNLimits | None = None,
        era: Era | None = None,
        backend: str | None = None,
    ) -> None:
        self._named: dict[str, Model] = dict(models or {})
        self._threads, self._era, self._backend = threads, era, backend
        self._module_eras: weakref.WeakKeyDictionary[Guest, Era | None] = (
            weakref.WeakKeyDictionary()
        )
        self._loading = threading.Lock()
        self.limits = limits or NNLimits()
        self.errors: deque[str] = deque(maxlen=32)
        """The last messages behind the error codes that guests got."""
        self.mistakes: deque[Finding] = deque(maxlen=32)
        """The last likely mistakes that guests were warned of."""

    def functions(self) -> Mapping[str, tuple[str, Callable[..., int]]]:
        """The preview-1 functions and WasmEdge's: parameters are i32, all return an errno."""
        return {
            name: (signature, self._answering(name, method))
            for name, signature, method in (
                ("load", "iiiii->i", self._load),
                ("load_by_name", "iii->i", self._load_by_name),
                ("init_execution_context", "ii->i", self._init_execution_context),
                ("set_input", "iii->i", self._set_input),
                ("compute", "i->i", self._compute),
                ("get_output", "iiiii->i", self._get_output),
                ("load_by_name_with_config", "iiiii->i", self._load_by_name_with_config),
                ("unload", "i->i", self._unload),
                ("compute_single", "i->i", self._compute_single),
                ("get_output_single", "iiiii->i", self._get_output),
                ("fini_single", "i->i", self._fini_single),
            )
        }

    def add_model(self, name: str, model: Model) -> None:
        """Let guests load a model by name; replaces the model that had this name."""
        self._named[name] = model

    def graph(self, name: str) -> Graph:
        """Return a named model, loading it if this is its first use.

        Raises
        ------
        ModelError
            If there is no such model, or it does not load.
        """
        with self._loading:  # once, even if several threads want it
            model = self._named.get(name)
            if model is None:
                known = ", ".join(sorted(self._named)) or "none"
                raise ModelError(f"no model is named {name!r}; the host offers: {known}")
            if isinstance(model, (bytes, str, Path, tuple)):
                model = self._named[name] = self._load_named(name, model, self._threads)
            return model

    def _load_named(self, name: str, source: Source, threads: int | None) -> Graph:
        parts = list(source) if isinstance(source, tuple) else [source]
        if isinstance(source, (str, Path)) and Path(source).suffix == ".xml":
            parts.append(Path(source).with_suffix(".bin"))
        try:
            data = [part if isinstance(part, bytes) else Path(part).read_bytes() for part in parts]
        except OSError as error:
            raise ModelError(f"cannot read model {name!r}: {error}") from None
        return load_graph(*data, threads=threads, backend=self._backend)

    def _answering(self, name: str, method: Callable[..., None]) -> Callable[..., int]:
        def answer(instance: Instance, *arguments: int) -> int:
            try:
                method(instance, *arguments)
                return Errno.SUCCESS
            except NNError as error:
                errno, message = error.errno, str(error)
            except GuestError as error:  # a pointer out of bounds
                errno, message = Errno.MISSING_MEMORY, str(error)
            except (ModelError, MemoryError) as error:
                errno, message = Errno.RUNTIME_ERROR, str(error) or "out of memory"
            self.errors.append(f"{name}: {errno.name.lower()}: {message}")
            return self._era_of(instance).code(errno)

        return answer

    def _era_of(self, instance: Instance) -> Era:
        """Return what is known about a guest's era; the newest if nothing is."""
        if self._era is not None:
            return self._era
        return self._guest(instance).era or self._module_era(instance.guest) or Era.CRATE_0_6

    def _module_era(self, guest: Guest) -> Era | None:
        if guest not in self._module_eras:
            self._module_eras[guest] = Era.of_module(guest.wasm)
        return self._module_eras[guest]

    def _guest(self, instance: Instance) -> _Guest:
        guest: _Guest | None = instance.state.get(self)
        if guest is None:
            guest = instance.state[self] = _Guest()
        return guest

    def _add_graph(self, instance: Instance, make: Callable[[], Graph], out: int) -> None:
        memory, guest = instance.memory, self._guest(instance)
        memory.address(out, 4)  # before the work, so that no handle is lost
        if len(guest.graphs) >= self.limits.graphs:
            raise NNError(
                Errno.TOO_LARGE,
                f"this guest has {len(guest.graphs)} models loaded, the limit is "
                f"{self.limits.graphs}; unload some, or raise NNLimits.graphs",
            )
        handle = guest.next_handle
        guest.graphs[handle] = make()
        guest.next_handle += 1
        memory.write(out, handle.to_bytes(4, "little"))

    def _load(
        self, instance: Instance, builders: int, count: int, encoding: int, target: int, out: int
    ) -> None:
        memory = instance.memory
        if encoding > max(Encoding):
            raise NNError(Errno.INVALID_ENCODING, f"encoding {encoding} does not exist (0 to 11)")
        _check_target(target)
        if not 1 <= count <= 2:
            raise NNError(Errno.INVALID_ARGUMENT, f"a model has one or two parts, not {count}")
        parts = [
            BUILDER.unpack(memory.read(builders + k * BUILDER.size, BUILDER.size))
            for k in range(count)
        ]
        if (total := sum(length for _, length in parts)) > self.limits.model_bytes:
            raise NNError(
                Errno.TOO_LARGE,
                f"the model has {total:,} bytes, the limit is {self.limits.model_bytes:,}",
            )

        def make() -> Graph:
            data = [memory.read(pointer, length) for pointer, length in parts]
            try:
                return load_graph(
                    *data,
                    threads=self._threads,
                    claimed=Encoding(encoding),
                    backend=self._backend,
                    trusted=False,
                )
            except ModelError as error:
                raise NNError(Errno.INVALID_ENCODING, str(error)) from None

        self._add_graph(instance, make, out)

    def _load_by_name(self, instance: Instance, pointer: int, length: int, out: int) -> None:
        name = self._name(instance, pointer, length)
        self._add_graph(instance, lambda: self.graph(name), out)

    def _load_by_name_with_config(
        self, instance: Instance, name_at: int, name_size: int, text_at: int, size: int, out: int
    ) -> None:
        """WasmEdge's, with a JSON object whose keys depend on the backend; here ``threads``."""
        name = self._name(instance, name_at, name_size)
        if size > _MAX_CONFIG_BYTES:
            raise NNError(
                Errno.TOO_LARGE, f"a configuration of {size} bytes; {_MAX_CONFIG_BYTES} at most"
            )
        try:
            config = json.loads(instance.memory.read(text_at, size) or b"{}")
        except (ValueError, RecursionError) as error:
            reason = f"the configuration is not JSON: {one_line(error)}"
            raise NNError(Errno.INVALID_ARGUMENT, reason) from None
        if not isinstance(config, dict):
            raise NNError(Errno.INVALID_ARGUMENT, "the configuration is no JSON object")
        threads = config.pop("threads", None)
        if threads is not None and (type(threads) is not int or not 1 <= threads <= _MAX_THREADS):
            raise NNError(
                Errno.INVALID_ARGUMENT, f"threads must be 1 to {_MAX_THREADS}, not {threads!r:.40}"
            )
        if config:
            ignored = ", ".join(map(repr, sorted(config)))
            self.errors.append(f"load_by_name_with_config: ignored: {ignored:.200}")
        model = self._named[name]
        if threads is None or not isinstance(model, (bytes, str, Path, tuple)):
            self._add_graph(instance, lambda: self.graph(name), out)
        else:
            # A guest may ask for less than its share, not for more.
            at_most = min(threads, self._threads or available_cores())
            self._add_graph(instance, lambda: self._load_named(name, model, at_most), out)

    def _name(self, instance: Instance, pointer: int, length: int) -> str:
        """Read a model's name, which must be one that the host offers."""
        if length > 4096:
            raise NNError(Errno.TOO_LARGE, f"a model name of {length} bytes; 4096 at most")
        try:
            name = instance.memory.read(pointer, length).decode()
        except UnicodeDecodeError:
            raise NNError(Errno.INVALID_ARGUMENT, "the model's name is not UTF-8") from None
        if name not in self._named:
            known = ", ".join(sorted(self._named)) or "none"
            raise NNError(Errno.NOT_FOUND, f"no model is named {name!r}; there are: {known}")
        return name

    def _unload(self, instance: Instance, handle: int) -> None:
        guest = self._guest(instance)
        if guest.graphs.pop(handle, None) is None:
            raise NNError(Errno.INVALID_ARGUMENT, f"no model has handle {handle}")
        for key in [k for k, e in guest.executions.items() if e.graph == handle]:
            del guest.executions[key]
        if guest.last is not None and guest.last.graph == handle:
            guest.last = None

    def _init_execution_context(self, instance: Instance, handle: int, out: int) -> None:
        memory, guest = instance.memory, self._guest(instance)
        memory.address(out, 4)
        graph = guest.graphs.get(handle)
        if graph is None:
            raise NNError(Errno.INVALID_ARGUMENT, f"no model has handle {handle}")
        if len(guest.executions) >= self.limits.contexts:
            raise NNError(
                Errno.TOO_LARGE,
                f"this guest has {len(guest.executions)} contexts, the limit is "
                f"{self.limits.contexts}; unload their models, or raise NNLimits.contexts",
            )
        key = guest.next_handle
        try:
            guest.executions[key] = _Execution(handle, graph, graph.context())
        except Exception as error:
            raise _backend_failed(error) from None
        guest.next_handle += 1
        memory.write(out, key.to_bytes(4, "little"))

    def _execution(self, instance: Instance, handle: int) -> _Execution:
        execution = self._guest(instance).executions.get(handle)
        if execution is None:
            raise NNError(Errno.INVALID_ARGUMENT, f"no execution context has handle {handle}")
        return execution

    def _set_input(self, instance: Instance, handle: int, index: int, tensor: int) -> None:
        memory, execution = instance.memory, self._execution(instance, handle)
        header = memory.read(tensor, TENSOR.size)
        dims_at, rank, code, data_at, size = TENSOR.unpack(header)
        if rank > MAX_DIMS:
            raise NNError(Errno.INVALID_ARGUMENT, f"{rank} dimensions; {MAX_DIMS} at most")
        dims = memory.read(dims_at, 4 * rank)
        execution.refused = None
        if execution.bound.get(index) == (header, dims):
            if index in execution.staged:
                self._stage(execution, index, memory.address(data_at, size))
            execution.ended = False
            return
        inputs = execution.model.inputs
        if index >= len(inputs):
            raise NNError(
                Errno.INVALID_ARGUMENT, f"input {index} of a model with {len(inputs)} input(s)"
            )
        shape = tuple(int(d) for d in np.frombuffer(dims, "<u4"))
        dtype = self._dtype(instance, code, math.prod(shape), size, inputs[index].dtype)
        if unfit := check_fit(inputs[index], shape, dtype):
            execution.refused = index, shape, dtype
            self._guest(instance).last = execution
            if Expectation.from_metadata(execution.model.metadata):
                self._warn(instance, execution, unfit)
            raise NNError(Errno.INVALID_ARGUMENT, " ".join(f"{f.text}. {f.cure}." for f in unfit))
        address = memory.address(data_at, size)
        execution.bound.pop(index, None)
        execution.staged.pop(index, None)
        if address % dtype.itemsize:
            execution.staged[index] = np.empty(size // dtype.itemsize, dtype)
            address = self._stage(execution, index, address)
        try:
            execution.context.bind_input(index, address, shape, dtype)
        except Exception as error:
            raise _backend_failed(error) from None
        execution.bound[index] = (header, dims)
        execution.ended = False

    def _dtype(
        self, instance: Instance, code: int, count: int, size: int, wanted: np.dtype[Any] | None
    ) -> np.dtype[Any]:
        """Return what a guest means by a tensor type, which depends on its era.

        Where the eras differ, so do the bytes per element; only an empty tensor tells nothing.
        """
        guest = self._guest(instance)
        tables = (DTYPES, OLD_DTYPES) if self._era is None else (self._era.dtypes,)
        meanings = [(table, dtype) for table in tables if (dtype := table.get(code))]
        if not meanings:
            raise NNError(Errno.INVALID_ARGUMENT, f"tensor type {code} does not exist (0 to 5)")
        fitting = [meaning for meaning in meanings if count * meaning[1].itemsize == size]
        if not fitting:
            sizes = " or ".join(dict.fromkeys(f"{count * d.itemsize} ({d})" for _, d in meanings))
            raise NNError(
                Errno.INVALID_ARGUMENT,
                f"a tensor of type {code} and {count} elements has {sizes} bytes, not {size}",
            )
        if len(fitting) > 1 and fitting[0][1] != fitting[1][1]:  # empty
            known = guest.era and guest.era.dtypes
            return next(
                (dtype for table, dtype in fitting if known in (table, None) and dtype == wanted),
                fitting[0][1],
            )
        table, dtype = fitting[0]
        if dtype == wanted and DTYPES.get(code) != OLD_DTYPES.get(code):
            if table is DTYPES:
                guest.era = Era.CRATE_0_6
            else:  # the module's words tell 0.5, whose errors are those of 0.6, from those before
                told = self._module_era(instance.guest)
                guest.era = Era.CRATE_0_5 if told is Era.CRATE_0_6 else told or Era.CRATE_0_4
        return dtype

    @staticmethod
    def _stage(execution: _Execution, index: int, address: int) -> int:
        """Copy an unaligned tensor to an aligned place; return its address."""
        place = execution.staged[index]
        ctypes.memmove(place.ctypes.data, address, place.nbytes)
        return place.ctypes.data

    def _compute(self, instance: Instance, handle: int) -> None:
        execution = self._execution(instance, handle)
        inputs = execution.model.inputs
        if len(execution.bound) < len(inputs):
            missing = [i.name for k, i in enumerate(inputs) if k not in execution.bound]
            raise NNError(Errno.INVALID_ARGUMENT, f"compute before set_input of {missing}")
        execution.computed = False
        compute(execution.context, instance.deadline)
        execution.computed = True
        self._guest(instance).last = execution
        if not execution.looked:
            self._look(instance, execution)

    def _look(self, instance: Instance, execution: _Execution) -> None:
        """Look for likely mistakes after the first compute that has something to see."""
        execution.looked = True
        wants = Expectation.from_metadata(execution.model.metadata)
        if wants is None or len(execution.model.inputs) != 1:
            return
        found = check_input(self._bound_tensor(instance, execution, 0), wants)
        if found is None:
            execution.looked = False
            return
        if execution.model.outputs:
            found += check_output(execution.context.output(0), wants)
        self._warn(instance, execution, found)

    def _warn(
        self, instance: Instance, execution: _Execution, findings: tuple[Finding, ...]
    ) -> None:
        """Warn, once for each model of a guest and kind of mistake."""
        warned = self._guest(instance).warned
        for finding in findings:
            key = execution.graph, finding.kind
            if key not in warned and len(warned) < _MAX_WARNED:
                warned.add(key)
                self.mistakes.append(finding)
                name = execution.model.metadata.get("name", "")
                warnings.warn(
                    f"model {name!r:.80}: {finding} host.explain(instance) says more.",
                    LikelyMistake,
                    stacklevel=2,
                )

    @staticmethod
    def _bound_tensor(instance: Instance, execution: _Execution, index: int) -> NDArray[Any]:
        """View a tensor that was set, where it is now."""
        header, dims = execution.bound[index]
        shape = tuple(int(d) for d in np.frombuffer(dims, "<u4"))
        if index in execution.staged:
            return execution.staged[index].reshape(shape)
        dtype = execution.model.inputs[index].dtype
        assert dtype is not None  # or `check_fit` would have refused it
        return instance.memory.array(TENSOR.unpack(header)[3], shape, dtype)

    def explain(self, instance: Instance) -> Explanation:
        """Say what a guest's model wants, what it got last, and what is likely wrong with that.

        Parameters
        ----------
        instance : Instance
            A guest that has set an input. What counts is its last ``compute``, or the last
            ``set_input`` that failed after that.

        Returns
        -------
        Explanation
            Print it, or let a notebook show it.

        Raises
        ------
        GuestError
            If the guest has not come that far.

        Notes
        -----
        Runs the model a few times, on copies. Each image explained in one context is kept as
        evidence of whether red and blue are swapped, since one alone tells little.

        The automatic warning (`LikelyMistake`) looks at the first image of each context, for a
        fraction of a millisecond, and only if the model's metadata says what it wants. For a model
        that says nothing, add that: ``host.graph(name).metadata.update(...)``, with the keys of
        models/README.md.
        """
        execution = self._guest(instance).last
        if execution is None:
            raise GuestError("this guest has computed nothing yet, so there is nothing to explain")
        return explain(
            execution.model,
            {k: np.array(self._bound_tensor(instance, execution, k)) for k in execution.bound},
            execution.context.output(0) if execution.computed and execution.model.outputs else None,
            execution.refused,
            execution.evidence,
        )

    def _compute_single(self, instance: Instance, handle: int) -> None:
        """WasmEdge's, for models that answer piece by piece. Those here have one piece."""
        execution = self._execution(instance, handle)
        if execution.ended:
            raise NNError(Errno.END_OF_SEQUENCE, "this model gives one output for each input")
        self._compute(instance, handle)
        execution.ended = True

    def _fini_single(self, instance: Instance, handle: int) -> None:
        """WasmEdge's: forget the inputs and outputs of a context."""
        execution = self._execution(instance, handle)
        execution.bound.clear()
        execution.staged.clear()
        execution.outputs.clear()
        execution.computed = execution.ended = False

    def _get_output(
        self, instance: Instance, handle: int, index: int, buffer: int, room: int, written: int
    ) -> None:
        memory, execution = instance.memory, self._execution(instance, handle)
        memory.address(buffer, room)
        if not execution.computed:
            raise NNError(Errno.INVALID_ARGUMENT, "get_output before a successful compute")
        outputs = execution.model.outputs
        if index >= len(outputs):
            raise NNError(
                Errno.INVALID_ARGUMENT, f"output {index} of a model with {len(outputs)} output(s)"
            )
        array = execution.context.output(index)
        known, data, size = execution.outputs.get(index, _NOTHING)
        if array is not known:  # a backend may write to the same array each time
            data = _as_bytes(array, outputs[index])
            size = len(data).to_bytes(4, "little")
            execution.outputs[index] = array, data, size
        memory.write(written, size)
        if len(data) > room:
            raise NNError(Errno.TOO_LARGE, f"the output has {len(data)} bytes, the buffer {room}")
        memory.write(buffer, data)

    def __repr__(self) -> str:
        return f"WasiNN(models={sorted(self._named)})"


_OUTPUT_DTYPES = frozenset(DTYPES.values())
_NOTHING: tuple[NDArray[Any] | None, memoryview, bytes] = (None, memoryview(b""), b"")
_MAX_CONFIG_BYTES = 64 << 10
_MAX_THREADS = 256
_MAX_WARNED = 64  # a guest must not fill the host's log


def _as_bytes(array: NDArray[Any], info: TensorInfo) -> memoryview:
    """View an output as what goes to the guest."""
    if info.dtype not in _OUTPUT_DTYPES:
        raise NNError(
            Errno.UNSUPPORTED_OPERATION,
            f"output {info.name!r} has a type that WASI-NN can't name",
        )
    if array.nbytes > 0xFFFFFFFF:
        raise NNError(Errno.TOO_LARGE, f"an output of {array.nbytes:,} bytes")
    return array.reshape(-1).view(np.uint8).data


def compute(context: Context, deadline: float) -> None:
    """Run a model, and stop it at `deadline` (of `time.monotonic`) if its backend can be stopped.

    Raises
    ------
    NNError
        If the model fails, or is stopped.
    """
    _watch.begin(context, deadline)
    try:
        context.compute()
    except Exception as error:
        raise _backend_failed(error) from None
    finally:
        _watch.end(context)


def _backend_failed(error: Exception) -> NNError:
    """Put whatever a backend's library raises into one line."""
    return NNError(Errno.RUNTIME_ERROR, one_line(error))


def _check_target(target: int) -> None:
    if target > max(Target):
        raise NNError(Errno.INVALID_ARGUMENT, f"target {target} does not exist (0 to 3)")
    if target not in (Target.CPU, Target.AUTO):
        raise NNError(
            Errno.UNSUPPORTED_OPERATION,
            f"target {Target(target).name.lower()} is not available; this host runs on the CPU",
        )


class _Watch:
    """A thread that stops models which compute for longer than their guest may run.

    The time limit stops guest code, and a model is not guest code. One with an endless loop would
    hold its thread for ever, and Ctrl-C with it.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew: a fork leaves the thread behind, and the locks as they were."""
        self._running: dict[Context, float] = {}
        self._lock = threading.Lock()
        self._bell = threading.Semaphore(0)
        self._awake = self._fresh = False
        self._thread: threading.Thread | None = None

    def begin(self, context: Context, deadline: float) -> None:
        """Stop `context` at `deadline`, unless it ends before."""
        with self._lock:
            self._running[context] = deadline
            self._fresh = True
            if self._awake:  # as it is while models run one after the other
                return
            self._awake = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="edgelab-watch", daemon=True)
            self._thread.start()
        self._bell.release()

    def end(self, context: Context) -> None:
        """Leave `context` alone."""
        with self._lock:
            self._running.pop(context, None)  # a fork may have emptied it

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            while self._awake:
                time.sleep(_WATCH_S)
                self._look()

    def _look(self) -> None:
        """Stop who is late. Not in the loop: there, its variables would keep the last model."""
        now = time.monotonic()
        with self._lock:  # so that what was stopped is still at work
            for context, deadline in self._running.items():
                if now >= deadline:
                    context.stop()
            self._awake = self._fresh or bool(self._running)
            self._fresh = False


_WATCH_S = 0.02
_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch.restart)
