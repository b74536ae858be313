"""What a WebAssembly module declares: what it wants from its host, and what it offers.

wasmtime's C API lists that too, but aborts the whole process at a type that it has no word for,
such as ``v128`` in the signature of an export. So the few bytes that matter are read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgelab.errors import GuestError
from edgelab.opcodes import MAX_ENTRIES, Unreadable, number, walk

_TYPES = {
    0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128",
    0x78: "i8", 0x77: "i16",  # in structs and arrays only
    0x70: "funcref", 0x6F: "externref", 0x6E: "anyref", 0x6D: "eqref", 0x6C: "i31ref",
    0x6B: "structref", 0x6A: "arrayref", 0x69: "exnref", 0x68: "contref", 0x71: "nullref",
    0x72: "nullexternref", 0x73: "nullfuncref", 0x74: "nullexnref", 0x75: "nullcontref",
}  # fmt: skip
_MAX_TYPES = 1000  # parameters, or results: engines agree on this, too
_KINDS = ("function", "table", "memory", "global", "tag")
_SECTIONS = (
    "custom", "type", "import", "function", "table", "memory", "global", "export", "start",
    "element", "code", "data", "data count", "tag",
)  # fmt: skip
_COMPONENT_SECTIONS = (
    "custom", "core module", "core instance", "core type", "component", "instance", "alias", "type",
    "canon", "start", "import", "export", "value",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signature:
    """Value types of a function, by their names in the WebAssembly text format."""

    parameters: tuple[str, ...]
    results: tuple[str, ...]
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once: a module can use one long signature a million times.
        text = f"({', '.join(self.parameters)}) -> ({', '.join(self.results)})"
        object.__setattr__(self, "_text", text)

    @classmethod
    def of(cls, codes: str) -> Signature:
        """Return what a host module's short form means, such as ``"il->i"``."""
        given, _, back = codes.partition("->")
        types = {"i": "i32", "l": "i64"}
        return cls(tuple(types[code] for code in given), tuple(types[code] for code in back))

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Memory:
    """A linear memory.

    Attributes
    ----------
    minimum, maximum : int, int or None
        Size in pages of `page_bytes`, at the start and at most.
    shared : bool
        Threads can share it.
    wide : bool
        Its addresses have 64 bits.
    page_bytes : int
    """

    minimum: int
    maximum: int | None
    shared: bool = False
    wide: bool = False
    page_bytes: int = 65536

    def __str__(self) -> str:
        most = "" if self.maximum is None else f" {self.maximum}"
        size = "" if self.page_bytes == 65536 else f" (pagesize {self.page_bytes})"
        return f"memory{' i64' * self.wide} {self.minimum}{most}{size}{' shared' * self.shared}"


@dataclass(frozen=True, slots=True)
class Interface:
    """What a module wants and offers.

    Attributes
    ----------
    imports : tuple of (str, str, Signature or str)
        Module, name, and a function's signature, or else ``"table"``, ``"memory"``, ``"global"`` or
        ``"tag"``.
    exports : dict of str to Signature or str
    """

    imports: tuple[tuple[str, str, Signature | str], ...]
    exports: dict[str, Signature | str]


def interface(wasm: bytes) -> Interface:
    """Read a module's interface.

    Parameters
    ----------
    wasm : bytes
        A core module that wasmtime accepts. Only what is read here is checked again.

    Raises
    ------
    GuestError
        If the module is damaged, or uses a type that is unknown here (E2).
    """
    found = Declarations()
    try:
        for section in sections(wasm):
            if section.name in ("type", "import", "function", "export"):
                found.read(wasm, section)
    except Unreadable as error:
        raise GuestError(
            f"E2: this module's types or names can't be read: {error}. It is damaged, or uses a "
            "feature that is not supported. Build it again: python -m edgelab guest build"
        ) from None
    return Interface(
        tuple(
            (module, name, what if isinstance(what, Signature) and kind == "function" else kind)
            for module, name, kind, what in found.imports
        ),
        {
            name: found.functions[index] if kind == "function" else kind
            for name, kind, index in found.exports
        },
    )


