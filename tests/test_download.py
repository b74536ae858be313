"""Downloads from a real HTTP server on this machine that behaves as badly as the internet."""

import contextlib
import hashlib
import json
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelab import models
from edgelab.errors import DownloadError, ModelError

DATA = bytes(range(256)) * 1024
ENTRY = {"sha256": hashlib.sha256(DATA).hexdigest(), "size_bytes": len(DATA)}


class Server:
    """Serves each path by a list of behaviours, one a request; the last one stays."""

    def __init__(self) -> None:
        self.behaviours: dict[str, list[Callable[[BaseHTTPRequestHandler], None]]] = {}
        self.requests: dict[str, int] = defaultdict(int)
        self.sent_bytes = 0
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                planned = server.behaviours[self.path]
                turn = server.requests[self.path]
                server.requests[self.path] += 1
                # The client hangs up, as it should, when we misbehave.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    planned[min(turn, len(planned) - 1)](self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def url(self, path: str, *behaviours: Callable[[BaseHTTPRequestHandler], None]) -> str:
        self.behaviours[path] = list(behaviours)
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    def stop(self) -> None:
        if self.closing.is_set():
            return
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # --- behaviours ---

    def good(self, handler: BaseHTTPRequestHandler, data: bytes = DATA) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def wrong(self, handler: BaseHTTPRequestHandler) -> None:
        self.good(handler, DATA[:-1] + b"?")

    def cut(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[: len(DATA) // 2])

    def cut_without_length(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(DATA[: len(DATA) // 2])

    def missing(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_error(404)

    def broken(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_error(503)

    def silent(self, handler: BaseHTTPRequestHandler) -> None:
        self.closing.wait(60)

    def stalling(self, handler: BaseHTTPRequestHandler) -> None:
        self.cut(handler)
        handler.wfile.flush()
        self.closing.wait(60)

    def endless(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not self.closing.is_set():
            self.sent_bytes += handler.wfile.write(DATA)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """An empty cache, no proxy, and pooch's pauses noted instead of waited."""
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "cache ü"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pauses: list[float] = []
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=pauses.append))
    return pauses


def get(*urls: str) -> Path:
    return models.download({**ENTRY, "urls": urls}, "model.onnx", progress=False)


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache ü").rglob("*") if path.is_file())


def test_a_good_file_arrives_whole(server: Server, tmp_path: Path) -> None:
    path = get(server.url("/model", server.good))
    assert path == tmp_path / "cache ü" / "models" / "model.onnx"
    assert path.read_bytes() == DATA
    assert in_cache(tmp_path) == ["model.onnx"]
    assert server.requests["/model"] == 1


@pytest.mark.parametrize("behaviour", ["cut", "cut_without_length", "wrong", "broken"])
def test_what_may_pass_is_tried_three_times(
    server: Server, waits: list[float], behaviour: str, tmp_path: Path
) -> None:
    bad = getattr(server, behaviour)
    assert get(server.url("/model", bad, bad, server.good)).read_bytes() == DATA
    assert server.requests["/model"] == 3
    assert waits == [1, 2]
    assert in_cache(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    ("behaviour", "reason", "requests"),
    [
        ("cut", "bytes read", 3),
        ("cut_without_length", "cut off after 131,072 of 262,144 bytes", 3),
        ("wrong", "does not match the known hash", 3),
        ("broken", "503", 3),
        ("missing", "the server answers 404 Not Found", 1),
        ("endless", "sends more than the 262,144 bytes", 1),
    ],
)
def test_what_stays_bad_is_an_error_and_leaves_nothing(
    server: Server, tmp_path: Path, behaviour: str, reason: str, requests: int
) -> None:
    url = server.url("/model", getattr(server, behaviour))
    with pytest.raises(DownloadError) as caught:
        get(url)
    message = str(caught.value)
    assert message.startswith("could not download model.onnx (262,144 bytes)")
    assert url in message
    assert reason in message
    assert f"put the file there yourself: {tmp_path / 'cache ü' / 'models'}" in message
    assert server.requests["/model"] == requests
    assert in_cache(tmp_path) == []


def test_an_endless_body_is_stopped_early(server: Server) -> None:
    with pytest.raises(DownloadError):
        get(server.url("/model", server.endless))
    server.stop()
    assert server.sent_bytes < 64 * len(DATA)  # what the sockets' buffers took


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("silent", r"timed out. \(read timeout=0\.2\)"), ("stalling", "timed out")],
)
def test_a_server_that_says_nothing_more_is_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, reason: str
) -> None:
    monkeypatch.setattr(models, "TIMEOUT_S", (1.0, 0.2))
    with pytest.raises(DownloadError, match=reason):
        get(server.url("/model", getattr(server, behaviour)))
    assert in_cache(tmp_path) == []


def test_a_server_that_is_down_is_an_error(server: Server, tmp_path: Path) -> None:
    url = server.url("/model", server.good)
    server.stop()
    with pytest.raises(DownloadError, match=r"refused.*\nCheck the network"):
        get(url)
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize("behaviour", ["missing", "wrong", "endless"])
def test_the_second_mirror_helps_out(server: Server, tmp_path: Path, behaviour: str) -> None:
    first = server.url("/first", getattr(server, behaviour))
    second = server.url("/second", server.good)
    assert get(first, second).read_bytes() == DATA
    assert server.requests["/second"] == 1
    assert in_cache(tmp_path) == ["model.onnx"]


def test_every_mirror_that_failed_is_named(server: Server) -> None:
    urls = [server.url("/first", server.missing), server.url("/second", server.wrong)]
    with pytest.raises(DownloadError) as caught:
        get(*urls)
    assert all(url in str(caught.value) for url in urls)


def test_a_cached_file_needs_no_network(server: Server) -> None:
    url = server.url("/model", server.good)
    path = get(url)
    before = path.stat().st_mtime_ns
    server.stop()
    assert get(url) == path
    assert path.stat().st_mtime_ns == before


def test_a_damaged_cached_file_is_replaced(server: Server) -> None:
    url = server.url("/model", server.good)
    path = get(url)
    path.write_bytes(DATA[:-1])
    assert get(url).read_bytes() == DATA
    assert server.requests["/model"] == 2


def test_a_failed_renewal_leaves_the_old_file(server: Server) -> None:
    path = get(server.url("/model", server.good))
    path.write_bytes(b"old")
    with pytest.raises(DownloadError):
        get(server.url("/model", server.wrong))
    assert path.read_bytes() == b"old"


def test_a_cache_that_is_a_file_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache ü").write_bytes(b"")
    with pytest.raises(DownloadError, match="put the file there yourself"):
        get(server.url("/model", server.good))


def test_the_progress_bar_names_the_file(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**ENTRY, "urls": [server.url("/model", server.good)]}
    models.download(entry, "model.onnx", progress=True)
    assert "model.onnx" in capsys.readouterr().err


def test_no_progress_bar_is_shown_unless_on_a_terminal(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    models.download({**ENTRY, "urls": [server.url("/model", server.good)]}, "model.onnx")
    assert capsys.readouterr() == ("", "")


# --- the registry's models ------------------------------------------------------------------------

LABELS = b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"


@pytest.fixture
def registry(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A registry as the real one, with one model and its labels on our server."""
    text = json.dumps({"__metadata__": {}}).encode()
    model = struct.pack("<Q", len(text)) + text

    def entry(path: str, data: bytes) -> dict[str, Any]:
        url = server.url(path, lambda handler: server.good(handler, data))
        return {
            "urls": [url],
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
        }

    real = models._registry_file()["_specs"]["imagenet"]
    toy = {
        "toy": {
            **entry("/toy.onnx", model),
            "title": "a toy",
            "license": "MIT",
            "spec": "imagenet",
        },
        "_specs": {"imagenet": {**real, "labels": entry("/labels.txt", LABELS)}},
    }
    monkeypatch.setattr(models, "_registry_file", lambda: toy)
    return toy


def test_a_downloaded_model_gets_its_spec_from_the_registry(
    server: Server, registry: dict[str, Any], tmp_path: Path
) -> None:
    model = models.load("toy")
    assert model.spec == models.Spec(
        name="toy",
        version="1",
        labels=("tench", "goldfish"),
        resize=256,
        crop=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    assert model.sha256 == registry["toy"]["sha256"]
    assert in_cache(tmp_path) == ["imagenet-labels.txt", "toy.onnx"]
    assert models.load("toy") == model
    assert dict(server.requests) == {"/toy.onnx": 1, "/labels.txt": 1}


def test_only_registered_models_can_be_fetched(registry: dict[str, Any]) -> None:
    for name in ("_specs", "other"):
        with pytest.raises(ModelError, match="known: toy"):
            models.fetch(name)


def test_the_published_labels_fill_all_classes() -> None:
    entry = models._registry_file()["_specs"]["imagenet"]["labels"]
    path = Path(__file__).parent.parent.parent / "shared" / "real" / "imagenet-synsets.txt"
    if not path.exists():
        pytest.skip("the published label file is not beside this checkout (../shared/real)")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert len(models.read_synset_labels(path)) == 1000
