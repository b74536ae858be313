"""The instructions of WebAssembly: what each is called, what it belongs to, and how long it is.

Sources: the core specification 3.0, chapter "Binary Format", "Instructions"; and the proposals for
threads, wide arithmetic and the older form of exceptions.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_ENTRIES = 1_000_000
"""How many types, functions or exports a module may have at most; engines agree on it."""


class Unreadable(ValueError):
    """Bytes that are not what they should be.

    Attributes
    ----------
    at : int
        Offset in the file.
    """

    def __init__(self, message: str, at: int) -> None:
        super().__init__(f"{message} (at offset {at:#x})")
        self.at = at


def number(data: bytes, at: int, size: int = 5) -> tuple[int, int]:
    """Read an unsigned integer in LEB128.

    Parameters
    ----------
    data : bytes
    at : int
        Where it begins.
    size : int
        Its longest form, in bytes.

    Returns
    -------
    int
        The integer.
    int
        Where it ends.

    Raises
    ------
    Unreadable
        If it is longer.
    IndexError
        If the data ends before it does.
    """
    value = shift = 0
    for end in range(at + 1, at + 1 + size):
        byte = data[end - 1]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, end
        shift += 7
    raise Unreadable("an integer is too long", at)


# First opcode; what follows an opcode (a dash: nothing); feature; and the mnemonics of this opcode
# and of those after it. A dot stands for an opcode without a meaning.
_TABLE = """
00    -         mvp: unreachable nop
02    block     mvp: block loop if
05    -         mvp: else
06    block     legacy-exceptions: try
07    leb       legacy-exceptions: catch
08    leb       exceptions: throw
09    leb       legacy-exceptions: rethrow
0a    -         exceptions: throw_ref
0b    end       mvp: end
0c    leb       mvp: br br_if
0e    br_table  mvp: br_table
0f    -         mvp: return
10    call      mvp: call
11    leb+leb   mvp: call_indirect
12    call      tail-call: return_call
13    leb+leb   tail-call: return_call_indirect
14    leb       function-references: call_ref return_call_ref
18    leb       legacy-exceptions: delegate
19    -         legacy-exceptions: catch_all
1a    -         mvp: drop select
1c    select    reference-types: select
1f    try_table exceptions: try_table
20    leb       mvp: local.get local.set local.tee global.get global.set
25    leb       reference-types: table.get table.set
28    memory    mvp: i32.load i64.load f32.load f64.load i32.load8_s i32.load8_u i32.load16_s
        i32.load16_u i64.load8_s i64.load8_u i64.load16_s i64.load16_u i64.load32_s i64.load32_u
        i32.store i64.store f32.store f64.store i32.store8 i32.store16 i64.store8 i64.store16
        i64.store32
3f    leb       mvp: memory.size memory.grow
41    leb       mvp: i32.const
42    long      mvp: i64.const
43    4         mvp: f32.const
44    8         mvp: f64.const
45    -         mvp: i32.eqz i32.eq i32.ne i32.lt_s i32.lt_u i32.gt_s i32.gt_u i32.le_s i32.le_u
        i32.ge_s i32.ge_u i64.eqz i64.eq i64.ne i64.lt_s i64.lt_u i64.gt_s i64.gt_u i64.le_s
        i64.le_u i64.ge_s i64.ge_u f32.eq f32.ne f32.lt f32.gt f32.le f32.ge f64.eq f64.ne f64.lt
        f64.gt f64.le f64.ge
67    -         mvp: i32.clz i32.ctz i32.popcnt i32.add i32.sub i32.mul i32.div_s i32.div_u
        i32.rem_s i32.rem_u i32.and i32.or i32.xor i32.shl i32.shr_s i32.shr_u i32.rotl i32.rotr
        i64.clz i64.ctz i64.popcnt i64.add i64.sub i64.mul i64.div_s i64.div_u i64.rem_s i64.rem_u
        i64.and i64.or i64.xor i64.shl i64.shr_s i64.shr_u i64.rotl i64.rotr f32.abs f32.neg
        f32.ceil f32.floor f32.trunc f32.nearest f32.sqrt f32.add f32.sub f32.mul f32.div f32.min
        f32.max f32.copysign f64.abs f64.neg f64.ceil f64.floor f64.trunc f64.nearest f64.sqrt
        f64.add f64.sub f64.mul f64.div f64.min f64.max f64.copysign
