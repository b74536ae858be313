"""A folder of pictures classified once: over all cores, or over a Ray cluster; resumable.

The pictures are cut into chunks. A chunk's results are one file that appears when all of it is
done, so that a run that was stopped goes on where it was, and nothing is lost or done twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import platform
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edgelab.aot import available_cores
from edgelab.datasets import ImageFolder, class_names
from edgelab.errors import BatchError, EdgelabError, one_line
from edgelab.models import Model, load
from edgelab.paths import locked, write_atomic
from edgelab.pipeline import Pipeline
from edgelab.pool import Workers

CHUNK = 64
"""Pictures in a chunk: a second of work, more or less. What is running when a worker dies is lost
and done again."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a folder of pictures.

    Attributes
    ----------
    path : pathlib.Path
        The results, a line of JSON for each picture in the folder's order: ``file``, ``label``,
        ``probability``, ``index``, and ``truth`` (class index) if asked for; or ``file`` and
        ``error``.
    pictures, failed : int
        ``failed`` could not be classified, and say why.
    right : int or None
        Pictures whose label is that of their folder; None unless asked for.
    workers : int
        Processes (Ray) or threads that may work at once, at the end.
    resumed : int
        Pictures whose results an earlier run had left.
    start_seconds : float
        Until the first chunk could be handed out: listing the pictures, starting the workers.
    seconds : float
        Wall time of this run after that.
    busy_seconds : float
        Sum of the workers' wall time in chunks of this run.
    driver_seconds : float
        CPU time of the thread that hands out the work and stores the results, in `seconds`: the
        part that more workers don't make faster.
    """

    path: Path
    pictures: int
    failed: int
    right: int | None
    workers: int
    resumed: int
    start_seconds: float
    seconds: float
    busy_seconds: float
    driver_seconds: float

    @property
    def top1(self) -> float | None:
        """Share of right labels among the pictures that could be classified."""
        done = self.pictures - self.failed
        return None if self.right is None or not done else self.right / done

    @property
    def most_workers(self) -> float | None:
        """How many workers the driver can keep busy, from what a picture costs either.

        None if this run did nothing. Workers beyond it wait for the driver.
        """
        return self.busy_seconds / self.driver_seconds if self.busy_seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        more = {"top1": self.top1, "most_workers": self.most_workers}
        return {**asdict(self), "path": str(self.path), **more}

    def __str__(self) -> str:
        lines = [f"{self.pictures:,} pictures, {self.failed:,} failed -> {self.path}"]
        if self.top1 is not None:
            lines.append(f"top-1 {self.top1:.1%} ({self.right:,} right)")
        if self.resumed:
            lines.append(f"{self.resumed:,} were done by an earlier run")
        done = self.pictures - self.resumed
        if done and self.most_workers is not None:
            busy = self.busy_seconds / self.seconds / self.workers
            lines += [
                f"{done / self.seconds:,.0f} pictures/s: {self.workers} workers, busy {busy:.0%} "
                f"of {self.seconds:.1f} s, after a start of {self.start_seconds:.1f} s",
                f"a picture takes a worker {self.busy_seconds / done * 1e3:.2f} ms and the driver "
                f"{self.driver_seconds / done * 1e3:.3f} ms: one driver can keep about "
                f"{self.most_workers:,.0f} workers busy",
            ]
        return "\n".join(lines)


Files = tuple[tuple[str, int], ...]
"""Relative to the folder, with their class index or -1."""
Chunk = tuple[int, Files]
Lines = tuple[list[dict[str, Any]], float]
"""What came of a chunk, and how many seconds that took."""
Done = tuple[int, list[dict[str, Any]], float]
T = TypeVar("T")


def classify_folder(
    folder: str | Path,
    output: str | Path,
    model: str | Path | Model = "signs",
    *,
    truth: bool = False,
    synsets: Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Batch:
    """Classify every picture of a folder, and keep the results as they come.

    Parameters
    ----------
    folder : str or pathlib.Path
        Pictures, or folders of them; see `edgelab.datasets.ImageFolder`.
    output : str or pathlib.Path
        A folder of its own for the results. If it holds those of an interrupted run of the same
        job (pictures, model, chunks), only the rest is done.
    model : str, pathlib.Path or edgelab.models.Model
        See `edgelab.Pipeline`.
    truth : bool
        Also compare with the classes that the folders' names say; others are left out then.
    synsets : pathlib.Path, optional
        ImageNet's list of classes, for folders named by WordNet ids; see
        `edgelab.datasets.class_names`.
    workers : int, optional
        Threads; the default is the number of cores. A Ray cluster uses all of its CPUs.
    ray : str, optional
        Address of a Ray cluster: ``"local"`` starts one on this machine, ``"auto"`` finds a
        running one, or ``"host:6379"``. Needs ``pip install 'edgelab[ray]'`` on each node, and
        the folder under the same path.
    chunk : int
        Pictures in a chunk.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    Batch
        On the same kind of CPU, results are the same to the byte, whoever computed them.

    Raises
    ------
    BatchError
        If `output` holds another job's results, or a node can't see the folder.
    EdgelabError
        If there is no picture, or the model can't be loaded. A picture that can't be classified is
        a line with an error instead.
    """
    if chunk < 1:
        raise ValueError(f"need chunk >= 1, got {chunk}")
    if ray is not None and workers is not None:
        raise BatchError("a Ray cluster uses all of its CPUs: give workers or ray, not both")
    begin = time.perf_counter()
    model = model if isinstance(model, Model) else load(model)
    names = class_names(model.spec, synsets) if truth else None
    found = ImageFolder(folder, names)
    root = found.folder.resolve()
    files = [
        (path.relative_to(root).as_posix(), label)
        for path, label in zip(found.paths, found.labels, strict=True)
    ]
    chunks = [
        (number, tuple(files[start : start + chunk]))
        for number, start in enumerate(range(0, len(files), chunk))
    ]
    store = _Store(Path(output))
    with locked(store.folder / "lock"):
        store.claim(_job(root, files, model, chunk))
        rest = [one for one in chunks if not store.has(one[0])]
        resumed = len(files) - sum(len(names) for _, names in rest)
        cluster = _Cluster(model, root, ray) if ray is not None else _Threads(model, root, workers)
        busy = 0.0
        ready, driver = time.perf_counter(), time.thread_time()
        try:
            for number, lines, seconds in _bar(cluster.run(rest), rest, progress):
                store.put(number, lines)
                busy += seconds
            workers_left = cluster.workers  # Ray's can't be asked when it is closed
        finally:
            cluster.close()
        failed, right = store.finish(len(chunks))
    return Batch(
        path=store.results,
        pictures=len(files),
        failed=failed,
        right=right if truth else None,
        workers=workers_left,
        resumed=resumed,
        start_seconds=ready - begin,
        seconds=time.perf_counter() - ready,
        busy_seconds=busy,
        driver_seconds=time.thread_time() - driver,
    )


def _job(root: Path, files: Sequence[tuple[str, int]], model: Model, chunk: int) -> dict[str, Any]:
    """What makes two runs the same job. A picture that changed since makes it another one."""
    digest = hashlib.sha256()
    for name, label in files:
        size = (root / name).stat().st_size
        digest.update(f"{name}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return {
        "pictures": len(files),
        "pictures_sha256": digest.hexdigest(),
        "model_sha256": model.sha256,
        "spec": _spec_sha256(model),
        "chunk": chunk,
    }


def _spec_sha256(model: Model) -> str:
    """How the model is fed and what its classes are called: the file alone does not say it."""
    return hashlib.sha256(repr(model.spec).encode()).hexdigest()


def _bar(done: Iterable[Any], rest: Sequence[Chunk], progress: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=sum(len(c[1]) for c in rest), unit=" pictures", disable=not progress) as bar:
        for number, lines, seconds in done:
            bar.update(len(lines))
            yield number, lines, seconds


class _Store:
    """Results on disk: a file for each chunk that is done, then one for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BatchError(f"can't make the folder {folder}: {error.strerror}") from None

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.jsonl"

    def claim(self, job: Mapping[str, Any]) -> None:
        """Begin a job, or go on with the same one."""
        path = self.folder / "job.json"
        try:
            known = json.loads(path.read_bytes()[:10_000])
        except FileNotFoundError:
            if others := sorted(p.name for p in self.folder.iterdir() if p.name != "lock"):
                raise BatchError(
                    f"{self.folder} is no folder of results (it holds {others[0]!r:.80}). "
                    "Give a new one"
                ) from None
            write_atomic(path, json.dumps(job, indent=2).encode())
            return
        except (OSError, ValueError, RecursionError):
            known = None
        if known != job:
            differ = (
                ", ".join(k for k in job if known.get(k) != job[k])
                if isinstance(known, dict)
                else "its job.json can't be read"
            )
            raise BatchError(
                f"{self.folder} holds the results of another job ({differ}). Give another folder, "
                "or remove this one"
            )

    def has(self, number: int) -> bool:
        return self.results.exists() or self._part(number).exists()

    def put(self, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
        write_atomic(self._part(number), text.encode())

    def finish(self, parts: int) -> tuple[int, int]:
        """Make one file of all parts; return how many pictures failed and were right."""
        if not self.results.exists():
            whole = self.folder / ".results.jsonl"
            with open(whole, "wb") as file:
                for number in range(parts):
                    file.write(self._part(number).read_bytes())
                file.flush()
                os.fsync(file.fileno())  # the parts are removed next
            os.replace(whole, self.results)
        for number in range(parts):
            self._part(number).unlink(missing_ok=True)
        failed = right = 0
        with open(self.results, encoding="ascii") as text:
            for line in map(json.loads, text):
                failed += "error" in line
                right += line.get("index", -2) == line.get("truth", -1)
        return failed, right


def _in_flight(
    chunks: Sequence[Chunk],
    submit: Callable[[Files], T],
    some: Callable[[Iterable[T]], Iterable[tuple[T, Lines]]],
    room: Callable[[], int],
) -> Iterator[Done]:
    """Keep as many chunks with the workers as there is room for; yield each when it is done."""
    waiting = deque(chunks)
    running: dict[T, int] = {}
    while waiting or running:
        while waiting and len(running) < room():
            number, files = waiting.popleft()
            running[submit(files)] = number
        for call, (lines, seconds) in some(running):
            yield running.pop(call), lines, seconds


def _classify(pipeline: Pipeline, root: Path, files: Files) -> Lines:
    """Classify a chunk; return its lines, and how long it took in seconds."""
    begin = time.perf_counter()
    if not root.is_dir():
        raise BatchError(f"{platform.node()} has no folder {root}: every node must see it")
    lines = []
    for name, truth in files:
        line: dict[str, Any] = {"file": name}
        if truth >= 0:
            line["truth"] = truth
        try:
            if pipeline.stopped:
                pipeline = pipeline.replica()
            best = pipeline.classify(root / name, 1).top[0]
            line |= {"label": best.label, "probability": best.probability, "index": best.index}
        except EdgelabError as error:
            line["error"] = one_line(error)
        lines.append(line)
    return lines, time.perf_counter() - begin


class _Threads:
    """Chunks on this machine's cores."""

    def __init__(self, model: Model, root: Path, workers: int | None) -> None:
        self._pipeline, self._root = Pipeline(model, threads=1), root
        self._pool = Workers(available_cores() if workers is None else workers, queue=0)
        self.workers = self._pool.workers

    def run(self, chunks: Sequence[Chunk]) -> Iterator[Done]:
        def submit(files: Files) -> Future[Lines]:
            work = partial(_classify, root=self._root, files=files)
            return self._pool.submit(self._pipeline, work, wait_s=None)

        def some(running: Iterable[Future[Lines]]) -> Iterator[tuple[Future[Lines], Lines]]:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield future, future.result()

        return _in_flight(chunks, submit, some, lambda: self.workers)

    def close(self) -> None:
        self._pool.close()


_PIPELINES: dict[str, Pipeline] = {}


def _task(model: Sequence[Any], key: str, root: str, files: Files) -> Lines:
    """What runs in a Ray worker. It fetches the model once, and keeps the pipeline."""
    ray: Any = importlib.import_module("ray")
    if key not in _PIPELINES:
        _PIPELINES.clear()
        _PIPELINES[key] = Pipeline(ray.get(model[0]), threads=1)
    return _classify(_PIPELINES[key], Path(root), files)


def _require_answer(address: str) -> None:
    """Raise OSError if nobody listens there. Ray would try for minutes, then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and host and port.isdecimal() and int(port) < 65536:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


@contextlib.contextmanager
def fatal_signal_handlers_kept() -> Iterator[None]:
    """Put the handlers of SIGILL, SIGSEGV and the like back that were there before.

    wasmtime turns these signals into errors when a guest traps. `ray.init` puts handlers of its
    own in their place, and `ray.shutdown` none; both end the process at the next trap.
    """
    names = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGTRAP")
    numbers = [int(getattr(signal, name)) for name in names if hasattr(signal, name)]
    if sys.platform == "win32":  # wasmtime does without signals there
        yield
        return
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    # What is in a struct sigaction is the C library's affair; none has more than 256 bytes.
    before = {number: ctypes.create_string_buffer(256) for number in numbers}
    for number, action in before.items():
        sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in before.items():
            sigaction(number, action, None)


class _Cluster:
    """Chunks on a Ray cluster, as tasks: Ray runs one again elsewhere when its worker dies."""

    def __init__(self, model: Model, root: Path, address: str) -> None:
        try:
            ray: Any = importlib.import_module("ray")  # its types fit no caller
        except ImportError:
            raise BatchError("this needs Ray: pip install 'edgelab[ray]'") from None
        self._ray, self._root = ray, str(root)
        self._key = f"{model.sha256} {_spec_sha256(model)}"
        self._owned = not ray.is_initialized()
        if self._owned:
            # A node waits 30 s for its helper processes, which a busy machine may need.
            mine = {
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "_system_config": {"agent_register_timeout_ms": 120_000},
            }
            try:
                _require_answer(address)
                with fatal_signal_handlers_kept():
                    ray.init(address, log_to_driver=False, **(mine if address == "local" else {}))
            except Exception as error:  # Ray raises bare ones too
                raise BatchError(
                    f"can't reach a Ray cluster at {address!r:.100}: {one_line(error)}. "
                    "Start one with: ray start --head"
                ) from None
        self._model = ray.put(model)
        # -1: as often as it takes. An error that Python raised is no reason to try again.
        self._task = ray.remote(num_cpus=1, max_retries=-1)(_task)

    @property
    def workers(self) -> int:
        """CPUs of the nodes that are alive now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def run(self, chunks: Sequence[Chunk]) -> Iterator[Done]:
        def submit(files: Files) -> Any:
            return self._task.remote([self._model], self._key, self._root, files)

        def some(running: Iterable[Any]) -> Iterator[tuple[Any, Lines]]:
            done, _ = self._ray.wait(list(running))
            try:
                for call in done:
                    yield call, self._ray.get(call)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, EdgelabError) else error
                raise BatchError(f"a node failed: {one_line(cause)}") from None

        # Two for each CPU: the next one is there when one is done. Nodes may come and go.
        return _in_flight(chunks, submit, some, lambda: 2 * self.workers)

    def close(self) -> None:
        if self._owned:
            with fatal_signal_handlers_kept():
                self._ray.shutdown()
