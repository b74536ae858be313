"""Files of benchmark results: the schema holds, damage is refused, changes are called with care."""

import copy
import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyperf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab import bench, cli, plots, results
from edgelab.errors import EdgelabError
from edgelab.measure import Fingerprint, Ratio, Summary, compare, fingerprint, ratio
from edgelab.results import SAME, Change, Results, Row, Section, changes, merge, read

HERE = fingerprint()
SCHEMA = jsonschema.Draft202012Validator(json.loads(results.SCHEMA.read_text()))


def run_of(
    *factors: float, seed: int = 0, noise: float = 0.05, environment: Fingerprint | None = None
) -> Results:
    """Results of simulated rounds: row k takes `factors[k]` times as long as the baseline."""
    rng = np.random.default_rng(seed)
    drift = rng.lognormal(0, 0.3, 60)
    base = tuple((drift * rng.lognormal(0, noise, 60)).tolist())
    rows = [Row("base", Summary.of(base), samples_ms=base)]
    for place, factor in enumerate(factors):
        samples = tuple((factor * drift * rng.lognormal(0, noise, 60)).tolist())
        paired = ratio(samples, base)
        rows.append(Row(f"row {place}", Summary.of(samples), "base", paired, {"fuel": 7}, samples))
    section = Section("work", "Ein Lauf ü", {"model": "m", "threads": 2}, tuple(rows),
                      ratio(base, base), ("busy",))  # fmt: skip
    return Results(environment or fingerprint(threads=2), {"work": section})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "bench.json"


def written(path: Path, plain: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plain if isinstance(plain, str) else json.dumps(plain))
    return path


PLAIN = json.dumps(run_of(0.5, 2.0).to_dict())


def plain() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(PLAIN)
    return document


# --- the format -----------------------------------------------------------------------------------


def test_the_schema_is_one_and_real_results_follow_it(path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    values = np.arange(1000.0)
    measured = compare({"sum": values.sum, "max": values.max}, baseline="sum", repeats=6)
    section = Section.of(
        measured, name="numpy", title="NumPy", settings={"size": 1000, "note": None},
        facts={"max": {"reads": 1000, "exact": True}},
    )  # fmt: skip
    found = Results(measured.environment, {"numpy": section})
    found.write(path)
    document = json.loads(path.read_text())
    SCHEMA.validate(document)
    assert document["sections"]["numpy"]["rows"][1]["facts"]["exact"] is True
    assert document["sections"]["numpy"]["rows"][1]["facts"]["calls"] == measured.calls["max"]
    back = read(path)
    assert back.environment == found.environment
    assert back.to_dict() == found.to_dict()


def test_what_is_written_is_read_again(path: Path) -> None:
    before = run_of(0.5, 1.0, 3.0)
    before.write(path)
    after = read(path)
    assert after.to_dict() == before.to_dict()
    assert after.environment == before.environment
    for old, new in zip(before.sections["work"].rows, after.sections["work"].rows, strict=True):
        assert (new.name, new.summary, new.ratio, new.facts) == (
            old.name, old.summary, old.ratio, old.facts
        )  # fmt: skip
        np.testing.assert_allclose(new.samples_ms, old.samples_ms, rtol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]


def test_unknown_members_are_ignored(path: Path) -> None:
    document = plain()
    for place in (document, document["environment"], document["sections"]["work"],
                  document["sections"]["work"]["rows"][0]):  # fmt: skip
        place["a later addition"] = {"x": [1, None]}
    SCHEMA.validate(document)
    assert read(written(path, document)).to_dict() == plain()


def test_results_that_could_not_be_read_are_not_written(path: Path) -> None:
    good = run_of(0.5)
    for name, row in {
        "no number": Row("base", Summary(float("nan"), 1, 60)),
        "printable": Row("base\x1b[2J", Summary(1, 1, 60)),
        "does not have": Row("base", Summary(1, 1, 60), "nobody", Ratio(1, 1, 1, 60)),
    }.items():
        section = dataclasses.replace(good.sections["work"], rows=(row,))
        with pytest.raises(EdgelabError, match=rf"can't be written: .*(JSON compliant|{name})"):
            dataclasses.replace(good, sections={"work": section}).write(path)
    assert not path.parent.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(0.5).write(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run_of(0.7).write(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


# --- hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "the file is no object"),
        ("{}", "has no 'format'"),
        ('{"format": "x"}', "its format is not edgelab-bench"),
        ('{"stages": {}, "wasi_nn": {}}', "from before the documented format"),
        ('{"format": "edgelab-bench", "version": 2}', "newer than this edgelab's 1"),
        ('{"format": "edgelab-bench", "version": 0}', "none that this edgelab knows"),
        ('{"format": "edgelab-bench", "version": true}', "'version' of the file is no whole"),
        ('{"format": "edgelab-bench", "version": 1e0}', "'version' of the file is no whole"),
        ('{"a": 1, "a": 2}', "two members of one name"),
        ('{"format": NaN}', "holds NaN"),
        ('{"format": -Infinity}', "holds -Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "is not JSON"),  # Python refuses so many digits
        ('{"format": "\ud800"}', "'format' of the file is no printable"),
    ],
)
def test_other_files_are_refused_with_the_reason(path: Path, text: str, reason: str) -> None:
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogatepass") if "\ud800" not in text else
                     text.replace("\ud800", "\\ud800").encode())  # fmt: skip
    with pytest.raises(EdgelabError, match="Measure again") as caught:
        read(path)
    assert reason in str(caught.value)


def test_files_that_are_no_text_too_large_or_not_there_are_refused(path: Path) -> None:
    with pytest.raises(EdgelabError, match="cannot read"):
        read(path)
    path.parent.mkdir()
    with pytest.raises(EdgelabError, match="cannot read"):
        read(path.parent)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(EdgelabError, match="not UTF-8"):
        read(path)
    with open(path, "wb") as file:
        file.truncate(results._MOST_BYTES + 1)  # sparse
    with pytest.raises(EdgelabError, match="larger than"):
        read(path)


def leaves(value: Any, *trail: Any) -> Iterator[tuple[Any, ...]]:
    """The trail of keys to each value in a document, inner ones included."""
    if trail:
        yield trail
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], *trail, key)
    elif isinstance(value, list):
        for place in range(min(len(value), 3)):
            yield from leaves(value[place], *trail, place)