class Section(NamedTuple):
    """Where a section is.

    Attributes
    ----------
    name : str
        Which section it is, such as ``"code"`` or ``"custom"``.
    label : str
        The same, or a custom section's own name.
    start, body, end : int
        Offsets of its first byte, of what it contains, and of the byte behind it.
    """

    name: str
    label: str
    start: int
    body: int
    end: int


def is_component(wasm: bytes) -> bool:
    """Whether WebAssembly is a component (of the released format) and not a core module."""
    return wasm[4:8] == b"\x0d\0\x01\0"


def sections(wasm: bytes) -> Iterator[Section]:
    """Go through the sections of a module or a component.

    Raises
    ------
    Unreadable
        Where a section is unknown or ends behind the file.
    """
    at, names = 8, _COMPONENT_SECTIONS if is_component(wasm) else _SECTIONS
    while at < len(wasm):
        start, kind = at, wasm[at]
        try:
            size, at = number(wasm, at + 1)
        except IndexError:
            raise Unreadable("the file is cut off in the head of a section", start) from None
        if kind >= len(names):
            raise Unreadable(f"there is no section of kind {kind}", start)
        name = names[kind]
        if size > len(wasm) - at:
            raise Unreadable(
                f"the {name} section claims {size:,} bytes, and the file has {len(wasm) - at:,} "
                "more: it is cut off, or damaged before",
                start,
            )
        label, body, end = name, at, at + size
        if kind == 0:
            reader = Reader(wasm, at, end)
            label, body = reader.name(), reader.at
            if label in names:
                label = f"custom: {label}"
        yield Section(name, label, start, body, end)
        at = end


