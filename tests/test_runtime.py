"""The runtime: calls, memory, limits, host functions, WASI. Many of the guests here are hostile."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasmtime
from forward import WASI, Heap, forwarder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelab.build import guest_path
from edgelab.errors import GuestError, LimitError
from edgelab.runtime import Guest, Instance, Limits, _local, _ticker
from edgelab.wasinn import WasiNN
from edgelab.wasm import interface

FUZZ = int(os.environ.get("EDGELAB_FUZZ", "1"))
PAGE = 65536

PLAIN = """
  (memory (export "memory") 1)
  (global (export "counter") (mut i32) (i32.const 0))
  (table (export "table") 1 funcref)
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "i32") (param i32) (result i32) local.get 0)
  (func (export "i64") (param i64) (result i64) local.get 0)
  (func (export "f32") (param f32) (result f32) local.get 0)
  (func (export "f64") (param f64) (result f64) local.get 0)
  (func (export "mixed") (param f32 i64 f64 i32) (result f64) (f64.add
    (f64.add (f64.promote_f32 (local.get 0)) (f64.convert_i64_s (local.get 1)))
    (f64.add (local.get 2) (f64.convert_i32_s (local.get 3)))))
  (func (export "upper_half_is_zero") (param i32) (result i32)
    (i64.eqz (i64.shr_u (i64.extend_i32_u (local.get 0)) (i64.const 32))))
  (func (export "nothing"))
  (func (export "seven") (result i64) i64.const 7)
  (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "poke") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "count") (param i32) (result i32) (local $i i32)
    (loop $again
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (local.get 0))))
    local.get $i)
  (func (export "forever") (loop br 0))
  (func $tail (export "forever_by_tail_calls") (return_call $tail))
  (func $deep (export "recurse") (result i32) (i32.add (i32.const 1) (call $deep)))
  (func (export "unreachable") unreachable)
  (func (export "divide") (result i32) (i32.div_u (i32.const 1) (i32.const 0)))
  (func (export "two") (result i32 i32) i32.const 1 i32.const 2)
  (func (export "vector") (param v128) (result v128) local.get 0)
  (func (export "reference") (param externref funcref) (result externref) local.get 0)
  (func (export "grow_table") (param i32) (result i32)
    (table.grow 0 (ref.null func) (local.get 0)))