TRAILS = list(leaves(plain()))
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**400, 1e308, "", "text", "\x1b[2J", "a\nb", "x" * 3000, [],
    {}, [None], [[]], [-1], [1e300], {"x": {}}, {"\x07": 1}, [{}], list(range(10_001)), 2**53,
    2**70,
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(trail=st.sampled_from(TRAILS), odd=st.sampled_from([*ODD, "remove"]))
def test_a_changed_document_is_read_only_if_the_schema_holds(
    trail: tuple[Any, ...], odd: Any
) -> None:
    document = plain()
    place = document
    for key in trail[:-1]:
        place = place[key]
    if odd == "remove":
        del place[trail[-1]]
    else:
        place[trail[-1]] = copy.deepcopy(odd)
    try:
        results._parsed(json.dumps(document))
    except (results._DamagedError, ValueError):
        read_it = False
    else:
        read_it = True
    valid = SCHEMA.is_valid(document)
    assert valid or not read_it, f"{trail} = {odd!r} was read, and breaks the schema"
    # Beyond the schema: order of an interval, names that must be there or unlike, and text that
    # is not printable in other ways than the schema can say.
    if valid and not read_it:
        assert trail[-1] in ("name", "baseline", "low", "median", "high", "rows") or (
            "rows" in trail and isinstance(trail[-1], int)
        )


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=200), cut=st.integers(0, len(PLAIN)))
def test_no_bytes_bring_another_error(raw: bytes, cut: int) -> None:
    whole = PLAIN.encode()
    text = (whole[:cut] + raw + whole[cut + len(raw) :]).decode(errors="replace")
    try:
        found = results._parsed(text)
    except (results._DamagedError, ValueError):
        return
    SCHEMA.validate(found.to_dict())


def test_the_name_of_a_bad_row_is_not_sent_to_the_terminal(path: Path) -> None:
    document = plain()
    document["sections"]["work"]["rows"][1]["name"] = "\x1b]0;gotcha\x07"
    with pytest.raises(EdgelabError) as caught:
        read(written(path, document))
    assert str(caught.value).isprintable()
    document = plain()
    document["sections"]["\x1b]0;gotcha\x07"] = document["sections"]["work"]
    with pytest.raises(EdgelabError) as caught:
        read(written(path, document))
    assert str(caught.value).isprintable()


