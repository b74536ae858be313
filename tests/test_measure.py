"""Timing with a clock of our own, and statistics against NumPy."""

import dataclasses
import json
import platform
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from edgelab import measure
from edgelab.measure import Summary, fingerprint, interleaved, ratio


class Clock:
    """A clock that only our functions move, and a log of their calls."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.calls: list[str] = []

    def job(self, name: str, *durations_ms: float) -> Callable[[], None]:
        """Return a function that takes one duration after the other, then the last again."""
        left = list(durations_ms)

        def run() -> None:
            self.calls.append(name)
            self.now_s += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    return clock


def test_each_round_calls_every_function_once(clock: Clock) -> None:
    rows = {name: clock.job(name, 1.0) for name in "abc"}
    samples = interleaved(rows, repeats=20, warmup=2)
    assert list(samples) == ["a", "b", "c"]
    assert [len(row) for row in samples.values()] == [20, 20, 20]
    rounds = [clock.calls[k : k + 3] for k in range(0, len(clock.calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)


def test_durations_are_milliseconds_of_the_function_alone_and_paired_by_round(
    clock: Clock,
) -> None:
    rows = {"a": clock.job("a", *range(1, 9)), "b": clock.job("b", *range(10, 90, 10))}
    samples = interleaved(rows, repeats=8, warmup=0)
    np.testing.assert_allclose(samples["a"], range(1, 9))
    np.testing.assert_allclose(samples["b"], range(10, 90, 10))


def test_warmup_rounds_run_and_do_not_count(clock: Clock) -> None:
    samples = interleaved({"a": clock.job("a", 500, 500, 7)}, repeats=4, warmup=2)
    np.testing.assert_allclose(samples["a"], [7] * 4)
    assert len(clock.calls) == 6


def test_the_order_is_random_and_repeats_with_the_seed(clock: Clock) -> None:
    def order(seed: int) -> list[str]:
        clock.calls.clear()
        interleaved({name: clock.job(name, 1) for name in "abcd"}, repeats=30, seed=seed)
        return list(clock.calls)

    first = order(1)
    assert order(1) == first
    assert order(2) != first
    starts = first[::4]
    assert set(starts) == set("abcd")  # nobody is always first


def test_an_error_in_a_row_reaches_the_caller(clock: Clock) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        interleaved({"a": clock.job("a", 1), "b": fail})


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (-1, 1), (1, -1)])
def test_rounds_that_make_no_sense_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="need repeats >= 1 and warmup >= 0"):
        interleaved({}, repeats=repeats, warmup=warmup)


def test_a_summary_is_numpys_median_and_percentile() -> None:
    samples = np.random.default_rng(0).lognormal(size=101).tolist()
    summary = Summary.of(samples)
    assert summary.median_ms == pytest.approx(sorted(samples)[50])
    assert summary.p95_ms == pytest.approx(sorted(samples)[95])
    assert summary.count == 101
    assert summary.to_dict() == dataclasses.asdict(summary)
    assert Summary.of([3.0]) == Summary(3.0, 3.0, 1)
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    baseline = [1.0, 10.0, 100.0, 1000.0, 10_000.0]  # drift that hits both rows alike
    samples = [2.0, 20.0, 200.0, 3000.0, 10_000.0]
    result = ratio(samples, baseline)
    assert result.median == 2
    assert 1 <= result.low <= 2 <= result.high <= 3
    assert str(ratio([4, 4], [2, 2])) == "2.00 [2.00, 2.00]"
    assert result.to_dict() == {"median": 2, "low": result.low, "high": result.high}
    assert ratio(samples, baseline) == result


def test_the_interval_holds_a_known_ratio_about_as_often_as_it_says() -> None:
    held, widths = 0, {20: [0.0], 200: [0.0]}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        for count in widths:
            drift = rng.lognormal(0, 0.5, count)
            samples = 1.5 * drift * rng.lognormal(0, 0.1, count)
            baseline = drift * rng.lognormal(0, 0.1, count)
            result = ratio(samples.tolist(), baseline.tolist())
            widths[count].append(result.high - result.low)
            held += result.low <= 1.5 <= result.high
    assert 0.9 <= held / 200 < 1
    assert np.mean(widths[200]) < np.mean(widths[20]) / 2


@pytest.mark.parametrize(("samples", "baseline"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_rows_that_are_no_pairs_are_refused(samples: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        ratio(samples, baseline)


def test_the_fingerprint_is_ready_for_json_and_names_what_counts() -> None:
    mark = fingerprint()
    data = json.loads(json.dumps(mark.to_dict()))
    assert set(data) == {"cpu", "cores", "features", "system", "python", "versions", "load"}
    assert data["cpu"]
    assert data["cores"] >= 1
    assert data["python"] == platform.python_version()
    assert set(data["versions"]) == {"edgelab", "wasmtime", "onnxruntime", "numpy", "pillow"}
    assert data["versions"]["numpy"] == np.__version__
    assert all(isinstance(feature, str) for feature in data["features"])