class Reader:
    """Reads from `at` to `end` of some bytes, and not beyond."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def byte(self) -> int:
        if self.at >= self.end:
            raise Unreadable("something is cut off", self.at)
        self.at += 1
        return self.data[self.at - 1]

    def number(self, size: int = 5) -> int:
        """Read an unsigned integer in LEB128, of so many bytes at most."""
        try:
            value, behind = number(self.data, self.at, size)
        except IndexError:
            behind = self.end + 1
        if behind > self.end:
            raise Unreadable("an integer is cut off", self.at)
        self.at = behind
        return value

    def count(self, most: int = MAX_ENTRIES) -> int:
        """Read how many entries follow; each takes a byte or more."""
        at, value = self.at, self.number()
        if value > min(most, self.end - self.at):
            raise Unreadable(
                f"a list of {value:,} entries in {self.end - self.at:,} bytes can't be", at
            )
        return value

    def part(self, size: int) -> Reader:
        """Return a reader of the next bytes, and go on behind them."""
        if size > self.end - self.at:
            raise Unreadable(f"{size:,} bytes where {self.end - self.at:,} are left", self.at)
        self.at += size
        return Reader(self.data, self.at - size, self.at)

    def name(self) -> str:
        at, part = self.at, self.part(self.number())
        try:
            return self.data[part.at : part.end].decode()
        except UnicodeDecodeError:
            raise Unreadable("a name is not UTF-8", at) from None

    def type(self) -> str:
        """Read a value type, or what a field of a struct holds."""
        at, code = self.at, self.byte()
        if code in (0x63, 0x64):  # the long form of a reference
            null, start = code == 0x63, self.at
            heap = self.number()
            if self.at - start > 1 or heap < 0x40:  # not negative: the index of a type
                return f"(ref {'null ' * null}{heap})"
            short = _TYPES.get(heap, "")
            if not short.endswith("ref"):
                raise Unreadable(f"unknown type {heap:#04x}", start)
            return short if null else f"(ref {short.removesuffix('ref')})"
        if code not in _TYPES:
            raise Unreadable(f"unknown type {code:#04x}", at)
        return _TYPES[code]

    def types(self) -> tuple[str, ...]:
        return tuple(self.type() for _ in range(self.count(_MAX_TYPES)))

    def definition(self) -> Signature | str:
        """Read one type of the type section."""
        at, code = self.at, self.byte()
        if code in (0x50, 0x4F):  # with supertypes
            for _ in range(self.count()):
                self.number()
            at, code = self.at, self.byte()
        if code == 0x60:
            return Signature(self.types(), self.types())
        if code in (0x5F, 0x5E):
            for _ in range(self.count() if code == 0x5F else 1):
                self.type()
                self.byte()  # mutable or not
            return "struct" if code == 0x5F else "array"
        raise Unreadable(f"a type is neither a function's nor another known one: {code:#04x}", at)

    def limits(self) -> Memory:
        """Read the limits of a memory or a table."""
        flags = self.byte()
        if flags > 0x0F:
            raise Unreadable(f"unknown limits {flags:#04x}", self.at - 1)
        wide = bool(flags & 4)
        size = 10 if wide else 5
        minimum = self.number(size)
        maximum = self.number(size) if flags & 1 else None
        page = 1 << min(self.number(), 64) if flags & 8 else 65536
        return Memory(minimum, maximum, bool(flags & 2), wide, page)

    def table(self) -> str:
        kind = self.type()
        limits = self.limits()
        most = "" if limits.maximum is None else f" {limits.maximum}"
        return f"table{' i64' * limits.wide} {limits.minimum}{most} {kind}"

    def variable(self) -> str:
        """Read the type of a global."""
        kind, mutable = self.type(), self.byte()
        return f"global {'mut ' * (mutable & 1)}{kind}"

    def skip_constant(self) -> None:
        """Skip a constant expression."""
        self.at = walk(self.data, self.at, self.end, constant=True)[1]


class Declarations:
    """What the sections of a module declare, as far as they were read.

    Attributes
    ----------
    types : list of Signature or str
        A string is a type that is no function's.
    imports : list of (str, str, str, Signature or Memory or str)
        Module, name, kind, and what exactly.
    functions : list of Signature
        Imported ones first, as in all lists here that others refer to by index.
    memories : list of Memory
    tables, globals : list of str
    tags : list of Signature
    exports : list of (str, str, int)
        Name, kind and index.
    """

    def __init__(self) -> None:
        self.types: list[Signature | str] = []
        self.imports: list[tuple[str, str, str, Signature | Memory | str]] = []
        self.functions: list[Signature] = []
        self.memories: list[Memory] = []
        self.tables: list[str] = []
        self.globals: list[str] = []
        self.tags: list[Signature] = []
        self.exports: list[tuple[str, str, int]] = []

    def read(self, wasm: bytes, section: Section) -> None:
        """Add what one section declares.

        Raises
        ------
        Unreadable
            If it is damaged.
        """
        reader = Reader(wasm, section.body, section.end)
        read_one: Callable[[Reader], object] | None = {
            "type": self._type,
            "import": self._import,
            "function": lambda reader: self.functions.append(self._signature(reader)),
            "table": self._table,
            "memory": lambda reader: self.memories.append(reader.limits()),
            "global": self._global,
            "tag": lambda reader: self.tags.append(self._tag(reader)),
            "export": self._export,
        }.get(section.name)
        if read_one is not None:
            for _ in range(reader.count()):
                read_one(reader)
            if reader.at != section.end:
                raise Unreadable(f"the {section.name} section has more than it says", reader.at)

    def _type(self, reader: Reader) -> None:
        if reader.byte() == 0x4E:  # a group of types that refer to each other
            self.types += [reader.definition() for _ in range(reader.count())]
        else:
            reader.at -= 1
            self.types.append(reader.definition())

    def _signature(self, reader: Reader) -> Signature:
        at, index = reader.at, reader.number()
        found = self.types[index] if index < len(self.types) else None
        if not isinstance(found, Signature):
            raise Unreadable(f"type {index} is no function's", at)
        return found

    def _table(self, reader: Reader) -> None:
        with_value = reader.byte() == 0x40
        reader.at += 1 if with_value else -1
        self.tables.append(reader.table())
        if with_value:
            reader.skip_constant()

    def _global(self, reader: Reader) -> None:
        self.globals.append(reader.variable())
        reader.skip_constant()

    def _tag(self, reader: Reader) -> Signature:
        reader.byte()  # what it is for: always exceptions
        return self._signature(reader)

    def _import(self, reader: Reader) -> None:
        module, name, start = reader.name(), reader.name(), reader.at
        form = reader.byte() if not name else 0
        if form == 0x7F:  # the names and types of several
            for _ in range(reader.count()):
                name = reader.name()
                self._add(module, name, *self._external(reader))
        elif form == 0x7E:  # a type, and the names of several that have it
            kind, what = self._external(reader)
            for _ in range(reader.count()):
                self._add(module, reader.name(), kind, what)
        else:
            reader.at = start
            self._add(module, name, *self._external(reader))

    def _external(self, reader: Reader) -> tuple[str, Signature | Memory | str]:
        kind = self._kind(reader)
        if kind == "function":
            return kind, self._signature(reader)
        if kind == "tag":
            return kind, self._tag(reader)
        if kind == "memory":
            return kind, reader.limits()
        return kind, reader.table() if kind == "table" else reader.variable()

    def _add(self, module: str, name: str, kind: str, what: Any) -> None:
        self.imports.append((module, name, kind, what))
        lists: dict[str, list[Any]] = {
            "function": self.functions,
            "table": self.tables,
            "memory": self.memories,
            "global": self.globals,
            "tag": self.tags,
        }
        lists[kind].append(what)

    def _export(self, reader: Reader) -> None:
        at, name, kind, index = reader.at, reader.name(), self._kind(reader), reader.number()
        if kind == "function" and index >= len(self.functions):
            raise Unreadable(f"the exported function {index} is not there", at)
        self.exports.append((name, kind, index))

    def _kind(self, reader: Reader) -> str:
        code = reader.byte()
        if code >= len(_KINDS):
            raise Unreadable(f"unknown kind {code} of import or export", reader.at - 1)
        return _KINDS[code]


def refuse_other_files(data: bytes) -> None:
    """Raise GuestError if bytes are no binary WebAssembly, and say what they look like.

    Raises
    ------
    GuestError
        Machine code (P5, E6), text, or something else (E2).
    """
    if data[:4] == b"\0asm":
        return
    if (data[:4] == b"\x7fELF" and data[7:8] == b"\xc8") or re.match(rb"\0aot|edgelab-aot", data):
        raise GuestError(
            "P5, E6: this is machine code, made from a .wasm ahead of time (AOT). It runs only "
            "with the runtime's version, and on the kind of machine, that it was made for (see "
            "edgelab.artifact.inspect_artifact). Take the .wasm file; edgelab compiles it here."
        )
    if re.match(rb"\s*(;;|\(;|\((module|component)\b)", data):
        raise GuestError(
            "E2: this is WebAssembly as text (.wat). edgelab.runtime.Guest takes it as it is; "
            "wasmtime.wat2wasm(text) converts it for others."
        )
    for pattern, what in _OTHER_FILES:
        if re.match(pattern, data, re.IGNORECASE):
            raise GuestError(f"E2: this is not WebAssembly. It looks like {what}.")
    raise GuestError(
        f"E2: not WebAssembly: it begins with {bytes(data[:4])!r}, not b'\\x00asm'. It is damaged "
        "or something else. Build it again: python -m edgelab guest build"
    )


_OTHER_FILES = (
    (rb"\Z", "an empty file: a build or a download stopped early"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page: the server answered with an error"),
    (rb"version https://git-lfs", "a pointer of Git LFS. Fetch the file itself: git lfs pull"),
    (rb"\x1f\x8b", "something compressed with gzip. Unpack it: gunzip FILE"),
    (rb"\x28\xb5\x2f\xfd", "something compressed with Zstandard. Unpack it: zstd -d FILE"),
    (rb"PK\x03\x04", "a ZIP archive. Unpack it"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture"),
    (rb"!<arch>", "a library of object files. Link it into a module; in Rust, as a cdylib"),
    (
        rb"MZ|\x7fELF|[\xce\xcf]\xfa\xed\xfe",
        "a program for this or another operating system. Build it with --target wasm32-wasip1",
    ),
    (rb"BC\xc0\xde", "LLVM bitcode, which is not compiled yet"),
    (rb"\s*[{\[]", "JSON"),
    (rb"\0{8}", "a file of zeros: a download or a disk failed"),
)  # pattern → what it is
