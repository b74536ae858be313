"""Each known failure: how it shows, why it happens, what cures it; and what is wrong here.

The article lists five pitfalls, P1 to P5, and ten errors, E1 to E10. `FAILURES` is the one place
that knows them all. `diagnose` recognises them in a file, in a program's output or in an exception;
`examine` looks at the machine.

>>> diagnose(b"error[E0463]: can't find crate for `std`").ids
('P1',)

Whatever `diagnose` is given is hostile until checked: it reads no more than a limit, executes
nothing of it, and loads a model only in a process of its own. Machine code is never deserialized.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from edgelab.errors import EdgelabError, one_line

MAX_BYTES = 512 << 20
"""How much `diagnose` reads of a file."""
_MAX_TEXT = 16 << 20  # of a program's output, and of a request
OTHER = "other"
"""The id of a finding that is none of the article's fifteen."""


# --- the fifteen ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """A message as a program printed it.

    Attributes
    ----------
    by : str
        The program, with its version where that matters.
    text : str
    """

    by: str
    text: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure that the article lists.

    Attributes
    ----------
    id : str
        ``"P1"`` to ``"P5"`` or ``"E1"`` to ``"E10"``.
    name : str
        What it is, in a few words.
    where : {"build", "load", "link", "run", "deploy"}
        When it strikes.
    said : tuple of Said
        How it shows: messages that were recorded when the failure was made to happen.
    cause, cure : str
    patterns : tuple of str
        Regular expressions by which foreign messages are recognised. edgelab's own name the id.
    """

    id: str
    name: str
    where: str
    said: tuple[Said, ...]
    cause: str
    cure: str
    patterns: tuple[str, ...] = ()

    @property
    def test(self) -> str:
        """Name of the test in ``tests/test_doctor.py`` that makes it happen and cures it."""
        words = re.sub(r"\W+", "_", self.name.lower())
        return f"test_{self.id.lower()}_{words}"


