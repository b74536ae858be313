"""Deploy the service: measure what it needs, and write manifests for Kubernetes from that.

The manifests are Python data, written as YAML; nothing is pasted into a text. What a container may
use is not guessed: `measure_footprint` runs the real server and sends it requests, ordinary ones
and the largest that it accepts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelab import __version__, models
from edgelab.errors import EdgelabError, one_line
from edgelab.images import MAX_PIXELS
from edgelab.paths import cache_dir, write_atomic

HEADROOM = 1.25
"""A container may use this much more than was measured: fragments, threads, another C library."""
USER = 65532
"""Who the container runs as; the image has no name for it, and nobody else has it."""
HTTP_PORT, GRPC_PORT = 8080, 8081
PYTHON = "/opt/edgelab/bin/python"
"""Python in the image that ``Containerfile`` makes."""
_MODELS = "/models"  # where a model image is mounted
_MIB = 1 << 20
_START_MARGIN = 10  # a slower node than this one, and a cold disk

Manifest = dict[str, Any]


# --- what it needs --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the server used on this machine.

    Attributes
    ----------
    model : str
    workers : int
    start_s : float
        Seconds from starting the process to its first answer that it is ready, with an empty
        cache: guests are compiled.
    idle_bytes : int
        Resident memory then.
    photo_bytes : int
        Highest resident memory after photos of 12 megapixels, all workers and their queue busy.
    worst_bytes : int
        The same after the largest picture and the largest JSON that the server accepts.
    requests : int
        How many were sent and answered.
    """

    model: str
    workers: int
    start_s: float
    idle_bytes: int
    photo_bytes: int
    worst_bytes: int
    requests: int

    @property
    def request_bytes(self) -> int:
        """What to reserve: photos, with `HEADROOM`, in steps of 16 MiB."""
        return _rounded(self.photo_bytes)

    @property
    def limit_bytes(self) -> int:
        """What to kill it at: the worst that it accepts, with `HEADROOM`, in steps of 16 MiB."""
        return _rounded(self.worst_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            **asdict(self), "request_bytes": self.request_bytes, "limit_bytes": self.limit_bytes,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.workers} worker(s): ready after {self.start_s:.1f} s; "
            f"{self.idle_bytes / _MIB:.0f} MiB idle, {self.photo_bytes / _MIB:.0f} MiB with photos "
            f"of 12 megapixels, {self.worst_bytes / _MIB:.0f} MiB with the largest requests that "
            f"it accepts ({self.requests} requests). With {HEADROOM - 1:.0%} headroom: request "
            f"{self.request_bytes // _MIB} MiB, limit {self.limit_bytes // _MIB} MiB"
        )


def _rounded(size: int) -> int:
    step = 16 * _MIB
    return math.ceil(size * HEADROOM / step) * step


def measure_footprint(model: str = "signs", *, workers: int = 1, photos: int = 12) -> Footprint:
    """Run the server in a process of its own, send it requests, and read its memory.

    Parameters
    ----------
    model : str
        As ``python -m edgelab serve`` takes it: a name, or ``NAME=FILE``.
    workers : int
        Guests that work at the same time.
    photos : int
        How many requests with a photo.

    Raises
    ------
    EdgelabError
        If the server does not start or does not answer.

    Notes
    -----
    Linux says itself how much a process had at most. Elsewhere it is looked at 200 times a second.
    """
    crowd = 2 * workers  # as many as the workers and their queue take
    with _server(model, workers) as (url, process, start_s), _Memory(process) as memory:
        idle = memory.now()
        address = f"{url}/models/{_model_name(model)}/infer"
        _send(address, [_photo()] * photos, crowd)
        photo = memory.peak()
        worst = [_largest_picture(), _largest_json()]
        for request in worst:
            _send(address, [request] * crowd, crowd)
        return Footprint(
            model, workers, start_s, idle, photo, memory.peak(),
            photos + len(worst) * crowd,
        )  # fmt: skip


