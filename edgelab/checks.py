"""Checks of the lessons' exercises: hints, and an answer's verdict with the reason.

A check runs the answer on cases that the lesson does not show, and explains the first one that
fails. It never raises because of a wrong answer, so that a lesson runs to its end.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelab.aot import EngineConfig
from edgelab.artifact import Artifact
from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.datasets import SIGNS, Signs, prepare
from edgelab.errors import BuildError, EdgelabError, LimitError, ToolchainError
from edgelab.evaluate import divergence, logits, mcnemar_p
from edgelab.models import example_image, load
from edgelab.pipeline import Pipeline
from edgelab.preprocess import preprocess
from edgelab.runtime import Guest, Limits
from edgelab.snippet import compile_rust
from edgelab.wasinn import Encoding, Errno, Target, WasiNN
from edgelab.wasinn.abi import BUILDER, TENSOR
from edgelab.wasinn.explain import Expectation, check_input, swap_colors
from edgelab.waterfall import SWITCHES, Way

_PAGE = 65536  # bytes of a page of Wasm memory


class _NotYet(Exception):
    """Why an answer is wrong, for its author."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says.

    Attributes
    ----------
    passed : bool
    message : str
        Why, in words for the learner.
    """

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"✔ {self.message}" if self.passed else f"Not yet: {self.message}"


@dataclass(frozen=True, slots=True)
class Exercise:
    """An exercise of a lesson.

    Attributes
    ----------
    name : str
        Lesson and name, such as ``"01-hog"``.
    hints : tuple of str
        From a nudge to nearly the answer.
    """

    name: str
    hints: tuple[str, ...] = field(repr=False)
    _check: Callable[[Any], str] = field(repr=False)

    def hint(self, number: int = 1) -> None:
        """Print a hint; 1 says least."""
        if not 1 <= number <= len(self.hints):
            raise ValueError(f"{self.name} has the hints 1 to {len(self.hints)}, not {number}")
        print(f"Hint {number} of {len(self.hints)}: {self.hints[number - 1]}")

    def check(self, answer: Any) -> Verdict:
        """Try an answer.

        Parameters
        ----------
        answer : object
            What the exercise asks for; ``...`` and None stand for no answer.
        """
        if answer is None or answer is ...:
            return Verdict(False, "there is no answer here. Replace the dots in the cell above.")
        try:
            return Verdict(True, self._check(answer))
        except _NotYet as reason:
            return Verdict(False, str(reason))
        except Exception as error:  # whatever a learner's code raises
            return Verdict(False, f"your answer raised {type(error).__name__}: {error}")


_EXERCISES: dict[str, Exercise] = {}


def exercise(name: str) -> Exercise:
    """Return an exercise by its name.

    Raises
    ------
    EdgelabError
        If there is none of this name.
    """
    if name not in _EXERCISES:
        raise EdgelabError(f"no exercise is named {name!r}; there are {', '.join(names())}")
    return _EXERCISES[name]


def names() -> list[str]:
    """Names of all exercises, in the order of the lessons."""
    return list(_EXERCISES)


def _exercise(name: str, *hints: str) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register a check, which returns praise or raises `_NotYet`."""

    def register(check: Callable[[Any], str]) -> Callable[[Any], str]:
        _EXERCISES[name] = Exercise(name, hints, check)
        return check

    return register


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _NotYet(reason)


# --- 00 -------------------------------------------------------------------------------------------


@_exercise(
    "00-speedup",
    "The whole takes the sum of the stages. Which one of them changes?",
    "Compute two totals, before and after. The stage takes ms[stage] / factor afterwards.",
    "after = sum(ms.values()) - ms[stage] + ms[stage] / factor; return before / after",
)
def _speedup(answer: Any) -> str:
    article = {"load": 30.0, "preprocess": 20.0, "infer": 40.0, "postprocess": 10.0}
    cases = [
        ({"a": 10.0, "b": 10.0}, "a", 2.0),
        (article, "infer", 20.0),
        (article, "load", 1.0),
        (article, "preprocess", math.inf),
    ]
    for ms, stage, factor in cases:
        got = answer(dict(ms), stage, factor)
        _require(got is not ..., "your function returns the dots. Replace them.")
        before = sum(ms.values())
        after = before - ms[stage] + ms[stage] / factor
        _require(
            isinstance(got, (int, float)) and math.isclose(got, before / after, rel_tol=1e-3),
            f"the stages {ms} take {before:g} ms; with {stage!r} {factor:g} times as fast they "
            f"take {after:g} ms. Your function says {got!r} times as fast.",
        )
    return (
        "Right. This is Amdahl's law: inference 20 times as fast makes the article's whole 1.6 "
        "times as fast."
    )


@_exercise(
    "00-miss",
    "Go through the test renders, and compare what the model says with what was rendered.",
    "The right label of render i is SIGNS[renders[i].label]; the model's is "
    "pipeline.classify(renders[i].image).label.",
    "miss = next(i for i, r in enumerate(renders) if the two labels differ)",
)
def _miss(answer: Any) -> str:
    renders = Signs("test", 2048)
    _require(
        isinstance(answer, int) and 0 <= answer < len(renders),
        f"need the number of a test render, an int from 0 to {len(renders) - 1}; got {answer!r}.",
    )
    shown = SIGNS[renders[answer].label]
    seen = Pipeline("signs").classify(renders[answer].image).top[0]
    _require(
        seen.label != shown,
        f"render {answer} shows {shown!r}, and the model says so too ({seen.probability:.0%}).",
    )
    return (
        f"Right. Render {answer} shows {shown!r}; the model says {seen.label!r} and is "
        f"{seen.probability:.0%} sure. A hash can't be wrong like that: it never looks."
    )


# --- 01 -------------------------------------------------------------------------------------------


def _compile(answer: Any) -> bytes:
    """A learner's module: WAT if it begins with a parenthesis, else Rust."""
    _require(isinstance(answer, str), f"need the source as a str, got {type(answer).__name__}.")
    if answer.lstrip().startswith("("):
        return bytes(answer.strip().encode())
    try:
        return compile_rust(answer)
    except ToolchainError:
        raise _NotYet(
            "this machine has no Rust to compile it. Write it as WAT: begin with (module."
        ) from None
    except BuildError as error:
        raise _NotYet(str(error)) from None