_FAILURES = (
    Failure(
        "P1",
        "target not installed",
        "build",
        (
            Said("rustc 1.95", "error[E0463]: can't find crate for `std`"),
            Said("rustc 1.95", "the `wasm32-wasip1` target may not be installed"),
        ),
        "Rust comes with the standard library for your own machine only.",
        "rustup target add wasm32-wasip1 (Debian 13: apt-get install libstd-rust-dev-wasm32)",
        (
            r"can't find crate for `(?:core|std|alloc)`",
            r"the `[\w.-]{1,80}` target may not be installed",
            r"has no standard library for ",
        ),
    ),
    Failure(
        "E1",
        "target not found",
        "build",
        (
            Said("rustc 1.95", 'could not find specification for target "wasm32-wasi"'),
            Said(
                "rustup", "does not support target 'wasm32-wasip9'; did you mean 'wasm32-wasip1'?"
            ),
        ),
        "This compiler knows no target of that name. wasm32-wasi is called wasm32-wasip1 since "
        "Rust 1.78, and the old name went with 1.84.",
        "--target wasm32-wasip1; with a Rust older than 1.78, first: rustup update stable",
        (
            r"could not find specification for target",
            r"does not support target '",
            r"target not found: wasm",
        ),
    ),
    Failure(
        "E2",
        "damaged module",
        "load",
        (
            Said("wasmtime 50", "failed to parse WebAssembly module"),
            Said("Node.js 20", "CompileError: WebAssembly.Module(): expected magic word"),
            Said("WasmEdge 0.14", "[error] loading failed: magic header not detected, Code: 0x103"),
        ),
        "A download or a copy stopped early or changed bytes; the file is something else; or it "
        "uses a feature that this runtime lacks.",
        "Get it again and compare its SHA-256, or build it again: python -m edgelab guest build",
        (
            r"failed to parse WebAssembly module(?!\s{1,9}Caused by:\s{1,9}expected a WebAssembly)",
            r"CompileError: WebAssembly\.\w{1,40}\(\): (?!expected version 01 00 00 00, found 0d)",
            r"\[error\] loading failed: (?!invalid path|illegal opcode|malformed version)",
            r"requires enabling (?!Component Model)[\w -]{1,60} proposal",
        ),
    ),
    Failure(
        "P2",
        "module over 32 MB",
        "load",
        (Said("edgelab doctor", "P2: it has 34,603,048 bytes"),),
        "A model is inside, or debug information. It travels and is compiled with each change of "
        "the code, and lies in the memory of each instance, whose limit counts it.",
        "Load the model through WASI-NN; strip = true in Cargo's profile",
    ),
    Failure(
        "E5",
        "undefined symbol",
        "link",
        (
            Said("wasmtime 50", "unknown import: `env::f` has not been defined"),
            Said("wasmtime 50", "incompatible import type for `env::f`"),
            Said("edgelab", "E5: the guest exports no function 'infer'"),
        ),
        "Guest and host do not agree on a function: its name, its parameters or its result. In a "
        "guest's source it is declared and not defined, or lacks no_mangle.",
        'Define it, or correct it: #[unsafe(no_mangle)] pub extern "C" fn, in a cdylib',
        (r"incompatible import type", r"undefined symbol: "),
    ),
    Failure(
        "E7",
        "wrong target",
        "link",
        (
            Said(
                "wasmtime 50",
                "unknown import: `wasi_snapshot_preview1::fd_write` has not been defined",
            ),
            Said(
                "wasmtime 50", "expected a WebAssembly module but was given a WebAssembly component"
            ),
        ),
        "The module was built for another kind of host: for WASI preview 1 and this one has none, "
        "or for a browser, for preview 2 (a component), for another runtime.",
        "Build it with --target wasm32-wasip1, and run it in a host with WASI: edgelab.Guest",
        (
            r"expected a WebAssembly module but was given a WebAssembly component",
            r"expected version 01 00 00 00, found 0d 00 01 00",
            r"requires enabling Component Model proposal",
        ),
    ),
    Failure(
        "P3",
        "no WASI-NN here",
        "link",
        (
            Said("wasmtime 50", "unknown import: `wasi_ephemeral_nn::load` has not been defined"),
            Said("Node.js 20", 'Import #0 module="wasi_ephemeral_nn" error'),
        ),
        "The guest asks its host to run a model, and this host can't. All imports must be there "
        "before anything runs.",
        "Guest(..., host=[edgelab.WasiNN()]); or a guest with the model's engine inside",
    ),
    Failure(
        "E3",
        "graph loading failed",
        "run",
        (
            Said("onnxruntime 1.32", "INVALID_PROTOBUF : Failed to load model because protobuf"),
            Said("OpenVINO 2026.4", "Unable to read the model. Please check if the model format"),
            Said("LiteRT 2.3", "The model is not a valid Flatbuffer buffer"),
        ),
        "These bytes are not of the format that the backend reads: another format, one part of "
        "two, weights in other files, or a file that was cut off.",
        "Convert it to ONNX, as one file; get it again and compare its SHA-256",
        (
            r"graph loading failed",
            r"INVALID_PROTOBUF",
            r"Unable to read the model\. Please check",
            r"Error during import of ONNX model",
            r"The model is not a valid Flatbuffer buffer",
            r"Model provided (?:is schema version|has model identifier)",
        ),
    ),
    Failure(
        "E4",
        "linear memory full",
        "run",
        (
            Said("Rust in a guest", "memory allocation of 1048576 bytes failed"),
            Said("edgelab", "E4: the guest has no memory for its answer"),
        ),
        "The guest reached the limit of its own memory: too small a limit, too large an input, or "
        "answers that nobody gives back.",
        "Free what infer returns (dealloc); else raise Limits(memory_bytes=...)",
        (
            r"memory allocation of \d{1,20} bytes failed",
            r"memory minimum size of \d{1,20} pages? exceeds",
        ),
    ),
    Failure(
        "P4",
        "out of memory on the host",
        "run",
        (
            Said("wasmtime 50", "Cannot allocate memory (os error 12)"),
            Said("onnxruntime 1.32", "std::bad_alloc"),
            Said("Python 3.11", "MemoryError"),
        ),
        "The process, not a guest, has no memory left: a model loaded for each request, instances "
        "that are kept, or a limit on address space, of which an instance reserves 4 GiB.",
        "Share one model and few instances (edgelab.Pool); limit resident memory, not ulimit -v",
        (
            r"Cannot allocate memory",
            r"std::bad_alloc",
            r"MemoryError\b",
            r"OOMKilled\b",
            r"Out of memory: Killed process",
            r"exit (?:code|status)[:=]? ?137\b",
        ),
    ),
    Failure(
        "E8",
        "truncated request",
        "run",
        (
            Said("serde_json", "EOF while parsing a list"),
            Said("Python 3.11", "json.decoder.JSONDecodeError: Unterminated string starting at"),
        ),
        "The JSON ends before it is complete: a length that is too small, a pipe that closed, or a "
        "body that was cut by a limit.",
        "Send all of it: the length in bytes, not in characters; look for who cuts it",
        (
            r"EOF while parsing",
            r"serde_json: unexpected EOF",
            r"Unexpected end of JSON input",
            r"JSONDecodeError: Unterminated string",
        ),
    ),
    Failure(
        "E9",
        "folder not pre-opened",
        "run",
        (
            Said("Rust in a guest", "No such file or directory (os error 44)"),
            Said("Rust in a guest", "Operation not permitted (os error 63)"),
        ),
        "A WASI guest sees only the folders that its host opened for it, under the names that the "
        "host gave them.",
        "instantiate(dirs={'/models': FOLDER}); wasmtime run --dir FOLDER::/models",
        (
            r"failed to find a pre-opened file descriptor",
            r"Capabilities insufficient",
            r"\(os error (?:44|63|76)\)",
            r"code: (?:44|63|76), kind: ",
            r"Permission denied \(os error 2\)",
        ),
    ),
    Failure(
        "P5",
        "another architecture",
        "deploy",
        (
            Said("wasmtime 50", "Module was compiled for architecture 'aarch64'"),
            Said("WasmEdge 0.14", "load library failed:"),
        ),
        "Machine code (.cwasm, WasmEdge's .so) runs on the kind of machine that it was made for.",
        "Carry the .wasm, and compile it on each machine: edgelab.Guest('guest.wasm')",
        (
            r"Module was compiled for architecture",
            r"Exec format error",
            r"wrong ELF class",
            r"load library failed:",
        ),
    ),
    Failure(
        "E6",
        "another version",
        "deploy",
        (
            Said("wasmtime 50", "Module was compiled with incompatible version '49'"),
            Said("WasmEdge 0.14", "Mismatched version. Expected: 1 , Got: 2"),
        ),
        "Machine code fits one version of its runtime, and one configuration of it.",
        "Compile the .wasm again with the version here; a cache's key must hold the version",
        (
            r"Module was compiled with incompatible version",
            r"Module was compiled with(?:out)? .{1,60}\bfor the host",
            r"Mismatched version\. Expected: ",
        ),
    ),
    Failure(
        "E10",
        "illegal instruction",
        "deploy",
        (
            Said("wasmtime 50", "is enabled, but not available on the host"),
            Said("Python 3.11", "died with <Signals.SIGILL: 4>"),
            Said("bash", "Illegal instruction (core dumped)"),
        ),
        "The machine code uses instructions that this CPU lacks, such as AVX-512.",
        "Compile it here, or for what all CPUs have: EngineConfig(target=NATIVE_TARGET)",
        (
            r"incompatible with native host",
            r"not compatible with the native host",
            r"is enabled, but not available on the host",
            r"Illegal instruction",
            r"SIGILL\b",
            r"exit (?:code|status)[:=]? ?132\b",
        ),
    ),
)
FAILURES: dict[str, Failure] = {failure.id: failure for failure in _FAILURES}
"""The article's pitfalls and errors by their ids, in the order in which they strike."""


