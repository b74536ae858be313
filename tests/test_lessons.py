"""The lessons run, their exercises can be solved and only be solved, and they keep one form."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelab import checks, plots
from edgelab.build import guest_path
from edgelab.errors import BuildError, EdgelabError, ToolchainError
from edgelab.kernels import kernel_table
from edgelab.pipeline import Classification, Prediction
from edgelab.runtimes import wasmedge
from edgelab.snippet import compile_rust, excerpt

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
CELL_TIMEOUT_S = 300
MAX_BYTES = 300_000
MARK = "nbval-check-output"

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)

# Typical wrong answers: what an exercise's cell might hold. Each must fail, with a reason.
WRONG = {
    "00-speedup": [
        "def speedup(ms, stage, factor):\n    return factor",
        "def speedup(ms, stage, factor):\n    return sum(ms.values()) / (ms[stage] / factor)",
        "def speedup(ms, stage, factor):\n    return 1 - ms[stage] / factor / sum(ms.values())",
        "speedup = 1.61",
    ],
    "00-miss": ["miss = 2048", "miss = 'turn left ahead'", "miss = 17"],
    "01-brighten": [
        '''brighten = """#[unsafe(no_mangle)]
pub extern "C" fn brighten(pixel: u32, by: u32) -> u32 { pixel.saturating_add(by) }"""''',
        '''brighten = """#[unsafe(no_mangle)]
