"""Solutions of lesson 03."""

# %% 03-break-even
# With AOT n starts take once + n * with_aot, without it n * without. The first is smaller when
# n > once / (without - with_aot). The next whole number above that is floor + 1, also where the
# quotient is whole: there both are equal, and nothing is saved yet.
import math


def break_even(once, with_aot, without):
    if without <= with_aot:
        return math.inf
    return math.floor(once / (without - with_aot)) + 1


# %% 03-reasons
# A set, because one file may have several faults. Features are compared as sets too: code may use
# less than the CPU has, but not more.


def reasons(artifact, here):
    found = set()
    if artifact.machine != here.machine and not artifact.machine.startswith("pulley"):
        found.add("P5")
    if artifact.wasmtime != here.wasmtime:
        found.add("E6")
    if set(artifact.features) - set(here.features):
        found.add("E10")
    return found


# %% 03-key
# The repr of a frozen dataclass names all its fields. A hash makes a short file name of it. Python's
# own hash() won't do: for bytes and text it is another one in each process.
import hashlib


def key(wasm, config, here):
    return hashlib.sha256(repr((wasm, config, here)).encode()).hexdigest()
