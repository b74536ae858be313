"""The service as its users and its enemies see it: its own process, real clients, raw sockets."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from edgelab import models
from edgelab.datasets import Signs
from edgelab.models import example_image
from edgelab.preprocess import preprocess

PHOTO = example_image().read_bytes()
TOKEN = "a secret of 21 letters"


class Service:
    """``python -m edgelab serve`` with free ports."""

    def __init__(self, *options: str, token: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgelab", "serve", "--http-port=0", "--grpc-port=0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "EDGELAB_TOKEN": token},
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(2)]
        assert lines[0].startswith("HTTP: "), lines
        self.url = lines[0].split()[1].removesuffix("/v2")
        self.http = self.url.split("//")[1]
        self.grpc = lines[1].split()[1]
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(self.process.stdout)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def send(self, data: bytes, seconds: float = 10) -> bytes:
        """Send raw bytes, and return all that comes until the other side closes."""
        host, port = self.http.split(":")
        with socket.create_connection((host, int(port)), timeout=seconds) as connection:
            connection.sendall(data)
            got = b""
            with contextlib.suppress(ConnectionError):
                while chunk := connection.recv(65536):
                    got += chunk
            return got


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service("signs", "twin=" + str(models.models_dir() / "signs" / "signs.onnx"))
    yield service
    assert service.process.poll() is None, service.log  # nothing here may have killed it
    assert service.stop() == 0
    assert "Traceback" not in "".join(service.log), "".join(service.log)


@pytest.fixture(scope="module")
def tensor() -> Any:
    return preprocess(Signs("test", 10)[9].image, models.load("signs").spec)


@pytest.fixture(scope="module")
def logits(tensor: Any) -> Any:
    session = onnxruntime.InferenceSession(models.load("signs").data)
    return session.run(None, {"input": tensor})[0]


def http_input(tensor: Any, name: str = "input", binary: bool = True) -> Any:
    given = tritonclient.http.InferInput(name, list(tensor.shape), "FP32")
    given.set_data_from_numpy(tensor, binary_data=binary)
    return given


# --- what it is for -------------------------------------------------------------------------------


def test_health_and_metadata(service: Service) -> None:
    with tritonclient.http.InferenceServerClient(service.http) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("signs")
        about = client.get_server_metadata()
        assert about["name"] == "edgelab"
        assert "binary_tensor_data" in about["extensions"]
        model = client.get_model_metadata("signs")
        assert model["inputs"][0] == {
            "name": "input", "datatype": "FP32", "shape": [-1, 3, 224, 224],
        }  # fmt: skip
        assert model["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 32]}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_over_http(
    service: Service, tensor: Any, logits: Any, binary_in: bool, binary_out: bool
) -> None:
    with tritonclient.http.InferenceServerClient(service.http) as client:
        wanted = tritonclient.http.InferRequestedOutput("logits", binary_data=binary_out)
        answer = client.infer("signs", [http_input(tensor, binary=binary_in)], outputs=[wanted])
    assert np.abs(answer.as_numpy("logits") - logits).max() < 1e-4


def test_the_clients_default_and_a_batch(service: Service, tensor: Any, logits: Any) -> None:
    batch = np.concatenate([tensor, tensor[:, :, ::-1].copy(), tensor])
    with tritonclient.http.InferenceServerClient(service.http) as client:
        answer = client.infer("signs", [http_input(batch)], request_id="seven")
    assert answer.get_response()["id"] == "seven"
    seen = answer.as_numpy("logits")
    assert seen.shape == (3, 32)
    assert np.abs(seen[[0, 2]] - logits).max() < 1e-4
    assert np.abs(seen[1] - logits).max() > 0.1


def test_tensors_and_pictures_over_grpc(service: Service, tensor: Any, logits: Any) -> None:
    with tritonclient.grpc.InferenceServerClient(service.grpc) as client:
        assert client.is_server_live()
        assert client.is_model_ready("signs")
        assert client.get_model_metadata("signs").outputs[0].name == "logits"
        given = tritonclient.grpc.InferInput("input", list(tensor.shape), "FP32")
        given.set_data_from_numpy(tensor)
        answer = client.infer("signs", [given])
        assert np.abs(answer.as_numpy("logits") - logits).max() < 1e-4
        pictures = tritonclient.grpc.InferInput("image", [2], "BYTES")
        pictures.set_data_from_numpy(np.array([PHOTO, PHOTO], object))
        answer = client.infer("signs", [pictures])
        assert answer.as_numpy("label")[:, 0].tolist() == [b"stop"] * 2
        assert answer.as_numpy("index").shape == (2, 3)


def test_encoded_pictures_over_http(service: Service) -> None:
    pictures = tritonclient.http.InferInput("image", [1], "BYTES")
    pictures.set_data_from_numpy(np.array([PHOTO], object))
    with tritonclient.http.InferenceServerClient(service.http) as client:
        answer = client.infer("signs", [pictures])
        assert answer.as_numpy("label")[0, 0] == b"stop"
    url = f"{service.url}/v2/models/signs/infer"
    found = requests.post(f"{url}?top=2", PHOTO, headers={"Content-Type": "image/jpeg"}, timeout=9)
    assert found.status_code == 200
    assert found.json()["top"][0]["label"] == "stop"
    assert len(found.json()["top"]) == 2
    assert found.json()["infer_ms"] > 0


def test_models_unload_and_load(service: Service, tensor: Any) -> None:
    with tritonclient.http.InferenceServerClient(service.http) as client:

        def states() -> dict[str, str]:
            index = requests.post(f"{service.url}/v2/repository/index", timeout=9).json()
            return {each["name"]: each["state"] for each in index}

        assert states() == {"signs": "Ready", "twin": "Ready"}
        client.unload_model("twin")
        assert states() == {"signs": "Ready", "twin": "NotReady"}
        assert not client.is_model_ready("twin")
        client.load_model("twin")
        assert states()["twin"] == "Ready"
        client.unload_model("twin")
        client.infer("twin", [http_input(tensor)])  # a request loads it, too
        assert client.is_model_ready("twin")


def test_metrics_count_what_happened(service: Service) -> None:
    def value(line: str) -> float:
        text = requests.get(f"{service.url}/metrics", timeout=9).text
        return sum(float(each.split()[-1]) for each in text.splitlines() if each.startswith(line))

    stage = 'edgelab_stage_seconds_count{model="signs",stage="infer"}'
    before, missing = value(stage), value('edgelab_requests_total{code="404",protocol="http"}')
    headers = {"Content-Type": "image/jpeg"}
    url = f"{service.url}/v2/models"
    assert requests.post(f"{url}/signs/infer", PHOTO, headers=headers, timeout=9).ok
    assert requests.post(f"{url}/none/infer", PHOTO, headers=headers, timeout=9).status_code == 404
    assert value(stage) == before + 1
    assert value('edgelab_requests_total{code="404",protocol="http"}') == missing + 1
    assert value("edgelab_loaded_bytes") >= 9_027_784


# --- what it must stand ---------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 1 MB that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1_000_000_000 // 1000))) + chunk(b"IEND", b"")
    )  # fmt: skip


def binary(head: Any, tail: bytes, length: int | str | None = None) -> dict[str, Any]:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    size = len(raw) if length is None else length
    return {"data": raw + tail, "headers": {"Inference-Header-Content-Length": str(size)}}


def one(**changes: Any) -> dict[str, Any]:
    given = {"name": "input", "shape": [1, 3, 224, 224], "datatype": "FP32",
             "parameters": {"binary_data_size": 602_112}}  # fmt: skip
    return {"inputs": [{**given, **changes}]}


ZEROS = bytes(602_112)
HOSTILE: dict[str, tuple[dict[str, Any], int]] = {
    "empty body": ({"data": b""}, 400),
    "no JSON": ({"data": b"{]"}, 400),
    "JSON of another kind": ({"data": b"[1, 2, 3]"}, 400),
    "nested a million deep": ({"data": b"[" * 1_000_000}, 400),
    "inputs that are no list": ({"data": b'{"inputs": 5}'}, 400),
    "no inputs": ({"data": b'{"inputs": []}'}, 400),
    "null": (binary(b"null", b""), 400),
    "header length beyond the body": (binary(one(), ZEROS, 10**9), 400),
    "header length negative": (binary(one(), ZEROS, -5), 400),
    "header length no number": (binary(one(), ZEROS, "many"), 400),
    "header length of 4,000 digits": (binary(one(), ZEROS, "9" * 4000), 400),
    "header length zero": (binary(one(), ZEROS, 0), 400),
    "truncated binary": (binary(one(), ZEROS[:-1]), 400),
    "too much binary": (binary(one(), ZEROS + b"more"), 400),
    "binary size negative": (binary(one(parameters={"binary_data_size": -1}), ZEROS), 400),
    "binary size no number": (binary(one(parameters={"binary_data_size": "x"}), ZEROS), 400),
    "binary size true": (binary(one(parameters={"binary_data_size": True}), b"1"), 400),
    "shape that does not fit": (binary(one(shape=[1, 3, 224, 225]), ZEROS), 400),
    "shape that wraps": (binary(one(shape=[2**32, 2**32, 3, 224]), ZEROS), 400),
    "shape negative": (binary(one(shape=[-1, 3, 224, 224]), ZEROS), 200),  # NumPy's "as many as"
    "shape empty": (binary(one(shape=[]), ZEROS), 400),
    "another type": (binary(one(datatype="INT64"), ZEROS), 400),
    "an unknown type": (binary(one(datatype="FP7"), ZEROS), 400),
    "another name": (binary(one(name="../../etc/passwd"), ZEROS), 400),
    "an output that is not there": (
        binary({**one(), "outputs": [{"name": "secrets"}]}, ZEROS), 400,
    ),
    "BYTES whose lengths lie": (
        binary(
            one(name="image", shape=[1], datatype="BYTES", parameters={"binary_data_size": 8}),
            struct.pack("<I", 2**31) + b"abcd",
        ), 400,
    ),
    "BYTES cut off": (
        binary(
            one(name="image", shape=[1], datatype="BYTES", parameters={"binary_data_size": 2}),
            b"ab",
        ), 400,
    ),
    "an image that is none": ({"data": b"GIF89a", "headers": {"Content-Type": "image/gif"}}, 400),
    "a decompression bomb": ({"data": bomb(), "headers": {"Content-Type": "image/png"}}, 400),
    "an image cut off": ({"data": PHOTO[:900], "headers": {"Content-Type": "image/jpeg"}}, 400),
    "top of a million": (
        {"data": PHOTO, "headers": {"Content-Type": "image/jpeg"}, "params": {"top": "1000000"}},
        400,
    ),
    "top of half a label": (
        {"data": PHOTO, "headers": {"Content-Type": "image/jpeg"}, "params": {"top": "0.5"}}, 400,
    ),
    "17 MB": ({"data": bytes(17 << 20)}, 413),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_its_status_and_hurts_nobody(service: Service, name: str) -> None:
    request, status = HOSTILE[name]
    url = f"{service.url}/v2/models/signs/infer"
    answer = requests.post(url, timeout=20, **request)
    assert answer.status_code == status, answer.text[:300]
    if status != 200:
        assert set(answer.json()) == {"error"}
        assert len(answer.json()["error"]) < 1000
        assert "Traceback" not in answer.text
    headers = {"Content-Type": "image/jpeg"}
    assert (
        requests.post(url, PHOTO, headers=headers, timeout=20).json()["top"][0]["label"] == "stop"
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/none/infer", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("POST", "/v2/repository/models/none/load", 404),
        ("POST", "/v2/repository/models/none/unload", 404),
        ("POST", "/v2/repository/models/..%2F..%2Fetc%2Fpasswd/load", 404),
        ("GET", "/v2/models/signs/versions/9", 501),
        ("GET", "/v2/models/signs/infer", 405),
        ("GET", "/nowhere", 404),
    ],
)
def test_what_is_not_there_says_so(service: Service, method: str, path: str, status: int) -> None:
    answer = requests.request(method, service.url + path, timeout=9)
    assert answer.status_code == status, answer.text[:200]
    assert set(answer.json()) == {"error"}


def test_a_claim_of_a_gigabyte_is_refused_before_it_comes(service: Service) -> None:
    head = "POST /v2/models/signs/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n"
    begin = time.monotonic()
    answer = service.send(head.encode() + b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - begin < 5
    chunked = (
        "POST /v2/models/signs/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        answer = service.send(chunked.encode() + piece * 20)
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_malformed_http_does_no_harm(service: Service) -> None:
    for data in (
        b"\x00" * 5000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n",
    ):
        assert service.send(data)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 404", b"")
    assert requests.get(f"{service.url}/v2/health/live", timeout=9).ok


def test_what_is_no_body_has_a_limit_too(service: Service) -> None:
    """A head, the trailers behind a body and a chunk's extension: nobody may send them for ever."""
    head = b"POST /v2/models/signs/infer HTTP/1.1\r\nHost: x\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{]\r\n"
    endless = b"a" * 2_000_000
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    for begin in (
        b"GET /",
        head + b"X: ",
        head,
        chunked + b"0\r\n",
        chunked + b"0\r\nX: ",
        chunked + b"2;",
    ):
        with contextlib.suppress(ConnectionError):  # it may close while we still send
            answer = service.send(begin + endless)
            assert answer[:12] in (b"HTTP/1.1 400", b""), answer[:80]
    assert process.memory_info().rss - before < 20e6
    assert requests.get(f"{service.url}/v2/health/live", timeout=9).ok