def table() -> str:
    """Return `FAILURES` as a table in Markdown, for ``docs/troubleshooting.md``."""
    rows = ["| when | id | you see | because | cure | test |", "|---|---|---|---|---|---|"]
    for each in FAILURES.values():
        seen = "<br>".join(f"`` {said.text} `` ({said.by})" for said in each.said)
        cells = (each.where, f"{each.id} {each.name}", seen, each.cause, each.cure)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells))
        rows[-1] += f" | `{each.test}` |"
    return "\n".join(rows) + "\n"


# --- what was recognised --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with what `diagnose` was given.

    Attributes
    ----------
    id : str
        A key of `FAILURES`, or `OTHER`.
    what : str
        What was found: a fact, or the message.
    cause, cure : str
    """

    id: str
    what: str
    cause: str
    cure: str

    @property
    def name(self) -> str:
        """What the failure is, in a few words; ``""`` for `OTHER`."""
        return FAILURES[self.id].name if self.id in FAILURES else ""

    def to_dict(self) -> dict[str, str]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.id} {self.name}".strip()
            + f"\n  found: {self.what}\n  why:   {self.cause}\n  cure:  {self.cure}"
        )


class Findings(tuple[Finding, ...]):
    """What `diagnose` found, in order; empty if it recognised nothing."""

    __slots__ = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, each once."""
        return tuple(dict.fromkeys(finding.id for finding in self))

    def to_dict(self) -> list[dict[str, str]]:
        """Return plain values, ready for JSON."""
        return [finding.to_dict() for finding in self]

    def __repr__(self) -> str:
        return f"Findings({', '.join(self.ids) or 'nothing'})"

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing that doctor knows"

    def _repr_html_(self) -> str:
        from edgelab.measure import html_table

        rows = [(f"{f.id} {f.name}", f.what, f.cause, f.cure) for f in self]
        return html_table("Diagnosis", ("failure", "found", "why", "cure"), rows)


