"""Other ways to run the same model, side by side: claims C6, C7 and C8 with numbers from here.

Each row is a program of its own (``rivals/``, ``guest/``), started anew each time. All read the
same prepared picture and labels, use one thread, and print the label, the logits, and how long
further runs took. A row that answers otherwise than bare ONNX Runtime is an error, not a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab import images, preprocess
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.errors import EdgelabError, ModelError
from edgelab.measure import (
    Fingerprint,
    Ratio,
    Summary,
    Watch,
    cold_start,
    duration,
    html_table,
    plain_text,
    ratio,
    row_named,
    text_table,
)
from edgelab.models import Model, example_image, load
from edgelab.paths import locked, source_root, write_atomic
from edgelab.runtime import Guest
from edgelab.runtimes import Runtime, debian_package, node, wasmedge
from edgelab.sizes import package_files, python_files, size_of

BOUND = 1e-3
"""How far a row's logits may be from bare ONNX Runtime's, as a part of their largest magnitude."""

BASELINE = "bare"
"""The row that the others are compared with."""

_WARMUP = 5  # runs of a process that are not counted: caches, and code that is compiled in steps
_TIMEOUT_S = 300.0
_TINY = "signs-tiny"
_CONFIDENCE_BOUND = 1e-4


class _Absent(Exception):
    """A row can't run here; the text says why and how it could."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What the rows share: the files they read, in one folder, and where what they need is."""

    model: Model
    folder: Path
    root: Path

    @property
    def build(self) -> Path:
        """Where programs are built to."""
        return self.root / "rivals" / "build"

    @property
    def arguments(self) -> tuple[str, str, str]:
        """MODEL, TENSOR and LABELS."""
        model, tensor, labels = (
            str(self.folder / name) for name in ("model.onnx", "tensor.f32", "labels.txt")
        )
        return model, tensor, labels


@dataclass(frozen=True, slots=True)
class _Program:
    """How a row is started, and what must be shipped for it: name → files and folders.

    In `command` the word ``REPEATS`` stands for the number of further runs. Without it the program
    is the article's, which answers JSON once.
    """

    command: Sequence[str]
    ships: Mapping[str, Sequence[Path]]


@dataclass(frozen=True, slots=True)
class Rival:
    """A way to run a model.

    Attributes
    ----------
    title : str
    engine : str
        What computes the model.
    article : str
        The row of the article's tables that it stands beside; empty if there is none.
    prepare : callable
        Builds what it needs, and returns how to start it; raises what explains why that can't be.
    """

    title: str
    engine: str
    article: str
    prepare: Callable[[_Case], _Program] = field(repr=False)


# --- Python ---------------------------------------------------------------------------------------


def _python(
    case: _Case, program: str, packages: Sequence[str], *more: str, model: str = ""
) -> _Program:
    """A program of ``rivals/python`` in this Python, and what it ships."""
    for package in packages:
        if find_spec(package.replace("-", "_")) is None:
            raise _Absent(f"{package} is not installed. Cure: pip install {package}")
    given, *data = case.arguments
    script = case.root / "rivals" / "python" / f"{program}.py"
    command = (sys.executable, str(script), model or given, *data, "REPEATS", *more)
    ships = {
        "model": [Path(model) if model else case.model.path],
        "Python": python_files(),
        "packages": package_files(*packages),
    }
    return _Program(command, ships)


def _bare(case: _Case) -> _Program:
    return _python(case, "bare", ["onnxruntime"])


def _guest_row(case: _Case, program: str, guest: str, *more: str) -> _Program:
    wasm = guest_path(guest).path
    classes = str(len(case.model.spec.labels))
    made = _python(case, program, ["edgelab"], str(wasm), classes, *more)
    return _Program(made.command, {**made.ships, "guest": [wasm]})


def _wasi_nn(case: _Case) -> _Program:
    return _guest_row(case, "wasi_nn", "classify_nn")


def _in_guest(case: _Case) -> _Program:
    return _guest_row(case, "in_guest", "classify_tract", str(case.model.spec.crop))


def _litert(case: _Case) -> _Program:
    try:
        from edgelab.tflite import from_onnx
    except ImportError as error:
        raise _Absent(
            f"{error.name} is missing. Cure: pip install 'edgelab[litert,quantize]'"
        ) from None
    path = case.folder / "model.tflite"
    path.write_bytes(from_onnx(case.model.data))
    return _python(case, "litert", ["ai-edge-litert"], model=str(path))


