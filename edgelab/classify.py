"""The Python side of the guests ``classify``, ``classify_nn`` and ``classify_tract``: their ABI.

Every pointer stays in here. What comes out are NumPy views of guest memory, numbers, and errors
with the guest's own words.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import GuestError
from edgelab.images import check_pixels
from edgelab.models import Spec
from edgelab.runtime import Instance
from edgelab.wasinn import WasiNN
from edgelab.wasinn.abi import Encoding
from edgelab.wasinn.explain import LikelyMistake, is_distribution, probabilities

KERNELS = ("scalar", "simd128", "relaxed_simd")
"""Variants of the normalise kernel, in the order of the guest's ``kernel`` argument."""

PARAMS = struct.Struct("<II3f3f")
"""The guest's preprocessing parameters: resize, crop, mean, std."""

PREDICTION = np.dtype([("index", "<u4"), ("probability", "<f4")])
"""One entry of the guest's ``top_k``."""

_WASI_NN_FAILED = -6  # a status of the guest


class Buffer:
    """A block of guest memory that the host asked for; freed by `free` or at the block's end.

    Attributes
    ----------
    pointer : int
        Guest address, aligned to 16 bytes.
    size_bytes : int
    """

    def __init__(self, classifier: Classifier, size_bytes: int) -> None:
        self._classifier, self.size_bytes = classifier, size_bytes
        if size_bytes < 1:
            raise GuestError("there is nothing to give to the guest: the data are empty")
        addressable = size_bytes < 1 << 32
        self.pointer: int = classifier._alloc(size_bytes) & 0xFFFFFFFF if addressable else 0
        if self.pointer == 0:
            raise GuestError(
                f"E4: the guest has no {size_bytes:,} bytes left (its limit is "
                f"{classifier.instance.limits.memory_bytes:,}). Raise Limits.memory_bytes, or pass "
                "a smaller image."
            )

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
        """View the block, or its first bytes, as an array; see `edgelab.runtime.Memory.array`."""
        if self.pointer == 0:
            raise GuestError("this block was freed")
        view = self._classifier.instance.memory.array(self.pointer, shape, dtype)
        if view.nbytes > self.size_bytes:
            raise GuestError(f"a view of {view.nbytes} bytes on a block of {self.size_bytes}")
        return view

    def free(self) -> None:
        """Give the block back to the guest; views of it must not be used any more."""
        if self.pointer:
            self._classifier._checked("dealloc", self.pointer, self.size_bytes)
            self.pointer = 0

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            self.free()
        except GuestError:
            if error is None:
                raise
            # Else the guest died in the block, and can't free: the first error says why.


