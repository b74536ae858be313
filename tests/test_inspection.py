"""What a .wasm file is. Expected values come from its text, from wasmtime and from rustc."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wasmtime
from forward import forwarder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cli import edgelab
from test_runtime import FUZZ, SEED_MODULES, mutants

from edgelab import aot
from edgelab.build import guest_path
from edgelab.errors import EdgelabError, GuestError
from edgelab.imports import WASI, explain_imports
from edgelab.inspection import _OFF, Inspection, inspect
from edgelab.opcodes import INSTRUCTIONS
from edgelab.runtime import Guest
from edgelab.snippet import compile_rust
from edgelab.toolchain import Toolchain
from edgelab.wasinn import Era, WasiNN

EMPTY = b"\0asm\1\0\0\0"


def assemble(text: str) -> bytes:
    """Without validation: much of what is inspected here could not run."""
    return bytes(wasmtime.wat2wasm(text))


def leb(value: int) -> bytes:
    done = b""
    while value > 0x7F:
        done += bytes([value & 0x7F | 0x80])
        value >>= 7
    return done + bytes([value])


def section(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + leb(len(body)) + body


def module(*bodies: bytes) -> bytes:
    """A module with functions of these bodies, each ``() -> ()`` and without local variables."""
    code = leb(len(bodies)) + b"".join(leb(len(body) + 1) + b"\0" + body for body in bodies)
    types = section(1, b"\1\x60\0\0")
    functions = section(3, leb(len(bodies)) + bytes(len(bodies)))
    return EMPTY + types + functions + section(10, code)


def ids(found: Inspection) -> list[str]:
    return [problem.id for problem in found.problems]


# --- instructions ---------------------------------------------------------------------------------


def named(kind: str, names: str) -> Iterator[str]:
    return (f"{kind}.{name}" for name in names.split())


def every_instruction() -> Iterator[str]:
    """All instructions as text, arranged by what they do; one with a block has several lines."""
    # numbers
    for kind in ("i32", "i64"):
        yield from named(kind, "eqz eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u")
        yield from named(kind, "clz ctz popcnt add sub mul div_s div_u rem_s rem_u and or xor shl")
        yield from named(kind, "shr_s shr_u rotl rotr extend8_s extend16_s")
        yield f"{kind}.const 7"
        yield from named(kind, "load load8_s load8_u load16_s load16_u store store8 store16")
        for size in ("f32", "f64"):
            for sign in ("s", "u"):
                yield from named(kind, f"trunc_{size}_{sign} trunc_sat_{size}_{sign}")
                yield f"{size}.convert_{kind}_{sign}"
    for kind in ("f32", "f64"):
        yield from named(
            kind, "eq ne lt gt le ge abs neg ceil floor trunc nearest sqrt add sub mul"
        )
        yield from named(kind, "div min max copysign load store")
        yield f"{kind}.const 1.5"
    yield from named("i32", "wrap_i64 reinterpret_f32")
    yield from named("i64", "extend32_s load32_s load32_u store32 extend_i32_s extend_i32_u")
    yield from named("i64", "reinterpret_f64 add128 sub128 mul_wide_s mul_wide_u")
    yield from ("f32.reinterpret_i32", "f64.reinterpret_i64", "f32.demote_f64", "f64.promote_f32")
    # control
    yield from ("unreachable", "nop", "return", "drop", "select", "select (result i32)")
    yield from ("block\nend", "loop\nend", "if\nelse\nend", "br 0", "br_if 0", "br_table 0 0 0")
    yield from ("call 0", "call_indirect (type 0)", "call_ref 0")
    yield from ("return_call 0", "return_call_indirect (type 0)", "return_call_ref 0")
    yield from ("br_on_null 0", "br_on_non_null 0")
    yield from ("throw 0", "throw_ref", "rethrow 0", "try\ncatch 0\ncatch_all\nend")
    yield "block\ntry\ndelegate 0\nend"
    yield "try_table (catch 0 0) (catch_ref 0 0) (catch_all 0) (catch_all_ref 0)\nend"
    # variables, memories, tables
    yield from ("local.get 0", "local.set 0", "local.tee 0", "global.get 0", "global.set 0")
    yield from named("memory", "size grow copy fill")
    yield from ("memory.init 0", "data.drop 0", "table.init 0", "elem.drop 0", "table.copy")
    yield from ("table.get 0", "table.set 0", "table.grow 0", "table.size 0", "table.fill 0")
    yield from ("ref.null func", "ref.is_null", "ref.func 0", "ref.eq", "ref.as_non_null")
    # garbage collection
    yield from ("struct.new 0", "struct.new_default 0", "array.new 0", "array.new_default 0")
    yield from ("struct.get 0 0", "struct.get_s 0 0", "struct.get_u 0 0", "struct.set 0 0")
    yield from ("array.get 0", "array.get_s 0", "array.get_u 0", "array.set 0", "array.fill 0")
    yield from ("array.new_fixed 0 0", "array.new_data 0 0", "array.new_elem 0 0", "array.len")
    yield from ("array.copy 0 0", "array.init_data 0 0", "array.init_elem 0 0")
    for reference in ("(ref eq)", "(ref null eq)"):
        yield from (f"ref.test {reference}", f"ref.cast {reference}")
    yield from ("br_on_cast 0 anyref eqref", "br_on_cast_fail 0 anyref eqref", "ref.i31")
    yield from ("i31.get_s", "i31.get_u", "any.convert_extern", "extern.convert_any")
    # threads
    yield from named("memory.atomic", "notify wait32 wait64")
    yield "atomic.fence"
    for kind in ("i32", "i64", "i32 8", "i32 16", "i64 8", "i64 16", "i64 32"):
        kind, _, size = kind.partition(" ")
        sign = "_u" if size else ""
        yield from (f"{kind}.atomic.load{size}{sign}", f"{kind}.atomic.store{size}")
        for name in named(f"{kind}.atomic.rmw{size}", "add sub and or xor xchg cmpxchg"):
            yield name + sign
    # SIMD
    yield from named("v128", "load store not and andnot or xor bitselect any_true")
    yield from named("v128", "load32_zero load64_zero load8x8_s load8x8_u load16x4_s load16x4_u")
    yield from named("v128", "load32x2_s load32x2_u")
    for size in ("8", "16", "32", "64"):
        yield from (f"v128.load{size}_splat", f"v128.load{size}_lane 0", f"v128.store{size}_lane 0")
    yield from ("v128.const i64x2 1 2", f"i8x16.shuffle {' '.join(map(str, range(16)))}")
    for shape in ("i8x16", "i16x8", "i32x4", "i64x2"):
        yield from named(shape, "splat abs neg all_true bitmask shl shr_s shr_u add sub eq ne lt_s")
        yield from named(shape, "gt_s le_s ge_s relaxed_laneselect")
        yield f"{shape}.replace_lane 0"
        if shape != "i64x2":
            yield from named(shape, "lt_u gt_u le_u ge_u min_s min_u max_s max_u")
        if shape != "i8x16":
            yield f"{shape}.mul"
        if shape in ("i8x16", "i16x8"):
            yield from named(shape, "add_sat_s add_sat_u sub_sat_s sub_sat_u avgr_u")
            yield from (f"{shape}.extract_lane_s 0", f"{shape}.extract_lane_u 0")
        else:
            yield f"{shape}.extract_lane 0"
    for wide, narrow in (("i16x8", "i8x16"), ("i32x4", "i16x8"), ("i64x2", "i32x4")):
        for sign in ("s", "u"):
            for half in ("low", "high"):
                yield f"{wide}.extend_{half}_{narrow}_{sign}"
                yield f"{wide}.extmul_{half}_{narrow}_{sign}"
            if wide != "i64x2":
                yield f"{wide}.extadd_pairwise_{narrow}_{sign}"
                yield f"{narrow}.narrow_{wide}_{sign}"
    for shape in ("f32x4", "f64x2"):
        yield from named(shape, "splat eq ne lt gt le ge abs neg sqrt add sub mul div min max pmin")
        yield from named(shape, "pmax ceil floor trunc nearest relaxed_madd relaxed_nmadd")
        yield from named(shape, "relaxed_min relaxed_max")
        yield from (f"{shape}.extract_lane 0", f"{shape}.replace_lane 0")
    for sign in ("s", "u"):
        yield from named("i32x4", f"trunc_sat_f32x4_{sign} trunc_sat_f64x2_{sign}_zero")
        yield from named("i32x4", f"relaxed_trunc_f32x4_{sign} relaxed_trunc_f64x2_{sign}_zero")
        yield from (f"f32x4.convert_i32x4_{sign}", f"f64x2.convert_low_i32x4_{sign}")
    yield from ("f32x4.demote_f64x2_zero", "f64x2.promote_low_f32x4")
    yield from named("i8x16", "swizzle popcnt relaxed_swizzle")
    yield from named("i16x8", "q15mulr_sat_s relaxed_q15mulr_s relaxed_dot_i8x16_i7x16_s")
    yield from named("i32x4", "dot_i16x8_s relaxed_dot_i8x16_i7x16_add_s")


def counted(text: str) -> Counter[str]:
    """Mnemonics in the text of a function, and the ``end`` that it gets."""
    return Counter([*(line.split()[0] for line in text.splitlines()), "end"])


@pytest.fixture(scope="module")
def instructions() -> list[str]:
    return list(every_instruction())


def test_every_instruction_is_read_for_what_it_is(instructions: list[str]) -> None:
    for text in instructions:
        found = inspect(assemble(f"(module (func {text}))"))
        (function,) = found.functions
        assert function.unreadable == "", text
        assert found.opcodes == counted(text), text
        assert function.instructions == found.instructions == sum(counted(text).values())
    known = {line.split()[0] for text in instructions for line in text.splitlines()}
    assert known == {instruction.name for instruction in INSTRUCTIONS.values()}


def test_simd_is_counted_and_relaxed_simd_apart(instructions: list[str]) -> None:
    shape = re.compile(r"(v128|[if]\d+x\d+)\.")
    vectors = [text for text in instructions if shape.match(text)]
    relaxed = [text for text in vectors if ".relaxed_" in text]
    assert (len(vectors), len(relaxed)) == (256, 20)  # as many as the specification lists
    found = inspect(assemble(f"(module (func {' '.join(instructions)}))"))
    assert (found.simd, found.relaxed_simd) == (256, 20)
    (function,) = found.functions
    assert (function.simd, function.relaxed_simd) == (256, 20)
    assert {"simd128", "relaxed-simd"} <= set(found.features)


LONG = """
  local.get 128
  local.set 4294967295
  i32.const -2147483648
  i32.const 2147483647
  i64.const -9223372036854775808
  i64.const 9223372036854775807
  f32.const nan
  f64.const -inf
  i32.load offset=4294967295 align=1
  i64.store 3 offset=0xffffffffffffffff align=8
  i64.store 200 offset=5
  v128.load 1 offset=1000 align=1
  v128.load64_lane 1 offset=1000 align=1 1
  v128.const i8x16 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11
  i8x16.shuffle 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11
  i32.atomic.rmw.cmpxchg 2 offset=300
  memory.copy 300 11
  memory.size 300
  call 300
  call_indirect 300 (type 0)
  table.copy 300 11
  select (result (ref null 300))
  select (result i32 i64)
  ref.null 300
  ref.test (ref null 300)
  br_on_cast 300 (ref null 300) (ref 300)
  block (result (ref null 300))
  loop (type 300)
  if (result externref)
  try_table (result (ref 300)) (catch 300 300) (catch_ref 300 0) (catch_all 300) (catch_all_ref 300)
  try (param i32)
  delegate 300
  end
  end
  end
  end
  array.new_fixed 300 300
  struct.get 300 300
  i64.const 11