def _openvino(case: _Case) -> _Program:
    return _python(case, "openvino_cpu", ["openvino"])


# --- without Python -------------------------------------------------------------------------------


def _onnxruntime_library() -> Path:
    """The library in ONNX Runtime's wheel, which programs in any language may load."""
    spec = find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else Path()
    for pattern in ("libonnxruntime.so*", "libonnxruntime*.dylib", "onnxruntime.dll"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise _Absent(
        "this wheel of ONNX Runtime has no library for other languages. "
        "Cure: pip install --upgrade onnxruntime"
    )


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise _Absent("there is no C++ compiler. Cure: apt-get install g++")


def _made(case: _Case, name: str, key: bytes, make: Callable[[Path], object]) -> Path:
    """A file that is made once, and again when `key` changes."""
    stem, suffix = os.path.splitext(name)
    path = case.build / f"{stem}-{hashlib.sha256(key).hexdigest()[:16]}{suffix}"
    if path.exists():
        return path
    with locked(case.build / ".lock"):
        if not path.exists():  # another process may have made it meanwhile
            with tempfile.TemporaryDirectory(dir=case.build) as folder:
                new = Path(folder, name)
                make(new)
                os.replace(new, path)
    return path


def _run(command: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:] or ["no message"]
        raise _Absent(f"{Path(command[0]).name} failed: {plain_text(' … '.join(said))}")
    return done.stdout


def _cpp(case: _Case, name: str, compiler: str, flags: Sequence[str]) -> Path:
    source = case.root / "rivals" / "cpp" / f"{name}.cpp"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", *flags]
    made_by = _run([compiler, "--version"], case.root)
    key = source.read_bytes() + "\0".join([made_by, *options]).encode()
    return _made(
        case, name, key, lambda new: _run([compiler, source, "-o", new, *options], case.root)
    )


def _c_headers() -> list[str]:
    """Options that find ONNX Runtime's headers; the wheel has none."""
    for folder in ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime"):
        if Path(folder, "onnxruntime_cxx_api.h").exists():
            return ["-isystem", folder]
    root = debian_package("libonnxruntime-dev", alone=True)
    return ["-isystem", str(root / "usr/include/onnxruntime")]


def _cpp_row(case: _Case) -> _Program:
    library = _onnxruntime_library()
    program = _cpp(case, "ort", _compiler(), [*_c_headers(), "-ldl"])
    ships = {"program": [program], "ONNX Runtime": [library]}
    return _native(case, [str(program), *case.arguments, "REPEATS", str(library)], ships)


def _go_row(case: _Case) -> _Program:
    library, source = _onnxruntime_library(), case.root / "rivals" / "go"
    go = shutil.which("go")
    if go is None:
        raise _Absent("there is no Go. Cure: install Go 1.21 or newer (https://go.dev/dl)")
    made_by = _run([go, "version"], source)
    files = [source / name for name in ("main.go", "go.mod", "go.sum")]
    key = b"\0".join([made_by.encode(), *(path.read_bytes() for path in files)])
    build = [go, "build", "-trimpath", "-ldflags=-s -w", "-o"]
    environment = {**os.environ, "CGO_ENABLED": "1"}
    program = _made(case, "go-ort", key, lambda new: _run([*build, new], source, environment))
    ships = {"program": [program], "ONNX Runtime": [library]}
    return _native(case, [str(program), *case.arguments, "REPEATS", str(library)], ships)


def _rust_row(case: _Case) -> _Program:
    program = guest_path("tract_cli_native").path
    return _native(case, [str(program), *case.arguments, "REPEATS"], {"program": [program]})


def _native(case: _Case, command: Sequence[str], ships: Mapping[str, Sequence[Path]]) -> _Program:
    return _Program(command, {**ships, "model": [case.folder / "model.onnx"]})


# --- other Wasm runtimes --------------------------------------------------------------------------

_INSIDE = ("/data/model.onnx", "/data/tensor.f32", "/data/labels.txt", "REPEATS")
_ARTICLE = ("--model", "/data/tiny.safetensors")


def _guest_file(case: _Case, article: bool) -> tuple[Path, tuple[str, ...], dict[str, list[Path]]]:
    """The module, its arguments, and its model: the article's program, or the model inside."""
    if article:
        if case.model.spec.labels != load(_TINY).spec.labels:
            raise _Absent(
                f"the article's program has a model of its own ({_TINY}), which answers only for "
                "--model signs"
            )
        return guest_path("cli").path, _ARTICLE, {"model": [case.folder / "tiny.safetensors"]}
    return guest_path("tract_cli").path, _INSIDE, {"model": [case.folder / "model.onnx"]}


def _wasmtime(case: _Case, *, article: bool) -> _Program:
    import wasmtime

    wasm, arguments, ships = _guest_file(case, article)
    name = {"win32": "_wasmtime.dll", "darwin": "_libwasmtime.dylib"}
    file = name.get(sys.platform, "_libwasmtime.so")
    found = sorted(Path(wasmtime.__file__).parent.glob(f"*/{file}"))
    if not found or sys.platform != "linux":
        raise _Absent("the program that hosts wasmtime without Python was tried on Linux only")
    library = found[0]
    options = [f"-L{library.parent}", f"-l:{file}", f"-Wl,-rpath,{library.parent}"]
    program = _cpp(case, "wasmtime", _compiler(), options)

    def make(new: Path) -> None:
        new.write_bytes(wasmtime.Module(wasmtime.Engine(), wasm.read_bytes()).serialize())

    key = f"{version('wasmtime')}\0{_cpu()}\0".encode() + wasm.read_bytes()
    code = _made(case, f"{wasm.stem}.cwasm", key, make)
    command = [str(program), f"/data={case.folder}", "--", str(code), *arguments]
    return _Program(
        command, {"program": [program], "runtime": [library], "machine code": [code], **ships}
    )


def _cpu() -> str:
    from edgelab.aot import cpu_features

    return " ".join(cpu_features())


def _wasmedge(case: _Case, *, article: bool) -> _Program:
    wasm, arguments, ships = _guest_file(case, article)
    runtime = wasmedge()
    key = f"{runtime.version}\0{_cpu()}\0".encode() + wasm.read_bytes()
    # A whole engine takes it a quarter of an hour, once.
    code = _made(
        case, f"{wasm.stem}.so", key, lambda new: runtime.compile(wasm, new, timeout_s=5400)
    )
    return _hosted(case, runtime, code, arguments, {"machine code": [code], **ships})


def _node(case: _Case, *, article: bool) -> _Program:
    wasm, arguments, ships = _guest_file(case, article)
    return _hosted(case, node(), wasm, arguments, {"guest": [wasm], **ships})


def _hosted(
    case: _Case,
    runtime: Runtime,
    module: Path,
    arguments: Sequence[str],
    ships: Mapping[str, Sequence[Path]],
) -> _Program:
    command = runtime.command_line(module, arguments, dirs={"/data": case.folder})
    files = [file for file in runtime.files() if not _BASE.match(file.name)]
    return _Program(command, {"runtime": files, **ships})


def _cli_native(case: _Case) -> _Program:
    _, (flag, _), ships = _guest_file(case, article=True)
    program = guest_path("cli_native").path
    model = str(case.folder / "tiny.safetensors")
    return _Program([str(program), flag, model], {"program": [program], **ships})


# Of every Linux, or of the smallest image that runs C and C++ programs.
_BASE = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|atomic))\.so")


