"""The words of WASI-NN's preview-1 ABI: codes and layouts, and nothing that acts.

Source: the witx description of ``wasi_ephemeral_nn`` and the crates that speak it. The numbers here
are those of the crate ``wasi-nn`` 0.6, of ``wasmedge-wasi-nn`` 0.8 and of WasmEdge >= 0.15.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np

MODULE = "wasi_ephemeral_nn"
"""The import module's name."""


class Errno(IntEnum):
    """What every WASI-NN function returns."""

    SUCCESS = 0
    INVALID_ARGUMENT = 1
    INVALID_ENCODING = 2
    MISSING_MEMORY = 3
    BUSY = 4
    RUNTIME_ERROR = 5
    UNSUPPORTED_OPERATION = 6
    TOO_LARGE = 7
    NOT_FOUND = 8


class Encoding(IntEnum):
    """Which format a guest says that its model has."""

    OPENVINO = 0
    ONNX = 1
    TENSORFLOW = 2
    PYTORCH = 3
    TENSORFLOW_LITE = 4
    AUTODETECT = 5


class Target(IntEnum):
    """Which device a guest wants. ``AUTO`` exists in some crates only."""

    CPU = 0
    GPU = 1
    TPU = 2
    AUTO = 3


DTYPES: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<f2"),
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("u1"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
}
"""Tensor type code → NumPy dtype."""

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
