"""Find a Rust that compiles to wasm32-wasip1, or get one.

The ways are tried in this order, and the first that works is used:

1. ``installed``: cargo and rustc on PATH with the standard library of the target;
2. ``rustup``: ``rustup target add wasm32-wasip1``;
3. ``apt``: the packages of Debian 13 or Ubuntu 25.10, or newer;
4. ``debootstrap``: a Debian 13 in the cache folder (Linux, root only);
5. ``prebuilt``: no Rust at all; `edgelab.build` falls back to the guest that the package ships.

``EDGELAB_TOOLCHAIN`` forces one of them by its name. ``EDGELAB_DEBIAN_MIRROR`` is the mirror for
``debootstrap`` where the system's own package sources name none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from edgelab.errors import ToolchainError
from edgelab.paths import cache_dir, locked

TARGET = "wasm32-wasip1"
MIN_RUST = (1, 85)
"""The oldest Rust that the guests build with: Debian 13's."""

DEBIAN_PACKAGES = (
    "cargo",
    "rustc",
    "libstd-rust-dev-wasm32",
    "wasi-libc",
    "lld",
    "gcc",
    "libc6-dev",
    "ca-certificates",
)
"""What a Debian or Ubuntu needs to build a guest."""

_DEBIAN = "trixie"
_DEBIAN_BYTES = 2_500_000_000  # 1.3 GB when complete, and the packages' archives on the way
_LINKER = "CARGO_TARGET_WASM32_WASIP1_LINKER"
_QUIET_S = 2.0
# A folder that can't be written, or a program that hangs, must not stop the search.
_IMPOSSIBLE = (ToolchainError, OSError, subprocess.TimeoutExpired)


@dataclass(frozen=True)
class Toolchain:
    """A way to build guests, and how it was chosen.

    Attributes
    ----------
    kind : str
        ``installed``, ``rustup``, ``apt``, ``debootstrap`` or ``prebuilt``.
    cargo : tuple of str
        The command line that starts cargo; empty for ``prebuilt``.
    rustc : str
        What ``rustc --version`` says; empty for ``prebuilt``.
    reason : str
        Why this one was chosen.
    tried : tuple of (str, str)
        The kinds that come first in the order, each with the reason why it did not work.
    env : Mapping of str to str
        The whole environment to start cargo with.
    root : Path or None
        The folder of the Debian that cargo runs inside of (``debootstrap`` only).
    """

    kind: str
    cargo: tuple[str, ...]
    rustc: str
    reason: str
    tried: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets
    root: Path | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"

    def target_dir(self, source: Path) -> Path:
        """Return the folder that cargo writes to for a workspace.

        Parameters
        ----------
        source : Path
            The folder of the workspace.

        Returns
        -------
        Path
            ``$CARGO_TARGET_DIR`` or ``source/target``; for ``debootstrap`` one inside `root`.
        """
        if self.root is not None:
            return self._staged(source) / "target"
        return Path(self.env.get("CARGO_TARGET_DIR") or source / "target").absolute()

    def cargo_home(self) -> Path:
        """Return cargo's own folder, with its registry.

        Returns
        -------
        Path
            ``$CARGO_HOME`` or ``~/.cargo``; for ``debootstrap`` as seen from inside of `root`.
        """
        if self.root is not None:
            return Path("/root/.cargo")
        return Path(self.env.get("CARGO_HOME") or Path.home() / ".cargo")

    def run(
        self, args: Sequence[str], source: Path, *, title: str, timeout_s: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        """Run cargo in a workspace and show its output if it takes long.

        Parameters
        ----------
        args : sequence of str
            What follows ``cargo``.
        source : Path
            The folder of the workspace. For ``debootstrap`` its files are copied into `root`.
        title : str
            What is being done, for the reader.
        timeout_s : float
            The time after which cargo is ended.

        Returns
        -------
        subprocess.CompletedProcess
            The exit status, and stdout with stderr as text.

        Raises
        ------
        ToolchainError
            This is the ``prebuilt`` kind: there is no cargo.
        """
        if not self.cargo:
            raise ToolchainError(f"There is no cargo here ({self}). Cure: {CURE}")
        if self.root is None:
            env = {**self.env, "CARGO_TARGET_DIR": str(self.target_dir(source))}
            return run_live([*self.cargo, *args], title, timeout_s, env=env, cwd=source)
        # Copying in leaves no mount behind, whatever kills this process.
        stage = self._staged(source)
        stage.mkdir(parents=True, exist_ok=True)
        for old in stage.iterdir():
            if old.name != "target":
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        for path in source_files(source):
            copy = stage / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)  # with its time, so that cargo sees what has not changed
        inside = "/" + str(stage.relative_to(self.root))
        argv = ["chroot", str(self.root), "env", "-C", inside, *self.cargo, *args]
        return run_live(argv, title, timeout_s, env=self.env)

    def _staged(self, source: Path) -> Path:
        assert self.root is not None
        key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
        return self.root / "build" / key


