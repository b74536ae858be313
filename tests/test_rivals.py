"""Other ways to run the model: all give its answer, and what can't run says why.

How fast they are is not tested.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_classify import tiny_by_numpy

from edgelab import images, models, rivals, runtimes
from edgelab.build import guest_path
from edgelab.cli import main
from edgelab.errors import EdgelabError, ModelError
from edgelab.measure import Ratio, Summary
from edgelab.paths import PACKAGE
from edgelab.preprocess import preprocess, resize_crop, softmax
from edgelab.rivals import RIVALS, RivalRow, RivalTable, measure_rivals
from edgelab.toolchain import Toolchain

# The first test builds what is missing: tract natively and as Wasm takes some minutes.
pytestmark = pytest.mark.timeout(2400)

SIGNS = models.load("signs")
ROOT = PACKAGE.parent
# WasmEdge needs a minute to compile a whole engine. Go would be 200 MB for CI to install, and shows
# the same library as C++: its row is tested where Go is.
SLOW, OPTIONAL = {"wasmedge"}, {"go"}
ROWS = [name for name in RIVALS if name not in SLOW]
each_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def table(rust: Toolchain) -> RivalTable:
    return measure_rivals(rows=ROWS, rounds=1, repeats=1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files that all rows read."""
    made = rivals._Case(SIGNS, tmp_path_factory.mktemp("ü rivals"), ROOT)
    rivals._write(made)
    return made


@pytest.fixture(scope="module")
def expected(case: Any) -> Any:
    return rivals._write(case)


def present(table: RivalTable, name: str) -> RivalRow:
    assert name not in table.wrong, table.wrong
    if name not in table:
        if os.environ.get("CI") and name not in OPTIONAL:
            pytest.fail(f"CI must run this row: {table.absent[name]}")
        pytest.skip(table.absent[name])
    return table[name]


# --- Every row ------------------------------------------------------------------------------------


@each_row
def test_each_row_is_measured_and_right(table: RivalTable, name: str) -> None:
    row = present(table, name)
    article = RIVALS[name].engine == rivals.ARTICLE
    assert len(row.cold_samples_ms) == row.cold_ratio.count == 1
    assert row.cold_ms.median_ms > 0
    assert (row.warm_ms is None) == (row.error is None) == article
    if row.error is not None:
        assert 0 <= row.error < 1e-3
    assert all(size > 0 for size in row.ships_bytes.values())
    model = models.load("signs-tiny") if article else SIGNS
    if name != "litert":
        assert row.ships_bytes["model"] == model.size_bytes
    assert row.size_bytes == sum(row.ships_bytes.values()) > model.size_bytes


def test_what_they_must_answer_is_what_others_compute(expected: Any) -> None:
    pixels = images.decode(models.example_image())
    session = onnxruntime.InferenceSession(SIGNS.data, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": preprocess(pixels, SIGNS.spec)})[0][0]
    assert np.abs(expected.logits - logits).max() < 1e-4
    assert expected.label == SIGNS.spec.labels[int(logits.argmax())] == "stop"
    tiny = softmax(tiny_by_numpy(resize_crop(pixels, SIGNS.spec.resize, SIGNS.spec.crop)))
    assert expected.confidence == pytest.approx(tiny.max(), abs=1e-5)


def test_what_ships_is_counted_once_and_with_its_libraries(table: RivalTable) -> None:
    for name in ("cpp", "wasmtime-cli", "node-cli"):
        row = present(table, name)
        assert row.size_bytes > 20_000_000  # a runtime is in it
    assert present(table, "rust").ships_bytes.keys() == {"program", "model"}
    bare, ours = present(table, "bare"), present(table, "wasi-nn")
    assert ours.ships_bytes["packages"] > bare.ships_bytes["packages"]
    assert ours.ships_bytes["Python"] == bare.ships_bytes["Python"]


# --- Rows that differ, and rows that are not there ------------------------------------------------


def numbers(values: Any) -> str:
    return " ".join(map(str, values))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("yield\n" + numbers(range(32)), "it sees 'yield', and ONNX Runtime 'stop'"),
        ("", "it sees ''"),
        ("stop", "its logits are no numbers"),
        ("stop\n1 2 three", "its logits are no numbers"),
        ("stop\n1 2 3", "3 logits, and ONNX Runtime gives 32"),
        ("stop\n" + numbers(range(32)), "its logits are up to .* off"),
        ("stop\n" + numbers(["nan"] * 32), "its logits are up to nan off"),
    ],
)
def test_an_answer_that_differs_is_found(expected: Any, answer: str, reason: str) -> None:
    with pytest.raises(rivals._Wrong, match=reason):
        expected.check(answer.encode())
    error, times = expected.check(f"stop\n{numbers(expected.logits)}\n1.5 2.5\n".encode())
    assert (error, times) == (pytest.approx(0, abs=1e-6), [1.5, 2.5])