Request = tuple[bytes, str]  # body and Content-Type


def _photo() -> Request:
    """A photo as a telephone takes it: 12 megapixels, lying on its side."""
    from PIL import Image

    with Image.open(models.example_image()) as example:
        large = example.convert("RGB").resize((4000, 3000))
    return _encoded(large, "JPEG"), "image/jpeg"


def _largest_picture() -> Request:
    """As many pixels as `edgelab.images` takes, with transparency, and to be turned."""
    from PIL import Image

    side = math.isqrt(MAX_PIXELS)
    return _encoded(Image.new("RGBA", (side, side), "teal"), "PNG"), "image/png"


def _encoded(picture: Any, format: str) -> bytes:
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation: a quarter turn
    out = io.BytesIO()
    picture.save(out, format, exif=turned, compress_level=1)  # a JPEG has no such level
    return out.getvalue()


def _largest_json() -> Request:
    """Numbers up to the server's limit on a request's bytes; each becomes a Python object."""
    # Not from edgelab.serve: once kserve is imported, a process can't use tritonclient.
    from edgelab.repository import MAX_REQUEST_BYTES

    head = b'{"inputs":[{"name":"input","shape":[1],"datatype":"FP32","data":['
    count = (MAX_REQUEST_BYTES - len(head) - 8) // 2
    return head + b"9," * count + b"9]}]}", "application/json"


