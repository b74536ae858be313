"""A model in a process of its own, for models that a guest brought.

OpenVINO and LiteRT check a model's form, but not all that its operators do with it: a damaged or
hostile model can make them read and write where they must not, at once or much later. So such a
model runs in a worker. If that dies, the guest gets an error, and the host goes on. The worker ends
with its graph, and with the host.

The two talk through pipes. A message is one line of JSON, then the bytes of the arrays that it
names. The host takes nothing from a worker on trust: types and sizes are checked.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import ModelError, one_line
from edgelab.wasinn.backends import Context, Graph, TensorInfo, open_graph, view

SECONDS = 60
"""Wall time for loading a model, and for each run. After that the worker ends itself."""

MEMORY = 8 << 30
"""Address space of a worker in bytes, where the system can limit that."""

_MAX_LINE, _MAX_ARRAY = 16 << 20, 0xFFFFFFFF  # bytes
_DTYPES: dict[str | None, np.dtype[Any]] = {
    np.dtype(name).str: np.dtype(name) for name in ("f2", "f4", "f8", "u1", "i1", "i4", "i8", "?")
}


class WorkerGraph:
    """A model that another process runs.

    Parameters
    ----------
    *parts : bytes
        The model's files.
    backend : {"onnxruntime", "openvino", "litert"}
    threads : int, optional
        Threads for one operator. The default is the number of cores that this process may use.

    Raises
    ------
    ModelError
        If the backend refuses the model, or dies of it.
    ImportError
        If the backend is not installed.

    Notes
    -----
    Each tensor is copied into a pipe and out of it. Contexts take turns.
    """

    def __init__(self, *parts: bytes, backend: str, threads: int | None = None) -> None:
        # With -m, Python would not find what only this process knows the way to.
        code = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as w; w.serve()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ModelError(f"no process for the model: {error}") from None
        self._end = weakref.finalize(self, _end, self._process)
        self._turn = threading.Lock()
        self._numbers, self._dropped = itertools.count(), list[int]()
        request = {"backend": backend, "threads": threads, "seconds": SECONDS, "memory": MEMORY}
        answer, _ = self._ask(request, [np.frombuffer(part, np.uint8) for part in parts])
        try:
            self.inputs, self.outputs = (
                tuple(_info(*entry) for entry in answer[which]) for which in ("inputs", "outputs")
            )
            self.metadata = {k: str(v) for k, v in dict(answer["metadata"]).items()}
        except (LookupError, TypeError, ValueError) as error:
            self._fail(f"answers nonsense: {one_line(error)}")

    def context(self) -> WorkerContext:
        """Prepare an execution."""
        number = next(self._numbers)
        context = WorkerContext(self, number)
        weakref.finalize(context, self._dropped.append, number)
        return context

    def _run(self, number: int, inputs: dict[int, NDArray[Any]]) -> list[NDArray[Any]]:
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        request = {"context": number, "inputs": list(inputs), "dropped": dropped}
        _, outputs = self._ask(request, inputs.values())
        if len(outputs) != len(self.outputs):
            self._fail(f"answers nonsense: {len(outputs)} outputs")
        return outputs

    def _ask(
        self, request: dict[str, Any], arrays: Iterable[NDArray[Any]]
    ) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        """Send a request; return the answer and the arrays that came with it."""
        try:
            with self._turn:
                if not self._end.alive:
                    raise ModelError("the model's process has ended; load the model again")
                _send(self._process.stdin, request, arrays)
                answer, arrays = _receive(self._process.stdout)
        except (OSError, EOFError):
            self._fail("died")
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._fail(f"answers nonsense: {one_line(error)}")
        except BaseException:  # perhaps interrupted in the middle of a message
            self._end()
            raise
        if "missing" in answer:
            raise ImportError(one_line(Exception(answer["missing"])))
        if "error" in answer:
            raise ModelError(one_line(Exception(answer["error"])))
        return answer, arrays

    def _fail(self, what: str) -> NoReturn:
        """Give the worker up, and say why."""
        self._end()
        code = self._process.returncode
        how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        if code == _TIMEOUT:
            how = f"took more than {SECONDS} s"
        raise ModelError(f"the model's process {what} ({how})")


class WorkerContext:
    """One execution in a worker. Inputs are read at ``compute``."""

    def __init__(self, graph: WorkerGraph, number: int) -> None:
        self._graph, self._number = graph, number
        self._inputs: dict[int, NDArray[Any]] = {}
        self._outputs: list[NDArray[Any]] = []

    def bind_input(
        self, index: int, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Read input `index` from host memory at `address` on each `compute`."""
        self._inputs[index] = view(address, shape, dtype)

    def compute(self) -> None:
        """Run the model on the bound inputs.

        Raises
        ------
        ModelError
            If the backend fails, or dies of it.
        """
        self._outputs = self._graph._run(self._number, self._inputs)

    def stop(self) -> None:
        """End the process that runs the model; all contexts of the model end with it."""
        self._graph._process.kill()

    def output(self, index: int) -> NDArray[Any]:
        """Return output `index` of the last `compute`."""
        return self._outputs[index]