"""


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest(f"(module {PLAIN})".encode(), cache=False)


@pytest.fixture(scope="module")
def counting() -> Guest:
    return Guest(f"(module {PLAIN})".encode(), cache=False, fuel=True)


class Host:
    """Host functions from a dict, as the module ``env``."""

    name = "env"

    def __init__(self, **functions: tuple[str, Callable[..., Any]]) -> None:
        self._functions = functions

    def functions(self) -> Mapping[str, tuple[str, Callable[..., int]]]:
        return self._functions


def hosted(more: str = "", **functions: tuple[str, Callable[..., Any]]) -> Guest:
    """A guest that can call these host functions."""
    signatures = {name: signature for name, (signature, _) in functions.items()}
    module = forwarder({"env": signatures}, more=more)
    return Guest(module, host=[Host(**functions)], cache=False)


# --- calls ----------------------------------------------------------------------------------------


@given(st.integers(-(2**31), 2**32 - 1), st.integers(-(2**63), 2**64 - 1))
def test_integers_go_in_signed_or_unsigned_and_come_out_signed(
    guest: Guest, small: int, big: int
) -> None:
    instance = guest.instantiate()
    assert instance.call("i32", small) == (small + 2**31) % 2**32 - 2**31
    assert instance.call("i64", big) == (big + 2**63) % 2**64 - 2**63
    assert instance.call("upper_half_is_zero", small) == 1


@given(st.floats(width=32), st.floats())
def test_floats_pass_bit_by_bit(guest: Guest, single: float, double: float) -> None:
    instance = guest.instantiate()
    assert struct.pack("f", instance.call("f32", single)) == struct.pack("f", single)
    assert struct.pack("d", instance.call("f64", double)) == struct.pack("d", double)


def test_arguments_of_several_types_reach_their_places(guest: Guest) -> None:
    assert guest.instantiate().call("mixed", 0.5, -3, 0.25, 2**32 - 1) == 0.5 - 3 + 0.25 - 1


def test_numpy_numbers_are_arguments(guest: Guest) -> None:
    instance = guest.instantiate()
    assert instance.call("add", np.int8(-1), np.uint32(2**32 - 1)) == -2
    assert instance.call("f32", np.float64(0.5)) == 0.5
    assert instance.call("f64", np.int64(3)) == 3.0


def test_a_function_may_have_neither_parameters_nor_result(guest: Guest) -> None:
    instance = guest.instantiate()
    assert instance.call("nothing") is None
    assert instance.call("seven") == 7  # a result, and no parameter whose slot it could use


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add", (1,)),
        ("add", (1, 2, 3)),
        ("add", (1, "2")),
        ("add", (None, 1)),
        ("add", (1.5, 1)),
        ("add", (2**32, 1)),
        ("add", (1, -(2**31) - 1)),
        ("i64", (2**64,)),
        ("i64", (-(2**63) - 1,)),
        ("f32", (1e300,)),
        ("f32", ("1",)),
        ("f64", (10**400,)),
        ("f64", (None,)),
    ],
)
def test_arguments_that_do_not_fit_are_a_type_error(
    guest: Guest, name: str, arguments: tuple[Any, ...]
) -> None:
    instance = guest.instantiate()
    with pytest.raises(TypeError, match=name):
        instance.call(name, *arguments)
    assert instance.call("add", 40, 2) == 42


@pytest.mark.parametrize("name", ["two", "vector", "reference"])
def test_signatures_without_a_plain_form_are_listed_but_not_callable(
    guest: Guest, name: str
) -> None:
    assert name in dict(guest.exports)
    with pytest.raises(GuestError, match=r"E5.*not supported"):
        guest.instantiate().function(name)


@pytest.mark.parametrize("name", ["missing", "memory", "table", "counter", "", "\ud800"])
def test_what_is_no_function_can_not_be_called(guest: Guest, name: str) -> None:
    with pytest.raises(GuestError, match=r"E5: the guest exports no function.*it has: add"):
        guest.instantiate().call(name)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("unreachable", (), "unreachable"),
        ("divide", (), "integer division by zero"),
        ("peek", (PAGE,), "memory out of bounds"),
        ("recurse", (), "stack overflow"),
    ],
)
def test_a_trap_is_an_error_that_ends_the_instance_and_no_other(
    guest: Guest, name: str, arguments: tuple[int, ...], reason: str
) -> None:
    instance, other = guest.instantiate(), guest.instantiate()
    add = instance.function("add")
    with pytest.raises(GuestError, match=f"trapped: {reason}"):
        instance.call(name, *arguments)
    with pytest.raises(GuestError, match=f"stopped before .*{reason}"):
        add(1, 1)
    assert other.call("add", 1, 1) == guest.instantiate().call("add", 1, 1) == 2


def test_a_function_is_called_again_and_again_while_others_are(guest: Guest) -> None:
    first, second = guest.instantiate(), guest.instantiate()
    poke, peek = first.function("poke"), first.function("peek")
    other = second.function("peek")
    for value in range(200):
        poke(value, value + 1)
        assert (peek(value), other(value)) == (value + 1, 0)


def test_an_instance_and_its_views_are_freed_without_the_garbage_collector(guest: Guest) -> None:
    class Interrupt(Exception):
        pass

    def fail(_: Instance) -> int:
        raise Interrupt

    gc.disable()
    try:
        for use in ("add", "unreachable", "host"):
            instance = hosted(fail=("->i", fail)).instantiate() if use == "host" else None
            instance = instance or guest.instantiate()
            view, alive = instance.memory.array(0, 4), weakref.ref(instance)
            with contextlib.suppress(GuestError, Interrupt):
                instance.call({"host": "fail"}.get(use, use), *(1, 1)[: 2 * (use == "add")])
            store = weakref.ref(instance._store)
            del instance
            assert alive() is None, use
            assert store() is not None
            del view
            assert store() is None, use
    finally:
        gc.enable()


def test_the_guest_outlives_its_name_while_an_instance_or_a_function_does() -> None:
    add = hosted(answer=("i->i", lambda _, x: x + 1)).instantiate().function("answer")
    gc.collect()
    assert add(41) == 42


# --- memory ---------------------------------------------------------------------------------------


def test_a_view_is_the_guests_memory_itself(guest: Guest) -> None:
    instance = guest.instantiate()
    view = instance.memory.array(10, (2, 2), np.uint8)
    instance.call("poke", 13, 99)
    assert view.tolist() == [[0, 0], [0, 99]]
    view[0, 0] = 7
    assert instance.call("peek", 10) == 7


def test_a_view_stays_valid_when_the_memory_grows(guest: Guest) -> None:
    instance = guest.instantiate()
    view = instance.memory.array(0, PAGE)
    base, address = instance.memory.base, view.ctypes.data
    assert instance.call("grow", 1000) == 1
    assert len(instance.memory) == 1001 * PAGE
    instance.call("poke", 5, 55)
    assert view[5] == 55
    assert instance.memory.base == base
    assert instance.memory.array(0, 1).ctypes.data == address
    instance.memory.write(1001 * PAGE - 1, b"\x01")
    assert instance.call("peek", 1001 * PAGE - 1) == 1


def test_a_view_outlives_its_instance(guest: Guest) -> None:
    instance = guest.instantiate()
    memory = instance.memory
    view = memory.array(0, 3)
    instance.memory.write(0, b"abc")
    del instance
    gc.collect()
    others = [guest.instantiate() for _ in range(3)]  # would reuse freed address space
    assert bytes(view) == memory.read(0, 3) == b"abc"
    assert all(other.call("peek", 0) == 0 for other in others)


RANGES = st.integers(-10, PAGE + 10) | st.integers(-(2**70), 2**70)


@given(RANGES, RANGES)
def test_a_range_is_usable_exactly_if_all_of_it_exists(
    guest: Guest, pointer: int, size: int
) -> None:
    memory = guest.instantiate().memory
    if min(pointer, size) >= 0 and pointer + size <= PAGE:
        assert memory.address(pointer, size) == memory.base + pointer
        assert len(memory.read(pointer, size)) == size == memory.array(pointer, size).nbytes
        return
    for use in (memory.address, memory.read, memory.array):
        with pytest.raises(GuestError):
            use(pointer, size)


@np.errstate(over="ignore")
def test_numpy_integers_do_not_wrap_around(guest: Guest) -> None:
    memory = guest.instantiate().memory
    assert np.uint32(2**32 - 16) + np.uint32(32) == 16  # as a careless check would compute
    for pointer, size in [
        (np.uint32(2**32 - 16), np.uint32(32)),
        (np.int32(2**31 - 1), np.int32(2**31 - 1)),
        (np.uint8(200), np.uint32(PAGE)),
    ]:
        for use in (memory.address, memory.read, memory.array):
            with pytest.raises(GuestError, match="outside"):
                use(pointer, size)
    with pytest.raises(GuestError, match="outside"):
        memory.array(0, (np.uint16(256), np.uint16(257)))
    with pytest.raises(TypeError):
        memory.read(1.0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [
        *(-1, (-1,), (-1, -1), (-2, -2), (PAGE + 1,), (1,) * 65),
        *((2**40, 2**40), (0, 2**70), (0, 2**62, 2**62)),
    ],
)
def test_impossible_shapes_are_refused(guest: Guest, shape: Any) -> None:
    with pytest.raises(GuestError):
        guest.instantiate().memory.array(0, shape)
    with pytest.raises(GuestError):
        guest.instantiate().memory.array(0, -1, "V0")  # -1 of nothing is not too long


def test_views_may_be_empty_scalar_unaligned_or_structured(guest: Guest) -> None:
    memory = guest.instantiate().memory
    memory.write(1, struct.pack("<3d", 1.5, 2.5, -3.5))
    assert memory.array(1, 3, np.float64).tolist() == [1.5, 2.5, -3.5]
    assert memory.array(9, (), ">f8") == 2.5  # guests are little-endian, whatever is asked
    pair = np.dtype([("a", "<u4"), ("b", "<f4")])
    memory.write(3, struct.pack("<If", 7, 0.5))
    assert memory.array(3, 1, pair)[0].tolist() == (7, 0.5)
    for pointer in (0, 3, PAGE):
        assert memory.array(pointer, (4, 0), np.float32).shape == (4, 0)
        assert memory.read(pointer, 0) == b""
    with pytest.raises(GuestError):
        memory.array(PAGE + 1, 0)


@pytest.mark.parametrize("dtype", [object, [("a", "u1"), ("b", object)]])
def test_guest_bytes_never_become_python_objects(guest: Guest, dtype: Any) -> None:
    with pytest.raises(TypeError):
        guest.instantiate().memory.array(0, 1, dtype)


def test_whatever_has_bytes_can_be_written(guest: Guest) -> None:
    memory = guest.instantiate().memory
    floats = np.arange(6, dtype=np.float32).reshape(2, 3)
    memory.write(8, floats.data)  # its length is 2
    assert memory.array(8, (2, 3), np.float32).tolist() == floats.tolist()
    memory.write(0, bytearray(b"xyz"))
    memory.write(PAGE, b"")
    assert memory.read(0, 3) == b"xyz"
    with pytest.raises(GuestError):
        memory.write(PAGE - 2, b"xyz")
    assert memory.read(PAGE - 2, 2) == b"\0\0"


def test_a_guest_need_not_have_memory() -> None:
    instance = Guest(b'(module (func (export "f")))', cache=False).instantiate()
    instance.call("f")
    with pytest.raises(GuestError, match="E5: the guest exports no memory"):
        _ = instance.memory
    empty = Guest(b'(module (memory (export "memory") 0))', cache=False).instantiate()
    assert len(empty.memory) == 0
    assert "0 bytes of memory" in repr(empty)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"memory_bytes": -1},
        {"memory_bytes": 2**63},
        {"output_bytes": -1},
        {"fuel": -1},
        {"fuel": 2**64},
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": math.nan},
    ],
)
def test_impossible_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        Limits(**values)


def test_too_much_initial_memory_is_a_limit_error() -> None:
    module = Guest(b'(module (memory (export "memory") 100))', cache=False)
    with pytest.raises(LimitError, match=r"E4.*1048576 bytes"):
        module.instantiate(limits=Limits(memory_bytes=1 << 20))
    assert len(module.instantiate(limits=Limits(memory_bytes=100 * PAGE)).memory) == 100 * PAGE


def test_growth_beyond_the_limit_fails_inside_the_guest(guest: Guest) -> None:
    instance = guest.instantiate(limits=Limits(memory_bytes=3 * PAGE))
    assert [instance.call("grow", n) for n in (3, 2, 1, 0)] == [-1, 1, -1, 3]
    assert len(instance.memory) == 3 * PAGE


def test_a_trap_at_the_memory_limit_says_so(guest: Guest) -> None:
    full = guest.instantiate(limits=Limits(memory_bytes=PAGE))
    with pytest.raises(GuestError, match="E4: its memory is at the limit"):
        full.call("unreachable")
    roomy = guest.instantiate()
    with pytest.raises(GuestError) as caught:
        roomy.call("unreachable")
    assert "E4" not in str(caught.value)


def test_tables_are_limited_too(guest: Guest) -> None:
    instance = guest.instantiate()
    assert instance.call("grow_table", 1000) == 1
    assert instance.call("grow_table", 100_000_000) == -1
    many = "(table 0 funcref)" * 9
    for text in ("(module (table 10000000 funcref))", f"(module {many})"):
        with pytest.raises(GuestError, match="table"):
            Guest(text.encode(), cache=False).instantiate()


@pytest.mark.parametrize("name", ["forever", "forever_by_tail_calls"])
def test_a_guest_that_loops_is_stopped(guest: Guest, counting: Guest, name: str) -> None:
    for one in (guest, counting):  # two engines
        instance = one.instantiate(limits=Limits(seconds=0.05))
        with pytest.raises(LimitError, match=r"longer than 0\.05 s"):
            instance.call(name)
        with pytest.raises(GuestError, match="stopped before"):
            instance.call("nothing")


def test_a_start_function_that_loops_is_stopped() -> None:
    for text in ("(start 0) (func (loop br 0))", '(func (export "_initialize") (loop br 0))'):
        module = Guest(f"(module {text})".encode(), cache=False)
        with pytest.raises(LimitError, match="longer than"):
            module.instantiate(limits=Limits(seconds=0.05))


def test_the_time_limit_is_for_one_call_and_may_be_infinite(guest: Guest) -> None:
    short = guest.instantiate(limits=Limits(seconds=0.5))
    for _ in range(2):
        time.sleep(0.3)  # time between calls does not count
        assert short.call("count", 60_000_000) == 60_000_000  # longer than a tick
    endless = guest.instantiate(limits=Limits(seconds=math.inf))
    assert endless.call("count", 20_000_000) == 20_000_000


def test_time_in_host_functions_counts() -> None:
    module = hosted(
        nap=("->", lambda _: time.sleep(0.1)),
        more='(func (export "go") (loop (call $nap) (br 0)))',
    )
    with pytest.raises(LimitError):
        module.instantiate(limits=Limits(seconds=0.25)).call("go")


def test_the_clock_starts_again_after_a_pause(guest: Guest) -> None:
    for _ in range(2):
        with pytest.raises(LimitError):
            guest.instantiate(limits=Limits(seconds=0.05)).call("forever")
        patience = time.monotonic() + 10
        while _ticker.awake:  # nobody runs: it must go to sleep, and not tick for ever
            assert time.monotonic() < patience
            time.sleep(0.01)


def test_loops_in_several_threads_are_all_stopped(guest: Guest) -> None:
    stopped = []

    def run() -> None:
        try:
            guest.instantiate(limits=Limits(seconds=0.1)).call("forever")
        except LimitError:
            stopped.append(1)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_compiles_calls_and_stops_loops() -> None:
    # In a process of its own: forking the tests' process would copy its threads' locks.
    script = """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside threads