def _finding(id: str, what: str) -> Finding:
    return Finding(id, what, FAILURES[id].cause, FAILURES[id].cure)


def _other(what: str, cause: str, cure: str) -> Finding:
    return Finding(OTHER, what, cause, cure)


def diagnose(what: bytes | str | Path | BaseException) -> Findings:
    """Say which known failure this is, if any.

    Parameters
    ----------
    what : path, bytes or exception
        A file: a module, a component, machine code, a model, a JSON request, or what a program
        printed; its path, or all that is in it. Or an exception that was caught, with those that
        caused it; of a `subprocess.CalledProcessError`, also what the program printed.

    Returns
    -------
    Findings
        A tuple of `Finding`, empty if nothing was recognised.

    Raises
    ------
    EdgelabError
        If a file can't be read.
    """
    if isinstance(what, BaseException):
        return Findings(_exception(what))
    if isinstance(what, bytes):
        return Findings(_file(what[: MAX_BYTES + 1], None))
    path = Path(what)
    return Findings(_file(_read(path), path))


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise EdgelabError(
            f"cannot read {str(path)!r}: {reason}. Give the path of a file, or - for what a "
            "program prints: cargo build 2>&1 | python -m edgelab doctor -"
        ) from None


_MODEL_SUFFIXES = {
    ".onnx": "onnx",
    ".tflite": "tensorflowlite",
    ".xml": "openvino",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".safetensors": "safetensors",
}


def _file(data: bytes, path: Path | None) -> Iterator[Finding]:
    """Look at a file as what its bytes say that it is; the name counts where they say nothing."""
    from edgelab.wasinn.backends import sniff

    suffix = path.suffix.lower() if path else ""
    if data[:4] == b"\0asm":
        yield from _module(data)
    elif data[:4] == b"\x7fELF":
        yield from _machine_code(data)
    elif suffix in (".wasm", ".cwasm"):
        yield from _no_module(data)
    elif (
        suffix in _MODEL_SUFFIXES
        or sniff(data) != "unknown"
        or _begins_like_onnx(data)
        or _is_safetensors(data)
    ):
        yield from _model(data, path, suffix)
    elif suffix == ".json" or data[:512].lstrip()[:1] in (b"{", b"["):
        yield from _json(data, suffix == ".json")
    elif (text := _text(data)) is not None:
        yield from _output(text)
    else:
        yield from _no_module(data)


