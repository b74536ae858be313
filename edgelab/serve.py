"""Classify over the network: the Open Inference Protocol by kserve, the work by guests.

HTTP and gRPC come from kserve, uvicorn and grpcio. What is ours: requests are checked before they
cost anything, concurrency is bounded, and each answer goes through a guest and WASI-NN.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gc
import hashlib
import hmac
import logging
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelab import __version__
from edgelab.errors import BusyError, EdgelabError, ImageError, LimitError
from edgelab.paths import PACKAGE
from edgelab.pipeline import STAGES, Classification, Pipeline
from edgelab.pool import Workers
from edgelab.repository import MAX_REQUEST_BYTES, Repository
from edgelab.runtime import Limits
from edgelab.wasinn.backends import Graph

if sys.platform == "win32":  # uvloop, which is faster, is not made for it
    from asyncio import run as run
else:
    from uvloop import run as run

with contextlib.ExitStack() as _stack:
    # kserve parses the command line when it is imported, as if every program were its server.
    _stack.callback(setattr, sys, "argv", sys.argv)
    sys.argv = sys.argv[:1]
    import grpc
    import kserve
    import orjson
    import prometheus_client
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from kserve.errors import (
        InvalidInput,
        ModelNotFound,
        ModelNotReady,
        ServerNotReady,
        UnsupportedProtocol,
    )
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as rpc
    from kserve.protocol.grpc.servicer import InferenceServicer
    from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension
    from kserve.protocol.rest.v2_datamodels import (
        InferenceRequest,
        ModelMetadataResponse,
        ModelReadyResponse,
    )
    from kserve.protocol.rest.v2_endpoints import V2Endpoints
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

T = TypeVar("T")
_log = logging.getLogger("edgelab.serve")
_JSON_LENGTH = "inference-header-content-length"

_REQUESTS = prometheus_client.Counter(
    "edgelab_requests", "Answers by protocol and status", ["protocol", "code"]
)
_STAGE_SECONDS = prometheus_client.Histogram(
    "edgelab_stage_seconds", "Wall time of a pipeline's stage", ["model", "stage"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
)  # fmt: skip
_IN_FLIGHT = prometheus_client.Gauge("edgelab_in_flight", "Inference requests being answered")
_LOADED = prometheus_client.Gauge("edgelab_loaded_bytes", "Bytes of the model files loaded")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to serve.

    Attributes
    ----------
    host : str
        Address to listen on. The default can be reached from this machine only.
    http_port, grpc_port : int or None
        0 takes any free port; None turns gRPC off.
    workers, queue : int, optional
        Threads with a guest each, and requests that may wait for one; see `edgelab.pool.Workers`.
        A request beyond them is refused at once: 503, or RESOURCE_EXHAUSTED.
    connections : int
        HTTP connections at a time.
    body_bytes : int
        Largest request.
    request_seconds : float
        From the first byte of a request's head to the last of its answer.
    token : str, optional
        What clients must send as ``Authorization: Bearer TOKEN``. Health and metrics stay open.
    certificate, key : pathlib.Path, optional
        PEM files for TLS, both or none.
    grace_seconds : float
        How long a shutdown waits for requests that are being answered.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int | None = 8081
    workers: int | None = None
    queue: int | None = None
    connections: int = 256
    body_bytes: int = MAX_REQUEST_BYTES
    request_seconds: float = 10.0
    token: str | None = dataclasses.field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise EdgelabError("TLS needs a certificate and its key: give both, or none")
        if self.token is not None and not self.token.isascii():
            raise EdgelabError("a token must be ASCII: it travels in a header")


class EdgeModel(kserve.Model):  # type: ignore[misc]
    """A model of a `Repository` as kserve sees it.

    It takes either the model's own input tensor (FP32, ``[n, 3, crop, crop]``, prepared by the
    client) and answers with the logits, or encoded images (``image``, BYTES, ``[n]``: JPEG, PNG,
    WebP ...) and answers with ``label``, ``probability`` and ``index`` (``[n, top]``).
    """

    def __init__(self, name: str, repository: Repository, workers: Workers) -> None:
        super().__init__(name)
        self._repository, self._workers = repository, workers

    async def healthy(self) -> bool:
        """Tell whether the model is loaded."""
        return self.name in self._repository.loaded

    def load(self) -> bool:
        """Load the model now; else that happens on its first request."""
        return self._repository[self.name] is not None

    def stop(self) -> None:
        """Unload the model."""
        self._repository.unload(self.name)

    async def _pipeline(self) -> Pipeline:
        ready = self._repository.ready(self.name)
        if ready is None:
            ready = await asyncio.to_thread(self._repository.__getitem__, self.name)
        return ready

    async def get_input_types(self) -> list[dict[str, Any]]:
        """Return what the model takes, for its metadata."""
        pipeline = await self._pipeline()
        crop = pipeline.model.spec.crop
        return [
            {"name": _graph(pipeline).inputs[0].name, "datatype": "FP32",
             "shape": [-1, 3, crop, crop]},
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
        ]  # fmt: skip

    async def get_output_types(self) -> list[dict[str, Any]]:
        """Return what the model gives, for its metadata."""
        pipeline = await self._pipeline()
        classes = len(pipeline.model.spec.labels)
        return [
            {"name": _graph(pipeline).outputs[0].name, "datatype": "FP32", "shape": [-1, classes]},
            {"name": "label", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "probability", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "index", "datatype": "INT32", "shape": [-1, -1]},
        ]

    async def predict(
        self, payload: InferRequest, headers: Any = None, response_headers: Any = None
    ) -> InferResponse:
        """Answer one request.

        Raises
        ------
        InvalidInput
            If its tensors are not what the model takes.
        EdgelabError
            If all workers are busy, an image is bad, or a limit was hit.
        """
        pipeline = await self._pipeline()
        graph = _graph(pipeline)
        tensor = graph.inputs[0].name
        if len(payload.inputs) != 1:
            raise InvalidInput(f"send one input, {tensor!r} or 'image', not {len(payload.inputs)}")
        given = payload.inputs[0]
        if given.name == "image" and given.datatype == "BYTES":
            top = _count((payload.parameters or {}).get("top", 3))
            pictures = await _apart(_size(given), _as_pictures, given)
            found = await self._run(
                pipeline, lambda replica: [replica.classify(each, top) for each in pictures]
            )
            outputs = _described(found)
            for each in found:
                self._observe(each)
        elif given.name == tensor:
            # To look at raw bytes as numbers takes no time, however many they are.
            size = 0 if given._raw_data is not None else _size(given)
            tensors = await _apart(size, _as_tensors, given, pipeline.model.spec.crop)
            logits = await self._run(pipeline, lambda replica: replica.infer(tensors))
            outputs = [(graph.outputs[0].name, "FP32", logits)]
        else:
            raise InvalidInput(
                f"the model takes {tensor!r} (FP32) or 'image' (BYTES), not "
                f"{str(given.name)[:80]!r} ({str(given.datatype)[:20]})"
            )
        return _response(payload, self.name, outputs)

    async def classify(self, picture: bytes, top: int) -> Classification:
        """Classify one encoded image."""
        pipeline = await self._pipeline()
        found: Classification = await self._run(
            pipeline, lambda replica: replica.classify(picture, top)
        )
        self._observe(found)
        return found

    async def _run(self, pipeline: Pipeline, function: Callable[[Pipeline], Any]) -> Any:
        return await asyncio.wrap_future(self._workers.submit(pipeline, function))

    def _observe(self, found: Classification) -> None:
        for stage in STAGES:
            _STAGE_SECONDS.labels(self.name, stage).observe(getattr(found, f"{stage}_ms") / 1e3)


def _graph(pipeline: Pipeline) -> Graph:
    return pipeline.nn.graph(pipeline.model.spec.name)


def _count(value: Any) -> int:
    if hasattr(value, "int64_param"):  # gRPC's parameters
        value = value.int64_param
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1000:
        raise InvalidInput("parameter 'top' must be a whole number from 1 to 1000")
    return value


# What kserve's and NumPy's decoding raise on requests that are not what they should be.
_MALFORMED = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, struct.error,
    RecursionError, MemoryError,
)  # fmt: skip


_AT_ONCE = 1 << 14


async def _apart(size_bytes: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, in a thread if it has so much to do that others would have to wait.

    A thread costs about 0.1 ms, which is more than a small request takes.
    """
    if size_bytes <= _AT_ONCE:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _size(given: InferInput) -> int:
    """How much there is to decode in an input, about."""
    raw = given._raw_data
    return 8 * len(given.data or ()) if raw is None else len(raw)


