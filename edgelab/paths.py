"""Where edgelab keeps its files, and how several processes share them."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Return the folder for what edgelab can make or download again.

    Returns
    -------
    Path
        ``$EDGELAB_CACHE`` if set, else ``edgelab`` in the platform's cache folder of this user.
        Absolute; it need not exist yet.
    """
    if chosen := os.environ.get("EDGELAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        # The XDG specification: a relative path is invalid and must be ignored.
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return base / "edgelab"


def source_root() -> Path | None:
    """Return the checkout that this package runs from.

    Returns
    -------
    Path or None
        The folder that holds ``guest/Cargo.toml`` and ``pyproject.toml`` beside the package;
        None for an installed wheel.
    """
    root = PACKAGE.parent
    if (root / "guest" / "Cargo.toml").is_file() and (root / "pyproject.toml").is_file():
        return root
    return None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that every reader sees either the old bytes or all of the new ones.

    Parameters
    ----------
    path : Path
        The file; its folder is created if missing.
    data : bytes
        The whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:  # unlike mkstemp, keeps to the user's umask
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock between processes for the time of a ``with`` block.

    The operating system frees it when the process ends, however it ends.

    Parameters
    ----------
    path : Path
        The lock file; it and its folder are created if missing and never removed.

    Yields
    ------
    int
        The file descriptor. A child that inherits it keeps the lock until it ends too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # tries for 10 s
                    break
                except OSError:
                    print(f"edgelab: waiting for another process ({path})", file=sys.stderr)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"edgelab: waiting for another process ({path})", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
