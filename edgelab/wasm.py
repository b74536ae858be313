"""What a WebAssembly module declares: its imports, its exports and their signatures.

wasmtime's C API lists them too, but aborts the whole process at a type that it has no word for,
such as ``v128`` in the signature of an export. So the few bytes that matter are read here.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelab.errors import GuestError

_TYPES = {
    0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128",
    0x70: "funcref", 0x6F: "externref",
}  # fmt: skip
_KINDS = ("function", "table", "memory", "global")
_TYPE, _IMPORT, _FUNCTION, _EXPORT = 1, 2, 3, 7


@dataclass(frozen=True, slots=True)
class Signature:
    """Value types of a function, by their names in the WebAssembly text format."""

    parameters: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        return f"({', '.join(self.parameters)}) -> ({', '.join(self.results)})"


@dataclass(frozen=True, slots=True)
class Interface:
    """What a module wants and offers.

    Attributes
    ----------
    imports : tuple of (str, str, Signature or str)
        Module, name, and a function's signature, or else ``"table"``, ``"memory"`` or ``"global"``.
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
    types: list[Signature] = []
    functions: list[Signature] = []
    imports: list[tuple[str, str, Signature | str]] = []
    exports: dict[str, Signature | str] = {}
    try:
        module = _Reader(wasm)
        module.take(8)
        while module.at < len(wasm):
            section, size = module.byte(), module.number()
            if section not in (_TYPE, _IMPORT, _FUNCTION, _EXPORT):
                module.take(size)
                continue
            body = _Reader(module.take(size))
            for _ in range(body.number()):
                if section == _TYPE:
                    types.append(body.signature())
                elif section == _IMPORT:
                    where, name, kind = body.name(), body.name(), _KINDS[body.byte()]
                    if kind == "function":
                        functions.append(types[body.number()])
                        imports.append((where, name, functions[-1]))
                    else:
                        body.skip_type(kind)
                        imports.append((where, name, kind))
                elif section == _FUNCTION:
                    functions.append(types[body.number()])
                else:
                    name, kind, index = body.name(), _KINDS[body.byte()], body.number()
                    exports[name] = functions[index] if kind == "function" else kind
    except (ValueError, LookupError) as error:
        raise GuestError(
            f"E2: this module's types or names can't be read ({error!r}). It is damaged, or uses a "
            "feature that is not supported. Build it again: python -m edgelab guest build"
        ) from None
    return Interface(tuple(imports), exports)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"cut off at byte {start}")
        return self.data[start : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """Read an integer in LEB128."""
        value = shift = 0
        while shift < 64:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("an integer is too long")

    def name(self) -> str:
        return self.take(self.number()).decode()

    def signature(self) -> Signature:
        if self.byte() != 0x60:
            raise ValueError("a type is not a function's")
        parameters = tuple(self.type() for _ in range(self.number()))
        return Signature(parameters, tuple(self.type() for _ in range(self.number())))

    def type(self) -> str:
        code = self.byte()
        if code in (0x63, 0x64):  # the long form of a reference
            code = self.byte()
        return _TYPES[code]

    def skip_type(self, kind: str) -> None:
        if kind != "memory":
            self.type()
        if kind == "global":
            self.byte()  # mutable or not
        else:
            bounded = self.byte() & 1
            self.number()
            if bounded:
                self.number()