CURE = (
    f"install Rust from rustup.rs and run `rustup target add {TARGET}`, "
    f"or on Debian 13: sudo apt-get install {' '.join(DEBIAN_PACKAGES)}"
)


def find(source: Path | None = None) -> Toolchain:
    """Find a Rust that targets wasm32-wasip1, or get one.

    Takes some 0.1 s where one is installed; getting one takes up to some minutes, with progress
    on stderr.

    Parameters
    ----------
    source : Path, optional
        The folder of the workspace to build, whose ``rust-toolchain.toml`` rustup obeys.
        Default: the current folder.

    Returns
    -------
    Toolchain
        The first that works; of the kind ``prebuilt`` if none does.

    Raises
    ------
    ToolchainError
        ``EDGELAB_TOOLCHAIN`` is not one of the kinds, or forces one that is impossible here.
    """
    source = source or Path.cwd()
    forced = os.environ.get("EDGELAB_TOOLCHAIN")
    if forced and forced not in _WAYS:
        raise ToolchainError(
            f"EDGELAB_TOOLCHAIN={forced} is not a kind of toolchain. "
            f"Cure: unset it, or use one of {', '.join(_WAYS)}."
        )
    if forced:
        try:
            found = _WAYS[forced](source)
        except _IMPOSSIBLE as error:
            raise ToolchainError(
                f"EDGELAB_TOOLCHAIN={forced} is impossible here: {error} "
                "Or unset EDGELAB_TOOLCHAIN to let edgelab choose."
            ) from None
        return replace(found, reason=f"{found.reason} (forced by EDGELAB_TOOLCHAIN)")
    tried: list[tuple[str, str]] = []
    for kind, way in _WAYS.items():
        try:
            return replace(way(source), tried=tuple(tried))
        except _IMPOSSIBLE as error:
            tried.append((kind, str(error)))
    raise AssertionError("the last way never fails")


