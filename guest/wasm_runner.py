"""Runs a WASI command in wasmtime: `wasm_runner.py PROGRAM.wasm ARGUMENTS...`.

For `cargo test --target wasm32-wasip1`, which starts test programs through the command in
CARGO_TARGET_WASM32_WASIP1_RUNNER. Needs the Python package `wasmtime` only.
"""

import sys

from wasmtime import Engine, ExitTrap, Func, Linker, Module, Store, WasiConfig


def main(program: str, *arguments: str) -> int:
    """Run the program without any file, with this process's stdin, stdout and stderr."""
    wasi = WasiConfig()
    wasi.argv = [program, *arguments]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    engine = Engine()
    linker = Linker(engine)
    linker.define_wasi()
    store = Store(engine)
    store.set_wasi(wasi)
    start = linker.instantiate(store, Module.from_file(engine, program)).exports(store)["_start"]
    assert isinstance(start, Func)
    try:
        start(store)
    except ExitTrap as trap:
        return trap.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