def _info(name: str, dtype: str | None, shape: list[int | str | None]) -> TensorInfo:
    if type(name) is not str or not {type(d) for d in shape} <= {int, str, type(None)}:
        raise ValueError(f"tensor {name!r}, {shape!r}")
    return TensorInfo(name, _DTYPES.get(dtype), tuple(shape))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError):
        process.communicate()  # waits, and closes the pipes


# --- both sides -----------------------------------------------------------------------------------


def _send(stream: IO[bytes] | None, message: dict[str, Any], arrays: Iterable[Any]) -> None:
    assert stream is not None
    arrays = list(arrays)
    message = {**message, "arrays": [(array.dtype.str, array.shape) for array in arrays]}
    stream.write(json.dumps(message).encode() + b"\n")
    for array in arrays:
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    assert stream is not None
    line = stream.readline(_MAX_LINE)
    if not line.endswith(b"\n"):
        raise EOFError
    message, arrays = json.loads(line), []
    for name, shape in message["arrays"]:
        dtype = _DTYPES[name]
        if (size := math.prod(shape) * dtype.itemsize) > _MAX_ARRAY:
            raise ValueError(f"{size:,} bytes")
        array = np.empty(shape, dtype)
        if stream.readinto(array.reshape(-1).view(np.uint8).data) != size:  # type: ignore[attr-defined]
            raise EOFError
        arrays.append(array)
    return message, arrays


# --- the worker's side ----------------------------------------------------------------------------

_TIMEOUT = 1  # the exit code that faulthandler gives


def serve() -> None:
    """Load the model that the first message brings, and run it as the others ask."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # libraries may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is the host's business
    with contextlib.suppress(EOFError, OSError):  # the host has gone
        request, arrays = _receive(source)
        seconds, server = request["seconds"], _Server(request["memory"])
        while True:
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                answer, results = server.answer(request, arrays)
            except ImportError as error:
                answer, results = {"missing": one_line(error)}, []
            except Exception as error:
                answer, results = {"error": one_line(error) or repr(error)}, []
            faulthandler.cancel_dump_traceback_later()
            _send(sink, answer, results)
            request, arrays = _receive(source)


class _Server:
    """The model in the worker, with its contexts."""

    def __init__(self, memory: int) -> None:
        self._graph: Graph | None = None
        self._contexts: dict[int, Context] = {}
        with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    def answer(
        self, request: dict[str, Any], arrays: list[NDArray[Any]]
    ) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        if self._graph is None:
            parts = [array.tobytes() for array in arrays]
            self._graph = graph = open_graph(request["backend"], *parts, threads=request["threads"])
            inputs, outputs = (
                [(i.name, None if i.dtype is None else i.dtype.str, i.shape) for i in infos]
                for infos in (graph.inputs, graph.outputs)
            )
            return {"inputs": inputs, "outputs": outputs, "metadata": graph.metadata}, []
        for number in request["dropped"]:
            self._contexts.pop(number, None)
        context = self._contexts.get(request["context"])
        if context is None:
            context = self._contexts[request["context"]] = self._graph.context()
        for index, array in zip(request["inputs"], arrays, strict=True):
            context.bind_input(index, array.ctypes.data, array.shape, array.dtype)
        context.compute()
        return {}, [context.output(k) for k in range(len(self._graph.outputs))]