pub extern "C" fn brighten(pixel: u32, by: u32) -> u32 { (pixel + by) % 256 }"""''',
        'brighten = "fn brighten("',
        'brighten = """(module (func (export "brighten") (param i32 i32) (result i32)'
        ' (i32.add (local.get 0) (local.get 1))))"""',
        "brighten = lambda pixel, by: min(pixel + by, 255)",
    ],
    "01-hog": [
        "hog = hog.replace('(i32.const 0)', '(i32.const 1)')",
        "hog = hog.replace('(i32.const 0)', '(memory.grow (i32.const 1))')",
        "hog = hog.replace('(i32.const 0)', '(i32.lt_u (memory.size) (i32.const 16))')",
    ],
    "02-unpack": [
        "def unpack(packed):\n    return packed & 0xFFFFFFFF, packed >> 32",
        "def unpack(packed):\n    return packed >> 32, packed & 0xFFFFFFFF",
        "def unpack(packed):\n    return [packed >> 32 & 0xFFFFFFFF, packed & 0xFFFFFFFF]",
        "unpack = divmod",
    ],
    "02-leak": [
        # the answer alone; the request alone; an error that nobody hears of; both freed twice
        """def classify(instance, text):
    block = instance.call("alloc", len(text))
    instance.memory.write(block, text)
    answer, size = divmod(instance.call("infer", block, len(text)), 1 << 32)
    reply = json.loads(instance.memory.read(answer, size))
    instance.call("dealloc", answer, size)
    if "error" in reply:
        raise ValueError(reply["error"]["message"])
    instance.call("dealloc", block, len(text))
    return reply""",
        """def classify(instance, text):
    block = instance.call("alloc", len(text))
    instance.memory.write(block, text)
    answer, size = divmod(instance.call("infer", block, len(text)), 1 << 32)
    reply = json.loads(instance.memory.read(answer, size))
    instance.call("dealloc", block, len(text))
    if "error" in reply:
        raise ValueError(reply["error"]["message"])
    return reply""",
        """def classify(instance, text):
    block = instance.call("alloc", len(text))
    instance.memory.write(block, text)
    answer, size = divmod(instance.call("infer", block, len(text)), 1 << 32)
    reply = json.loads(instance.memory.read(answer, size))
    instance.call("dealloc", block, len(text))
    instance.call("dealloc", answer, size)
    return reply""",
        """def classify(instance, text):
    block = instance.call("alloc", len(text))
    instance.memory.write(block, text)
    answer, size = divmod(instance.call("infer", block, len(text)), 1 << 32)
    reply = json.loads(instance.memory.read(answer, size))
    instance.call("dealloc", block, len(text))
    instance.call("dealloc", answer, size)
    instance.call("dealloc", answer, size)
    if "error" in reply:
        raise ValueError(reply["error"]["message"])
    return reply""",
    ],
    "03-break-even": [
        # not rounded; one too few at equality; negative where it never pays; AOT for nothing
        "def break_even(once, with_aot, without):\n    return once / (without - with_aot)",
        """def break_even(once, with_aot, without):
    return math.ceil(once / (without - with_aot)) if without > with_aot else math.inf""",
        """def break_even(once, with_aot, without):
    return once // (without - with_aot) + 1 if without != with_aot else math.inf""",
        "def break_even(once, with_aot, without):\n    return once // without + 1",
        "break_even = 2",
    ],
    "03-reasons": [
        # the first fault only; any difference of features; bytecode refused; no set
        """def reasons(artifact, here):
    problem = artifact.problem(here)
    return {problem.partition(":")[0]} if problem else set()""",
        """def reasons(artifact, here):
    fields = {"P5": "machine", "E6": "wasmtime", "E10": "features"}
    return {id for id, name in fields.items() if getattr(artifact, name) != getattr(here, name)}""",
        """def reasons(artifact, here):
    found = {"P5"} if artifact.machine != here.machine else set()
    found |= {"E6"} if artifact.wasmtime != here.wasmtime else set()
    return found | ({"E10"} if set(artifact.features) - set(here.features) else set())""",
        "def reasons(artifact, here):\n    return 'E6'",
    ],
    "03-key": [
        # without the machine; without the configuration; never the same; no name for a file
        """def key(wasm, config, here):
    return hashlib.sha256(wasm + repr(config).encode()).hexdigest()""",
        """def key(wasm, config, here):
    return hashlib.sha256(wasm + repr(here).encode()).hexdigest()""",
        """def key(wasm, config, here):
    return hashlib.sha256(wasm + here.wasmtime.encode() + repr(config).encode()).hexdigest()""",
        """def key(wasm, config, here):
    return hashlib.sha256(repr((time.time_ns(), wasm, config, here)).encode()).hexdigest()""",
        "def key(wasm, config, here):\n    return repr((wasm, config, here))",
        "def key(wasm, config, here):\n    return hash((wasm, config, here))",
    ],
    "04-pack": [
        # no padding; big-endian; the type last; the number of elements, not of bytes
        """def pack(dims_at, rank, kind, data_at, size):
    return struct.pack("<IIBII", dims_at, rank, kind, data_at, size)""",
        """def pack(dims_at, rank, kind, data_at, size):
    return struct.pack(">IIB3xII", dims_at, rank, kind, data_at, size)""",
        """def pack(dims_at, rank, kind, data_at, size):
    return struct.pack("<IIIIB3x", dims_at, rank, data_at, size, kind)""",
        """def pack(dims_at, rank, kind, data_at, size):
    return struct.pack("<IIB3xII", dims_at, rank, kind, data_at, size // 4)""",
        "pack = 20",
    ],
    "04-prepare": [
        # blue first, with the constants of blue first; no / 255; channels last, by name or not
        """def prepare(image):
    pixels = resize_crop(image, spec.resize, spec.crop) / 255
    planes = [(pixels[..., c] - spec.mean[c]) / spec.std[c] for c in (2, 1, 0)]
    return np.stack(planes)[None].astype(np.float32)""",
        """def prepare(image):
    pixels = resize_crop(image, spec.resize, spec.crop)
    planes = [(pixels[..., c] - spec.mean[c]) / spec.std[c] for c in (0, 1, 2)]
    return np.stack(planes)[None].astype(np.float32)""",
        """def prepare(image):
    pixels = resize_crop(image, spec.resize, spec.crop) / 255
    planes = [(pixels[..., c] - spec.mean[c]) / spec.std[c] for c in (0, 1, 2)]
    return np.stack(planes, -1)[None].astype(np.float32)""",
        """def prepare(image):
    pixels = resize_crop(image, spec.resize, spec.crop) / 255
    planes = [(pixels[..., c] - spec.mean[c]) / spec.std[c] for c in (0, 1, 2)]
    return np.stack(planes, -1).reshape(1, 3, 224, 224).astype(np.float32)""",
    ],
    "04-needed": [
        # right for one picture only; the errno; a buffer that is large enough; an address
        "needed = needed.replace('(i32.const 0)))', '(i32.const 128)))')",
        """needed = five[:-1] + '''(func (export "needed") (param i32) (result i32)
  (call $get_output (local.get 0) (i32.const 0) (i32.const 256) (i32.const 4) (i32.const 96))))'''
""",
        """needed = five[:-1] + '''(func (export "needed") (param i32) (result i32)
  (drop (call $get_output (local.get 0) (i32.const 0) (i32.const 256) (i32.const 999)
    (i32.const 96))) (i32.load (i32.const 96))))'''
""",
        """needed = five[:-1] + '''(func (export "needed") (param i32) (result i32)
  (drop (call $get_output (local.get 0) (i32.const 0) (i32.const 256) (i32.const 4)
    (i32.const 96))) (i32.const 96)))'''
""",
    ],
    "05-starts": [
        # the article's; past the end; far too many; the tail alone
        "def starts(n, step):\n    return list(range(0, n - step + 1, step))",
        "def starts(n, step):\n    return list(range(0, n, step))",
        "def starts(n, step):\n    return list(range(n - step + 1))",
        "def starts(n, step):\n    return [*range(0, n - step + 1, step), n - step]",
        "starts = 16",
    ],
    "05-palette": [
        # the tail forgotten; too far; the tail twice; nothing at all
        '''palette = """use core::arch::wasm32::*;
#[unsafe(no_mangle)]
#[target_feature(enable = "simd128")]
pub unsafe extern "C" fn palette(at: *mut u8, n: usize, table: *const u8) { unsafe {
    let t = v128_load(table as *const v128);
    for i in 0..n / 16 {
        let p = at.add(16 * i) as *mut v128;
        v128_store(p, u8x16_swizzle(t, v128_load(p)));
    }
} }"""''',
        '''palette = """use core::arch::wasm32::*;
#[unsafe(no_mangle)]
#[target_feature(enable = "simd128")]
pub unsafe extern "C" fn palette(at: *mut u8, n: usize, table: *const u8) { unsafe {
    let t = v128_load(table as *const v128);
    for i in 0..n.div_ceil(16) {
        let p = at.add(16 * i) as *mut v128;
        v128_store(p, u8x16_swizzle(t, v128_load(p)));
    }
} }"""''',
        '''palette = """use core::arch::wasm32::*;
#[unsafe(no_mangle)]
#[target_feature(enable = "simd128")]
pub unsafe extern "C" fn palette(at: *mut u8, n: usize, table: *const u8) { unsafe {
    let t = v128_load(table as *const v128);
    for i in 0..n.div_ceil(16) {
        let p = at.add((16 * i).min(n.saturating_sub(16))) as *mut v128;
        v128_store(p, u8x16_swizzle(t, v128_load(p)));
    }
} }"""''',
        '''palette = """(module (memory (export "memory") 1)
  (func (export "palette") (param i32 i32 i32)))"""''',
    ],
    "06-layers": [
        # one of the two; uneven channels that matter less; even ones; no layers
        "layers = ['features.0.0.weight', 'features.2.conv.1.0.weight']",
        "layers = ['features.4.conv.2.weight', 'features.17.conv.1.0.weight']",
        "layers = sorted(weights, key=lambda name: weights[name].size)[-2:]",
        "layers = ['features.0.0.bias', 'features.0.0.weight']",
        "layers = 'features.0.0.weight'",
    ],
    "06-coin": [
        # one side only; both sides counted where they are one; the probability of this count alone
        """def p_value(lost, gained):
    n, few = lost + gained, min(lost, gained)
    return sum(math.comb(n, k) for k in range(few + 1)) / 2**n""",
        """def p_value(lost, gained):
    n, few = lost + gained, min(lost, gained)
    return 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n""",
        """def p_value(lost, gained):
    return math.comb(lost + gained, lost) / 2 ** (lost + gained)""",
        "p_value = 0.05",
    ],
    "06-calibrate": [
        # good ones; of another type; out of range
        "pictures = calibration[:32]",
        "pictures = np.zeros((32, 3, 224, 224))",
        "pictures = np.full((32, 3, 224, 224), 100, np.float32)",
    ],
    "07-three": [
        # faster, and still compiling; still loading; still in JSON; impossible; too many
        "three = {'simd', 'zero-copy', 'int8'}",
        "three = {'instance', 'binary', 'simd'}",
        "three = {'instance', 'model', 'simd'}",
        "three = {'aot', 'model', 'resize'}",
        "three = {'aot', 'instance', 'model', 'binary'}",
        "three = {'wasi-nn', 'model', 'binary'}",
    ],
    "07-ahead": [
        # all at once; the last ones forgotten; results; one at a time; the newest first
        """def stream(submit, images, ahead):
    yield from [submit(image) for image in images]""",
        """def stream(submit, images, ahead):
    waiting = []
    for image in images:
        waiting.append(submit(image))
        if len(waiting) == ahead:
            yield waiting.pop(0)""",
        """def stream(submit, images, ahead):
    waiting = []
    for image in images:
        waiting.append(submit(image))
        if len(waiting) == ahead:
            yield waiting.pop(0).result()
    yield from (each.result() for each in waiting)""",
        """def stream(submit, images, ahead):
    for image in images:
        yield submit(image)""",
        """def stream(submit, images, ahead):
    waiting = []
    for image in images:
        waiting.append(submit(image))
        if len(waiting) == ahead:
            yield waiting.pop()
    yield from waiting""",
        """def stream(submit, images, ahead):
    waiting = []
    for image in images:
        waiting.append(submit(image))
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting""",
    ],
    "07-lru": [
        # first in, first out; by number; the newest alone; the wrong way round
        """def who_stays(requests, sizes, limit):
    loaded = []
    for name in requests:
        if name not in loaded:
            loaded.append(name)
        while sum(sizes[each] for each in loaded) > limit:
            loaded.pop(0)
    return loaded""",
        "def who_stays(requests, sizes, limit):\n    return list(dict.fromkeys(requests))[-2:]",
        "def who_stays(requests, sizes, limit):\n    return requests[-1:]",
        """def who_stays(requests, sizes, limit):
    loaded = []
    for name in requests:
        loaded = [name, *(each for each in loaded if each != name)]
        while sum(sizes[each] for each in loaded) > limit:
            loaded.pop()
    return loaded""",
    ],
    "08-binary": [
        # the whole body's length; no size; elements for bytes; big-endian; memory's order; no pair
        """def request(tensor):
    given = {"name": "input", "shape": list(tensor.shape), "datatype": "FP32",
             "parameters": {"binary_data_size": tensor.nbytes}}
    body = json.dumps({"inputs": [given]}).encode() + tensor.tobytes()
    return {"Inference-Header-Content-Length": str(len(body))}, body""",
        """def request(tensor):
    given = {"name": "input", "shape": list(tensor.shape), "datatype": "FP32"}
    head = json.dumps({"inputs": [given]}).encode()
    return {"Inference-Header-Content-Length": str(len(head))}, head + tensor.tobytes()""",
        """def request(tensor):
    given = {"name": "input", "shape": list(tensor.shape), "datatype": "FP32",
             "parameters": {"binary_data_size": tensor.size}}
    head = json.dumps({"inputs": [given]}).encode()
    return {"Inference-Header-Content-Length": str(len(head))}, head + tensor.tobytes()""",
        """def request(tensor):
    given = {"name": "input", "shape": list(tensor.shape), "datatype": "FP32",
             "parameters": {"binary_data_size": tensor.nbytes}}
    head = json.dumps({"inputs": [given]}).encode()
    data = tensor.astype(">f4").tobytes()
    return {"Inference-Header-Content-Length": str(len(head))}, head + data""",
        """def request(tensor):
    given = {"name": "input", "shape": list(tensor.shape), "datatype": "FP32",
             "parameters": {"binary_data_size": tensor.nbytes}}
    head = json.dumps({"inputs": [given]}).encode()
    data = tensor.tobytes("A")
    return {"Inference-Header-Content-Length": str(len(head))}, head + data""",
        "def request(tensor):\n    return tensor.tobytes()",
    ],
    "08-queue": [
        # the work alone; no idle time; from the end before; one wait only
        "def latencies(due, work):\n    return work",
        """def latencies(due, work):
    free, took = 0.0, []
    for d, w in zip(due, work):
        free += w
        took.append(free - d)
    return took""",
        """def latencies(due, work):
    free, took = 0.0, []
    for d, w in zip(due, work):
        begin = max(free, d)
        free = begin + w
        took.append(free - begin)
    return took""",
        """def latencies(due, work):
    ends = [d + w for d, w in zip(due, work)]
    return [w + max(0, before - d) for before, d, w in zip([0, *ends], due, work)]""",
        "latencies = sum",
    ],
    "09-pull": [
        # what is there is fetched again; a shared layer twice; layers told apart by size; a count
        """def pull(images, held):
    return sum({layer: size for image in images for layer, size in image}.values())""",
        """def pull(images, held):
    return sum(size for image in images for layer, size in image if layer not in held)""",
        """def pull(images, held):
    return sum({size for image in images for layer, size in image if layer not in held})""",
        """def pull(images, held):
    return len({layer for image in images for layer, size in image} - held)""",
        "pull = 9_000_000",
    ],
    "09-cure": [
        # nothing done; only probes; the module's mount dropped; all right but the probes' route
        "def cure(deployment):\n    return deployment",
        """def cure(deployment):
    for container in deployment["spec"]["template"]["spec"]["containers"]:
        get = {"httpGet": {"path": "/v2/health/live", "port": 8080}}
        container["livenessProbe"] = container["readinessProbe"] = get
    return deployment""",
        """def cure(deployment):
    del deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    return deployment""",
        """def cure(deployment):
    good = kubernetes(plan)[0]
    get = {"httpGet": {"path": "/healthz", "port": 8080}}
    good["spec"]["template"]["spec"]["containers"][0]["livenessProbe"] = get
    return good""",
        """def cure(deployment):
    return {"kind": "Deployment"}""",
    ],
    "10-cut": [
        # the place alone; every error; by the last character; only strings
        """def judge(text):
    try:
        json.loads(text)
        return 'whole'
    except json.JSONDecodeError as error:
        return 'cut' if error.pos == len(text) else 'wrong'""",
        """def judge(text):
    try:
        json.loads(text)
        return 'whole'
    except json.JSONDecodeError:
        return 'cut'""",
        """def judge(text):
    return 'whole' if text.strip()[-1] in "]}" else 'cut'""",
        """def judge(text):
    try:
        json.loads(text)
        return 'whole'
    except json.JSONDecodeError as error:
        return 'cut' if "Unterminated" in str(error) else 'wrong'""",
    ],
    "10-ship": [
        # what any has; the first one's; the version forgotten; nothing, always
        """def may_use(fleet):
    if len({(each.machine, each.wasmtime) for each in fleet}) > 1:
        return None
    return set.union(*(set(each.features) for each in fleet))""",
        """def may_use(fleet):
    return set(fleet[0].features)""",
        """def may_use(fleet):
    if len({each.machine for each in fleet}) > 1:
        return None
    return set.intersection(*(set(each.features) for each in fleet))""",
        "def may_use(fleet):\n    return set()",
        "may_use = set()",
    ],
}


