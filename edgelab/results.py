"""Benchmark results as a file: written, read with suspicion, compared with earlier ones, drawn.

The format is described in docs/benchmarks.md and, for programs, in ``bench.schema.json`` beside
this module. All sections have one form, so that none needs code of its own here.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from edgelab.errors import EdgelabError
from edgelab.measure import (
    UNLIKE_ITSELF,
    Comparison,
    Fingerprint,
    Ratio,
    Summary,
    duration,
    html_table,
    text_table,
)
from edgelab.paths import write_atomic

FORMAT, VERSION = "edgelab-bench", 1
SCHEMA = Path(__file__).with_name("bench.schema.json")
"""The JSON Schema of the format."""

Fact = str | int | float | bool | None
"""What may be said of a row or a section beside its times."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was timed.

    Attributes
    ----------
    name : str
    summary : Summary
    baseline : str or None
        Row of the same section that `ratio` compares with.
    ratio : Ratio or None
        This row over its baseline.
    facts : dict of str to Fact
        For example how many instructions it executes.
    samples_ms : tuple of float
        Time of one call, by round, process after process; may be empty.
    process_ratios : tuple of float
        If it was timed in several processes: the median ratio of each.
    """

    name: str
    summary: Summary
    baseline: str | None = None
    ratio: Ratio | None = None
    facts: dict[str, Fact] = field(default_factory=dict)
    samples_ms: tuple[float, ...] = field(default=(), repr=False)
    process_ratios: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "name": self.name,
            **self.summary.to_dict(),
            "baseline": self.baseline,
            "ratio": self.ratio.to_dict() if self.ratio else None,
            "facts": dict(self.facts),
            "samples_ms": [_rounded(each) for each in self.samples_ms],
            "process_ratios": list(self.process_ratios),
        }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # a timer tells no more digits apart


@dataclass(frozen=True, slots=True)
class Section:
    """Rows that belong together.

    Attributes
    ----------
    name : str
        Key of the section, such as ``stages``.
    title : str
        One line for people.
    settings : dict of str to Fact
        What was timed: model, its hash, threads, rounds. Sections with other settings are not
        compared.
    rows : tuple of Row
    noise : Ratio or None
        A baseline over itself: the A/A check.
    warnings : tuple of str
    """

    name: str
    title: str
    settings: dict[str, Fact]
    rows: tuple[Row, ...]
    noise: Ratio | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        *,
        name: str,
        title: str,
        settings: Mapping[str, Fact],
        facts: Mapping[str, Mapping[str, Fact]] | None = None,
    ) -> Section:
        """Make a section of what `measure.compare` found.

        Parameters
        ----------
        comparison : Comparison
        name, title : str
        settings : mapping
        facts : mapping of str to mapping, optional
            Row → what else is known of it.
        """
        rows = tuple(
            Row(
                row,
                summary,
                None if row == comparison.baseline else comparison.baseline,
                None if row == comparison.baseline else comparison.ratios[row],
                {"calls": comparison.calls[row], **(facts or {}).get(row, {})},
                comparison.samples_ms[row],
            )
            for row, summary in comparison.summaries.items()
        )
        return cls(name, title, dict(settings), rows, comparison.noise, comparison.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "title": self.title,
            "settings": dict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "noise": self.noise.to_dict() if self.noise else None,
            "warnings": list(self.warnings),
        }

    def _shown(self) -> list[str]:
        """Facts that are worth a column."""
        return [
            fact
            for fact in dict.fromkeys(fact for row in self.rows for fact in row.facts)
            if fact != "calls" and any(row.facts.get(fact) is not None for row in self.rows)
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        compared = {row.baseline for row in self.rows}
        return [
            (
                row.name,
                duration(row.summary.median_ms),
                duration(row.summary.p95_ms),
                row.baseline or "",
                str(row.ratio) if row.ratio else "",
                row.ratio.verdict if row.ratio else "baseline" if row.name in compared else "",
                *(_shown(row.facts.get(fact)) for fact in self._shown()),
            )
            for row in self.rows
        ]

    def _notes(self) -> list[str]:
        noise = [f"A/A check: {self.noise}, {self.noise.verdict}"] if self.noise else []
        return [*noise, *(f"warning: {each}" for each in self.warnings)]

    def __str__(self) -> str:
        lines = text_table((*self._columns(), *self._shown()), self._cells(), left=(0, 3, 4, 5))
        return "\n".join([self.title, *lines, *self._notes()])

    def _repr_html_(self) -> str:
        caption = "; ".join([self.title, *self._notes()])
        return html_table(caption, (*self._columns(), *self._shown()), self._cells())

    def _columns(self) -> tuple[str, ...]:
        return self.name, "median", "p95", "compared with", "ratio", "verdict"


def _shown(value: Fact) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Results:
    """All that one run of the benchmark found.

    Attributes
    ----------
    environment : Fingerprint
    sections : dict of str to Section
    """

    environment: Fingerprint
    sections: dict[str, Section]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, in the documented format."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "environment": self.environment.to_dict(),
            "sections": {name: section.to_dict() for name, section in self.sections.items()},
        }

    def write(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises
        ------
        EdgelabError
            If `read` would not take it.
        """
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            _parsed(text)
        except (_DamagedError, ValueError) as error:
            raise EdgelabError(f"these results can't be written: {error}") from None
        write_atomic(path, (text + "\n").encode())

    def __str__(self) -> str:
        return "\n\n".join([str(self.environment), *map(str, self.sections.values())])

    def _repr_html_(self) -> str:
        return "".join(section._repr_html_() for section in self.sections.values())