from edgelab.errors import LimitError
from edgelab.runtime import Guest, Limits
from edgelab.wasinn import WasiNN
path = sys.argv[1]  # large enough to be compiled on several threads
nn = Guest(path, host=[WasiNN()], cache=False).instantiate()
loop = b'(module (func (export "f") (loop br 0)))'
old = Guest(loop, cache=False).instantiate(limits=Limits(seconds=0.1))
try:
    Guest(loop, cache=False).instantiate(limits=Limits(seconds=0.1)).call("f")  # the clock runs
except LimitError:
    print("parent")
sys.stdout.flush()
if os.fork() == 0:
    signal.alarm(60)
    assert nn.call("alloc", 16) > 0
    for instance in (old, Guest(loop, cache=False).instantiate(limits=Limits(seconds=0.1))):
        try:
            instance.call("f")
        except LimitError:
            print("child")
    Guest(path, host=[WasiNN()], cache=False).instantiate()
    print("compiled")
    sys.stdout.flush()
    os._exit(0)
assert os.wait()[1] == 0
"""
    # Found here, not there: if it has to be built, or waited for, stderr says so.
    path = guest_path("classify_nn").path
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["parent", "child", "child", "compiled"], "")


def test_fuel_is_counted_alike_every_time(counting: Guest) -> None:
    def used(n: int) -> int:
        instance = counting.instantiate()
        before = instance.fuel_used
        instance.call("count", n)
        return instance.fuel_used - before

    assert used(10) == used(10)
    assert used(30) - used(20) == used(20) - used(10) > 0
    assert counting.instantiate().fuel_used == 0


def test_the_fuel_limit_stops_a_guest(counting: Guest, guest: Guest) -> None:
    instance = counting.instantiate(limits=Limits(fuel=1000))
    assert instance.call("count", 10) == 10
    with pytest.raises(LimitError, match="fuel of 1000"):
        instance.call("forever")
    assert instance.fuel_used == 1000
    with pytest.raises(GuestError, match=r"fuel=True"):
        guest.instantiate(limits=Limits(fuel=1000))
    with pytest.raises(GuestError, match=r"fuel=True"):
        _ = guest.instantiate().fuel_used


# --- threads and Ctrl-C ---------------------------------------------------------------------------


def test_an_instance_refuses_a_second_thread() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait(_: Instance) -> None:
        entered.set()
        assert go_on.wait(30)

    instance = hosted(wait=("->", wait)).instantiate()
    ready = instance.function("grow")
    thread = threading.Thread(target=instance.call, args=("wait",))
    thread.start()
    assert entered.wait(30)
    try:
        with pytest.raises(GuestError, match="already running a call"):
            ready(0)
        with pytest.raises(GuestError, match="already running a call"):
            instance.function("grow")
    finally:
        go_on.set()
        thread.join(30)
    assert ready(0) == 1


def test_many_threads_use_one_guest(guest: Guest) -> None:
    results: dict[int, list[int]] = {}

    def run(seed: int) -> None:
        instance = guest.instantiate()
        add = instance.function("add")
        instance.memory.write(0, bytes([seed]))
        results[seed] = [add(seed, k) for k in range(500)] + [instance.call("peek", 0)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {seed: [seed + k for k in range(500)] + [seed] for seed in range(8)}


class Interrupt(Exception):
    """What Ctrl-C raises in these tests, so that a failure does not end the whole run."""


@pytest.fixture
def handler() -> Iterator[Callable[..., None]]:
    def interrupt(_number: int, _frame: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGINT, interrupt)
    yield interrupt
    signal.signal(signal.SIGINT, before)


SPIN = """
  (func (export "{name}") (param $calls i32) (local $i i32) (local $wrong i32)
    (loop $outer
      (local.set $i (i32.const 0))
      (loop $inner
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $inner (i32.lt_u (local.get $i) (i32.const 100000))))
      (if (i32.ne (call $tick (i32.const 12345)) (i32.const 0)) (then unreachable))
      (local.set $calls (i32.sub (local.get $calls) (i32.const 1)))
      (br_if $outer (local.get $calls))))