"""


def test_what_follows_an_opcode_has_its_length() -> None:
    """An ``end`` is 11; whoever loses the place, finds too many."""
    branches = " ".join(["11"] * 1000)
    text = f"{LONG.strip()}\nbr_table {branches}\nnop"
    wide = "(memory 1) (memory 1) (memory 1) (memory i64 1) (type (func (param i32)))"
    found = inspect(assemble(f"(module {wide} (func {text}))"))
    assert found.functions[0].unreadable == ""
    assert found.opcodes == counted(text)


def test_an_opcode_in_a_longer_form_is_the_same() -> None:
    found = inspect(module(b"\xfd\x8e\x80\0\xfc\x80\0\x0b"))
    assert found.opcodes == {"i8x16.swizzle": 1, "i32.trunc_sat_f32_s": 1, "end": 1}


def test_wasmtime_knows_no_opcode_that_is_unknown_here() -> None:
    everything = wasmtime.Engine()
    codes = [(code, bytes([code])) for code in range(256) if not 0xFB <= code <= 0xFE]
    for prefix in range(0xFB, 0xFF):
        codes += [(prefix << 16 | code, bytes([prefix]) + leb(code)) for code in range(0x240)]
    unknown = 0
    for code, data in codes:
        with pytest.raises(wasmtime.WasmtimeError) as caught:
            wasmtime.Module.validate(everything, module(data + bytes(24)))
        message = str(caught.value)
        if code in INSTRUCTIONS:
            assert not re.search("illegal|subopcode", message), (hex(code), message)
        else:
            unknown += 1
            off = "illegal opcode|unknown 0xf. subopcode|not enabled|feature required|proposal"
            assert re.search(off, message), (hex(code), message)
    assert unknown > 1000


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\x0b", r"unknown opcode 0xff \(at offset 0x1e\)"),  # 30 bytes come before
        (b"\xfd\x9a\x01\x0b", "unknown opcode 0xfd 0x9a"),
        (b"\xfd\xff\xff\xff\x7f\x0b", "unknown opcode 0xfd 0xfffffff"),
        (b"\x20\xff\xff\xff\xff\xff\xff\xff\x0b", "an integer is too long"),
        (b"\x0e\xff\xff\xff\xff\x0f\0\x0b", "4,294,967,295 entries"),
        (b"\x1c\xff\xff\xff\xff\x0f\x7f\x0b", "4,294,967,295 entries"),
        (b"\x1f\x40\xff\xff\xff\xff\x0f\x02\0\x0b", "4,294,967,295 entries"),
        (b"\x01", "cut off before its end"),
        (b"", "cut off before its end"),
        (b"\x43\0\0\0\x0b", "cut off before its end"),
        (b"\x20", "cut off before its end"),
    ],
)
def test_a_function_that_cannot_be_read_loses_no_other(body: bytes, reason: str) -> None:
    found = inspect(module(b"\x01\x01\x0b", body, b"\x01\x0b"))
    assert [f.instructions for f in found.functions] == [3, 0, 2]
    assert re.search(reason, found.functions[1].unreadable)
    assert found.opcodes == {"nop": 3, "end": 2}
    assert not found.runs_here
    assert "1 functions can't be read" in str(found)


def test_local_variables_are_not_taken_for_code() -> None:
    found = inspect(assemble("(module (func (local i32 i64 f32 v128 funcref (ref null 0)) nop))"))
    assert found.opcodes == {"nop": 1, "end": 1}
    many = bytes.fromhex("01ffffffff0f7f0b")  # 4,294,967,295 of them
    code = section(10, b"\1" + leb(len(many)) + many)
    found = inspect(EMPTY + section(1, b"\1\x60\0\0") + section(3, b"\1\0") + code)
    assert found.functions[0].instructions == 1


# --- real guests ----------------------------------------------------------------------------------


def test_a_real_guest() -> None:
    path = guest_path("classify_nn").path
    wasm = path.read_bytes()
    found = inspect(path)
    assert replace(found, read_ms=0) == replace(inspect(str(path)), read_ms=0)
    assert (found.kind, found.size_bytes, found.runs_here) == ("module", len(wasm), True)
    assert found.target == "wasm32-wasip1 reactor"
    assert found.producers["language"] == ["Rust"]
    assert found.wasi_nn is not None
    assert found.wasi_nn.startswith(Era.CRATE_0_6.value)
    assert sum(found.sections.values()) + 8 == len(wasm)
    assert {"code", "data", "import", "export"} <= set(found.sections)
    guest = Guest(wasm, host=[WasiNN()])
    assert [(i.module, i.name, i.type) for i in found.imports] == list(guest.imports)
    exports = [(e.name, e.type.split()[0] if "memory" in e.type else e.type) for e in found.exports]
    assert exports == list(guest.exports)
    (memory,) = found.memories
    assert len(guest.instantiate().memory) == memory.minimum * 65536
    assert found.data_bytes > 1000
    assert (found.missing, found.problems) == ((), ())
    assert {"simd128", "relaxed-simd"} <= set(found.features)
    assert found.simd > found.relaxed_simd > 0
    assert not any(f.unreadable for f in found.functions)
    assert sum(f.instructions for f in found.functions) == found.instructions


def test_a_command_is_told_from_a_reactor() -> None:
    found = inspect(guest_path("cli").path)
    assert found.target == "wasm32-wasip1 command"
    assert found.wasi_nn is None
    assert found.simd > 0 == found.relaxed_simd


RUST = """
use std::arch::wasm32::*;
#[unsafe(no_mangle)] pub extern "C" fn scalar(a: u32, b: u32) -> u32 { a.wrapping_mul(b) }
#[unsafe(no_mangle)] #[target_feature(enable = "simd128")]
pub extern "C" fn vector(a: i32) -> i32 { helper(a); i32x4_extract_lane::<1>(i32x4_splat(a)) }
#[inline(never)] #[target_feature(enable = "simd128")]
fn helper(a: i32) { std::hint::black_box(i32x4_add(i32x4_splat(a), i32x4_splat(a))); }
#[unsafe(no_mangle)] pub extern "C" fn hello() { println!("hello"); }
"""


def test_what_rustc_made(rust: Toolchain) -> None:
    profile = {"opt-level": 1, "strip": "none", "panic": "abort", "debug": True}
    found = inspect(compile_rust(RUST, profile=profile))
    assert found.runs_here
    assert found.target == "wasm32-wasip1 library"
    assert "Rust" in found.producers["language"]
    assert any(name.startswith("rustc 1.") for name in found.producers["processed-by"])
    assert found.sections[".debug_info"] > 1000
    assert re.search(r"debug info +\d\d% of the file; strip = true", str(found))
    # The linker may wrap an export; then the function itself is what the wrapper reaches.
    assert all(each.simd == 0 for each in found.reached("scalar"))
    reached = found.reached("vector")
    (helper,) = (each for each in found.functions if each.name.endswith("::helper"))
    assert helper in reached
    assert sum(each.simd for each in reached) >= helper.simd >= 2
    assert helper.exports == ()


def test_stripped_rust_is_recognised_by_its_messages() -> None:
    commit = f'(data (i32.const 0) "/rustc/{"0123456789" * 4}/library/core")'
    found = inspect(assemble(f"(module (memory 1) {commit})"))
    assert found.producers["processed-by"] == ["rustc of commit 012345678"]
    assert "perhaps wasm32-unknown-unknown" in found.target


# --- who calls whom -------------------------------------------------------------------------------


KERNELS = """(module
  (import "env" "log" (func $log))
  (type $f (func (param v128) (result v128)))
  (table 1 funcref) (elem (i32.const 0) $far)
  (func $scalar (export "scalar") (export "again") call $log)
  (func $near (export "vector") (param v128) (result v128) call $scalar call $shared
    local.get 0 local.get 0 f32x4.add)
  (func $shared call $shared call $deep)
  (func $deep v128.const i64x2 1 2 v128.const i64x2 1 2 v128.const i64x2 1 2
    f32x4.relaxed_madd drop)
  (func $far (param v128) (result v128) local.get 0 f32x4.abs)
  (func (export "tail") return_call $deep)
  (func (export "indirect") (param v128) (result v128)
    local.get 0 i32.const 0 call_indirect (type $f))
  (export "log" (func $log))
)"""


def test_simd_by_export_and_in_reach() -> None:
    found = inspect(assemble(KERNELS))
    assert found.simd_by_export() == {
        "scalar": 0, "again": 0, "vector": 1, "tail": 0, "indirect": 0,
    }  # fmt: skip
    assert {e.name: e.type for e in found.exports}["vector"] == "(v128) -> (v128)"
    names = {export: [f.name for f in found.reached(export)] for export in found.simd_by_export()}
    assert names["scalar"] == ["scalar"]
    assert names["vector"][0] == "near"
    assert set(names["vector"]) == {"near", "scalar", "shared", "deep"}
    assert names["tail"] == ["", "deep"]
    assert names["indirect"] == [""]
    assert found.function("again").exports == ("scalar", "again")
    deep = found.reached("tail")[1]
    assert (deep.index, deep.simd, deep.relaxed_simd) == (4, 4, 1)
    text = str(found)
    assert re.search(r"\n  vector +\(v128\) -> \(v128\) +1 +5\n", text)
    assert re.search(r"\n  #4 +deep +\d+ +6 +4 +1\n", text)
    for wrong in ("log", "nothing"):
        with pytest.raises(GuestError, match=r"E5: it exports no function .*scalar, again, vector"):
            found.reached(wrong)


def test_rusts_names_are_readable() -> None:
    mangled = "_ZN60_$LT$a..Error$u20$as$u20$core..fmt..Display$GT$3fmt17h0123456789abcdefE"
    names = {
        mangled: "<a::Error as core::fmt::Display>",  # the length 60 takes all of it
        "_ZN7imgproc4simd7simd12817h424619a5ba77d9bfE": "imgproc::simd::simd128",
        "_ZN3abc17hnot_hexnot_hexnoE": "_ZN3abc17hnot_hexnot_hexnoE",
        "memcpy": "memcpy",
        "_RNvC1a1b": "_RNvC1a1b",
    }
    for name, readable in names.items():
        found = inspect(assemble(f'(module (func $"{name}"))'))
        assert found.functions[0].name.startswith(readable)


# --- what a module is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("(func (result i32 i32) unreachable)", "multi-value"),
        ("(type (func (param i32))) (func i32.const 0 block (type 0) drop end)", "multi-value"),
        ("(func (param externref))", "reference-types"),
        ("(table 1 funcref) (table 1 funcref)", "reference-types"),
        ("(func (param v128))", "simd128"),
        ('(memory 1) (data "a") (func data.drop 0)', "bulk-memory"),
        ("(func i32.const 0 i32.extend8_s drop)", "sign-ext"),
        ("(func f32.const 0 i32.trunc_sat_f32_s drop)", "nontrapping-fptoint"),
        ("(func $f return_call $f)", "tail-call"),
        ('(global (export "g") (mut i32) (i32.const 0))', "mutable-globals"),
        ('(import "a" "g" (global (mut i32)))', "mutable-globals"),
    ],
)
def test_features_that_run_here(text: str, feature: str) -> None:
    found = inspect(assemble(f"(module {text})"))
    assert found.features == (feature,)
    assert "E2" not in ids(found)
    if feature == "multi-value":
        plain = inspect(assemble("(module (func (result i32) block (result i32) i32.const 0 end))"))
        assert plain.features == ()


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("(memory 1 2 shared)", "threads"),
        ("(memory 1 2 shared) (func i32.const 0 i32.atomic.load drop)", "threads"),
        ("(memory i64 1)", "memory64"),
        ("(table i64 1 funcref)", "memory64"),
        ("(memory 1) (memory 1)", "multi-memory"),
        ("(type (struct (field (mut i8) i64)))", "gc"),
        ("(rec (type (sub (func))) (type (array (mut (ref null 0)))))", "gc"),
        ("(tag)", "exceptions"),
        ("(func (param (ref func)))", "function-references"),
        ("(func try catch_all end)", "legacy-exceptions"),
        (
            "(func i64.const 0 i64.const 0 i64.const 0 i64.const 0 i64.add128 drop drop)",
            "wide-arithmetic",
        ),
    ],
)
def test_features_that_are_switched_off_here(text: str, feature: str) -> None:
    found = inspect(assemble(f"(module {text})"))
    assert feature in found.features
    assert not found.runs_here
    (problem,) = found.problems
    assert problem.id == "E2"
    assert f"uses {feature}" in problem.what
    with pytest.raises(GuestError, match="E2"):
        Guest(assemble(f"(module {text})"), cache=False)


def test_what_is_off_is_what_the_engine_has_off() -> None:
    off = {name for name, on in aot._SETTINGS.items() if name.startswith("wasm_") and not on}
    assert {f"wasm_{name.replace('-', '_')}" for name in _OFF - {"legacy-exceptions"}} == off


def test_declarations_of_every_kind() -> None:
    text = """(module
      (import "a" "t" (table 1 2 externref)) (import "a" "m" (memory 1 2))
      (import "b" "g" (global (mut f64))) (import "b" "f" (func (param i32) (result i64)))
      (import "c" "e" (tag (param i32)))
      (table $t 3 funcref (ref.null func)) (memory $m i64 4 5 (pagesize 1))
      (global $g v128 (v128.const i64x2 1 2)) (func $f (param (ref null 0) (ref func) anyref))
      (tag $e (param f32))
      (data (i32.const 0) "12345") (data (memory 1) (i64.const 0) "678") (data "9")
      (export "t" (table $t)) (export "m" (memory $m)) (export "g" (global $g))
      (export "f" (func $f)) (export "e" (tag $e)) (export "tt" (table 0)))"""
    found = inspect(assemble(text))
    assert [(i.module, i.name, i.type) for i in found.imports] == [
        ("a", "t", "table 1 2 externref"),
        ("a", "m", "memory 1 2"),
        ("b", "g", "global mut f64"),
        ("b", "f", "(i32) -> (i64)"),
        ("c", "e", "tag (i32) -> ()"),
    ]
    assert {e.name: e.type for e in found.exports} == {
        "t": "table 3 funcref",
        "m": "memory i64 4 5 (pagesize 1)",
        "g": "global v128",
        "f": "((ref null 0), (ref func), anyref) -> ()",
        "e": "tag (f32) -> ()",
        "tt": "table 1 2 externref",
    }
    assert found.data_bytes == 9
    assert found.tables == ("table 1 2 externref", "table 3 funcref")


def test_large_numbers_in_declarations() -> None:
    types = "(type (func))" * 200
    text = f"""(module {types} (import "a" "f" (func (param (ref null 100) (ref 199))))
      (memory (export "m") i64 1 281474976710656))"""
    found = inspect(
        assemble(f'(module {"(memory 1)" * 201} (data (memory 200) (i32.const 0) "12"))')
    )
    assert (found.data_bytes, ids(found)) == (2, ["E2"])
    assert "uses multi-memory" in found.problems[0].what
    found = inspect(assemble(text))
    assert found.imports[0].type == "((ref null 100), (ref 199)) -> ()"
    assert found.exports[0].type == "memory i64 1 281474976710656"


def test_custom_sections_go_by_their_names() -> None:
    text = '(@custom "code" "12345") (@custom "x" "1") (@custom "x" "2") (func)'
    found = inspect(assemble(f"(module {text})"))
    assert found.sections["custom: code"] == 2 + 5 + 5
    assert found.sections["x"] == 2 * (2 + 2 + 1)
    assert found.sections["code"] == 2 + 1 + 3


def test_imports_in_their_compact_form() -> None:
    """wasmtime takes it; its assembler does not write it."""
    signature = b"\1\x60\1\x7f\0"
    one = b"\1a\0\x7f\2" + b"\1f\0\0" + b"\1m\2\0\1"  # of a: f a function, m a memory
    two = b"\1b\0\x7e\0\0\2" + b"\1g" + b"\1h"  # of b: g and h, functions
    wasm = EMPTY + section(1, signature) + section(2, b"\2" + one + two)
    wasmtime.Module.validate(wasmtime.Engine(), wasm)
    assert [(i.module, i.name, i.type) for i in inspect(wasm).imports] == [
        ("a", "f", "(i32) -> ()"),
        ("a", "m", "memory 1"),
        ("b", "g", "(i32) -> ()"),
        ("b", "h", "(i32) -> ()"),
    ]


NN = '(import "wasi_ephemeral_nn" "compute" (func (param i32) (result i32)))'
P1 = '(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))'


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (f'{P1} (func (export "_start"))', "wasm32-wasip1 command"),
        (f'{P1} (func (export "_initialize"))', "wasm32-wasip1 reactor"),
        (P1, "wasm32-wasip1 library"),
        (f"{NN} {P1}", "wasm32-wasip1 library"),
        (f'{P1} (func (export "wasi_thread_start") (param i32 i32))', "wasm32-wasip1-threads"),
        ('(import "wasi" "thread-spawn" (func))', "wasm32-wasip1-threads"),
        ('(import "wasi_unstable" "fd_write" (func))', "WASI preview 0 (wasi_unstable)"),
        ('(import "wasi:cli/run@0.2.0" "run" (func))', "part of a wasm32-wasip2 component"),
        ('(import "wbg" "__wbg_log_1" (func))', "wasm-bindgen (browser)"),
        ('(import "./app_bg.js" "f" (func))', "wasm-bindgen (browser)"),
        ('(import "env" "emscripten_resize_heap" (func))', "Emscripten"),
        (f'{P1} (func (export "emscripten_stack_get_current"))', "Emscripten"),
        ('(import "gojs" "runtime.wasmExit" (func (param i32)))', "Go js"),
        ('(import "gojs" "runtime.ticks" (func (result f64)))', "TinyGo js"),
        ('(import "env" "abort" (func (param i32 i32 i32 i32)))', "AssemblyScript"),
        ('(func $f) (export "__new" (func $f)) (export "__pin" (func $f)) '
         '(export "__unpin" (func $f))', "AssemblyScript"),
        ('(import "wasix_32v1" "fd_dup" (func))', "another runtime's WASI"),
        ('(import "wasi_snapshot_preview1" "sock_open" (func))', "another runtime's WASI"),
        ('(global (export "__heap_base") i32 (i32.const 0)) '
         '(global (export "__data_end") i32 (i32.const 0))', "wasm32-unknown-unknown"),
        ('(import "env" "abort" (func))', "unknown: no import or export tells"),
        ('(@custom "linking" "")', "nothing yet: an object file, which is to be linked"),
        ('(@custom "dylink.0" "")', "dynamic linking: a shared library"),
        ("", "unknown: no import or export tells"),
    ],
)  # fmt: skip
def test_the_target(text: str, target: str) -> None:
    assert inspect(assemble(f"(module {text})")).target == target


def test_wasm32_unknown_unknown_runs_but_is_told() -> None:
    text = '(global (export "__heap_base") i32 (i32.const 0)) (func (export "f"))'
    found = inspect(assemble(f'(module {text} (global (export "__data_end") i32 (i32.const 0)))'))
    assert found.runs_here
    (problem,) = found.problems
    assert problem.id == "P1, E1"
    assert "rustup target add wasm32-wasip1" in problem.cure


@pytest.mark.parametrize(
    ("text", "id", "what"),
    [
        ('(func (export "_start") (result i32) i32.const 0)', "E5", r"_start is \(\) -> \(i32\)"),
        ('(memory (export "_initialize") 1)', "E5", "_initialize is memory 1"),
        ("(memory 8193)", "E4", "536,936,448 bytes"),
        ("(func i32.add)", "E2", "wasmtime refuses it: type mismatch"),
    ],
)
def test_other_reasons_not_to_run(text: str, id: str, what: str) -> None:
    wasm = assemble(f"(module {text})")
    found = inspect(wasm)
    assert ids(found) == [id]
    assert re.search(what, found.problems[0].what)
    assert not found.runs_here
    with pytest.raises(EdgelabError, match=id):
        Guest(wasm, cache=False).instantiate()


def test_a_large_module_is_told() -> None:
    found = inspect(EMPTY + section(0, b"\1x" + bytes(32 << 20)))
    assert ids(found) == ["P2"]
    assert found.runs_here
    with pytest.raises(GuestError, match="P2: it has more than 268,435,456 bytes"):
        inspect(EMPTY + bytes(aot.MAX_MODULE_BYTES))


# --- imports --------------------------------------------------------------------------------------


def refused(text: str, *hosts: object) -> str:
    """What Guest says. It must be what inspect says."""
    wasm = assemble(f"(module {text})")
    with pytest.raises(GuestError) as caught:
        Guest(wasm, host=hosts or [WasiNN()], cache=False)  # type: ignore[arg-type]
    if not hosts:
        assert str(caught.value) == " ".join(map(str, inspect(wasm).problems))
    return str(caught.value)


class Env:
    name = "env"

    def functions(self) -> dict[str, tuple[str, object]]:
        return {"set_pixel": ("iii->i", lambda *_: 0)}


class Nothing(Env):
    def functions(self) -> dict[str, tuple[str, object]]:
        return {}


def test_wasi_is_what_wasmtime_provides() -> None:
    assert len(WASI) == 46
    texts = [
        f'(import "{module}" "{name}" (func'
        + "".join(f" (param {t})" for t in re.findall(r"i\d\d", signature.split("->")[0]))
        + "".join(f" (result {t})" for t in re.findall(r"i\d\d", signature.split("->")[1]))
        + "))"
        for (module, name), signature in WASI.items()
    ]
    linker = wasmtime.Linker(wasmtime.Engine())
    linker.define_wasi()
    wasm = assemble(f"(module {' '.join(texts)})")
    linker.instantiate_pre(wasmtime.Module(linker.engine, wasm))  # raises if one does not fit
    assert inspect(wasm).runs_here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '(import "wasi_ephemeral_nn" "lod" (func))',
            r"P3: the guest imports wasi_ephemeral_nn::lod \(\) -> \(\); nobody provides it\. "
            r"WASI-NN has no such function\. Did you mean load \(i32, i32, i32, i32, i32\) -> "
            r"\(i32\)\? Use the crate wasi-nn 0\.6",
        ),
        (
            '(import "wasi_ephemeral_nn" "load" (func (param i32)))',
            r"E5: .*wasi_ephemeral_nn::load \(i32\) -> \(\), which is "
            r"\(i32, i32, i32, i32, i32\) -> \(i32\) here\. .*wasi-nn 0\.6",
        ),
        ('(import "wasi_nn" "load" (func))', "P3: .*a name that only the runtime WAMR knows"),
        (
            '(import "wasi:nn/graph@0.2.0-rc-2024-10-28" "load" (func))',
            r"E7: .*wasi-nn 0\.7.*wasi-nn 0\.6 with --target wasm32-wasip1",
        ),
        ('(import "wasi:cli/run@0.2.0" "run" (func))', "E7: .*preview 2.*--target wasm32-wasip1"),
        ('(import "wasi_unstable" "fd_write" (func))', "E7: .*preview 0.*--target wasm32-wasip1"),
        (
            '(import "wasi_snapshot_preview1" "fd_wite" (func))',
            r"E5: .*WASI preview 1 has no such function\. Did you mean fd_write \(i32",
        ),
        (
            '(import "wasi_snapshot_preview1" "random_get" (func (param i64 i32)))',
            r"E5: .*random_get \(i64, i32\) -> \(\), which is \(i32, i32\) -> \(i32\) here",
        ),
        ('(import "wasi_snapshot_preview1" "sock_open" (func))', "E7: .*another runtime"),
        ('(import "wasix_32v1" "fd_dup" (func))', "E7: .*another runtime.*Wasmer"),
        ('(import "wasi_ephemeral_crypto_common" "f" (func))', "E7: .*another runtime"),
        ('(import "wasi" "thread-spawn" (func))', "E7: .*wasm32-wasip1-threads"),
        ('(import "wbg" "__wbg_log" (func))', "E7: .*for a browser by wasm-bindgen"),
        ('(import "gojs" "runtime.wasmExit" (func))', "E7: .*Go for JavaScript.*GOOS=wasip1"),
        ('(import "gojs" "runtime.ticks" (func))', "E7: .*TinyGo.*-target=wasip1"),
        ('(import "env" "invoke_vii" (func))', "E7: .*Emscripten.*wasm32-wasip1"),
        ('(import "env" "abort" (func (param i32 i32 i32 i32)))', "E7: .*asc --use abort="),
        ('(import "env" "__stack_pointer" (global (mut i32)))', "E5: .*not linked"),
        ('(import "env" "memory" (memory 1))', r"E5: .*env::memory \(a memory\).*--import-memory"),
        ('(import "env" "table" (table 1 funcref))', r"E5: .*env::table \(a table\)"),
        ('(import "env" "mine" (func (param i64)))', r"E5: .*env::mine \(i64\) -> \(\).*undefined"),
        (
            '(import "env" "fd_read" (func))',
            r"E5: .*undefined symbol.*wasi_snapshot_preview1 has a function fd_read: is "
            r'#\[link\(wasm_import_module = "wasi_snapshot_preview1"\)\] missing',
        ),
        (
            '(import "env" "compute" (func (param i32) (result i32)))',
            "E5: .*wasi_ephemeral_nn has a function compute: is #",
        ),
    ],
)
def test_each_kind_of_missing_import(text: str, message: str) -> None:
    said = refused(text)
    assert re.search(message, said), said
    assert len(inspect(assemble(f"(module {text})")).missing) == 1


def test_missing_imports_without_a_host_or_with_ones_own() -> None:
    nn = '(import "wasi_ephemeral_nn" "load" (func (param i32 i32 i32 i32 i32) (result i32)))'
    said = refused(nn, Nothing())
    assert said.startswith("P3: the guest imports wasi_ephemeral_nn::load (i32")
    assert "host=[edgelab.wasinn.WasiNN()]" in said
    own = '(import "env" "set_pixe" (func))'
    assert "Did you mean set_pixel (i32, i32, i32) -> (i32)?" in refused(own, Env())
    own = '(import "env" "set_pixel" (func (param i64)))'
    assert "(i64) -> (), which is (i32, i32, i32) -> (i32) here" in refused(own, Env())


def test_several_causes_are_all_named_and_long_lists_are_cut() -> None:
    own = " ".join(f'(import "env" "f{k}" (func))' for k in range(8))
    said = refused(f'(import "wasi_unstable" "fd_write" (func)) {own} {NN}')
    assert said.count("E7: ") == said.count("E5: ") == 1
    assert "P3" not in said
    assert "env::f4 () -> (); and 3 more; nobody provides them" in said
    assert "f5" not in said


def test_names_from_a_module_can_not_harm_a_terminal_or_a_page() -> None:
    name = "\\1b[31m<b>\\n" + "x" * 5000
    text = f'(import "{name}" "&" (func)) (func (export "{name}")) (func $"{name}" f32x4.abs)'
    found = inspect(assemble(f"(module {text})"))
    for shown in (str(found), found._repr_html_(), found.describe(functions=True)):
        assert "\x1b" not in shown
        assert "x" * 100 not in shown
        assert len(shown) < 20_000
    assert "<b>" not in found._repr_html_()
    assert str(found).isascii()
    assert found.exports[0].name.startswith("\x1b[31m<b>\n")


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "E2: .*an empty file"),
        (b"<!DOCTYPE html><html>", "E2: .*a web page"),
        (b"\n  <html>", "E2: .*a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "E2: .*git lfs pull"),
        (b"\x1f\x8b\x08\0", "E2: .*gzip"),
        (b"(\xb5/\xfd\x04", "E2: .*Zstandard"),
        (b"PK\3\4", "E2: .*ZIP"),
        (b"\x89PNG\r\n\x1a\n", "E2: .*a picture"),
        (b"\xff\xd8\xff\xe0", "E2: .*a picture"),
        (b"\x7fELF\2\1\1\0", "E2: .*a program.*--target wasm32-wasip1"),
        (b"MZ\x90\0", "E2: .*a program"),
        (b"\xcf\xfa\xed\xfe", "E2: .*a program"),
        (b"!<arch>\n", "E2: .*object files.*cdylib"),
        (b"BC\xc0\xde", "E2: .*LLVM bitcode"),
        (b'{"a": 1}', "E2: .*JSON"),
        (bytes(64), "E2: .*zeros"),
        (b"(module)", r"E2: .*as text \(\.wat\).*wat2wasm"),
        (b"  ;; a comment\n(component)", r"E2: .*as text \(\.wat\)"),
        (b"\0aot\1\0\0\0", "P5, E6: this is machine code"),
        (b"hello", "E2: not WebAssembly: it begins with b'hell'"),
        (b"\0as", "E2: not WebAssembly"),
    ],
)
def test_other_files_are_recognised(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.wasm"
    path.write_bytes(data)
    for wasm in (data, path):
        with pytest.raises(GuestError) as caught:
            inspect(wasm)
        assert re.search(message, str(caught.value))


def test_machine_code_of_wasmtime_is_recognised() -> None:
    compiled = aot.compile_module(EMPTY, cache=False)
    with pytest.raises(GuestError, match="P5, E6: this is machine code"):
        inspect(bytes(compiled.module.serialize()))


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.wasm", "nul\0"):
        with pytest.raises(GuestError, match=r"cannot read it: .*guest build"):
            inspect(path)


@pytest.mark.parametrize(
    ("wasm", "where"),
    [
        (b"\0asm\2\0\0\0", "version"),
        (EMPTY + b"\x0a", r"cut off in the head of a section \(at offset 0x8\)"),
        (EMPTY + b"\x0a\x05\0", r"the code section claims 5 bytes, and the file has 1 more"),
        (EMPTY + b"\x77\0", "no section of kind 119"),
        (EMPTY + section(1, b"\xff\xff\xff\xff\x0f"), r"4,294,967,295 entries in 0 bytes"),
        (EMPTY + section(1, leb(500_000)), r"500,000 entries in 0 bytes"),
        (EMPTY + section(1, b"\1\x60\xe9\7" + b"\x7f" * 1001 + b"\0"), "1,001 entries"),
        (EMPTY + section(1, b"\1\x60\0\0\0"), "more than it says"),
        (EMPTY + section(1, b"\1\x30"), "neither a function's"),
        (EMPTY + section(1, b"\1\x60\1\x20\0"), "unknown type 0x20"),
        (EMPTY + section(2, b"\1\1a\1\xff\0\0"), "not UTF-8"),
        (EMPTY + section(2, b"\1\1a\1b\0\0"), "type 0 is no function's"),
        (EMPTY + section(2, b"\1\1a\1b\x09\0"), "unknown kind 9"),
        (EMPTY + section(3, b"\1\0"), "type 0 is no function's"),
        (EMPTY + section(5, b"\1\x40\0"), "unknown limits 0x40"),
        (EMPTY + section(5, b"\1\0" + b"\xff" * 5), "integer is too long"),
        (EMPTY + section(6, b"\1\x7f\0\x41\1"), "cut off before its end"),
        (EMPTY + section(7, b"\1\1a\0\7"), "function 7 is not there"),
        (EMPTY + section(10, b"\1\x05\0"), "5 bytes where 1 are left"),
        (EMPTY + section(11, b"\1\0\x41\0\x0b\x05a"), "5 bytes where 1 are left"),
        (EMPTY + section(0, b"\x05a"), "5 bytes where 1 are left"),
    ],
)
def test_damage_is_told_with_its_place(wasm: bytes, where: str) -> None:
    found = inspect(wasm)
    assert not found.runs_here
    (problem,) = (problem for problem in found.problems if problem.id == "E2")
    assert re.search(where, problem.what), problem.what
    assert "at offset 0x" in problem.what


def test_what_comes_before_the_damage_is_told() -> None:
    wasm = guest_path("classify_nn").path.read_bytes()
    whole, found = inspect(wasm), inspect(wasm[:-1000])
    assert found.imports == whole.imports
    assert found.functions == whole.functions
    assert found.data_bytes == 0
    (problem,) = found.problems
    assert "not complete: the data section claims" in problem.what
    assert "the file has" in problem.what


def test_a_list_that_claims_billions_takes_no_memory() -> None:
    huge = b"\xff\xff\xff\xff\x0f"
    wasms = [EMPTY + section(kind, huge + bytes(100)) for kind in range(1, 14)]
    wasms += [
        EMPTY + section(0, leb(len(name)) + name + tail + huge + bytes(9))
        for name, tail in ((b"producers", b""), (b"name", b"\1\x0e"))
    ]
    wasms.append(module(b"\x0e" + huge + bytes(100) + b"\x0b"))
    inspect(EMPTY)
    tracemalloc.start()
    for wasm in wasms:
        inspect(wasm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_hostile_lists_take_no_quadratic_time() -> None:
    """Each of these took minutes if every claim were followed, or every signature written out."""
    claim = b"\x0e\x80\x80\x80\x01" + b"\0" * 9 + b"\x0b"  # 2,097,152 branches
    inspect(module(*[claim] * 20_000))
    long = b"\1\x60\xe8\7" + b"\x7f" * 1000 + b"\0"
    many = section(2, leb(50_000) + b"\1a\1b\0\0" * 50_000)
    found = inspect(EMPTY + section(1, long) + many)
    assert len(found.imports) == 50_000
    assert len(str(found)) < 20_000


def test_a_chain_of_calls_is_no_recursion() -> None:
    count = 50_000
    bodies = [b"\x10" + leb(k + 1) + b"\x0b" for k in range(count - 1)] + [b"\x0b"]
    wasm = module(*bodies) + b""
    at = wasm.index(b"\x0a", len(EMPTY) + 9 + count)  # the export section stands before the code
    export = section(7, b"\1\1f\0\0")
    found = inspect(wasm[:at] + export + wasm[at:])
    assert len(found.reached("f")) == count


@settings(max_examples=300 * FUZZ)
@given(mutants([*SEED_MODULES, assemble(KERNELS)]) | st.binary(max_size=64))
@example(b"\0asm\1\0\0\0\x0a")
def test_any_bytes_are_inspected_or_refused(wasm: bytes) -> None:
    try:
        found = inspect(wasm)
    except GuestError:
        return
    assert str(found)
    json.dumps(found.to_dict(functions=True))


@pytest.fixture(scope="module")
def everything() -> wasmtime.Engine:
    return wasmtime.Engine()


@settings(max_examples=300 * FUZZ)
@given(mutants([*SEED_MODULES, assemble(KERNELS)]))
def test_what_wasmtime_takes_is_read_to_the_end(everything: wasmtime.Engine, wasm: bytes) -> None:
    try:
        wasmtime.Module.validate(everything, wasm)
    except wasmtime.WasmtimeError:
        return
    found = inspect(wasm)
    assert not any("complete" in problem.what for problem in found.problems)
    assert not any(function.unreadable for function in found.functions)


@settings(max_examples=100 * FUZZ)
@given(st.data())
def test_a_real_guest_with_a_changed_byte(everything: wasmtime.Engine, data: st.DataObject) -> None:
    wasm = bytearray(guest_path("classify").path.read_bytes())
    wasm[data.draw(st.integers(8, len(wasm) - 1))] ^= data.draw(st.integers(1, 255))
    found = inspect(bytes(wasm))
    try:
        wasmtime.Module.validate(everything, bytes(wasm))
    except wasmtime.WasmtimeError:
        assert not found.runs_here
    else:
        assert not any(function.unreadable for function in found.functions)


# --- components -----------------------------------------------------------------------------------


def test_a_component_of_wasi() -> None:
    text = """(component
      (import "wasi:io/error@0.2.6" (instance)) (import "wasi:cli/stdout@0.2.6" (instance))
      (import "f" (func (param "a" u32))) (import "t" (type $t (sub resource)))
      (import "u" (type $u (eq $t))) (import "v" (type (eq $u)))
      (core module (func)) (core module)
      (component $c) (instance $i (instantiate $c)) (export "wasi:cli/run@0.2.6" (instance $i)))"""
    wasm = assemble(text)
    found = inspect(wasm)
    assert (found.kind, found.target, found.core_modules) == (
        "component", "wasm32-wasip2 component", 2,
    )  # fmt: skip
    assert [(i.name, i.type) for i in found.imports] == [
        ("wasi:io/error@0.2.6", "instance"),
        ("wasi:cli/stdout@0.2.6", "instance"),
        ("f", "function"),
        ("t", "type"),
        ("u", "type"),
        ("v", "type"),
    ]
    assert [(e.name, e.type) for e in found.exports] == [("wasi:cli/run@0.2.6", "instance")]
    assert sum(found.sections.values()) + 8 == len(wasm)
    (problem,) = found.problems
    assert problem.id == "E7"
    assert "imports wasi:io/error@0.2.6" in problem.what
    assert "--target wasm32-wasip1" in problem.cure
    assert "2 core modules" in str(found)
    with pytest.raises(GuestError, match="E7"):
        Guest(wasm, cache=False)


def test_a_component_of_wasi_nn_alone() -> None:
    text = '(component (import "wasi:nn/tensor@0.2.0-rc-2024-10-28" (instance)))'
    found = inspect(assemble(text))
    assert found.runs_here
    assert found.wasi_nn == "wasi:nn 0.2.0-rc-2024-10-28 (WIT)"
    assert "edgelab.wasinn.component.Component" in found.verdict
    older = inspect(assemble(text.replace("2024-10-28", "2024-08-19")))
    assert ids(older) == ["E7"]


@settings(max_examples=100 * FUZZ)
@given(
    mutants(
        [
            assemble(
                '(component (import "a" (func)) (import "t" (type (sub resource))) (core module) '
                '(component $c) (instance $i (instantiate $c)) (export "r" (instance $i)))'
            )
        ]
    )
)
def test_damaged_components_are_inspected_or_refused(wasm: bytes) -> None:
    try:
        assert str(inspect(wasm))
    except GuestError:
        return


# --- how it is shown ------------------------------------------------------------------------------


def test_the_table_for_notebooks() -> None:
    html = inspect(guest_path("classify_nn").path)._repr_html_()
    assert html.count("<table>") == html.count("<caption>") == html.count("</table>") == 5
    assert "<caption>Imports: what it wants from its host</caption>" in html
    assert '<th scope="col">bytes</th>' in html
    assert '<th scope="row">wasi_ephemeral_nn::load</th>' in html
    broken = inspect(assemble('(module (import "env" "f" (func)))'))._repr_html_()
    assert "<caption>Problems</caption>" in broken
    assert '<th scope="row">E5</th>' in broken
    assert "<td>missing</td>" in broken


def test_the_command_line(tmp_path: Path) -> None:
    good, bad = guest_path("classify_nn").path, tmp_path / "ü.wasm"
    bad.write_bytes(assemble('(module (import "env" "f" (func)))'))
    page = tmp_path / "page.wasm"
    page.write_bytes(b"<html>")
    done = edgelab("inspect", str(good))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "It can run here: edgelab.Guest(FILE, host=[WasiNN()])" in done.stdout
    assert "Functions with most SIMD" in done.stdout
    assert edgelab("inspect", str(bad)).returncode == 1
    done = edgelab("inspect", str(bad), str(page), str(good))
    assert done.returncode == 1
    assert "It cannot run here: E5." in done.stdout
    assert "It can run here" in done.stdout
    assert done.stderr.count("edgelab: error:") == 2
    assert "ü.wasm cannot run here. E5: the guest imports env::f () -> ()" in done.stderr
    assert "page.wasm: E2: this is not WebAssembly. It looks like a web page" in done.stderr


def test_the_command_line_for_programs(tmp_path: Path) -> None:
    good, page = guest_path("classify_nn").path, tmp_path / "page.wasm"
    page.write_bytes(b"<html>")
    done = edgelab("inspect", "--json", str(good), str(page))
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["file"] == str(good)
    assert first["runs_here"] is True
    assert first["functions"] == []
    assert first["imports"][0].keys() == {"module", "name", "type"}
    assert first["memories"][0]["page_bytes"] == 65536
    assert second["error"].startswith("E2")
    done = edgelab("inspect", "--json", "--functions", str(good))
    functions = json.loads(done.stdout)["functions"]
    assert len(functions) == len(inspect(good).functions)
    assert functions[0].keys() >= {"index", "name", "exports", "simd", "calls"}
    listed = edgelab("inspect", "--functions", str(good)).stdout
    assert len(re.findall(r"^  #\d+ ", listed, re.M)) == len(functions)


def test_it_knows_every_host_function() -> None:
    """Else a guest that runs would be said not to."""
    host = WasiNN()
    functions = {name: signature for name, (signature, _) in host.functions().items()}
    wasm = assemble(forwarder({host.name: functions}).decode())
    assert inspect(wasm).runs_here
    assert explain_imports([], {}) == []