def read(path: Path) -> list[dict[str, Any]]:
    """A lesson's cells, each with its source as one string."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
    return cells


def write(path: Path, cells: list[dict[str, Any]]) -> None:
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(notebook), encoding="utf-8")


def code_cell(source: str, **more: Any) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": "code", "source": source, "metadata": {}}
    return cell | {"outputs": [], "execution_count": None} | more


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


def text_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path) if cell["cell_type"] == "markdown"]


def solutions(lesson: Path) -> dict[str, str]:
    text = (NOTEBOOKS / "solutions" / f"{lesson.stem}.py").read_text(encoding="utf-8")
    parts = re.split(r"^# %% (.+)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def trial(lesson: Path) -> list[dict[str, Any]]:
    """The lesson's code with its exercises tried: as they stand, wrongly, and at last solved."""
    solved = solutions(lesson)
    cells = []
    for cell in code_cells(lesson):
        name = cell["id"].removesuffix("-check")
        if cell["id"] == name or name not in solved:
            cells.append(code_cell(cell["source"]))
            continue
        *before, check = cell["source"].splitlines()
        for answer in ["", *WRONG[name], solved[name]]:
            passes = answer is solved[name]
            verdict = f"verdict = {check}\nassert verdict.passed is {passes}, verdict"
            cells += [code_cell(answer), code_cell("\n".join([*before, verdict]))]
    return cells


