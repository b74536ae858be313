"""The load generator: its schedule, its counts, and the tail that it must not hide."""

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from edgelab import servers
from edgelab.errors import EdgelabError
from edgelab.load import MAX_REQUESTS, binary_request, load, quantiles, tensor_request
from edgelab.measure import Ratio


class Backend:
    """A real HTTP server on loopback, with an answer of our choice, that notes when it was asked.

    `answer` gets the number of the request, from 0, and returns a status; it may wait.
    """

    def __init__(self, answer: Callable[[int], Coroutine[Any, Any, int]]) -> None:
        self.answer, self.asked, self.open, self.most_open = answer, list[float](), 0, 0
        self.bodies: set[bytes] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/infer"
        self._ready.set()
        async with server:
            await self._stop.wait()
            server.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                self.bodies.add(await reader.readexactly(length))
                self.asked.append(time.perf_counter())
                status = await self.answer(len(self.asked) - 1)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client is gone, or the test is over
        finally:
            self.open -= 1
            writer.close()

    def __enter__(self) -> "Backend":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


async def at_once(_: int) -> int:
    return 200


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_requests_are_sent_when_they_are_due_however_slow_the_answers(wait_s: float) -> None:
    async def slow(_: int) -> int:
        await asyncio.sleep(wait_s)
        return 200

    with Backend(slow) as backend:
        seen = load(backend.url, b"body", {}, rate=100, seconds=1)
    assert (seen.sent, seen.ok, seen.rejected, seen.failed) == (100, 100, 0, 0)
    assert backend.bodies == {b"body"}
    asked = np.array(backend.asked[1:])  # the first one is not part of the run
    assert len(asked) == 100
    # No request before its time, and none that waited for an answer: on an idle machine these are
    # about 0. A busy one delays some, never most.
    late = asked - asked.min() - np.arange(100) / 100
    assert np.median(np.abs(late)) < 0.15
    if wait_s:
        assert backend.most_open > 10  # a client that waits has one
        assert min(seen.samples_ms) >= 1e3 * wait_s
        assert seen.seconds >= 0.99 + wait_s


def test_a_server_that_stalls_shows_in_the_tail() -> None:
    """It stops for 0.5 s in a run of 1 s: half of the requests were due meanwhile."""

    def stalling() -> Callable[[int], Coroutine[Any, Any, int]]:
        begun: list[float] = []

        async def answer(number: int) -> int:
            if number == 20:
                begun.append(time.perf_counter())
            if begun:  # all others wait as well
                await asyncio.sleep(max(0.0, begun[0] + 0.5 - time.perf_counter()))
            return 200

        return answer

    with Backend(stalling()) as backend:
        on_time = load(backend.url, b"", {}, rate=100, seconds=1, connections=64)
    with Backend(stalling()) as backend:
        in_turn = load(backend.url, b"", {}, rate=None, seconds=1, connections=1)
    assert on_time.sent == 100
    stalled = [ms for ms in on_time.samples_ms if ms > 100]
    assert 30 <= len(stalled) <= 80  # those that were due in 0.4 of the 0.5 s, and some noise
    assert on_time.latency_ms["p90"] > 300
    assert on_time.latency_ms["max"] > 400
    # Who waits for each answer meets the stall once, and calls it one slow request of many.
    assert sum(ms > 100 for ms in in_turn.samples_ms) < 10
    assert in_turn.latency_ms["p90"] < 100
    # The latencies are in the order in which the requests were due: it falls by 10 ms each.
    first = next(k for k, ms in enumerate(on_time.samples_ms) if ms > 400)
    steps = np.diff(on_time.samples_ms[first : first + 30])
    assert np.median(steps) == pytest.approx(-10, abs=3)


def test_connections_are_bounded_and_waiting_for_one_counts() -> None:
    async def slow(_: int) -> int:
        await asyncio.sleep(0.05)
        return 200

    with Backend(slow) as backend:  # 2 connections do 40 a second, and 100 are due
        seen = load(backend.url, b"", {}, rate=100, seconds=1, connections=2)
    assert backend.most_open == 2
    assert (seen.sent, seen.ok) == (100, 100)
    assert seen.latency_ms["max"] > 1000  # the last one waited for 1.5 s
    assert seen.seconds > 2.4
    assert seen.throughput_per_s < 42