"""


@pytest.mark.parametrize("where", ["forever", "spin", "sleep"])
def test_ctrl_c_ends_a_call_wherever_it_hits(where: str, handler: Callable[..., None]) -> None:
    """Most of all between guest and host: there ctypes would swallow it and garble the result."""
    instance = hosted(
        tick=("i->i", lambda *_: 0),
        sleep=("->", lambda _: time.sleep(30)),
        more=SPIN.format(name="spin") + '(func (export "forever") (loop br 0))',
    ).instantiate(limits=Limits(seconds=30))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(Interrupt):
        instance.call(where, *([0] if where == "spin" else []))
    assert time.monotonic() - start < 20  # not at the limit
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(GuestError, match=r"stopped before .Interrupt"):
        instance.call("grow", 0)


def test_ctrl_c_at_the_end_of_a_call_is_not_lost(handler: Callable[..., None]) -> None:
    def press(_: Instance) -> None:
        _local.thread.in_host = False  # as if the guest still ran, for one more moment
        signal.raise_signal(signal.SIGINT)

    instance = hosted(press=("->", press)).instantiate()
    for _ in range(2):
        with pytest.raises(Interrupt):
            instance.call("press")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_handler_that_returns_does_not_disturb_the_guest(handler: Callable[..., None]) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    instance = hosted(tick=("i->i", lambda *_: 0), more=SPIN.format(name="spin")).instantiate()
    stop = threading.Event()

    def pester() -> None:
        while not stop.wait(0.005):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        instance.call("spin", 3000)
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 3
    assert instance.call("grow", 0) == 1


# --- host functions -------------------------------------------------------------------------------


def test_host_functions_get_unsigned_numbers_and_their_instance() -> None:
    seen: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> int:
        seen.append(arguments)
        return -2

    module = hosted(note=("iii->i", note), silent=("->", lambda instance: seen.append((instance,))))
    first, second = module.instantiate(), module.instantiate()
    assert first.call("note", -1, 2**31, 5) == -2
    assert second.call("note", 0, 0, 0) == -2
    assert second.call("silent") is None
    assert seen == [(first, 2**32 - 1, 2**31, 5), (second, 0, 0, 0), (second,)]


@pytest.mark.parametrize("kind", [ValueError, KeyError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_a_host_function_raises_reaches_the_caller_unchanged(
    kind: type[BaseException],
) -> None:
    error, cause = kind("text"), RuntimeError("why")

    def fail(_: Instance) -> int:
        raise error from cause

    module = hosted(fail=("->i", fail))
    instance, other = module.instantiate(), module.instantiate()
    with pytest.raises(kind) as caught:
        instance.call("fail")
    assert caught.value is error
    assert error.__cause__ is cause
    with pytest.raises(GuestError, match=f"stopped before .{kind.__name__}"):
        instance.call("grow", 0)
    assert other.call("grow", 0) == 1


def test_an_exception_in_a_start_function_keeps_its_cause() -> None:
    def fail(_: Instance) -> None:
        raise ValueError("inner") from KeyError("outer")

    with pytest.raises(ValueError, match="inner") as caught:
        hosted(fail=("->", fail), more="(start $fail)").instantiate()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_host_function_that_forgets_its_result_is_an_error() -> None:
    with pytest.raises(TypeError):
        hosted(forget=("i->i", lambda *_: None)).instantiate().call("forget", 1)


def test_a_start_function_meets_the_host_before_the_instance_is_complete() -> None:
    seen: list[str] = []

    def early(instance: Instance) -> None:
        for use in (lambda: instance.memory, lambda: instance.call("grow", 0)):
            with pytest.raises(GuestError) as caught:
                use()
            seen.append(str(caught.value))

    instance = hosted(early=("->", early), more="(start $early)").instantiate()
    assert "start function" in seen[0]
    assert "already running" in seen[1]
    assert instance.call("grow", 0) == 1


def test_a_host_function_can_use_another_instance_but_not_its_own(guest: Guest) -> None:
    order: list[Any] = []

    def outer(instance: Instance) -> int:
        order.append(instance)
        total: int = inner.call("inner")
        order.append(instance)
        with pytest.raises(GuestError, match="already running"):
            instance.call("grow", 0)
        return total + int(guest.instantiate().call("add", 1, 1))

    def answer(instance: Instance) -> int:
        order.append(instance)
        return 40

    inner = hosted(inner=("->i", answer)).instantiate()
    twice = '(func (export "twice") (result i32) (i32.add (call $outer) (call $outer)))'
    instance = hosted(outer=("->i", outer), more=twice).instantiate()
    assert instance.call("twice") == 84
    assert order == [instance, inner, instance] * 2


def test_a_failure_in_a_nested_guest_is_the_host_functions_to_handle(guest: Guest) -> None:
    def survive(_: Instance) -> int:
        with pytest.raises(GuestError, match="unreachable"):
            guest.instantiate().call("unreachable")
        return 1

    instance = hosted(survive=("->i", survive)).instantiate()
    assert instance.call("survive") == instance.call("survive") == 1


@pytest.mark.parametrize("signature", ["I->i", "l->i", "i->ii", "i->f", "ii,i->i"])
def test_host_signatures_other_than_i32_are_refused(signature: str) -> None:
    with pytest.raises(ValueError, match="a signature is like"):
        Guest(b"(module)", host=[Host(f=(signature, lambda *_: 0))], cache=False)


def test_two_hosts_can_not_provide_the_same_function() -> None:
    hosts = [Host(f=("->", lambda _: None)), Host(f=("->", lambda _: None))]
    with pytest.raises(GuestError, match=r"can't provide env::f"):
        Guest(b"(module)", host=hosts, cache=False)
    wasi_too = Host(poll_oneoff=("iiii->i", lambda *_: 0))
    wasi_too.name = "wasi_snapshot_preview1"
    with pytest.raises(GuestError, match="can't provide wasi_snapshot_preview1::poll_oneoff"):
        Guest(b"(module)", host=[wasi_too], cache=False)


# --- loading --------------------------------------------------------------------------------------


def test_the_interface_is_what_wasmtime_finds() -> None:
    """On a real guest, where wasmtime's own listing is known not to abort."""
    wasm = guest_path("classify_nn").path.read_bytes()
    module = wasmtime.Module(wasmtime.Engine(), wasm)

    def plain(kind: Any) -> str:
        if isinstance(kind, wasmtime.FuncType):
            given, back = ([str(t) for t in types] for types in (kind.params, kind.results))
            return f"({', '.join(given)}) -> ({', '.join(back)})"
        return type(kind).__name__.removesuffix("Type").lower()

    guest = Guest(wasm, host=[WasiNN()])
    assert guest.exports == tuple((e.name, plain(e.type)) for e in module.exports)
    assert guest.imports == tuple((i.module, i.name, plain(i.type)) for i in module.imports)
    assert dict(guest.exports)["infer"] == "(i32, i32) -> (i64)"


