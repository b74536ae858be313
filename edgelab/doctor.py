"""Look at everything that edgelab needs on this machine, and say how to mend what is wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from edgelab.errors import EdgelabError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    topic : str
    state : {"ok", "warning", "failure"}
    detail : str
        What was found; for trouble, with the cause and the cure.
    """

    topic: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Run all checks. None of them installs or builds anything.

    Returns
    -------
    list of Finding
        In the order of `CHECKS`; a check that fails is a finding, never an exception.
    """
    findings = []
    for topic, check in CHECKS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state, detail = "ok", check()
            except EdgelabError as error:
                state, detail = "failure", str(error)
            except Exception as error:  # the doctor must survive every patient
                state, detail = "failure", f"{type(error).__name__}: {error}"
        if caught and state == "ok":
            state, detail = "warning", "; ".join(str(w.message) for w in caught)
        findings.append(Finding(topic, state, detail))
    return findings


def _python() -> str:
    packages = ("wasmtime", "onnxruntime", "numpy", "pillow")
    return ", ".join(
        [f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in packages)]
    )


def _cpu() -> str:
    from edgelab.measure import fingerprint

    here = fingerprint()
    return f"{here.cpu}, {here.cores} core(s), {', '.join(here.features) or 'features unknown'}"


def _rust() -> str:
    from edgelab.paths import source_root
    from edgelab.toolchain import installed

    root = source_root()
    if root is None:
        return "not needed: this edgelab ships its guests"
    try:
        return str(installed(root / "guest"))
    except EdgelabError as error:
        warnings.warn(
            f"P1/E1: {error} `python -m edgelab guest build` tries to get one; without it the "
            "guests that the package ships are used",
            stacklevel=2,
        )
        return ""


def _guests() -> str:
    from edgelab.build import GUESTS, ready_guest

    sizes = []
    for name in GUESTS:
        guest = ready_guest(name)
        if guest is None:
            raise EdgelabError(f"{name} is not built yet. Run: python -m edgelab guest build")
        sizes.append(f"{name} {guest.size_bytes:,} bytes")
    return ", ".join(sizes)


def _simd() -> str:
    from edgelab.runtime import Guest

    guest = Guest(
        b'(module (func (export "sum") (result i32) (i32x4.extract_lane 2 '
        b"(i32x4.add (v128.const i32x4 1 2 3 4) (v128.const i32x4 10 20 30 40)))))",
        cache=False,
    )
    if guest.instantiate().call("sum") != 33:
        raise EdgelabError("wasmtime computes SIMD wrongly here; install another wasmtime version")
    return "wasmtime runs SIMD128"


def _cache() -> str:
    from edgelab.aot import compile_module
    from edgelab.paths import cache_dir

    empty_module = b"\0asm\x01\0\0\0"
    compile_module(empty_module)  # warns if the cache can't be used
    origin = compile_module(empty_module).origin
    return f"{cache_dir()} is private; machine code comes from: {origin}"


def _models() -> str:
    from edgelab import models

    shipped = [name for name in models.names() if "path" in models.registry()[name]]
    return ", ".join(f"{name} {models.load(name).size_bytes:,} bytes" for name in shipped)


def _classify() -> str:
    from edgelab.bench import EXAMPLE_LABEL
    from edgelab.build import ready_guest
    from edgelab.models import example_image
    from edgelab.pipeline import Pipeline

    if ready_guest("classify_nn") is None:
        raise EdgelabError("no guest to try; run: python -m edgelab guest build")
    seen = Pipeline("signs").classify(example_image())
    if seen.label != EXAMPLE_LABEL:
        raise EdgelabError(
            f"the example picture shows a {EXAMPLE_LABEL!r} sign and is seen as {seen.label!r}. "
            "Restore the model and rebuild the guest: git checkout -- models && make clean guest"
        )
    return f"the example picture shows {seen.label!r} ({seen.top[0].probability:.1%})"


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "cpu": _cpu,
    "rust": _rust,
    "guests": _guests,
    "simd": _simd,
    "cache": _cache,
    "models": _models,
    "classify": _classify,
}
"""Topic → check; a check returns what it found, warns, or raises EdgelabError with the cure."""