# --- what is counted ------------------------------------------------------------------------------


def test_refusals_failures_and_timeouts_are_told_apart() -> None:
    async def mixed(number: int) -> int:
        kind = number % 10
        if kind == 5:
            await asyncio.sleep(30)  # never, for the client
        return {1: 503, 2: 429, 3: 500, 4: 404}.get(kind, 200)

    with Backend(mixed) as backend:
        seen = load(backend.url, b"", {}, rate=50, seconds=1, timeout_s=0.5)
    assert seen.sent == 50
    assert (seen.ok, seen.rejected, seen.failed) == (25, 10, 15)
    reasons = dict(seen.reasons)
    assert reasons.pop("HTTP 500") == reasons.pop("HTTP 404") == 5
    ((reason, count),) = reasons.items()  # aiohttp's versions call it by two names
    assert "Timeout" in reason
    assert count == 5
    assert len(seen.samples_ms) == 40  # all but the refusals, which are no answers
    assert sum(ms >= 500 for ms in seen.samples_ms) >= 5  # who got none, waited that long
    text = str(seen)
    assert "5 failed: HTTP 500" in text
    assert " 10 " in text.splitlines()[2]
    plain = json.loads(json.dumps(seen.to_dict(samples=True)))
    assert plain["ok"] == 25
    assert len(plain["samples_ms"]) == 40
    assert "samples_ms" not in seen.to_dict()
    assert "<caption>" in seen._repr_html_()


def test_quantiles_are_numpys() -> None:
    samples = np.random.default_rng(3).lognormal(size=9999)
    found = quantiles(samples.tolist())
    ordered = np.sort(samples)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        assert found[name] == pytest.approx(np.quantile(samples, share))
        at = share * (len(ordered) - 1)  # by hand: 9999 samples make it nearly an entry
        assert ordered[math.floor(at)] <= found[name] <= ordered[math.ceil(at)]
    assert found["max"] == ordered[-1]
    assert list(found) == ["p50", "p90", "p99", "p99.9", "max"]
    assert quantiles([]) == {}


def test_as_many_as_it_answers() -> None:
    with Backend(at_once) as backend:
        seen = load(backend.url, b"", {}, rate=None, seconds=0.5, connections=3)
    assert backend.most_open == 3
    assert seen.ok == seen.sent == len(backend.asked) - 1
    assert seen.throughput_per_s == pytest.approx(seen.ok / seen.seconds)
    assert "not of latency" in str(seen)


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0}, {"rate": -1}, {"rate": math.nan}, {"rate": math.inf}, {"seconds": 0},
        {"seconds": math.nan}, {"seconds": 1e9}, {"connections": 0}, {"connections": 10_000},
        {"timeout_s": 0}, {"rate": MAX_REQUESTS, "seconds": 2}, {"rate": 0.1, "seconds": 1},
    ],
)  # fmt: skip
def test_senseless_runs_are_refused(wrong: dict[str, Any]) -> None:
    options: dict[str, Any] = {"rate": 1.0, "seconds": 1.0, **wrong}
    with pytest.raises(ValueError):
        load("http://127.0.0.1:9/", b"", {}, **options)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://192.0.2.1/", "attack"),
        ("http://[2001:db8::1]:8080/x", "attack"),
        ("http://0.0.0.0:80/", "attack"),
        ("ftp://127.0.0.1/", "is no URL"),
        ("127.0.0.1:8080", "is no URL"),
        ("http://127.0.0.1:99999/", "is no URL"),
        ("http:///x", "is no URL"),
        ("", "is no URL"),
    ],
)
def test_only_this_machine_is_loaded(url: str, words: str) -> None:
    with pytest.raises(EdgelabError, match=words):
        load(url, b"", {}, rate=1, seconds=1)


def test_nobody_there_and_wrong_answers_are_told_before_it_begins() -> None:
    with pytest.raises(EdgelabError, match="does not answer"):
        load("http://127.0.0.1:9/", b"", {}, rate=1000, seconds=1000)

    async def missing(_: int) -> int:
        return 404

    with Backend(missing) as backend:
        with pytest.raises(EdgelabError, match="answers with 404"):
            load(backend.url, b"", {}, rate=1000, seconds=1000)
        assert len(backend.asked) == 1
        with pytest.raises(EdgelabError, match="does not describe a model"):
            tensor_request("http://127.0.0.1:9/v2/models/x/infer", {})

    async def elsewhere(_: int) -> int:
        return 302

    with Backend(elsewhere) as backend, pytest.raises(EdgelabError, match="302"):
        load(backend.url, b"", {}, rate=1, seconds=1)  # nor does it follow to another machine