def _as_numpy(given: InferInput) -> NDArray[Any]:
    try:
        array: NDArray[Any] = given.as_numpy()
    except InvalidInput:
        raise
    except _MALFORMED as error:
        raise InvalidInput(
            f"input {str(given.name)[:80]!r} is malformed: {str(error)[:200]}"
        ) from None
    return array


def _as_tensors(given: InferInput, crop: int) -> NDArray[np.float32]:
    array = _as_numpy(given)
    if given.datatype != "FP32" or array.shape[1:] != (3, crop, crop) or len(array) < 1:
        raise InvalidInput(
            f"input {given.name!r} must be FP32 [n, 3, {crop}, {crop}], not "
            f"{str(given.datatype)[:20]} {list(array.shape)}"
        )
    return np.ascontiguousarray(array, np.float32)


def _as_pictures(given: InferInput) -> list[bytes]:
    array = _as_numpy(given)
    pictures = [each for each in array.reshape(-1).tolist() if isinstance(each, bytes)]
    if array.ndim != 1 or not pictures or len(pictures) != array.size:
        raise InvalidInput(
            "input 'image' must be BYTES [n] in the binary form: the bytes of n encoded images. "
            "JSON can't hold them; or POST one image as the body, with its Content-Type"
        )
    return pictures


def _described(found: list[Classification]) -> list[tuple[str, str, NDArray[Any]]]:
    tops = [each.top for each in found]
    labels = [[prediction.label.encode() for prediction in top] for top in tops]
    probabilities = [[prediction.probability for prediction in top] for top in tops]
    indices = [[prediction.index for prediction in top] for top in tops]
    return [
        ("label", "BYTES", np.array(labels, object)),
        ("probability", "FP32", np.array(probabilities, np.float32)),
        ("index", "INT32", np.array(indices, np.int32)),
    ]


