"""Many images at once: the answers of one pipeline, bounded, and no failure that spreads."""

import contextlib
import doctest
import gc
import io
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgelab import pool as module
from edgelab.datasets import Signs
from edgelab.errors import BusyError, EdgelabError, GuestError, ImageError, LimitError
from edgelab.pipeline import Classification, Pipeline
from edgelab.pool import Pool
from edgelab.runtime import Limits

COUNT = 24
FULL = bool(os.environ.get("EDGELAB_FULL"))


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    return [sample.image for sample in Signs("test", COUNT)]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline("signs", threads=1)


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline, images: list[NDArray[np.uint8]]) -> list[tuple[Any, ...]]:
    return [pipeline.replica().classify(image).top for image in images]


@pytest.fixture
def pool(pipeline: Pipeline) -> Iterator[Pool]:
    with Pool(pipeline, workers=3, queue=2) as pool:
        yield pool


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_gives_what_one_pipeline_gives(
    pool: Pool, images: list[Any], expected: list[Any], ordered: bool
) -> None:
    items = list(pool.stream(iter(images), ordered=ordered))
    if ordered:
        assert [item.index for item in items] == list(range(COUNT))
    assert sorted(item.index for item in items) == list(range(COUNT))
    for item in items:
        assert item.result().top == expected[item.index]


def test_several_instances_work_and_share_one_session(pipeline: Pipeline, images: Any) -> None:
    with Pool(pipeline, workers=3) as pool:
        meet = threading.Barrier(3, timeout=30)
        used: set[int] = set()
        sessions: set[int] = set()

        class Rendezvous(Pipeline):  # so that no thread can take two of the three images
            def classify(self, image: Any, top: int = 3) -> Classification:
                meet.wait()
                used.add(id(self.classifier.instance))
                sessions.add(id(self.nn.graph("signs")))
                return super().classify(image, top)

        first = pool.pipeline.replica()
        first.__class__ = Rendezvous
        pool.pipeline = first
        assert len(list(pool.stream(images[:3]))) == 3
    assert len(used) == 3
    assert len(sessions) == 1


def test_a_failing_item_does_not_stop_the_others(
    pool: Pool, images: list[Any], expected: list[Any]
) -> None:
    mixed = [images[0], b"no image", images[1], "/no/such/file.jpg", images[2]]
    items = list(pool.stream(mixed))
    assert [item.error is None for item in items] == [True, False, True, False, True]
    assert [items[k].result().top for k in (0, 2, 4)] == expected[:3]
    assert isinstance(items[1].error, ImageError)
    with pytest.raises(ImageError):
        items[3].result()


def test_a_thread_whose_instance_hit_a_limit_gets_a_new_one(pipeline: Pipeline) -> None:
    sample = Signs("test", 1)[0]
    huge = np.zeros((6000, 6000, 3), np.uint8)
    with Pool(pipeline, workers=1, limits=Limits(seconds=0.05)) as pool:
        items = list(pool.stream([sample.image, huge, sample.image]))
        assert isinstance(items[1].error, (LimitError, GuestError))
        assert items[0].result().top == items[2].result().top


def test_a_pipelines_own_limits_hold_for_its_replicas() -> None:
    limits = Limits(seconds=7, memory_bytes=64 << 20)
    limited = Pipeline("signs", threads=1, limits=limits)
    assert limited.replica().classifier.instance.limits == limits
    other = Limits(seconds=3)
    assert limited.replica(limits=other).classifier.instance.limits == other


def test_back_pressure_takes_no_more_than_it_may(pool: Pool, images: list[Any]) -> None:
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for image in itertools.cycle(images):  # endless
            taken += 1
            yield image

    stream = pool.stream(source())
    for k in range(10):
        next(stream)
        time.sleep(0.02)  # a slow reader
        assert taken <= k + 1 + pool.workers + pool.queue
    stream.close()  # type: ignore[attr-defined]
    before = taken
    time.sleep(0.1)
    assert taken == before