@_exercise(
    "01-brighten",
    "A pixel's channel is a byte. What should happen to 200 + 100?",
    "Rust: u32 has .min(…). WAT: compare with i32.gt_u, choose with select.",
    "Rust: (pixel + by).min(255). WAT: select takes the value if true, the value if false, and "
    "the condition.",
)
def _brighten(answer: Any) -> str:
    instance = Guest(_compile(answer), cache=False).instantiate(limits=Limits(seconds=2))
    for pixel, by in ((100, 50), (0, 0), (255, 1), (200, 100), (250, 1000)):
        want, got = min(pixel + by, 255), instance.call("brighten", pixel, by)
        _require(got == want, f"brighten({pixel}, {by}) is {got}; a byte can hold {want}.")
    return "Right: it saturates. Adding without a limit would turn white into black."


@_exercise(
    "01-hog",
    "What does memory.grow return when the host says no? The loop must look at it.",
    "memory.grow returns the old size in pages, or -1. Go on as long as it is not -1.",
    "(br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))",
)
def _hog(answer: Any) -> str:
    guest = Guest(_compile(answer), cache=False)
    for pages in (16, 64):
        instance = guest.instantiate(limits=Limits(memory_bytes=pages * _PAGE, seconds=1))
        try:
            got = instance.call("hog")
        except LimitError:
            raise _NotYet(
                "it never ends. Once memory is full, memory.grow returns -1 each time; your loop "
                "must stop then."
            ) from None
        _require(
            got == pages,
            f"with a limit of {pages} pages hog() returns {got}. It should take all it can get.",
        )
    return "Right: it took every page up to the limit, and not one more. The host never noticed."


# --- 02 -------------------------------------------------------------------------------------------


@_exercise(
    "02-unpack",
    "The pointer is in the upper 32 bits, the length in the lower ones.",
    "i64 comes back signed: a pointer of 2 GiB or more makes it negative. And-ing with "
    "0xFFFFFFFF gives the 32 bits as an unsigned number.",
    "return packed >> 32 & 0xFFFFFFFF, packed & 0xFFFFFFFF",
)
def _unpack(answer: Any) -> str:
    cases = ((0x110040, 96), (0x10, 1), (0x1000, 0x80000001), (0x80000000, 17), (0xFFFF0000, 64))
    for pointer, length in cases:
        packed = pointer << 32 | length
        signed = packed - (1 << 64) if packed >> 63 else packed
        got = answer(signed)
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(
            isinstance(got, tuple) and got == (pointer, length),
            f"unpack({signed}) should be ({pointer}, {length}); yours is {got!r}."
            + (" The i64 is negative here: mind the sign." if signed < 0 else ""),
        )
    return "Right, also for pointers above 2 GiB, where the i64 is negative."


class _Watched:
    """An instance that keeps account of who holds which block."""

    def __init__(self) -> None:
        self.instance = _classify().instantiate()
        self.live: dict[int, str] = {}
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.instance, name)

    def function(self, name: str) -> Callable[..., Any]:
        return functools.partial(self.call, name)

    def call(self, name: str, *arguments: int) -> Any:
        value = self.instance.call(name, *arguments)
        if name == "alloc":
            self.live[value] = f"the request ({arguments[0]} bytes)"
        elif name == "infer":
            self.live[value >> 32] = f"the answer ({value & 0xFFFFFFFF} bytes)"
        elif name == "dealloc" and value == 0:
            self.live.pop(arguments[0], None)
        elif name == "dealloc":
            self.refused.append(f"dealloc{arguments} returned {value}")
        return value


@functools.cache
def _classify() -> Guest:
    return Guest(guest_path("classify").path)


@_exercise(
    "02-leak",
    "Follow a request that the guest refuses, line by line. Which lines does it never reach?",
    "Whatever happens between alloc and dealloc must not skip dealloc. Free first, raise later; "
    "or use try … finally.",
    "Move both dealloc lines above the `if`: reply is a copy on the host's side already.",
)
def _leak(answer: Any) -> str:
    watched = _Watched()
    model = load("signs-tiny")
    Classifier(watched.instance).load_model(model.data)
    good = {"image_data": [0] * 12, "width": 2, "height": 2, "model_id": model.spec.name}
    whole = json.dumps(good).encode()
    for text, what in ((whole, "a good request"), (whole[:-9], "a request that was cut off")):
        try:
            reply = answer(watched, text)
        except ValueError:
            _require(text is not whole, "a good request must give its answer, not an error.")
        else:
            _require(text is whole, "a request that was cut off must still raise ValueError.")
            _require(
                isinstance(reply, dict) and "label" in reply,
                f"a good request must give the guest's answer as a dict, not {reply!r}.",
            )
        _require(
            not watched.refused,
            f"{'; '.join(watched.refused)}: freed twice, or with another length than it has.",
        )
        _require(
            not watched.live,
            f"after {what} these blocks are still allocated: {', '.join(watched.live.values())}.",
        )
    return "Right: every block goes back, also when the guest refuses the request."


# --- 03 -------------------------------------------------------------------------------------------


@_exercise(
    "03-break-even",
    "Write down the total after n starts, with ahead-of-time compilation and without. When is the "
    "first one smaller?",
    "once + n * with_aot < n * without, so n > once / (without - with_aot). n is a whole number, "
    "and at equality nothing is saved yet.",
    "if without <= with_aot: return math.inf; return math.floor(once / (without - with_aot)) + 1",
)
def _break_even(answer: Any) -> str:
    cases = ((4000, 30, 800), (100, 1, 11), (80, 1, 80), (1, 1, 2.5), (5, 3, 3), (5, 4, 3))
    for once, with_aot, without in cases:
        got = answer(once, with_aot, without)
        _require(got is not ..., "your function returns the dots. Replace them.")
        case, saved = f"break_even({once}, {with_aot}, {without})", without - with_aot
        if saved <= 0:
            _require(
                got == math.inf,
                f"{case}: with AOT no start is faster, so it never pays: that is math.inf. Yours "
                f"is {got!r}.",
            )
            continue
        want = math.floor(once / saved) + 1
        _require(
            got == want,
            f"{case}: after {want} starts it is {once + want * with_aot:g} ms with AOT and "
            f"{want * without:g} without; after {want - 1} it is "
            f"{once + (want - 1) * with_aot:g} and {(want - 1) * without:g}. So it is {want}; "
            f"yours is {got!r}.",
        )
    return (
        "Right. What is done once pays by the number of starts, and not at all if none is faster."
    )