a7    -         mvp: i32.wrap_i64 i32.trunc_f32_s i32.trunc_f32_u i32.trunc_f64_s i32.trunc_f64_u
        i64.extend_i32_s i64.extend_i32_u i64.trunc_f32_s i64.trunc_f32_u i64.trunc_f64_s
        i64.trunc_f64_u f32.convert_i32_s f32.convert_i32_u f32.convert_i64_s f32.convert_i64_u
        f32.demote_f64 f64.convert_i32_s f64.convert_i32_u f64.convert_i64_s f64.convert_i64_u
        f64.promote_f32 i32.reinterpret_f32 i64.reinterpret_f64 f32.reinterpret_i32
        f64.reinterpret_i64
c0    -         sign-ext: i32.extend8_s i32.extend16_s i64.extend8_s i64.extend16_s i64.extend32_s
d0    leb       reference-types: ref.null
d1    -         reference-types: ref.is_null
d2    leb       reference-types: ref.func
d3    -         gc: ref.eq
d4    -         function-references: ref.as_non_null
d5    leb       function-references: br_on_null br_on_non_null
fb00  leb       gc: struct.new struct.new_default
fb02  leb+leb   gc: struct.get struct.get_s struct.get_u struct.set
fb06  leb       gc: array.new array.new_default
fb08  leb+leb   gc: array.new_fixed array.new_data array.new_elem
fb0b  leb       gc: array.get array.get_s array.get_u array.set
fb0f  -         gc: array.len
fb10  leb       gc: array.fill
fb11  leb+leb   gc: array.copy array.init_data array.init_elem
fb14  leb       gc: ref.test ref.test ref.cast ref.cast
fb18  cast      gc: br_on_cast br_on_cast_fail
fb1a  -         gc: any.convert_extern extern.convert_any ref.i31 i31.get_s i31.get_u
fc00  -         nontrapping-fptoint: i32.trunc_sat_f32_s i32.trunc_sat_f32_u i32.trunc_sat_f64_s
        i32.trunc_sat_f64_u i64.trunc_sat_f32_s i64.trunc_sat_f32_u i64.trunc_sat_f64_s
        i64.trunc_sat_f64_u
fc08  leb+leb   bulk-memory: memory.init
fc09  leb       bulk-memory: data.drop
fc0a  leb+leb   bulk-memory: memory.copy
fc0b  leb       bulk-memory: memory.fill
fc0c  leb+leb   bulk-memory: table.init
fc0d  leb       bulk-memory: elem.drop
fc0e  leb+leb   bulk-memory: table.copy
fc0f  leb       reference-types: table.grow table.size table.fill
fc13  -         wide-arithmetic: i64.add128 i64.sub128 i64.mul_wide_s i64.mul_wide_u
fd00  memory    simd128: v128.load v128.load8x8_s v128.load8x8_u v128.load16x4_s v128.load16x4_u
        v128.load32x2_s v128.load32x2_u v128.load8_splat v128.load16_splat v128.load32_splat
        v128.load64_splat v128.store
fd0c  16        simd128: v128.const i8x16.shuffle
fd0e  -         simd128: i8x16.swizzle i8x16.splat i16x8.splat i32x4.splat i64x2.splat f32x4.splat
        f64x2.splat
fd15  1         simd128: i8x16.extract_lane_s i8x16.extract_lane_u i8x16.replace_lane
        i16x8.extract_lane_s i16x8.extract_lane_u i16x8.replace_lane i32x4.extract_lane
        i32x4.replace_lane i64x2.extract_lane i64x2.replace_lane f32x4.extract_lane
        f32x4.replace_lane f64x2.extract_lane f64x2.replace_lane
fd23  -         simd128: i8x16.eq i8x16.ne i8x16.lt_s i8x16.lt_u i8x16.gt_s i8x16.gt_u i8x16.le_s
        i8x16.le_u i8x16.ge_s i8x16.ge_u i16x8.eq i16x8.ne i16x8.lt_s i16x8.lt_u i16x8.gt_s
        i16x8.gt_u i16x8.le_s i16x8.le_u i16x8.ge_s i16x8.ge_u i32x4.eq i32x4.ne i32x4.lt_s
        i32x4.lt_u i32x4.gt_s i32x4.gt_u i32x4.le_s i32x4.le_u i32x4.ge_s i32x4.ge_u f32x4.eq
        f32x4.ne f32x4.lt f32x4.gt f32x4.le f32x4.ge f64x2.eq f64x2.ne f64x2.lt f64x2.gt f64x2.le
        f64x2.ge v128.not v128.and v128.andnot v128.or v128.xor v128.bitselect v128.any_true
fd54  lane      simd128: v128.load8_lane v128.load16_lane v128.load32_lane v128.load64_lane
        v128.store8_lane v128.store16_lane v128.store32_lane v128.store64_lane
