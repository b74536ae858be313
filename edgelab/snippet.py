"""Pieces of Rust: show one from the guests' sources, or compile one to Wasm.

Lessons use both. `excerpt` reads the file each time, so a lesson never shows code that has moved
on; `compile_rust` turns a few lines into a module without a crate of your own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgelab.errors import BuildError, EdgelabError
from edgelab.paths import cache_dir, locked, source_root, write_atomic
from edgelab.toolchain import TARGET, find

RELEASE: Mapping[str, object] = {
    "opt-level": 3,
    "lto": True,
    "codegen-units": 1,
    "strip": True,
    "panic": "abort",
}
"""The release profile of the guests, in ``guest/Cargo.toml``."""

_CARGO = """\
[package]
name = "snippet"
version = "0.0.0"
edition = "2024"

[lib]
crate-type = ["cdylib"]

[workspace]

[profile.release]
"""


def compile_rust(
    source: str,
    *,
    profile: Mapping[str, object] = RELEASE,
    target: str = TARGET,
    rustflags: Sequence[str] = (),
) -> bytes:
    """Compile one file of Rust, without dependencies, to a WebAssembly module.

    Takes about a second; the same call again, a tenth of it.

    Parameters
    ----------
    source : str
        The text of ``lib.rs`` (edition 2024).
    profile : mapping
        Keys of Cargo's release profile.
    target : str
        Target triple.
    rustflags : sequence of str
        What rustc is called with, beside what the profile says.

    Returns
    -------
    bytes
        The module: a cdylib that exports what is ``#[unsafe(no_mangle)] pub extern "C"``.

    Raises
    ------
    BuildError
        If it does not compile; the message holds what the compiler says.
    ToolchainError
        If there is no Rust here.
    """
    manifest = _CARGO + "".join(f"{key} = {_toml(value)}\n" for key, value in profile.items())
    name = hashlib.sha256(f"{manifest}\0{source}".encode()).hexdigest()[:16]
    crate = cache_dir() / "snippets" / name
    with locked(crate.with_name(".lock")):
        write_atomic(crate / "Cargo.toml", manifest.encode())
        if not (crate / "src" / "lib.rs").exists():  # a new time would make cargo build again
            write_atomic(crate / "src" / "lib.rs", source.encode())
        toolchain = find(crate)
        flags = ["build", "--release", "--offline", "--color=never", "--target", target]
        if rustflags:
            flags += ["--config", f"target.{target}.rustflags={json.dumps(list(rustflags))}"]
        done = toolchain.run(flags, crate, title="cargo builds a snippet")
        if done.returncode:
            raise BuildError(_explain(done.stdout, target))
        return (toolchain.target_dir(crate) / target / "release" / "snippet.wasm").read_bytes()


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, (bool, int)) else f'"{value}"'


def _explain(output: str, target: str) -> str:
    start = output.find("error")
    shown = "\n".join(output[max(start, 0) :].strip().splitlines()[:20])
    if "could not find specification" in output:
        return (
            f"E1: this Rust knows no target {target}. Cure: --target {TARGET}. The compiler "
            f"said:\n{shown}"
        )
    if re.search(r"can't find crate for `(core|std)`", output):
        return (
            f"P1, E1: Rust has no standard library for {target} here. Cure: "
            f"rustup target add {target}. The compiler said:\n{shown}"
        )
    return f"the snippet does not compile. Mend what the compiler names:\n{shown}"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A piece of a source file.

    Attributes
    ----------
    path : str
        Relative to ``guest/``.
    first_line : int
        Its first line's number, from 1.
    text : str
    """

    path: str
    first_line: int
    text: str

    def __repr__(self) -> str:
        return f"guest/{self.path}, line {self.first_line}:\n{self.text}"

    def _repr_markdown_(self) -> str:
        language = "toml" if self.path.endswith(".toml") else "rust"
        head = f"`guest/{self.path}`, line {self.first_line}"
        return f"{head}\n```{language}\n{self.text}\n```"


def excerpt(path: str, start: str) -> Excerpt:
    """Return one item of a guest's source: a function, a type, a section of a TOML file.

    Parameters
    ----------
    path : str
        The file, relative to ``guest/``, such as ``"classify/src/abi.rs"``.
    start : str
        What the item's first line holds, such as ``"fn alloc("`` or ``"[profile.release]"``.

    Returns
    -------
    Excerpt
        From the comments and attributes above that line to the item's end.

    Raises
    ------
    EdgelabError
        If the file or the line is not there.
    """
    root = source_root()
    if root is None:
        raise EdgelabError(
            "The guests' sources are not part of an installed edgelab. Cure: run in a checkout."
        )
    try:
        lines = (root / "guest" / path).read_text(encoding="utf-8").splitlines()
        found = next(i for i, line in enumerate(lines) if start in line)
    except (OSError, StopIteration):
        raise EdgelabError(f"guest/{path} has no line with {start!r}") from None
    first = found
    while first > 0 and re.match(r"\s*(#|//)", lines[first - 1]):
        first -= 1
    last = _item_end(lines, found)
    return Excerpt(path, first + 1, "\n".join(lines[first : last + 1]))


def _item_end(lines: list[str], start: int) -> int:
    """Last line of the item: rustfmt puts its closing brace where its first line begins."""
    if lines[start].startswith("["):  # TOML: up to the next empty line
        rest = range(start, len(lines))
        return next((i - 1 for i in rest if not lines[i].strip()), len(lines) - 1)
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    for i in range(start, len(lines)):
        if lines[i].startswith(f"{indent}}}") or (i == start and lines[i].endswith((";", "}"))):
            return i
    return start
