"""Timings that can be compared: interleaved, repeated, and said with the machine they belong to.

`compare` is the front door. It times functions in blocks, in a new random order each round, so that
all of them meet the same noise; a ratio is taken within each round, and an interval over rounds.
A winner is called only if that interval leaves out 1. Each table also times its baseline against
itself: what differs there is noise.

The garbage collector is off within a block, as in `timeit`, and on between blocks if it was on.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import itertools
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from edgelab.aot import available_cores, cpu_features
from edgelab.errors import EdgelabError

Clock = Callable[[], int]
"""Returns nanoseconds since some fixed point, as `time.perf_counter_ns` does."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and tail of repeated measurements.

    Attributes
    ----------
    median_ms, p95_ms : float
        Milliseconds.
    count : int
    """

    median_ms: float
    p95_ms: float
    count: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Summary:
        """Summarise samples in milliseconds; at least one."""
        if len(samples_ms) == 0:
            raise ValueError("no samples: measure with repeats >= 1")
        median, p95 = np.percentile(samples_ms, (50, 95))
        return cls(float(median), float(p95), len(samples_ms))

    def to_dict(self) -> dict[str, float]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def interleaved(
    rows: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Time functions in turns, in a new random order each round, so that all meet the same noise.

    For functions that take well over a microsecond, or that may be called only so many times;
    `compare` calls short ones many times in a block.

    Parameters
    ----------
    rows : mapping of str to callable
    repeats : int
        Rounds; each calls every function once.
    warmup : int
        Rounds that are not counted.
    seed : int
        Seed of the order.
    clock : callable
        Returns nanoseconds.

    Returns
    -------
    dict of str to list of float
        Milliseconds; entry ``k`` of every list comes from the same round.

    Raises
    ------
    ValueError
        If `repeats` is not positive or `warmup` is negative.
    """
    _check_rounds(repeats, warmup)
    samples = _rounds([(job, 1) for job in rows.values()], repeats, warmup, seed, clock)
    return dict(zip(rows, samples, strict=True))


