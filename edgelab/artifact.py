"""What a file of wasmtime's machine code (``.cwasm``) says about itself. Nothing of it is executed.

wasmtime itself looks only when it deserializes, and not at everything: a wrong machine in the ELF
header passes, if the rest fits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edgelab.errors import GuestError

_OS_ABI = 200
_ELF_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 22: "s390x"}
_COMPONENT, _PULLEY32, _PULLEY64 = 2, 4, 8  # flags in the ELF header
_TAKE_WASM = "Take the .wasm file instead, and compile it here."


@dataclass(frozen=True, slots=True)
class Artifact:
    """What machine code says about itself.

    Attributes
    ----------
    kind : {"module", "component"}
    machine : str
        What it runs on, such as ``"x86_64"`` or ``"aarch64"``; ``"pulley64"`` is bytecode, which
        wasmtime interprets on every machine.
    wasmtime : str
        The version of wasmtime that made it, and that it needs, such as ``"50"``.
    target : str
        The triple it was made for; empty where this version's format is unknown here.
    features : tuple of str
        The CPU features it uses, as Cranelift names them; empty where `target` is.
    code_bytes : int
        Size of the machine instructions alone.
    """

    kind: str
    machine: str
    wasmtime: str
    target: str
    features: tuple[str, ...]
    code_bytes: int

    def problem(self, here: Artifact) -> str | None:
        """Say why a machine can't run it (P5, E6, E10), and the cure; None if it can.

        Parameters
        ----------
        here : Artifact
            What wasmtime makes on that machine, see `edgelab.aot.this_machine`.
        """
        native = not self.machine.startswith("pulley")
        if native and self.machine != here.machine:
            return (
                f"P5: this is machine code for {self.machine}, and this machine is {here.machine}. "
                f"Machine code is not portable; .wasm is. {_TAKE_WASM}"
            )
        if self.wasmtime != here.wasmtime:
            return (
                f"E6: this machine code is of wasmtime {self.wasmtime}, and here is "
                f"{here.wasmtime}: each version runs only its own. {_TAKE_WASM}"
            )
        if native and self.target.split("-")[::2] != here.target.split("-")[::2]:
            return (
                f"P5: this is machine code for {self.target}, and this machine is {here.target}. "
                f"{_TAKE_WASM}"
            )
        if native and (lacking := sorted(set(self.features) - set(here.features))):
            return (
                f"E10: this machine code uses {', '.join(lacking)}, which this CPU lacks: it would "
                f"die of an illegal instruction (SIGILL). {_TAKE_WASM}"
            )
        return None


def inspect_artifact(code: bytes) -> Artifact:
    """Read the header of machine code, of whatever machine and version.

    Parameters
    ----------
    code : bytes
        The whole file. What follows wasmtime's own bytes does not matter.

    Raises
    ------
    GuestError
        If it is none of wasmtime's machine code, or damaged (E2).

    Notes
    -----
    It is an ELF file with the OS ABI 200. Its section ``.wasmtime.engine`` holds a zero, the
    version as a counted string, and in the encoding *postcard* the triple, Cranelift's settings,
    the CPU features and more.
    """
    try:
        if code[:5] != b"\x7fELF\2" or code[7] != _OS_ABI:
            raise ValueError(f"it begins with {bytes(code[:8])!r}")
        order = "<" if code[5] == 1 else ">"
        (flags,) = struct.unpack_from(f"{order}I", code, 48)
        sections = dict(_sections(code, order))
        engine = _Postcard(sections[".wasmtime.engine"])
        if engine.number() != 0:
            raise ValueError("its version is of an unknown form")
        version = engine.text()
        try:
            target = engine.text()
            engine.flags()  # Cranelift's settings
            found = [name for name, on in engine.flags() if on is True]
            features = tuple(sorted(name for name in found if name.startswith("has_")))
        except ValueError:
            target, features = "", ()
        code_bytes = len(sections[".text"])
    except (ValueError, LookupError, struct.error) as error:
        raise GuestError(
            f"E2: this is not wasmtime's machine code ({error}). It is damaged or something else."
        ) from None
    machine = elf_machine(code)
    if flags & (_PULLEY32 | _PULLEY64):
        machine = "pulley32" if flags & _PULLEY32 else "pulley64"
    kind = "component" if flags & _COMPONENT else "module"
    return Artifact(kind, machine, version, target, features, code_bytes)


def elf_machine(code: bytes) -> str:
    """Name the machine that an ELF file says it is for, such as ``"x86_64"``."""
    number = int.from_bytes(code[18:20], "little" if code[5:6] == b"\1" else "big")
    return _ELF_MACHINES.get(number, f"ELF machine {number}")


def _sections(code: bytes, order: str) -> Iterator[tuple[str, memoryview]]:
    """Yield the sections of an ELF file: name and bytes."""
    (table,) = struct.unpack_from(f"{order}Q", code, 40)
    entry_bytes, count, names_index = struct.unpack_from(f"{order}3H", code, 58)
    if table + entry_bytes * count > len(code):
        raise ValueError("its table of sections lies beyond its end")
    headers = [
        struct.unpack_from(f"{order}IIQQQQ", code, table + index * entry_bytes)
        for index in range(count)
    ]

    def cut(header: tuple[int, ...]) -> memoryview:
        start, size = header[4:6]
        if start + size > len(code):
            raise ValueError("a section lies beyond its end")
        return memoryview(code)[start : start + size]

    names = bytes(cut(headers[names_index]))
    for header in headers:
        if header[1] != 0:  # else there is nothing in it
            yield names[header[0] :].partition(b"\0")[0].decode(), cut(header)


class _Postcard:
    """A reader of serde's compact format *postcard*."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def _take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("its engine section is cut off")
        return bytes(self._data[start : self._at])

    def number(self) -> int:
        value = shift = 0
        while shift < 64:
            (byte,) = self._take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("an integer is too long")

    def text(self) -> str:
        return self._take(self.number()).decode()

    def flags(self) -> list[tuple[str, str | int | bool]]:
        """Name and value of Cranelift's flags: one of a set, a number, or on and off."""
        return [(self.text(), self._value()) for _ in range(self.number())]

    def _value(self) -> str | int | bool:
        kind = self.number()
        if kind == 0:
            return self.text()
        if kind > 2:
            raise ValueError(f"a flag of kind {kind}")
        (byte,) = self._take(1)
        return bool(byte) if kind == 2 else byte
