"""The errors that edgelab raises.

Every message says what happened, the likely reason, and the command that cures it.
"""


class EdgelabError(Exception):
    """Base of all errors that edgelab raises on purpose."""


class ToolchainError(EdgelabError):
    """No Rust that targets wasm32-wasip1, or the forced way to get one is impossible here."""


class BuildError(EdgelabError):
    """A guest could not be built, or a prebuilt guest is missing, stale or damaged."""


class GuestError(EdgelabError):
    """A guest did not load, trapped, or returned an error code."""


class LimitError(GuestError):
    """A guest reached its limit on memory, fuel or wall time."""


class ModelError(EdgelabError):
    """A model file is invalid, incomplete or not the pinned one."""


class ImageError(EdgelabError):
    """An image could not be decoded, or its size or layout is not supported."""


class WasiNNError(EdgelabError):
    """A WASI-NN call failed on the host's side."""


class DownloadError(EdgelabError):
    """A download failed, or its bytes are not the pinned ones."""


def one_line(error: BaseException) -> str:
    """Return another library's message, fit to be quoted in ours: one line, 300 characters.

    It may quote names from a file in turn, and those must not command the reader's terminal.
    """
    text = " ".join(str(error).split())[:300]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class BusyError(EdgelabError):
    """All workers are busy and the queue is full: come back later."""


class BatchError(EdgelabError):
    """A batch job can't begin or go on: another job's results, or a node that lacks something."""