# --- modules and machine code ---------------------------------------------------------------------


def _module(data: bytes) -> Iterator[Finding]:
    from edgelab.inspection import inspect

    try:
        found = inspect(data)
    except EdgelabError as error:
        yield from _own(str(error))
        return
    for problem in found.problems:
        yield Finding(problem.id.partition(",")[0], problem.what, problem.why, problem.cure)
    functions = {export.name: export.type for export in found.exports if "->" in export.type}
    if found.kind == "module" and not functions and not found.problems:
        yield _finding("E5", "it exports no function, so nobody can call it")
    if (kind := functions.get("infer", _INFER)) != _INFER:
        yield _finding(
            "E5",
            f"its infer is {kind} and not {_INFER}: the host needs the answer's length as well "
            "as its place",
        )


_INFER = "(i32, i32) -> (i64)"  # pointer and length in, both in one number out


def _machine_code(data: bytes) -> Iterator[Finding]:
    from edgelab.aot import signed_here, this_machine
    from edgelab.artifact import elf_machine, inspect_artifact

    if (
        b"\0intrinsics\0" in data[: 64 << 20] and data[7:8] == b"\0"
    ):  # a name that WasmEdge looks up
        if (machine := elf_machine(data)) != (here := this_machine().machine):
            yield _finding("P5", f"WasmEdge's machine code for {machine}; this machine is {here}")
        return
    if data[7:8] != b"\xc8":
        yield from _no_module(data)
        return
    try:
        problem = inspect_artifact(data).problem(this_machine())
    except EdgelabError as error:
        problem = str(error)
    if problem:
        yield from _own(problem)
    elif not signed_here(data):
        yield _other(
            "this machine code was not saved by this user on this machine, or was changed since",
            "To load it is to run whatever is in it, outside of the sandbox; so edgelab does not.",
            "Take the .wasm file, and compile it here.",
        )


def _no_module(data: bytes) -> Iterator[Finding]:
    from edgelab.errors import GuestError
    from edgelab.wasm import refuse_other_files

    try:
        refuse_other_files(data)
    except GuestError as error:
        yield from _own(str(error))


# --- models ---------------------------------------------------------------------------------------


def _begins_like_onnx(data: bytes) -> bool:
    """Whether bytes begin as an ONNX file does, cut off or not: a version, then its first field."""
    return len(data) > 2 and data[0] == 0x08 and data[1] < 0x20 and data[2] in (0x12, 0x3A, 0x42)