def test_imports_of_every_kind_are_listed() -> None:
    text = """(module
      (import "a" "t" (table 1 2 funcref)) (import "a" "m" (memory 1))
      (import "b" "g" (global (mut v128))) (import "b" "f" (func (param (ref null func) f32))))"""
    found = interface(bytes(wasmtime.wat2wasm(text)))
    assert [(m, n, str(kind)) for m, n, kind in found.imports] == [
        ("a", "t", "table"),
        ("a", "m", "memory"),
        ("b", "g", "global"),
        ("b", "f", "(funcref, f32) -> ()"),
    ]


def test_a_reference_in_its_long_form_is_read() -> None:
    """wasmtime takes this spelling of ``funcref``; its own assembler never writes it."""
    wasm = bytes.fromhex(
        "0061736d01000000 0107016002 6370 7f00 03020100 07050101660000 0a040102000b"
    )
    assert Guest(wasm, cache=False).exports == (("f", "(funcref, i32) -> ()"),)


@pytest.mark.parametrize(
    "sections",
    [
        b"\x01\x05\x01\x60\0\0",  # longer than the file
        b"\x01\x04\x01\x50\0\0",  # a type that is no function's
        b"\x01\x05\x01\x60\x01\x40\0",  # no value type
        b"\x07\x05\x01\x01a\0\x07",  # an export of a function that is not there
        b"\x07\x05\x01\x01\xff\x02\0",  # a name that is no text
        b"\x07\x05\x01\x01a\x09\0",  # an export of no known kind
        b"\x07\x0b" + b"\xff" * 11,  # a number longer than 64 bits
    ],
)
def test_an_interface_that_makes_no_sense_is_refused(sections: bytes) -> None:
    """wasmtime refuses such modules before; this must hold all the same."""
    with pytest.raises(GuestError, match="E2"):
        interface(b"\0asm\1\0\0\0" + sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('(import "wasi_ephemeral_nn" "load" (func))', "P3: .*::load.* wants WASI-NN"),
        ('(import "wasi_unstable" "fd_write" (func))', "E7: .*another WASI"),
        ('(import "wasi:cli/run@0.2.0" "run" (func))', "E7: .*another WASI"),
        ('(import "__wbindgen_placeholder__" "f" (func))', "E7: .*for a browser"),
        ('(import "env" "my_function" (func))', r"E5: .*env::my_function \(\).* undefined symbol"),
        ('(import "env" "memory" (memory 1))', "E5"),
        ('(import "wasi_snapshot_preview1" "no_such" (func))', "E5: .*no such function"),
        ('(import "wasi_snapshot_preview1" "proc_exit" (func))', r"E5: .*which is \(i32\)"),
        ('(import "wasi_snapshot_preview1" "proc_exit" (memory 1))', "E5: .*does not fit"),
        ('(func (export "_initialize") (param i32))', r"E5: _initialize must be a function \(\)"),
        ('(func (export "_start") (result i32) i32.const 1)', "E5: _start must be"),
        ('(memory (export "_start") 1)', "E5: _start must be"),
    ],
)
def test_guests_that_fit_no_host_are_refused_with_the_cause(text: str, message: str) -> None:
    with pytest.raises(GuestError, match=message):
        Guest(f"(module {text})".encode(), cache=False)