def run_notebooks(
    *paths: Path, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run notebooks in kernels of this Python, and compare the cells that are marked."""
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"),
        *("--rootdir", str(folder), "--nbval-lax", "--nbval-current-env"),
        *(f"--nbval-cell-timeout={CELL_TIMEOUT_S}", *map(str, paths)),
    ]
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": search, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def assert_all_passed(done: subprocess.CompletedProcess[str], *paths: Path) -> None:
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    # pytest also ends with 0 where it found cells in one file only.
    cells = sum(len(code_cells(path)) for path in paths)
    assert f"{cells} passed" in done.stdout, done.stdout[-2000:]


def compiles_rust(path: Path) -> bool:
    return "compile_rust" in path.read_text(encoding="utf-8")


@each_lesson
@pytest.mark.timeout(2400)  # the guest with an engine inside takes some minutes to build
def test_lesson_runs_as_it_is_stored(path: Path, tmp_path: Path) -> None:
    """With its exercises unsolved; its marked cells give what they hold."""
    if os.environ.get("CI") and "ready_guest" in path.read_text(encoding="utf-8"):
        guest_path("classify_tract")  # the lesson does without, if need be; CI shall see it with
        wasmedge()
    assert_all_passed(run_notebooks(path, folder=tmp_path), path)


@each_lesson
def test_exercises_tell_wrong_answers_from_the_solution(
    path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if compiles_rust(path):
        request.getfixturevalue("rust")  # some answers are Rust
    tried = tmp_path / f"{path.stem}_trial.ipynb"
    write(tried, trial(path))
    assert_all_passed(run_notebooks(tried, folder=tmp_path), tried)


def test_lessons_run_without_rust(tmp_path: Path) -> None:
    """With the shipped guests, and WAT where a lesson compiles Rust."""
    paths = [path for path in LESSONS if compiles_rust(path)]
    assert paths
    done = run_notebooks(*paths, folder=tmp_path, EDGELAB_TOOLCHAIN="prebuilt")
    assert_all_passed(done, *paths)


def test_lesson_03_runs_without_other_runtimes_and_without_the_large_guest(tmp_path: Path) -> None:
    """In an empty cache, and nothing on PATH that could fill it."""
    (path,) = (path for path in LESSONS if path.stem.startswith("03"))
    bare = {"EDGELAB_TOOLCHAIN": "prebuilt", "EDGELAB_CACHE": str(tmp_path / "cache")}
    assert_all_passed(run_notebooks(path, folder=tmp_path, PATH=str(tmp_path), **bare), path)


def test_nbval_uses_this_python_and_sees_stale_output(tmp_path: Path) -> None:
    """What the other tests rely on: --nbval-current-env, and tags that mark a cell."""
    here = code_cell(f"import sys; assert sys.prefix == {sys.prefix!r}, sys.prefix")
    stale = code_cell("print(2)", execution_count=1, metadata={"tags": [MARK]})
    stale["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1\n"}]
    write(tmp_path / "stale.ipynb", [here, stale])
    done = run_notebooks(tmp_path / "stale.ipynb", folder=tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout


# --- exercises ------------------------------------------------------------------------------------


def test_exercises_have_what_they_need() -> None:
    """Each has a lesson, three hints, a check cell, a solution and typical wrong answers."""
    ids = {lesson: [cell["id"] for cell in code_cells(lesson)] for lesson in LESSONS}
    for name in checks.names():
        (lesson,) = (lesson for lesson in LESSONS if name[:2] == lesson.stem[:2])
        place = ids[lesson].index(name)
        assert ids[lesson][place + 1] == f"{name}-check", name
        assert len(checks.exercise(name).hints) == 3, name
        assert len(WRONG[name]) >= 2, name
    for lesson in LESSONS:
        own = [name for name in checks.names() if name[:2] == lesson.stem[:2]]
        assert len(own) >= 2, lesson.stem
        assert list(solutions(lesson)) == own


def test_hints_grow(capsys: pytest.CaptureFixture[str]) -> None:
    exercise = checks.exercise("02-unpack")
    exercise.hint(1)
    exercise.hint(3)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Hint 1 of 3: ")
    assert "0xFFFFFFFF" in last
    with pytest.raises(ValueError, match="hints 1 to 3"):
        exercise.hint(4)


def test_no_answer_and_broken_answers_are_verdicts() -> None:
    exercise = checks.exercise("02-unpack")
    for nothing in (..., None):
        assert repr(exercise.check(nothing)).startswith("Not yet: there is no answer")
    assert "ZeroDivisionError" in exercise.check(lambda packed: 1 / 0).message
    assert not exercise.check(42).passed


def test_unknown_exercise_names_the_known_ones() -> None:
    with pytest.raises(EdgelabError, match="00-speedup"):
        checks.exercise("00-nothing")


def test_rust_answer_without_rust_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    assert "Write it as WAT" in checks.exercise("01-brighten").check("pub fn f() {}").message


# --- form -----------------------------------------------------------------------------------------

ABSOLUTE = re.compile(r"(?<![\w.:/<])/(home|root|tmp|work|usr|opt|var|mnt|Users)/|\b[A-Z]:\\")
TIME = re.compile(r"\d\s?(ns|µs|us|ms|s|sec|seconds|minutes)\b")
IDS = {
    *(f"C{k}" for k in range(1, 15)),
    *(f"P{k}" for k in range(1, 6)),
    *(f"E{k}" for k in range(1, 11)),
}


def section(path: Path, title: str) -> str:
    text = "\n".join(cell["source"] for cell in text_cells(path))
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |^---$|\Z)", text, re.M | re.S)
    assert found, f"no section '## {title}'"
    return found[1]


def bullets(text: str) -> list[str]:
    return re.findall(r"^- ", text, re.M)


@each_lesson
def test_opens_and_closes_as_all_lessons(path: Path) -> None:
    title, facts = (cell["source"] for cell in read(path)[:2])
    assert re.match(rf"# {path.stem[:2]} · [A-Z][^\n]+\n\n> \*\*中文摘要\*\*", title)
    assert 3 <= title.count("。") <= 6
    assert len(re.findall(r"[\u4e00-\u9fff]", title)) >= 80
    line = facts.splitlines()[0]
    assert re.match(r"\*\*\d+ minutes\*\* · claims: .*C\d+.* · article: steps? \d", line), line
    assert set(re.findall(r"\b[CPE]\d+\b", line)) <= IDS
    objectives = bullets(section(path, "What you will be able to do"))
    assert 3 <= len(objectives) <= 4
    assert bullets(section(path, "What you need"))
    assert len(bullets(section(path, "Key points"))) == len(objectives)
    assert re.search(r"\]\(\S+\.ipynb\)", section(path, "What next"))


@each_lesson
def test_asks_before_it_tells(path: Path) -> None:
    asking = [cell["source"] for cell in text_cells(path) if "**Predict.**" in cell["source"]]
    assert len(asking) >= 2
    for text in asking:
        assert "<details><summary>Answer</summary>\n\n" in text  # the empty line: Markdown inside
        assert text.count("<details>") == text.count("</details>")


@each_lesson
def test_speaks_english_below_the_summary(path: Path) -> None:
    for cell in read(path)[1:]:
        assert not re.search(r"[\u3000-\u9fff]", cell["source"]), cell["id"]


@each_lesson
def test_code_is_short_public_and_plain_python(path: Path) -> None:
    lengths = []
    for cell in code_cells(path):
        lines = [line for line in cell["source"].splitlines() if line.strip()]
        lengths.append(len(lines))
        assert len(lines) <= 10, cell["id"]
        assert max(map(len, lines)) <= 100, cell["id"]
        for node in ast.walk(ast.parse(cell["source"])):  # a magic is no Python
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), f"{cell['id']}: {node.attr}"
            if isinstance(node, ast.ImportFrom):
                assert not any(name.name.startswith("_") for name in node.names), cell["id"]
    assert statistics.median(lengths) <= 6
    assert sum("assert " in cell["source"] for cell in code_cells(path)) >= 3


@each_lesson
def test_links_resolve(path: Path) -> None:
    for cell in text_cells(path):
        for target in re.findall(r"\]\(([^)\s]+)\)", cell["source"]):
            if not target.startswith(("https://", "#")):
                assert (NOTEBOOKS / target.partition("#")[0]).is_file(), f"{cell['id']}: {target}"


def stored_texts(cell: dict[str, Any]) -> Iterator[str]:
    for output in cell["outputs"]:
        yield "".join(output.get("text", ""))
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield "".join(value)


@each_lesson
def test_stores_what_is_stable_and_nothing_else(path: Path) -> None:
    """nbval never compares a cell without a count, so a marked cell must have one."""
    assert path.stat().st_size <= MAX_BYTES
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in read(path)]
    assert len(set(ids)) == len(ids)
    marked = 0
    for cell in code_cells(path):
        tags = cell["metadata"].get("tags", [])
        assert "NBVAL_" not in cell["source"], f"{cell['id']}: use the tag"
        if MARK in tags:
            marked += 1
            assert cell["execution_count"], cell["id"]
            assert cell["outputs"], cell["id"]
        elif "figure" in tags:
            kinds = [set(output["data"]) for output in cell["outputs"]]
            assert kinds == [{"image/png", "text/plain"}], cell["id"]
        else:
            assert not cell["outputs"], f"{cell['id']}: run notebooks/refresh.py"
            assert cell["execution_count"] is None, cell["id"]
        for text in stored_texts(cell):
            assert not ABSOLUTE.search(text), f"{cell['id']}: {text}"
            assert not TIME.search(text), f"{cell['id']}: {text}"
    assert marked >= 3
    for cell in read(path):
        assert not ABSOLUTE.search(cell["source"]), cell["id"]


def test_linter_knows_times_and_absolute_paths() -> None:
    for text in ("took 3 ms", "1.5s", "20 µs"):
        assert TIME.search(text), text
    for text in ("in /opt/x/bin", "PosixPath('/work/x')", "C:\\Users"):
        assert ABSOLUTE.search(text), text
    for text in ("602,112 bytes", "three seconds", "guest/src", "https://example.org/home/x"):
        assert not TIME.search(text), text
        assert not ABSOLUTE.search(text), text


# --- what lessons are made of ---------------------------------------------------------------------


def test_plots_can_be_read_without_seeing_them() -> None:
    seen = Classification((Prediction("stop", 0.75, 9), Prediction("<b>", 0.25, 1)), 1, 1, 1, 1)
    picture = np.zeros((32, 32, 3), np.uint8)
    drawn = (
        plots.data_flow(),
        plots.one_call(),
        plots.pictures([picture] * 7, list("abcdefg")),
        plots.prediction(picture, seen),
        plots.bars({"small": 1, "large": 1000}, title="sizes", log=True),
        plots.memory_map(1 << 20, {"first": (0x100, 32), "last": (0xF0000, 0x10000)}),
        plots.start_up(),
        plots.parts({"a": {"x": 1, "y": 2}, "b": {"x": 0.5, "y": 9}}, title="made of"),
        plots.kernels(kernel_table(repeats=1)),
        plots.nn_calls(),
        plots.tensor_struct(bytes(range(20)), 0x40),
    )  # pareto, flips and sensitivity: with what they show, in test_evaluate and test_quantize
    for plot in drawn:
        bundle = plot._repr_mimebundle_()
        assert plot.png.startswith(b"\x89PNG")
        assert len(plot.alt) > 20
        assert f'alt="{plot.alt[:20]}' in bundle["text/html"]
        assert "<table>" in bundle["text/html"]
        assert str(plot.table) in bundle["text/plain"]
        assert all(len(row) == len(plot.table.columns) for row in plot.table.rows)
    assert "&lt;b&gt;" in drawn[3]._repr_mimebundle_()["text/html"]


def test_excerpt_is_a_whole_item_with_its_comment() -> None:
    alloc = excerpt("classify/src/abi.rs", "fn alloc(")
    lines = alloc.text.splitlines()
    assert lines[0].startswith("///")
    assert lines[-1] == "}"
    assert alloc.text.count("{") == alloc.text.count("}")
    source = (ROOT / "guest" / alloc.path).read_text(encoding="utf-8").splitlines()
    assert source[alloc.first_line - 1] == lines[0]
    profile = excerpt("Cargo.toml", "[profile.release]").text
    assert "strip = true" in profile
    assert "[workspace]" not in profile
    with pytest.raises(EdgelabError, match="no line with"):
        excerpt("classify/src/abi.rs", "fn nobody(")


@pytest.mark.usefixtures("rust")
def test_compile_rust_says_what_is_wrong() -> None:
    with pytest.raises(BuildError, match=r"(?s)Mend what the compiler names.*src/lib\.rs:1"):
        compile_rust("fn broken(")
    with pytest.raises(BuildError, match="E1"):
        compile_rust("", target="wasm64-unknown-unknown")


def test_compile_rust_without_rust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    with pytest.raises(ToolchainError, match="Cure"):
        compile_rust("")