# --- what changed ---------------------------------------------------------------------------------


def test_a_run_compared_with_itself_has_no_change() -> None:
    found = changes(run_of(0.5, 2.0), run_of(0.5, 2.0))
    assert [c.verdict for c in found.rows] == ["no change"] * 2
    assert [c.factor.median for c in found.rows] == [1, 1]
    assert found.left_out == found.shifted == found.machine == found.software == ()
    assert "0 of 2 rows changed" in str(found)


def test_known_changes_are_found_by_ratio_not_by_time() -> None:
    slow_machine, seeds = 10.0, range(30)
    called = []
    for seed in seeds:
        old, new = run_of(0.5, 2.0, 1.0, seed=seed), run_of(0.4, 2.0, 1.3, seed=100 + seed)
        section = new.sections["work"]
        rows = tuple(
            dataclasses.replace(
                row, summary=Summary.of([slow_machine * each for each in row.samples_ms])
            )
            for row in section.rows
        )
        new = dataclasses.replace(new, sections={"work": dataclasses.replace(section, rows=rows)})
        called.append([c.verdict for c in changes(old, new).rows])
    assert all(each[0] == "faster" and each[2] == "slower" for each in called)
    assert sum(each[1] != "no change" for each in called) <= 4  # 5 % of 30 are 1.5


def test_the_interval_of_a_change_holds_the_true_change_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(150):
        old, new = run_of(0.5, seed=seed, noise=0.1), run_of(0.6, seed=1000 + seed, noise=0.1)
        (change,) = changes(old, new).rows
        held += change.factor.low <= 1.2 <= change.factor.high
    assert held / 150 >= 0.9  # 95 % is promised; less than 0.9 has a chance of 1 % then


def test_the_interval_of_a_change_follows_the_published_formula() -> None:
    old, new = Ratio(0.50, 0.45, 0.60, 60), Ratio(0.75, 0.70, 0.85, 40)
    rows = (Row("base", Summary(1, 1, 60)), Row("row", Summary(1, 1, 60), "base", old))
    then = Results(fingerprint(), {"s": Section("s", "", {}, rows)})
    rows = (rows[0], dataclasses.replace(rows[1], ratio=new))
    now = Results(then.environment, {"s": Section("s", "", {}, rows)})
    (change,) = changes(then, now).rows
    # Zou and Donner 2008, for the difference of the logarithms
    a, b = np.log([0.75, 0.70, 0.85]), np.log([0.50, 0.45, 0.60])
    low = a[0] - b[0] - np.sqrt((a[0] - a[1]) ** 2 + (b[2] - b[0]) ** 2)
    high = a[0] - b[0] + np.sqrt((a[2] - a[0]) ** 2 + (b[0] - b[1]) ** 2)
    assert change.factor.median == pytest.approx(1.5)
    assert change.factor.low == pytest.approx(np.exp(low))
    assert change.factor.high == pytest.approx(np.exp(high))
    assert change.factor.count == 40


@pytest.mark.parametrize(
    ("factor", "width", "verdict"),
    [
        (1 + SAME - 0.001, 0.001, "no change"),  # certain, and too small to mean anything
        (1 + SAME + 0.01, 0.001, "slower"),
        (1 / (1 + SAME) + 0.001, 0.001, "no change"),
        (1 / (1 + SAME) - 0.01, 0.001, "faster"),
        (1.2, 0.3, "no change"),  # large, and not certain
    ],
)
def test_a_change_is_called_beyond_its_interval_and_beyond_what_runs_differ_by(
    factor: float, width: float, verdict: str
) -> None:
    same = Ratio(1, 1, 1, 60)
    change = Change(
        "s", "r", "b", same, same, Ratio(factor, factor - width, factor + width, 60), True
    )
    assert change.verdict == verdict
    assert change.to_dict()["verdict"] == verdict