def source_files(source: Path) -> list[Path]:
    """List the files of a Rust workspace that can matter to a build.

    Parameters
    ----------
    source : Path
        The folder of the workspace.

    Returns
    -------
    list of Path
        All files, sorted, except those in ``target`` and ``build`` beside a ``Cargo.toml``, hidden
        ones other than ``.cargo``, and those of other workspaces in the folder.
    """
    files = []
    for folder, subfolders, names in os.walk(source):
        if folder != str(source) and _is_workspace(Path(folder, "Cargo.toml")):
            subfolders.clear()
            continue
        made = ("target", "build") if "Cargo.toml" in names else ()
        subfolders[:] = [
            sub
            for sub in subfolders
            if sub not in made and (sub == ".cargo" or not sub.startswith("."))
        ]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _is_workspace(manifest: Path) -> bool:
    try:
        return re.search(r"^\[workspace[].]", manifest.read_text("utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False


# --- The five ways. Each returns a Toolchain, or raises ToolchainError with why and the cure. ---


def installed(source: Path) -> Toolchain:
    """Return the Rust on PATH that targets wasm32-wasip1. Nothing is installed or downloaded.

    Parameters
    ----------
    source : Path
        The folder of the workspace to build.

    Returns
    -------
    Toolchain
        The first on PATH that can build the guests.

    Raises
    ------
    ToolchainError
        There is none; the message says what each Rust on PATH lacks.
    """
    folders = _rust_folders()
    if not folders:
        raise ToolchainError(f"PATH holds no cargo and rustc. Cure: {CURE}.")
    problems = []
    for folder in folders:
        try:
            found = _inspect("installed", folder, source)
        except ToolchainError as error:
            problems.append(str(error))
            continue
        others = [str(other) for other in folders if other != folder]
        note = f"; PATH also holds Rust in {', '.join(others)}" if others else ""
        return replace(found, reason=found.reason + note)
    raise ToolchainError(" ".join(problems))


def _rustup(source: Path) -> Toolchain:
    rustup = shutil.which("rustup")
    if rustup is None:
        raise ToolchainError("PATH holds no rustup. Cure: install it from rustup.rs.")
    command = [rustup, "target", "add", TARGET]
    done = run_live(command, "rustup adds the target wasm32-wasip1", 180, cwd=source)
    if done.returncode:
        raise ToolchainError(
            f"`rustup target add {TARGET}` failed: {_gist(done.stdout)}. "
            "Cure: connect to the network and run it by hand, or `rustup default stable`."
        )
    found = _inspect("rustup", Path(rustup).parent, source)
    return replace(found, reason=f"rustup added {TARGET} to {found.reason}")


def _apt(source: Path) -> Toolchain:
    if shutil.which("apt-get") is None:
        raise ToolchainError("PATH holds no apt-get. Cure: install Rust from rustup.rs.")
    release = _os_release()
    if not has_wasm_packages(release):
        raise ToolchainError(
            f"{release.get('PRETTY_NAME', 'This system')} has no packages of Rust for {TARGET}: "
            "Debian 13 and Ubuntu 25.10 are the first. Cure: install Rust from rustup.rs."
        )
    with suppress(ToolchainError):
        return _inspect("apt", Path("/usr/bin"), source)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *DEBIAN_PACKAGES]
    if os.geteuid() != 0:
        raise ToolchainError(
            "Debian's Rust is not complete, and only root may install packages. "
            f"Cure: sudo {shlex.join(command)}."
        )
    _must(["apt-get", "update"], "apt-get reads the package lists")
    _must(command, "apt-get installs Debian's Rust")
    return _inspect("apt", Path("/usr/bin"), source)


def _debootstrap(source: Path) -> Toolchain:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("chroot"):
        raise ToolchainError(
            "Only root on Linux can make and enter a Debian folder (debootstrap, chroot). "
            f"Cure: {CURE}."
        )
    root = cache_dir() / "debian13"
    with locked(root.with_suffix(".lock")) as lock:
        if not root.exists():
            _make_debian(root, lock)
    owner = root.stat()
    if owner.st_uid != 0 or owner.st_mode & 0o022:
        raise ToolchainError(
            f"{root} can be written by others than root, so it is not run. "
            "Cure: remove it, and set EDGELAB_CACHE to a folder that only root can write."
        )
    _copy_host_files(root)
    env = _debian_env()
    command = ["chroot", str(root), "rustc", "--version"]
    version = subprocess.run(
        command, check=False, env=env, capture_output=True, encoding="utf-8", timeout=60
    )
    if version.returncode:
        raise ToolchainError(
            f"The Debian in {root} does not run: {_gist(version.stderr)}. Cure: remove it."
        )
    rustc = version.stdout.strip()
    reason = f"{rustc} of Debian 13 in {root}"
    return Toolchain("debootstrap", ("cargo",), rustc, reason, env=env, root=root)


def _prebuilt(source: Path) -> Toolchain:
    return Toolchain("prebuilt", (), "", "no Rust; the guests that the package ships are used")


_WAYS: dict[str, Callable[[Path], Toolchain]] = {
    "installed": installed,
    "rustup": _rustup,
    "apt": _apt,
    "debootstrap": _debootstrap,
    "prebuilt": _prebuilt,
}


# --- Rust on this system ---


def _rust_folders() -> list[Path]:
    folders: dict[Path, Path] = {}
    for entry in os.get_exec_path():
        if shutil.which("cargo", path=entry) and shutil.which("rustc", path=entry):
            folder = Path(entry).absolute()
            # /bin is a link to /usr/bin on most systems, and PATH may name a folder twice.
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _inspect(kind: str, folder: Path, source: Path) -> Toolchain:
    """Return the Rust in a folder if it can build for the target."""
    cargo = shutil.which("cargo", path=str(folder))
    rustc = shutil.which("rustc", path=str(folder))
    if cargo is None or rustc is None:
        raise ToolchainError(f"{folder} holds no cargo and rustc. Cure: {CURE}.")
    # With its own folder first on PATH, this cargo calls this rustc, not another one's.
    env = {**os.environ, "PATH": os.pathsep.join([str(folder), *os.get_exec_path()])}
    # The flags are part of a guest's identity: see edgelab.build.
    for flags in ("RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"):
        env.pop(flags, None)

    def ask(*question: str) -> str:
        # Looking must not download: rustup would install a toolchain that a file names.
        try:
            answer = subprocess.run(
                [rustc, *question],
                cwd=source,
                env={**env, "RUSTUP_AUTO_INSTALL": "0"},
                check=False,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(f"{rustc} does not run: {error}.") from None
        if answer.returncode:
            raise ToolchainError(f"{rustc} does not run: {_gist(answer.stderr)}.")
        return answer.stdout

    facts = ask("--version", "--verbose")
    version = facts.partition("\n")[0]
    number = re.match(r"rustc (\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) < MIN_RUST:
        wanted = ".".join(map(str, MIN_RUST))
        raise ToolchainError(
            f"{rustc} is {version}, and the guests need {wanted}. Cure: rustup update stable."
        )
    library = Path(ask("--target", TARGET, "--print", "target-libdir").strip())
    if not any(library.glob("libstd-*.rlib")):
        raise ToolchainError(
            f"{rustc} ({version}) has no standard library for {TARGET} (E1, P1). "
            f"Cure: rustup target add {TARGET}, or Debian's libstd-rust-dev-wasm32."
        )
    # rustup's Rust brings its own linker; distributions leave it to LLVM's package.
    host = re.search(r"^host: (.+)$", facts, re.MULTILINE)
    own_linkers = library.parents[1] / (host[1] if host else "") / "bin"
    if _LINKER not in env and not any(own_linkers.glob("rust-lld*")):
        if not shutil.which("wasm-ld"):
            raise ToolchainError(
                f"{rustc} ({version}) has no linker for {TARGET}. Cure: sudo apt-get install lld."
            )
        env[_LINKER] = "wasm-ld"
    return Toolchain(kind, (cargo,), version, f"{version} in {folder}", env=env)


# --- Debian ---


class Source(NamedTuple):
    """One archive of packages that a Debian system uses."""

    uri: str
    suite: str
    components: tuple[str, ...]


def has_wasm_packages(release: Mapping[str, str]) -> bool:
    """Tell whether a distribution packages a new enough Rust with wasm32-wasip1.

    Parameters
    ----------
    release : Mapping of str to str
        The fields of ``os-release``.

    Returns
    -------
    bool
        True for Debian 13 (Rust 1.85) and Ubuntu 25.10 (Rust 1.85), and newer ones.
    """
    first = {"debian": (13,), "ubuntu": (25, 10)}.get(release.get("ID", ""))
    if first is None:
        return False
    version = release.get("VERSION_ID")
    if version is None:  # Debian testing and unstable have none
        return True
    return tuple(int(part) for part in re.findall(r"\d+", version)) >= first


def parse_sources(text: str, *, deb822: bool) -> list[Source]:
    """Read the binary archives from a file of apt's sources.

    Parameters
    ----------
    text : str
        The file's content.
    deb822 : bool
        True for the format of ``*.sources``, False for that of ``sources.list``.

    Returns
    -------
    list of Source
        One for each pair of URI and suite; disabled ones left out.
    """
    if not deb822:
        one_line = re.compile(r"^\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)([^#\n]*)", re.MULTILINE)
        return [
            Source(uri, suite, tuple(rest.split())) for uri, suite, rest in one_line.findall(text)
        ]
    found = []
    for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)):
        fields: dict[str, list[str]] = {}
        values: list[str] = []
        for line in stanza.splitlines():
            if not line[:1].isspace():
                name, _, line = line.partition(":")
                values = fields.setdefault(name.strip().lower(), [])
            values.extend(line.split())
        disabled = " ".join(fields.get("enabled", [])).lower() in ("no", "false", "off", "0")
        if not disabled and "deb" in fields.get("types", []):
            components = tuple(fields.get("components", []))
            for uri in fields.get("uris", []):
                for suite in fields.get("suites", []):
                    found.append(Source(uri, suite, components))
    return found


def pick_mirror(sources: Sequence[Source], codename: str) -> str | None:
    """Choose the mirror of Debian's main archive among a system's sources.

    Parameters
    ----------
    sources : sequence of Source
        What `parse_sources` found.
    codename : str
        The system's ``VERSION_CODENAME``, such as ``bookworm``.

    Returns
    -------
    str or None
        The URI; None if there is none that debootstrap can use.
    """
    suites = {codename, _DEBIAN, "stable", "testing", "unstable", "sid"}
    usable = [
        source.uri.rstrip("/")
        for source in sources
        if source.suite in suites
        and "main" in source.components
        and re.match(r"(https?|file):", source.uri)
    ]
    # Other vendors name their suites like Debian's; mirrors of Debian mostly end like this.
    usable.sort(key=lambda uri: not uri.endswith("/debian"))
    return usable[0] if usable else None


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {"PRETTY_NAME": platform.system()}


def debian_mirror() -> str:
    """Return the Debian mirror that this machine uses.

    Returns
    -------
    str
        ``$EDGELAB_DEBIAN_MIRROR``, or the one that Debian's own package sources name.

    Raises
    ------
    ToolchainError
        If neither names one.
    """
    if chosen := os.environ.get("EDGELAB_DEBIAN_MIRROR"):
        return chosen
    release = _os_release()
    sources: list[Source] = []
    if release.get("ID") == "debian":
        folder = Path("/etc/apt")
        for path in (folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))):
            if path.suffix in (".list", ".sources") and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                sources += parse_sources(text, deb822=path.suffix == ".sources")
    mirror = pick_mirror(sources, release.get("VERSION_CODENAME", ""))
    if mirror is None:
        raise ToolchainError(
            "This system's package sources name no mirror of Debian. "
            "Cure: set EDGELAB_DEBIAN_MIRROR to the URL of one."
        )
    return mirror