# --- reading --------------------------------------------------------------------------------------

_MOST_BYTES = 32 * 1024 * 1024
_MOST_ENTRIES = 10_000  # in a list or an object
_LONGEST_TEXT = 2000


def read(path: Path) -> Results:
    """Read a file of results. Its bytes may come from anyone.

    Raises
    ------
    EdgelabError
        If it can't be read, is no such file, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise EdgelabError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) > _MOST_BYTES:
        raise EdgelabError(f"{path} is larger than {_MOST_BYTES:,} bytes: no results of edgelab")
    try:
        return _parsed(raw.decode())
    except _DamagedError as error:
        reason = str(error)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = f"it is not JSON ({error})"
    raise EdgelabError(
        f"{path} can't be compared with: {reason}. Measure again with "
        "`python -m edgelab bench --json FILE`."
    )


def _parsed(text: str) -> Results:
    plain = json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    return _results(plain)


class _DamagedError(Exception):
    """What is wrong, as the end of a sentence."""


def _no_number(text: str) -> NoReturn:
    raise _DamagedError(f"it holds {text}, which is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise _DamagedError("an object has two members of one name")
    return found


def previous(path: Path) -> Path:
    """Where the results that `path` held before are kept: ``x.json``, ``x.previous.json``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _results(plain: Any) -> Results:
    if isinstance(plain, dict) and "format" not in plain and {"stages", "wasi_nn"} & plain.keys():
        raise _DamagedError("an edgelab from before the documented format wrote it")
    top = _Reader(plain, "the file")
    if top.text("format") != FORMAT:
        raise _DamagedError(f"its format is not {FORMAT}")
    version = top.count("version")
    if version > VERSION:
        raise _DamagedError(f"its version {version} is newer than this edgelab's {VERSION}")
    if version < VERSION:
        raise _DamagedError(f"its version {version} is none that this edgelab knows")
    sections = top.member("sections")
    return Results(
        _environment(top.member("environment")),
        {name: _section(name, sections.member(name)) for name in sections.names()},
    )


def _section(name: str, plain: _Reader) -> Section:
    rows = tuple(map(_row, plain.members("rows")))
    names = {row.name for row in rows}
    if len(names) < len(rows):
        raise _DamagedError(f"{plain.where} has two rows of one name")
    for row in rows:
        if row.baseline is not None and row.baseline not in names - {row.name}:
            raise _DamagedError(f"{plain.where} compares with a row that it does not have")
    noise = plain.optional("noise")
    return Section(
        name,
        plain.text("title"),
        plain.facts("settings"),
        rows,
        _ratio(noise) if noise else None,
        plain.texts("warnings"),
    )


def _row(plain: _Reader) -> Row:
    compared, baseline = plain.optional("ratio"), plain.optional_text("baseline")
    if (compared is None) != (baseline is None):
        raise _DamagedError(f"{plain.where} has a ratio or a baseline without the other")
    return Row(
        plain.text("name"),
        Summary(plain.number("median_ms"), plain.number("p95_ms"), plain.count("count")),
        baseline,
        _ratio(compared) if compared else None,
        plain.facts("facts"),
        plain.numbers("samples_ms"),
        plain.positives("process_ratios"),
    )