def _check_rounds(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise ValueError(f"need repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")


def _rounds(
    jobs: Sequence[tuple[Callable[[], Any], int]],
    repeats: int,
    warmup: int,
    seed: int,
    clock: Clock,
) -> list[list[float]]:
    """Milliseconds of one call, for each function and its calls in a block, by round."""
    order, samples = list(range(len(jobs))), [list[float]() for _ in jobs]
    shuffle = random.Random(seed).shuffle
    for turn in range(-warmup, repeats):
        shuffle(order)
        for place in order:
            function, calls = jobs[place]
            elapsed = _block(function, calls, clock) / calls / 1e6
            if turn >= 0:
                samples[place].append(elapsed)
    return samples


def _block(function: Callable[[], Any], calls: int, clock: Clock) -> int:
    """Nanoseconds of `calls` calls, back to back, without the garbage collector."""
    collected = gc.isenabled()
    gc.disable()
    try:
        turns = itertools.repeat(None, calls)
        start = clock()
        for _ in turns:
            function()
        return clock() - start
    finally:
        if collected:
            gc.enable()


_MOST_CALLS = 1_000_000  # in a block, however short a function is


def _calibrated(function: Callable[[], Any], block_ms: float, clock: Clock) -> int:
    """How many calls take about `block_ms`; the first call is not counted, for it may be cold."""
    function()
    calls = 1
    while True:
        elapsed, wanted = min(_block(function, calls, clock) for _ in range(2)), block_ms * 1e6
        if elapsed >= 0.8 * wanted or calls == _MOST_CALLS:
            return calls
        # At most ten times as many: a short block says little about how long a call takes.
        fit = round(calls * wanted / elapsed) if elapsed > 0 else _MOST_CALLS
        if fit <= calls:
            return calls
        calls = min(fit, 10 * calls, _MOST_CALLS)


MIN_ROUNDS = 6
"""With fewer, no 95 % interval of a median exists: 5 of 5 on one side are chance in 1 of 16."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much longer one row takes than another, from paired rounds.

    Attributes
    ----------
    median : float
        Median of the per-round ratios.
    low, high : float
        95 % bootstrap interval of that median.
    count : int
        Rounds.
    """

    median: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Return ``faster`` or ``slower``; or ``no winner``, if that can't be told.

        It can't if the interval holds 1, or with fewer than `MIN_ROUNDS` rounds.
        """
        if self.count < MIN_ROUNDS or self.low <= 1 <= self.high:
            return "no winner"
        return "faster" if self.high < 1 else "slower"

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(self.low)}, {_short(self.high)}]"

    def to_dict(self) -> dict[str, float | int | str]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-4 else f"{value:.6f}"


def duration(ms: float) -> str:
    """Milliseconds as text of three significant digits, in the unit that fits."""
    for unit, factor in (("s ", 1e-3), ("ms", 1.0), ("µs", 1e3)):
        if ms * factor >= 1:
            return f"{_short(ms * factor)} {unit}"
    return f"{_short(ms * 1e6)} ns"


def ratio(samples_ms: Sequence[float], baseline_ms: Sequence[float], *, seed: int = 0) -> Ratio:
    """Compare two rows of `interleaved` round by round.

    Parameters
    ----------
    samples_ms, baseline_ms : sequence of float
        Two rows of one `interleaved` result.
    seed : int
        Seed of the bootstrap.

    Raises
    ------
    ValueError
        If the rows are empty or not of the same length, or the baseline is not positive.

    Notes
    -----
    The interval is the percentile bootstrap of the median, with 2,000 draws (Efron and Tibshirani,
    *An Introduction to the Bootstrap*, chapter 13). For a median it holds the true value in a
    little less than 95 of 100 cases.
    """
    if len(samples_ms) != len(baseline_ms) or len(samples_ms) == 0:
        raise ValueError(f"rows of {len(samples_ms)} and {len(baseline_ms)} samples are no pairs")
    if not min(baseline_ms) > 0:
        raise ValueError(
            "a baseline of 0 ms is too short for the timer; `compare` calls it more often"
        )
    ratios = np.asarray(samples_ms) / np.asarray(baseline_ms)
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


@dataclass(frozen=True, slots=True)
class Timer:
    """What reading a clock costs, and what it can tell apart.

    Attributes
    ----------
    overhead_ns : float
        Median time between two reads with nothing between them.
    resolution_ns : float
        Smallest step that was seen; 0 if the clock did not move.
    call_ns : float
        What one call of an empty function in a block takes: part of every row.
    """

    overhead_ns: float
    resolution_ns: float
    call_ns: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def timer(clock: Clock = time.perf_counter_ns) -> Timer:
    """Measure a clock: a millisecond's work."""
    reads = [clock() for _ in range(2001)]
    steps = np.diff(reads)
    moved = steps[steps > 0]

    def nothing() -> None:
        pass

    empty = min(_block(nothing, 1000, clock) for _ in range(5)) / 1000
    return Timer(float(np.median(steps)), float(moved.min()) if moved.size else 0.0, empty)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows that were timed in the same rounds.

    Attributes
    ----------
    baseline : str
        The row that the others are compared with.
    summaries : dict of str to Summary
        Time of one call.
    ratios : dict of str to Ratio
        Row over baseline, paired by round; the baseline's own is exactly 1.
    noise : Ratio
        The baseline over itself, timed as one more row: the A/A check.
    calls : dict of str to int
        Calls in a block.
    timer : Timer
    warnings : tuple of str
        What makes these numbers less trustworthy.
    environment : Fingerprint
        Taken before the first round.
    samples_ms : dict of str to tuple of float
        Time of one call, by round.
    """

    baseline: str
    summaries: dict[str, Summary]
    ratios: dict[str, Ratio]
    noise: Ratio
    calls: dict[str, int]
    timer: Timer
    warnings: tuple[str, ...]
    environment: Fingerprint
    samples_ms: dict[str, tuple[float, ...]] = field(repr=False)

    @property
    def timer_overhead_ns(self) -> float:
        """What one read of the clock takes; each block holds one, each row a share of it."""
        return self.timer.overhead_ns

    @property
    def rounds(self) -> int:
        """How many rounds were counted."""
        return self.noise.count

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """Return plain values, ready for JSON; on request with the time of each round."""
        plain: dict[str, Any] = {
            "baseline": self.baseline,
            "summaries": {name: each.to_dict() for name, each in self.summaries.items()},
            "ratios": {name: each.to_dict() for name, each in self.ratios.items()},
            "noise": self.noise.to_dict(),
            "calls": dict(self.calls),
            "timer": self.timer.to_dict(),
            "timer_overhead_ns": self.timer_overhead_ns,
            "warnings": list(self.warnings),
            "environment": self.environment.to_dict(),
        }
        if samples:
            plain["samples_ms"] = {name: list(each) for name, each in self.samples_ms.items()}
        return plain

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for name, summary in self.summaries.items():
            paired = self.ratios[name]
            told = ("1", "baseline") if name == self.baseline else (str(paired), paired.verdict)
            times = (duration(summary.median_ms), duration(summary.p95_ms))
            yield (name, *times, f"{self.calls[name]:,}", *told)

    def _notes(self) -> list[str]:
        clock = self.timer
        return [
            f"A/A check, {self.baseline} / itself: {self.noise}, {self.noise.verdict}",
            f"{self.rounds} paired rounds in random order; intervals hold the median with 95 %",
            f"timer: {clock.overhead_ns:.0f} ns a read; an empty call takes {clock.call_ns:.0f} ns",
            *(f"warning: {each}" for each in self.warnings),
        ]

    def __str__(self) -> str:
        columns = ("", "median", "p95", "calls", f"row / {self.baseline}", "verdict")
        return "\n".join(
            [*text_table(columns, list(self._cells()), left=(0, 4, 5)), *self._notes()]
        )

    def _repr_html_(self) -> str:
        columns = ("", "median", "p95", "calls in a block", f"row / {self.baseline}", "verdict")
        return html_table("; ".join(self._notes()), columns, list(self._cells()))


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> list[str]:
    """Lay out cells in lines of plain text; columns are flush right but those in `left`."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (columns, *rows)
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def row_named(rows: Iterable[NamedT], name: str) -> NamedT:
    """Return the row of that name, or raise KeyError, which says what names there are."""
    known = {row.name: row for row in rows}
    if name not in known:
        raise KeyError(f"no row {name!r}; there are {', '.join(known)}")
    return known[name]


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells as a ``<table>``."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def compare(
    rows: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    repeats: int = 30,
    warmup: int = 3,
    block_ms: float = 5.0,
    seed: int = 0,
    threads: int | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Comparison:
    """Time functions against one of them, and say what can be said about who is faster.

    Parameters
    ----------
    rows : mapping of str to callable
        Functions of no arguments, which may be called any number of times.
    baseline : str
        One of the rows. It is timed twice each round, once under its name and once for the check
        of the baseline against itself.
    repeats : int
        Rounds: each times one block of every row, in a new random order.
    warmup : int
        Rounds that are not counted.
    block_ms : float
        About how long a block should take, in milliseconds. A row is called as many times in a
        block as that needs, at least once; its time is the block's, divided by the calls.
    seed : int
        Seed of the order and of the bootstrap.
    threads : int, optional
        Threads that the rows use, to be kept with the environment.
    clock : callable
        Returns nanoseconds.

    Raises
    ------
    ValueError
        If `baseline` is no row, `repeats` or `block_ms` is not positive, or `warmup` is negative.
    """
    _check_rounds(repeats, warmup)
    if baseline not in rows:
        raise ValueError(f"the baseline {baseline!r} is none of the rows {', '.join(rows)}")
    if not block_ms > 0:
        raise ValueError(f"need block_ms > 0, got {block_ms}")
    watch, measured = Watch(threads=threads), timer(clock)
    calls = {name: _calibrated(function, block_ms, clock) for name, function in rows.items()}
    jobs = [(function, calls[name]) for name, function in rows.items()]
    *measurements, again = _rounds(
        [*jobs, (rows[baseline], calls[baseline])], repeats, warmup, seed, clock
    )
    samples = dict(zip(rows, measurements, strict=True))
    noise = ratio(again, samples[baseline], seed=seed)
    return Comparison(
        baseline=baseline,
        summaries={name: Summary.of(each) for name, each in samples.items()},
        ratios={name: ratio(each, samples[baseline], seed=seed) for name, each in samples.items()},
        noise=noise,
        calls=calls,
        timer=measured,
        warnings=(
            *watch.doubts(samples[baseline], baseline, noise),
            *_too_short(samples, calls, measured),
        ),
        environment=watch.environment,
        samples_ms={name: tuple(each) for name, each in samples.items()},
    )


UNLIKE_ITSELF = "differs from itself"
"""What a warning says if the A/A check finds a difference."""


class Watch:
    """Looks at the machine from now on, and says afterwards what speaks against the numbers.

    Parameters
    ----------
    threads : int, optional
        As in `fingerprint`.

    Attributes
    ----------
    environment : Fingerprint
        Taken at the start.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self.environment = fingerprint(threads=threads)
        self._before = _cpu_seconds()

    def _neighbours(self) -> tuple[str, ...] | None:
        """What others did meanwhile; None if the system does not tell, or the time was short."""
        now = _cpu_seconds()
        if now is None or self._before is None:
            return None
        passed, busy, stolen, own = (b - a for a, b in zip(self._before, now, strict=True))
        if passed < 0.5 * (os.cpu_count() or 1):  # the system counts in hundredths
            return None
        found = []
        if (others := (busy - own) / passed) > 0.1:
            found.append(f"other processes used {others:.0%} of all cores' time meanwhile")
        if stolen / passed > 0.02:
            found.append(f"the hypervisor took {stolen / passed:.0%} of the CPU time for others")
        return tuple(found)

    def doubts(self, baseline_ms: Sequence[float], baseline: str, noise: Ratio) -> tuple[str, ...]:
        """Say what a reader of a table should know before believing it.

        Parameters
        ----------
        baseline_ms : sequence of float
            Samples of the baseline, by round.
        baseline : str
            Its name.
        noise : Ratio
            The baseline over itself, from the same rounds.
        """
        neighbours, here = self._neighbours(), self.environment
        # The load is an average over the last minute, and we were part of it; so it is second best.
        found = list(here.warnings() if neighbours is None else (*neighbours, *here.limits()))
        if noise.count < MIN_ROUNDS:
            few = f"only {noise.count} rounds: no winner is called with fewer than {MIN_ROUNDS}"
            found.append(few)
        elif noise.verdict != "no winner":
            found.append(
                f"{baseline} {UNLIKE_ITSELF} ({noise}), by chance or by noise: do not believe "
                "differences of that size"
            )
        elif noise.high - noise.low > 0.1:
            found.append(
                f"noisy: the A/A interval is {noise.high - noise.low:.0%} wide; a quiet machine or "
                "more rounds would narrow it"
            )
        third = len(baseline_ms) // 3
        if third >= 5:
            first, last = (np.median(part) for part in (baseline_ms[:third], baseline_ms[-third:]))
            if not 0.9 <= last / first <= 1.1:
                found.append(
                    f"drift: {baseline} took {last / first - 1:+.0%} at the end (heat, clock "
                    "frequency or neighbours); that bends medians, and ratios in a round little"
                )
        return tuple(found)


def _cpu_seconds() -> tuple[float, float, float, float] | None:
    """All cores' time, the busy part of it, what a hypervisor stole, and this process's own."""
    fields = (_read(_PROC_STAT) or "").partition("\n")[0].split()
    try:
        ticks = [int(each) / os.sysconf("SC_CLK_TCK") for each in fields[1:9]]
        _, _, _, idle, waiting, _, _, stolen = ticks
    except (AttributeError, ValueError, OSError):  # another system
        return None
    own = os.times()
    busy = sum(ticks) - idle - waiting - stolen
    return sum(ticks), busy, stolen, sum(own[:4])


def _too_short(
    samples: Mapping[str, Sequence[float]], calls: Mapping[str, int], measured: Timer
) -> Iterable[str]:
    for name, each in samples.items():
        per_call = float(np.median(each)) * 1e6
        if per_call * calls[name] < 100 * max(measured.overhead_ns, measured.resolution_ns, 1):
            yield f"{name}: a block is too short for this timer; give a larger block_ms"
        elif per_call < 10 * measured.call_ns:
            yield (
                f"{name}: a call takes hardly longer than an empty one, which is part of it "
                f"({measured.call_ns:.0f} ns)"
            )


@dataclass(frozen=True, slots=True)
class Starts:
    """How long new processes take to their first answer.

    Attributes
    ----------
    summaries : dict of str to Summary
        From the start of the process to its answer.
    ratios : dict of str to Ratio
        To the first program, paired by round.
    parts : dict of str to dict of str to float
        What the median round is made of, in milliseconds: ``start`` until a program's first step
        begins, then its steps. A command's only part is ``start``.
    samples_ms : dict of str to tuple of float
        By round.
    environment : Fingerprint
    """

    summaries: dict[str, Summary]
    ratios: dict[str, Ratio]
    parts: dict[str, dict[str, float]]
    environment: Fingerprint
    samples_ms: dict[str, tuple[float, ...]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "summaries": {name: each.to_dict() for name, each in self.summaries.items()},
            "ratios": {name: each.to_dict() for name, each in self.ratios.items()},
            "parts": {name: dict(each) for name, each in self.parts.items()},
            "environment": self.environment.to_dict(),
        }

    def _cells(self) -> list[tuple[str, ...]]:
        first, cells = next(iter(self.summaries)), list[tuple[str, ...]]()
        for name, each in self.summaries.items():
            parts = (f"{part} {duration(ms).strip()}" for part, ms in self.parts[name].items())
            paired = self.ratios[name]
            told = ("1", "baseline") if name == first else (str(paired), paired.verdict)
            times = duration(each.median_ms), duration(each.p95_ms)
            cells.append((name, *times, ", ".join(parts), *told))
        return cells

    def _columns(self) -> tuple[str, ...]:
        first = next(iter(self.summaries))
        return "new process", "median", "p95", "the median round", f"row / {first}", "verdict"

    def __str__(self) -> str:
        return "\n".join(text_table(self._columns(), self._cells(), left=(0, 3, 4, 5)))

    def _repr_html_(self) -> str:
        caption = "From the start of a new process to its first answer"
        return html_table(caption, self._columns(), self._cells())


# A line of a program's own output must not be taken for the answer.
_ANSWER = "edgelab-steps:"
_STEPS = f"""\
import sys, time
_steps, _scope = eval(sys.argv.pop())
_marks = [time.perf_counter()]
for _step in _steps:
    exec(_step, _scope)
    _marks.append(time.perf_counter())
print("\\n{_ANSWER}", *(b - a for a, b in zip(_marks, _marks[1:])), flush=True)
"""


def cold_start(
    programs: Mapping[str, Mapping[str, str] | Sequence[str]],
    *,
    values: Mapping[str, str | float | os.PathLike[str]] | None = None,
    stdin: str | os.PathLike[str] = os.devnull,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    timeout_s: float = 60.0,
) -> Starts:
    """Start processes in turns, and time how long each takes to its first answer.

    Parameters
    ----------
    programs : mapping of str to (mapping of str to str, or sequence of str)
        A program in this Python, as steps: name → code, executed in one scope; its answer is the
        end of the last step. Or a command with its arguments; its answer is its first line on
        stdout, or its end.
    values : mapping, optional
        Names that the steps find defined: texts and numbers; paths become texts.
    stdin : path
        The file that every program finds on its standard input.
    repeats : int
        Rounds; each starts every program once, in a new random order.
    warmup : int
        Rounds that are not counted. Without any, files that are not yet in the system's memory
        count in the first round.
    seed : int
        Seed of the order and of the bootstrap.
    timeout_s : float
        After this time a process is killed.

    Raises
    ------
    EdgelabError
        If a program can't be started, fails, or takes too long; with what it said last.
    ValueError
        If there is no program, or rounds make no sense.
    """
    _check_rounds(repeats, warmup)
    if not programs:
        raise ValueError("no programs to start")
    scope: dict[str, str | float] = {"__name__": "__main__"}
    for variable, value in (values or {}).items():
        scope[variable] = value if isinstance(value, (str, int, float)) else os.fspath(value)
    environment = fingerprint()
    order, runs = list(programs), {name: list[dict[str, float]]() for name in programs}
    shuffle = random.Random(seed).shuffle
    for turn in range(-warmup, repeats):
        shuffle(order)
        for name in order:
            run = _started(name, programs[name], scope, stdin, timeout_s)
            if turn >= 0:
                runs[name].append(run)
    samples = {name: tuple(sum(run.values()) for run in each) for name, each in runs.items()}
    first = samples[next(iter(programs))]
    return Starts(
        summaries={name: Summary.of(each) for name, each in samples.items()},
        ratios={name: ratio(each, first, seed=seed) for name, each in samples.items()},
        parts={
            name: sorted(each, key=lambda run: sum(run.values()))[(repeats - 1) // 2]
            for name, each in runs.items()
        },
        environment=environment,
        samples_ms=samples,
    )


def _started(
    name: str,
    program: Mapping[str, str] | Sequence[str],
    scope: Mapping[str, str | float],
    stdin: str | os.PathLike[str],
    timeout_s: float,
) -> dict[str, float]:
    """Run a program once; return its parts in milliseconds."""
    steps = program if isinstance(program, Mapping) else {}
    if isinstance(program, Mapping):
        command = [sys.executable, "-c", _STEPS, repr((list(steps.values()), scope))]
    else:
        command = list(program)
    late = False

    def kill() -> None:
        nonlocal late
        late = True
        process.kill()

    # A pipe for errors that nobody reads would fill up.
    with tempfile.TemporaryFile() as errors, open(stdin, "rb") as given:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            raise EdgelabError(f"{name}: {command[0]} does not start: {error}") from None
        alarm = threading.Timer(timeout_s, kill)
        alarm.start()
        try:
            assert process.stdout is not None
            with process, process.stdout as stdout:
                for line in stdout:
                    if not steps or line.startswith(_ANSWER.encode()):
                        answered, answer = time.perf_counter(), line
                        break
                else:
                    answered, answer = time.perf_counter(), b""
                stdout.read()
        finally:
            alarm.cancel()
        if late or process.returncode != 0 or (steps and not answer):
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            why = f"took more than {timeout_s:g} s" if late else f"ended with {process.returncode}"
            raise EdgelabError(f"{name} {why}: {plain_text(said[-1])}")
    seconds = [float(each) for each in answer.split()[1:]] if steps else []
    parts = dict(zip(steps, seconds, strict=True))
    whole = {"start": answered - begin - sum(seconds), **parts}
    return {part: each * 1e3 for part, each in whole.items()}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The machine and the versions that a timing belongs to.

    Attributes
    ----------
    cpu : str
    cores : int
        That this process may run on.
    physical_cores : int or None
        Among them; fewer than `cores` where two share one (SMT). None if unknown.
    quota_cores : float or None
        What a container's limit on CPU time amounts to; None if there is none.
    features : tuple of str
        Those that decide about speed here, as the operating system names them.
    governor : str or None
        How the operating system picks the clock frequency; None if it does not say.
    turbo : bool or None
        Whether the CPU may go beyond its nominal frequency; None if unknown.
    memory_bytes : int or None
    virtual : tuple of str
        Hints that this is a container or a virtual machine.
    system, python : str
    versions : dict of str to str
        Of packages; ``not installed`` where that is so.
    threads : dict of str to str
        ``threads`` as given, and what the environment sets for the libraries that we use.
    load : float or None
        Average of runnable processes over the last minute.
    taken : str
        When: UTC, ISO 8601.
    """

    cpu: str
    cores: int
    physical_cores: int | None
    quota_cores: float | None
    features: tuple[str, ...]
    governor: str | None
    turbo: bool | None
    memory_bytes: int | None
    virtual: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    threads: dict[str, str]
    load: float | None
    taken: str

    def __str__(self) -> str:
        shared = f" ({self.physical_cores} physical)" if self.physical_cores else ""
        governor = f", {self.governor} governor" if self.governor else ""
        load = "" if self.load is None else f", load {self.load:.1f}"
        features = " ".join(self.features) or "features unknown"
        virtual = f" in {' + '.join(self.virtual)}" if self.virtual else ""
        return f"{self.cpu}, {self.cores} core(s){shared}{virtual}, {features}{governor}{load}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "features": list(self.features), "virtual": list(self.virtual)}

    def warnings(self) -> tuple[str, ...]:
        """Return what about this machine, now, makes timings less trustworthy."""
        found = list(self.limits())
        if self.load is not None and self.load > self.cores:
            found.append(
                f"the machine is busy: load {self.load:.1f} on {self.cores} core(s) before we began"
            )
        return tuple(found)

    def limits(self) -> tuple[str, ...]:
        """Return what does so at all times."""
        found = []
        if self.quota_cores is not None and self.quota_cores < self.cores:
            found.append(f"a container's limit of {self.quota_cores:g} cores stops {self.cores} "
                         "threads from time to time")  # fmt: skip
        return tuple(found)


# What decides about speed here: SIMD widths, FMA, and the dot products that INT8 kernels use.
_TELLING = {"sse4_1", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16",
            "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp",
            "i8mm", "bf16", "sve", "sve2"}  # fmt: skip
_PACKAGES = ("edgelab", "wasmtime", "onnxruntime", "openvino", "ai-edge-litert", "onnx", "numpy",
             "pillow")  # fmt: skip
_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE",
             "OPENBLAS_L2_SIZE", "MKL_NUM_THREADS", "PYTHONMALLOC", "MALLOC_ARENA_MAX",
             "LD_PRELOAD")  # fmt: skip
