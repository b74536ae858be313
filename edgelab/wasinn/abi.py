"""The words of WASI-NN's preview-1 ABI: codes and layouts, and nothing that acts.

The functions kept their names and signatures from 2021 on; the numbers for tensor types and errors
did not. `Era` has those of each time. Sources: the witx description of ``wasi_ephemeral_nn``, and
the published crates ``wasi-nn`` 0.1 to 0.6 and ``wasmedge-wasi-nn`` 0.8.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum, IntEnum

import numpy as np

MODULE = "wasi_ephemeral_nn"
"""The import module's name."""


class Errno(IntEnum):
    """Why a call failed, with the codes of `Era.CRATE_0_6`."""

    SUCCESS = 0
    INVALID_ARGUMENT = 1
    INVALID_ENCODING = 2
    MISSING_MEMORY = 3
    BUSY = 4
    RUNTIME_ERROR = 5
    UNSUPPORTED_OPERATION = 6
    TOO_LARGE = 7
    NOT_FOUND = 8
    END_OF_SEQUENCE = 100
    """WasmEdge's: ``compute_single`` has nothing more to give."""


class Encoding(IntEnum):
    """Which format a guest says that its model has. Those from ``GGML`` on are WasmEdge's."""

    OPENVINO = 0
    ONNX = 1
    TENSORFLOW = 2
    PYTORCH = 3
    TENSORFLOW_LITE = 4
    AUTODETECT = 5
    GGML = 6
    NEURAL_SPEED = 7
    BURN = 8
    WHISPER = 9
    MLX = 10
    PIPER = 11


class Target(IntEnum):
    """Which device a guest wants. ``AUTO`` exists in some crates only."""

    CPU = 0
    GPU = 1
    TPU = 2
    AUTO = 3


_F16, _F32, _F64 = np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8")
_U8, _I32, _I64 = np.dtype("u1"), np.dtype("<i4"), np.dtype("<i8")

DTYPES: dict[int, np.dtype[np.generic]] = {0: _F16, 1: _F32, 2: _F64, 3: _U8, 4: _I32, 5: _I64}
"""Tensor type code → NumPy dtype, since the crate 0.6."""

OLD_DTYPES: dict[int, np.dtype[np.generic]] = {0: _F16, 1: _F32, 2: _U8, 3: _I32}
"""Tensor type code → NumPy dtype, before."""


class Era(Enum):
    """Which crate a guest was built with, as far as the numbers differ.

    A crate that prints the name of an error looks it up without a check: a code that it does not
    know is undefined behaviour in the guest. So each guest gets the codes of its own era.
    """

    WITX_2021 = "witx 2021 (crate 0.1)"
    CRATE_0_4 = "crate 0.2 to 0.4"
    CRATE_0_5 = "crate 0.5, WasmEdge up to 0.14"
    CRATE_0_6 = "crate 0.6, WasmEdge from 0.15"

    @property
    def dtypes(self) -> Mapping[int, np.dtype[np.generic]]:
        """Tensor type code → NumPy dtype."""
        return DTYPES if self is Era.CRATE_0_6 else OLD_DTYPES

    def code(self, errno: Errno) -> int:
        """Return the number that a guest of this era takes for `errno`, or for the nearest."""
        return _CODES.get(self, {}).get(errno, int(errno))

    @classmethod
    def of_module(cls, wasm: bytes) -> Era | None:
        """Tell the era from what the crates leave in a module, if they left enough.

        Parameters
        ----------
        wasm : bytes
            A core module that imports WASI-NN.

        Returns
        -------
        Era or None
            By the names of errors that the module can print. They are the same in 0.5 and 0.6: the
            answer is then 0.6, until a tensor tells (see `edgelab.wasinn.WasiNN`).
        """
        for era, names in _NAMES.items():
            if any(name in wasm for name in names):
                return era
        return None


# How the crates spell an error that the era before did not have.
_NAMES = {
    Era.CRATE_0_6: (b"UnsupportedOperation", b"UNSUPPORTED_OPERATION", b"Unsupported Operation"),
    Era.CRATE_0_4: (b"InvalidEncoding", b"INVALID_ENCODING", b"Invalid Encoding"),
    Era.WITX_2021: (b"Caller module is missing a memory export",),
}

_CODES: dict[Era, dict[Errno, int]] = {
    Era.WITX_2021: {
        Errno.INVALID_ENCODING: 1,  # "for unsupported graph encodings, return inval"
        Errno.MISSING_MEMORY: 2,
        Errno.BUSY: 3,
        Errno.RUNTIME_ERROR: 3,
        Errno.UNSUPPORTED_OPERATION: 1,
        Errno.TOO_LARGE: 2,
        Errno.NOT_FOUND: 1,
        Errno.END_OF_SEQUENCE: 3,
    },
    Era.CRATE_0_4: {
        Errno.UNSUPPORTED_OPERATION: Errno.RUNTIME_ERROR,
        Errno.TOO_LARGE: Errno.MISSING_MEMORY,
        Errno.NOT_FOUND: Errno.INVALID_ARGUMENT,
        Errno.END_OF_SEQUENCE: Errno.RUNTIME_ERROR,
    },
}

BUILDER = struct.Struct("<II")
"""One part of a model: pointer, length in bytes."""

TENSOR = struct.Struct("<IIB3xII")
"""A tensor: dims pointer, dims length, type (three bytes of padding may hold garbage), data
pointer, data length in bytes."""

MAX_DIMS = 16
"""More dimensions than any model has; a guest that claims more is refused."""


class NNError(Exception):
    """A call that fails: the errno goes to the guest, the message to the host's log."""

    def __init__(self, errno: Errno, message: str) -> None:
        super().__init__(message)
        self.errno = errno