def _response(
    request: InferRequest, name: str, outputs: list[tuple[str, str, NDArray[Any]]]
) -> InferResponse:
    known = {output for output, _, _ in outputs}
    asked = [each.name for each in request.request_outputs or ()]
    if unknown := [str(each)[:80] for each in asked if each not in known]:
        raise InvalidInput(
            f"no output is named {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    answers = [
        InferOutput(output, list(array.shape), datatype, data=array)
        for output, datatype, array in outputs
        if not asked or output in asked
    ]
    if request.from_grpc:  # kserve asks a NumPy array for its truth there
        for answer in answers:
            answer.set_data_from_numpy(answer.data, binary_data=True)
    return InferResponse(
        response_id=request.id or "",
        model_name=name,
        infer_outputs=answers,
        from_grpc=request.from_grpc,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


class _Models(kserve.ModelRepository):  # type: ignore[misc]
    """kserve's view of a `Repository`: every model is known, loaded or not."""

    def __init__(self, repository: Repository, workers: Workers) -> None:
        super().__init__()
        self.models = {name: EdgeModel(name, repository, workers) for name in repository}

    async def load(self, name: str) -> bool:
        return await asyncio.to_thread(self.models[name].load)

    def unload(self, name: str) -> None:
        self.models[name].stop()


class _Extension(ModelRepositoryExtension):  # type: ignore[misc]
    """kserve's loading and unloading, where an unknown model is not one that is not ready."""

    async def load(self, model_name: str) -> None:
        if self._model_registry.get_model(model_name) is None:
            raise ModelNotFound(model_name)
        await super().load(model_name)


class _Plane(DataPlane):  # type: ignore[misc]
    """kserve's data plane, with the truth about this server."""

    draining = False

    async def get_model(self, name: str) -> EdgeModel:
        # kserve's would load a model here and keep all other requests waiting; `predict` loads it.
        model: EdgeModel = self.get_model_from_registry(name)
        return model

    def metadata(self) -> dict[str, Any]:
        return {
            "name": "edgelab",
            "version": __version__,
            "extensions": ["model_repository", "binary_tensor_data"],
        }

    async def ready(self) -> bool:
        return not self.draining


# --- HTTP -----------------------------------------------------------------------------------------

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_OPEN_PATHS = ("/", "/v2/health/live", "/v2/health/ready", "/metrics")


class _Refused(Exception):
    """A request that gets a status and a reason, and no work."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Gate:
    """ASGI middleware: token, size and time, before anything looks at a request."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = False, 500

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        try:
            self._check(scope)
            limited = self._limited(receive)
            async with _timeout(self._settings.request_seconds):
                await self._app(scope, limited, sending)
        except (_Refused, TimeoutError) as refusal:
            if isinstance(refusal, TimeoutError):
                refusal = _Refused(408, f"not done after {self._settings.request_seconds:g} s")
            if begun:
                raise
            await self._refuse(refusal, receive, sending)
        finally:
            _REQUESTS.labels("http", str(status)).inc()

    async def _refuse(self, refusal: _Refused, receive: Receive, send: Send) -> None:
        body = orjson.dumps({"error": str(refusal)})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # To close while the client still sends makes TCP throw the answer away. So take what
        # comes, for a while.
        with contextlib.suppress(TimeoutError):
            async with _timeout(2):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        token = self._settings.token
        if token is not None and scope["path"] not in _OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + token.encode()):
                raise _Refused(401, "send the header 'Authorization: Bearer TOKEN'")
        length = headers.get(b"content-length", b"0")
        if int(length) > self._settings.body_bytes:  # the HTTP parser took only digits
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._settings.body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> _Refused:
        return _Refused(413, f"a request may have {self._settings.body_bytes:,} bytes at most")


