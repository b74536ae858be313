"""What a .wasm file is, what it wants, whether it runs here, and what to do if it does not.

>>> from edgelab.build import guest_path
>>> inspect(guest_path("classify_nn").path).runs_here
True
"""

from __future__ import annotations

import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import wasmtime

from edgelab.aot import MAX_MODULE_BYTES, engine
from edgelab.errors import GuestError, one_line
from edgelab.imports import (
    WASI_MODULE,
    Problem,
    explain_imports,
    foreign_target,
    missing_imports,
    shown,
)
from edgelab.opcodes import INSTRUCTIONS, Unreadable, walk
from edgelab.runtime import Limits
from edgelab.wasm import (
    Declarations,
    Memory,
    Reader,
    Section,
    Signature,
    is_component,
    refuse_other_files,
    sections,
)

_LARGE = 32 << 20  # the article's limit
_LISTED = 40  # rows of a long table that are shown
# What `edgelab.aot` switches off, or wasmtime does not have.
_OFF = {
    "exceptions", "function-references", "gc", "legacy-exceptions", "memory64", "multi-memory",
    "threads", "wide-arithmetic",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Import:
    """What a module wants from its host.

    Attributes
    ----------
    module, name : str
    type : str
        A function's signature, such as ``"(i32) -> (i64)"``, or what else it is, such as
        ``"memory 1"`` (in pages).
    """

    module: str
    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Export:
    """What a module offers; `type` as in `Import`."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the module defines.

    Attributes
    ----------
    index : int
        Its number in the module, where imported functions come first.
    name : str
        From the name section, Rust's names as in the source; ``""`` if it was stripped.
    exports : tuple of str
        The names that it is exported by.
    size_bytes, instructions, simd, relaxed_simd : int
        Size of its body; its instructions, each ``end`` included; how many of them are SIMD
        (relaxed SIMD included), and how many relaxed SIMD.
    calls : tuple of int
        Which functions it calls directly, by index.
    unreadable : str
        Why its instructions could not be read; usually empty.
    """

    index: int
    name: str
    exports: tuple[str, ...]
    size_bytes: int
    instructions: int
    simd: int
    relaxed_simd: int
    calls: tuple[int, ...] = field(repr=False)
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a .wasm file is.

    Attributes
    ----------
    kind : {"module", "component"}
    size_bytes : int
    target : str
        What it was built for, as far as it tells, such as ``"wasm32-wasip1 command"``.
    producers : dict of str to list of str
        What made it: ``"language"``, ``"processed-by"``, ``"sdk"``. Empty if it does not say.
    sections : dict of str to int
        Name → size in bytes with its head. With the 8 bytes at the start, that is all of the file.
    imports : tuple of Import
    exports : tuple of Export
    memories : tuple of Memory
    tables : tuple of str
    data_bytes : int
        What is in its memory at the start.
    functions : tuple of Function
    opcodes : dict of str to int
        Mnemonic → how often its functions have it; the most frequent first.
    simd, relaxed_simd : int
        How many of those are SIMD (relaxed SIMD included), and how many relaxed SIMD.
    features : tuple of str
        What it uses of WebAssembly beyond the first version.
    wasi_nn : str or None
        Which time's WASI-NN it speaks (see `edgelab.wasinn.Era`), as far as it tells; None if none.
    core_modules : int
        How many modules a component contains.
    missing : tuple of Import
        What neither WASI preview 1 nor edgelab's WASI-NN provides, or only with another signature.
    problems : tuple of Problem
    read_ms : float
        How long the inspection took, in milliseconds.
    """

    kind: str
    size_bytes: int
    target: str
    producers: dict[str, list[str]]
    sections: dict[str, int]
    imports: tuple[Import, ...]
    exports: tuple[Export, ...]
    memories: tuple[Memory, ...] = ()
    tables: tuple[str, ...] = ()
    data_bytes: int = 0
    functions: tuple[Function, ...] = field(default=(), repr=False)
    opcodes: dict[str, int] = field(default_factory=dict, repr=False)
    simd: int = 0
    relaxed_simd: int = 0
    features: tuple[str, ...] = ()
    wasi_nn: str | None = None
    core_modules: int = 0
    missing: tuple[Import, ...] = ()
    problems: tuple[Problem, ...] = ()
    read_ms: float = 0.0

    @property
    def runs_here(self) -> bool:
        """Whether edgelab can run it, given WASI-NN."""
        return not any(problem.fatal for problem in self.problems)

    @property
    def verdict(self) -> str:
        """Whether it runs here, in a sentence."""
        if not self.runs_here:
            fatal = dict.fromkeys(problem.id for problem in self.problems if problem.fatal)
            return f"It cannot run here: {', '.join(fatal)}."
        if self.kind == "component":
            return "It can run here: edgelab.wasinn.component.Component(FILE)"
        return f"It can run here: edgelab.Guest(FILE{', host=[WasiNN()]' if self.wasi_nn else ''})"

    @property
    def instructions(self) -> int:
        """Number of instructions in all functions."""
        return sum(self.opcodes.values())

    def function(self, export: str) -> Function:
        """Return the function behind an export.

        Raises
        ------
        GuestError
            If the module defines no function that it exports by this name (E5).
        """
        for function in self.functions:
            if export in function.exports:
                return function
        known = ", ".join(shown(name) for name in islice(self.simd_by_export(), _LISTED))
        raise GuestError(f"E5: it exports no function {export!r} of its own; it has: {known}")

    def reached(self, export: str) -> tuple[Function, ...]:
        """Return what an export can reach by direct calls, itself first.

        That is what may run, not what does: a helper behind an ``if`` counts as well. Calls through
        a table (trait objects, function pointers) are not followed.

        Raises
        ------
        GuestError
            See `function`.
        """
        found = {(start := self.function(export)).index: start}
        todo, first = [start], self.functions[0].index
        while todo:
            for index in todo.pop().calls:
                if index not in found and first <= index < first + len(self.functions):
                    found[index] = self.functions[index - first]
                    todo.append(found[index])
        return tuple(found.values())

    def simd_by_export(self) -> dict[str, int]:
        """Return how many SIMD instructions the body of each exported function has.

        The compiler may have moved work to a function that the export calls, or shares with others:
        see `functions`, which has them all, and `reached`.
        """
        return {name: each.simd for each in self.functions for name in each.exports}

    def to_dict(self, *, functions: bool = False) -> dict[str, Any]:
        """Return plain values, ready for JSON; with one entry a function if asked for."""
        return {
            "runs_here": self.runs_here,
            **asdict(self if functions else replace(self, functions=())),
        }

    def describe(self, *, functions: bool = False) -> str:
        """Return all of it as text for a terminal; with a line a function if asked for."""
        lines = [f"{name:<10} {text}" for name, text in self._facts()]
        for title, head, rows in self._tables(functions):
            lines += ["", title, *_columns([head, *rows])]
        if self.simd:
            lines += ["", _wrapped(f"SIMD: {_LEGEND}", 2)]
        for problem in self.problems:
            lines += [
                "",
                _wrapped(f"{problem.id}: {problem.what}.", 2),
                _wrapped(f"  why:  {problem.why}", 8),
                _wrapped(f"  cure: {problem.cure}", 8),
            ]
        return "\n".join([*lines, "", self.verdict])

    def __str__(self) -> str:
        return self.describe()

    def _repr_html_(self) -> str:
        tables: list[_Table] = [
            ("WebAssembly file", (), [*self._facts(), ("verdict", self.verdict)])
        ]
        if self.problems:
            rows = [(each.id, each.what, each.why, each.cure) for each in self.problems]
            tables.append(("Problems", ("id", "what", "why", "cure"), [*rows]))
        legend = f"<p>SIMD: {_LEGEND}</p>" if self.simd else ""
        return "".join(_html(*table) for table in [*tables, *self._tables()]) + legend

    def _facts(self) -> list[tuple[str, str]]:
        meaning = _MEANING.get(self.target.rpartition(" ")[2], "")
        made = "; ".join(
            ", ".join(shown(re.sub(r" \(https?://.*", "", name)) for name in names[:3])
            for names in self.producers.values()
        )
        facts = [
            ("file", f"{self.kind}, {self.size_bytes:,} bytes; inspected in {self.read_ms:.0f} ms"),
            ("built for", f"{self.target}{meaning}"),
            ("built by", made or "it does not say"),
            ("WASI-NN", self.wasi_nn or "not used"),
        ]
        debug = sum(
            size for name, size in self.sections.items() if name == "name" or name[:6] == ".debug"
        )
        if debug > self.size_bytes / 10:
            share = f"{debug / self.size_bytes:.0%} of the file"
            facts.append(("debug info", f"{share}; strip = true in Cargo's profile leaves it out"))
        if self.kind == "component":
            return [*facts, ("inside", f"{self.core_modules} core modules")]
        code = f"{len(self.functions):,} functions, {self.instructions:,} instructions"
        if self.simd:
            code += f", {self.simd:,} of them SIMD ({self.relaxed_simd:,} relaxed)"
        if unreadable := [f.unreadable for f in self.functions if f.unreadable]:
            code += f"; {len(unreadable):,} functions can't be read: {unreadable[0]}"
        return [
            *facts,
            ("uses", ", ".join(self.features) or "only the first version of WebAssembly"),
            *(("memory", _size(memory)) for memory in self.memories[:3]),
            ("data", f"{self.data_bytes:,} bytes to fill the memory with"),
            ("code", code),
        ]

    def _tables(self, all_functions: bool = False) -> list[_Table]:
        """Return what comes in lists, as far as there is any."""
        missing = set(self.missing)
        chosen: Sequence[Function] = self.functions
        if not all_functions:
            chosen = sorted((f for f in chosen if f.simd), key=lambda f: -f.simd)[:5]
        tables: list[_Table] = [
            (
                "Sections",
                ("name", "bytes", "share"),
                _some(
                    (shown(name), f"{size:,}", f"{size / self.size_bytes:.1%}")
                    for name, size in self.sections.items()
                ),
            ),
            (
                "Imports: what it wants from its host",
                ("name", "type", ""),
                _some(
                    (
                        "::".join(shown(part) for part in (i.module, i.name) if part),
                        shown(i.type),
                        "missing" * (i in missing),
                    )
                    for i in self.imports
                ),
            ),
            (
                "Exports: what it offers",
                ("name", "type", *(("SIMD", "reached") if self.simd else ())),
                _some(self._export_rows()),
            ),
            (
                "Functions" if all_functions else "Functions with most SIMD",
                ("number", "name", "bytes", "instructions", "SIMD", "relaxed"),
                [
                    (
                        f"#{f.index}",
                        shown(f.name or ", ".join(f.exports) or "(no name)"),
                        f"{f.size_bytes:,}",
                        shown(f.unreadable) or f"{f.instructions:,}",
                        f"{f.simd:,}",
                        f"{f.relaxed_simd:,}",
                    )
                    for f in chosen
                ],
            ),
        ]
        return [table for table in tables if table[2]]

    def _export_rows(self) -> Iterator[tuple[str, ...]]:
        simd = self.simd_by_export()
        # Each row may have to visit all functions. In huge modules, that takes too long.
        follow = sum(len(f.calls) for f in self.functions) < 500_000
        for number, export in enumerate(self.exports):
            row = (shown(export.name), shown(export.type))
            if not self.simd or number >= _LISTED:
                yield row
            elif export.name not in simd:
                yield (*row, "", "")
            elif follow:
                reach = sum(each.simd for each in self.reached(export.name))
                yield (*row, f"{simd[export.name]:,}", f"{reach:,}")
            else:
                yield (*row, f"{simd[export.name]:,}", "?")


_LEGEND = (
    "number of vector instructions in a function's own body; reached: with those of all functions "
    "that it can get to by direct calls, whether a run takes that way or not."
)
_Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
_MEANING = {
    "command": ": a program with a main function",
    "reactor": ": functions to call, after its _initialize",
    "library": ": functions to call",
}


def _some(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the first rows, and how many more there are."""
    rows = iter(rows)
    first = list(islice(rows, _LISTED))
    if more := sum(1 for _ in rows):
        first.append((f"... and {more:,} more", *[""] * (len(first[0]) - 1)))
    return first


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Lay a table out in text, columns of numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(re.fullmatch(r"[\d.,%?]*", cell) for cell in column[1:]) for column in columns]
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        line = "  ".join(c.rjust(width) if on else c.ljust(width) for c, width, on in cells)
        yield f"  {line}".rstrip()


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(
        text,
        100,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _html(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    parts = [f"<table><caption>{escape(title)}</caption>"]
    if head:
        cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        parts.append(f"<tr>{cells}</tr>")
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        parts.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "".join([*parts, "</table>"])


def _size(memory: Memory) -> str:
    text = f"{memory.minimum * memory.page_bytes:,} bytes ({memory.minimum:,} pages) at the start"
    if memory.maximum is not None:
        text += f", at most {memory.maximum * memory.page_bytes:,}"
    return f"{text}{', shared by threads' * memory.shared}{', 64-bit' * memory.wide}"


def inspect(wasm: bytes | str | Path) -> Inspection:
    """Say what a .wasm file is, and whether it runs here. Nothing of it is executed.

    Parameters
    ----------
    wasm : bytes, str or pathlib.Path
        A module or a component, or the path of one.

    Raises
    ------
    GuestError
        If it can't be opened, is no WebAssembly (E2), is machine code (P5, E6), or is too large
        (P2). A module that is damaged further in is read as far as possible.
    """
    start = time.perf_counter()
    data = _load(wasm)
    refuse_other_files(data)
    found = _component(data) if is_component(data) else _module(data)
    return replace(found, read_ms=(time.perf_counter() - start) * 1e3)


def _load(wasm: bytes | str | Path) -> bytes:
    if isinstance(wasm, (str, Path)):
        try:
            with open(wasm, "rb") as file:
                wasm = file.read(MAX_MODULE_BYTES + 1)
        except (OSError, ValueError) as error:
            raise GuestError(
                f"cannot read it: {error}. To build the guests: python -m edgelab guest build"
            ) from None
    if len(wasm) > MAX_MODULE_BYTES:
        raise GuestError(
            f"P2: it has more than {MAX_MODULE_BYTES:,} bytes, and edgelab takes no larger module. "
            "Load the model through WASI-NN instead of embedding it in the module."
        )
    return bytes(wasm)


# --- modules --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Body:
    """What is known of a function from its body alone."""

    size_bytes: int
    instructions: int = 0
    simd: int = 0
    relaxed_simd: int = 0
    calls: tuple[int, ...] = ()
    unreadable: str = ""


class _Parts:
    """What the sections of a module hold beside declarations, as far as they were read."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.producers: dict[str, list[str]] = {}
        self.names: dict[int, str] = {}
        self.bodies: list[_Body] = []
        self.opcodes = bytearray()
        self.prefixed: Counter[int] = Counter()
        self.block_types: set[int] = set()
        self.data_bytes = 0

    def read(self, wasm: bytes, section: Section) -> None:
        size = section.end - section.start
        self.sizes[section.label] = self.sizes.get(section.label, 0) + size
        reader = Reader(wasm, section.body, section.end)
        if section.name == "code":
            for _ in range(reader.count()):
                self._read_body(reader.part(reader.number()))
        elif section.name == "data":
            for _ in range(reader.count()):
                self._read_data(reader)
        elif section.label in ("producers", "name"):
            with suppress(Unreadable):  # without them, a module is as good
                if section.label == "producers":
                    self._read_producers(reader)
                else:
                    self._read_names(reader)

    def _read_body(self, body: Reader) -> None:
        size = body.end - body.at
        try:
            for _ in range(body.count()):
                body.number()  # so many local variables
                body.type()
            code, _ = walk(body.data, body.at, body.end)
        except Unreadable as error:
            self.bodies.append(_Body(size, unreadable=str(error)))
            return
        self.opcodes += code.opcodes
        self.prefixed.update(code.prefixed)
        self.block_types |= code.block_types
        calls = tuple(dict.fromkeys(code.calls))
        self.bodies.append(_Body(size, len(code.opcodes), code.simd, code.relaxed_simd, calls))

    def _read_data(self, reader: Reader) -> None:
        kind = reader.number()  # 0: for memory 0, 1: for later, 2: for another memory
        if kind == 2:
            reader.number()
        if kind != 1:
            reader.skip_constant()  # where to
        size = reader.number()
        reader.part(size)
        self.data_bytes += size

    def _read_producers(self, reader: Reader) -> None:
        for _ in range(reader.count()):
            made = self.producers.setdefault(reader.name(), [])
            for _ in range(reader.count()):
                made.append(f"{reader.name()} {reader.name()}".strip())

    def _read_names(self, reader: Reader) -> None:
        while reader.at < reader.end:
            kind, part = reader.byte(), reader.part(reader.number())
            if kind == 1:  # of functions
                for _ in range(part.count()):
                    index = part.number()
                    self.names[index] = part.name()


def _module(wasm: bytes) -> Inspection:
    declared, parts, damage = Declarations(), _Parts(), ""
    try:
        for section in sections(wasm):
            parts.read(wasm, section)
            declared.read(wasm, section)
    except Unreadable as error:
        damage = str(error)
    counts = dict(enumerate(np.bincount(parts.opcodes, minlength=256).tolist())) | parts.prefixed
    used = [opcode for opcode, count in counts.items() if count and opcode in INSTRUCTIONS]
    opcodes: Counter[str] = Counter()
    for opcode in used:
        opcodes[INSTRUCTIONS[opcode].name] += counts[opcode]
    imports = tuple(
        Import(module, name, f"tag {what}" if kind == "tag" else str(what))
        for module, name, kind, what in declared.imports
    )
    producers = parts.producers or _rust(wasm)
    found = Inspection(
        kind="module",
        size_bytes=len(wasm),
        target=_target(declared, parts.sizes, producers),
        producers=producers,
        sections=parts.sizes,
        imports=imports,
        exports=tuple(_exports(declared)),
        memories=tuple(declared.memories),
        tables=tuple(declared.tables),
        data_bytes=parts.data_bytes,
        functions=tuple(_functions(declared, parts)),
        opcodes=dict(opcodes.most_common()),
        simd=sum(body.simd for body in parts.bodies),
        relaxed_simd=sum(body.relaxed_simd for body in parts.bodies),
        features=tuple(sorted(_features(declared, parts, used))),
        wasi_nn=_wasi_nn(wasm, {module for module, *_ in declared.imports}),
    )
    return _judge(wasm, found, declared, damage)


def _exports(declared: Declarations) -> Iterator[Export]:
    what: dict[str, Sequence[object]] = {
        "function": declared.functions,
        "table": declared.tables,
        "memory": declared.memories,
        "global": declared.globals,
        "tag": [f"tag {signature}" for signature in declared.tags],
    }
    for name, kind, index in declared.exports:
        known = what[kind]
        yield Export(name, str(known[index]) if index < len(known) else kind)


def _functions(declared: Declarations, parts: _Parts) -> Iterator[Function]:
    exports: dict[int, list[str]] = {}
    for name, kind, index in declared.exports:
        if kind == "function":
            exports.setdefault(index, []).append(name)
    imported = sum(kind == "function" for _, _, kind, _ in declared.imports)
    for index, body in enumerate(parts.bodies, imported):
        yield Function(
            index,
            _readable(parts.names.get(index, "")),
            tuple(exports.get(index, ())),
            body.size_bytes,
            body.instructions,
            body.simd,
            body.relaxed_simd,
            body.calls,
            body.unreadable,
        )


def _readable(name: str) -> str:
    """Undo Rust's older name mangling: ``_ZN7imgproc9normalize17h0123456789abcdefE``."""
    mangled = re.fullmatch(r"_ZN(.+)17h[0-9a-f]{16}E", name[:1000])
    if not mangled:
        return name
    parts, at = [], 0
    while length := re.compile(r"\d{1,3}").match(mangled[1], at):
        at = length.end() + int(length[0])
        parts.append(mangled[1][length.end() : at])
    text = "::".join(part[1:] if part.startswith("_$") else part for part in parts)
    text = text.replace("..", "::")
    for code, sign in _SIGNS.items():
        text = text.replace(f"${code}$", sign)
    return text


_SIGNS = {
    "LT": "<", "GT": ">", "RF": "&", "BP": "*", "LP": "(", "RP": ")", "C": ",", "u20": " ",
    "u7b": "{", "u7d": "}", "u5b": "[", "u5d": "]",
}  # fmt: skip


def _features(declared: Declarations, parts: _Parts, used: Iterable[int]) -> set[str]:
    """Return what a module uses, by the usual names of the proposals."""
    features = {INSTRUCTIONS[opcode].feature for opcode in used} - {"mvp"}
    signatures = [kind for kind in declared.types if isinstance(kind, Signature)]
    blocks = [declared.types[index] for index in parts.block_types if index < len(declared.types)]
    types = {name for kind in signatures for name in (*kind.parameters, *kind.results)}
    tests = {
        "multi-value": any(len(kind.results) > 1 for kind in signatures)
        or any(isinstance(kind, Signature) and kind.parameters for kind in blocks),
        "simd128": "v128" in types,
        "reference-types": len(declared.tables) > 1 or not types.isdisjoint(_REFERENCES),
        "function-references": any(name.startswith("(ref") for name in types),
        "gc": len(signatures) < len(declared.types),
        "exceptions": bool(declared.tags),
        "multi-memory": len(declared.memories) > 1,
        "memory64": any(memory.wide for memory in declared.memories)
        or any(table.startswith("table i64") for table in declared.tables),
        "threads": any(memory.shared for memory in declared.memories),
        "custom-page-sizes": any(memory.page_bytes != 65536 for memory in declared.memories),
        "bulk-memory": "data count" in parts.sizes,
        "mutable-globals": any(
            kind == "global" and str(what).startswith("global mut")
            for _, _, kind, what in declared.imports
        )
        or any(export.type.startswith("global mut") for export in _exports(declared)),
    }
    return features | {name for name, uses in tests.items() if uses}


_REFERENCES = ("funcref", "externref")


def _wasi_nn(wasm: bytes, modules: set[str]) -> str | None:
    from edgelab.wasinn.abi import MODULE, Era

    if MODULE in modules:
        era = Era.of_module(wasm)
        if era is None:
            return "yes, but nothing in it tells which crate it was built with"
        if era is Era.CRATE_0_6:
            return f"{era.value} (or {Era.CRATE_0_5.value}; only its tensors tell)"
        return str(era.value)
    names = (name for name in sorted(modules) if name.startswith("wasi:nn/"))
    return next((f"wasi:nn {shown(name.partition('@')[2])} (WIT)" for name in names), None)


def _rust(wasm: bytes) -> dict[str, list[str]]:
    """Recognise Rust by the paths of its library, which its messages keep in stripped modules."""
    commit = re.search(rb"/rustc/([0-9a-f]{40})/", wasm)
    if commit is None:
        return {}
    return {"language": ["Rust"], "processed-by": [f"rustc of commit {commit[1][:9].decode()}"]}


def _target(
    declared: Declarations, sections: Mapping[str, int], producers: Mapping[str, list[str]]
) -> str:
    """Say what a module was built for, where something in it tells."""
    if "linking" in sections:
        return "nothing yet: an object file, which is to be linked"
    if "dylink.0" in sections:
        return "dynamic linking: a shared library"
    offers = {name for name, _, _ in declared.exports}
    if target := foreign_target((m, n, str(what)) for m, n, _, what in declared.imports):
        return target
    if {"__new", "__pin", "__unpin"} <= offers:
        return "AssemblyScript"
    if "emscripten_stack_get_current" in offers:
        return "Emscripten"
    if any(module == WASI_MODULE for module, *_ in declared.imports):
        if "wasi_thread_start" in offers:
            return "wasm32-wasip1-threads"
        if "_start" in offers:
            return "wasm32-wasip1 command"
        return f"wasm32-wasip1 {'reactor' if '_initialize' in offers else 'library'}"
    # rustc exports these two for this target and no other.
    if {"__heap_base", "__data_end"} <= offers:
        return _NO_WASI
    rust = "Rust" in producers.get("language", ())
    return "unknown: no import or export tells" + rust * f"; perhaps {_NO_WASI}"


_NO_WASI = "wasm32-unknown-unknown"


def _judge(wasm: bytes, found: Inspection, declared: Declarations, damage: str) -> Inspection:
    """Add what is wrong with a module."""
    from edgelab.wasinn.host import WasiNN

    problems = list(_refusals(wasm, found, damage))
    host = WasiNN()
    offered = {
        (host.name, name): str(Signature.of(codes)) for name, (codes, _) in host.functions().items()
    }
    kinds = [
        (module, name, str(what) if kind == "function" else kind)
        for module, name, kind, what in declared.imports
    ]
    problems += explain_imports(kinds, offered)
    lacking = set(missing_imports(kinds, offered))
    entry = str(Signature((), ()))
    for export in found.exports:
        if export.name in ("_start", "_initialize") and export.type != entry:
            problems.append(
                Problem(
                    "E5",
                    f"its {export.name} is {export.type}",
                    f"As WASI has it, that is a function {entry}: the host calls it at the start.",
                    "Give your function another name.",
                )
            )
    least = sum(memory.minimum * memory.page_bytes for memory in declared.memories)
    if least > Limits().memory_bytes:
        problems.append(
            Problem(
                "E4",
                f"it wants {least:,} bytes of memory at the start",
                f"Limits.memory_bytes is {Limits().memory_bytes:,} unless you set it.",
                "Make its static data smaller, or pass Guest.instantiate(limits=Limits(...)).",
            )
        )
    if len(wasm) > _LARGE:
        problems.append(
            Problem(
                "P2",
                f"it has {len(wasm):,} bytes",
                "That takes long to load and to compile, and some hosts take no more than 32 MB. "
                "Often a model is inside, or debug information.",
                "Load the model through WASI-NN; build with strip = true in Cargo's profile.",
                fatal=False,
            )
        )
    if found.target == _NO_WASI:
        problems.append(
            Problem(
                "P1, E1",
                f"it was built for {_NO_WASI}, which has no WASI",
                "Often because wasm32-wasip1 was not installed. Printing does nothing in it; "
                "files, clocks and random numbers fail.",
                "rustup target add wasm32-wasip1, then build with --target wasm32-wasip1. "
                "python -m edgelab doctor looks whether your Rust can.",
                fatal=False,
            )
        )
    missing = tuple(
        wanted for wanted, kind in zip(found.imports, kinds, strict=True) if kind in lacking
    )
    return replace(found, missing=missing, problems=tuple(problems))


def _refusals(wasm: bytes, found: Inspection, damage: str) -> Iterator[Problem]:
    """Say why wasmtime refuses a module, if it does."""
    try:
        wasmtime.Module.validate(engine(), wasm)
        refusal = ""
    except wasmtime.WasmtimeError as error:
        refusal = one_line(error)
    off = sorted(_OFF.intersection(found.features))
    if damage and refusal:
        yield _damaged(damage)
    elif damage:
        yield Problem(
            "E2",
            f"this report is not complete: {damage}",
            "wasmtime takes the module: perhaps it is newer than this inspection.",
            "Try it. If it works, all is well.",
            fatal=False,
        )
    elif refusal and off:
        yield Problem(
            "E2",
            f"it uses {', '.join(off)}: {refusal}",
            "edgelab switches off what its guests do not need and its limits do not cover.",
            "Build it without: for Rust, with --target wasm32-wasip1 and no target-feature of "
            "that name.",
        )
    elif refusal:
        yield Problem(
            "E2",
            f"wasmtime refuses it: {refusal}",
            "It is damaged, or uses something newer than this wasmtime.",
            "Get or build it again. For the guests: python -m edgelab guest build",
        )


def _damaged(damage: str) -> Problem:
    return Problem(
        "E2",
        f"it is damaged, and this report is not complete: {damage}",
        "A download or a copy stopped early, or changed bytes (as text mode does).",
        "Get it again, and compare its SHA-256. For the guests: python -m edgelab guest build",
    )


# --- components -----------------------------------------------------------------------------------


def _component(wasm: bytes) -> Inspection:
    from edgelab.wasinn.component import VERSION

    parts, damage, modules = _Parts(), "", 0
    imports: list[Import] = []
    exports: list[Export] = []
    try:
        for section in sections(wasm):
            parts.read(wasm, section)
            reader = Reader(wasm, section.body, section.end)
            if section.name == "core module":
                modules += 1
            elif section.name == "import":
                for _ in range(reader.count()):
                    imports.append(Import("", _external_name(reader), _external_type(reader)))
            elif section.name == "export":
                for _ in range(reader.count()):
                    name, kind = _external_name(reader), _sort(reader)
                    reader.number()
                    if reader.byte():
                        _external_type(reader)
                    exports.append(Export(name, kind))
    except Unreadable as error:
        damage = str(error)
    names = {item.name for item in imports} | {item.name for item in exports}
    version = max((found[1] for name in names if (found := _WASI_NAME.match(name))), default="")
    missing = tuple(
        wanted
        for wanted in imports
        if not wanted.name.startswith("wasi:nn/") or not wanted.name.endswith(f"@{VERSION}")
    )
    problems = [_damaged(damage)] if damage else []
    if missing:
        listed = ", ".join(shown(wanted.name) for wanted in missing[:5])
        more = f" and {len(missing) - 5} more" * (len(missing) > 5)
        problems.append(
            Problem(
                "E7",
                f"it is a component and imports {listed}{more}",
                "It was built for wasm32-wasip2, or made a component by a tool. edgelab runs core "
                f"modules, and components that import wasi:nn {VERSION} alone.",
                "Build it with --target wasm32-wasip1.",
            )
        )
    return Inspection(
        kind="component",
        size_bytes=len(wasm),
        target=f"wasm32-wasip{version} component" if version else "a component without WASI",
        producers=parts.producers or _rust(wasm),
        sections=parts.sizes,
        imports=tuple(imports),
        exports=tuple(exports),
        wasi_nn=_wasi_nn(wasm, names),
        core_modules=modules,
        missing=missing,
        problems=tuple(problems),
    )


_WASI_NAME = re.compile(r"wasi:(?:cli|io|clocks|random|filesystem|sockets|http)/.*@0\.(\d)\b")
_SORTS = ("core module", "function", "value", "type", "component", "instance")


def _external_name(reader: Reader) -> str:
    form = reader.byte()
    if form > 1:
        raise Unreadable(f"unknown form {form} of a name", reader.at - 1)
    return reader.name()


def _sort(reader: Reader) -> str:
    code = reader.byte()
    if code >= len(_SORTS):
        raise Unreadable(f"unknown sort {code}", reader.at - 1)
    if code == 0:
        reader.byte()
    return _SORTS[code]


def _external_type(reader: Reader) -> str:
    kind = _sort(reader)
    # A value or a type says first how it is bound; only a new resource type needs no index.
    if kind not in ("value", "type") or not (reader.byte() and kind == "type"):
        reader.number()
    return kind