fd5c  memory    simd128: v128.load32_zero v128.load64_zero
fd5e  -         simd128: f32x4.demote_f64x2_zero f64x2.promote_low_f32x4 i8x16.abs i8x16.neg
        i8x16.popcnt i8x16.all_true i8x16.bitmask i8x16.narrow_i16x8_s i8x16.narrow_i16x8_u
        f32x4.ceil f32x4.floor f32x4.trunc f32x4.nearest i8x16.shl i8x16.shr_s i8x16.shr_u
        i8x16.add i8x16.add_sat_s i8x16.add_sat_u i8x16.sub i8x16.sub_sat_s i8x16.sub_sat_u
        f64x2.ceil f64x2.floor i8x16.min_s i8x16.min_u i8x16.max_s i8x16.max_u f64x2.trunc
        i8x16.avgr_u i16x8.extadd_pairwise_i8x16_s i16x8.extadd_pairwise_i8x16_u
        i32x4.extadd_pairwise_i16x8_s i32x4.extadd_pairwise_i16x8_u i16x8.abs i16x8.neg
        i16x8.q15mulr_sat_s i16x8.all_true i16x8.bitmask i16x8.narrow_i32x4_s i16x8.narrow_i32x4_u
        i16x8.extend_low_i8x16_s i16x8.extend_high_i8x16_s i16x8.extend_low_i8x16_u
        i16x8.extend_high_i8x16_u i16x8.shl i16x8.shr_s i16x8.shr_u i16x8.add i16x8.add_sat_s
        i16x8.add_sat_u i16x8.sub i16x8.sub_sat_s i16x8.sub_sat_u f64x2.nearest i16x8.mul
        i16x8.min_s i16x8.min_u i16x8.max_s i16x8.max_u . i16x8.avgr_u i16x8.extmul_low_i8x16_s
        i16x8.extmul_high_i8x16_s i16x8.extmul_low_i8x16_u i16x8.extmul_high_i8x16_u i32x4.abs
        i32x4.neg . i32x4.all_true i32x4.bitmask . . i32x4.extend_low_i16x8_s
        i32x4.extend_high_i16x8_s i32x4.extend_low_i16x8_u i32x4.extend_high_i16x8_u i32x4.shl
        i32x4.shr_s i32x4.shr_u i32x4.add . . i32x4.sub . . . i32x4.mul i32x4.min_s i32x4.min_u
        i32x4.max_s i32x4.max_u i32x4.dot_i16x8_s . i32x4.extmul_low_i16x8_s
        i32x4.extmul_high_i16x8_s i32x4.extmul_low_i16x8_u i32x4.extmul_high_i16x8_u i64x2.abs
        i64x2.neg . i64x2.all_true i64x2.bitmask . . i64x2.extend_low_i32x4_s
        i64x2.extend_high_i32x4_s i64x2.extend_low_i32x4_u i64x2.extend_high_i32x4_u i64x2.shl
        i64x2.shr_s i64x2.shr_u i64x2.add . . i64x2.sub . . . i64x2.mul i64x2.eq i64x2.ne
        i64x2.lt_s i64x2.gt_s i64x2.le_s i64x2.ge_s i64x2.extmul_low_i32x4_s
        i64x2.extmul_high_i32x4_s i64x2.extmul_low_i32x4_u i64x2.extmul_high_i32x4_u f32x4.abs
        f32x4.neg . f32x4.sqrt f32x4.add f32x4.sub f32x4.mul f32x4.div f32x4.min f32x4.max
        f32x4.pmin f32x4.pmax f64x2.abs f64x2.neg . f64x2.sqrt f64x2.add f64x2.sub f64x2.mul
        f64x2.div f64x2.min f64x2.max f64x2.pmin f64x2.pmax i32x4.trunc_sat_f32x4_s
        i32x4.trunc_sat_f32x4_u f32x4.convert_i32x4_s f32x4.convert_i32x4_u
        i32x4.trunc_sat_f64x2_s_zero i32x4.trunc_sat_f64x2_u_zero f64x2.convert_low_i32x4_s
        f64x2.convert_low_i32x4_u
fd100 -         relaxed-simd: i8x16.relaxed_swizzle i32x4.relaxed_trunc_f32x4_s
        i32x4.relaxed_trunc_f32x4_u i32x4.relaxed_trunc_f64x2_s_zero
        i32x4.relaxed_trunc_f64x2_u_zero f32x4.relaxed_madd f32x4.relaxed_nmadd f64x2.relaxed_madd
        f64x2.relaxed_nmadd i8x16.relaxed_laneselect i16x8.relaxed_laneselect
        i32x4.relaxed_laneselect i64x2.relaxed_laneselect f32x4.relaxed_min f32x4.relaxed_max
        f64x2.relaxed_min f64x2.relaxed_max i16x8.relaxed_q15mulr_s i16x8.relaxed_dot_i8x16_i7x16_s
        i32x4.relaxed_dot_i8x16_i7x16_add_s
