"""The command line as a person or a script meets it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgelab import results
from edgelab.doctor import CHECKS
from edgelab.models import example_image


def edgelab(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgelab", *arguments],
        cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip


def test_run_ends_with_the_stage_table_and_the_next_command() -> None:
    done = edgelab("run", "--repeats", "5")
    assert done.returncode == 0, done.stderr
    for stage in ("decode", "preprocess", "infer", "postprocess", "total"):
        assert f"\n   {stage}" in done.stdout
    assert "stop" in done.stdout
    assert "make lab" in done.stdout.splitlines()[-1]


def test_classify_prints_labels_for_each_picture(tmp_path: Path) -> None:
    copy = tmp_path / "ein Bild ü.jpg"
    shutil.copy(example_image(), copy)
    done = edgelab("classify", str(example_image()), str(copy), "--top", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stop") == 2
    assert len(done.stdout.splitlines()) == 6


def test_classify_json_is_one_object_a_line() -> None:
    done = edgelab("classify", str(example_image()), "--json", "--kernel", "scalar")
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert answer["top"][0]["label"] == "stop"
    assert answer["total_ms"] > answer["infer_ms"] > 0


def test_one_bad_picture_does_not_lose_the_others(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(example_image().read_bytes()[:1000])
    done = edgelab("classify", str(bad), str(tmp_path / "none.png"), str(example_image()))
    assert done.returncode == 1
    assert "stop" in done.stdout
    assert done.stderr.count("edgelab: error:") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "usage: edgelab"),
        (("fly",), 2, "invalid choice"),
        (("classify",), 2, "IMAGE"),
        (("classify", "x.jpg", "--top", "0"), 2, "not positive"),
        (("classify", "x.jpg", "--model", "no-such-model"), 1, "Known names: signs"),
        (("models", "info", "no-such-model"), 1, "Known names: signs"),
        (("guest", "build", "nothing"), 1, "The guests are"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: tuple[str, ...], code: int, text: str) -> None:
    done = edgelab(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command_and_an_example() -> None:
    text = edgelab("--help").stdout
    for word in [
        "run",
        "classify",
        "doctor",
        "guest",
        "models",
        "bench",
        "examples:",
        "environment:",
        "exit",
    ]:
        assert word in text


def test_models_list_and_info() -> None:
    listed = edgelab("models", "list").stdout
    assert "signs " in listed
    assert "mobilenetv2-12-int8" in listed
    info = json.loads(edgelab("models", "info", "signs").stdout)
    assert info["crop"] == 224
    assert len(info["labels"]) == 32


def test_bench_writes_json_draws_and_compares_with_what_was_there(tmp_path: Path) -> None:
    out, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    samples = tmp_path / "samples.json"
    first = edgelab("bench", "--repeats", "3", "--sections", "stages,wasi_nn", "--processes", "1",
                    "--json", str(out), "--keep", "--plot", str(picture),
                    "--pyperf", str(samples))  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "old:" not in first.stdout
    found = results.read(out)
    assert list(found.sections) == ["stages", "wasi_nn"]
    assert found.sections["stages"].rows[0].summary.count == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "benchmarks" in json.loads(samples.read_text())
    for part in ("file to first call", "no winner", "A/A check", f"written to {out}"):
        assert part in first.stdout

    again = edgelab("bench", "--repeats", "5", "--sections", "wasi_nn", "--processes", "2",
                    "--json", str(out), "--keep")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert results.read(results.previous(out)) == found
    (section,) = results.read(out).sections.values()
    rows = {row.name: row for row in section.rows}
    assert rows["inference"].summary.count == 6  # two processes of three rounds
    assert len(rows["inference"].process_ratios) == 2
    assert "left out: stages: only in the old run" in again.stdout
    assert "rows changed" in again.stdout

    out.write_text("{")
    damaged = edgelab("bench", "--repeats", "2", "--sections", "wasi_nn", "--processes", "1",
                      "--json", str(out), "--keep")  # fmt: skip
    assert damaged.returncode == 0
    assert "warning" in damaged.stderr
    assert "is not JSON" in damaged.stderr
    assert results.read(out).sections["wasi_nn"].rows[0].summary.count == 2
    assert results.previous(out).read_text() == "{"


def test_bench_times_kernels_with_what_they_execute(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = edgelab("bench", "--repeats", "3", "--sections", "kernels", "--processes", "1",
                   "--json", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results.read(out).sections
    assert list(found) == ["kernels_normalize", "kernels_resize", "kernels_preprocess"]
    rows = {row.name: row for row in found["kernels_normalize"].rows}
    assert rows["scalar"].facts["fuel"] > rows["simd128"].facts["fuel"] > 0  # type: ignore[operator]
    assert rows["scalar"].baseline == "simd128"


def test_bench_refuses_what_it_cannot_compare_before_it_times(tmp_path: Path) -> None:
    missing = edgelab("bench", "--against", str(tmp_path / "none.json"))
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
    assert missing.stdout == ""
    alone = edgelab("bench", "--keep")
    assert alone.returncode == 1
    assert "give both" in alone.stderr
    both = edgelab("bench", "--keep", "--against", "x.json")
    assert both.returncode == 2


def test_doctor_finds_this_machine_healthy(tmp_path: Path) -> None:
    done = edgelab("doctor", "--json")
    findings = {f["topic"]: f for f in json.loads(done.stdout)}
    assert set(findings) == set(CHECKS)
    assert [f for f in findings.values() if f["state"] == "failure"] == []
    assert done.returncode == 0
    assert "stop" in findings["classify"]["detail"]


def test_doctor_reports_a_cache_that_others_can_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aot").mkdir(mode=0o777)
    (tmp_path / "aot").chmod(0o777)
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path))
    done = edgelab("doctor")
    (line,) = [line for line in done.stdout.splitlines() if " cache " in line]
    assert line.startswith("warning")
    assert "chmod" in line
    assert done.returncode == 0