@contextlib.asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout` of Python 3.11."""
    task, expired = asyncio.current_task(), False
    assert task is not None

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    handle = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            raise TimeoutError from None
        raise
    finally:
        handle.cancel()


def _failure(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers)


def _status(error: Exception) -> tuple[int, grpc.StatusCode]:
    """What an error is called in HTTP and gRPC; 500 and INTERNAL for what is our fault."""
    for kind, status, code in (
        (InvalidInput, 400, grpc.StatusCode.INVALID_ARGUMENT),
        (ImageError, 400, grpc.StatusCode.INVALID_ARGUMENT),
        (BusyError, 503, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (LimitError, 504, grpc.StatusCode.DEADLINE_EXCEEDED),
        (ModelNotFound, 404, grpc.StatusCode.NOT_FOUND),
        ((ModelNotReady, ServerNotReady), 503, grpc.StatusCode.UNAVAILABLE),
        ((NotImplementedError, UnsupportedProtocol), 501, grpc.StatusCode.UNIMPLEMENTED),
    ):
        if isinstance(error, kind):
            return status, code
    return 500, grpc.StatusCode.INTERNAL


def _reason(error: Exception, status: int) -> str:
    if status < 500 or isinstance(error, EdgelabError):
        return str(error)
    return str(error) or type(error).__name__ if status != 500 else "internal error; see the log"


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    status = _status(error)[0]
    if status == 500:
        _log.error("a request failed", exc_info=error)
    headers = {"retry-after": "1"} if isinstance(error, BusyError) else None
    return _failure(status, _reason(error, status), headers)


class _Infer:
    """ASGI middleware: inference, past all that FastAPI does for a request.

    FastAPI describes the same endpoint to clients. Its way there takes a twentieth of the time of
    an inference.
    """

    def __init__(self, app: Any, endpoint: Callable[[str, Request], Awaitable[Response]]) -> None:
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["type"] == "http" and _INFER_PATH.fullmatch(scope["path"])
        if not found or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._endpoint(found[1], request)
        except (_Refused, TimeoutError):  # for the gate
            raise
        except ClientDisconnect:
            return
        except Exception as error:
            response = await _on_error(request, error)
        await response(scope, receive, send)


async def _body(request: Request) -> bytes:
    """Starlette's ``body``, which copies even a body that comes in one piece."""
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


_INFER_PATH = re.compile("/v2/models/([^/]+)/infer")


def _server_timing(found: Classification) -> str:
    """Stages for a browser's own tools; see the W3C's Server Timing."""
    return ", ".join(f"{stage};dur={getattr(found, f'{stage}_ms'):.3f}" for stage in STAGES)


def _demo() -> tuple[bytes, dict[str, str]]:
    """The demo page with its headers: it runs its own script, and speaks to this server only."""
    page = (PACKAGE / "demo.html").read_bytes()
    hashes = {}
    for tag in (b"script", b"style"):
        (text,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.S)
        hashes[tag] = base64.b64encode(hashlib.sha256(text).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; "
        f"style-src 'sha256-{hashes[b'style']}'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


class Server:
    """The service: HTTP and gRPC in front of a `Repository`.

    Parameters
    ----------
    repository : Repository
    settings : Settings, optional
    limits : edgelab.runtime.Limits, optional
        What a guest may use for one request; the default gives it as long as the request has.

    Attributes
    ----------
    http_port, grpc_port : int or None
        Where it listens, once `start` is done.
    app : fastapi.FastAPI
        The HTTP side, with its OpenAPI description.
    """

    def __init__(
        self,
        repository: Repository,
        settings: Settings | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.http_port: int | None = None
        self.grpc_port: int | None = None
        self._workers = Workers(
            self.settings.workers,
            self.settings.queue,
            limits=limits or Limits(seconds=self.settings.request_seconds),
        )
        self._models = _Models(repository, self._workers)
        self._plane = _Plane(model_registry=self._models)
        self._extension = _Extension(self._models)
        _LOADED.set_function(lambda: sum(repository.loaded.values()))
        self.app = self._application()

    def _application(self) -> FastAPI:
        app = FastAPI(title="edgelab", version=__version__, docs_url=None, redoc_url=None)
        endpoints = V2Endpoints(self._plane, self._extension)
        for path, endpoint in (
            ("/v2", endpoints.metadata),
            ("/v2/health/live", endpoints.live),
            ("/v2/health/ready", endpoints.ready),
            ("/v2/models", endpoints.models),
            ("/v2/models/{model_name}", self._metadata),
            ("/v2/models/{model_name}/ready", self._ready),
        ):
            app.add_api_route(path, endpoint, methods=["GET"])
        app.add_api_route(
            "/v2/models/{model_name}/versions/{rest:path}",
            self._versions,
            methods=["GET", "POST"],
            include_in_schema=False,
        )
        app.add_api_route("/v2/models/{model_name}/infer", self._infer, methods=["POST"])
        app.add_api_route("/v2/repository/index", self._index, methods=["POST"])
        for action in ("load", "unload"):
            app.add_api_route(
                f"/v2/repository/models/{{model_name}}/{action}",
                getattr(endpoints, action),
                methods=["POST"],
            )
        app.add_api_route("/metrics", _metrics, methods=["GET"], include_in_schema=False)
        page, headers = _demo()
        app.add_api_route(
            "/",
            lambda: HTMLResponse(page, headers=headers),
            methods=["GET"],
            include_in_schema=False,
        )
        for kind in (Exception, EdgelabError, InvalidInput, ModelNotFound, ModelNotReady,
                     ServerNotReady, NotImplementedError, UnsupportedProtocol):  # fmt: skip
            app.add_exception_handler(kind, _on_error)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(RequestValidationError, _on_validation_error)
        return app

    async def _metadata(self, model_name: str) -> ModelMetadataResponse:
        """Say what a model takes and gives."""
        return ModelMetadataResponse.model_validate(await self._plane.model_metadata(model_name))

    async def _ready(self, model_name: str) -> ModelReadyResponse:
        """Say whether a model is loaded; if not, its first request loads it."""
        if not await self._plane.model_ready(model_name):
            raise ModelNotReady(model_name)
        return ModelReadyResponse(name=model_name, ready=True)

    async def _versions(self, model_name: str, rest: str) -> None:
        raise NotImplementedError("models have no versions here; leave out /versions/...")

    async def _index(self) -> list[dict[str, str]]:
        """List the models and whether each is loaded."""
        index: list[dict[str, str]] = await self._extension.index()
        return index

    async def _infer(self, model_name: str, request: Request) -> Response:
        """Infer: JSON, JSON followed by binary tensors, or one encoded image as the body."""
        model = self._plane.get_model_from_registry(model_name)
        content_type = request.headers.get("content-type", "application/json").split(";")[0]
        body = await _body(request)
        with _IN_FLIGHT.track_inprogress():
            if content_type.startswith("image/"):
                top = request.query_params.get("top", "3")
                found = await model.classify(body, _count(int(top) if top.isdecimal() else top))
                return JSONResponse(
                    {"model_name": model_name, **found.to_dict()},
                    headers={"Server-Timing": _server_timing(found)},
                )
            length = request.headers.get(_JSON_LENGTH)
            size = int(length) if length and length.isdecimal() and len(length) < 12 else len(body)
            decoded = await _apart(size, _decode, body, length, model_name)
            answer = await model.predict(decoded)
            content, json_length = await _apart(
                sum(each.data.nbytes for each in answer.outputs), answer.to_rest
            )
        if json_length is None:
            return Response(orjson.dumps(content), media_type="application/json")
        return Response(
            content,
            media_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(json_length)},
        )

    async def start(self) -> None:
        """Listen.

        Raises
        ------
        EdgelabError
            If a port is taken, or the certificate can't be used.
        """
        settings = self.settings
        config = uvicorn.Config(
            _Gate(_Infer(self.app, self._infer), settings),
            http=_http_protocol(settings),
            loop="asyncio",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.connections,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
        try:
            listener = listen(settings.host, settings.http_port)
        except (OSError, OverflowError) as error:
            raise EdgelabError(
                f"can't listen on {settings.host}:{settings.http_port}: {error}. Choose another "
                "port with --http-port"
            ) from None
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            listener.close()
            raise EdgelabError(
                f"the certificate {settings.certificate} and key {settings.key} can't be used: "
                f"{error}"
            ) from None
        self._http = _UvicornServer(config)
        self._http_task = asyncio.create_task(self._http.serve([listener]))
        while not self._http.started and not self._http_task.done():
            await asyncio.sleep(0.01)
        self.http_port = listener.getsockname()[1]
        self._grpc: Any = None
        if settings.grpc_port is not None:
            await self._start_grpc(settings.grpc_port)

    async def _start_grpc(self, port: int) -> None:
        settings = self.settings
        self._grpc = grpc.aio.server(
            ThreadPoolExecutor(1),
            interceptors=[_GrpcGate(settings)],
            maximum_concurrent_rpcs=settings.connections,
            options=[
                ("grpc.max_receive_message_length", settings.body_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        rpc.add_GRPCInferenceServiceServicer_to_server(
            _Servicer(self._plane, self._extension), self._grpc
        )
        address = f"{settings.host}:{port}"
        try:
            if settings.certificate is not None and settings.key is not None:
                pair = (settings.key.read_bytes(), settings.certificate.read_bytes())
                self.grpc_port = self._grpc.add_secure_port(
                    address, grpc.ssl_server_credentials([pair])
                )
            else:
                self.grpc_port = self._grpc.add_insecure_port(address)
        except RuntimeError:
            self._grpc = None
            await self.stop()
            raise EdgelabError(
                f"can't listen on {address} for gRPC. Choose another port with --grpc-port"
            ) from None
        await self._grpc.start()

    async def stop(self) -> None:
        """Refuse new requests, finish those being answered within `grace_seconds`, and end."""
        self._plane.draining = True
        self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(self.settings.grace_seconds)
        await self._http_task
        await asyncio.to_thread(self._workers.close)

    async def serve(self, started: Callable[[Server], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM."""
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt ends it
                loop.add_signal_handler(number, asked.set)
        await self.start()
        gc.collect()
        gc.freeze()  # what is there stays: no need to look through it again while requests wait
        if started is not None:
            started(self)
        try:
            await asked.wait()
        finally:
            await self.stop()


def listen(host: str, port: int) -> socket.socket:
    """Return a TCP socket that listens at an address, for asyncio to serve."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # asyncio sets TCP_NODELAY only on a socket that says that it is TCP, which those of
    # `socket.create_server` don't; without it, each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # there, it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


class _UvicornServer(uvicorn.Server):
    """uvicorn without its own signal handlers: HTTP and gRPC stop together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


_HEAD_BYTES = 1 << 16


def _http_protocol(settings: Settings) -> Any:
    """Return uvicorn's protocol with limits on what comes before and between bodies.

    uvicorn times out idle connections only after a first request, and takes heads of any size.
    """

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._in_head, self._unread = True, 0
            self._watch()

        def _watch(self) -> None:
            self._head = self.loop.call_later(settings.request_seconds, self._too_slow, self.cycle)

        def _too_slow(self, cycle: Any) -> None:
            if self.transport.is_closing():
                return
            # A request's own time limit holds from its head on.
            if self.cycle is cycle and (cycle is None or cycle.response_complete):
                self.transport.close()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            self._unread += len(data)
            super().data_received(data)
            # Neither a head nor a part of a body ended in all that.
            if self._unread > _HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of a request is too long.")

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_head:  # else it follows a body, and nobody wants it
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head, self._unread = False, 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            # Not uvicorn's, which stops reading after 64 KiB until somebody took them, and wakes
            # who waits for a body at each piece. Here it is taken as a whole, or refused.
            self._unread = 0
            if self.cycle.response_complete:
                return
            self.cycle.body += body
            if len(self.cycle.body) > settings.body_bytes:
                self.cycle.message_event.set()

        def on_message_complete(self) -> None:
            self._in_head, self._unread = True, 0
            super().on_message_complete()

        def connection_lost(self, error: Exception | None) -> None:
            self._head.cancel()
            super().connection_lost(error)

    return Protocol


async def _metrics(request: Request) -> Response:
    encode, content_type = prometheus_client.exposition.choose_encoder(
        request.headers.get("accept", "")
    )
    return Response(encode(prometheus_client.REGISTRY), headers={"content-type": content_type})


async def _on_http_exception(_: Request, error: Any) -> JSONResponse:
    return _failure(error.status_code, str(error.detail), error.headers)


async def _on_validation_error(_: Request, error: Any) -> JSONResponse:
    return _failure(400, "; ".join(each["msg"] for each in error.errors())[:500])


def _decode(body: bytes, length: str | None, name: str) -> InferRequest:
    """Turn a body into kserve's request; InvalidInput if it is none."""
    try:
        if length is None:
            request = InferenceRequest.model_validate_json(body)
            return InferRequest.from_inference_request(request, name)
        size = int(length) if length.isdecimal() and len(length) < 12 else -1
        if not 0 < size <= len(body):
            raise InvalidInput(
                f"Inference-Header-Content-Length is {length[:20]!r}, and the body has "
                f"{len(body):,} bytes"
            )
        # Not kserve's `from_bytes`: it makes a Python object of each number, and takes BYTES for
        # UTF-8. Its gRPC side keeps raw bytes as they are, and so do we.
        request = InferenceRequest.model_validate_json(_with_data(body[:size]))
        decoded = InferRequest.from_inference_request(request, name)
        at = size
        for given in decoded.inputs:
            length = (given.parameters or {}).get("binary_data_size")
            if length is None:
                continue
            if type(length) is not int or not 0 <= length <= len(body) - at:
                raise InvalidInput(
                    f"input {given.name[:80]!r}: binary_data_size is {str(length)[:20]}, and "
                    f"{len(body) - at:,} bytes are left after the JSON"
                )
            given.data, given._raw_data = None, memoryview(body)[at : at + length]
            at += length
        if at != len(body):
            raise InvalidInput(f"{len(body) - at:,} bytes follow the last binary tensor")
        return decoded
    except InvalidInput:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput(
            f"this is no inference request: {where or 'JSON'}: {first['msg']}"
        ) from None
    except _MALFORMED as error:
        raise InvalidInput(f"this is no inference request: {str(error)[:300]}") from None


def _with_data(head: bytes) -> bytes:
    """Give each binary input an empty ``data``, which kserve's form of a request wants."""
    request = orjson.loads(head)
    for each in request["inputs"]:
        if "binary_data_size" in (each.get("parameters") or {}):
            each["data"] = []
    return orjson.dumps(request)


# --- gRPC -----------------------------------------------------------------------------------------


class _Servicer(InferenceServicer):  # type: ignore[misc]
    """kserve's servicer, whose decoding of malformed requests is an error of the client."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        try:
            self.validate_grpc_request(request)
            decoded = await asyncio.to_thread(InferRequest.from_grpc, request)
        except InvalidInput:
            raise
        except _MALFORMED as error:
            raise InvalidInput(f"this is no inference request: {str(error)[:300]}") from None
        # Not by kserve's `infer`: all that it adds is four histograms, for 0.2 ms.
        with _IN_FLIGHT.track_inprogress():
            model = self._data_plane.get_model_from_registry(request.model_name)
            answer = await model.predict(decoded)
            return await asyncio.to_thread(answer.to_grpc)


class _GrpcGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Token and time before, and a status for each error after."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        allowed = self._allowed(details)

        async def answer(request: Any, context: Any) -> Any:
            code = grpc.StatusCode.OK
            try:
                if not allowed:
                    code = grpc.StatusCode.UNAUTHENTICATED
                    await context.abort(code, "send the metadata 'authorization: Bearer TOKEN'")
                async with _timeout(self._settings.request_seconds):
                    return await handler.unary_unary(request, context)
            except TimeoutError:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
                await context.abort(code, f"not done after {self._settings.request_seconds:g} s")
            except Exception as error:
                if code is not grpc.StatusCode.OK:  # our own abort
                    raise
                status, code = _status(error)
                if status == 500:
                    _log.error("a request failed", exc_info=error)
                await context.abort(code, _reason(error, status))
            finally:
                _REQUESTS.labels("grpc", code.name).inc()

        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    def _allowed(self, details: Any) -> bool:
        if self._settings.token is None or details.method.rsplit("/", 1)[-1] in (
            "ServerLive", "ServerReady",
        ):  # fmt: skip
            return True
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        return hmac.compare_digest(str(given).encode(), f"Bearer {self._settings.token}".encode())