def _is_safetensors(data: bytes) -> bool:
    """Whether bytes begin with the length of a header, and that header."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _model(data: bytes, path: Path | None, suffix: str) -> Iterator[Finding]:
    from edgelab.models import read_spec
    from edgelab.wasinn.backends import load_graph, sniff
    from edgelab.wasinn.backends.onnx import check_onnx
    from edgelab.wasinn.backends.worker import WorkerGraph

    if len(data) > MAX_BYTES:
        size = f"it has more than {MAX_BYTES:,} bytes, which is the limit of WASI-NN's host"
        yield _other(size, "A model of this size is not for the edge.", "Quantize it.")
        return
    kind = sniff(data)
    try:
        if kind == "unknown" and (suffix == ".safetensors" or _is_safetensors(data)):
            read_spec(data)
        elif kind == "onnx":
            check_onnx(data)  # before a library opens the files that it refers to
            WorkerGraph(data, backend="onnxruntime", threads=1)
        else:
            parts = [data]
            if kind == "openvino" and path and (weights := path.with_suffix(".bin")).is_file():
                parts.append(_read(weights))
            load_graph(*parts, trusted=False, threads=1)
    except EdgelabError as error:
        yield from _own(str(error), default="E3")
        return
    if (named := _MODEL_SUFFIXES.get(suffix, kind)) not in (kind, "safetensors"):
        yield _finding("E3", f"its name says {named}, and its bytes are {kind}")


# --- requests -------------------------------------------------------------------------------------


def _json(data: bytes, named: bool) -> Iterator[Finding]:
    """Look at a request; at other JSON as at what a program printed."""
    if len(data) > _MAX_TEXT:
        yield _other(
            f"it has more than {_MAX_TEXT:,} bytes",
            "Servers refuse requests of this size; a picture as JSON is 20 times its own.",
            "Send the picture's file, or a binary tensor (docs/serving.md).",
        )
        return
    odd: list[str] = []
    wrong = ""
    try:
        value: Any = json.loads(data, parse_constant=odd.append, parse_int=float)
    except json.JSONDecodeError as error:
        value, wrong = None, str(error)
        if _cut_off(error):
            yield _finding("E8", f"the JSON ends before it is complete: {one_line(error)}")
            return
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8
        value, wrong = None, one_line(error)
    if isinstance(value, dict) and "image_data" in value:
        yield from _request(value, odd)
        return
    found = list(_output(_text(data) or ""))
    if wrong and not found and named:
        found = [_other(f"it is not JSON: {wrong}", "Something wrote it wrongly.", "Mend it.")]
    yield from found


def _request(request: dict[str, Any], odd: list[str]) -> Iterator[Finding]:
    """Check what the guest's ``infer`` would refuse."""
    image, width, height = (request.get(key) for key in ("image_data", "width", "height"))
    if odd:
        yield _other(
            f"it holds {odd[0]}, which is no JSON",
            "Python writes NaN and Infinity unless told not to; other parsers refuse them.",
            "json.dumps(..., allow_nan=False) finds out where they come from.",
        )
    elif not isinstance(image, list) or not (_is_side(width) and _is_side(height)):
        yield _other(
            "image_data must be a list of numbers, width and height positive numbers",
            "The guest takes the article's request and no other.",
            'Send {"image_data": [...], "width": ..., "height": ..., "model_id": ...}.',
        )
    elif len(image) != (wanted := 3 * width * height):
        yield _other(
            f"it has {len(image):,} values; {width:g} x {height:g} x 3 are {wanted:,.0f}",
            "A channel is missing or too many (RGBA, grey), or width and height are not its own.",
            "Send height x width x 3 numbers: image.convert('RGB') in Pillow.",
        )
    elif not all(type(x) is float and 0 <= x <= 255 for x in image):
        yield _other(
            "image_data has something else than numbers from 0 to 255",
            "The guest normalises by itself; it takes bytes, not floats from 0 to 1 or below 0.",
            "Send the picture's bytes as they are.",
        )


def _is_side(value: Any) -> TypeGuard[float]:
    return type(value) is float and 1 <= value < 2**32


# What can stand between the place that Python complains about and the end of a cut document.
_CUT = re.compile(
    r"[ \t\r\n]*(?:|-|\.|[eE][+-]?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|\\?u[0-9a-fA-F]{0,4})"
)


def _cut_off(error: json.JSONDecodeError) -> bool:
    """Whether a document is wrong only in that it ends too early."""
    if error.msg.startswith("Unterminated string"):
        return True
    return _CUT.fullmatch(error.doc, error.pos) is not None


# --- messages -------------------------------------------------------------------------------------

# edgelab's own messages, and its guests' JSON, name the ids.
_NAMED = re.compile(
    r"(?:^|[:.;(] )((?:[PE]\d{1,2}, ){0,3}[PE]\d{1,2}): |\"id\": ?\"([PE]\d{1,2})\"", re.M
)
# What a runtime says of an import that nobody provides: its module, and usually its name.
_IMPORTS = (
    r"unknown import: `([^`\n]{1,200}?)::([^`\n]{0,200})` has not been defined",
    r"unknown import, Code: \S{1,20}\s{1,9}(?:\[[^\]\n]{1,40}\] \[error\]\s{1,9})?"
    r'When linking module: "([^"\n]{1,200})" , \w{1,20} name: "([^"\n]{0,200})"',
    r'Import #\d{1,9} (?:module=)?"([^"\n]{1,200})"(?: function="([^"\n]{0,200})")?',
    r"component imports \w{1,20} `([^`\n]{1,200})`()",
)
_LINE = 4000  # characters that are looked at, at most, on each side
_ANSI = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]")


