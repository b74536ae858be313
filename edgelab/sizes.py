"""What a deployment weighs: bytes of files, on disk and as an image layer would carry them.

A figure for "the size of a Wasm deployment" says nothing before it says what is in it. So the parts
are measured one by one, where they are installed here, and a deployment is a sum of named parts.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import os
import re
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelab.aot import compile_module
from edgelab.build import guest_path, ready_guest
from edgelab.errors import EdgelabError, GuestError, ToolchainError
from edgelab.measure import Fingerprint, fingerprint, html_table, row_named, text_table
from edgelab.models import models_dir
from edgelab.paths import PACKAGE
from edgelab.runtimes import node, wasmedge

_MEGABYTE = 1e6  # the article's unit


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of some files.

    Attributes
    ----------
    files : int
    disk_bytes : int
        Sum of the files' lengths.
    compressed_bytes : int or None
        Length of their tar after gzip (level 6), which is what an image layer is; None if nobody
        asked.
    """

    files: int
    disk_bytes: int
    compressed_bytes: int | None

    def __add__(self, other: Size) -> Size:
        both = (self.compressed_bytes, other.compressed_bytes)
        return Size(
            self.files + other.files,
            self.disk_bytes + other.disk_bytes,
            None if None in both else sum(filter(None, both)),
        )

    def to_dict(self) -> dict[str, int | None]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def size_of(*paths: str | Path, compress: bool = True) -> Size:
    """Measure files and folders.

    Parameters
    ----------
    paths : str or pathlib.Path
        A file that several of them hold counts once, and so does one with several names (hard
        links). Symbolic links within a folder are not followed; ``__pycache__`` is left out.
    compress : bool
        Also compress them, at some 30 MB a second.

    Raises
    ------
    EdgelabError
        If one is missing or can't be read.
    """
    seen: dict[tuple[int, int], tuple[Path, int]] = {}
    try:
        for path in map(Path, paths):
            for file in sorted(_files(path.resolve(strict=True))):
                info = file.stat()
                seen.setdefault((info.st_dev, info.st_ino), (file, info.st_size))
        compressed = _compressed(file for file, _ in seen.values()) if compress else None
    except OSError as error:
        raise EdgelabError(f"can't measure {error.filename}: {error.strerror}") from None
    return Size(len(seen), sum(size for _, size in seen.values()), compressed)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                yield file


class _Counter(io.RawIOBase):
    """Takes bytes and remembers how many."""

    def __init__(self) -> None:
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        return len(data)