ORT, TRACT, ARTICLE = "ONNX Runtime", "tract", "article's program"
_PYTHON = "Python + ORT"  # a row of the article
RIVALS: dict[str, Rival] = {
    "bare": Rival("Python + ONNX Runtime", ORT, _PYTHON, _bare),
    "wasi-nn": Rival("Wasmtime + WASI-NN, from Python (ours)", ORT, "Wasmtime", _wasi_nn),
    "in-guest": Rival("Wasmtime, model in the guest, from Python (ours)", TRACT, "", _in_guest),
    "wasmtime": Rival(
        "Wasmtime, model in the guest", TRACT, "Wasmtime",
        functools.partial(_wasmtime, article=False),
    ),
    "wasmedge": Rival(
        "WasmEdge AOT, model in the guest", TRACT, "WasmEdge AOT",
        functools.partial(_wasmedge, article=False),
    ),
    "node": Rival(
        "Node WASI, model in the guest", TRACT, "", functools.partial(_node, article=False)
    ),
    "rust": Rival("Rust, native", TRACT, "", _rust_row),
    "cpp": Rival("C++ + ONNX Runtime", ORT, "", _cpp_row),
    "go": Rival("Go + ONNX Runtime", ORT, "", _go_row),
    "litert": Rival("Python + LiteRT", "LiteRT", "", _litert),
    "openvino": Rival("Python + OpenVINO", "OpenVINO", "", _openvino),
    "wasmtime-cli": Rival(
        "Wasmtime", ARTICLE, "Wasmtime", functools.partial(_wasmtime, article=True)
    ),
    "wasmedge-cli": Rival(
        "WasmEdge AOT", ARTICLE, "WasmEdge AOT", functools.partial(_wasmedge, article=True)
    ),
    "node-cli": Rival("Node WASI", ARTICLE, "", functools.partial(_node, article=True)),
    "rust-cli": Rival("Rust, native", ARTICLE, "", _cli_native),
}  # fmt: skip
"""The rows, by name. The first one is the baseline."""