def test_what_cannot_be_compared_is_named() -> None:
    old, new = run_of(0.5, 2.0), run_of(0.5)
    section = new.sections["work"]
    moved = dataclasses.replace(section, name="other")
    found = changes(old, dataclasses.replace(new, sections={"work": section, "other": moved}))
    assert found.left_out == ("work: row 1 is only in the old run", "other: only in the new run")
    foreign = dataclasses.replace(section, settings={"model": "n", "threads": 2})
    found = changes(new, dataclasses.replace(new, sections={"work": foreign}))
    assert found.rows == ()
    assert found.left_out == ("work: other settings, model m → n",)
    assert "nothing to compare" in str(found)
    rows = (*section.rows, dataclasses.replace(section.rows[0], name="base 2"))
    rebased = tuple(dataclasses.replace(r, baseline="base 2") if r.baseline else r for r in rows)
    found = changes(
        new, dataclasses.replace(new, sections={"work": dataclasses.replace(section, rows=rebased)})
    )
    assert found.left_out == ("work: row 0 has another baseline",)


def test_a_baseline_that_moved_is_told() -> None:
    old, new = run_of(0.5), run_of(0.5)
    section = new.sections["work"]
    base = section.rows[0]
    slow = dataclasses.replace(base, summary=Summary.of([2 * each for each in base.samples_ms]))
    moved = dataclasses.replace(section, rows=(slow, section.rows[1]))
    found = changes(old, dataclasses.replace(new, sections={"work": moved}))
    assert found.shifted == ("work: base itself took 2.00 times as long as before",)
    assert found.shifted[0] in str(found)


def other_machine(**fields: Any) -> Results:
    return run_of(0.5, environment=dataclasses.replace(fingerprint(threads=2), **fields))


def test_machines_and_versions_that_differ_are_told_apart() -> None:
    here = run_of(0.5)
    there = other_machine(cpu="Abacus 3", features=("beads",))
    found = changes(here, there)
    assert any(each.startswith("cpu ") and each.endswith("→ Abacus 3") for each in found.machine)
    assert any(each.endswith("→ beads") for each in found.machine)
    assert found.software == ()
    assert "warning: another machine: cpu" in str(found)
    newer = other_machine(versions={**here.environment.versions, "numpy": "99"})
    found = changes(here, newer)
    assert found.machine == ()
    assert [each.split()[0] for each in found.software] == ["numpy"]
    loaded = other_machine(load=99.0, taken="1999-01-01T00:00:00+00:00")
    found = changes(here, loaded)
    assert found.machine == found.software == ()


# --- several processes ----------------------------------------------------------------------------

# From scipy.stats: ttest_1samp, and ttest_ind(equal_var=False), both on the logarithms. The latter
# with degrees of freedom rounded down, 9.99 to 9, as with a printed table.
OLD, NEW = (0.50, 0.53, 0.49, 0.52, 0.51), (0.60, 0.58, 0.66, 0.61, 0.59, 0.63, 0.62)
OLD_MEAN, OLD_INTERVAL = 0.5098038310244419, (0.4905423721210995, 0.5298216033884972)
FACTOR, FACTOR_INTERVAL = 1.201163782421102, (1.1441376285170202, 1.2610322361919468)


def one_process(factor: float, **facts: Any) -> Results:
    """A process whose rounds all have the same ratio."""
    base = Row("base", Summary(2.0, 2.0, 3), samples_ms=(2.0,) * 3)
    samples = (2.0 * factor,) * 3
    paired = Ratio(factor, factor, factor, 3)
    row = Row("row", Summary.of(samples), "base", paired, {"fuel": 7, **facts}, samples)
    section = Section("s", "Work", {"model": "m"}, (base, row), Ratio(1, 1, 1, 3))
    return Results(HERE, {"s": section})


def test_processes_are_merged_by_students_interval(path: Path) -> None:
    merged = merge([one_process(each) for each in OLD])
    row = merged.sections["s"].rows[1]
    assert row.process_ratios == OLD
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(OLD_MEAN)
    assert (row.ratio.low, row.ratio.high) == pytest.approx(OLD_INTERVAL, rel=1e-4)
    assert row.ratio.count == row.summary.count == len(row.samples_ms) == 15
    assert row.ratio.verdict == "faster"
    assert row.facts == {"fuel": 7}
    assert "5 processes" in merged.sections["s"].title
    merged.write(path)
    SCHEMA.validate(json.loads(path.read_text()))
    assert read(path).sections["s"].rows[1].process_ratios == OLD