def _ratio(plain: _Reader) -> Ratio:
    low, median, high = (plain.number(name) for name in ("low", "median", "high"))
    if not 0 < low <= median <= high:
        raise _DamagedError(f"in {plain.where} low, median and high are not in this order")
    plain.optional_verdict("verdict")  # worked out anew from the rest
    return Ratio(median, low, high, plain.count("count"))


def _environment(plain: _Reader) -> Fingerprint:
    kinds: dict[str, Callable[[str], Any]] = {
        "str": plain.text,
        "str | None": plain.optional_text,
        "int": plain.count,
        "int | None": lambda name: plain.or_none(name, plain.count),
        "float | None": lambda name: plain.or_none(name, plain.number),
        "bool | None": plain.optional_bool,
        "tuple[str, ...]": plain.texts,
        "dict[str, str]": plain.text_members,
    }
    return Fingerprint(
        **{each.name: kinds[str(each.type)](each.name) for each in fields(Fingerprint)}
    )


class _Reader:
    """An object of the file; each method takes a member of one type, or says what is wrong."""

    def __init__(self, plain: Any, where: str) -> None:
        if not isinstance(plain, dict):
            raise _DamagedError(f"{where} is no object")
        if len(plain) > _MOST_ENTRIES:
            raise _DamagedError(f"{where} has more than {_MOST_ENTRIES:,} members")
        self._plain, self.where = plain, where

    def _get(self, name: str) -> Any:
        try:
            return self._plain[name]
        except KeyError:
            raise _DamagedError(f"{self.where} has no {name!r}") from None

    def _wrong(self, name: str, kind: str) -> NoReturn:
        raise _DamagedError(f"{name!r} of {self.where} is no {kind}")

    def names(self) -> list[str]:
        return [self._is_text(name, "a name") for name in self._plain]

    def _is_text(self, value: Any, name: str) -> str:
        # It goes to a terminal: nothing in it may command that.
        if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
            self._wrong(name, f"printable text of at most {_LONGEST_TEXT} characters")
        return value

    def _is_number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(name, "number")
        if not 0 <= value < 1e15:  # also refuses infinity, as which JSON's 1e999 is read
            self._wrong(name, "number from 0 to 1e15")
        return float(value)

    def _list(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list) or len(value) > _MOST_ENTRIES:
            self._wrong(name, f"list of at most {_MOST_ENTRIES:,} entries")
        return value

    def text(self, name: str) -> str:
        return self._is_text(self._get(name), name)

    def number(self, name: str) -> float:
        return self._is_number(self._get(name), name)

    def count(self, name: str) -> int:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
            self._wrong(name, "whole number from 0 to 2^53")
        return value

    def or_none(self, name: str, kind: Callable[[str], Any]) -> Any:
        return None if self._get(name) is None else kind(name)

    def optional_text(self, name: str) -> str | None:
        return None if self._get(name) is None else self.text(name)

    def optional_verdict(self, name: str) -> None:
        if self._plain.get(name, "no winner") not in ("faster", "slower", "no winner"):
            self._wrong(name, "verdict")

    def optional_bool(self, name: str) -> bool | None:
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            self._wrong(name, "true, false or null")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._is_text(each, name) for each in self._list(name))

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(self._is_number(each, name) for each in self._list(name))

    def positives(self, name: str) -> tuple[float, ...]:
        if 0 in (found := self.numbers(name)):
            self._wrong(name, "list of positive numbers")
        return found

    def text_members(self, name: str) -> dict[str, str]:
        inner = self.member(name)
        return {each: inner.text(each) for each in inner.names()}

    def facts(self, name: str) -> dict[str, Fact]:
        inner = self.member(name)
        return {each: inner._fact(each) for each in inner.names()}

    def _fact(self, name: str) -> Fact:
        value = self._get(name)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self.text(name)
        if not isinstance(value, (int, float)) or not abs(value) < 1 << 64:
            self._wrong(name, "text, number, true, false or null")
        return value

    def member(self, name: str) -> _Reader:
        return _Reader(self._get(name), f"{name!r}")

    def optional(self, name: str) -> _Reader | None:
        return None if self._get(name) is None else self.member(name)

    def members(self, name: str) -> list[_Reader]:
        listed = self._list(name)
        return [
            _Reader(each, f"{name!r} of {self.where}, entry {k}") for k, each in enumerate(listed)
        ]