ELSEWHERE = {
    "C++ + TensorRT": (
        "needs an NVIDIA GPU and TensorRT. There: trtexec --onnx=models/signs/signs.onnx "
        "--shapes=input:1x3x224x224 --saveEngine=signs.plan, then trtexec --loadEngine=signs.plan "
        "--iterations=200 (latency), and time trtexec --loadEngine=signs.plan --iterations=1 "
        "--warmUp=0 --duration=0 (cold start)"
    ),
    "Go + TFLite": (
        "needs TensorFlow Lite's C library, which no package registry has. There: bazel build -c "
        "opt //tensorflow/lite/c:tensorflowlite_c in TensorFlow's sources, then a program with "
        "github.com/mattn/go-tflite on model.tflite of edgelab.tflite.from_onnx; the rows go and "
        "litert are its two halves here"
    ),
}
"""The article's rows that no machine like this one can run, with the steps for one that can."""

CLAIMS: dict[str, dict[str, float]] = {
    "C6": {
        "WasmEdge AOT": 1, "Wasmtime": 3, "Python + ORT": 500, "C++ + TensorRT": 200,
        "Go + TFLite": 100,
    },
    "C7": {
        "WasmEdge AOT": 10, "Wasmtime": 15, "Python + ORT": 40, "C++ + TensorRT": 8,
        "Go + TFLite": 25,
    },
    "C8": {
        "WasmEdge AOT": 5, "Wasmtime": 8, "Python + ORT": 500, "C++ + TensorRT": 200,
        "Go + TFLite": 50,
    },
}  # fmt: skip
"""What the article says: cold start in ms, latency in ms, deployed size in MB. It calls the cold
start of WasmEdge less than 1 ms."""


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RivalRow:
    """What was measured of one way to run a model.

    Attributes
    ----------
    name : str
        Its name in `RIVALS`.
    cold_ms : Summary
        From the start of a new process to its first answer.
    cold_ratio : Ratio
        To the baseline, paired by round.
    warm_ms : Summary or None
        From the prepared picture to the label, in a process that has run before; a process gives
        one sample, the median of its runs. None for a program that answers once.
    warm_ratio : Ratio or None
    ships_bytes : dict of str to int
        What must be shipped, by part.
    error : float or None
        Largest difference of its logits from bare ONNX Runtime's; None for the article's program.
    cold_samples_ms, warm_samples_ms : tuple of float
        By round.
    """

    name: str
    cold_ms: Summary
    cold_ratio: Ratio
    warm_ms: Summary | None
    warm_ratio: Ratio | None
    ships_bytes: dict[str, int]
    error: float | None
    cold_samples_ms: tuple[float, ...] = field(repr=False)
    warm_samples_ms: tuple[float, ...] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """All that must be shipped, beside a C library and a kernel."""
        return sum(self.ships_bytes.values())


