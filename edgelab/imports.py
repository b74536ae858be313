"""Which imports a host does not provide, what is to blame, and what to do.

The one place for that: `edgelab.runtime.Guest` raises what it says, `edgelab.inspection` shows it.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgelab.wasm import Signature

Wanted = tuple[str, str, str]
"""Module, name, and what it must be, as `edgelab.runtime.Guest.imports` has it."""
Offered = Mapping[tuple[str, str], str]
"""Module and name of a function → its signature, such as ``"(i32) -> (i64)"``."""

_PREVIEW_1 = """
args_get ii->i                 args_sizes_get ii->i           environ_get ii->i
environ_sizes_get ii->i        clock_res_get ii->i            clock_time_get ili->i
fd_advise illi->i              fd_allocate ill->i             fd_close i->i
fd_datasync i->i               fd_fdstat_get ii->i            fd_fdstat_set_flags ii->i
fd_fdstat_set_rights ill->i    fd_filestat_get ii->i          fd_filestat_set_size il->i
fd_filestat_set_times illi->i  fd_pread iiili->i              fd_prestat_get ii->i
fd_prestat_dir_name iii->i     fd_pwrite iiili->i             fd_read iiii->i
fd_readdir iiili->i            fd_renumber ii->i              fd_seek ilii->i
fd_sync i->i                   fd_tell ii->i                  fd_write iiii->i
path_create_directory iii->i   path_filestat_get iiiii->i     path_filestat_set_times iiiilli->i
path_link iiiiiii->i           path_open iiiiillii->i         path_readlink iiiiii->i
path_remove_directory iii->i   path_rename iiiiii->i          path_symlink iiiii->i
path_unlink_file iii->i        poll_oneoff iiii->i            proc_exit i->
proc_raise i->i                random_get ii->i               sched_yield ->i
sock_accept iii->i             sock_recv iiiiii->i            sock_send iiiii->i
sock_shutdown ii->i
""".split()  # noqa: SIM905 (a list would be one name a line)
WASI_MODULE = "wasi_snapshot_preview1"
WASI: dict[tuple[str, str], str] = {
    (WASI_MODULE, name): str(Signature.of(codes))
    for name, codes in zip(_PREVIEW_1[::2], _PREVIEW_1[1::2], strict=True)
}
"""WASI preview 1, which `edgelab.runtime.Guest` always provides."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a module, or may surprise.

    Attributes
    ----------
    id : str
        Which pitfall or error of the article it is, such as ``"E5"``.
    what, why, cure : str
        What was found; the likely reason; what to do.
    fatal : bool
        The module can't run here because of it.
    """

    id: str
    what: str
    why: str
    cure: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.id}: {self.what}. {self.why} {self.cure}"


def missing_imports(imports: Iterable[Wanted], hosts: Offered) -> list[Wanted]:
    """Return what neither WASI preview 1 nor `hosts` provide, or only with another signature."""
    return [
        (module, name, kind)
        for module, name, kind in imports
        if (hosts.get((module, name)) or WASI.get((module, name))) != kind
    ]


def explain_imports(imports: Iterable[Wanted], hosts: Offered) -> list[Problem]:
    """Say what is behind the `missing_imports`.

    Parameters
    ----------
    imports : iterable of (str, str, str)
        See `Wanted`.
    hosts : mapping
        What the host provides beside WASI; see `Offered`.

    Returns
    -------
    list of Problem
        One for each cause; empty if nothing is missing.
    """
    offered = {**WASI, **hosts}
    by_cause: dict[_Cause, list[Wanted]] = {}
    for wanted in missing_imports(imports, hosts):
        by_cause.setdefault(_cause(wanted, offered), []).append(wanted)
    problems = []
    for cause, group in by_cause.items():
        named: list[str] = []
        hints: list[str] = []
        for module, name, kind in group[:_NAMED]:
            what = shown(kind) if kind.startswith("(") else f"(a {kind})"
            named.append(f"{shown(module)}::{shown(name)} {what}")
            if have := offered.get((module, name)):
                named[-1] += f", which is {have} here"
            hints += _near_misses(module, name, offered, misplaced=cause is _UNDEFINED)
        if len(group) > _NAMED:
            named.append(f"and {len(group) - _NAMED} more")
        what = f"the guest imports {'; '.join(named)}"
        if cause is not _OTHER_SIGNATURE:
            what += "; nobody provides " + ("it" if len(group) == 1 else "them")
        problems.append(Problem(cause.id, what, " ".join([cause.why, *hints]), cause.cure))
    return problems


_NAMED = 5  # imports that a message names


class _Cause(NamedTuple):
    id: str
    why: str
    cure: str
    target: str = ""  # what such an import was built for


_OTHER_SIGNATURE = _Cause(
    "E5",
    "This does not fit what the host provides: guest and host must agree on a function's "
    "parameters and results.",
    "Correct the declaration in the extern block; or use the crate that belongs to the interface "
    "(for WASI-NN, wasi-nn 0.6).",
)
_UNDEFINED = _Cause(
    "E5",
    "It is an undefined symbol: declared in the guest's source, and not defined there.",
    "If it is your own extern function, link its definition, or pass a host module that provides "
    "it.",
)
_NO_WASI_NN = _Cause(
    "P3",
    "The guest wants WASI-NN, and this host has none.",
    "Pass it: Guest(..., host=[edgelab.wasinn.WasiNN()]).",
)
_WASIP1 = "Build it with --target wasm32-wasip1."
# The first pattern that matches "module::name what" counts.
_CAUSES: tuple[tuple[str, _Cause], ...] = (
    (
        r"wasi_ephemeral_nn::",
        _Cause("P3", "WASI-NN has no such function.", "Use the crate wasi-nn 0.6."),
    ),
    (
        r"wasi_nn::",
        _Cause(
            "P3",
            "The guest wants WASI-NN under a name that only the runtime WAMR knows.",
            "Use the crate wasi-nn 0.6, which calls it wasi_ephemeral_nn as others do.",
        ),
    ),
    (
        r"wasi::thread-spawn",
        _Cause(
            "E7",
            "Built for wasm32-wasip1-threads; edgelab has no threads in guests.",
            _WASIP1,
            "wasm32-wasip1-threads",
        ),
    ),
    (
        r"wasi:nn/",
        _Cause(
            "E7",
            "Built for another WASI: the crate wasi-nn 0.7 wants the newer WASI-NN for components.",
            "Use the crate wasi-nn 0.6 with --target wasm32-wasip1. Or make a component of it, for "
            "edgelab.wasinn.component.Component.",
            "part of a wasm32-wasip2 component",
        ),
    ),
    (
        r"wasi:[^:]|\[export\]",
        _Cause(
            "E7",
            "Built for another WASI: preview 2, as part of a component.",
            _WASIP1,
            "part of a wasm32-wasip2 component",
        ),
    ),
    (
        r"wasi_unstable::",
        _Cause(
            "E7",
            "Built for another WASI: preview 0, of 2019.",
            f"Take a newer toolchain. {_WASIP1}",
            "WASI preview 0 (wasi_unstable)",
        ),
    ),
    (
        r"wasi_snapshot_preview1::sock_|wasi_ephemeral_(?!nn::)|wasmedge|wasix",
        _Cause(
            "E7",
            "Built for another runtime: WasmEdge and Wasmer add functions of their own to WASI.",
            f"Leave out the crates for that runtime. {_WASIP1}",
            "another runtime's WASI",
        ),
    ),
    (
        r"wasi_snapshot_preview1::",
        _Cause("E5", "WASI preview 1 has no such function.", "Correct its name in the guest."),
    ),
    (
        r"wbg::|[^:]*wbindgen|[^:]*_bg\.js::",
        _Cause("E7", "Built for a browser by wasm-bindgen.", _WASIP1, "wasm-bindgen (browser)"),
    ),
    (
        r"gojs::runtime\.(ticks|sleepTicks)",
        _Cause(
            "E7", "Built by TinyGo for JavaScript.", "Build it with -target=wasip1.", "TinyGo js"
        ),
    ),
    (
        r"go(js)?::",
        _Cause(
            "E7", "Built by Go for JavaScript.", "Build it with GOOS=wasip1 GOARCH=wasm.", "Go js"
        ),
    ),
    (
        r"env::(_?emscripten_|_embind_|__syscall_|invoke_)",
        _Cause(
            "E7",
            "Built by Emscripten for JavaScript.",
            "Build it with the WASI SDK: clang --target=wasm32-wasip1.",
            "Emscripten",
        ),
    ),
    (
        r"env::abort \(i32, i32, i32, i32\) -> \(\)$",
        _Cause(
            "E7",
            "It looks like AssemblyScript, whose modules tell JavaScript when they fail.",
            "Build it with: asc --use abort=",
            "AssemblyScript",
        ),
    ),
    (
        r"env::__(linear_memory|stack_pointer|indirect_function_table|(memory|table)_base)|GOT\.",
        _Cause(
            "E5",
            "It is not linked: an object file, or a library for dynamic linking.",
            "Link it into a module; in Rust, a cdylib or a program.",
        ),
    ),
    (
        r".* memory$",
        _Cause(
            "E5",
            "It wants its memory from the host, as a module with threads does.",
            "Link it without --import-memory, and without threads.",
        ),
    ),
)


def _cause(wanted: Wanted, offered: Offered) -> _Cause:
    module, name, _ = wanted
    if (module, name) in offered:
        return _OTHER_SIGNATURE
    if module == "wasi_ephemeral_nn" and all(other != module for other, _ in offered):
        return _NO_WASI_NN
    full = _one_text(wanted)
    return next((cause for pattern, cause in _patterns() if pattern.match(full)), _UNDEFINED)


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], _Cause]]:
    return [(re.compile(pattern), cause) for pattern, cause in _CAUSES]


def _one_text(wanted: Wanted) -> str:
    module, name, kind = wanted
    return f"{module}::{name} {kind[:80]}"


def foreign_target(imports: Iterable[Wanted]) -> str:
    """Return what else than WASI preview 1 a module was built for; ``""`` if no import tells."""
    wanted = [_one_text(each) for each in imports]
    for pattern, cause in _patterns():
        if cause.target and any(map(pattern.match, wanted)):
            return cause.target
    return ""


def _near_misses(module: str, name: str, offered: Offered, misplaced: bool) -> Iterator[str]:
    """Say what the guest could have meant: the same name elsewhere, or a similar one."""
    for other, known in offered:
        if misplaced and known == name:
            yield (
                f'{other} has a function {name}: is #[link(wasm_import_module = "{other}")] '
                "missing on the extern block?"
            )
    if len(name) < 100:  # comparing takes time
        here = [known for other, known in offered if other == module]
        for known in difflib.get_close_matches(name, here, n=1, cutoff=0.75):
            yield f"Did you mean {known} {offered[module, known]}?"


def shown(text: str) -> str:
    """Return a name that a module chose, fit to be printed: plain ASCII, and not too long."""
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return short if short.isascii() and short.isprintable() else ascii(short)[1:-1]