@pytest.mark.parametrize(
    "text",
    [
        '(memory (export "memory") i64 1)',
        "(memory 1) (memory 1)",
        '(memory (export "memory") 1 2 shared)',
        '(type $s (struct)) (func (export "f") (param (ref null $s)))',
        '(func (export "f") (param (ref func)))',
        '(func (export "f") (param anyref))',
        '(func (export "f") (param exnref))',
        '(tag (export "t") (param i32))',
    ],
)
def test_features_outside_of_the_abi_are_refused(text: str) -> None:
    """Some of them would abort the process in wasmtime's C API; others escape the limits."""
    with pytest.raises(GuestError, match="E2: not a valid WebAssembly module"):
        Guest(f"(module {text})".encode(), cache=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "E2: not WebAssembly"),
        (b"\0asm", "E2: not a valid"),
        (b"\0asm\x01\0\0\0\x01", "E2: not a valid"),
        (b"MZ\x90\0", "E2: not WebAssembly: the file begins with b'MZ"),
        (b"\0asm\x0d\0\x01\0", "E7: this is a WebAssembly component"),
        (b"(modul)", "E2: not valid WebAssembly text"),
        (b"(" * 200_000, "E2: not valid WebAssembly text"),
        (b"(module (func \xff))", "E2: not valid WebAssembly text"),
    ],
)
def test_bytes_that_are_no_module_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(GuestError, match=message) as caught:
        Guest(data, cache=False)
    assert len(str(caught.value)) < 2000


def test_a_guest_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "ü b.wasm"
    path.write_bytes(wasmtime.wat2wasm('(module (func (export "f") (result i32) i32.const 1))'))
    assert Guest(path, cache=False).instantiate().call("f") == 1
    assert Guest(str(path), cache=False).instantiate().call("f") == 1
    for missing in (tmp_path / "missing.wasm", tmp_path, "nul\0"):
        with pytest.raises(GuestError, match=r"cannot read the guest.*guest build"):
            Guest(missing)


SEED_MODULES = [
    bytes(wasmtime.wat2wasm(f'(module {PLAIN} (start $s) (func $s) (data (i32.const 8) "abc"))')),
    bytes(wasmtime.wat2wasm(forwarder({"wasi_snapshot_preview1": WASI}))),
]