# --- several processes ----------------------------------------------------------------------------


def merge(runs: Sequence[Results]) -> Results:
    """Put the results of several processes together, which ran the same on one machine.

    Parameters
    ----------
    runs : sequence of Results
        At least one.

    Raises
    ------
    EdgelabError
        If they have other sections or rows.

    Notes
    -----
    Where code and data happen to lie differs from process to process, and some loops run a tenth
    faster or slower for that: no number of rounds in one process can show it. So a ratio is the
    geometric mean of the processes' medians, with Student's interval on their logarithms
    (Kalibera and Jones, *Rigorous benchmarking in reasonable time*, ISMM 2013, on repeating at the
    highest level that varies).
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    shapes = {
        tuple((name, tuple(row.name for row in s.rows)) for name, s in run.sections.items())
        for run in runs
    }
    if len(shapes) > 1:
        raise EdgelabError("the processes did not time the same rows; please report this")
    sections = {
        name: _merged([run.sections[name] for run in runs], len(runs)) for name in first.sections
    }
    return Results(first.environment, sections)


_NUMBER = re.compile(r"[0-9.]+")


def _merged(sections: Sequence[Section], count: int) -> Section:
    first = sections[0]
    rows = tuple(map(_merged_row, zip(*(section.rows for section in sections), strict=True)))
    noise = [section.noise for section in sections if section.noise]
    told: dict[str, list[str]] = {}  # warnings that differ in their numbers only are one
    for section in sections:
        for each in {_NUMBER.sub("0", each): each for each in section.warnings}.values():
            if UNLIKE_ITSELF not in each:  # one of twenty processes, by chance: all together count
                told.setdefault(_NUMBER.sub("0", each), []).append(each)
    warnings = [
        each[0] if each == each[:1] * count else f"in {len(each)} of {count} processes: {each[0]}"
        for each in told.values()
    ]
    together = _over_processes(noise) if len(noise) == count else None
    if together and together.verdict != "no winner":
        warnings.append(f"the A/A check {UNLIKE_ITSELF} ({together}), by chance or by noise")
    title = f"{first.title}; {count} processes"
    return Section(first.name, title, first.settings, rows, together, tuple(warnings))


def _merged_row(rows: tuple[Row, ...]) -> Row:
    first = rows[0]
    samples = tuple(each for row in rows for each in row.samples_ms)
    paired = [row.ratio for row in rows if row.ratio]
    return Row(
        first.name,
        Summary.of(samples),
        first.baseline,
        _over_processes(paired) if paired else None,
        {fact: _usual([row.facts.get(fact) for row in rows]) for fact in first.facts},
        samples,
        tuple(each.median for each in paired),
    )


def _usual(values: Sequence[Fact]) -> Fact:
    """The value that all have; of numbers that differ, the one in the middle."""
    numbers = sorted(v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    return numbers[len(numbers) // 2] if len(numbers) == len(values) else values[0]


def _over_processes(ratios: Sequence[Ratio]) -> Ratio:
    mean, error, freedom = _log_mean([each.median for each in ratios])
    half, rounds = _student(freedom) * error, sum(each.count for each in ratios)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), rounds)


def _log_mean(ratios: Sequence[float]) -> tuple[float, float, int]:
    """Mean of the logarithms, its standard error, and the degrees of freedom."""
    logs = [math.log(each) for each in ratios]
    return (
        statistics.fmean(logs),
        statistics.stdev(logs) / math.sqrt(len(logs)),
        len(logs) - 1,
    )


# Student's t for 95 %, two-sided, by degrees of freedom from 1; beyond 30 the last one, which is
# a little wide then.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045, 2.042)  # fmt: skip


def _student(freedom: float) -> float:
    return _T[min(max(int(freedom), 1), len(_T)) - 1]


# --- comparing ------------------------------------------------------------------------------------

SAME = 0.03
"""Changes up to this size are not called: two runs of the same code differ as much, for reasons
that no interval of one run can show, such as where its memory happens to lie."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row, then and now, each as a ratio to its baseline in the same run.

    Attributes
    ----------
    section, row, baseline : str
    old, new : Ratio
    factor : Ratio
        New over old; its count is the smaller of theirs.
    several : bool
        Whether both were timed in several processes, so that the interval holds what changes from
        one to the next.
    """

    section: str
    row: str
    baseline: str
    old: Ratio
    new: Ratio
    factor: Ratio
    several: bool

    @property
    def verdict(self) -> str:
        """Return ``faster`` or ``slower`` than before, or ``no change``.

        A change is called if the interval leaves out 1 and the change is larger than `SAME`.
        """
        called = self.factor.verdict
        small = 1 / (1 + SAME) <= self.factor.median <= 1 + SAME
        return "no change" if small or called == "no winner" else called

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "section": self.section,
            "row": self.row,
            "baseline": self.baseline,
            "old": self.old.to_dict(),
            "new": self.new.to_dict(),
            "factor": self.factor.to_dict(),
            "several": self.several,
            "verdict": self.verdict,
        }


_ONE_PROCESS = (
    "warning: not both runs had several processes, so these intervals lack what changes from one "
    "process to the next: use --processes"
)


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two runs.

    Attributes
    ----------
    rows : tuple of Change
    left_out : tuple of str
        What one of the two lacks, or what can't be compared, and why.
    shifted : tuple of str
        Baselines that took more than a tenth longer or shorter than before: the machine was in
        another state, or the baseline is not the same any more.
    machine : tuple of str
        How the machines differ. Ratios cancel a good deal of that, but not all.
    software : tuple of str
        How versions and settings differ; often the very thing that is to be compared.
    """

    rows: tuple[Change, ...]
    left_out: tuple[str, ...]
    shifted: tuple[str, ...]
    machine: tuple[str, ...]
    software: tuple[str, ...]

    def worse_than(self, factor: float) -> tuple[Change, ...]:
        """Return the rows that became slower by more than a factor, beyond doubt."""
        return tuple(c for c in self.rows if c.verdict == "slower" and c.factor.median > factor)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "left_out": list(self.left_out),
            "shifted": list(self.shifted),
            "machine": list(self.machine),
            "software": list(self.software),
        }

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (c.section, c.row, c.baseline, str(c.old), str(c.new), str(c.factor), c.verdict)
            for c in self.rows
        ]

    def _notes(self) -> list[str]:
        if not self.rows:
            called = "nothing to compare"
        else:
            changed = sum(c.verdict != "no change" for c in self.rows)
            called = f"{changed} of {len(self.rows)} rows changed"
        return [
            f"{called}; a change is called beyond its 95 % interval and {SAME:.0%}",
            *([_ONE_PROCESS] if not all(c.several for c in self.rows) else []),
            *(f"left out: {each}" for each in self.left_out),
            *(f"note: {each}" for each in self.shifted),
            *(f"warning: another machine: {each}" for each in self.machine),
            *(f"note: {each}" for each in self.software),
        ]

    def __str__(self) -> str:
        columns = ("section", "row", "to its baseline", "old ratio", "new ratio", "new / old", "")
        table = text_table(columns, self._cells(), left=range(7)) if self.rows else []
        return "\n".join([*table, *self._notes()])

    def _repr_html_(self) -> str:
        columns = ("section", "row", "baseline", "old", "new", "new / old", "verdict")
        return html_table("; ".join(self._notes()), columns, self._cells())