def _debian_env() -> dict[str, str]:
    """Return a clean environment: the host's paths and Rust settings mean nothing inside."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return proxies | {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
        _LINKER: "wasm-ld",
    }


def _copy_host_files(root: Path) -> None:
    """Give a Debian folder the host's names and certificates, for networks with their own."""
    import ssl  # slow to load, and only used here

    bundle = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    copies = [
        (Path("/etc/resolv.conf"), root / "etc/resolv.conf"),
        (Path("/etc/hosts"), root / "etc/hosts"),
        (Path(bundle or ""), root / "etc/ssl/certs/ca-certificates.crt"),
    ]
    for host, inside in copies:
        if host.is_file():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.unlink(missing_ok=True)  # it may be a link that leads out of the folder
            shutil.copyfile(host, inside)


def _make_debian(root: Path, lock: int) -> None:
    """Make a Debian 13 with Rust; `root` appears only when it is complete."""
    mirror = debian_mirror()
    parent = root.parent
    if shutil.disk_usage(parent).free < _DEBIAN_BYTES:
        raise ToolchainError(
            f"{parent} has less than {_DEBIAN_BYTES / 1e9:.1f} GB free, which a Debian 13 needs. "
            "Cure: free some space, or set EDGELAB_CACHE to a folder on a larger disk."
        )
    if not shutil.which("debootstrap"):
        if not shutil.which("apt-get"):
            raise ToolchainError(f"PATH holds neither debootstrap nor apt-get. Cure: {CURE}.")
        packages = ["debootstrap", "debian-archive-keyring"]
        _must(["apt-get", "update"], "apt-get reads the package lists")
        command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        _must(command, "apt-get installs debootstrap")
    for left_over in parent.glob(f"{root.name}.new-*"):  # of a process that was killed
        remove_tree(left_over)
    new = Path(tempfile.mkdtemp(dir=parent, prefix=f"{root.name}.new-"))
    try:
        new.chmod(0o755)  # apt's own user has to enter it
        # debootstrap mounts /proc inside; in a namespace of its own that ends with the process.
        # Where unshare is not allowed, neither are mounts.
        private = ["unshare", "--mount"]
        if (
            not shutil.which("unshare")
            or subprocess.run([*private, "true"], check=False, capture_output=True).returncode
        ):
            private = []
        command = [*private, "debootstrap", "--force-check-gpg", "--variant=minbase", _DEBIAN]
        with tempfile.TemporaryDirectory(prefix="edgelab-") as short:
            link = Path(short, "debian")  # debootstrap fails on a path with a space
            link.symlink_to(new)
            try:
                _must([*command, str(link), mirror], f"debootstrap makes {root}", lock)
            except ToolchainError as error:
                with suppress(OSError):
                    log = (new / "debootstrap" / "debootstrap.log").read_text(errors="replace")
                    raise ToolchainError(f"{error} Its log ends: {_gist(log)}.") from None
                raise
        _copy_host_files(new)
        inside = ["chroot", str(new), "apt-get"]
        install = [*inside, "install", "-y", "--no-install-recommends", *DEBIAN_PACKAGES]
        _must(install, "apt-get installs Rust in it", lock, _debian_env())
        _must([*inside, "clean"], "apt-get removes its archives", lock, _debian_env())
        os.replace(new, root)
    finally:
        if new.exists():
            remove_tree(new)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all that is in it, unless something is mounted inside.

    Parameters
    ----------
    folder : Path
        The folder.

    Raises
    ------
    ToolchainError
        A mount point lies in the folder: removing would reach through it.
    """
    real = folder.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        escaped = line.split(" ")[1]
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), escaped))
        if point == real or real in point.parents:
            raise ToolchainError(
                f"{folder} is not removed: {point} is mounted in it. Cure: umount {point}."
            )
    shutil.rmtree(folder)


# --- Running programs ---


def _must(
    command: Sequence[str],
    title: str,
    lock: int | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    # A child that holds the lock keeps others out even after this process was killed.
    fds = () if lock is None else (lock,)
    done = run_live(command, title, 1200, env=env, pass_fds=fds)
    if done.returncode:
        raise ToolchainError(
            f"{title}: `{shlex.join(command)}` failed: {_gist(done.stdout)}. "
            "Cure: connect to the network and try again, or install Rust from rustup.rs."
        )


def _gist(output: str) -> str:
    """Return the line of a program's output that names the error, and its last line."""
    useful = output.partition("Stack backtrace")[0]
    lines = [line.strip().rstrip(".") for line in useful.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error|E:|chroot:|env:", line)]
    return " … ".join(dict.fromkeys([*errors[:1], *lines[-1:]])) or "no message"


def say(text: str) -> None:
    """Print a line for the reader on stderr.

    Parameters
    ----------
    text : str
        The line.
    """
    print(f"edgelab: {text}", file=sys.stderr, flush=True)


def run_live(
    command: Sequence[str],
    title: str,
    timeout_s: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program, and show its output on a terminal or once it has taken 2 s.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    title : str
        What it does, shown before its output.
    timeout_s : float
        The time after which it is ended, with all that it started.
    env : Mapping of str to str, optional
        Its whole environment.
    cwd : Path, optional
        Its folder.
    pass_fds : sequence of int
        File descriptors that it inherits (not on Windows).

    Returns
    -------
    subprocess.CompletedProcess
        The exit status (127 if it does not start, 124 if it was ended), and its stdout with
        stderr as text.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=env,
            cwd=cwd,
            pass_fds=pass_fds,
            start_new_session=sys.platform != "win32",
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, f"error: {error}")
    assert process.stdout is not None
    stdout = process.stdout
    fresh: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stdout:
            for line in stdout:
                fresh.put(line)
        fresh.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    start = time.monotonic()
    live = False
    lines: list[str] = []
    line: str | None = ""
    try:
        while line is not None:
            passed = time.monotonic() - start
            if passed >= timeout_s:
                _end(process)
                reader.join(timeout=1)
                lines.append(f"error: ended after {timeout_s:.0f} s\n")
                return subprocess.CompletedProcess(command, 124, "".join(lines))
            if not live and (passed >= _QUIET_S or sys.stderr.isatty()):
                live = True
                say(f"{title} …")
                print("".join(lines), end="", file=sys.stderr, flush=True)
            try:
                line = fresh.get(timeout=(timeout_s if live else min(_QUIET_S, timeout_s)) - passed)
            except queue.Empty:
                continue
            if line is not None:
                lines.append(line)
                if live:
                    print(line, end="", file=sys.stderr, flush=True)
        return subprocess.CompletedProcess(command, process.wait(), "".join(lines))
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