def test_requests_that_come_at_once_are_answered_in_order(service: Service) -> None:
    """Pipelining: three requests in one piece, the second with a body in chunks."""
    image = b"Host: x\r\nContent-Type: image/jpeg\r\n"
    post = b"POST /v2/models/signs/infer HTTP/1.1\r\n" + image
    sized = b"Content-Length: %d\r\n\r\n%b" % (len(PHOTO), PHOTO)
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (PHOTO[:999], PHOTO[999:])
    )
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = service.send(post + sized + post + chunks + b"0\r\nTrailer: x\r\n\r\n" + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b'"label":"stop"') == 2
    assert answer.endswith(b'{"live":true}')


def test_errors_over_grpc_have_their_codes(service: Service, tensor: Any) -> None:
    with tritonclient.grpc.InferenceServerClient(service.grpc) as client:

        def code(model: str, given: Any) -> str:
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, [given])
            return str(caught.value.status())

        good = tritonclient.grpc.InferInput("input", [1, 3, 224, 224], "FP32")
        good.set_data_from_numpy(tensor)
        assert code("none", good) == "StatusCode.NOT_FOUND"
        bad = tritonclient.grpc.InferInput("input", [1, 3, 8, 8], "FP32")
        bad.set_data_from_numpy(np.zeros((1, 3, 8, 8), np.float32))
        assert code("signs", bad) == "StatusCode.INVALID_ARGUMENT"
        no_picture = tritonclient.grpc.InferInput("image", [1], "BYTES")
        no_picture.set_data_from_numpy(np.array([b"no picture"], object))
        assert code("signs", no_picture) == "StatusCode.INVALID_ARGUMENT"
        huge = tritonclient.grpc.InferInput("input", [40, 3, 224, 224], "FP32")
        huge.set_data_from_numpy(np.zeros((40, 3, 224, 224), np.float32))
        assert code("signs", huge) == "StatusCode.RESOURCE_EXHAUSTED"
        assert client.infer("signs", [good]).as_numpy("logits").shape == (1, 32)


