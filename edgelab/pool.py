"""Many images at once: pipelines on threads behind a bounded queue."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelab.aot import available_cores
from edgelab.errors import BusyError, EdgelabError
from edgelab.models import Model
from edgelab.pipeline import Classification, Pipeline
from edgelab.runtime import Limits

T = TypeVar("T")
Image: TypeAlias = bytes | str | Path | NDArray[np.uint8]
"""What `Pipeline.classify` takes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a stream and what became of it.

    Attributes
    ----------
    index : int
        Its place among the images, from 0.
    classification : Classification or None
        The answer; None if it failed.
    error : Exception or None
        Why it failed: an `EdgelabError` for a bad image or a guest that hit its limits.
    """

    index: int
    classification: Classification | None
    error: Exception | None

    def result(self) -> Classification:
        """Return the answer, or raise the error."""
        if self.error is not None:
            raise self.error
        assert self.classification is not None
        return self.classification


class Workers:
    """Threads with a bounded queue that run pipelines, each thread its own replica of them.

    Parameters
    ----------
    workers : int, optional
        Threads; the default is the number of cores that this process may use.
    queue : int, optional
        How many calls may wait for a thread, beside those being worked on; default ``workers``.
    limits : edgelab.runtime.Limits, optional
        What each replica's guest may use.

    Raises
    ------
    ValueError
        If `workers` is not positive or `queue` is negative.
    """

    def __init__(
        self, workers: int | None = None, queue: int | None = None, *, limits: Limits | None = None
    ) -> None:
        self.workers = available_cores() if workers is None else workers
        self.queue = self.workers if queue is None else queue
        if self.workers < 1 or self.queue < 0:
            raise ValueError(f"need workers >= 1 and queue >= 0, got {workers} and {queue}")
        self._limits = limits
        self._places = threading.BoundedSemaphore(self.workers + self.queue)
        self._local = threading.local()
        self._pid = os.getpid()
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="edgelab-worker")

    def submit(
        self,
        pipeline: Pipeline,
        function: Callable[[Pipeline], T],
        *,
        wait_s: float | None = 0.0,
    ) -> Future[T]:
        """Queue ``function(replica of pipeline)``.

        Parameters
        ----------
        pipeline : Pipeline
            Each thread makes a replica on first use, again when a limit stopped it, and drops it
            when nobody holds `pipeline` any more.
        function : callable
        wait_s : float or None
            How long to wait for a free place, in seconds; None waits as long as it takes.

        Returns
        -------
        concurrent.futures.Future
            ``cancel()`` works until a thread has begun; after that, the guest's limits end it.

        Raises
        ------
        BusyError
            If no place became free in time.
        """
        if os.getpid() != self._pid:
            raise EdgelabError("these threads don't exist in a forked process: make a new pool")
        if not self._places.acquire(timeout=wait_s):
            raise BusyError(
                f"all {self.workers} workers are busy and {self.queue} images wait: try again "
                "later, pass wait_s=, or make the pool larger (workers=, queue=)"
            )
        try:
            future = self._executor.submit(self._run, pipeline, function)
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(lambda _: self._places.release())
        return future

    def _run(self, pipeline: Pipeline, function: Callable[[Pipeline], T]) -> T:
        replicas: weakref.WeakKeyDictionary[Pipeline, Pipeline]
        if not hasattr(self._local, "replicas"):
            self._local.replicas = weakref.WeakKeyDictionary()
        replicas = self._local.replicas
        replica = replicas.get(pipeline)
        if replica is None or replica.stopped:
            replica = replicas[pipeline] = pipeline.replica(limits=self._limits)
        return function(replica)

    def close(self) -> None:
        """Refuse new calls, take back those that wait, and let those being worked on end."""
        self._executor.shutdown(cancel_futures=True)


class Pool:
    """Classify images on several threads, each with a guest instance of its own.

    All instances share one model session and one compiled guest. A thread whose instance was
    stopped by a limit gets a new one, so that a bad image costs only its own answer.

    Parameters
    ----------
    model : str, pathlib.Path, edgelab.models.Model or Pipeline
        What `Pipeline` takes, or a pipeline whose model and guest to share.
    workers : int, optional
        Threads; the default is the number of cores that this process may use.
    queue : int, optional
        How many images may wait for a thread, beside those being worked on; default ``workers``.
    threads : int
        Threads of the backend for one image. More images at a time beat more threads an image.
    kernel : {"simd128", "relaxed_simd", "scalar"}
    limits : edgelab.runtime.Limits, optional

    Raises
    ------
    ValueError
        If `workers` is not positive or `queue` is negative.
    EdgelabError
        As `Pipeline`.

    Examples
    --------
    >>> from edgelab.datasets import Signs
    >>> with Pool("signs", workers=2) as pool:
    ...     images = (sample.image for sample in Signs("test", 3))
    ...     print([item.result().label for item in pool.stream(images)])
    ['speed limit 20', 'speed limit 30', 'speed limit 40']
    """

    def __init__(
        self,
        model: str | Path | Model | Pipeline = "signs",
        *,
        workers: int | None = None,
        queue: int | None = None,
        threads: int = 1,
        kernel: str = "simd128",
        limits: Limits | None = None,
    ) -> None:
        self._workers = Workers(workers, queue, limits=limits)
        self.workers, self.queue = self._workers.workers, self._workers.queue
        if isinstance(model, Pipeline):
            self.pipeline = model
        else:
            self.pipeline = Pipeline(model, threads=threads, kernel=kernel, limits=limits)

    def submit(
        self, image: Image, top: int = 3, *, wait_s: float | None = 0.0
    ) -> Future[Classification]:
        """Queue one image.

        Parameters
        ----------
        image : bytes, str, pathlib.Path or numpy.ndarray
            See `Pipeline.classify`.
        top : int
        wait_s : float or None
            How long to wait for a free place, in seconds; None waits as long as it takes.

        Returns
        -------
        concurrent.futures.Future of Classification
            ``cancel()`` works until a thread has begun; after that, the guest's limits end it.

        Raises
        ------
        BusyError
            If no place became free in time.
        """
        return self._workers.submit(
            self.pipeline, lambda pipeline: pipeline.classify(image, top), wait_s=wait_s
        )

    def stream(
        self, images: Iterable[Image], top: int = 3, *, ordered: bool = True
    ) -> Iterator[Item]:
        """Classify images as they come, and yield one `Item` for each.

        At most ``workers + queue`` images are taken from `images` ahead of what was yielded, so an
        endless source is fine and a slow reader slows the source down.

        Parameters
        ----------
        images : iterable
            See `Pipeline.classify`. What it raises ends the stream, after the images before it.
        top : int
        ordered : bool
            Whether items come in the images' order, or as soon as each is ready.

        Notes
        -----
        A bad image is an item with an error. To cancel, close the iterator or leave the loop and
        drop it: what waits is taken back, what runs ends within its limits.
        """
        source, index, failure = iter(images), 0, None
        pending: dict[Future[Classification], int] = {}  # in the order of submission
        try:
            while True:
                while failure is None and len(pending) < self.workers + self.queue:
                    try:
                        image = next(source)
                    except Exception as error:  # StopIteration, or the source broke
                        failure = error
                        break
                    pending[self.submit(image, top, wait_s=None)] = index
                    index += 1
                if not pending:
                    break
                first = next(iter(pending))
                if ordered:
                    wait((first,))
                else:
                    done = wait(pending, return_when=FIRST_COMPLETED).done
                    first = min(done, key=pending.__getitem__)
                yield _item(pending.pop(first), first)
            if failure is not None and not isinstance(failure, StopIteration):
                raise failure
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def close(self) -> None:
        """Refuse new images, take back those that wait, and let those being worked on end."""
        self._workers.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pool({self.pipeline!r}, workers={self.workers}, queue={self.queue})"


def _item(index: int, future: Future[Classification]) -> Item:
    error = future.exception()
    if error is None:
        return Item(index, future.result(), None)
    if not isinstance(error, Exception):
        raise error
    return Item(index, None, error)
