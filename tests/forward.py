"""Guests that do nothing but pass calls on: a test then plays the guest, hostile or not."""

from __future__ import annotations

from collections.abc import Mapping

from edgelab.runtime import Instance

_TYPES = {"i": "i32", "l": "i64"}

WASI_NN = {
    "load": "iiiii->i",
    "load_by_name": "iii->i",
    "init_execution_context": "ii->i",
    "set_input": "iii->i",
    "compute": "i->i",
    "get_output": "iiiii->i",
}
WASMEDGE = {
    "load_by_name_with_config": "iiiii->i",
    "unload": "i->i",
    "compute_single": "i->i",
    "get_output_single": "iiiii->i",
    "fini_single": "i->i",
}
NN = {**WASI_NN, **WASMEDGE}
WASI = {
    "args_sizes_get": "ii->i",
    "args_get": "ii->i",
    "environ_sizes_get": "ii->i",
    "environ_get": "ii->i",
    "fd_read": "iiii->i",
    "fd_write": "iiii->i",
    "fd_prestat_get": "ii->i",
    "path_open": "iiiiillii->i",
    "path_create_directory": "iii->i",
    "path_unlink_file": "iii->i",
    "path_rename": "iiiiii->i",
    "poll_oneoff": "iiii->i",
    "proc_exit": "i->",
}


def forwarder(functions: Mapping[str, Mapping[str, str]], pages: int = 1, more: str = "") -> bytes:
    """Return a module that imports all functions, and exports each under the same name.

    It also exports its memory, and ``grow``. `more` is added to its text.
    """
    imports, exports = [], []
    for module, signatures in functions.items():
        for name, signature in signatures.items():
            given, _, back = signature.partition("->")
            kind = "".join(f" (param {_TYPES[c]})" for c in given)
            kind += "".join(f" (result {_TYPES[c]})" for c in back)
            imports.append(f'(import "{module}" "{name}" (func ${name}{kind}))')
            passed = " ".join(f"local.get {k}" for k in range(len(given)))
            exports.append(f'(func (export "{name}"){kind} {passed} call ${name})')
    return f"""(module {" ".join(imports)}
        (memory (export "memory") {pages})
        (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
        {" ".join(exports)} {more})""".encode()


class Heap:
    """Hands out places in an instance's memory, one after the other; never frees."""

    def __init__(self, instance: Instance, start: int = 64) -> None:
        self._instance, self._next = instance, start

    def room(self, size: int, alignment: int = 16) -> int:
        """Reserve bytes; return their guest address."""
        place = self._next + -self._next % alignment
        self._next = place + size
        self._instance.memory.address(place, size)  # the test's own mistake, if it is too much
        return place

    def put(self, data: bytes, alignment: int = 16) -> int:
        """Store bytes; return their guest address."""
        place = self.room(len(data), alignment)
        self._instance.memory.write(place, data)
        return place

    def number(self, place: int) -> int:
        """Read a u32."""
        return int.from_bytes(self._instance.memory.read(place, 4), "little")