# --- with servers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelab", "serve", "--http-port=0", "--no-grpc"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process.stdout.readline().split()[1] + "/models/signs/infer"
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.mark.parametrize("what", [[], ["--tensor"]])
def test_the_command_prints_quantiles_and_counts(url: str, what: list[str]) -> None:
    command = [sys.executable, "-m", "edgelab", "load", url, "--rate=20", "--seconds=1", *what]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["sent"] == 20
    assert seen["ok"] + seen["rejected"] == 20
    assert seen["ok"] > 0
    times = [seen["latency_ms"][name] for name in ("p50", "p90", "p99", "p99.9", "max")]
    assert 0 < times[0] <= times[-1]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where to"),
        (["http://127.0.0.1:9/"], "does not answer"),
        (["http://192.0.2.1/"], "--any-host"),
        (["http://127.0.0.1:9/", "--rate=-3"], "0 < rate"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgelab", "load", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("edgelab: error: ")
    assert message in done.stderr


def test_a_binary_request_is_what_tritonclient_sends() -> None:
    import tritonclient.http

    tensor = np.arange(6, dtype=np.float32).reshape(1, 6)
    body, headers = binary_request("input", tensor)
    given = tritonclient.http.InferInput("input", [1, 6], "FP32")
    given.set_data_from_numpy(tensor)
    theirs, length = tritonclient.http.InferenceServerClient.generate_request_body([given])
    own = int(headers["Inference-Header-Content-Length"])
    assert body[own:] == theirs[length:] == tensor.tobytes()
    heads = [json.loads(each) for each in (body[:own], theirs[:length])]
    assert heads[0]["inputs"] == heads[1]["inputs"]
    assert heads[0]["parameters"] == heads[1]["parameters"]


def test_side_by_side_measures_each_server_with_the_same_labels() -> None:
    seen = servers.side_by_side(seconds=0.25, rounds=1)
    names = [side.name for side in seen.sides]
    assert names == [
        "tensor: bare onnxruntime", "tensor: edgelab", "tensor: plain kserve",
        "photo: bare Pillow, NumPy, onnxruntime", "photo: edgelab", "photo: plain kserve",
    ]  # fmt: skip
    for side in seen.sides:
        assert side.per_s > 0
        assert (side.rate_per_s is None) is ("bare" in side.name)
        assert side.ok == side.sent - side.rejected - side.failed
        assert side.failed == 0
    assert seen["tensor: bare onnxruntime"].to_bare == Ratio(1, 1, 1, 1)
    assert len(seen.goals) == 4
    text = str(seen)
    assert all(name in text for name in names)
    assert any("only 1 rounds" in note for note in seen.notes)
    assert json.loads(json.dumps(seen.to_dict()))["sides"][1]["name"] == "tensor: edgelab"
    assert "<caption>" in seen._repr_html_()
    with pytest.raises(EdgelabError, match="no-such-model"):
        servers.side_by_side("no-such-model")
    with pytest.raises(ValueError):
        servers.side_by_side(rounds=0)


def test_a_goal_is_reached_only_if_the_interval_says_so() -> None:
    def side(kept: Ratio, cpu: Ratio, tail: Ratio) -> servers.Side:
        return servers.Side("photo: edgelab", 1, kept, 1.0, cpu, 1, {}, tail)

    good, bad, wide = Ratio(0.95, 0.9, 1, 9), Ratio(0.7, 0.6, 0.8, 9), Ratio(0.9, 0.8, 1, 9)
    low, high = Ratio(2, 1, 3, 9), Ratio(6, 5, 7, 9)
    told = [
        [line.rpartition(": ")[2] for line in servers._goals([side(*each)])]
        for each in ((good, good, low), (good, bad, high), (good, wide, Ratio(4, 3, 5, 9)))
    ]
    unsure = "can't be told from these rounds"
    assert told == [["reached", "reached"], ["missed", "missed"], [unsure, unsure]]