def changes(old: Results, new: Results) -> Changes:
    """Compare two runs, row by row, each as a ratio to its own baseline.

    Notes
    -----
    If both runs had several processes, the interval of new over old is Welch's, on the logarithms
    of the processes' ratios. If not, it comes from the two intervals by the method of variance
    estimates recovery, on logarithms too (Zou and Donner, *Statistics in Medicine* 27, 2008), and
    knows nothing of what changes from process to process: such changes are told as doubtful.
    """
    rows, left_out, shifted = list[Change](), list[str](), list[str]()
    for name in dict.fromkeys((*old.sections, *new.sections)):
        before, after = old.sections.get(name), new.sections.get(name)
        if before is None or after is None:
            left_out.append(f"{name}: only in the {'old' if after is None else 'new'} run")
            continue
        if other := _differences(before.settings, after.settings):
            left_out.append(f"{name}: other settings, {', '.join(other)}")
            continue
        then, now = ({r.name: r for r in s.rows if r.ratio} for s in (before, after))
        for row in dict.fromkeys((*then, *now)):
            if row not in then or row not in now:
                left_out.append(
                    f"{name}: {row} is only in the {'old' if row in then else 'new'} run"
                )
            elif then[row].baseline != now[row].baseline:
                left_out.append(f"{name}: {row} has another baseline")
            else:
                rows.append(_change(name, then[row], now[row]))
        shifted += _shifted(before, after)
    a, b = old.environment, new.environment
    machine = _differences(*({k: _plain(getattr(e, k)) for k in _MACHINE} for e in (a, b)))
    software = [
        *_differences(*({k: _plain(getattr(e, k)) for k in ("system", "python")} for e in (a, b))),
        *_differences(a.versions, b.versions),
        *_differences(a.threads, b.threads),
    ]
    return Changes(tuple(rows), tuple(left_out), tuple(shifted), tuple(machine), tuple(software))