@st.composite
def mutants(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Valid files, somewhat damaged: bytes changed, parts cut out or doubled, ends cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(0, 8))
        match draw(st.integers(0, 4)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = draw(st.binary(max_size=8))
            case _:
                del data[max(at, 8) :]
        if not data:
            break
    return bytes(data)


@settings(max_examples=300 * FUZZ, suppress_health_check=[HealthCheck.too_slow])
@given(mutants(SEED_MODULES) | st.binary(max_size=64).map(lambda tail: b"\0asm\1\0\0\0" + tail))
def test_damaged_modules_never_crash(wasm: bytes) -> None:
    limits = Limits(memory_bytes=1 << 20, seconds=0.02)
    with contextlib.suppress(GuestError):
        instance = Guest(wasm, cache=False).instantiate(limits=limits)
        for name, kind in instance.guest.exports:
            if kind.startswith("()"):
                instance.call(name)


@settings(max_examples=300 * FUZZ)
@given(mutants(SEED_MODULES) | st.binary(max_size=64))
def test_the_interface_of_damaged_modules_is_read_or_refused(wasm: bytes) -> None:
    with contextlib.suppress(GuestError):
        interface(wasm)


# --- WASI -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wasi() -> Guest:
    return Guest(forwarder({"wasi_snapshot_preview1": WASI}, pages=4), cache=False)


def write(instance: Instance, fd: int, data: bytes) -> None:
    heap = Heap(instance)
    vector = heap.put(struct.pack("<II", heap.put(data), len(data)))
    assert instance.call("fd_write", fd, vector, 1, heap.room(4)) == 0


def read(instance: Instance, fd: int, room: int = 1000) -> bytes:
    heap = Heap(instance)
    buffer, count = heap.room(room), heap.room(4)
    assert instance.call("fd_read", fd, heap.put(struct.pack("<II", buffer, room)), 1, count) == 0
    return instance.memory.read(buffer, heap.number(count))


def test_output_is_captured_up_to_its_limit(wasi: Guest) -> None:
    instance = wasi.instantiate(limits=Limits(output_bytes=10))
    write(instance, 1, b"out")
    write(instance, 2, b"\xff\0err")
    assert (instance.stdout, instance.stderr, instance.dropped_bytes) == (b"out", b"\xff\0err", 0)
    write(instance, 1, b"x" * 100_000)
    write(instance, 2, b"y" * 3)
    assert (instance.stdout, instance.stderr) == (b"outxxxxxxx", b"\xff\0erryyy")
    assert instance.dropped_bytes == 100_000 - 7
    silent = wasi.instantiate(limits=Limits(output_bytes=0))
    write(silent, 1, b"out")
    assert (silent.stdout, silent.dropped_bytes) == (b"", 3)


def test_an_error_quotes_what_the_guest_said_last(wasi: Guest) -> None:
    module = forwarder({"wasi_snapshot_preview1": WASI}, more='(func (export "trap") unreachable)')
    instance = Guest(module, cache=False).instantiate()
    write(instance, 2, b"panicked at 'no luck'")
    with pytest.raises(GuestError, match=r"unreachable.*panicked at 'no luck'"):
        instance.call("trap")


@pytest.mark.parametrize("data", [b"", b"\0a\n\xff" * 500])
def test_standard_input_is_the_given_bytes_and_nothing_else(wasi: Guest, data: bytes) -> None:
    instance = wasi.instantiate(stdin=data)
    got = b"".join(iter(lambda: read(instance, 0), b""))
    assert got == data
    assert read(instance, 0) == b""


def strings(instance: Instance, what: str) -> list[bytes]:
    heap = Heap(instance)
    count, size = heap.room(4), heap.room(4)
    assert instance.call(f"{what}_sizes_get", count, size) == 0
    pointers, text = heap.room(4 * heap.number(count)), heap.room(heap.number(size))
    assert instance.call(f"{what}_get", pointers, text) == 0
    return instance.memory.read(text, heap.number(size)).split(b"\0")[:-1]


def test_arguments_and_environment_are_the_given_ones(wasi: Guest) -> None:
    instance = wasi.instantiate(args=["--näme", "a b", ""], env={"KEY": "välue=1", "EMPTY": ""})
    assert strings(instance, "args") == [b"guest", "--näme".encode(), b"a b", b""]
    assert strings(instance, "environ") == ["KEY=välue=1".encode(), b"EMPTY="]
    bare = wasi.instantiate()
    assert strings(bare, "args") == [b"guest"]
    assert strings(bare, "environ") == []  # nothing of the host's


@pytest.mark.parametrize(
    "values",
    [
        {"args": ["a\0b"]},
        {"env": {"a\0": "b"}},
        {"env": {"a": "b\0"}},
        {"dirs": {"/x\0": "/"}},
        {"dirs": {"/x": "/\0etc"}},
    ],
)
def test_nul_characters_are_refused_instead_of_cutting(wasi: Guest, values: Any) -> None:
    with pytest.raises(ValueError, match="NUL"):
        wasi.instantiate(**values)


@pytest.mark.parametrize("code", [0, 1, 125])
def test_a_command_ends_with_its_exit_code(wasi: Guest, code: int) -> None:
    more = f'(func (export "_start") (call $proc_exit (i32.const {code})))'
    command = Guest(forwarder({"wasi_snapshot_preview1": WASI}, more=more), cache=False)
    assert command.instantiate().run() == code
    with pytest.raises(GuestError, match=f"exited with code {code}.*run"):
        command.instantiate().call("_start")
    instance = command.instantiate()
    instance.run()
    with pytest.raises(GuestError, match=f"exited with code {code}"):
        instance.run()


def test_a_command_that_returns_ends_with_zero_and_one_that_is_none_is_refused() -> None:
    command = Guest(b'(module (memory (export "memory") 1) (func (export "_start")))', cache=False)
    assert command.instantiate().run() == 0
    with pytest.raises(GuestError, match=r"E5.*'_start'"):
        Guest(b"(module)", cache=False).instantiate().run()


def test_exits_at_odd_places_are_errors(wasi: Guest) -> None:
    wasi_1 = {"wasi_snapshot_preview1": WASI}
    quits = "(func $quit (call $proc_exit (i32.const 3)))"
    for place in ("(start $quit)", '(export "_initialize" (func $quit))'):
        guest = Guest(forwarder(wasi_1, more=quits + place), cache=False)
        with pytest.raises(GuestError, match="exited with code 3"):
            guest.instantiate()
    for code in (126, 2**32 - 1):
        with pytest.raises(GuestError, match="invalid exit status"):
            wasi.instantiate().call("proc_exit", code)


def poll(instance: Instance, *subscriptions: tuple[int, int, int, int]) -> tuple[int, list[Any]]:
    """Wait for (userdata, kind, nanoseconds, flags); return the errno and (userdata, errno)s."""
    heap = Heap(instance)
    packed = (struct.pack("<QB7xI4xQQH6x", u, k, 1, t, 0, f) for u, k, t, f in subscriptions)
    wanted = heap.put(b"".join(packed))
    events, total = heap.room(32 * len(subscriptions)), heap.room(4)
    errno: int = instance.call("poll_oneoff", wanted, events, len(subscriptions), total)
    read = [instance.memory.read(events + 32 * k, 32) for k in range(heap.number(total))]
    return errno, [struct.unpack("<QHB21x", event)[:2] for event in read]


def test_a_guest_can_sleep(wasi: Guest) -> None:
    instance = wasi.instantiate()
    start = time.monotonic()
    assert poll(instance, (7, 0, 50_000_000, 0), (8, 0, 10**18, 0)) == (0, [(7, 0)])
    assert time.monotonic() - start >= 0.05
    nothing_known = ((1, 1, 0, 0), (2, 0, 0, 1), (3, 0, 10**18, 0))
    assert poll(instance, *nothing_known) == (0, [(1, 58), (2, 58)])
    assert poll(instance, (4, 0, 0, 0), (5, 0, 0, 0)) == (0, [(4, 0), (5, 0)])


def test_sleep_ends_at_the_time_limit_and_at_ctrl_c(
    wasi: Guest, handler: Callable[..., None]
) -> None:
    start = time.monotonic()
    with pytest.raises(LimitError, match=r"longer than 0\.05 s"):
        poll(wasi.instantiate(limits=Limits(seconds=0.05)), (0, 0, 20 * 10**9, 0))
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Interrupt):
        poll(wasi.instantiate(), (0, 0, 20 * 10**9, 0))
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("arguments", "errno"),
    [
        ((64, 256, 0, 32), 28),
        ((64, 256, 1025, 32), 28),
        ((64, 256, 2**32 - 1, 32), 28),
        ((2**32 - 1, 256, 1, 32), 21),
        ((4 * PAGE - 47, 256, 1, 32), 21),
        ((64, 4 * PAGE - 31, 1, 32), 21),
        ((64, 256, 1, 4 * PAGE - 3), 21),
    ],
)
def test_sleep_with_wrong_pointers_is_an_error_code(
    wasi: Guest, arguments: tuple[int, ...], errno: int
) -> None:
    assert wasi.instantiate().call("poll_oneoff", *arguments) == errno