def test_two_runs_of_several_processes_are_compared_by_welchs_interval() -> None:
    old, new = (merge([one_process(each) for each in ratios]) for ratios in (OLD, NEW))
    (change,) = changes(old, new).rows
    assert change.several
    assert change.factor.median == pytest.approx(FACTOR)
    assert (change.factor.low, change.factor.high) == pytest.approx(FACTOR_INTERVAL, rel=1e-4)
    assert change.verdict == "slower"
    assert "use --processes" not in str(changes(old, new))
    assert "use --processes" in str(changes(old, one_process(0.6)))
    same = merge([one_process(0.5)] * 4)
    (change,) = changes(same, same).rows
    assert (change.factor.low, change.factor.high, change.verdict) == (1, 1, "no change")


def test_what_differs_from_process_to_process_is_no_change() -> None:
    """Each process is lucky or not by up to a tenth, however many rounds it has."""
    called = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        old, new = (
            merge([one_process(0.5 * rng.uniform(0.95, 1.05)) for _ in range(8)]) for _ in range(2)
        )
        (change,) = changes(old, new).rows
        called += change.verdict != "no change"
    assert called <= 12  # 5 are promised; more than 12 have a chance of less than 1 % then


def test_a_real_change_is_found_over_processes() -> None:
    found = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        old, new = (
            merge([one_process(middle * rng.uniform(0.95, 1.05)) for _ in range(8)])
            for middle in (0.5, 0.55)
        )
        (change,) = changes(old, new).rows
        found += change.verdict == "slower"
    assert found >= 48


def test_facts_and_warnings_of_processes_are_merged() -> None:
    runs = [one_process(0.5, added=each, note="x", odd=None) for each in (3.0, 9.0, 4.0)]
    noisy = dataclasses.replace(
        runs[0].sections["s"], warnings=("drift", "base differs from itself (1.1)")
    )
    runs[0] = dataclasses.replace(runs[0], sections={"s": noisy})
    for place, share in ((1, "12.5"), (2, "30")):
        told = dataclasses.replace(runs[place].sections["s"], warnings=("busy", f"others {share}%"))
        runs[place] = dataclasses.replace(runs[place], sections={"s": told})
    section = merge(runs).sections["s"]
    assert section.rows[1].facts == {"fuel": 7, "added": 4.0, "note": "x", "odd": None}
    assert section.warnings == (
        "in 1 of 3 processes: drift", "in 2 of 3 processes: busy",
        "in 2 of 3 processes: others 12.5%",
    )  # fmt: skip
    assert section.noise == Ratio(1, 1, 1, 9)
    assert "added" in str(section)
    assert "odd" not in str(section)
    uneven = [
        dataclasses.replace(
            run, sections={"s": dataclasses.replace(run.sections["s"], noise=Ratio(n, n, n, 3))}
        )
        for run, n in zip(runs, (1.1, 1.11, 1.12), strict=True)
    ]
    assert (
        merge(uneven)
        .sections["s"]
        .warnings[-1]
        .startswith("the A/A check differs from itself (1.11 [")
    )


def test_processes_that_timed_other_rows_are_refused() -> None:
    other = dataclasses.replace(one_process(0.5), sections={})
    with pytest.raises(EdgelabError, match="did not time the same rows"):
        merge([one_process(0.5), other])
    assert merge([other]) == other


def test_a_failing_process_says_why() -> None:
    with pytest.raises(EdgelabError, match="no section 'nothing'; the sections are"):
        bench.in_processes(2, ["--sections=nothing"])


# --- the command ----------------------------------------------------------------------------------


def judged(tmp_path: Path, old: Results, new: Results, *arguments: str) -> int:
    files = tmp_path / "old.json", tmp_path / "new.json"
    for found, path in zip((old, new), files, strict=True):
        found.write(path)
    return cli.main(["bench", "--compare", *map(str, files), *arguments])


def test_the_exit_code_says_whether_a_row_became_too_slow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, slower = run_of(0.5, 1.0), run_of(0.6, 1.0, seed=1)
    assert judged(tmp_path, old, slower) == 0  # only on demand
    assert judged(tmp_path, old, slower, "--fail-above", "1.5") == 0
    assert judged(tmp_path, slower, old, "--fail-above", "1.10") == 0  # faster is no failure
    capsys.readouterr()
    assert judged(tmp_path, old, slower, "--fail-above", "1.10") == 1
    out, err = capsys.readouterr()
    assert "1 of 2 rows changed" in out
    assert "work: row 0 is slower by 1.19 [1.17, 1.23], more than 1.1" in err