@_exercise(
    "03-reasons",
    "Compare three fields of both: machine, wasmtime, features. One file may have several faults.",
    "A feature that the CPU has and the code does not use is no fault: look for what is in "
    "artifact.features and not in here.features. Bytecode is for every machine.",
    'P5: not artifact.machine.startswith("pulley") and artifact.machine != here.machine. '
    "E6: artifact.wasmtime != here.wasmtime. E10: set(artifact.features) - set(here.features).",
)
def _reasons(answer: Any) -> str:
    triple = "x86_64-unknown-linux-gnu"
    here = Artifact("module", "x86_64", "50", triple, ("has_avx2", "has_sse3"), 4096)
    arm = replace(here, machine="aarch64", target="aarch64-unknown-linux-gnu", features=())
    bytecode = replace(here, machine="pulley64", target="pulley64-unknown", features=())
    newer_cpu = replace(here, features=("has_avx2", "has_avx512f", "has_sse3"))
    cases: tuple[tuple[Artifact, set[str], str], ...] = (
        (here, set(), "code of this very machine"),
        (replace(here, features=("has_sse3",)), set(), "code that does not use all of this CPU"),
        (arm, {"P5"}, "code of another architecture"),
        (replace(here, wasmtime="49"), {"E6"}, "code of an older wasmtime"),
        (newer_cpu, {"E10"}, "code that uses has_avx512f, which is not here"),
        (replace(newer_cpu, wasmtime="51"), {"E6", "E10"}, "a newer wasmtime, and has_avx512f"),
        (replace(arm, wasmtime="49"), {"P5", "E6"}, "another architecture, an older wasmtime"),
        (bytecode, set(), "bytecode"),
        (replace(bytecode, wasmtime="49"), {"E6"}, "bytecode of an older wasmtime"),
    )

    def fields(of: Artifact) -> str:
        return f"{of.machine}, wasmtime {of.wasmtime}, {' '.join(of.features) or 'no features'}"

    for artifact, want, what in cases:
        got = answer(artifact, here)
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(
            isinstance(got, (set, frozenset)) and got == want,
            f"{what}: the set is {want or 'empty'}; yours is {got!r}. "
            f"The code: {fields(artifact)}. Here: {fields(here)}.",
        )
    return "Right: P5, E6 and E10 stand in the header, and nothing of the code had to run."


@_exercise(
    "03-key",
    "The same module, compiled with EngineConfig(fuel=True), is other code. Does your key change?",
    "All that the code depends on: the module's bytes, the configuration, and what stands in "
    "`here`. Nothing that changes by itself, such as the time or a file's name.",
    "return hashlib.sha256(repr((wasm, config, here)).encode()).hexdigest()",
)
def _key(answer: Any) -> str:
    wasm, config = b"\0asm\1\0\0\0", EngineConfig()
    here = Artifact("module", "x86_64", "50", "x86_64-unknown-linux-gnu", ("has_sse3",), 0)
    key = answer(wasm, config, here)
    _require(key is not ..., "your function returns the dots. Replace them.")
    _require(isinstance(key, str), f"a key is a str; yours is {key!r:.80}.")
    _require(
        len(key) <= 100 and key.isalnum(),
        f"the key names a file, so letters and digits, at most 100; yours is {key!r:.100}.",
    )
    _require(
        answer(bytes(bytearray(wasm)), replace(config), replace(here)) == key,
        "the same module, configuration and machine give another key the second time: nothing "
        "would ever be found again.",
    )
    arm = replace(here, machine="aarch64", target="aarch64-unknown-linux-gnu")
    others: tuple[tuple[str, bytes, EngineConfig, Artifact], ...] = (
        ("another module of the same length", b"\0asm\1\0\0\1", config, here),
        ("fuel=True", wasm, replace(config, fuel=True), here),
        ("optimize=False", wasm, replace(config, optimize=False), here),
        ("flags=('has_avx2',)", wasm, replace(config, flags=("has_avx2",)), here),
        ("another wasmtime (E6)", wasm, config, replace(here, wasmtime="49")),
        ("a CPU without has_sse3 (E10)", wasm, config, replace(here, features=())),
        ("another machine (P5)", wasm, config, arm),
    )
    seen = {key: "the plain module here"}
    for what, *arguments in others:
        other = answer(*arguments)
        _require(
            other not in seen,
            f"the key for {what} is also the key for {seen.get(other)}: the cache would give code "
            "that does not fit.",
        )
        seen[other] = what
    return "Right: another key for all that makes other code, and the same key otherwise."


# --- 04 -------------------------------------------------------------------------------------------


@_exercise(
    "04-pack",
    "Five fields, and 20 bytes. The type takes one byte, and a pointer must begin at a multiple of "
    "four: how many bytes lie between them?",
    "struct.pack with '<' adds no padding by itself. In its format, I is a u32, B is a byte, and "
    "3x is three bytes of padding.",
    "return struct.pack('<IIB3xII', dims_at, rank, kind, data_at, size)",
)
def _pack(answer: Any) -> str:
    places = {"dims pointer": 0, "dims length": 4, "data pointer": 12, "data length": 16}
    for case in ((0x20, 4, 1, 0x1000, 602_112), (0xFFFF0000, 2, 5, 0x80000000, 0x01020304)):
        got = answer(*case)
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(isinstance(got, bytes), f"need bytes, got {type(got).__name__}.")
        _require(
            len(got) == TENSOR.size,
            f"a tensor has {TENSOR.size} bytes, yours has {len(got)}."
            + (" The three bytes of padding are missing." if len(got) == 17 else ""),
        )
        dims_at, rank, kind, data_at, size = case
        for (name, place), want in zip(places.items(), (dims_at, rank, data_at, size), strict=True):
            seen = int.from_bytes(got[place : place + 4], "little")
            _require(
                seen == want,
                f"at offset {place} the host reads the {name}: it sees {seen:#x}, where you mean "
                f"{want:#x}."
                + (" Your bytes are big-endian." if seen == _swapped(want) != want else ""),
            )
        _require(
            got[8] == kind, f"at offset 8 the host reads the type: it sees {got[8]}, not {kind}."
        )
    return "Right: 4 + 4 + 1 + 3 + 4 + 4 = 20 bytes, and a host can read them."


def _swapped(number: int) -> int:
    return int.from_bytes(number.to_bytes(4, "little"), "big")