@dataclass(frozen=True, slots=True)
class Verdict:
    """One cell of the article's tables beside what was measured here.

    Attributes
    ----------
    claim : str
        ``"C6"``, ``"C7"`` or ``"C8"``.
    article_row : str
    article : float
        Milliseconds; megabytes for C8.
    article_ratio : float
        The article's figure, over its figure for Python with ONNX Runtime.
    here : float or None
        The same as `article`, measured by `row`; None if it can't be measured here.
    here_ratio : float or None
        To Python with ONNX Runtime.
    row : str
    """

    claim: str
    article_row: str
    article: float
    article_ratio: float
    here: float | None
    here_ratio: float | None
    row: str

    @property
    def holds(self) -> bool | None:
        """Whether this supports what the article argues; None if it was not measured, or is Python.

        It argues that Wasm takes so little, and the others so much. Shares of Python are compared:
        its machine is another one, and this one may be busy.
        """
        if self.here_ratio is None or self.article_row == _PYTHON:
            return None
        if self.article_row in ("WasmEdge AOT", "Wasmtime"):
            return self.here_ratio <= self.article_ratio
        return self.here_ratio >= self.article_ratio


@dataclass(frozen=True, slots=True)
class RivalTable:
    """Ways to run the same model, measured in the same rounds.

    Attributes
    ----------
    model : str
    label : str
        What all rows see in the picture.
    rows : tuple of RivalRow
        The first one is the baseline.
    absent : dict of str to str
        Rows that did not run, with the reason and the cure.
    wrong : dict of str to str
        Rows that gave another answer, or failed: errors.
    cold_noise, warm_noise : Ratio
        The baseline over itself: the A/A checks.
    warnings : tuple of str
    environment : Fingerprint
        Taken before the first round.
    """

    model: str
    label: str
    rows: tuple[RivalRow, ...]
    absent: dict[str, str]
    wrong: dict[str, str]
    cold_noise: Ratio
    warm_noise: Ratio
    warnings: tuple[str, ...]
    environment: Fingerprint

    def __getitem__(self, name: str) -> RivalRow:
        return row_named(self.rows, name)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Return the article's cells beside the rows here that are the kindest to them."""
        found = []
        for claim, cells in CLAIMS.items():
            python, measured = cells[_PYTHON], _figure(claim, self.rows[0])
            for place, value in cells.items():
                best: tuple[float, str] | None = None
                for row in self.rows:
                    here = _figure(claim, row)
                    if RIVALS[row.name].article == place and here is not None:
                        best = min(best or (here, row.name), (here, row.name))
                here, name = best or (None, "")
                to_python = here / measured if here is not None and measured else None
                found.append(Verdict(claim, place, value, value / python, here, to_python, name))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.model,
            "label": self.label,
            "rows": [_plain(row) for row in self.rows],
            "absent": dict(self.absent),
            "wrong": dict(self.wrong),
            "verdicts": [{**asdict(each), "holds": each.holds} for each in self.verdicts()],
            "cold_noise": self.cold_noise.to_dict(),
            "warm_noise": self.warm_noise.to_dict(),
            "warnings": list(self.warnings),
            "environment": self.environment.to_dict(),
        }

    def _cells(self) -> list[tuple[str, ...]]:
        base = self.rows[0]
        cells = list[tuple[str, ...]]()
        for row in self.rows:
            rival = RIVALS[row.name]
            warm = row.warm_ms
            cells.append(
                (
                    row.name,
                    rival.title,
                    rival.engine,
                    duration(row.cold_ms.median_ms),
                    "1" if row is base else str(row.cold_ratio),
                    "once" if warm is None else duration(warm.median_ms),
                    "1" if row is base else str(row.warm_ratio or ""),
                    f"{row.size_bytes / 1e6:,.1f} MB",
                    f"{row.size_bytes / base.size_bytes:.3g}",
                )
            )
        return cells

    def _notes(self) -> list[str]:
        here = self.environment
        return [
            f"all see {self.label!r}, with one thread; {self.rows[0].cold_ratio.count} rounds in "
            "random order; a ratio is to the first row, with its 95 % interval",
            "cold start: a new process to its first label, files in memory; latency: prepared "
            "picture to label, in a warm process; size: all that is shipped beside glibc, "
            "libstdc++ and a kernel",
            f"A/A check, {BASELINE} / itself: cold {self.cold_noise}, warm {self.warm_noise}",
            f"{here.cpu}, {here.cores} core(s), {platform.machine()}",
            *(f"warning: {each}" for each in self.warnings),
        ]

    def _others(self) -> list[tuple[str, str]]:
        return [
            *((name, f"error: {why}") for name, why in self.wrong.items()),
            *((name, f"not here: {why}") for name, why in self.absent.items()),
        ]

    def _verdict_cells(self) -> list[tuple[str, ...]]:
        cells = list[tuple[str, ...]]()
        for each in self.verdicts():
            unit = "MB" if each.claim == "C8" else "ms"
            here, share = each.here, each.here_ratio
            told = {True: "holds", False: "does not hold", None: "is the measure"}[each.holds]
            told = told if here is not None else "not measured"
            cells.append(
                (
                    each.claim,
                    each.article_row,
                    f"{each.article:g} {unit}",
                    f"{each.article_ratio:.3g}",
                    "" if here is None else f"{here:.3g} {unit}",
                    "" if share is None else f"{share:.3g}",
                    "" if here is None else f"{here / each.article:.2g}",
                    each.row,
                    told,
                )
            )
        return cells

    def __str__(self) -> str:
        lines = text_table(_COLUMNS, self._cells(), left=(0, 1, 2, 4, 6))
        width = max((len(name) for name, _ in self._others()), default=0)
        lines += [f"{name:<{width}}  {why}" for name, why in self._others()]
        lines += [*self._notes(), ""]
        lines += text_table(_VERDICTS, self._verdict_cells(), left=(0, 1, 7, 8))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        caption = f"Ways to run {self.model}; " + "; ".join(self._notes())
        others = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>"
            for name, why in self._others()
        )
        return (
            html_table(caption, _COLUMNS, self._cells())
            + (f"<table><caption>Rows without a time</caption>{others}</table>" if others else "")
            + html_table(
                "The article's figures, beside the kindest row here",
                _VERDICTS,
                self._verdict_cells(),
            )
        )