@pytest.mark.parametrize(
    "answer",
    ["no JSON", "[]", '{"label": "stop"}', '{"label": "stop", "confidence": 0.1}',
     '{"label": "yield", "confidence": 0.9}', '{"error": {"id": "E8"}}'],
)  # fmt: skip
def test_so_it_is_with_the_articles_program(expected: Any, answer: str) -> None:
    with pytest.raises(rivals._Wrong):
        expected.check_article(answer.encode())
    good = json.dumps({"label": "stop", "confidence": expected.confidence})
    expected.check_article(good.encode())


def runs(command: Sequence[str]) -> Callable[[Any], Any]:
    return lambda case: rivals._Program((*command, "REPEATS"), {"program": [Path(__file__)]})


def test_all_rows_are_listed_also_those_that_differ_fail_or_can_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(case: Any) -> Any:
        raise rivals._Absent("no such thing. Cure: get it")

    others = {
        "cpp": runs((sys.executable, "-c", f"print('yield\\n{numbers(range(32))}')")),
        "go": runs((sys.executable, "-c", "raise SystemExit('out of luck')")),
    }
    for name in RIVALS:
        if name != "bare":
            changed = dataclasses.replace(RIVALS[name], prepare=others.get(name, absent))
            monkeypatch.setitem(RIVALS, name, changed)
    assert main(["rivals", "--rounds=1", "--repeats=1"]) == 1
    text = capsys.readouterr().out
    assert "\ncpp   " in text
    for name, why in (
        ("cpp", "error: it sees 'yield', and ONNX Runtime 'stop'"),
        ("go", "error: it ended with 1: out of luck"),
        ("rust", "not here: no such thing. Cure: get it"),
        ("C++ + TensorRT", "not here: needs an NVIDIA GPU"),
        ("Go + TFLite", "not here: needs TensorFlow Lite's C library"),
    ):
        assert re.search(rf"^{re.escape(name)} +{why}", text, re.M), (name, text)
    for command in ("trtexec --onnx=models/signs/signs.onnx", "github.com/mattn/go-tflite"):
        assert command in text
    monkeypatch.setitem(RIVALS, "bare", RIVALS["go"])
    with pytest.raises(EdgelabError, match="all are compared with can't run: it ended with 1"):
        measure_rivals(rows=[], rounds=1, repeats=1)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("cpp", "apt-get install g\\+\\+"),
        ("wasmtime-cli", "apt-get install g\\+\\+"),
        ("go", "install Go 1.21"),
        ("wasmedge-cli", "wasmedge is not installed.*Cure: install"),
    ],
)
def test_a_missing_tool_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Any, name: str, cure: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path))
    with pytest.raises((rivals._Absent, EdgelabError), match=cure):
        RIVALS[name].prepare(case)


def test_a_missing_package_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    for name, package in (("openvino", "openvino"), ("litert", "ai-edge-litert")):
        with pytest.raises(rivals._Absent, match=f"pip install {package}"):
            RIVALS[name].prepare(case)
    with pytest.raises(rivals._Absent, match="pip install --upgrade onnxruntime"):
        RIVALS["go"].prepare(case)


# --- The programs, alone --------------------------------------------------------------------------


def command_of(case: Any, name: str) -> list[str]:
    try:
        return rivals._command(RIVALS[name].prepare(case), 0)
    except (rivals._Absent, EdgelabError) as error:
        if os.environ.get("CI") and name not in OPTIONAL:
            raise
        pytest.skip(str(error))