@_exercise(
    "04-prepare",
    "Don't guess. For each render, write prepare(render.image) to the model's input, compute, and "
    "print nn.explain(instance): see its findings, and what it says about red and blue.",
    "In a context of its own, explain several renders, one after the other. The evidence adds up, "
    "and then the finding has the kind 'color'.",
    "Picture libraries differ: some give red, green, blue, others blue, green, red. The pixels of "
    "this one have red at place 0 already, so take the channels in the order (0, 1, 2).",
)
def _prepare(answer: Any) -> str:
    spec = load("signs").spec
    wants = Expectation.from_metadata(spec.to_metadata())
    assert wants is not None
    for place in (9, 17, 31):
        image = Signs("test", 64)[place].image
        want = preprocess(image, spec)
        got = answer(image)
        _require(isinstance(got, np.ndarray), f"need an array, got {type(got).__name__}.")
        _require(
            got.shape == want.shape and got.dtype == want.dtype,
            f"the model takes {want.dtype} {list(want.shape)}, you give {got.dtype} "
            f"{list(got.shape)}.",
        )
        if np.allclose(got, want, atol=1e-3):
            continue
        seen = check_input(got, wants)
        _require(not seen, " ".join(str(finding) for finding in seen or ()))
        _require(
            not np.allclose(swap_colors(got, wants), want, atol=1e-3),
            f"render {place} reaches the model with another colour: its numbers look healthy, but "
            "two of its channels are not where the model wants them.",
        )
        raise _NotYet(f"render {place} differs from what the model was trained on.")
    return (
        "Right: red, green, blue. No number betrayed it; only the model, asked about several "
        "pictures, could tell."
    )


@_exercise(
    "04-needed",
    "get_output writes the size that it needs also when it refuses. Which of its arguments says "
    "how much room there is, and which one where that size goes?",
    "Call $get_output with the context, output 0, some address, 0 bytes of room, and a free place "
    "for the size, such as 0x60. Its errno has to go somewhere: (drop …).",
    "(drop (call $get_output (local.get $context) (i32.const 0) (i32.const 0x100) (i32.const 0) "
    "(i32.const 0x60))) (i32.load (i32.const 0x60))",
)
def _needed(answer: Any) -> str:
    model = load("signs")
    _require(isinstance(answer, str), f"need WAT as a str, got {type(answer).__name__}.")
    nn = WasiNN(threads=1)
    instance = Guest(answer.strip().encode(), host=[nn]).instantiate(limits=Limits(seconds=5))
    memory, spare, data = instance.memory, len(instance.memory) - 64, 0x1000

    def call(name: str, *arguments: int) -> None:
        _require(instance.call(name, *arguments) == 0, f"{name} failed: {' '.join(nn.errors)}")

    def handle(name: str, *arguments: int) -> int:
        call(name, *arguments, spare)
        return int.from_bytes(memory.read(spare, 4), "little")

    memory.write(data, model.data)
    memory.write(spare + 8, BUILDER.pack(data, model.size_bytes))
    graph = handle("load", spare + 8, 1, Encoding.ONNX, Target.CPU)
    for batch in (1, 3):
        context = handle("init_execution_context", graph)
        shape = (batch, 3, model.spec.crop, model.spec.crop)
        memory.write(spare + 16, np.array(shape, "<u4").tobytes())
        memory.array(data, shape, np.float32)[:] = 0
        tensor = TENSOR.pack(spare + 16, len(shape), 1, data, 4 * math.prod(shape))
        memory.write(spare + 32, tensor)
        call("set_input", context, 0, spare + 32)
        call("compute", context)
        nn.errors.clear()
        got, want = instance.call("needed", context), 4 * batch * len(model.spec.labels)
        said = [line for line in nn.errors if line.startswith("get_output")]
        _require(
            got == want,
            f"with {batch} picture(s) the output has {want} bytes; needed() says {got}."
            + (f" The host heard: {said[-1]}." if said else " The host heard no get_output fail.")
            + (" That is the errno, not the size." if got == Errno.TOO_LARGE else ""),
        )
    _require(
        any("too_large" in line for line in said),
        "the size is right, but your buffer was large enough for all of the output. Ask with no "
        "room.",
    )
    return "Right: refused, and told how much room it takes. A guest can ask first, then allocate."


# --- 05 -------------------------------------------------------------------------------------------


@_exercise(
    "05-starts",
    "Whole steps from 0 on come first. What is left at the end is shorter than a step. But a step "
    "must be whole: where can the last one begin?",
    "The last step may begin at n - step, and do some elements once more. That does no harm, since "
    "it reads from one place and writes to another.",
    "return [*range(0, n - step, step), n - step]",
)
def _starts(answer: Any) -> str:
    for n, step in ((16, 16), (17, 16), (31, 16), (32, 16), (7, 4), (5, 5), (1000, 48)):
        got = answer(n, step)
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(
            isinstance(got, (list, tuple, range)) and all(isinstance(i, int) for i in got),
            f"need a list of whole numbers, got {got!r:.80}.",
        )
        case = f"with {n} elements in steps of {step} you begin at {list(got)!r:.80}"
        outside = [i for i in got if i < 0 or i + step > n]
        _require(
            not outside,
            f"{case}. The step at {outside[:1]} reads elements that are not there: another "
            "buffer's, or none at all.",
        )
        done = {i + k for i in got for k in range(step)}
        _require(
            len(done) == n,
            f"{case}. Never done: {n - len(done)}. The article's kernel forgets its last elements "
            "in the same way.",
        )
        wanted = math.ceil(n / step)
        _require(
            len(got) == wanted, f"{case}. It takes no more than {wanted}, you need {len(got)}."
        )
    return "Right: whole steps only, nothing forgotten, and at most one step overlaps."