_CPUS, _CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
_PROC_STAT = Path("/proc/stat")


def fingerprint(*, threads: int | None = None) -> Fingerprint:
    """Describe this machine, now.

    Parameters
    ----------
    threads : int, optional
        Threads that the timed code was told to use; None if it chose for itself.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    given = {name: plain_text(os.environ[name]) for name in _SETTINGS if name in os.environ}
    return Fingerprint(
        cpu=plain_text(_cpu_name()),
        cores=available_cores(),
        physical_cores=_physical_cores(),
        quota_cores=_quota_cores(),
        features=tuple(f for f in cpu_features() if f in _TELLING),
        governor=_governor(),
        turbo=_turbo(),
        memory_bytes=_memory_bytes(),
        virtual=_virtual(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=sys.version.split()[0],
        versions=versions,
        threads={"threads": "default" if threads is None else str(threads), **given},
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        taken=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def resident_bytes() -> int | None:
    """Return how much of this process lies in memory now (RSS); None where that is not told.

    What the C library keeps of freed memory, to use it again, is given back first.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)
    pages = (_read("/proc/self/statm") or "").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


def plain_text(text: str) -> str:
    """One line of at most 300 printable characters, whatever a system or a file name says."""
    line = " ".join(text.split())[:300]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _read(path: str | Path) -> str | None:
    """A small file of the system, or None where it is not to be had."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16).strip()
    except OSError:
        return None


@functools.cache
def _cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":  # where platform.processor() says "arm", whichever it is
        try:
            query = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return platform.processor() or platform.machine()


def _physical_cores() -> int | None:
    """Cores that do not share their execution units, among those of this process."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    siblings = {
        _read(_CPUS / f"cpu{each}/topology/thread_siblings_list")
        for each in os.sched_getaffinity(0)
    }
    return None if None in siblings else len(siblings)


def _quota_cores() -> float | None:
    """Return the limit on CPU time of control groups: version 2, then version 1."""
    quota = (_read(_CGROUP / "cpu.max") or "").split()
    if not quota:
        quota = [_read(_CGROUP / f"cpu/cpu.cfs_{each}_us") or "" for each in ("quota", "period")]
    try:
        limit, period = (int(part) for part in quota)
    except ValueError:  # no limit, or no such file
        return None
    return limit / period if limit > 0 and period > 0 else None


def _governor() -> str | None:
    names = {_read(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {None}
    return " ".join(sorted(map(str, names))) or None


def _turbo() -> bool | None:
    for path, on in (("intel_pstate/no_turbo", "0"), ("cpufreq/boost", "1")):
        if (state := _read(_CPUS / path)) is not None:
            return state == on
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _virtual() -> tuple[str, ...]:
    """Cheap hints only; none of them proves anything."""
    hints = {
        "docker": Path("/.dockerenv").exists(),
        "podman": Path("/run/.containerenv").exists(),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "WSL": "microsoft" in platform.release().lower(),
        "hypervisor": "hypervisor" in cpu_features(),
    }
    return tuple(hint for hint, there in hints.items() if there)
