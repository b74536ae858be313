"""Timing with a clock of our own, and statistics against NumPy."""

import dataclasses
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelab import measure
from edgelab.errors import EdgelabError
from edgelab.measure import (
    MIN_ROUNDS,
    Comparison,
    Ratio,
    Summary,
    Watch,
    cold_start,
    compare,
    duration,
    fingerprint,
    interleaved,
    ratio,
    timer,
)


class Clock:
    """A clock that only our functions move, and a log of their calls."""

    def __init__(self) -> None:
        self.now_ns = 10**11
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def job(self, name: str, *durations_ms: float) -> Callable[[], None]:
        """Return a function that takes one duration after the other, then the last again."""
        return self.endless(name, iter(durations_ms), durations_ms[-1])

    def endless(
        self, name: str, durations_ms: Iterator[float], last_ms: float = 0.0
    ) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now_ns += round(next(durations_ms, last_ms) * 1e6)

        return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_round_calls_every_function_once(clock: Clock) -> None:
    rows = {name: clock.job(name, 1.0) for name in "abc"}
    samples = interleaved(rows, repeats=20, warmup=2, clock=clock)
    assert list(samples) == ["a", "b", "c"]
    assert [len(row) for row in samples.values()] == [20, 20, 20]
    rounds = [clock.calls[k : k + 3] for k in range(0, len(clock.calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)


def test_durations_are_milliseconds_of_the_function_alone_and_paired_by_round(
    clock: Clock,
) -> None:
    rows = {"a": clock.job("a", *range(1, 9)), "b": clock.job("b", *range(10, 90, 10))}
    samples = interleaved(rows, repeats=8, warmup=0, clock=clock)
    np.testing.assert_allclose(samples["a"], range(1, 9))
    np.testing.assert_allclose(samples["b"], range(10, 90, 10))


def test_warmup_rounds_run_and_do_not_count(clock: Clock) -> None:
    rows = {"a": clock.job("a", 500, 500, 7)}
    samples = interleaved(rows, repeats=4, warmup=2, clock=clock)
    np.testing.assert_allclose(samples["a"], [7] * 4)
    assert len(clock.calls) == 6


def test_the_order_is_random_and_repeats_with_the_seed(clock: Clock) -> None:
    def order(seed: int) -> list[str]:
        clock.calls.clear()
        rows = {name: clock.job(name, 1) for name in "abcd"}
        interleaved(rows, repeats=30, seed=seed, clock=clock)
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
        interleaved({"a": clock.job("a", 1), "b": fail}, clock=clock)


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
    assert result.to_dict() == {
        "median": 2, "low": result.low, "high": result.high, "count": 5, "verdict": "no winner"
    }  # fmt: skip
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
    assert 0.9 <= held / 200 < 1  # the binomial's 1 % points around 95 % are 0.91 and 0.985
    assert np.mean(widths[200]) < np.mean(widths[20]) / 2


@pytest.mark.parametrize(("samples", "baseline"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_rows_that_are_no_pairs_are_refused(samples: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        ratio(samples, baseline)


def test_a_sample_of_nothing_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="too short for the timer"):
        ratio([1.0, 1.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("low", "high", "count", "verdict"),
    [
        (0.8, 0.9, 30, "faster"),
        (1.1, 1.2, 30, "slower"),
        (0.9, 1.1, 30, "no winner"),
        (0.9, 1.0, 30, "no winner"),  # the ends belong to the interval
        (1.0, 1.1, 30, "no winner"),
        (0.8, 0.9, MIN_ROUNDS, "faster"),
        (0.8, 0.9, MIN_ROUNDS - 1, "no winner"),
    ],
)
def test_no_winner_is_called_where_the_interval_holds_1(
    low: float, high: float, count: int, verdict: str
) -> None:
    paired = Ratio((low + high) / 2, low, high, count)
    assert paired.verdict == verdict
    assert paired.to_dict()["verdict"] == verdict


@pytest.mark.parametrize(
    ("ms", "text"),
    [(1234.5, "1.23 s "), (12.345, "12.3 ms"), (1, "1.00 ms"), (0.123456, "123 µs"),
     (4.5e-5, "45.0 ns"), (1.2e-7, "0.120 ns"), (123_456_789, "123,457 s ")],
)  # fmt: skip
def test_durations_are_written_in_the_unit_that_fits(ms: float, text: str) -> None:
    assert duration(ms) == text


def noisy(clock: Clock, name: str, median_ms: float, seed: int) -> Callable[[], None]:
    """A function whose durations are lognormal, so skewed as real ones are."""
    draws = np.random.default_rng(seed).lognormal(np.log(median_ms), 0.1, 100_000)
    return clock.endless(name, iter(draws.tolist()))


def simulated(clock: Clock, *, factor: float, seed: int, repeats: int = 30) -> Comparison:
    rows = {"a": noisy(clock, "a", 6.0, seed), "b": noisy(clock, "b", factor * 6.0, 1000 + seed)}
    return compare(rows, baseline="a", repeats=repeats, seed=seed, clock=clock)


def test_compare_finds_a_known_ratio_and_says_who_wins(clock: Clock) -> None:
    rows = {"a": clock.job("a", 10.0), "b": clock.job("b", 5.0), "c": clock.job("c", 15.0)}
    result = compare(rows, baseline="a", repeats=10, clock=clock)
    assert result.ratios == {
        "a": Ratio(1, 1, 1, 10), "b": Ratio(0.5, 0.5, 0.5, 10), "c": Ratio(1.5, 1.5, 1.5, 10)
    }  # fmt: skip
    assert [each.verdict for each in result.ratios.values()] == ["no winner", "faster", "slower"]
    assert result.summaries["b"] == Summary(5.0, 5.0, 10)
    assert result.noise == Ratio(1, 1, 1, 10)
    assert result.samples_ms["c"] == (15.0,) * 10
    assert result.rounds == 10
    assert result.warnings == fingerprint().warnings()


def test_one_function_against_itself_has_no_winner_about_as_often_as_the_interval_says(
    clock: Clock,
) -> None:
    called = {"b": 0, "a again": 0}
    for seed in range(100):
        result = simulated(clock, factor=1.0, seed=seed)
        called["b"] += result.ratios["b"].verdict != "no winner"
        called["a again"] += result.noise.verdict != "no winner"
    # 5 to 8 of 100 are expected; more than 15 would happen in less than 1 of 100 such tests.
    assert all(count <= 15 for count in called.values()), called


def test_a_real_difference_is_found(clock: Clock) -> None:
    verdicts = [simulated(clock, factor=0.8, seed=seed).ratios["b"].verdict for seed in range(20)]
    assert verdicts == ["faster"] * 20
    ratios = [simulated(clock, factor=1.3, seed=seed).ratios["b"] for seed in range(40)]
    assert sum(each.low <= 1.3 <= each.high for each in ratios) >= 33  # 95 % of 40 are 38


def test_short_functions_are_called_often_enough_to_fill_a_block(clock: Clock) -> None:
    rows = {
        "1 µs": clock.job("1 µs", 0.001), "1 ms": clock.job("1 ms", 1.0),
        "3.9 ms": clock.job("3.9 ms", 3.9), "7 ms": clock.job("7 ms", 7.0),
    }  # fmt: skip
    result = compare(rows, baseline="1 ms", repeats=6, block_ms=5.0, clock=clock)
    assert result.calls == {"1 µs": 5000, "1 ms": 5, "3.9 ms": 1, "7 ms": 1}
    assert [each.median_ms for each in result.summaries.values()] == [0.001, 1.0, 3.9, 7.0]


def test_a_cold_first_call_does_not_mislead_the_calibration(clock: Clock) -> None:
    rows = {"a": clock.job("a", 5000.0, 0.01)}
    assert compare(rows, baseline="a", repeats=6, clock=clock).calls == {"a": 500}


def test_a_function_that_takes_no_time_ends_the_calibration(clock: Clock) -> None:
    rows = {"a": clock.job("a", 1.0), "nothing": lambda: None}
    result = compare(rows, baseline="a", repeats=6, clock=clock)
    assert result.ratios["nothing"].median == 0
    assert result.calls["nothing"] == measure._MOST_CALLS
    assert any("nothing: a block is too short" in each for each in result.warnings)
    with pytest.raises(ValueError, match="too short for the timer"):
        compare(rows, baseline="nothing", repeats=6, clock=clock)


def test_each_round_has_one_block_of_each_row_and_the_baseline_twice(clock: Clock) -> None:
    rows = {name: clock.job(name, 2.0) for name in "abc"}
    result = compare(rows, baseline="b", repeats=20, warmup=2, block_ms=4.0, clock=clock)
    assert result.calls == {"a": 2, "b": 2, "c": 2}
    blocks = clock.calls[-22 * 8 :]
    rounds = [blocks[k : k + 8] for k in range(0, len(blocks), 8)]
    assert all(sorted(each) == list("aabbbbcc") for each in rounds)
    assert len({"".join(each) for each in rounds}) > 5  # in many orders


def test_drift_is_told_and_does_not_bend_the_ratio(clock: Clock) -> None:
    speed = 1.0

    def job(ms: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal speed
            speed *= 1.003
            clock.now_ns += round(ms * speed * 1e6)

        return run

    result = compare(
        {"a": job(10), "b": job(20)}, baseline="a", repeats=60, block_ms=1, clock=clock
    )
    assert any(each.startswith("drift: a took +") for each in result.warnings)
    assert 1.9 < result.ratios["b"].low < 2 < result.ratios["b"].high < 2.1


def test_noise_and_few_rounds_are_told(clock: Clock) -> None:
    draws = np.random.default_rng(0).lognormal(0, 1.0, 1000).tolist()
    wild = {"a": clock.endless("a", iter(draws))}
    result = compare(wild, baseline="a", block_ms=0.01, clock=clock)
    assert any("noisy: the A/A interval is" in each for each in result.warnings)
    rows = {"a": clock.job("a", 9.0), "b": clock.job("b", 3.0)}
    few = compare(rows, baseline="a", repeats=3, clock=clock)
    assert few.ratios["b"].verdict == "no winner"
    assert "only 3 rounds: no winner is called with fewer than 6" in few.warnings


def test_a_baseline_that_differs_from_itself_is_told() -> None:
    paired = ratio([11.0] * 8, [10.0] * 8)
    told = Watch().doubts([10.0] * 8, "a", paired)
    assert any("a differs from itself (1.10 [1.10, 1.10])" in each for each in told)


def test_a_busy_machine_is_told() -> None:
    quiet = dataclasses.replace(fingerprint(), load=0.5, cores=4, quota_cores=None)
    assert quiet.warnings() == ()
    (told,) = dataclasses.replace(quiet, load=4.5).warnings()
    assert "load 4.5 on 4 core(s)" in told
    (told,) = dataclasses.replace(quiet, quota_cores=1.5).warnings()
    assert "limit of 1.5 cores" in told


def stat_file(tmp_path: Path, busy_s: float, idle_s: float, stolen_s: float) -> Path:
    hertz = os.sysconf("SC_CLK_TCK")
    ticks = [round(each * hertz) for each in (busy_s, 0, 0, idle_s, 0, 0, 0, stolen_s, 0, 0)]
    file = tmp_path / "stat"
    file.write_text(f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 2 3\n")
    return file


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="only where Unix counts CPU time")
def test_what_others_do_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paired, cores = ratio([10.0] * 8, [10.0] * 8), os.cpu_count() or 1

    def doubts(busy: float, stolen: float, own: float) -> tuple[str, ...]:
        """After 10 s, with shares of all cores' time."""
        monkeypatch.setattr(measure, "_PROC_STAT", stat_file(tmp_path, 100, 100, 100))
        monkeypatch.setattr(os, "times", lambda: (5.0, 0.0, 0.0, 0.0, 7.0))
        watch = Watch()
        watch.environment = dataclasses.replace(watch.environment, load=99.0, quota_cores=None)
        time_s = 10 * cores
        idle = 1 - busy - stolen
        stat_file(tmp_path, *(100 + share * time_s for share in (busy, idle, stolen)))
        monkeypatch.setattr(os, "times", lambda: (5.0 + own * time_s, 0.0, 0.0, 0.0, 7.0))
        return watch.doubts([10.0] * 8, "a", paired)

    assert doubts(busy=0.9, stolen=0, own=0.9) == ()  # our own load is no noise
    assert doubts(busy=0.9, stolen=0, own=0.85) == ()
    assert doubts(busy=0.9, stolen=0, own=0.5) == (
        "other processes used 40% of all cores' time meanwhile",
    )
    assert doubts(busy=0.5, stolen=0.1, own=0.5) == (
        "the hypervisor took 10% of the CPU time for others",
    )


def test_without_the_systems_count_the_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PROC_STAT", tmp_path / "none")
    watch = Watch()
    watch.environment = dataclasses.replace(watch.environment, load=99.0, quota_cores=None)
    (told,) = watch.doubts([10.0] * 8, "a", ratio([10.0] * 8, [10.0] * 8))
    assert "load 99.0" in told


def test_the_garbage_collector_is_off_in_blocks_and_as_before_between_them(clock: Clock) -> None:
    seen: list[bool] = []

    def job() -> None:
        seen.append(gc.isenabled())
        clock.now_ns += 10**7

    assert gc.isenabled()
    result = compare({"a": job}, baseline="a", repeats=6, clock=clock)
    assert seen.count(True) == 1  # the one call before the first block
    assert gc.isenabled()

    def fail() -> None:
        if len(seen) > 2:
            raise KeyError("x")
        job()

    seen.clear()
    with pytest.raises(KeyError):
        compare({"a": fail}, baseline="a", clock=clock)
    assert gc.isenabled()
    gc.disable()
    try:
        compare({"a": job}, baseline="a", repeats=6, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert result.rounds == 6


def test_the_timers_cost_is_measured() -> None:
    ticks: Iterable[int] = iter(range(0, 10**9, 40))
    known = timer(lambda: next(iter(ticks)))
    assert known.overhead_ns == 40
    assert known.resolution_ns == 40
    here = timer()
    assert 0 < here.resolution_ns <= 1e6
    assert 0 <= here.overhead_ns < 1e6
    assert here.call_ns > 0
    assert timer(Clock()) == measure.Timer(0, 0, 0)


def test_real_functions_on_the_real_clock() -> None:
    small, large = np.ones(1000), np.ones(1_000_000)
    result = compare({"small": small.sum, "large": large.sum}, baseline="small", repeats=12)
    assert result.ratios["large"].verdict == "slower"
    assert result.ratios["large"].low > 10  # a thousand times the work
    assert result.timer_overhead_ns == result.timer.overhead_ns > 0


def test_the_table_shows_verdicts_checks_and_warnings_everywhere(clock: Clock) -> None:
    rows = {"plain": clock.job("plain", 9.0), "<b>": clock.job("<b>", 3.0)}
    result = compare(rows, baseline="plain", repeats=4, clock=clock)
    for text in (str(result), result._repr_html_()):
        for part in ("verdict", "0.333 [0.333, 0.333]", "no winner", "A/A check", "only 4 rounds",
                     "9.00 ms", "ns a read"):  # fmt: skip
            assert part in text
    assert "<b>" not in result._repr_html_()
    assert result._repr_html_().startswith("<table><caption>")
    plain = json.loads(json.dumps(result.to_dict(samples=True)))
    assert plain["ratios"]["<b>"]["verdict"] == "no winner"
    assert plain["samples_ms"]["plain"] == [9.0] * 4
    assert "samples_ms" not in result.to_dict()
    assert "samples_ms" not in repr(result)
    assert plain["environment"]["cpu"] == result.environment.cpu


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"baseline": "z"}, "the baseline 'z' is none of the rows a"),
        ({"baseline": "a", "repeats": 0}, "need repeats >= 1"),
        ({"baseline": "a", "warmup": -1}, "need repeats >= 1 and warmup >= 0"),
        ({"baseline": "a", "block_ms": 0.0}, "need block_ms > 0"),
        ({"baseline": "a", "block_ms": float("nan")}, "need block_ms > 0"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        compare({"a": time.time}, **arguments)  # type: ignore[arg-type]


def test_the_fingerprint_is_ready_for_json_and_names_what_counts() -> None:
    mark = fingerprint(threads=3)
    data = json.loads(json.dumps(mark.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(mark)}
    assert data == mark.to_dict()
    assert data["cpu"]
    assert data["cores"] >= 1
    assert data["physical_cores"] is None or 1 <= data["physical_cores"] <= data["cores"]
    assert data["python"] == platform.python_version()
    assert data["versions"]["numpy"] == np.__version__
    for package in ("edgelab", "onnxruntime", "openvino", "ai-edge-litert", "onnx"):
        assert data["versions"][package]
    assert all(isinstance(feature, str) for feature in data["features"])
    assert data["threads"]["threads"] == "3"
    assert data["taken"].endswith("+00:00")
    for part in (mark.cpu, f"{mark.cores} core(s)"):
        assert part in str(mark)


def test_thread_settings_belong_to_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    threads = fingerprint().threads
    assert threads["threads"] == "default"
    assert threads["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_CORETYPE" not in threads


def test_the_systems_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's sysfs, as this machine may not have: governor, turbo, shared cores, a limit."""
    files = {
        "cpu0/cpufreq/scaling_governor": "powersave\n",
        "cpu1/cpufreq/scaling_governor": "performance\n",
        "intel_pstate/no_turbo": "1\n",
        **{f"cpu{k}/topology/thread_siblings_list": f"{k % 2},{k % 2 + 2}\n" for k in range(4)},
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(measure, "_CPUS", tmp_path)
    monkeypatch.setattr(measure, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    mark = fingerprint()
    assert mark.governor == "performance powersave"
    assert mark.turbo is False
    assert (mark.cores, mark.physical_cores) == (4, 2)
    assert mark.quota_cores == 1.5
    assert "4 core(s) (2 physical)" in str(mark)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert fingerprint().quota_cores is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert fingerprint().quota_cores == 0.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert fingerprint().quota_cores is None


def test_a_system_without_such_files_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_CPUS", tmp_path)
    monkeypatch.setattr(measure, "_CGROUP", tmp_path)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    mark = fingerprint()
    assert (mark.governor, mark.turbo, mark.physical_cores) == (None, None, None)
    assert (mark.quota_cores, mark.load) == (None, None)
    assert mark.warnings() == ()
    assert "load" not in str(mark)


# --- new processes --------------------------------------------------------------------------------


def test_a_start_is_timed_to_the_answer_and_split_into_steps() -> None:
    steps = {"wait": "import time; time.sleep(0.2)", "work": "answer = time.sleep(0.05)"}
    shell = [sys.executable, "-c", "print('first', flush=True); import time; time.sleep(2)"]
    found = cold_start({"steps": steps, "first line": shell}, repeats=1, warmup=0)
    parts = found.parts["steps"]
    assert list(parts) == ["start", "wait", "work"]
    assert 200 <= parts["wait"] < 2000
    assert 50 <= parts["work"] < 2000
    assert parts["start"] > 0
    assert sum(parts.values()) == pytest.approx(found.summaries["steps"].median_ms)
    assert found.parts["first line"] == {"start": found.samples_ms["first line"][0]}
    assert found.samples_ms["first line"][0] < 2000  # to the first line, not to the end


def test_programs_start_in_turns_as_often_as_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    programs = {
        name: {"write": f"with open({str(log)!r}, 'a') as file: file.write({name!r})"}
        for name in "ab"
    }
    found = cold_start(programs, repeats=4, warmup=2)
    order = log.read_text()
    assert [sorted(order[k : k + 2]) for k in range(0, 12, 2)] == [["a", "b"]] * 6
    assert len({order[k : k + 2] for k in range(0, 12, 2)}) == 2  # in both orders
    assert found.summaries["a"].count == len(found.samples_ms["a"]) == 4
    assert found.ratios["a"] == Ratio(1, 1, 1, 4)
    assert found.ratios["b"] == ratio(found.samples_ms["b"], found.samples_ms["a"])
    for text in (str(found), found._repr_html_()):
        for part in ("row / a", "baseline", "no winner", "start"):
            assert part in text
    assert json.loads(json.dumps(found.to_dict()))["parts"]["b"].keys() == {"start", "write"}


def test_steps_share_a_scope_and_may_print_and_quote() -> None:
    steps = {
        "define": "import sys\ndef f(): return g()\ng = lambda: \"'quoted'\"",
        "print": "print('edgelab', f(), end=''); sys.stderr.write('x' * 1_000_000)",
        "values": "assert (text, number, path) == (\"a'b\", 0.5, 'c/d')",
        "check": "assert f() == \"'quoted'\" and __name__ == '__main__' and len(sys.argv) == 1",
    }
    found = cold_start(
        {"a": steps}, values={"text": "a'b", "number": 0.5, "path": Path("c/d")},
        repeats=1, warmup=0,
    )  # fmt: skip
    assert list(found.parts["a"])[1:] == list(steps)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ({"fail": "import sys\nraise KeyError('lost\\x1b[2J')"}, "ended with 1: KeyError"),
        ({"leave": "import os; os._exit(0)"}, "ended with 0: no message"),
        ([sys.executable, "-c", "import sys; sys.exit('reason')"], "ended with 1: reason"),
        (["/no/such/program"], "/no/such/program does not start"),
        ({"sleep": "import time; time.sleep(60)"}, "took more than 1 s"),
    ],
)
def test_programs_that_fail_are_told_apart(program: dict[str, str], text: str) -> None:
    with pytest.raises(EdgelabError, match=text) as caught:
        cold_start({"it": program}, repeats=1, warmup=0, timeout_s=1 if "sleep" in program else 60)
    assert str(caught.value).isprintable()


def test_starts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="no programs"):
        cold_start({})
    with pytest.raises(ValueError, match="need repeats >= 1"):
        cold_start({"a": {}}, repeats=0)
