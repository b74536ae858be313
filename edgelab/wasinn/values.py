"""Values of the component model, between wasmtime's C form and Python.

wasmtime's own bindings convert one number after the other, with a Python object for each: 0.5 s for
the 602,112 bytes of a tensor. Here the numbers of a list are moved at once, through NumPy.

| WIT | Python |
|---|---|
| bool, integers, floats, string | bool, int, float, str |
| enum | str, the case's name |
| list of u8 | bytes |
| list of other numbers | numpy.ndarray of one dimension |
| other list, tuple | list, tuple |
| record | dict |
| option | None, or the value |
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from wasmtime import _ffi as ffi
from wasmtime import component as wit

Val: Any = ffi.wasmtime_component_val_t
"""One value: its kind, and a union. All zeros are `false`, which owns nothing."""
_SIZE: int = ctypes.sizeof(Val)
_OFFSET: int = Val.of.offset
_Entry: Any = ffi.wasmtime_component_valrecord_entry_t

_STRING, _LIST, _RECORD, _TUPLE, _ENUM, _OPTION, _BOOL = (
    getattr(ffi, f"WASMTIME_COMPONENT_{name}").value
    for name in ("STRING", "LIST", "RECORD", "TUPLE", "ENUM", "OPTION", "BOOL")
)
_NUMBERS: dict[type, tuple[str, str]] = {
    wit.U8: ("u8", "u1"),
    wit.S8: ("s8", "i1"),
    wit.U16: ("u16", "<u2"),
    wit.S16: ("s16", "<i2"),
    wit.U32: ("u32", "<u4"),
    wit.S32: ("s32", "<i4"),
    wit.U64: ("u64", "<u8"),
    wit.S64: ("s64", "<i8"),
    wit.F32: ("f32", "<f4"),
    wit.F64: ("f64", "<f8"),
}  # type → field of the union, NumPy's name

_byte_vec_new = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)(
    ("wasm_byte_vec_new", ffi.dll)
)


class Codec(NamedTuple):
    """Both ways of one type.

    `lower` writes a Python value to a `Val` of zeros. What it wrote until it failed can be deleted
    like any other value. It raises TypeError for a value of another type.
    """

    lower: Callable[[Any, Any], None]
    lift: Callable[[Any], Any]


class UnsupportedType(Exception):
    """A type that has no form in Python here."""


def codec(kind: wit.ValType, own: Callable[[wit.OwnType], Codec]) -> Codec:
    """Make the codec of a type.

    Parameters
    ----------
    kind : wasmtime.component.ValType
    own : callable
        Makes the codec of a resource that changes hands.

    Raises
    ------
    UnsupportedType
        For a variant, flags, a result inside of another type, a borrowed resource, a stream or a
        future.
    """
    if type(kind) in _NUMBERS:
        return _number(type(kind))
    if isinstance(kind, wit.Bool):
        return Codec(_lower_bool, lambda val: bool(val.of.boolean))
    if isinstance(kind, wit.String):
        return Codec(_lower_string, lambda val: text(val.of.string))
    if isinstance(kind, wit.EnumType):
        return _enum(kind.names)
    if isinstance(kind, wit.ListType):
        element = kind.element
        return numbers(type(element)) if type(element) in _NUMBERS else _list(codec(element, own))
    if isinstance(kind, wit.TupleType):
        return _tuple([codec(element, own) for element in kind.elements])
    if isinstance(kind, wit.RecordType):
        return _record({name: codec(field, own) for name, field in kind.fields})
    if isinstance(kind, wit.OptionType):
        return _option(codec(kind.payload, own))
    if isinstance(kind, wit.OwnType):
        return own(kind)
    raise UnsupportedType(type(kind).__name__)


def text(vector: Any) -> str:
    """Return a string of the C form."""
    return ctypes.string_at(vector.data, vector.size).decode()


def set_text(vector: Any, data: bytes) -> None:
    """Fill a string of the C form with UTF-8."""
    _byte_vec_new(ctypes.addressof(vector), len(data), data)


def items(vector: Any, kind: Any = Val) -> Any:
    """View the elements of a list, a tuple or a record."""
    if not vector.size:
        return ()
    return (kind * vector.size).from_address(ctypes.addressof(vector.data.contents))


def new_items(val: Any, kind: int, count: int) -> Any:
    """Make `val` a list or tuple of `count` values to be written; return these."""
    ffi.wasmtime_component_vallist_new_uninit(ctypes.byref(val.of.list), count)
    new = items(val.of.list)
    if count:
        ctypes.memset(new, 0, count * _SIZE)
    val.kind = kind
    return new


def _number(kind: type) -> Codec:
    field, name = _NUMBERS[kind]
    dtype, tag = np.dtype(name), getattr(ffi, f"WASMTIME_COMPONENT_{field.upper()}").value

    def lower_float(value: Any, val: Any) -> None:
        setattr(val.of, field, value)  # takes what has __float__
        val.kind = tag

    def lower_integer(value: Any, val: Any) -> None:
        value = operator.index(value)
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            raise TypeError(f"{value} is no {field}")
        setattr(val.of, field, value)
        val.kind = tag

    lower = lower_float if dtype.kind == "f" else lower_integer
    return Codec(lower, lambda val: getattr(val.of, field))


def numbers(kind: type) -> Codec:
    """Make the codec of a list of numbers."""
    field, name = _NUMBERS[kind]
    dtype, tag = np.dtype(name), getattr(ffi, f"WASMTIME_COMPONENT_{field.upper()}").value
    layout = np.dtype(
        {
            "names": ["kind", "number"],
            "formats": [np.dtype("u1"), dtype],
            "offsets": [0, _OFFSET],
            "itemsize": _SIZE,
        }
    )

    def view(val: Any) -> NDArray[Any]:
        vector = val.of.list
        if not vector.size:
            return np.empty(0, layout)
        address = ctypes.addressof(vector.data.contents)
        memory = (Val * vector.size).from_address(address)
        return np.frombuffer(memory, layout)

    def lower(value: Any, val: Any) -> None:
        array = _array(value, dtype)
        ffi.wasmtime_component_vallist_new_uninit(ctypes.byref(val.of.list), array.size)
        elements = view(val)
        elements["kind"] = tag
        elements["number"] = array
        val.kind = _LIST

    def lift(val: Any) -> Any:
        found = view(val)["number"]
        return found.tobytes() if kind is wit.U8 else np.array(found)

    return Codec(lower, lift)


def _array(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return numbers of one type in one dimension; refuse what would change on the way."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        if dtype != np.uint8:
            raise TypeError(f"bytes are no list of {dtype}; pass a NumPy array")
        return np.frombuffer(value, np.uint8)
    if dtype.kind == "f":
        return np.asarray(value).astype(dtype, casting="same_kind").reshape(-1)
    if isinstance(value, np.ndarray):
        array = value.astype(dtype) if value.dtype.kind in "iu" else None
        if array is not None and np.array_equal(array, value):
            return array.reshape(-1)
    else:
        with contextlib.suppress(TypeError, OverflowError):
            return np.array([operator.index(number) for number in value], dtype)
    raise TypeError(f"not all of these are {dtype}")


def _lower_bool(value: Any, val: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value!r} is no bool")
    val.of.boolean = bool(value)
    val.kind = _BOOL


def _lower_string(value: Any, val: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no str")
    set_text(val.of.string, value.encode())
    val.kind = _STRING


def _enum(names: list[str]) -> Codec:
    def lower(value: Any, val: Any) -> None:
        if value not in names:
            raise TypeError(f"{value!r} is none of {', '.join(names)}")
        set_text(val.of.enumeration, value.encode())
        val.kind = _ENUM

    return Codec(lower, lambda val: text(val.of.enumeration))


def _list(element: Codec) -> Codec:
    def lower(value: Any, val: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{value!r:.100} is no list")
        for each, place in zip(value, new_items(val, _LIST, len(value)), strict=True):
            element.lower(each, place)

    return Codec(lower, lambda val: [element.lift(each) for each in items(val.of.list)])


def _tuple(elements: list[Codec]) -> Codec:
    def lower(value: Any, val: Any) -> None:
        if not isinstance(value, tuple) or len(value) != len(elements):
            raise TypeError(f"{value!r:.100} is no tuple of {len(elements)}")
        places = new_items(val, _TUPLE, len(elements))
        for element, each, place in zip(elements, value, places, strict=True):
            element.lower(each, place)

    def lift(val: Any) -> Any:
        found = items(val.of.tuple)
        return tuple(element.lift(each) for element, each in zip(elements, found, strict=True))

    return Codec(lower, lift)


def _record(fields: Mapping[str, Codec]) -> Codec:
    def lower(value: Any, val: Any) -> None:
        if not isinstance(value, Mapping) or value.keys() != fields.keys():
            raise TypeError(f"{value!r:.100} is no dict with the keys {', '.join(fields)}")
        ffi.wasmtime_component_valrecord_new_uninit(ctypes.byref(val.of.record), len(fields))
        places = items(val.of.record, _Entry)
        ctypes.memset(places, 0, ctypes.sizeof(places))
        val.kind = _RECORD
        for (name, field), place in zip(fields.items(), places, strict=True):
            set_text(place.name, name.encode())
            field.lower(value[name], place.val)

    def lift(val: Any) -> Any:
        found = zip(fields.items(), items(val.of.record, _Entry), strict=True)
        return {name: field.lift(entry.val) for (name, field), entry in found}

    return Codec(lower, lift)


def _option(payload: Codec) -> Codec:
    def lower(value: Any, val: Any) -> None:
        val.kind = _OPTION
        if value is not None:
            val.of.option = ffi.wasmtime_component_val_new(ctypes.byref(Val()))
            payload.lower(value, val.of.option.contents)

    return Codec(lower, lambda val: payload.lift(val.of.option.contents) if val.of.option else None)