fe00  memory    threads: memory.atomic.notify memory.atomic.wait32 memory.atomic.wait64
fe03  1         threads: atomic.fence
fe10  memory    threads: i32.atomic.load i64.atomic.load i32.atomic.load8_u i32.atomic.load16_u
        i64.atomic.load8_u i64.atomic.load16_u i64.atomic.load32_u i32.atomic.store
        i64.atomic.store i32.atomic.store8 i32.atomic.store16 i64.atomic.store8 i64.atomic.store16
        i64.atomic.store32 i32.atomic.rmw.add i64.atomic.rmw.add i32.atomic.rmw8.add_u
        i32.atomic.rmw16.add_u i64.atomic.rmw8.add_u i64.atomic.rmw16.add_u i64.atomic.rmw32.add_u
        i32.atomic.rmw.sub i64.atomic.rmw.sub i32.atomic.rmw8.sub_u i32.atomic.rmw16.sub_u
        i64.atomic.rmw8.sub_u i64.atomic.rmw16.sub_u i64.atomic.rmw32.sub_u i32.atomic.rmw.and
        i64.atomic.rmw.and i32.atomic.rmw8.and_u i32.atomic.rmw16.and_u i64.atomic.rmw8.and_u
        i64.atomic.rmw16.and_u i64.atomic.rmw32.and_u i32.atomic.rmw.or i64.atomic.rmw.or
        i32.atomic.rmw8.or_u i32.atomic.rmw16.or_u i64.atomic.rmw8.or_u i64.atomic.rmw16.or_u
        i64.atomic.rmw32.or_u i32.atomic.rmw.xor i64.atomic.rmw.xor i32.atomic.rmw8.xor_u
        i32.atomic.rmw16.xor_u i64.atomic.rmw8.xor_u i64.atomic.rmw16.xor_u i64.atomic.rmw32.xor_u
        i32.atomic.rmw.xchg i64.atomic.rmw.xchg i32.atomic.rmw8.xchg_u i32.atomic.rmw16.xchg_u
        i64.atomic.rmw8.xchg_u i64.atomic.rmw16.xchg_u i64.atomic.rmw32.xchg_u
        i32.atomic.rmw.cmpxchg i64.atomic.rmw.cmpxchg i32.atomic.rmw8.cmpxchg_u
        i32.atomic.rmw16.cmpxchg_u i64.atomic.rmw8.cmpxchg_u i64.atomic.rmw16.cmpxchg_u
        i64.atomic.rmw32.cmpxchg_u