def test_constructors_run_once_before_the_first_call() -> None:
    text = b"""(module (memory (export "memory") 1)
      (func (export "_initialize") (i32.store8 (i32.const 0)
        (i32.add (i32.load8_u (i32.const 0)) (i32.const 1)))))"""
    assert Guest(text, cache=False).instantiate().memory.read(0, 1) == b"\x01"


SUCCESS, BAD_FD, NOT_PERMITTED = 0, 8, 63
RIGHTS_READ, RIGHTS_WRITE = 1 << 1, 1 << 6
CREATE, TRUNCATE = 1, 8


class Folder:
    """A guest's view of its first pre-opened folder."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def open(self, path: str, rights: int = RIGHTS_READ, flags: int = 0) -> tuple[int, int]:
        heap = Heap(self.instance)
        name, out = path.encode(), heap.room(4)
        errno: int = self.instance.call(
            "path_open", 3, 1, heap.put(name), len(name), flags, rights, rights, 0, out
        )
        return errno, heap.number(out)


def test_nothing_is_open_unless_asked_for(wasi: Guest, tmp_path: Path) -> None:
    instance = wasi.instantiate()
    assert instance.call("fd_prestat_get", 3, 64) == BAD_FD
    assert Folder(instance).open("etc/passwd")[0] == BAD_FD
    for missing in (tmp_path / "missing", Path(__file__), "bad\udcff"):
        with pytest.raises(GuestError, match="cannot pre-open"):
            wasi.instantiate(dirs={"/": missing})


def test_an_open_folder_can_be_read(wasi: Guest, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"content")
    instance = wasi.instantiate(dirs={"/data": tmp_path})
    errno, fd = Folder(instance).open("sub/file")
    assert errno == SUCCESS
    assert read(instance, fd) == b"content"


def test_an_open_folder_can_not_be_changed(wasi: Guest, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    instance = wasi.instantiate(dirs={"/data": tmp_path})
    folder, heap = Folder(instance), Heap(instance, 2048)
    assert folder.open("file", RIGHTS_READ | RIGHTS_WRITE)[0] == NOT_PERMITTED
    assert folder.open("file", RIGHTS_READ, TRUNCATE)[0] == NOT_PERMITTED
    assert folder.open("new", RIGHTS_WRITE, CREATE)[0] == NOT_PERMITTED
    name, new = heap.put(b"file"), heap.put(b"new_")
    assert instance.call("path_create_directory", 3, new, 4) == NOT_PERMITTED
    assert instance.call("path_unlink_file", 3, name, 4) == NOT_PERMITTED
    assert instance.call("path_rename", 3, name, 4, 3, new, 4) == NOT_PERMITTED
    _, fd = folder.open("file")
    vector = heap.put(struct.pack("<II", name, 4))
    assert instance.call("fd_write", fd, vector, 1, heap.room(4)) != SUCCESS
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"content"}


def test_an_open_folder_is_no_way_out(wasi: Guest, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "up").symlink_to("..")
    folder = Folder(wasi.instantiate(dirs={"/": inside}))
    for path in ("../secret", "link", "up/secret", "/etc/passwd", "./../inside/../secret"):
        assert folder.open(path)[0] != SUCCESS, path


@settings(max_examples=100 * FUZZ)
@given(
    st.sampled_from([name for name in WASI if name != "proc_exit"]),
    st.lists(
        st.sampled_from([0, 1, 3, 64, PAGE * 4 - 1, PAGE * 4, 2**31, 2**32 - 1])
        | st.integers(0, 2**32 - 1),
        min_size=9,
        max_size=9,
    ),
)
def test_wild_wasi_calls_give_an_error_code_or_a_trap(
    wasi: Guest, name: str, values: list[int]
) -> None:
    limits = Limits(output_bytes=100, seconds=0.5)
    instance = wasi.instantiate(stdin=b"input", args=["a"], limits=limits)
    arity = len(WASI[name].partition("->")[0])
    with contextlib.suppress(GuestError):
        assert 0 <= instance.call(name, *values[:arity]) <= 76


def test_python_exits_quietly_after_a_guest_printed() -> None:
    """A worker thread of the runtime must not need the interpreter when the store ends."""
    script = (
        "from edgelab.build import guest_path; from edgelab.runtime import Guest; "
        "i = Guest(guest_path('cli').path).instantiate(); assert i.run() == 2; assert i.stderr"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
