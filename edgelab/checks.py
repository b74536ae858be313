"""Checks of the lessons' exercises: hints, and an answer's verdict with the reason.

A check runs the answer on cases that the lesson does not show, and explains the first one that
fails. It never raises because of a wrong answer, so that a lesson runs to its end.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgelab.build import guest_path
from edgelab.classify import Classifier
from edgelab.datasets import SIGNS, Signs
from edgelab.errors import BuildError, EdgelabError, LimitError, ToolchainError
from edgelab.models import load
from edgelab.pipeline import Pipeline
from edgelab.runtime import Guest, Limits
from edgelab.snippet import compile_rust

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