_COLUMNS = (
    "row", "what runs it", "engine", "cold start", "/ bare", "latency", "/ bare", "size", "/ bare",
)  # fmt: skip
_VERDICTS = (
    "claim", "the article's row", "article", "/ Python", "here", "/ Python", "here / article",
    "row here", "it",
)  # fmt: skip


def _figure(claim: str, row: RivalRow) -> float | None:
    if claim == "C6":
        return row.cold_ms.median_ms
    if claim == "C7":
        return row.warm_ms.median_ms if row.warm_ms else None
    return row.size_bytes / 1e6


def _plain(row: RivalRow) -> dict[str, Any]:
    rival = RIVALS[row.name]
    return {
        "name": row.name,
        "title": rival.title,
        "engine": rival.engine,
        "cold_ms": row.cold_ms.to_dict(),
        "cold_ratio": row.cold_ratio.to_dict(),
        "warm_ms": row.warm_ms and row.warm_ms.to_dict(),
        "warm_ratio": row.warm_ratio and row.warm_ratio.to_dict(),
        "size_bytes": row.size_bytes,
        "ships_bytes": dict(row.ships_bytes),
        "error": row.error,
        "cold_samples_ms": list(row.cold_samples_ms),
        "warm_samples_ms": list(row.warm_samples_ms),
    }


# --- measuring ------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A row gave another answer, or none."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What every row must answer."""

    label: str
    logits: NDArray[np.float32]
    confidence: float | None

    def check(self, answer: bytes) -> tuple[float, list[float]]:
        """Return how far the logits are off, and the times in milliseconds."""
        label, *rest = answer.decode("utf-8", "replace").splitlines() or [""]
        if label != self.label:
            raise _Wrong(f"it sees {plain_text(label)!r}, and ONNX Runtime {self.label!r}")
        try:
            logits, *times = ([float(word) for word in line.split()] for line in rest)
        except ValueError:
            raise _Wrong("its logits are no numbers") from None
        if len(logits) != len(self.logits):
            raise _Wrong(f"{len(logits)} logits, and ONNX Runtime gives {len(self.logits)}")
        error = float(np.abs(np.array(logits) - self.logits).max())
        bound = BOUND * float(np.abs(self.logits).max())
        if not error <= bound:
            raise _Wrong(f"its logits are up to {error:.3g} off; {bound:.3g} is allowed")
        return error, times[0] if times else []

    def check_article(self, answer: bytes) -> None:
        try:
            given = json.loads(answer)
            label, confidence = given["label"], float(given["confidence"])
        except (ValueError, KeyError, TypeError):
            raise _Wrong(f"it answers {plain_text(answer.decode(errors='replace'))}") from None
        if label != self.label:
            raise _Wrong(f"it sees {label!r}, and ONNX Runtime {self.label!r}")
        if self.confidence is None or abs(confidence - self.confidence) > _CONFIDENCE_BOUND:
            raise _Wrong(f"its confidence is {confidence}; needed {self.confidence}")