# --- limits, keys and the end ---------------------------------------------------------------------


def test_slow_clients_lose_their_connection_and_nobody_else_does() -> None:
    service = Service("--max-seconds=1.5")
    host, port = service.http.split(":")
    try:
        with contextlib.ExitStack() as stack:
            slow = []
            for begin in (
                b"",
                b"GET /v2/health/live HTTP/1.1\r\nHost: ",
                b"POST /v2/models/signs/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n",
            ):
                connection = socket.create_connection((host, int(port)), timeout=10)
                stack.enter_context(connection)
                connection.sendall(begin)
                slow.append(connection)
            begun = time.monotonic()
            headers = {"Content-Type": "image/jpeg"}
            url = f"{service.url}/v2/models/signs/infer"
            assert requests.post(url, PHOTO, headers=headers, timeout=9).ok
            assert slow[0].recv(99) == b""
            assert slow[1].recv(99) == b""
            assert slow[2].recv(99).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - begun < 8
    finally:
        assert service.stop() == 0


def test_too_many_requests_are_refused_at_once_and_the_rest_are_answered() -> None:
    service = Service("--workers=1", "--queue=1")
    try:
        headers, url = {"Content-Type": "image/jpeg"}, f"{service.url}/v2/models/signs/infer"
        file = io.BytesIO()
        Image.effect_noise((4000, 3000), 60).convert("RGB").save(file, "JPEG")
        large = file.getvalue()  # a tenth of a second's work

        def ask(_: int) -> requests.Response:
            return requests.post(url, large, headers=headers, timeout=30)

        with ThreadPoolExecutor(8) as executor:
            answers = list(executor.map(ask, range(16)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}, codes
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["Retry-After"] == "1"
        assert "busy" in refused.json()["error"]
        assert requests.post(url, PHOTO, headers=headers, timeout=9).ok
    finally:
        assert service.stop() == 0


def test_a_token_opens_http_and_grpc(tensor: Any) -> None:
    service = Service(token=TOKEN)
    try:
        url = f"{service.url}/v2/models/signs"
        assert requests.get(f"{service.url}/v2/health/live", timeout=9).ok
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN},
                      {"Authorization": b"Bearer \xff\xfe"}):  # fmt: skip
            answer = requests.get(url, headers=wrong, timeout=9)
            assert answer.status_code == 401
            assert set(answer.json()) == {"error"}
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert requests.get(url, headers=right, timeout=9).ok
        with tritonclient.grpc.InferenceServerClient(service.grpc) as client:
            assert client.is_server_live()
            given = tritonclient.grpc.InferInput("input", [1, 3, 224, 224], "FP32")
            given.set_data_from_numpy(tensor)
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.infer("signs", [given])
            lower = {"authorization": f"Bearer {TOKEN}"}
            assert client.infer("signs", [given], headers=lower).as_numpy("logits") is not None
        assert TOKEN not in "".join(service.log)
    finally:
        assert service.stop() == 0