def _compressed(files: Iterable[Path]) -> int:
    counter = _Counter()
    with (
        gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for file in files:
            archive.add(file, recursive=False)
    return counter.bytes


def package_files(*names: str, dependencies: bool = True) -> list[Path]:
    """Return the installed files of Python packages.

    Parameters
    ----------
    names : str
        As pip takes them, also with extras: ``"onnxruntime"``, ``"edgelab[serve]"``.
    dependencies : bool
        Also those of all packages that they need on this machine.

    Raises
    ------
    EdgelabError
        If a package is not installed here.
    """
    from packaging.requirements import Requirement

    found: dict[str, list[Path]] = {}
    waiting = [Requirement(name) for name in names]
    done: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key in done:
            continue
        done.add(key)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise EdgelabError(f"{name} is not installed here: pip install '{wanted}'") from None
        found[name] = _installed(package, name)
        if dependencies:
            for line in package.requires or ():
                needed = Requirement(line)
                extras = ("", *wanted.extras)
                if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                    waiting.append(needed)
    return [file for files in found.values() for file in files]


def _installed(package: importlib.metadata.Distribution, name: str) -> list[Path]:
    if name == "edgelab":  # which may be a checkout, whose list of files is a link
        return [PACKAGE, *(models_dir() / "signs" / file for file in _SHIPPED)]
    files = [Path(str(package.locate_file(file))) for file in package.files or ()]
    return [file for file in files if "__pycache__" not in file.parts and file.is_file()]


_SHIPPED = ("signs.onnx", "tiny.safetensors", "example.jpg")
# Of the standard library, what no deployed program needs.
_UNNEEDED = re.compile(
    r"site-packages|dist-packages|test|tests|idlelib|tkinter|turtledemo|ensurepip|lib2to3|config-.*"
)


def python_files() -> list[Path]:
    """Return the files of this Python: interpreter, shared library, standard library.

    Without tests, headers, IDLE, Tk, pip and installed packages.
    """
    found = {Path(sys.executable).resolve()}
    library = Path(
        sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or ""
    )
    if library.suffix != ".a" and library.is_file():
        found.add(library.resolve())
    root = Path(sysconfig.get_path("stdlib"))
    for place in sorted(root.iterdir()):
        if not _UNNEEDED.fullmatch(place.name) and place.name != "__pycache__":
            inside = _files(place)
            found |= {file for file in inside if not {"test", "tests"} & set(file.parts)}
    return sorted(found)


# --- C8 -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One part, or one deployment that is made of parts.

    Attributes
    ----------
    name : str
    what : str
        What is counted.
    size : Size or None
        None if it can't be measured here.
    note : str
        Why not, and what to do.
    article_bytes : int or None
        What the article says about such a deployment.
    """

    name: str
    what: str
    size: Size | None
    note: str = ""
    article_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """C8: what parts and deployments weigh on this machine.

    Attributes
    ----------
    parts, deployments : tuple of SizeRow
    environment : edgelab.measure.Fingerprint
    """

    parts: tuple[SizeRow, ...]
    deployments: tuple[SizeRow, ...]
    environment: Fingerprint

    def __getitem__(self, name: str) -> SizeRow:
        return row_named((*self.parts, *self.deployments), name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def _cells(self, rows: tuple[SizeRow, ...]) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                megabytes(row.article_bytes),
                megabytes(row.size.disk_bytes if row.size else None),
                megabytes(row.size.compressed_bytes if row.size else None),
                row.note or row.what,
            )
            for row in rows
        ]

    def __str__(self) -> str:
        lines = []
        for caption, rows in (("Parts", self.parts), ("Deployments (C8)", self.deployments)):
            lines += [f"{caption}, in MB", *text_table(_COLUMNS, self._cells(rows), (0, 4)), ""]
        return "\n".join([*lines, f"{self.environment.system}, Python {self.environment.python}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("Parts, in MB", _COLUMNS, self._cells(self.parts)) + html_table(
            "Deployments (C8), in MB", _COLUMNS, self._cells(self.deployments)
        )


_COLUMNS = ("", "article", "on disk", "compressed", "what is in it")


def megabytes(size: int | None) -> str:
    """Write bytes in MB, to three digits; a dash for None."""
    if size is None:
        return "-"
    value = size / _MEGABYTE
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _parts(work: Path) -> Iterator[tuple[str, str, Callable[[], list[Path]]]]:
    def compiled(name: str, path: Path) -> list[Path]:
        code = work / f"{name}.cwasm"
        compile_module(path.read_bytes()).save(code)
        return [code]

    def tract() -> Path:
        guest = ready_guest("classify_tract")
        if guest is None:
            raise ToolchainError("not built: python -m edgelab guest build classify_tract")
        return guest.path

    def edge_code() -> list[Path]:
        code = work / "cli.so"
        wasmedge().compile(guest_path("cli").path, code)
        return [code]

    signs = models_dir() / "signs"
    nn = guest_path("classify_nn").path
    yield "guest", "classify_nn.wasm", lambda: [nn]
    yield "guest, AOT", "its machine code, signed", lambda: compiled("guest", nn)
    yield "signs.onnx", "the embedded model", lambda: [signs / "signs.onnx"]
    yield "tiny model", "for inside a guest: three convolutions", lambda: [
        signs / "tiny.safetensors"
    ]  # fmt: skip
    yield "tract guest", "classify_tract.wasm: a whole ONNX engine in the guest", lambda: [tract()]
    yield "tract guest, AOT", "its machine code", lambda: compiled("tract", tract())
    yield "Python", "interpreter and standard library, no tests", python_files
    for name in ("wasmtime", "onnxruntime", "numpy", "pillow"):
        yield name, "the installed package alone", _only(name)
    yield "edgelab", "this package, its guests and its model", _only("edgelab")
    yield "service", "what edgelab[serve] needs beside the five above", _rest_of_the_service
    yield "cli", "cli.wasm: the article's program", lambda: [guest_path("cli").path]
    yield "cli, WasmEdge AOT", "its machine code", edge_code
    yield "wasmedge", "program and the libraries that it loads", lambda: wasmedge().files()
    yield (
        "wasmedge, own files",
        "the same without LLVM and all other libraries",
        lambda: [file for file in wasmedge().files() if "wasmedge" in file.name],
    )
    yield "node", "program and the libraries that it loads", lambda: node().files()


def _only(name: str) -> Callable[[], list[Path]]:
    return lambda: package_files(name, dependencies=False)


def _rest_of_the_service() -> list[Path]:
    counted = package_files(
        "wasmtime", "onnxruntime", "numpy", "pillow", "edgelab", dependencies=False
    )
    return sorted(set(package_files("edgelab[serve]")) - set(counted))


# Deployment → article's bytes, and the parts.
_DEPLOYMENTS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "WasmEdge AOT, tiny model": (5_000_000, ("wasmedge", "cli, WasmEdge AOT", "tiny model")),
    "Wasmtime, in-guest engine": (
        8_000_000,
        ("Python", "wasmtime", "numpy", "tract guest, AOT", "signs.onnx"),
    ),
    "Wasmtime + WASI-NN": (
        8_000_000,
        ("Python", "wasmtime", "numpy", "onnxruntime", "pillow", "guest, AOT", "signs.onnx"),
    ),
    "Python + ONNX Runtime": (
        500_000_000,
        ("Python", "numpy", "onnxruntime", "pillow", "signs.onnx"),
    ),
    "the service, edgelab serve": (
        None,
        ("Python", "wasmtime", "numpy", "onnxruntime", "pillow", "edgelab", "service"),
    ),
    "Node.js, tiny model": (None, ("node", "cli", "tiny model")),
}
# The article's other rows. No registry of packages has what they need, or not for this machine.
_ELSEWHERE = {
    "C++ + TensorRT": (
        200_000_000,
        "needs an NVIDIA GPU and TensorRT; there: du -cbL of what ldd lists for your program",
    ),
    "Go + TFLite": (
        50_000_000,
        "needs libtensorflowlite_c; there: the same for the Go program",
    ),
}


def sizes(*, compress: bool = True) -> Sizes:
    """Measure C8's rows, and the parts that they are made of.

    Parameters
    ----------
    compress : bool
        Also compress each part: some 20 s.
    """
    rows: dict[str, SizeRow] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, what, files in _parts(Path(work)):
            try:
                rows[name] = SizeRow(name, what, size_of(*files(), compress=compress))
            except (EdgelabError, GuestError) as error:
                rows[name] = SizeRow(name, what, None, str(error))
    made = []
    for name, (article, parts) in _DEPLOYMENTS.items():
        missing = [part for part in parts if rows[part].size is None]
        total = None if missing else _sum(rows[part].size for part in parts)
        note = f"not measurable here: {rows[missing[0]].note}" if missing else ""
        made.append(SizeRow(name, " + ".join(parts), total, note, article))
    for name, (article, note) in _ELSEWHERE.items():
        made.append(SizeRow(name, "", None, f"not measurable here: {note}", article))
    return Sizes(tuple(rows.values()), tuple(made), fingerprint())


def _sum(found: Iterable[Size | None]) -> Size:
    total = Size(0, 0, 0)
    for size in found:
        assert size is not None
        total += size
    return total