def measure_rivals(
    model: str | Path | Model = "signs",
    *,
    rows: Iterable[str] | None = None,
    rounds: int = 10,
    repeats: int = 20,
    seed: int = 0,
    progress: Callable[[str], object] = lambda _: None,
) -> RivalTable:
    """Build every row that this machine can run, check its answer, and time it in turns.

    Parameters
    ----------
    model : str, pathlib.Path or Model
        As in `edgelab.Pipeline`. The picture is the one that ships.
    rows : iterable of str, optional
        Names in `RIVALS`; the baseline is always measured. The default is all.
    rounds : int
        Each starts every program twice, in a new random order: once for its first answer, once
        for its latency.
    repeats : int
        Runs in a process that count for its latency.
    seed : int
        Seed of the order and of the bootstrap.
    progress : callable
        Told in a line what is done next: building takes minutes the first time.

    Raises
    ------
    EdgelabError
        If there is no such row, the package has no checkout around it, or the baseline fails.
    ValueError
        If `rounds` or `repeats` is not positive.
    """
    wanted = list(RIVALS) if rows is None else list(dict.fromkeys([BASELINE, *rows]))
    if unknown := [name for name in wanted if name not in RIVALS]:
        raise EdgelabError(f"no row {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    if rounds < 1 or repeats < 1:
        raise ValueError(f"need rounds >= 1 and repeats >= 1, got {rounds} and {repeats}")
    root = source_root()
    if root is None:
        raise EdgelabError(
            "The rows are built from sources, and this edgelab is installed without them. Cure: "
            "run in a checkout of the project."
        )
    loaded = model if isinstance(model, Model) else load(model)
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(loaded, Path(folder), root)
        expected = _write(case)
        return _measure(case, expected, wanted, rounds, repeats, seed, progress)


def _write(case: _Case) -> _Expected:
    """Write what the rows read, and return what they must answer."""
    from edgelab.wasinn.backends.onnx import session_options

    import onnxruntime  # isort: skip

    spec, pixels = case.model.spec, images.decode(example_image())
    tensor = preprocess.preprocess(pixels, spec)
    crop = preprocess.resize_crop(pixels, spec.resize, spec.crop)
    request = {
        "image_data": crop.ravel().tolist(),
        "width": spec.crop,
        "height": spec.crop,
        "model_id": _TINY,
    }
    tiny = load(_TINY)
    files = {
        "model.onnx": case.model.data,
        "tensor.f32": tensor.astype("<f4").tobytes(),
        "labels.txt": "".join(f"{label}\n" for label in spec.labels).encode(),
        "tiny.safetensors": tiny.data,
        "request.json": json.dumps(request).encode(),
    }
    for name, data in files.items():
        write_atomic(case.folder / name, data)
    session = onnxruntime.InferenceSession(
        case.model.data, session_options(1), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    logits = np.asarray(session.run(None, {given.name: tensor})[0]).reshape(-1)
    if len(logits) != len(spec.labels):
        raise ModelError(f"{len(logits)} logits for {len(spec.labels)} labels")
    confidence = None
    if tiny.spec.labels == spec.labels:
        classifier = Classifier(Guest(guest_path("classify").path).instantiate())
        classifier.load_model(tiny.data)
        confidence = float(classifier.infer(files["request.json"])["confidence"])
    return _Expected(spec.labels[int(logits.argmax())], logits, confidence)


def _measure(
    case: _Case,
    expected: _Expected,
    wanted: Sequence[str],
    rounds: int,
    repeats: int,
    seed: int,
    progress: Callable[[str], object],
) -> RivalTable:
    programs: dict[str, _Program] = {}
    errors: dict[str, float | None] = {}
    absent, wrong = dict[str, str](), dict[str, str]()
    for name in wanted:
        progress(f"{name}: prepare, and check its answer")
        try:
            programs[name] = RIVALS[name].prepare(case)
            errors[name] = _answer(case, expected, programs[name], 1)[0]
        except (_Absent, EdgelabError) as error:
            absent[name] = str(error)
        except subprocess.TimeoutExpired as error:
            absent[name] = f"it took more than {error.timeout:g} s"
        except _Wrong as error:
            wrong[name] = str(error)
    if BASELINE not in errors:
        why = absent.get(BASELINE) or wrong[BASELINE]
        raise EdgelabError(f"the row that all are compared with can't run: {why}")
    programs = {name: programs[name] for name in errors}
    sizes = {name: _sizes(program) for name, program in programs.items()}
    progress(f"{len(programs)} rows, {rounds} rounds: cold start")
    watch = Watch(threads=1)
    commands = {name: _command(program, 0) for name, program in programs.items()}
    again = "again"
    cold = cold_start(
        {**commands, again: commands[BASELINE]},
        stdin=case.folder / "request.json", repeats=rounds, warmup=0, seed=seed,
        timeout_s=_TIMEOUT_S,
    ).samples_ms  # fmt: skip
    progress(f"{len(programs)} rows, {rounds} rounds: latency")
    warm = _warm(case, expected, programs, again, rounds, repeats, seed)
    cold_noise = ratio(cold[again], cold[BASELINE], seed=seed)
    warm_noise = ratio(warm[again], warm[BASELINE], seed=seed)
    doubts = [
        f"{column}: {doubt}"
        for column, samples, noise in (
            ("cold start", cold[BASELINE], cold_noise), ("latency", warm[BASELINE], warm_noise)
        )
        for doubt in watch.doubts(samples, BASELINE, noise)
    ]  # fmt: skip
    return RivalTable(
        model=case.model.spec.name,
        label=expected.label,
        rows=tuple(
            RivalRow(
                name=name,
                cold_ms=Summary.of(cold[name]),
                cold_ratio=ratio(cold[name], cold[BASELINE], seed=seed),
                warm_ms=Summary.of(warm[name]) if name in warm else None,
                warm_ratio=ratio(warm[name], warm[BASELINE], seed=seed) if name in warm else None,
                ships_bytes=sizes[name],
                error=errors[name],
                cold_samples_ms=tuple(cold[name]),
                warm_samples_ms=tuple(warm.get(name, ())),
            )
            for name in programs
        ),
        absent={**absent, **(ELSEWHERE if wanted == list(RIVALS) else {})},
        wrong=wrong,
        cold_noise=cold_noise,
        warm_noise=warm_noise,
        warnings=tuple(dict.fromkeys(doubts)),
        environment=watch.environment,
    )


def _warm(
    case: _Case,
    expected: _Expected,
    programs: Mapping[str, _Program],
    again: str,
    rounds: int,
    repeats: int,
    seed: int,
) -> dict[str, list[float]]:
    """Milliseconds of a run, by round: the median within a process that is started for it."""
    timed = {name: each for name, each in programs.items() if "REPEATS" in each.command}
    timed[again] = programs[BASELINE]
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order, shuffle = list(timed), random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            try:
                _, times = _answer(case, expected, timed[name], _WARMUP + repeats)
            except _Wrong as error:  # it was right before
                raise EdgelabError(f"{name} became wrong: {error}") from None
            if len(times) != _WARMUP + repeats:
                raise EdgelabError(f"{name} gave {len(times)} times for {_WARMUP + repeats} runs")
            samples[name].append(statistics.median(times[_WARMUP:]))
    return samples


def _command(program: _Program, repeats: int) -> list[str]:
    return [str(repeats) if word == "REPEATS" else word for word in program.command]


def _answer(
    case: _Case, expected: _Expected, program: _Program, repeats: int
) -> tuple[float | None, list[float]]:
    """Start a program and check what it says; return its error, and its times."""
    command = _command(program, repeats)
    with open(case.folder / "request.json", "rb") as request:
        done = subprocess.run(
            command, stdin=request, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        last = plain_text(said[-1]) if said else "no message"
        raise _Wrong(f"it ended with {done.returncode}: {last}")
    if "REPEATS" in program.command:
        return expected.check(done.stdout)
    expected.check_article(done.stdout)
    return None, []


def _sizes(program: _Program) -> dict[str, int]:
    """Bytes by part; a file that two parts share counts once."""
    sizes, seen = dict[str, int](), 0
    so_far: list[Path] = []
    for part, files in program.ships.items():
        so_far += files
        total = size_of(*so_far, compress=False).disk_bytes
        sizes[part], seen = total - seen, total
    return sizes