def _text(data: bytes) -> str | None:
    """Decode what a program printed; None if that is no text."""
    data = data[:_MAX_TEXT]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as PowerShell's > writes it
        return data.decode("utf-16", errors="replace")
    return None if b"\0" in data[:8192] else data.decode(errors="replace")


def _output(text: str) -> Iterator[Finding]:
    """Recognise failures in what a program printed, in the order in which they come."""
    text = _ANSI.sub("", text)
    found: dict[str, tuple[int, Finding]] = {}
    for failure in FAILURES.values():
        matches = (re.search(pattern, text) for pattern in failure.patterns)
        if match := next(filter(None, matches), None):
            start = match.start()
            found[failure.id] = start, _finding(failure.id, _line(text, start))
    for pattern in _IMPORTS:
        for match in islice(re.finditer(pattern, text), 20):
            finding = _import(match[1], match[2] or "", match[0])
            found.setdefault(finding.id, (match.start(), finding))
    for match in islice(_NAMED.finditer(text), 1000):
        line = _line(text, match.start(match.lastindex or 0))
        for id in (match[1] or match[2]).split(", "):
            if id in FAILURES and id not in found and not _foreign().search(line):
                found[id] = match.start(), _finding(id, line)
    for _, finding in sorted(found.values(), key=lambda each: each[0]):
        yield replace(finding, what=one_line(Exception(finding.what)))


@functools.cache
def _foreign() -> re.Pattern[str]:
    """A foreign message in a line of ours is more exact than the ids that we put before it."""
    return re.compile("|".join((*_IMPORTS, *(p for f in _FAILURES for p in f.patterns))))


def _line(text: str, at: int) -> str:
    """The line around a place, or the part of a long one."""
    after, _, _ = text[at : at + _LINE].partition("\n")
    return (text[max(at - _LINE, 0) : at].rpartition("\n")[2] + after).strip()


def _import(module: str, name: str, message: str) -> Finding:
    """Say who is to blame for an import that a host lacks, as `edgelab.imports` does."""
    from edgelab.imports import WASI_MODULE, explain_imports

    if module == WASI_MODULE:  # that host lacks all of WASI
        return _finding("E7", message)
    (problem,) = explain_imports([(module, name, "function")], {})
    return Finding(problem.id, message, problem.why, problem.cure)


def _own(message: str, default: str = OTHER) -> Iterator[Finding]:
    """Turn one of edgelab's messages into findings. It says itself why, and what to do."""
    named = re.match(r"((?:[PE]\d{1,2}, )*[PE]\d{1,2}): ", message)
    for id in (named[1] if named else default).split(", "):
        text = message[named.end() :] if named else message
        if id in FAILURES:
            yield _finding(id, text)
        else:
            yield _other(text, "See the message.", "See the message.")


def _exception(error: BaseException) -> Iterator[Finding]:
    """Recognise failures in an exception and in what caused it."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(texts) < 64:
        if isinstance(current, json.JSONDecodeError):  # Python does not say that it was the end
            ended = "EOF while parsing" if _cut_off(current) else "not JSON"
            texts.append(f"{ended}: {current}")
        else:
            texts.append(f"{type(current).__name__}: {current}")
        if isinstance(current, subprocess.CalledProcessError):
            for output in (current.stdout, current.stderr):
                texts.append((_text(output) if isinstance(output, bytes) else output) or "")
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)
    yield from _output("\n".join(text[:_MAX_TEXT] for text in texts))


# --- this machine ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One thing of this machine that was looked at.

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


def examine() -> list[Check]:
    """Run all checks. None of them installs or builds anything.

    Returns
    -------
    list of Check
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
        findings.append(Check(topic, state, detail))
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
