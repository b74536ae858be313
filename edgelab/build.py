"""Build the guests: Rust sources to .wasm files whose origin can be checked.

`guest_path` is what the rest of the package calls. In a checkout it builds what is not up to date;
in an installed wheel it returns the guest that the package ships.

``python -m edgelab.build`` builds all guests; with ``--ship`` it also renews the shipped ones.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgelab.errors import BuildError, EdgelabError
from edgelab.paths import PACKAGE, locked, source_root, write_atomic
from edgelab.toolchain import MIN_RUST, TARGET, Toolchain, find, say, source_files


@dataclass(frozen=True)
class Recipe:
    """How a guest is built.

    Attributes
    ----------
    workspace : str
        Its workspace, as a folder in ``guest``; empty for ``guest`` itself.
    uses : tuple of str
        What it takes from ``guest`` beside that: folders and files. They count as its sources.
    min_rust : (int, int)
        The oldest Rust that builds it.
    shipped : bool
        The package ships it, and it is built by default.
    component : bool
        What cargo makes is a core module, and the program ``componentize`` in its workspace makes a
        component of it.
    package : str
        The crate; empty if it has the guest's name.
    native : bool
        It is no Wasm but code of this machine, and its file ends as such a file does here.
    program : bool
        It is a program; for native code, whose others are libraries.
    rustflags : tuple of str
        What rustc is called with, beside what all are.
    names : bool
        The module keeps the names of its functions.
    """

    workspace: str = ""
    uses: tuple[str, ...] = ()
    min_rust: tuple[int, int] = MIN_RUST
    shipped: bool = True
    component: bool = False
    package: str = ""
    native: bool = False
    program: bool = False
    rustflags: tuple[str, ...] = ()
    names: bool = False


_CLASSIFY = ("Cargo.toml", "classify", "imgproc", "inference")  # the crate with its dependencies
RECIPES = {
    "classify": Recipe(),
    "classify_nn": Recipe(),
    "cli": Recipe(),
    "classify_tract": Recipe("classify_tract", _CLASSIFY, (1, 91), shipped=False),
    # The model inside a WASI command, and natively: for `edgelab.rivals`. The same parts as above
    # though it uses none, so that cargo compiles tract once for both.
    "tract_cli": Recipe("classify_tract", _CLASSIFY, (1, 91), shipped=False),
    "tract_cli_native": Recipe(
        "classify_tract",
        _CLASSIFY,
        (1, 91),
        shipped=False,
        package="tract_cli",
        native=True,
        program=True,
    ),
    "cli_native": Recipe(shipped=False, package="cli", native=True, program=True),
    "component": Recipe("component", shipped=False, component=True),
    # The kernels, bare, for `edgelab.kernels`: as the guests have them; by a compiler that may use
    # vectors everywhere; and as native code.
    "study": Recipe(shipped=False, names=True),
    "study_vectorised": Recipe(
        shipped=False, package="study", rustflags=("-Ctarget-feature=+simd128",), names=True
    ),
    "study_native": Recipe(shipped=False, package="study", native=True),
}
"""The guests, by name, and what is built like them."""

GUESTS = tuple(name for name, recipe in RECIPES.items() if recipe.shipped)
"""The names of those that the package ships."""

FLAGS = ("build", "--release", "--locked", "--target", TARGET)
"""What cargo is called with, for most. The rest is in the workspace's ``Cargo.toml``."""

_LIBRARIES = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}
_PREFIX, _SUFFIX = _LIBRARIES.get(sys.platform, ("lib", ".so"))
_PROGRAM = ".exe" if sys.platform == "win32" else ""

_SHIPPED = PACKAGE / "_prebuilt"


class StalePrebuilt(UserWarning):
    """The shipped guest is used, and it was not built from the sources beside it."""


@dataclass(frozen=True)
class Provenance:
    """Where a guest comes from.

    Attributes
    ----------
    toolchain : str
        The kind of `edgelab.toolchain.Toolchain` that built it, or ``prebuilt``.
    rustc : str
        The compiler, as ``rustc --version`` names it.
    flags : tuple of str
        What cargo was called with.
    source_hash : str
        The `source_hash` of the sources it was built from.
    """

    toolchain: str
    rustc: str
    flags: tuple[str, ...]
    source_hash: str