@_exercise(
    "05-palette",
    "A swizzle picks from a vector of 16 bytes by 16 indices at once. Here the table is the "
    "vector, and the pixels are the indices.",
    "Load the table once, before the loop. In the loop: load 16 pixels, u8x16_swizzle(table, "
    "pixels), store. What is left at the end takes the old loop: a pixel must not be looked up "
    "twice.",
    "let t = v128_load(table as *const v128); let mut i = 0; while i + 16 <= n { let p = at.add(i) "
    "as *mut v128; v128_store(p, u8x16_swizzle(t, v128_load(p))); i += 16; } and the old loop from "
    "i on. WAT: v128.load, i8x16.swizzle, v128.store.",
)
def _palette(answer: Any) -> str:
    guest = Guest(_compile(answer), cache=False, fuel=True)
    instance = guest.instantiate(limits=Limits(seconds=2))
    rng, memory = np.random.default_rng(5), instance.memory
    start = len(memory) - 8192  # behind what a small module has in its memory
    for n in (16, 160, 4096, 1, 15, 17, 1003):
        table = rng.permutation(256)[:16].astype(np.uint8)
        before = rng.integers(0, 16, n + 64, np.uint8)
        memory.write(start, table.tobytes())
        view = memory.array(start + 64, n + 64)
        view[:] = before
        fuel = instance.fuel_used
        instance.call("palette", start + 96, n, start)
        fuel = instance.fuel_used - fuel
        got, want = view[32 : 32 + n].copy(), table[before[32 : 32 + n]]
        wrong = np.flatnonzero(got != want)
        if len(wrong):
            i = int(wrong[0])
            raise _NotYet(
                f"of {n} pixels, {len(wrong)} are wrong. Number {i} was {before[32 + i]}, which is "
                f"{want[i]} in the table, and is {got[i]}."
            )
        view[32 : 32 + n] = before[32 : 32 + n]
        _require(
            bool((view == before).all()),
            f"with {n} pixels, bytes beside them changed as well: a step reaches too far.",
        )
        _require(
            n < 4096 or fuel <= 2 * n,
            f"right, but not yet fast: {fuel:,} instructions for {n:,} pixels. With vectors it "
            "takes about one for a pixel, or less.",
        )
    return "Right: each pixel once, 16 at a time, and none beyond the end."


# --- 06 -------------------------------------------------------------------------------------------