def _shifted(old: Section, new: Section) -> Iterable[str]:
    times = [{row.name: row.summary.median_ms for row in s.rows} for s in (old, new)]
    for name in dict.fromkeys(row.baseline for row in new.rows):
        then, now = (each.get(name or "", 0) for each in times)
        if then and now and not 1 / 1.1 <= now / then <= 1.1:
            yield f"{new.name}: {name} itself took {now / then:.2f} times as long as before"


_MACHINE = ("cpu", "cores", "physical_cores", "quota_cores", "features", "governor", "turbo")


def _plain(value: Any) -> Fact:
    found: Fact = " ".join(value) if isinstance(value, tuple) else value
    return found


def _differences(old: Mapping[str, Fact], new: Mapping[str, Fact]) -> list[str]:
    names = dict.fromkeys((*old, *new))
    return [
        f"{name} {old.get(name, 'not given')} → {new.get(name, 'not given')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _change(section: str, old: Row, new: Row) -> Change:
    assert old.ratio
    assert new.ratio
    assert new.baseline
    rounds = min(old.ratio.count, new.ratio.count)
    several = len(old.process_ratios) > 1 and len(new.process_ratios) > 1
    if several:
        then, then_error, then_freedom = _log_mean(old.process_ratios)
        now, now_error, now_freedom = _log_mean(new.process_ratios)
        spread = then_error**2 + now_error**2
        parts = then_error**4 / then_freedom + now_error**4 / now_freedom
        half = _student(spread**2 / parts if parts else 1) * math.sqrt(spread)
        middle, down, up = now - then, half, half
    else:
        middle = math.log(new.ratio.median / old.ratio.median)
        down, up = (
            math.hypot(math.log(a.median / a.low), math.log(b.high / b.median))
            for a, b in ((new.ratio, old.ratio), (old.ratio, new.ratio))
        )
    factor, low, high = (math.exp(middle + each) for each in (0, -down, up))
    return Change(section, new.name, new.baseline, old.ratio, new.ratio,
                  Ratio(factor, low, high, rounds), several)  # fmt: skip


# --- for pyperf -----------------------------------------------------------------------------------


def write_pyperf(results: Results, path: Path) -> None:
    """Write the samples for `pyperf`, whose tools show, check and compare such files.

    Pyperf compares absolute times, and does not know of pairs or baselines: use it between runs on
    one quiet machine.

    Raises
    ------
    EdgelabError
        If pyperf is not installed, or there are no samples.
    """
    try:
        import pyperf
    except ImportError:
        raise EdgelabError("this needs pyperf: pip install pyperf") from None
    here = results.environment
    common = {"cpu_model_name": here.cpu, "platform": here.system, "python_version": here.python}
    common |= {f"{package}_version": each for package, each in here.versions.items()}
    suite = [
        pyperf.Benchmark([
            pyperf.Run(
                [each / 1e3 for each in row.samples_ms if each > 0],
                metadata={"name": f"{section.name}: {row.name}", "unit": "second",
                          "loops": row.facts.get("calls", 1), **common},
                collect_metadata=False,
            )
        ])
        for section, row in _all_rows(results)
        if any(each > 0 for each in row.samples_ms)
    ]  # fmt: skip
    if not suite:
        raise EdgelabError("there are no samples to write for pyperf")
    text = io.StringIO()
    pyperf.BenchmarkSuite(suite).dump(text)
    write_atomic(path, text.getvalue().encode())


def _all_rows(results: Results) -> Iterable[tuple[Section, Row]]:
    return ((section, row) for section in results.sections.values() for row in section.rows)