def test_tls(tmp_path: Path, tensor: Any) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    service = Service(f"--certificate={certificate}", f"--key={key}")
    try:
        assert service.url.startswith("https://")
        url = f"{service.url}/v2/health/ready"
        assert requests.get(url, verify=str(certificate), timeout=9).json() == {"ready": True}
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(url, timeout=9)
        with tritonclient.grpc.InferenceServerClient(
            service.grpc, ssl=True, root_certificates=str(certificate)
        ) as client:
            assert client.is_server_live()
        oldest = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        assert oldest.minimum_version  # what the client offers; the server's own floor is 1.2
    finally:
        assert service.stop() == 0


def test_a_shutdown_ends_what_was_begun(tensor: Any) -> None:
    service = Service("--workers=1", "--queue=8")
    file = io.BytesIO()
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(file, "JPEG")
    url, headers = f"{service.url}/v2/models/signs/infer", {"Content-Type": "image/jpeg"}
    with ThreadPoolExecutor(4) as executor:
        answers = [
            executor.submit(requests.post, url, file.getvalue(), headers=headers, timeout=30)
            for _ in range(4)
        ]
        time.sleep(0.15)  # they are being worked on
        assert service.stop() == 0
        codes = [answer.result().status_code for answer in answers]
    assert codes == [200] * 4
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{service.url}/v2/health/live", timeout=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nosuch"], "nosuch"),
        (["x=/no/such/file.onnx"], "/no/such/file.onnx"),
        (["--certificate=/no/such.pem"], "TLS needs a certificate and its key"),
        (["--certificate=/no/such.pem", "--key=/no/such.key"], "can't be used"),
        (["--host=203.0.113.1"], "can't listen on 203.0.113.1"),
    ],
)
def test_a_start_that_fails_says_why(options: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgelab", "serve", "--http-port=0", "--grpc-port=0", *options],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("edgelab: error: ")
    assert "Traceback" not in done.stderr


def test_a_taken_port_says_so(service: Service) -> None:
    for option, address in (("--http-port", service.http), ("--grpc-port", service.grpc)):
        done = subprocess.run(
            [sys.executable, "-m", "edgelab", "serve", "--http-port=0", "--grpc-port=0",
             f"{option}={address.split(':')[1]}"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Choose another port" in done.stderr


def test_it_listens_on_this_machine_only(service: Service) -> None:
    process = psutil.Process(service.process.pid)
    connections = getattr(process, "net_connections", None) or process.connections  # psutil < 6
    listening = [each.laddr.ip for each in connections("inet") if each.status == psutil.CONN_LISTEN]
    assert len(listening) == 2
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_memory_stays_flat_over_many_requests(service: Service, tensor: Any) -> None:
    process, seen = psutil.Process(service.process.pid), []
    url, headers = f"{service.url}/v2/models/signs/infer", {"Content-Type": "image/jpeg"}
    with requests.Session() as session:
        for turn in range(6):
            for _ in range(60):
                assert session.post(url, PHOTO, headers=headers, timeout=9).ok
                assert session.post(url, b"{]", timeout=9).status_code == 400
            seen.append(process.memory_info().rss)
            print(f"RSS after {60 * (turn + 1)} pictures: {seen[-1] / 1e6:.1f} MB")
    assert seen[-1] - seen[1] < 8e6


def test_its_openapi_holds_under_schemathesis(service: Service, tmp_path: Path) -> None:
    """Each operation, with requests made from its description: no 5xx, no crash."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json",
         "--checks=not_a_server_error", "--max-examples=15", "--seed=1", "--phases=fuzzing"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_base64_is_not_taken_for_a_picture(service: Service) -> None:
    body = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES",
                        "data": [base64.b64encode(PHOTO).decode()]}]}  # fmt: skip
    answer = requests.post(f"{service.url}/v2/models/signs/infer", json=body, timeout=9)
    assert answer.status_code == 400
    assert "binary form" in answer.json()["error"]