def bad_inputs(folder: Path) -> dict[str, tuple[int, Path]]:
    """Return what replaces an argument: its place among MODEL, TENSOR and LABELS, and a file."""
    files = {
        "no model": (0, b"not a model"),
        "half a model": (0, SIGNS.data[: len(SIGNS.data) // 2]),
        "empty tensor": (1, b""),
        "short tensor": (1, bytes(4 * 3 * 224 * 224 - 1)),
        "long tensor": (1, bytes(4 * 3 * 224 * 224 + 4)),
        "too few labels": (2, b"stop\n" * 31),
        "too many labels": (2, b"stop\n" * 33),
        "no labels": (2, b""),
    }
    made = {}
    for name, (place, data) in files.items():
        path = folder / name
        path.write_bytes(data)
        made[name] = place, path
    made["missing model"] = 0, folder / "nothing.onnx"
    made["missing tensor"] = 1, folder / "nothing.f32"
    made["a folder for a tensor"] = 1, folder
    return made


@pytest.mark.parametrize("name", ["cpp", "go", "rust", "bare"])
def test_a_program_takes_no_bad_input(case: Any, tmp_path: Path, name: str) -> None:
    command = command_of(case, name)
    first = command.index(case.arguments[0])
    for what, (place, path) in bad_inputs(tmp_path).items():
        if name == "bare" and what not in ("no model", "short tensor", "too few labels"):
            continue  # a process of Python takes long
        words = list(command)
        words[first + place] = str(path)
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, (what, done)
        assert done.stdout == "", what
        assert done.stderr.strip(), what
    for words in (command[: first + 1], [*command[: first + 3], "-1", *command[first + 4 :]]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr[:6]) == (2, "usage:")


def test_the_host_without_python_keeps_to_the_rules(case: Any, tmp_path: Path) -> None:
    """The article's program under it: exit codes, folders, and machine code that is none."""
    command = command_of(case, "wasmtime-cli")
    program, folder, dashes, code, *_ = command

    def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [program, *words], input=stdin, capture_output=True, timeout=60, check=False
        )

    done = run(folder, dashes, code, "--fly")
    assert (done.returncode, done.stderr[:6]) == (2, b"usage:")
    done = run(dashes, code, "--model", "/data/tiny.safetensors")  # nothing is pre-opened
    assert (done.returncode, json.loads(done.stdout)["error"]["id"]) == (1, "E9")
    assert run(folder).returncode == 2
    for words in ((f"/data={tmp_path / 'none'}", "--", code), ("/data", "--", code)):
        done = run(*words)
        assert (done.returncode, done.stderr[:20]) == (1, b"wasmtime: can't open")
    bad = tmp_path / "bad.cwasm"
    bad.write_bytes(guest_path("cli").path.read_bytes())
    for path in (bad, tmp_path / "missing"):
        done = run(folder, "--", str(path))
        assert done.returncode == 1
        assert done.stderr.startswith(f"wasmtime: {path}: ".encode())


def test_the_sources_are_clean(rust: Toolchain, case: Any, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None and os.environ.get("CI"):
        pytest.fail("CI needs g++: apt-get install g++")
    if compiler:
        warn = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion",
                "-Wshadow", "-Werror", *rivals._c_headers()]  # fmt: skip
        for source in sorted((ROOT / "rivals" / "cpp").glob("*.cpp")):
            made = subprocess.run([compiler, *warn, source], capture_output=True, check=False)
            assert made.returncode == 0, made.stderr.decode()
    source = ROOT / "guest" / "classify_tract"
    if rust.run(["fmt", "--version"], source, title="").returncode == 0:
        done = rust.run(["fmt", "--all", "--check"], source, title="cargo looks at the style")
        assert done.returncode == 0, done.stdout
    elif os.environ.get("CI"):
        pytest.fail("this Rust has no cargo fmt")
    if go := shutil.which("go"):
        folder = ROOT / "rivals" / "go"
        gofmt = Path(go).resolve().with_name("gofmt")
        for words in ([go, "vet", "./..."], [str(gofmt), "-l", "."]):
            looked = subprocess.run(words, cwd=folder, capture_output=True, check=False)
            assert (looked.returncode, looked.stdout) == (0, b""), looked.stderr.decode()


def test_a_package_alone_brings_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What apt is asked for; that it works, the rows show."""
    asked: list[str] = []

    def run_live(command: list[str], *_: Any, **__: Any) -> Any:
        asked.append(" ".join(word for word in command if not word.startswith("-o")))
        return subprocess.CompletedProcess(command, 1, "no network")

    monkeypatch.setattr(runtimes, "run_live", run_live)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(EdgelabError, match=r"no network.*or install libx-dev by hand"):
        runtimes.debian_package("libx-dev", alone=True)
    assert asked == ["apt-get update"]


# --- TFLite ---------------------------------------------------------------------------------------


def test_only_a_plain_mobilenet_becomes_tflite() -> None:
    from onnx import TensorProto, helper

    from edgelab import tflite

    assert len(tflite.from_onnx(SIGNS.data)) > SIGNS.size_bytes * 0.9
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Erf", ["x"], ["y"])], "g", value[:1], value[1:])
    for data in (b"no model", helper.make_model(graph).SerializeToString()):
        with pytest.raises(ModelError, match=r"no \.tflite form here"):
            tflite.from_onnx(data)


# --- The table and the command --------------------------------------------------------------------


def made_row(name: str, cold: float, warm: float | None, size: int) -> RivalRow:
    one = Ratio(1.5, 1.25, 1.75, 10)
    return RivalRow(
        name=name,
        cold_ms=Summary(cold, cold, 10),
        cold_ratio=one,
        warm_ms=None if warm is None else Summary(warm, warm, 10),
        warm_ratio=None if warm is None else one,
        ships_bytes={"all": size},
        error=None if warm is None else 0.0,
        cold_samples_ms=(cold,),
        warm_samples_ms=() if warm is None else (warm,),
    )


def test_a_claim_is_held_against_the_kindest_row(table: RivalTable) -> None:
    rows = (
        made_row("bare", 300, 10, 100_000_000),
        made_row("wasi-nn", 600, 12, 200_000_000),
        made_row("wasmtime", 60, 30, 50_000_000),
        made_row("wasmtime-cli", 1.5, None, 30_000_000),
    )
    made = dataclasses.replace(table, rows=rows, absent={}, wrong={})
    found = {(each.claim, each.article_row): each for each in made.verdicts()}
    assert len(found) == 15
    cold, warm, size = (found[claim, "Wasmtime"] for claim in ("C6", "C7", "C8"))
    assert (cold.row, cold.here, cold.article, cold.holds) == ("wasmtime-cli", 1.5, 3, True)
    assert (warm.row, warm.here, warm.article, warm.holds) == ("wasi-nn", 12, 15, False)
    assert (size.row, size.here, size.article, size.holds) == ("wasmtime-cli", 30, 8, False)
    assert cold.here_ratio == pytest.approx(1.5 / 300)
    assert cold.article_ratio == pytest.approx(3 / 500)
    python = found["C6", "Python + ORT"]
    assert (python.here, python.here_ratio, python.holds) == (300, 1, None)
    slow = dataclasses.replace(cold, article_row="Go + TFLite", article_ratio=0.2)
    assert not slow.holds  # it takes less than the article says
    assert dataclasses.replace(slow, here_ratio=0.3).holds
    for place in ("WasmEdge AOT", "C++ + TensorRT", "Go + TFLite"):
        nothing = found["C7", place]
        assert (nothing.here, nothing.here_ratio, nothing.holds) == (None, None, None)
    text = str(made)
    assert text.count("does not hold") == 2
    assert (text.count("is the measure"), text.count("not measured")) == (3, 9)
    assert "once" in text
    assert "1.50 [1.25, 1.75]" in text


def test_a_table_is_plain_text_html_and_json(table: RivalTable) -> None:
    text, page, plain = str(table), table._repr_html_(), table.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    for row in table.rows:
        assert RIVALS[row.name].title in text
    assert page.count("<table>") == page.count("<caption>") == 3 - (not table._others())
    assert [row["name"] for row in plain["rows"]] == [row.name for row in table.rows]
    assert set(plain["rows"][0]["ships_bytes"]) == {"Python", "packages", "model"}
    nasty = dataclasses.replace(table, label="<b>", wrong={"cpp": "<script>"})
    assert "<script>" not in nasty._repr_html_()
    assert "<b>" not in nasty._repr_html_()
    with pytest.raises(KeyError, match="no row 'perl'; there are bare"):
        table["perl"]


def test_the_command_lists_its_rows_and_names_a_wrong_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["rivals", "--rows", "help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RIVALS)
    assert main(["rivals", "--rows", "bare,perl"]) == 1
    assert "no row perl; there are bare, wasi-nn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rounds >= 1"):
        measure_rivals(rows=[], rounds=0)


def test_without_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "source_root", lambda: None)
    with pytest.raises(EdgelabError, match="run in a checkout"):
        measure_rivals(rows=[])