def _with_rounded_layer(layer: str, bits: int = 4) -> bytes:
    """The model that ships, with one layer's weights rounded, with one step for the tensor."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(load("signs").data)
    for tensor in model.graph.initializer:
        if tensor.name == layer:
            weights = numpy_helper.to_array(tensor)
            step = np.abs(weights).max() / (2 ** (bits - 1) - 1)
            near = (step * np.round(weights / step)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(near, layer))
    return bytes(model.SerializeToString())


@functools.cache
def _uneven_layers() -> dict[str, float]:
    """Layer → largest weight of its widest channel over that of a median one, widest first."""
    import onnx
    from onnx import numpy_helper

    ratios = {}
    for tensor in onnx.load_model_from_string(load("signs").data).graph.initializer:
        if len(tensor.dims) > 1:
            weights = numpy_helper.to_array(tensor)
            largest = np.abs(weights.reshape(len(weights), -1)).max(1)
            ratios[tensor.name] = float(largest.max() / np.median(largest))
    return dict(sorted(ratios.items(), key=lambda item: -item[1]))


@_exercise(
    "06-layers",
    "There are 53 layers, so write a loop. `changed` makes the model with other weights: change "
    "those of one name, and return all others as they are.",
    "For each name: after = logits(changed(lambda n, w: rounded(w, 4, False) if n == name else w), "
    "dozen). Keep divergence(before, after) under the name.",
    "layers = sorted(moved, key=moved.get)[-2:], where moved is a dict of name → divergence.",
)
def _layers(answer: Any) -> str:
    ratios = _uneven_layers()
    _require(
        isinstance(answer, (list, tuple, set)) and len(answer) == 2 and set(answer) <= set(ratios),
        f"need two names of layers, such as {list(ratios)[-1]!r}; got {answer!r:.80}.",
    )
    batch = prepare(Signs("test", 24), load("signs").spec)
    before = logits(load("signs"), batch)
    moved = {
        name: divergence(before, logits(_with_rounded_layer(name), batch))
        for name in {*answer, *list(ratios)[:6]}
    }
    worst = sorted(moved, key=lambda name: -moved[name])
    missed = [name for name in answer if name not in worst[:2]]
    if missed:
        raise _NotYet(
            f"rounding {missed[0]} moves the probabilities by {moved[missed[0]]:.4f} nats. There "
            f"is a layer that moves them {moved[worst[1]] / moved[missed[0]]:.0f} times as far."
        )
    times = moved[worst[1]] / moved[worst[2]]
    return (
        f"Right: {' and '.join(worst[:2])}, the first convolution and the first depthwise one. "
        f"Each moves the probabilities {times:.0f} times as far as the next of the uneven layers, "
        f"or more. Their widest channels have weights {ratios[worst[0]]:.1f} and "
        f"{ratios[worst[1]]:.1f} times as large as a median channel's; they have 32 channels, and "
        "all other layers build on them."
    )


@_exercise(
    "06-coin",
    "If 8 are lost and 2 gained, the few are 2. As uneven to one side: 0, 1 or 2 heads of 10. The "
    "other side is as probable.",
    "few = min(lost, gained); add math.comb(n, k) for k from 0 to few, divide by 2 ** n, double.",
    "return min(1, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2 ** n), since with as many "
    "heads as tails both sides share a case.",
)
def _coin(answer: Any) -> str:
    for lost, gained in ((8, 2), (4, 0), (0, 6), (5, 5), (0, 0), (3, 9), (60, 85), (400, 700)):
        got = answer(lost, gained)
        _require(got is not ..., "your function returns the dots. Replace them.")
        want = mcnemar_p(lost, gained)
        _require(
            isinstance(got, (int, float)) and math.isclose(got, want, rel_tol=1e-6),
            f"with {lost} lost and {gained} gained p is {want:.4g}; yours says {got!r:.40}.",
        )
    return (
        "Right. Six to none is the least that gets below 0.05: 2 / 64 = 0.031. And with 400 to "
        "700, nobody needs a formula."
    )


@_exercise(
    "06-calibrate",
    "The ranges of the values between the layers are taken from your pictures. What if hardly any "
    "edge or colour is in them?",
    "A picture with nothing in it gives small values everywhere. A normalised 0 is a mean grey.",
    "pictures = np.zeros((32, 3, 224, 224), np.float32)",
)
def _calibrate(answer: Any) -> str:
    from edgelab.quantize import quantize

    signs = load("signs")
    shape = (32, 3, signs.spec.crop, signs.spec.crop)
    _require(
        isinstance(answer, np.ndarray) and answer.shape == shape and answer.dtype == np.float32,
        f"need a float32 array of shape {shape}; got {getattr(answer, 'dtype', type(answer))} of "
        f"{getattr(answer, 'shape', 'no shape')}.",
    )
    _require(
        bool(np.isfinite(answer).all()) and answer.min() >= -2.2 and answer.max() <= 2.7,
        "your pictures have values that no picture has. Stay between -2.2 and 2.7.",
    )
    batch = prepare(Signs("test", 160), signs.spec)
    with tempfile.TemporaryDirectory() as folder:
        made = quantize(signs, Path(folder) / "ruined.onnx", "int8", calibration=answer)
        ruined = load(made.path)
    right = {
        name: int((logits(model, batch).argmax(1) == batch.labels).sum())
        for name, model in (("fp32", signs), ("int8", ruined))
    }
    lost = 100 * (right["fp32"] - right["int8"]) / len(batch)
    _require(
        lost > 10,
        f"int8 gets {right['int8']} of {len(batch)} renders right, and float32 {right['fp32']}. "
        "These pictures are too good for it.",
    )
    return (
        f"Right: of {len(batch)} renders float32 gets {right['fp32']} right, and your int8 "
        f"{right['int8']}. No tool complained. So look at what a model was calibrated with."
    )


# --- 07 -------------------------------------------------------------------------------------------


@_exercise(
    "07-three",
    "Look at what takes longest in the naive way: it is done anew for each request. What would "
    "have to stay, and what would have to go?",
    "Three things cost most: to compile the guest, to load the model, and to write and read JSON. "
    "Each has a switch. For the first there are even two that will do.",
    'three = {"instance", "model", "binary"}: a guest that stays is not compiled again.',
)
def _three(answer: Any) -> str:
    _require(
        isinstance(answer, (set, frozenset, list, tuple)) and set(answer) <= set(SWITCHES),
        f"need a set of names from SWITCHES, got {answer!r:.80}.",
    )
    _require(len(set(answer)) == 3, f"need three switches, got {len(set(answer))}.")
    small = load("signs") if "int8" in answer else None  # its speed is not the question here
    try:
        way = Way(load("signs"), answer, small=small, threads=1)
    except ValueError as error:
        raise _NotYet(f"{error}.") from None
    picture = example_image().read_bytes()
    way.classify(picture)
    later = way.classify(picture)
    _require(
        later.origin != "compiled",
        "with these, each request still compiles the guest, which takes longer than all else.",
    )
    _require(not later.loaded, "with these, each request still loads the model.")
    _require(
        later.json_bytes == 0,
        f"with these, each request is still {later.json_bytes:,} bytes of JSON, to write and read.",
    )
    return (
        "Right: a guest that need not be compiled, a model that stays, and no JSON. None of the "
        "three makes anything faster; each leaves something out. Measure them, and see what is "
        "left for the others."
    )


@_exercise(
    "07-ahead",
    "Submit as you take. When enough are on their way, give the oldest before you take the next.",
    "Keep the futures in a deque, in the order of submission: append on the right, popleft to "
    "give. What is left at the end has to be given too.",
    "waiting = deque(); for image in images: waiting.append(submit(image)); if len(waiting) == "
    "ahead: yield waiting.popleft(); and after the loop: yield from waiting",
)
def _ahead(answer: Any) -> str:
    with ThreadPoolExecutor(2) as threads:
        for ahead, count in ((1, 4), (3, 20), (4, 2), (8, 40)):
            _stream_once(answer, threads, ahead, count)
    return (
        "Right: in order, never too far ahead, and a bad picture is one answer among others. That "
        "is back-pressure: a slow reader slows the source."
    )


def _stream_once(answer: Any, threads: ThreadPoolExecutor, ahead: int, count: int) -> None:
    taken = given = most = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(count):
            taken += 1
            _require(
                taken <= given + ahead,
                f"with ahead={ahead} you took image {number} when {given} answers were given. A "
                "camera never ends: what is taken ahead fills the memory.",
            )
            yield number

    def half(number: int) -> float:
        if number % 5 == 3:
            raise ValueError("no picture")
        return number / 2

    stream = answer(lambda number: threads.submit(half, number), source(), ahead)
    _require(stream is not ... and stream is not None, "your function gives nothing yet.")
    for future in stream:
        most = max(most, taken - given)
        _require(
            isinstance(future, Future),
            f"give the futures, not their results; you gave {future!r:.60}. One bad picture must "
            "not end the stream.",
        )
        failed = future.exception() is not None
        _require(
            failed is (given % 5 == 3) and (failed or future.result() == given / 2),
            f"answer {given} is not that of image {given}: give them in the images' order.",
        )
        given += 1
    _require(
        given == count,
        f"of {count} images, with ahead={ahead}, you gave {given} answers. What is still on its "
        "way when the images end?",
    )
    _require(
        most == min(ahead, count),
        f"with ahead={ahead} at most {most} were on their way at a time. So threads wait for the "
        "reader, though they need not.",
    )


@_exercise(
    "07-lru",
    "Used is used: also a model that is loaded already becomes the most recent one.",
    "Keep a list from the least to the most recently used. Take the model out if it is there, "
    "append it, then drop from the front while the sum of sizes is too large.",
    "loaded = []; for name in requests: if name in loaded: loaded.remove(name); "
    "loaded.append(name); while sum(sizes[n] for n in loaded) > limit: loaded.pop(0)",
)
def _lru(answer: Any) -> str:
    import cachetools

    sizes = {"small": 3, "middle": 4, "large": 8, "tiny": 1}
    for requests, limit in (
        ("small middle", 8),
        ("small middle small large", 12),
        ("small middle small large", 11),
        ("large small large middle", 12),
        ("tiny small middle large", 9),
        ("tiny small tiny middle tiny large tiny small", 10),
    ):
        cache: cachetools.LRUCache[str, str] = cachetools.LRUCache(limit, sizes.__getitem__)
        order: list[str] = []
        for name in requests.split():
            cache[name] = name
            order = [each for each in [*(n for n in order if n != name), name] if each in cache]
        got = answer(requests.split(), sizes, limit)
        _require(got is not ..., "your function returns the dots. Replace them.")
        case = f"after {requests!r} with room for {limit}"
        _require(
            isinstance(got, (list, tuple)) and set(got) <= set(sizes),
            f"need a list of names, got {got!r:.60}.",
        )
        _require(
            sum(sizes[name] for name in got) <= limit,
            f"{case}, {list(got)} take {sum(sizes[name] for name in got)}: too much.",
        )
        _require(
            set(got) == set(order),
            f"{case}, {order} are loaded; you say {list(got)}. Which one was used longest ago, and "
            "is there no room for more?",
        )
        _require(
            list(got) == order,
            f"{case}, these are the ones, but their order is {order}: least recently used first.",
        )
    return "Right: by bytes, not by number; and to use a model is to save it."


# --- 08 -------------------------------------------------------------------------------------------


@_exercise(
    "08-binary",
    "A body has two parts: a JSON text that describes the tensor, and the tensor's bytes right "
    "behind it. How does the server know where the first ends, and how long the second is?",
    "Header `Inference-Header-Content-Length`: bytes of the JSON text. In it, the input's "
    '"parameters" hold "binary_data_size": tensor.nbytes. There is no "data".',
    'head = json.dumps({"inputs": [{"name": "input", "shape": list(tensor.shape), "datatype": '
    '"FP32", "parameters": {"binary_data_size": tensor.nbytes}}]}).encode(); return '
    '{"Inference-Header-Content-Length": str(len(head))}, head + tensor.tobytes()',
)
def _binary(answer: Any) -> str:
    rng = np.random.default_rng(8)
    for tensor in (
        rng.normal(size=(1, 3, 4, 4)).astype(np.float32),
        rng.normal(size=(4, 6, 3, 2)).astype(np.float32).T,
    ):
        got = answer(tensor)
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(
            isinstance(got, tuple) and len(got) == 2 and isinstance(got[1], bytes),
            f"need a pair: a dict of headers, and bytes; got {got!r:.60}.",
        )
        headers = {str(name).lower(): value for name, value in dict(got[0]).items()}
        length = headers.get("inference-header-content-length")
        _require(
            isinstance(length, str) and length.isdecimal(),
            "the header Inference-Header-Content-Length must be a number, as a str; "
            f"got {length!r}.",
        )
        size = int(str(length))
        try:
            head = json.loads(got[1][:size])
        except ValueError:
            raise _NotYet(
                f"the first {size:,} bytes of the body, which is what the header says, are no "
                "JSON. The length is that of the JSON text alone, in bytes."
            ) from None
        (given,) = head["inputs"]
        _require(
            (given.get("name"), given.get("datatype")) == ("input", "FP32"),
            f"the input is 'input', of type 'FP32'; yours is {given.get('name')!r}, "
            f"{given.get('datatype')!r}.",
        )
        _require(
            list(given.get("shape", ())) == list(tensor.shape),
            f"the shape is {list(tensor.shape)}; yours is {given.get('shape')}.",
        )
        _require("data" not in given, 'with the bytes behind the JSON, there must be no "data".')
        told, follow = given.get("parameters", {}).get("binary_data_size"), got[1][size:]
        _require(
            told == tensor.nbytes,
            f'the tensor has {tensor.nbytes} bytes; your "binary_data_size" says {told}.',
        )
        _require(
            len(follow) == tensor.nbytes,
            f"{tensor.nbytes} bytes must follow the JSON; yours has {len(follow)}.",
        )
        seen = np.frombuffer(follow, "<f4").reshape(tensor.shape)
        _require(
            bool((seen == tensor).all()),
            "the server reads other numbers than yours: little-endian floats, in the order of the "
            "indices. (A transposed array lies in memory in another order; `tobytes` knows that.)",
        )
    return "Right. That is what tritonclient sends. No number is written out, and none is parsed."


@_exercise(
    "08-queue",
    "One worker. A request can begin when it is due, unless the worker is still at the one before. "
    "When does each one end?",
    "Keep one number: when the worker is free again. end = max(due, free) + work, and then free = "
    "end.",
    "free, took = 0.0, []; for each d, w in zip(due, work): free = max(free, d) + w; "
    "took.append(free - d)",
)
def _queue(answer: Any) -> str:
    ticks = [k / 10 for k in range(50)]
    cases = [
        (ticks, [0.05] * 50, "half the load: nobody waits"),
        (ticks, [0.05] * 20 + [1.0] + [0.05] * 29, "one stall of a second, in which ten were due"),
        (ticks, [0.11] * 50, "ten percent too much: each waits longer than the one before"),
        ([0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0], "three at once, and one later"),
    ]
    for due, work, what in cases:
        got = answer(list(due), list(work))
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(
            isinstance(got, (list, tuple, np.ndarray)) and len(got) == len(due),
            f"need {len(due)} latencies, one for each request; got {got!r:.60}.",
        )
        # By counting, not by the formula: each worker's minute is given to who is next.
        ends, now = [], 0.0
        for k in range(len(due)):
            now = now if now > due[k] else due[k]
            now += work[k]
            ends.append(now)
        want = [end - d for end, d in zip(ends, due, strict=True)]
        wrong = [k for k in range(len(due)) if not math.isclose(got[k], want[k], abs_tol=1e-9)]
        if wrong:
            k = wrong[0]
            raise _NotYet(
                f"{what}: request {k} was due at {due[k]:g} s and takes {work[k]:g} s of work. It "
                f"ends {want[k]:.2f} s after it was due; yours says {got[k]:.2f} s."
            )
    return (
        "Right. So a stall of one second hits all that were due in it, and 10 % too much load "
        "makes the latency grow for ever: there is no steady state. That is why a service refuses."
    )


# --- 09 -------------------------------------------------------------------------------------------


@_exercise(
    "09-pull",
    "A layer that is in two images has one hash. How often does the node fetch it? And one that it "
    "holds already?",
    "First collect the layers of all images in a dict, hash to bytes: so each is there once.",
    "needed = {layer: size for image in images for layer, size in image}; sum the sizes of those "
    "that are not in held.",
)
def _pull(answer: Any) -> str:
    base, server, model = ("a1", 75_000_000), ("b2", 150_000_000), ("c3", 9_000_000)
    cases: tuple[tuple[list[list[tuple[str, int]]], set[str], int, str], ...] = (
        ([[base, server]], set(), 225_000_000, "one image, and a node that holds nothing"),
        ([[base, server], [base, model]], set(), 234_000_000, "two images that share a layer"),
        ([[base, server], [model]], {"a1", "b2"}, 9_000_000, "a new model, and the rest is there"),
        ([[base, server], [model]], {"a1", "b2", "c3", "d4"}, 0, "a node that holds everything"),
        ([[("e5", 7), ("f6", 7)]], set(), 14, "two layers of the same size"),
        ([], {"a1"}, 0, "no image"),
    )
    for images, held, want, what in cases:
        got = answer([list(image) for image in images], set(held))
        _require(got is not ..., "your function returns the dots. Replace them.")
        _require(got == want, f"{what}: {want:,} bytes; yours says {got!r:.40}.")
    return (
        "Right. With the model in an image of its own, a new model costs each node 9 MB and a new "
        "server no model. In one image, each change of either would cost both."
    )


@_exercise(
    "09-cure",
    "Run `check([cure(copy.deepcopy(deployment))], footprint=footprint)` and mend what it names, "
    "one after the other. The server needs no module from outside: drop command and volume.",
    "The container: image (with a version), livenessProbe and readinessProbe with httpGet on the "
    "routes /v2/health/live and /v2/health/ready at port 8080, a memory limit above the footprint, "
    "a securityContext. The pod: runAsNonRoot and a seccompProfile.",
    "container = deploy.kubernetes(plan)[0]['spec']['template']['spec']['containers'][0] shows "
    "what each of them looks like; the pod's securityContext is beside 'containers'.",
)
def _cure(answer: Any) -> str:
    from edgelab.deploy import Footprint, article
    from edgelab.manifests import check

    mib = 1 << 20
    measured = Footprint("signs", 1, 3.0, 240 * mib, 420 * mib, 1200 * mib, 16)
    _, deployment = article(b"\0asm\1\0\0\0")
    cured = answer(deployment)
    _require(cured is not ..., "your function returns the dots. Replace them.")
    _require(isinstance(cured, dict), f"need the Deployment, a dict; got {type(cured).__name__}.")
    found = check([cured], footprint=measured)
    _require(not found, f"{len(found)} finding(s) left. The first: {next(iter(found), '')!s}")
    _require(
        cured.get("kind") == "Deployment" and cured["spec"].get("replicas") == 3,
        "it must still be a Deployment of 3 replicas.",
    )
    routes = {"/v2/health/live", "/v2/health/ready", "/v2/models/signs/ready"}
    for container in cured["spec"]["template"]["spec"]["containers"]:
        for probe in ("livenessProbe", "readinessProbe"):
            get = container[probe].get("httpGet", {})
            _require(
                get.get("path") in routes and get.get("port") in (8080, "http"),
                f"{probe} asks for {get.get('path')!r} at port {get.get('port')!r}. The server has "
                "/v2/health/live and /v2/health/ready at 8080; all else is 404, and the pod would "
                "be restarted for ever.",
            )
        _require(
            "wasmedge" not in [*container.get("command", ()), container["image"].split(":")[0]],
            "it still starts wasmedge, which serves nothing. The image's own entry point is right.",
        )
        _require(
            not [p for p in (container["livenessProbe"],) if "models" in p["httpGet"]["path"]],
            "a model that is not loaded is no reason to kill the server: ask /v2/health/live.",
        )
    return "Right: nothing is left to find. A cluster could still be short of memory, and say so."


# --- 10 -------------------------------------------------------------------------------------------


@_exercise(
    "10-cut",
    "Who knows that it was the *end* that was wrong? One of the two parsers says so.",
    "Try json.loads first: if it takes the text, that is 'whole'. If not, ask the guest: it gives "
    "E8 for a text that ends too early, and another id for the rest.",
    "except json.JSONDecodeError: id = classifier.infer(text.encode())['error']['id']; return "
    "'cut' if id == 'E8' else 'wrong'",
)
def _cut(answer: Any) -> str:
    whole = ('{"a": [1, 2]}', "[]", ' {"a": "b"} ', '"text"')
    wrong = ('{"a": 1,}', "{'a': 1}", "[1 2]", "[1]]", "[01]", "<html>", '{"a": tru}', '["\\x"]')
    cut = ('{"a": [1, 2', '{"a": "b', '{"a": [1,', '{"a"', "[tru", "[1.", '["\\u00', "[-")
    for kind, texts in (("whole", whole), ("cut", cut), ("wrong", wrong)):
        for text in texts:
            got = answer(text)
            _require(got is not ..., "your function returns the dots. Replace them.")
            hint = " It is not complete, and could become whole." * (kind == "cut")
            _require(got == kind, f"{text!r} is {kind!r}; you say {got!r:.40}.{hint}")
    return "Right. To ask again helps for the cut ones; the wrong ones come back as they were."


@_exercise(
    "10-ship",
    "When does no file of machine code exist for all of them? Two fields must be equal.",
    "Another machine is P5, another wasmtime is E6: None. Of the features, what one CPU lacks "
    "kills it (E10).",
    "If {(m.machine, m.wasmtime) for m in fleet} has one element, return "
    "set.intersection(*(set(m.features) for m in fleet)); else None.",
)
def _ship(answer: Any) -> str:
    def of(machine: str, wasmtime: str, *features: str) -> Artifact:
        return Artifact("module", machine, wasmtime, f"{machine}-unknown-linux-gnu", features, 0)

    new = of("x86_64", "50", "has_avx", "has_avx2", "has_avx512f")
    old, bare = of("x86_64", "50", "has_avx", "has_bmi1"), of("x86_64", "50")
    for fleet, want, why in (
        ([new], {"has_avx", "has_avx2", "has_avx512f"}, "alone, it may use all that it has"),
        ([new, old], {"has_avx"}, "what one of them lacks kills it there"),
        ([old, new], {"has_avx"}, "what one of them lacks kills it there"),
        ([new, old, bare], set(), "there is such a file: it uses nothing special"),
        ([new, of("aarch64", "50", "has_lse")], None, "P5: they are different machines"),
        ([new, of("aarch64", "50")], None, "P5: they are different machines"),
        ([new, of("x86_64", "49", "has_avx")], None, "E6: they have different versions"),
    ):
        got = answer(list(fleet))
        _require(got is not ..., "your function returns the dots. Replace them.")
        right = got is None if want is None else isinstance(got, (set, frozenset)) and got == want
        told = "; ".join(f"{m.machine}, wasmtime {m.wasmtime}: {set(m.features)}" for m in fleet)
        _require(right, f"for {told}, it is {want}: {why}. You say {got!r:.80}.")
    return "Right: one kind of machine, one version, and what all CPUs have in common."