def test_noise_alone_is_no_failure(tmp_path: Path) -> None:
    old, new = run_of(0.5, noise=0.9), run_of(0.56, seed=4, noise=0.9)
    (change,) = changes(old, new).rows
    assert change.factor.median > 1.1 or change.factor.high > 1.1
    assert judged(tmp_path, old, new, "--fail-above", "1.0") == 0


def test_two_machines_are_not_judged_unless_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = run_of(0.4), other_machine(cpu="Abacus 3")
    assert judged(tmp_path, old, new) == 0
    assert "warning: another machine" in capsys.readouterr().out
    assert judged(tmp_path, old, new, "--fail-above", "1.10") == 1
    assert "can't judge runs of two machines" in capsys.readouterr().err
    assert judged(tmp_path, old, new, "--fail-above", "1.10", "--any-machine") == 1
    assert "slower by" in capsys.readouterr().err
    assert judged(tmp_path, old, new, "--fail-above", "2", "--any-machine") == 0


def test_nothing_to_judge_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = dataclasses.replace(run_of(0.5), sections={})
    assert judged(tmp_path, empty, empty) == 0
    assert judged(tmp_path, empty, empty, "--fail-above", "1.1") == 1
    assert "nothing to judge" in capsys.readouterr().err


def test_a_damaged_file_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    run_of(0.5).write(good)
    bad.write_text('{"stages": {}}')
    assert cli.main(["bench", "--compare", str(bad), str(good)]) == 1
    assert "from before the documented format" in capsys.readouterr().err


# --- shown ----------------------------------------------------------------------------------------


def test_every_table_shows_verdicts_and_warnings() -> None:
    found, later = run_of(0.5, 1.0), run_of(0.5, 1.5, seed=1)
    for text in (str(found), found._repr_html_()):
        for part in ("faster", "no winner", "A/A check", "busy", "baseline"):
            assert part in text
    difference = changes(found, later)
    for text in (str(difference), difference._repr_html_()):
        for part in ("slower", "no change", "1 of 2 rows changed", "row 1"):
            assert part in text
    assert found._repr_html_().startswith("<table><caption>")
    assert json.loads(json.dumps(difference.to_dict()))["rows"][1]["verdict"] == "slower"


def test_html_escapes_names() -> None:
    rows = (Row("<b>", Summary(1, 1, 1)),)
    section = Section("<i>", "<u>", {}, rows)
    page = section._repr_html_()
    assert not [name for name in ("<b>", "<i>", "<u>") if name in page]


def test_the_plot_says_in_words_what_it_shows() -> None:
    drawn = plots.ratios(run_of(0.5, 1.0, 2.0))
    assert drawn.png.startswith(b"\x89PNG")
    assert "3 ratios" in drawn.alt
    assert "1 faster than their baseline, 1 slower, for 1 no winner" in drawn.alt
    assert [row[1] for row in drawn.table.rows] == ["row 0", "row 1", "row 2"]
    assert plots.ratios(dataclasses.replace(run_of(), sections={})).png


# --- pyperf ---------------------------------------------------------------------------------------


def test_pyperf_reads_the_samples_and_compares_them(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.write_pyperf(run_of(0.5, 2.0), old)
    results.write_pyperf(run_of(0.25, 2.0, seed=0), new)
    suite = pyperf.BenchmarkSuite.load(str(old))
    assert suite.get_benchmark_names() == ["work: base", "work: row 0", "work: row 1"]
    samples = run_of(0.5, 2.0).sections["work"].rows[1].samples_ms
    np.testing.assert_allclose(
        suite.get_benchmark("work: row 0").get_values(), np.array(samples) / 1e3
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyperf", "compare_to", str(old), str(new)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "work: row 0" in done.stdout
    assert "faster" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.json", "old.json"]


def test_pyperf_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgelabError, match="no samples"):
        results.write_pyperf(dataclasses.replace(run_of(), sections={}), tmp_path / "x.json")
    monkeypatch.setitem(sys.modules, "pyperf", None)
    with pytest.raises(EdgelabError, match="pip install pyperf"):
        results.write_pyperf(run_of(0.5), tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
