"""Models come when wanted and go when they take too much memory."""

import ctypes
import doctest
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from edgelab import models, repository
from edgelab.datasets import Signs
from edgelab.errors import ModelError
from edgelab.pipeline import Pipeline
from edgelab.repository import Repository
from edgelab.wasinn import WasiNN, host

SIZE = 9_027_784
IMAGE = Signs("test", 10)[9].image


@pytest.fixture
def three() -> Repository:
    return Repository(dict.fromkeys("abc", "signs"), max_bytes=2 * SIZE, threads=1)


def test_models_load_on_first_use_and_stay(three: Repository) -> None:
    assert three.loaded == {}
    assert "a" in three
    assert three.loaded == {}  # a question does not load
    assert three["a"].classify(IMAGE).label == "stop"
    assert three["a"] is three["a"]
    assert three.loaded == {"a": SIZE}
    assert list(three) == ["a", "b", "c"]
    assert len(three) == 3


def test_the_least_recently_used_model_goes(three: Repository) -> None:
    first = weakref.ref(three["a"].nn)
    three["b"]
    three["a"]
    assert set(three.loaded) == {"a", "b"}  # to look is not to use: b is still the older one
    three["c"]
    assert set(three.loaded) == {"a", "c"}
    three["b"]
    assert set(three.loaded) == {"c", "b"}  # now a was
    gc.collect()
    assert first() is None  # its session went with it


def test_a_model_that_is_ready_is_used_and_never_loaded(three: Repository) -> None:
    assert three.ready("a") is None
    assert three.loaded == {}
    held = three["a"]
    three["b"]
    assert three.ready("a") is held
    three["c"]
    assert set(three.loaded) == {"a", "c"}  # so a was the younger one


def test_whoever_holds_an_unloaded_pipeline_goes_on(three: Repository) -> None:
    held = three["a"]
    assert three.unload("a")
    assert not three.unload("a")
    assert three.loaded == {}
    assert held.classify(IMAGE).label == "stop"
    assert three["a"] is not held


def test_an_unloaded_model_gives_its_memory_back() -> None:
    """Shown, not only promised: RSS with and without the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this C library has no malloc_trim, so what RSS says is up to its allocator")

    def rss() -> int:
        gc.collect()
        trim(0)
        return int(psutil.Process().memory_info().rss)

    store = Repository({"signs": "signs"}, threads=1)
    store["signs"].classify(IMAGE)
    store.unload("signs")
    without = rss()
    store["signs"].classify(IMAGE)
    loaded = rss()
    store.unload("signs")
    after = rss()
    print(
        f"RSS {without / 1e6:.1f} MB, loaded {loaded / 1e6:.1f} MB, unloaded {after / 1e6:.1f} MB"
    )
    assert loaded - without > SIZE
    assert after - without < (loaded - without) / 4


def test_whoever_watches_the_time_limit_holds_no_model() -> None:
    """It looks at what runs, every 20 ms; what it saw last must not stay loaded for that."""
    context = WasiNN({"signs": models.load("signs").data}, threads=1).graph("signs").context()
    running = weakref.ref(context)
    host._watch.begin(context, time.monotonic() + 60)
    time.sleep(0.2)  # a long computation
    host._watch.end(context)
    del context
    limit = time.monotonic() + 10
    while running() is not None and time.monotonic() < limit:
        time.sleep(0.01)
    assert running() is None


def test_two_threads_that_want_a_model_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pipeline] = []
    together = threading.Barrier(4, timeout=30)

    class Counted(Pipeline):
        def __init__(self, *arguments: object, **options: object) -> None:
            made.append(self)
            super().__init__(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(repository, "Pipeline", Counted)
    store = Repository({"signs": "signs"}, threads=1)

    def want(_: int) -> Pipeline:
        together.wait()
        return store["signs"]

    with ThreadPoolExecutor(4) as executor:
        got = list(executor.map(want, range(4)))
    assert len(made) == 1
    assert all(pipeline is made[0] for pipeline in got)


def test_what_does_not_fit_or_does_not_exist_is_refused(three: Repository) -> None:
    small = Repository({"signs": models.load("signs")}, max_bytes=SIZE - 1)
    with pytest.raises(ModelError, match=r"9,027,784 bytes.*raise max_bytes"):
        small["signs"]
    assert small.loaded == {}
    with pytest.raises(KeyError):
        three["d"]
    with pytest.raises(KeyError):
        three.unload("d")
    with pytest.raises(ModelError):
        Repository({"none": "/no/such/file.onnx"})["none"]


def test_the_example_in_the_documentation_holds() -> None:
    example = doctest.DocTestFinder().find(Repository, "Repository", repository)[0]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