@contextlib.contextmanager
def _server(model: str, workers: int) -> Iterator[tuple[str, subprocess.Popen[str], float]]:
    import requests

    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        if (known := cache_dir() / "models").is_dir():  # downloads are no part of this
            Path(cache, "models").symlink_to(known)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "edgelab", "serve", *_arguments(model, workers),
             "--http-port", "0", "--no-grpc"],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "EDGELAB_CACHE": cache, "EDGELAB_TOKEN": ""},
        )  # fmt: skip
        late = threading.Timer(120, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("HTTP: "):
                process.wait(10)
                errors.seek(0)
                raise EdgelabError(f"the server does not start: {errors.read().strip()[-500:]}")
            url = line.split()[1]
            requests.get(f"{url}/health/ready", timeout=10).raise_for_status()
            yield url, process, time.perf_counter() - start
        except requests.RequestException as error:
            raise EdgelabError(f"the server does not answer: {one_line(error)}") from None
        finally:
            late.cancel()
            process.kill()
            process.communicate()


def _send(address: str, bodies: Sequence[Request], crowd: int) -> None:
    import requests

    def post(request: Request) -> int:
        body, kind = request
        headers = {"Content-Type": kind}
        return requests.post(address, data=body, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(crowd) as pool:
        codes = set(pool.map(post, bodies))
    # A tensor of the wrong shape is refused when it has been read, and slow machines run late.
    if unexpected := codes - {200, 400, 408, 503, 504}:
        raise EdgelabError(f"the server answered {sorted(unexpected)} while it was measured")


class _Memory(threading.Thread):
    """Resident memory of a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        import psutil  # which kserve brings

        super().__init__(daemon=True)
        self._process, self._watched = process, psutil.Process(process.pid)
        self._status = Path(f"/proc/{process.pid}/status")
        self._seen, self._done = 0, threading.Event()

    def __enter__(self) -> _Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        with contextlib.suppress(Exception):  # the process ended: `now` tells
            while not self._status.exists() and not self._done.wait(0.005):
                self._seen = max(self._seen, self.now())

    def now(self) -> int:
        if self._process.poll() is not None:
            raise EdgelabError(
                f"the server ended with {self._process.poll()} while it was measured. -9: there "
                "was too little memory on this machine"
            )
        return int(self._watched.memory_info().rss)

    def peak(self) -> int:
        now = self.now()
        if self._status.exists():
            found = re.search(r"^VmHWM:\s+(\d+) kB$", self._status.read_text(), re.M)
            return int(found[1]) * 1024 if found else now
        return max(self._seen, now)


# --- what to deploy -------------------------------------------------------------------------------

# https://kubernetes.io/docs/concepts/overview/working-with-objects/names/: an RFC 1123 label. Room
# is left for the suffixes that names get here.
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
# https://github.com/distribution/reference: registry, path, then tag, digest or both.
_IMAGE = re.compile(
    r"(?=.{1,400}\Z)"
    r"(?:[a-zA-Z0-9](?:[-a-zA-Z0-9.]*[a-zA-Z0-9])?(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
    r"(?P<tag>:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?"
    r"(?P<digest>@sha256:[0-9a-f]{64})?"
)


def check_image(reference: str, *, digest: bool = False) -> str:
    """Return an image reference that says which image, or refuse it.

    Parameters
    ----------
    reference : str
    digest : bool
        Whether it must name the image by its contents: ``...@sha256:...``.

    Raises
    ------
    EdgelabError
        If it is none, has neither tag nor digest, or its tag is ``latest``.
    """
    found = _IMAGE.fullmatch(reference)
    if found is None:
        raise EdgelabError(
            f"{reference[:80]!r} is no image reference, such as "
            "registry.example/edgelab:0.1.0 or registry.example/edgelab@sha256:..."
        )
    if digest and not found["digest"]:
        raise EdgelabError(
            f"{reference!r} must end in @sha256: and 64 digits. A tag can be moved to another "
            "image; `skopeo inspect` says the digest"
        )
    if not found["digest"] and found["tag"] in (None, ":latest"):
        raise EdgelabError(
            f"{reference!r} says not which version: each node would run what it finds. Give a tag "
            "other than latest, or better a digest"
        )
    return reference


@dataclass(frozen=True, slots=True)
class Plan:
    """What to deploy. Every text in it is checked: it ends up in commands and paths.

    Attributes
    ----------
    model : str
        A name of `edgelab.models`, or ``NAME=FILE``; the file is read for its hash, and must then
        be in `model_image`.
    footprint : Footprint
    image : str
        What ``Containerfile`` makes.
    model_image : str, optional
        An image that holds ``/NAME.onnx``, by its digest. Without, the server's image has the
        model, or an init container downloads it.
    replicas : int

    Raises
    ------
    EdgelabError
        If a name or reference is none, or there is no way to bring the model.
    """

    model: str
    footprint: Footprint
    image: str = f"localhost/edgelab:{__version__}"
    model_image: str | None = None
    replicas: int = 3

    def __post_init__(self) -> None:
        check_image(self.image)
        if self.model_image is not None:
            check_image(self.model_image, digest=True)
        if not _LABEL.fullmatch(self.name):
            raise EdgelabError(
                f"{self.name[:80]!r} can't name a model in Kubernetes: 1 to 40 of a-z, 0-9 and -, "
                "with no - at either end. Give another one: NAME=FILE"
            )
        if not 1 <= self.replicas <= 1000:
            raise EdgelabError(f"{self.replicas} replicas; 1 to 1000 make sense")
        if not self._is_file:
            _entry(self.name)
        if self._is_file and self.model_image is None:
            raise EdgelabError(
                f"{self.name} is a file of yours: put it into an image as /{self.name}.onnx, and "
                "give that as --model-image (docs/deployment.md shows how)"
            )

    @property
    def _is_file(self) -> bool:
        return "=" in self.model

    @property
    def name(self) -> str:
        """The model's name; the manifests' names begin with it."""
        return _model_name(self.model)

    @property
    def delivery(self) -> str:
        """How the model gets into the pod: ``"image"``, ``"download"`` or ``"ships"``."""
        if self.model_image is not None:
            return "image"
        return "ships" if "path" in _entry(self.name) else "download"

    @property
    def sha256(self) -> str:
        """The model file's hash: the registry's pin, or that of the file given."""
        if self._is_file:
            data = models.read_file(self.model.partition("=")[2])
            return hashlib.sha256(data).hexdigest()
        return str(_entry(self.name)["sha256"])


def _entry(name: str) -> dict[str, Any]:
    if name not in models.registry():
        raise EdgelabError(
            f"no model is named {name!r}; there are {', '.join(models.names())}, or give NAME=FILE"
        )
    return models.registry()[name]


def _model_name(model: str) -> str:
    return model.partition("=")[0]


def _arguments(model: str, workers: int) -> list[str]:
    # Not the default: a container sees all cores of its node, whatever its share of them.
    return [model, "--workers", str(workers)]


def _served(plan: Plan) -> list[str]:
    model = f"{plan.name}={_MODELS}/{plan.name}.onnx" if plan.delivery == "image" else plan.name
    return _arguments(model, plan.footprint.workers)


def _model_mount() -> Manifest:
    return {"name": "model", "mountPath": _MODELS, "readOnly": True}


def _labels(plan: Plan) -> dict[str, str]:
    return {"app.kubernetes.io/name": "edgelab", "app.kubernetes.io/instance": plan.name}


def _metadata(plan: Plan, suffix: str = "") -> Manifest:
    return {"name": f"edgelab-{plan.name}{suffix}", "labels": _labels(plan)}


def _locked_down() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _probes(footprint: Footprint) -> Manifest:
    def get(path: str, **times: int) -> Manifest:
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 3, **times}

    patience = max(30, math.ceil(footprint.start_s * _START_MARGIN))
    return {
        "startupProbe": get("/v2/health/ready", periodSeconds=1, failureThreshold=patience),
        "readinessProbe": get("/v2/health/ready", periodSeconds=5, failureThreshold=2),
        "livenessProbe": get("/v2/health/live", periodSeconds=10, failureThreshold=3),
    }


def _container(plan: Plan) -> Manifest:
    cores = str(plan.footprint.workers)
    memory = plan.footprint
    return {
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "args": _served(plan),  # the image's entry point is `edgelab serve`
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "grpc", "containerPort": GRPC_PORT},
        ],
        "env": [
            {
                "name": "EDGELAB_TOKEN",
                "valueFrom": {
                    "secretKeyRef": {
                        "name": f"edgelab-{plan.name}-token", "key": "token", "optional": True,
                    }
                },
            },
        ],
        "resources": {
            "requests": {"cpu": cores, "memory": f"{memory.request_bytes // _MIB}Mi"},
            "limits": {"cpu": cores, "memory": f"{memory.limit_bytes // _MIB}Mi"},
        },
        "securityContext": _locked_down(),
        "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    }  # fmt: skip


def _helper(plan: Plan, name: str, command: list[str], mounts: list[Manifest]) -> Manifest:
    small = {"cpu": "100m", "memory": f"{plan.footprint.request_bytes // _MIB}Mi"}
    return {
        "name": name,
        "image": plan.image,
        "command": command,
        "resources": {"requests": small, "limits": small},
        "securityContext": _locked_down(),
        "volumeMounts": mounts,
    }


def _pin_name(plan: Plan) -> str:
    # Another model is another name: so that pods that run are replaced, not confused.
    return f"edgelab-{plan.name}-{plan.sha256[:12]}"


def _pin(plan: Plan) -> list[Manifest]:
    """The hash, for ``sha256sum --check``: this is what a ConfigMap has room for."""
    if plan.delivery != "image":
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": _pin_name(plan), "labels": _labels(plan)},
            "immutable": True,
            "data": {"SHA256SUMS": f"{plan.sha256}  {_MODELS}/{plan.name}.onnx\n"},
        }
    ]


def _pod_parts(plan: Plan) -> tuple[list[Manifest], list[Manifest]]:
    """Init containers and volumes: where machine code goes, and how the model comes."""
    cache = {"name": "cache", "emptyDir": {"sizeLimit": "2Gi"}}
    cached = {"name": "cache", "mountPath": "/cache"}
    if plan.delivery == "download":
        fetch = [PYTHON, "-m", "edgelab", "models", "fetch", plan.name]
        return [_helper(plan, "fetch-model", fetch, [cached])], [cache]
    if plan.delivery == "ships":
        return [], [cache]
    check = ["sha256sum", "--check", "--strict", "/pins/SHA256SUMS"]
    mounts = [
        _model_mount(),
        {"name": "pins", "mountPath": "/pins", "readOnly": True},
    ]
    volumes = [
        cache,
        {"name": "model", "image": {"reference": plan.model_image, "pullPolicy": "IfNotPresent"}},
        {"name": "pins", "configMap": {"name": _pin_name(plan)}},
    ]
    return [_helper(plan, "check-model", check, mounts)], volumes


def kubernetes(plan: Plan) -> list[Manifest]:
    """Return a Deployment, a Service, a PodDisruptionBudget and a NetworkPolicy.

    With `Plan.model_image` there is also the ConfigMap that pins the model's hash, and the cluster
    must have image volumes (Kubernetes 1.31 behind a switch, 1.35 without).
    """
    labels = _labels(plan)
    helpers, volumes = _pod_parts(plan)
    container = {"name": "edgelab", **_container(plan), **_probes(plan.footprint)}
    # Time for the other parts of the cluster to stop sending; then it ends what was begun.
    container["lifecycle"] = {"preStop": {"sleep": {"seconds": 5}}}
    if plan.delivery == "image":
        container["volumeMounts"].append(_model_mount())
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 30,
        "securityContext": _pod_security(),
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        **({"initContainers": helpers} if helpers else {}),
        "containers": [container],
        "volumes": volumes,
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            **_metadata(plan),
            "annotations": {"edgelab/model-sha256": plan.sha256},
        },
        "spec": {
            "replicas": plan.replicas,
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
            },
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    ports = [
        {"name": name, "port": port, "targetPort": name, "appProtocol": protocol}
        for name, port, protocol in (
            ("http", HTTP_PORT, "http"),
            ("grpc", GRPC_PORT, "kubernetes.io/h2c"),
        )
    ]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan),
        "spec": {"selector": labels, "ports": ports},
    }
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(plan),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
    }
    return [*_pin(plan), deployment, service, budget, _network_policy(plan)]


def _network_policy(plan: Plan) -> Manifest:
    """From this namespace in; out only for what an init container downloads."""
    out: list[Manifest] = []
    if plan.delivery == "download":
        ports = [("UDP", 53), ("TCP", 53), ("TCP", 443)]
        out = [{"ports": [{"protocol": protocol, "port": port} for protocol, port in ports]}]
    entry = [{"protocol": "TCP", "port": port} for port in (HTTP_PORT, GRPC_PORT)]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(plan),
        "spec": {
            "podSelector": {"matchLabels": _labels(plan)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}], "ports": entry}],
            "egress": out,
        },
    }


def kserve(plan: Plan) -> list[Manifest]:
    """Return a ServingRuntime and an InferenceService, for a cluster that has KServe.

    The model comes as in `kubernetes`, and not by KServe's ``storageUri``: that checks no hash.
    """
    runtime_container = {"name": "kserve-container", **_container(plan)}
    arguments = runtime_container.pop("args")
    runtime = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "edgelab", "labels": {"app.kubernetes.io/name": "edgelab"}},
        "spec": {
            "annotations": {
                "prometheus.kserve.io/port": str(HTTP_PORT),
                "prometheus.kserve.io/path": "/metrics",
            },
            # By name only: a model here carries labels and constants, as not every ONNX file does.
            "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": False}],
            "protocolVersions": ["v2", "grpc-v2"],
            "containers": [{**runtime_container, **_probes(plan.footprint)}],
            "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "2Gi"}}],
        },
    }
    model: Manifest = {
        "modelFormat": {"name": "onnx", "version": "1"},
        "protocolVersion": "v2",
        "runtime": "edgelab",
        "args": arguments,
    }
    predictor: Manifest = {
        "minReplicas": plan.replicas,
        "maxReplicas": plan.replicas,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 30,
        "securityContext": _pod_security(),
        "model": model,
    }
    helpers, volumes = _pod_parts(plan)
    if plan.delivery == "image":
        model["volumeMounts"] = [_model_mount()]
        predictor["volumes"] = [volume for volume in volumes if volume["name"] != "cache"]
    if helpers:
        predictor["initContainers"] = helpers
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            **_metadata(plan),
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "edgelab/model-sha256": plan.sha256,
            },
        },
        "spec": {"predictor": predictor},
    }
    return [*_pin(plan), runtime, service]


def wasm(image: str) -> list[Manifest]:
    """Return a RuntimeClass and a Pod that runs the guest ``cli`` with no container around it.

    For nodes whose containerd has the shim ``io.containerd.wasmtime.v1`` under the handler
    ``wasmtime``. The guest has its small model inside its image and reads one request from its
    standard input: ``kubectl attach -i POD < request.json``. Such shims have no WASI-NN.

    Parameters
    ----------
    image : str
        Holds ``/cli.wasm`` and ``/tiny.safetensors`` and nothing else.

    Raises
    ------
    EdgelabError
        If `image` is no reference.
    """
    labels = {"app.kubernetes.io/name": "edgelab-cli"}
    amount = {"cpu": "500m", "memory": "128Mi"}  # the article's; the shim is part of it
    return [
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": "wasmtime"},
            "handler": "wasmtime",
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "edgelab-cli", "labels": labels},
            "spec": {
                "runtimeClassName": "wasmtime",
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {**_pod_security()},
                "containers": [
                    {
                        "name": "cli",
                        "image": check_image(image),
                        "command": ["/cli.wasm"],
                        "args": ["--model", "/tiny.safetensors"],
                        "stdin": True,
                        "stdinOnce": True,
                        "resources": {"requests": amount, "limits": amount},
                        "securityContext": _locked_down(),
                    }
                ],
            },
        },
    ]


def article(module: bytes, *, path: str = "/app/infer.wasm") -> list[Manifest]:
    """Return what the article deploys, in our words: to see what is wrong with it.

    A ConfigMap with the module, and a Deployment of three replicas with 64 to 128 MiB.

    Parameters
    ----------
    module : bytes
        The .wasm file.
    path : str
        Where it is mounted, and what the command runs.
    """
    import base64

    name = path.rsplit("/", 1)[-1]
    labels = {"app": "edge-inference"}
    container = {
        "name": "inference",
        "image": "wasmedge/wasmedge:latest",
        "command": ["wasmedge", path],
        "resources": {
            "requests": {"cpu": "100m", "memory": "64Mi"},
            "limits": {"cpu": "500m", "memory": "128Mi"},
        },
        "volumeMounts": [{"name": "module", "mountPath": path}],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "wasm-module"},
            "binaryData": {name: base64.b64encode(module).decode()},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "edge-inference"},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "containers": [container],
                        "volumes": [{"name": "module", "configMap": {"name": "wasm-module"}}],
                    },
                },
            },
        },
    ]


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """Write manifests as one YAML stream."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # what occurs twice is written twice
            return True

    return yaml.dump_all(
        manifests, Dumper=Plain, sort_keys=False, explicit_start=True, allow_unicode=False, width=99
    )


def write(plan: Plan, folder: str | Path, *, wasm_image: str | None = None) -> list[Path]:
    """Write ``kubernetes.yaml``, ``kserve.yaml`` and, with an image for it, ``wasm.yaml``.

    Returns
    -------
    list of Path
        The files; each is there whole, or as it was.
    """
    made = {"kubernetes.yaml": kubernetes(plan), "kserve.yaml": kserve(plan)}
    if wasm_image is not None:
        made["wasm.yaml"] = wasm(wasm_image)
    written = []
    for name, manifests in made.items():
        path = Path(folder, name)
        try:
            write_atomic(path, to_yaml(manifests).encode())
        except OSError as error:
            raise EdgelabError(f"can't write {path}: {error.strerror}") from None
        written.append(path)
    return written