class Classifier:
    """Call an instance of the guest ``classify``, ``classify_nn`` or ``classify_tract``.

    Parameters
    ----------
    instance : edgelab.runtime.Instance

    Notes
    -----
    The arrays that methods return are views of guest memory. They are overwritten by the next call
    of the same method; copy what you keep.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._alloc = instance.function("alloc")
        self._functions: dict[str, Any] = {}
        self._buffers: dict[str, Buffer] = {}
        self._shape: tuple[int, ...] | None = None  # what the guest's block "dims" holds
        self._dims = 0
        self._looked_for_softmax = False
        # Who runs an ONNX model: the host through WASI-NN, or the guest with the crate tract.
        self._engine = "tract" if "tract_load" in dict(instance.guest.exports) else "nn"

    def buffer(self, size_bytes: int) -> Buffer:
        """Ask the guest for memory.

        Raises
        ------
        GuestError
            If the guest has none left (E4).
        """
        return Buffer(self, size_bytes)

    def resize_crop(self, image: NDArray[np.uint8], spec: Spec) -> NDArray[np.uint8]:
        """Resize the shorter side and cut the centre: the first half of `preprocess`.

        Parameters
        ----------
        image : numpy.ndarray
            ``uint8``, ``(height, width, 3)``, RGB.
        spec : Spec

        Returns
        -------
        numpy.ndarray
            ``uint8``, ``(crop, crop, 3)``.
        """
        check_pixels(image)
        source = self._put("image", image)
        out = self._scratch("crop", 3 * spec.crop**2)
        height, width = image.shape[:2]
        self._checked(
            "resize_crop", source, image.nbytes, width, height, spec.resize, spec.crop,
            out.pointer, out.size_bytes,
        )  # fmt: skip
        return out.array((spec.crop, spec.crop, 3))

    def normalize(
        self, pixels: NDArray[np.uint8], spec: Spec, kernel: str = "simd128"
    ) -> NDArray[np.float32]:
        """Scale, normalise and transpose: the second half of `preprocess`.

        Parameters
        ----------
        pixels : numpy.ndarray
            ``uint8``, ``(height, width, 3)``, RGB.
        spec : Spec
        kernel : {"scalar", "simd128", "relaxed_simd"}

        Returns
        -------
        numpy.ndarray
            ``float32``, ``(3, height, width)``.
        """
        check_pixels(pixels)
        _kernel_number(kernel)
        source = self._put("pixels", pixels, "crop")
        params = self._put("params", _params(spec))
        out = self._scratch("planes", pixels.size * 4)
        self._checked(
            f"normalize_{kernel}", source, pixels.nbytes, params, out.pointer, out.size_bytes
        )
        return out.array((3, *pixels.shape[:2]), np.float32)

    def preprocess(
        self, image: NDArray[np.uint8], spec: Spec, kernel: str = "simd128"
    ) -> NDArray[np.float32]:
        """Turn an image into a model's input, inside the guest.

        Parameters
        ----------
        image : numpy.ndarray
            ``uint8``, ``(height, width, 3)``, RGB.
        spec : Spec
        kernel : {"scalar", "simd128", "relaxed_simd"}

        Returns
        -------
        numpy.ndarray
            ``float32``, ``(1, 3, crop, crop)``; a view of guest memory, ready for `compute`.

        Raises
        ------
        ImageError
            If the array is no image.
        GuestError
            If the guest refuses the image or runs out of memory.
        """
        check_pixels(image)
        number = _kernel_number(kernel)
        source = self._put("image", image)
        params = self._put("params", _params(spec))
        out = self._scratch("tensor", 12 * spec.crop**2)
        height, width = image.shape[:2]
        self._checked(
            "preprocess", source, image.nbytes, width, height, params,
            out.pointer, out.size_bytes, number,
        )  # fmt: skip
        return out.array((1, 3, spec.crop, spec.crop), np.float32)

    def top_k(self, logits: NDArray[np.float32], k: int = 3) -> list[tuple[int, float]]:
        """Softmax and the `k` most probable classes, as (index, probability), best first.

        Parameters
        ----------
        logits : numpy.ndarray
            ``float32``, any shape; flattened.
        k : int

        Raises
        ------
        GuestError
            If a logit is NaN or infinite, or `k` is not in 1 … number of logits.
        """
        logits = np.asarray(logits, np.float32)
        if not 1 <= k <= logits.size:
            raise GuestError(f"top_k: k = {k}, but there are {logits.size} logits")
        if not self._looked_for_softmax:
            self._looked_for_softmax = True
            self._warn_of_softmax(logits)
        source = self._put("values", logits, "logits")
        out = self._scratch("top", PREDICTION.itemsize * k)
        count = self._checked("top_k", source, logits.size, k, out.pointer)
        return [(int(i), float(p)) for i, p in out.array(count, PREDICTION)]

    def _warn_of_softmax(self, logits: NDArray[np.float32]) -> None:
        """Warn if these are probabilities already, unless the host did when it computed them."""
        hosts = [h for h in self.instance.guest.host if isinstance(h, WasiNN)]
        warned = any(mistake.kind == "probabilities" for h in hosts for mistake in h.mistakes)
        if not warned and is_distribution(logits.reshape(-1)):
            warnings.warn(
                str(probabilities("top_k takes them for logits")), LikelyMistake, stacklevel=3
            )

    def load_model(self, model: bytes) -> None:
        """Give the guest the small model that it runs by itself in `infer` (safetensors)."""
        with self.buffer(len(model)) as block:
            self.instance.memory.write(block.pointer, model)
            self._checked("model_load", block.pointer, len(model))

    def infer(self, request: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """Classify through the article's JSON ABI.

        Parameters
        ----------
        request : mapping or bytes
            ``image_data`` (height x width x 3 numbers from 0 to 255), ``width``, ``height`` and
            ``model_id``; or JSON text, whatever it holds.

        Returns
        -------
        dict
            ``label``, ``confidence``, ``latency_ms``, ``model_version``; or ``error`` with ``id``
            and ``message``.

        Raises
        ------
        GuestError
            If the request is empty, or the guest has no memory for it or for its answer (E4).
        """
        response: dict[str, Any] = self._ask("infer", request)
        return response

    def nn_infer(
        self, request: Mapping[str, Any] | bytes, spec: Spec, kernel: str = "scalar"
    ) -> dict[str, Any]:
        """Classify through the article's JSON ABI, with a model of the host (``classify_nn``).

        Parameters
        ----------
        request : mapping or bytes
            As for `infer`. ``model_id`` is the model's name in `edgelab.wasinn.WasiNN`, where the
            guest asks for it each time; ``width`` and ``height`` are what it takes.
        spec : Spec
            Its mean and deviation.
        kernel : {"scalar", "simd128", "relaxed_simd"}

        Returns
        -------
        dict
            ``index`` of the best class, ``confidence``, ``logits``, ``stages_ms`` (``load``,
            ``preprocess``, ``infer``, ``postprocess``, by the guest's clock) and ``latency_ms``; or
            ``error`` with ``id`` and ``message``.

        Raises
        ------
        GuestError
            If the request is empty, or the guest has no memory for it or for its answer (E4).
        """
        number = _kernel_number(kernel)
        params = self._put("params", _params(spec))
        response: dict[str, Any] = self._ask("nn_infer", request, params, number)
        return response

    def _ask(self, name: str, request: Mapping[str, Any] | bytes, *arguments: int) -> Any:
        """Pass JSON to a function that answers in JSON."""
        text = request if isinstance(request, bytes) else json.dumps(dict(request)).encode()
        with self.buffer(len(text)) as block:
            self.instance.memory.write(block.pointer, text)
            packed = self._function(name)(block.pointer, len(text), *arguments) & (1 << 64) - 1
        if packed == 0:
            raise GuestError(
                "E4: the guest has no memory for its answer. Raise Limits.memory_bytes."
            )
        pointer, length = packed >> 32, packed & 0xFFFFFFFF
        answer = self.instance.memory.read(pointer, length)
        self._checked("dealloc", pointer, length)  # the answer is ours to free
        return json.loads(answer)

    def load_graph(self, model: str | bytes) -> int:
        """Load a model: ``classify_nn`` through WASI-NN, ``classify_tract`` into its own memory.

        Parameters
        ----------
        model : str or bytes
            A whole ONNX file; or, for ``classify_nn``, a name that the host knows
            (`edgelab.wasinn.WasiNN`).

        Returns
        -------
        int
            The guest's slot, for `compute`.
        """
        data = model.encode() if isinstance(model, str) else model
        with self.buffer(len(data)) as block:
            self.instance.memory.write(block.pointer, data)
            if isinstance(model, str):
                return self._checked("nn_load_by_name", block.pointer, len(data))
            if self._engine == "tract":
                return self._checked("tract_load", block.pointer, len(data))
            return self._checked("nn_load", block.pointer, len(data), int(Encoding.ONNX))

    def compute(self, graph: int, tensor: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
        """Run a model on a tensor, in ``classify_nn`` or ``classify_tract``.

        Parameters
        ----------
        graph : int
            From `load_graph`.
        tensor : numpy.ndarray
            ``float32``. A view that `preprocess` or `normalize` returned is used where it is;
            anything else is copied into the guest first.
        classes : int
            Number of logits.

        Returns
        -------
        numpy.ndarray
            ``float32``, ``(classes,)``.

        Raises
        ------
        GuestError
            If the model refuses the tensor, fails, or has another number of outputs.
        """
        tensor = np.asarray(tensor, np.float32)
        source = self._put("input", tensor, "tensor", "planes")
        if tensor.shape != self._shape:
            self._dims = self._put("dims", np.array(tensor.shape, "<u4"))
            self._shape = tensor.shape
        out = self._scratch("logits", 4 * classes)
        written = self._checked(
            f"{self._engine}_compute", graph, self._dims, tensor.ndim, source, tensor.nbytes,
            out.pointer, out.size_bytes,
        )  # fmt: skip
        if written != out.size_bytes:
            raise GuestError(
                f"the model gave {written // 4} logits for {classes} labels; its metadata is wrong"
            )
        return out.array(classes, np.float32)

    def unload(self, graph: int) -> None:
        """Drop a model that `load_graph` loaded."""
        self._checked(f"{self._engine}_unload", graph)

    def _put(self, name: str, data: NDArray[Any], *homes: str) -> int:
        """Return the guest address of an array, after copying it into the scratch block `name`.

        An array that lies in one of the blocks `homes`, where another call left it, stays there.
        """
        for home in map(self._buffers.get, homes):
            if home is not None and data.flags.c_contiguous:
                pointer = data.ctypes.data - self.instance.memory.base
                if home.pointer <= pointer <= home.pointer + home.size_bytes - data.nbytes:
                    return pointer
        block = self._scratch(name, data.nbytes)
        np.copyto(block.array(data.shape, data.dtype), data)
        return block.pointer

    def _scratch(self, name: str, size_bytes: int) -> Buffer:
        """The reused block `name`, allocated anew when its size changes."""
        block = self._buffers.get(name)
        if block is None or block.size_bytes != size_bytes:
            if block is not None:
                del self._buffers[name]
                block.free()
            block = self._buffers[name] = self.buffer(size_bytes)
        return block

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self.instance.function(name)
        return function

    def _checked(self, name: str, *arguments: int) -> int:
        status: int = self._function(name)(*arguments)
        if status < 0:
            packed = self._function("last_error")() & (1 << 64) - 1
            text = self.instance.memory.read(packed >> 32, packed & 0xFFFFFFFF)
            reasons = [f"{name}: {text.decode(errors='replace')} (status {status})"]
            if status == _WASI_NN_FAILED:  # the guest got a number; the host knows the reason
                for host in self.instance.guest.host:
                    if isinstance(host, WasiNN) and host.errors:
                        reasons.append(host.errors[-1])
            raise GuestError(". ".join(reasons))
        return status


def _params(spec: Spec) -> NDArray[np.uint8]:
    packed = PARAMS.pack(spec.resize, spec.crop, *spec.mean, *spec.std)
    return np.frombuffer(packed, np.uint8)


def _kernel_number(kernel: str) -> int:
    try:
        return KERNELS.index(kernel)
    except ValueError:
        raise ValueError(f"unknown kernel {kernel!r}; there are {', '.join(KERNELS)}") from None