@dataclass(frozen=True)
class BuiltGuest:
    """A guest on disk, its bytes checked against its provenance.

    Attributes
    ----------
    name : str
        One of `RECIPES`.
    path : Path
        The .wasm file.
    size_bytes : int
        Its size.
    sha256 : str
        The SHA-256 of its bytes, in hexadecimal.
    provenance : Provenance
        Where it comes from.
    """

    name: str
    path: Path
    size_bytes: int
    sha256: str
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def _repr_html_(self) -> str:
        rows = {
            "guest": self.name,
            "size": f"{self.size_bytes / 1000:.1f} kB",
            "sha256": self.sha256,
            "toolchain": self.provenance.toolchain,
            "compiler": self.provenance.rustc,
        }
        cells = (f"<tr><th>{key}</th><td>{html.escape(row)}</td></tr>" for key, row in rows.items())
        return f"<table>{''.join(cells)}</table>"


def source_hash(source: Path, name: str = "classify") -> str:
    """Return a hash of what a guest is built from: its workspace, and what it uses beside it.

    Neither line ends nor times matter.

    Parameters
    ----------
    source : Path
        The folder ``guest``.
    name : str
        One of `RECIPES`.

    Returns
    -------
    str
        A SHA-256 in hexadecimal over the relative paths and contents of
        `edgelab.toolchain.source_files`.
    """
    total = hashlib.sha256()
    parts = (source / part for part in (RECIPES[name].workspace, *RECIPES[name].uses))
    found = (path for part in parts for path in (source_files(part) if part.is_dir() else [part]))
    files = {path.relative_to(source).as_posix(): path for path in found}
    for relative, path in sorted(files.items()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{relative}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def flags_of(name: str) -> tuple[str, ...]:
    """Return what cargo is called with for one of `RECIPES`, and rustc where that is special."""
    return (*_cargo_flags(name), *RECIPES[name].rustflags)


def _cargo_flags(name: str) -> tuple[str, ...]:
    recipe = RECIPES[name]
    flags = tuple(f for f in FLAGS if f not in ("--target", TARGET)) if recipe.native else FLAGS
    names = ("--config", 'profile.release.strip="debuginfo"') if recipe.names else ()
    return (*flags, *names)


def _output(name: str, source: Path) -> Path:
    recipe = RECIPES[name]
    suffix = (_PROGRAM if recipe.program else _SUFFIX) if recipe.native else ".wasm"
    return source / "build" / f"{name}{suffix}"


def guest_path(name: str) -> BuiltGuest:
    """Return a guest that is ready to run.

    In a checkout it is built if its sources changed: in less than a minute, or, for
    ``classify_tract``, in some minutes. In an installed wheel it is the shipped one.

    Parameters
    ----------
    name : str
        One of `RECIPES`.

    Returns
    -------
    BuiltGuest
        The guest; its file's SHA-256 is checked.

    Raises
    ------
    BuildError
        The name is unknown, the build failed, the Rust here is too old for this guest, or the
        shipped guest is missing, stale or damaged.
    ToolchainError
        ``EDGELAB_TOOLCHAIN`` forces a toolchain that is impossible here.
    """
    _check_names([name])
    root = source_root()
    if root is None:
        return _shipped(name)
    return _make([name], root / "guest", retry=False)[name]


def ready_guest(name: str) -> BuiltGuest | None:
    """Return a guest if it is ready to run. Unlike `guest_path`, this never builds.

    Parameters
    ----------
    name : str
        One of `RECIPES`.

    Returns
    -------
    BuiltGuest or None
        The guest; None in a checkout whose guest is not built or not up to date, and where it
        would have to be shipped and is not.

    Raises
    ------
    BuildError
        The name is unknown, or the shipped guest is needed and is missing or damaged.
    """
    _check_names([name])
    root = source_root()
    if root is None or os.environ.get("EDGELAB_TOOLCHAIN") == "prebuilt":
        return _shipped(name) if RECIPES[name].shipped else None
    return _up_to_date([name], root / "guest", _hashes([name], root / "guest")).get(name)


def build(names: Iterable[str] = GUESTS, *, source: Path | None = None) -> dict[str, BuiltGuest]:
    """Build guests from their sources, unless they are up to date.

    Each is copied to ``build/NAME.wasm`` in `source`, with its provenance in
    ``build/NAME.json``. Without a Rust, the shipped guest is copied there, if it was built from
    exactly these sources.

    Parameters
    ----------
    names : iterable of str
        The guests. Default: those that the package ships.
    source : Path, optional
        The folder of the workspaces. Default: ``guest`` of this checkout.

    Returns
    -------
    dict of str to BuiltGuest
        One entry for each name.

    Raises
    ------
    BuildError
        A name is unknown, there are no sources, cargo failed (the message ends with its last
        lines), the Rust here is too old, or there is no Rust and the shipped guest is stale.
    ToolchainError
        ``EDGELAB_TOOLCHAIN`` forces a toolchain that is impossible here.

    Warns
    -----
    StalePrebuilt
        ``EDGELAB_TOOLCHAIN=prebuilt`` forces a shipped guest that is stale.
    """
    names = tuple(names)
    _check_names(names)
    if source is None:
        root = source_root()
        if root is None:
            raise BuildError(
                "This edgelab is installed without the guests' sources, so there is nothing to "
                "build. Cure: use edgelab.build.guest_path(), or run in a checkout of the project."
            )
        source = root / "guest"
    return _make(names, source.absolute(), retry=True)


def ship(destination: Path = _SHIPPED) -> dict[str, BuiltGuest]:
    """Build the guests and renew those that the package ships, with their manifest.

    Parameters
    ----------
    destination : Path
        The folder to write to.

    Returns
    -------
    dict of str to BuiltGuest
        The guests that were copied.

    Raises
    ------
    BuildError
        There is no Rust to build with, or a guest holds a path of this machine.
    """
    guests = build()
    manifest = {}
    for name, guest in sorted(guests.items()):
        wasm = guest.path.read_bytes()
        if guest.provenance.toolchain == "prebuilt":
            raise BuildError("Shipping needs a fresh build, and no Rust was found to make one.")
        for private in (Path.home(), PACKAGE.parent):
            if f"{private}{os.sep}".encode() in wasm:
                raise BuildError(
                    f"{guest.path} holds the path {private} of this machine: not shipped."
                )
        write_atomic(destination / f"{name}.wasm", wasm)
        manifest[name] = {
            "sha256": guest.sha256,
            "size_bytes": guest.size_bytes,
            "source_hash": guest.provenance.source_hash,
            "rustc": guest.provenance.rustc,
            "flags": guest.provenance.flags,
        }
    write_atomic(destination / "manifest.json", _json(manifest))
    return guests


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in RECIPES:
            raise BuildError(f"There is no guest {name!r}. The guests are {', '.join(RECIPES)}.")


def _load(name: str, wasm: Path, facts: Any) -> BuiltGuest:
    """Return the guest that `facts` describe; ValueError or OSError if the file is not that one."""
    content = wasm.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        expected = facts["sha256"]
        provenance = Provenance(
            facts["toolchain"], facts["rustc"], tuple(facts["flags"]), facts["source_hash"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its provenance is incomplete ({error!r})") from None
    if sha256 != expected:
        raise ValueError(f"its SHA-256 is {sha256}, not {expected}")
    return BuiltGuest(name, wasm, len(content), sha256, provenance)


def _hashes(names: Iterable[str], source: Path) -> dict[str, str]:
    for folder in {source / RECIPES[name].workspace for name in names}:
        if not (folder / "Cargo.toml").is_file():
            raise BuildError(f"{folder} is no Rust workspace: it holds no Cargo.toml.")
    return {name: source_hash(source, name) for name in names}


def _up_to_date(
    names: Sequence[str], source: Path, sources: Mapping[str, str]
) -> dict[str, BuiltGuest]:
    """Return those guests in the ``build`` folder that need no new build."""
    forced = os.environ.get("EDGELAB_TOOLCHAIN")
    found = {}
    for name in names:
        wasm = _output(name, source)
        try:
            guest = _load(name, wasm, json.loads(wasm.with_suffix(".json").read_bytes()))
        except (OSError, ValueError):  # missing, half written, or changed by hand
            continue
        made = guest.provenance
        same = (made.source_hash, made.flags) == (sources[name], flags_of(name))
        if same and (not forced or made.toolchain == forced):
            found[name] = guest
    return found


def _make(names: Sequence[str], source: Path, *, retry: bool) -> dict[str, BuiltGuest]:
    """Return guests that are up to date, after building those that are not.

    With `retry`, a Rust is looked for again where the shipped guest took its place.
    """
    sources = _hashes(names, source)
    if os.environ.get("EDGELAB_TOOLCHAIN") == "prebuilt":
        return {name: _warn_if_stale(_shipped(name), sources[name]) for name in names}

    def ready() -> dict[str, BuiltGuest]:
        found = _up_to_date(names, source, sources)
        return {
            name: guest
            for name, guest in found.items()
            if not (retry and guest.provenance.toolchain == "prebuilt")
        }

    guests = ready()
    if len(guests) == len(set(names)):
        return guests
    folder = source / "build"
    try:
        with locked(folder / ".lock"):
            guests = ready()  # another process may have built them meanwhile
            missing = [name for name in names if name not in guests]
            for workspace in dict.fromkeys(RECIPES[name].workspace for name in missing):
                group = [name for name in missing if RECIPES[name].workspace == workspace]
                guests |= _build(group, source, sources)
            return {name: guests[name] for name in names}
    except OSError as error:
        raise BuildError(
            f"The guests can't be written to {folder}: {error}. Cure: make that folder writable, "
            "or use the shipped guests with EDGELAB_TOOLCHAIN=prebuilt."
        ) from error


def _shipped(name: str) -> BuiltGuest:
    if not RECIPES[name].shipped:
        raise BuildError(
            f"The package does not ship the guest {name!r}. Cure: in a checkout, "
            f"without EDGELAB_TOOLCHAIN, run `python -m edgelab guest build {name}`."
        )
    wasm = _SHIPPED / f"{name}.wasm"
    try:
        manifest = json.loads((_SHIPPED / "manifest.json").read_bytes())
        return _load(name, wasm, {**manifest[name], "toolchain": "prebuilt"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"The shipped guest {wasm} is missing or damaged: {error}. "
            "Cure: install edgelab again; in a checkout run `python -m edgelab.build --ship`."
        ) from error


def _stale(guest: BuiltGuest, sources: str) -> str | None:
    if guest.provenance.source_hash == sources:
        return None
    return (
        f"The shipped guest {guest.name!r} is stale: it was built from sources "
        f"{guest.provenance.source_hash[:12]}, and those beside it are {sources[:12]}."
    )


def _warn_if_stale(guest: BuiltGuest, sources: str) -> BuiltGuest:
    if message := _stale(guest, sources):
        cure = "Cure: unset EDGELAB_TOOLCHAIN to build from the sources."
        warnings.warn(f"{message} {cure}", StalePrebuilt, stacklevel=3)
    return guest


def _build(names: Sequence[str], source: Path, sources: Mapping[str, str]) -> dict[str, BuiltGuest]:
    """Build guests of one workspace."""
    workspace = source / RECIPES[names[0]].workspace
    toolchain = _separate(find(workspace), names[0])
    for name in names:
        _require_rust(name, toolchain)
    say(f"building {', '.join(names)} with Rust {toolchain}")
    for kind, why_not in toolchain.tried:
        say(f"  (not {kind}: {why_not})")
    failed_fetch = _fetch(workspace, toolchain) if toolchain.cargo else ""
    built = {}
    for name in names:
        if toolchain.kind == "prebuilt":
            guest = _shipped(name)
            if message := _stale(guest, sources[name]):
                reasons = " ".join(f"{kind}: {why_not}" for kind, why_not in toolchain.tried)
                raise BuildError(
                    f"{message} It is not used, and there is no Rust to build with. {reasons} "
                    "Or use the stale guest all the same with EDGELAB_TOOLCHAIN=prebuilt."
                )
            wasm, made = guest.path.read_bytes(), guest.provenance
        else:
            wasm = _cargo_build(name, workspace, toolchain, failed_fetch)
            made = Provenance(toolchain.kind, toolchain.rustc, flags_of(name), sources[name])
        path = _output(name, source)
        sha256 = hashlib.sha256(wasm).hexdigest()
        write_atomic(path, wasm)
        if RECIPES[name].native and RECIPES[name].program:
            path.chmod(0o755)
        facts = {"sha256": sha256, "size_bytes": len(wasm), **asdict(made)}
        write_atomic(path.with_suffix(".json"), _json(facts))
        built[name] = BuiltGuest(name, path, len(wasm), sha256, made)
    return built


def _separate(toolchain: Toolchain, name: str) -> Toolchain:
    """Keep a workspace's files apart where the user has one target folder for everything.

    cargo gives a crate's .wasm one name, whatever the flags: ``classify`` as another workspace
    builds it would take the place of our own.
    """
    shared, workspace = toolchain.env.get("CARGO_TARGET_DIR"), RECIPES[name].workspace
    if not shared or not workspace:
        return toolchain
    own = str(Path(shared, workspace))
    return replace(toolchain, env={**toolchain.env, "CARGO_TARGET_DIR": own})


def _require_rust(name: str, toolchain: Toolchain) -> None:
    recipe = RECIPES[name]
    if recipe.native and toolchain.root is not None:
        kind = "program" if recipe.program else "library"
        raise BuildError(
            f"{name} is a {kind} for this machine, and the Rust here ({toolchain.kind}) lives in "
            "another Debian, whose libraries do not fit. Cure: install Rust from rustup.rs."
        )
    wanted = ".".join(map(str, recipe.min_rust))
    if toolchain.kind == "prebuilt":
        if recipe.shipped:
            return
        reasons = " ".join(f"{kind}: {why_not}" for kind, why_not in toolchain.tried)
        raise BuildError(
            f"The guest {name!r} needs Rust {wanted} or newer, and there is none. {reasons} (The "
            "package does not ship this guest.)"
        )
    number = re.match(r"rustc (\d+)\.(\d+)", toolchain.rustc)
    if number is None or (int(number[1]), int(number[2])) < recipe.min_rust:
        raise BuildError(
            f"The guest {name!r} needs Rust {wanted} or newer, and here is {toolchain.rustc} "
            f"({toolchain.kind}). Cure: rustup update stable, or install Rust from rustup.rs. The "
            "other guests can be built with what is here."
        )


def _fetch(source: Path, toolchain: Toolchain) -> str:
    """Get the crates that are not on this machine; return cargo's output if that failed."""
    fetch = ["fetch", "--locked", "--target", TARGET]
    # Without network, cargo tries for 10 s; so ask first what is here.
    title = "cargo looks for the guests' crates"
    if toolchain.run([*fetch, "--offline"], source, title=title).returncode == 0:
        return ""
    done = toolchain.run(fetch, source, title="cargo downloads the guests' crates")
    return done.stdout if done.returncode else ""


def _cargo_build(name: str, source: Path, toolchain: Toolchain, failed_fetch: str) -> bytes:
    # One call for each guest: in a common one, cargo would unite the features of their crates.
    # Messages of panics name source files: without the folder, the same sources give the same
    # bytes on every machine, and no path of this one gets out.
    registry = toolchain.cargo_home() / "registry" / "src"
    seen = toolchain.root / registry.relative_to("/") if toolchain.root else registry
    remaps = [f"--remap-path-prefix={registry / index.name}=crates" for index in seen.glob("*")]
    if RECIPES[name].uses:  # crates outside of the workspace have absolute paths
        remaps.append(f"--remap-path-prefix={source.parent}=guest")
    recipe = RECIPES[name]
    package = recipe.package or name
    flags = json.dumps([*sorted(remaps), *recipe.rustflags], ensure_ascii=False)  # a TOML array too
    config = ["--config", f"{'build' if recipe.native else f'target.{TARGET}'}.rustflags={flags}"]
    # Fetching also wants what only tests need, so the build may work all the same.
    offline = ["--offline"] if failed_fetch else []
    command = [*_cargo_flags(name), *offline, *config, "--package", package]
    done = toolchain.run(command, source, title=f"cargo builds {name}")
    if done.returncode:
        raise BuildError(
            _explain(name, failed_fetch if "--offline" in done.stdout else done.stdout)
        )
    if recipe.native:
        file = f"{package}{_PROGRAM}" if recipe.program else f"{_PREFIX}{package}{_SUFFIX}"
        wasm = toolchain.target_dir(source) / "release" / file
    else:
        wasm = toolchain.target_dir(source) / TARGET / "release" / f"{package}.wasm"
    if recipe.component:
        module, wasm = wasm, wasm.with_name(f"{name}.component.wasm")
        root = toolchain.root  # what cargo sees as /
        paths = (str(Path("/", p.relative_to(root)) if root else p) for p in (module, wasm))
        program = ["run", "--locked", *offline, "--package", "componentize", "--", *paths]
        done = toolchain.run(program, source, title=f"componentize makes a component of {name}")
        if done.returncode:
            raise BuildError(_explain(name, done.stdout))
    try:
        return wasm.read_bytes()
    except OSError as error:
        raise BuildError(
            f"cargo built {name}, and there is no {wasm} ({error}). "
            "The likely reason: the crate is neither a cdylib nor a program."
        ) from error


_KNOWN = {
    r"can't find crate for `(core|std)`|target may not be installed|target not found": (
        f"Rust has no standard library for {TARGET} (E1, P1). Cure: rustup target add {TARGET}."
    ),
    r"--locked was passed|lock file .* needs to be updated": (
        "Cargo.lock does not match a Cargo.toml. Cure: run `cargo update --workspace` in {folder}."
    ),
    r"failed to download|[Cc]ould(n't| not) (resolve|connect)|network failure": (
        "Crates are missing and the network does not answer. Cure: connect once and run "
        "`cargo fetch --locked` in {folder}; later builds need no network."
    ),
    r"linker `[^`]+` not found": "A linker is missing. Cure: sudo apt-get install gcc lld.",
    r"requires rustc|is not supported by the following package": (
        "This Rust is too old. Cure: rustup update stable."
    ),
    r"No space left on device": "The disk is full. Cure: free some space, or run cargo clean.",
}


def _explain(name: str, output: str) -> str:
    # Warnings come first and may be long; the errors start the part worth reading.
    lines = output.rstrip().splitlines()
    errors = (number for number, line in enumerate(lines) if line.startswith("error"))
    first = next(errors, max(0, len(lines) - 40))
    causes = [cause for pattern, cause in _KNOWN.items() if re.search(pattern, output)]
    likely = causes[0] if causes else "Cure: mend what the compiler names below."
    likely = likely.format(folder=f"guest/{RECIPES[name].workspace}")
    return f"cargo could not build the guest {name!r}. {likely}\n" + "\n".join(
        lines[first : first + 40]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the guests from the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line. Default: that of this process.

    Returns
    -------
    int
        The exit status: 0, or 1 if the build failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m edgelab.build", description="Build the guests."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)} [{', '.join(GUESTS)}]"
    )
    parser.add_argument("--ship", action="store_true", help="renew the guests in the package")
    options = parser.parse_args(arguments)
    try:
        guests = ship() if options.ship else build(options.names or GUESTS)
    except EdgelabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for guest in guests.values():
        made = guest.provenance
        print(f"{guest.path}  {guest.size_bytes} bytes  {made.rustc} ({made.toolchain})")
        print(f"  sha256 {guest.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