def test_a_full_queue_says_so_and_frees_its_places(pool: Pool, images: list[Any]) -> None:
    release = threading.Event()

    class Slow(Pipeline):
        def classify(self, image: Any, top: int = 3) -> Classification:
            release.wait(30)
            return super().classify(image, top)

    slow = pool.pipeline.replica()
    slow.__class__ = Slow
    pool.pipeline = slow
    futures: list[Future[Classification]] = [pool.submit(images[0]) for _ in range(5)]
    with pytest.raises(BusyError, match="all 3 workers are busy and 2 images wait"):
        pool.submit(images[0])
    with pytest.raises(BusyError):
        pool.submit(images[0], wait_s=0.05)
    assert futures[-1].cancel()
    extra = pool.submit(images[0])  # the cancelled one's place
    release.set()
    assert len({future.result(30).label for future in (*futures[:-1], extra)}) == 1
    assert pool.submit(images[0], wait_s=None).result(30).label


def test_whoever_waits_for_ever_gets_a_place(pipeline: Pipeline, images: list[Any]) -> None:
    release = threading.Event()

    class Slow(Pipeline):
        def classify(self, image: Any, top: int = 3) -> Classification:
            release.wait(30)
            return super().classify(image, top)

    slow = pipeline.replica()
    slow.__class__ = Slow
    with Pool(slow, workers=1, queue=0) as pool:
        first = pool.submit(images[0])
        later: list[Future[Classification]] = []
        thread = threading.Thread(
            target=lambda: later.append(pool.submit(images[1], wait_s=None)), daemon=True
        )
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()  # it neither gave up nor pushed in
        release.set()
        thread.join(30)
        assert first.result(30).label
        assert later[0].result(30).label


def test_leaving_the_loop_cancels_what_waits(pipeline: Pipeline, images: list[Any]) -> None:
    done = []

    class Counted(Pipeline):
        def classify(self, image: Any, top: int = 3) -> Classification:
            done.append(1)
            return super().classify(image, top)

    counted = pipeline.replica()
    counted.__class__ = Counted
    with Pool(counted, workers=1, queue=50) as pool:
        with contextlib.closing(pool.stream(images)) as stream:  # type: ignore[type-var]
            next(stream)
        assert len(done) < COUNT
        assert pool.submit(images[0]).result(30).label  # and goes on


def test_a_broken_source_ends_the_stream_after_what_it_gave(pool: Pool, images: list[Any]) -> None:
    def source() -> Iterator[Any]:
        yield images[0]
        raise OSError("the camera was unplugged")

    stream = pool.stream(source())
    assert next(stream).error is None
    with pytest.raises(OSError, match="unplugged"):
        next(stream)
    assert pool.submit(images[0]).result(30).label


def test_a_closed_pool_refuses(pipeline: Pipeline, images: list[Any]) -> None:
    pool = Pool(pipeline, workers=1)
    pool.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(images[0])
    with pytest.raises(ValueError, match="workers >= 1"):
        Pool(pipeline, workers=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own(pool: Pool, images: list[Any]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                pool.submit(images[0])
            except EdgelabError as error:
                code = 0 if "make a new pool" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.timeout(3600 if FULL else 300)
def test_the_memory_of_a_long_stream_is_flat(pipeline: Pipeline, images: list[Any]) -> None:
    """10^5 images with EDGELAB_FULL=1, cycled."""
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG")
        encoded.append(file.getvalue())
    total = 100_000 if FULL else 600
    process, seen = psutil.Process(), []
    with Pool(pipeline, workers=2) as pool:
        for item in pool.stream(itertools.islice(itertools.cycle(encoded), total)):
            assert item.error is None
            if item.index % (total // 6) == 0:
                gc.collect()
                seen.append(process.memory_info().rss)
    print(f"RSS over {total} images: {[round(rss / 1e6, 1) for rss in seen]} MB")
    assert seen[-1] - seen[1] < 8e6


def test_the_example_in_the_documentation_holds() -> None:
    example = doctest.DocTestFinder().find(Pool, "Pool", module)[0]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