"""


class Instruction(NamedTuple):
    """What an opcode means.

    Attributes
    ----------
    name : str
        Its mnemonic in the text format. A few opcodes share one, such as both forms of ``select``.
    feature : str
        What of WebAssembly it belongs to; ``"mvp"`` is the first version.
    layout : str
        What follows the opcode.
    """

    name: str
    feature: str
    layout: str


def _read_table() -> dict[int, Instruction]:
    instructions = {}
    for row in _TABLE.strip().replace("\n        ", " ").splitlines():
        facts, _, names = row.partition(": ")
        first, layout, feature = facts.split()
        code = int(first, 16) if len(first) == 2 else int(first[:2], 16) << 16 | int(first[2:], 16)
        for opcode, name in enumerate(names.split(), code):
            if name != ".":
                instructions[opcode] = Instruction(name, feature, layout)
    return instructions


INSTRUCTIONS = _read_table()
"""Opcode → instruction. One with a prefix has the prefix from bit 16 on, such as ``0xFD_000C``."""

_SIMD, _RELAXED = 0xFD, range(0xFD_0100, 0xFD_0200)
_END = 0x0B
_LAYOUTS = ["unknown"] * 256
_PREFIXED = {}
for _code, _instruction in INSTRUCTIONS.items():
    if _code > 0xFF:
        _LAYOUTS[_code >> 16] = "prefix"
        _PREFIXED[_code] = _instruction.layout
    else:
        _LAYOUTS[_code] = _instruction.layout


@dataclass(slots=True)
class Code:
    """What a piece of code consists of.

    Attributes
    ----------
    opcodes : bytearray
        The first byte of each instruction, in order.
    prefixed : dict of int to int
        Opcode with a prefix → how often it occurs.
    calls : array of unsigned int
        The functions that it calls directly, by index, in order.
    block_types : set of int
        The types that its blocks name by index.
    """

    opcodes: bytearray = field(default_factory=bytearray)
    prefixed: dict[int, int] = field(default_factory=dict)
    calls: array[int] = field(default_factory=lambda: array("I"))
    block_types: set[int] = field(default_factory=set)

    @property
    def simd(self) -> int:
        """Number of instructions of SIMD, those of relaxed SIMD included."""
        return self.opcodes.count(_SIMD)

    @property
    def relaxed_simd(self) -> int:
        return sum(count for opcode, count in self.prefixed.items() if opcode in _RELAXED)


def walk(data: bytes, at: int, end: int, *, constant: bool = False) -> tuple[Code, int]:
    """Go through instructions.

    Parameters
    ----------
    data : bytes
        A module.
    at, end : int
        Where the instructions are.
    constant : bool
        Stop behind the first ``end``, as a constant expression does. Otherwise one must be last.

    Returns
    -------
    Code
        What was found.
    int
        Where it stopped.

    Raises
    ------
    Unreadable
        At an unknown opcode, or if the instructions don't end where they should.
    """
    code = Code()
    layouts, note, prefixed, calls = _LAYOUTS, code.opcodes.append, code.prefixed, code.calls
    opcode = -1
    try:
        while at < end:
            opcode = data[at]
            at += 1
            note(opcode)
            layout = layouts[opcode]
            # The frequent cases come first, in their usual short form; `_skip` knows them all.
            if layout == "leb" and data[at] < 0x80:
                at += 1
            elif layout == "-":
                continue
            elif layout == "memory" and data[at] < 0x40 and data[at + 1] < 0x80:
                at += 2
            elif layout == "end":
                if constant:
                    return code, at
            elif layout == "call":
                function, at = number(data, at)
                if function < MAX_ENTRIES:
                    calls.append(function)
            elif layout == "prefix":
                sub, behind = number(data, at)
                opcode = opcode << 16 | min(sub, 0xFFFF)
                if opcode not in _PREFIXED:
                    raise Unreadable(f"unknown opcode {opcode >> 16:#04x} {sub:#04x}", at - 1)
                prefixed[opcode] = prefixed.get(opcode, 0) + 1
                at = _skip(data, behind, end, _PREFIXED[opcode], code)
            elif layout == "unknown":
                raise Unreadable(f"unknown opcode {opcode:#04x}", at - 1)
            else:
                at = _skip(data, at, end, layout, code)
    except IndexError:
        at = -1
    if at != end or opcode != _END:
        raise Unreadable("the code is cut off before its end", end)
    return code, at


def _skip(data: bytes, at: int, end: int, layout: str, code: Code) -> int:
    """Return where that ends what follows an opcode."""
    if layout.isdecimal():  # so many bytes
        return at + int(layout)
    if layout in ("memory", "lane"):
        flags, at = number(data, at)
        if flags & 0x40:  # not of memory 0
            at = number(data, at)[1]
        at = number(data, at, 10)[1]
        return at + 1 if layout == "lane" else at
    if layout == "long":
        return number(data, at, 10)[1]
    if layout in ("block", "try_table"):
        at = _skip_block_type(data, at, code)
        if layout == "block":
            return at
        count, at = _count(data, at, end)
        for _ in range(count):
            with_tag = data[at] < 2
            at = number(data, at + 1)[1]
            if with_tag:
                at = number(data, at)[1]
        return at
    if layout == "select":
        count, at = _count(data, at, end)
        for _ in range(count):
            at = _skip_block_type(data, at, code)
        return at
    if layout == "br_table":
        count, at = _count(data, at, end)
        count += 1
    else:
        at += layout == "cast"  # flags
        count = {"-": 0, "leb": 1, "leb+leb": 2, "cast": 3}[layout]
    for _ in range(count):
        at = number(data, at)[1]
    return at


def _count(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read how many entries follow; each takes a byte or more."""
    count, behind = number(data, at)
    if count > end - behind:
        raise Unreadable(f"{count:,} entries where {max(end - behind, 0):,} bytes are left", at)
    return count, behind


def _skip_block_type(data: bytes, at: int, code: Code) -> int:
    """Skip a value type, the empty type, or the index of a type."""
    if data[at] in (0x63, 0x64):  # a reference in its long form
        return number(data, at + 1)[1]
    index, behind = number(data, at)
    if data[at] < 0x40 or (data[at] >= 0x80 and index < MAX_ENTRIES):
        code.block_types.add(index)
    return behind
