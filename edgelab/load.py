"""How much load a service stands: requests on a schedule that does not wait for the answers.

Users do not wait for each other. So `load` sends each request when it is due, whether or not the
earlier ones were answered, and counts its latency from that moment: a server that stalls for a
second delays everything that was due in it, and all of that is in the tail. A client that waits
for an answer before it asks again would send, and count, one slow request only. G. Tene calls that
coordinated omission; his wrk2 counts as we do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from edgelab.errors import EdgelabError, one_line
from edgelab.measure import duration, html_table, plain_text, text_table

MAX_REQUESTS = 1_000_000
"""Of one run; each costs the client some hundred bytes."""

QUANTILES = (50.0, 90.0, 99.0, 99.9)
_REJECTED = (429, 503)


@dataclass(frozen=True, slots=True)
class Load:
    """What became of the requests of one run.

    Attributes
    ----------
    url : str
    rate_per_s : float or None
        Requests that were due in a second; None if each connection sent its next request as soon
        as it had its answer.
    connections : int
        How many there were at most.
    seconds : float
        From the first request to the last answer.
    sent, ok, rejected, failed : int
        Requests; those answered with 200; those that the server refused because it was busy (429,
        503); and those with another status, or none.
    reasons : dict of str to int
        What failed, and how often.
    latency_ms : dict of str to float
        Quantiles by name: ``p50`` ... ``p99.9`` and ``max``. From when a request was due until
        its answer was there; a request without an answer counts with the time that it waited.
        Refusals do not count. Empty if nothing counts.
    late_ms : float
        The client's own fault: 99 of 100 requests were sent at most so much after they were due.
        It is part of their latency.
    client_cores : float
        CPU time that the client took, per second.
    samples_ms : tuple of float
        The latencies, in the order in which the requests were due.
    """

    url: str
    rate_per_s: float | None
    connections: int
    seconds: float
    sent: int
    ok: int
    rejected: int
    failed: int
    reasons: dict[str, int]
    latency_ms: dict[str, float]
    late_ms: float
    client_cores: float
    samples_ms: tuple[float, ...] = field(repr=False)

    @property
    def throughput_per_s(self) -> float:
        """Requests answered with 200, per second."""
        return self.ok / self.seconds

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """Return plain values, ready for JSON; on request with each latency."""
        plain = {**asdict(self), "throughput_per_s": self.throughput_per_s}
        if not samples:
            del plain["samples_ms"]
        return plain

    def _cells(self) -> tuple[str, ...]:
        counts = (f"{n:,}" for n in (self.sent, self.ok, self.rejected, self.failed))
        times = (duration(ms).strip() for ms in self.latency_ms.values())
        return (*counts, f"{self.throughput_per_s:,.1f}", *times)

    def _columns(self) -> tuple[str, ...]:
        return ("sent", "ok", "rejected", "failed", "ok/s", *self.latency_ms)

    def _notes(self) -> list[str]:
        when = (
            "each when it was due; latency counts from then"
            if self.rate_per_s is not None
            else "each as soon as its connection was free: a measure of throughput, not of latency"
        )
        return [
            f"requests were sent {when}; {self.connections} connections at most",
            f"the client took {self.client_cores:.0%} of a core, and sent 99 of 100 requests at "
            f"most {duration(self.late_ms).strip()} late",
            *(f"{count:,} failed: {reason}" for reason, count in self.reasons.items()),
        ]

    def __str__(self) -> str:
        return "\n".join([*text_table(self._columns(), [self._cells()], left=()), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table("; ".join(self._notes()), self._columns(), [self._cells()])


def quantiles(samples_ms: Sequence[float]) -> dict[str, float]:
    """Return ``p50`` ... ``p99.9`` and ``max`` of samples; nothing if there are none."""
    if not samples_ms:
        return {}
    values = np.percentile(samples_ms, QUANTILES).tolist()
    return {
        **{f"p{q:g}": ms for q, ms in zip(QUANTILES, values, strict=True)},
        "max": max(samples_ms),
    }


def load(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    rate: float | None,
    seconds: float,
    connections: int = 64,
    timeout_s: float = 10.0,
    any_host: bool = False,
) -> Load:
    """Send the same POST request again and again.

    Parameters
    ----------
    url : str
    body : bytes
    headers : mapping of str to str
    rate : float or None
        Requests in a second, evenly spaced, on a schedule that knows nothing of the answers. None
        sends as many as the server answers: for throughput alone.
    seconds : float
        How long; what was sent by then is waited for.
    connections : int
        At most. A request that finds none free waits for one, and that time counts.
    timeout_s : float
        When a request is given up.
    any_host : bool
        Allow a host that is not this machine. Ask its owner first.

    Raises
    ------
    EdgelabError
        If the URL is none, or not of this machine; or if nobody listens there.
    ValueError
        If `rate`, `seconds`, `connections` or `timeout_s` make no sense, or make more than
        `MAX_REQUESTS` requests.
    """
    if not (rate is None or 0 < rate < 1e6) or not 0 < seconds <= 3600 or not timeout_s > 0:
        raise ValueError("need 0 < rate < 1e6, 0 < seconds <= 3600 and timeout_s > 0")
    if not 1 <= connections <= 512:  # select(2) stops at 1024 files
        raise ValueError(f"need 1 to 512 connections, not {connections}")
    if rate is not None and not 1 <= round(rate * seconds) <= MAX_REQUESTS:
        raise ValueError(f"{rate * seconds:,.1f} requests; from 1 to {MAX_REQUESTS:,} are possible")
    _require_host(url, any_host)
    run = _Run(url, body, headers, rate, seconds, connections, timeout_s)
    return run.in_a_loop()


def binary_request(name: str, tensor: NDArray[np.float32]) -> tuple[bytes, dict[str, str]]:
    """Write a request with one FP32 tensor in the binary form, as tritonclient does.

    Returns
    -------
    tuple of bytes and dict of str to str
        Body and headers.
    """
    given = {
        "name": name, "shape": list(tensor.shape), "datatype": "FP32",
        "parameters": {"binary_data_size": tensor.nbytes},
    }  # fmt: skip
    head = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    return head + tensor.tobytes(), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def tensor_request(
    url: str, headers: Mapping[str, str], *, any_host: bool = False
) -> tuple[bytes, dict[str, str]]:
    """Ask a server what its model takes, and write a `binary_request` of random numbers for it.

    Parameters
    ----------
    url : str
        Of the model's ``infer``.
    headers : mapping of str to str
        To send along: a token.
    any_host : bool
        As in `load`.

    Raises
    ------
    EdgelabError
        If the server does not say, or the model has no FP32 input of a fixed size.
    """
    import requests

    _require_host(url, any_host)
    about = url.removesuffix("/infer")
    try:
        answer = requests.get(about, headers=dict(headers), timeout=10, allow_redirects=False)
        inputs = answer.json()["inputs"]
        name, shape = next((i["name"], i["shape"]) for i in inputs if i["datatype"] == "FP32")
        # The first dimension is that of the batch; one input of at most 64 MiB.
        sizes = [1, *map(int, shape[1:])]
        if min(sizes) < 1 or math.prod(sizes) > 1 << 24:
            raise ValueError(f"its shape is {shape}")
    except (requests.RequestException, KeyError, TypeError, ValueError, StopIteration) as error:
        raise EdgelabError(
            f"{about} does not describe a model with an FP32 input: {one_line(error)}"
        ) from None
    numbers = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
    return binary_request(str(name), numbers)


def _require_host(url: str, any_host: bool) -> None:
    """Raise EdgelabError if a URL is none, or if its host is not this machine and may not be."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not host:
            raise ValueError
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port)}
    except (ValueError, KeyError):
        raise EdgelabError(
            f"{url!r} is no URL; it should look like http://127.0.0.1:8080/..."
        ) from None
    except OSError as error:
        raise EdgelabError(f"{host}: {error.strerror}") from None
    outside = [each for each in found if not ipaddress.ip_address(str(each)).is_loopback]
    if outside and not any_host:
        raise EdgelabError(
            f"{host} is {outside[0]}, not this machine. A load test of somebody's server is an "
            "attack; if it is yours, add --any-host (any_host=True)"
        )


class _Run:
    """One run: what it sends, and what it saw."""

    def __init__(
        self, url: str, body: bytes, headers: Mapping[str, str], rate: float | None,
        seconds: float, connections: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self.url, self.body, self.headers = url, body, dict(headers)
        self.rate, self.seconds = rate, seconds
        self.connections, self.timeout_s = connections, timeout_s
        self.latency: list[tuple[float, float]] = []  # when due, and how long it took
        self.late: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()

    def in_a_loop(self) -> Load:
        """Run in a thread of its own, as notebooks have a running event loop in theirs."""
        done: list[Load | BaseException] = []

        def work() -> None:
            # Python's other selectors wait for whole milliseconds: too coarse for a schedule.
            loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
            try:
                done.append(loop.run_until_complete(self._all()))
            except BaseException as error:
                done.append(error)
            finally:
                loop.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join()
        (result,) = done
        if isinstance(result, BaseException):
            raise result
        return result

    async def _all(self) -> Load:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.connections)
        async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:
            self.session, self.error = session, aiohttp.ClientError
            await self._try()
            begin, cpu = time.perf_counter(), time.thread_time()
            await (self._in_turn(begin) if self.rate is None else self._on_time(begin, self.rate))
            seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        return self._result(seconds, cpu)

    async def _try(self) -> None:
        """Send one request that does not count; EdgelabError if it can't be answered."""
        try:
            async with self.session.post(
                self.url, data=self.body, headers=self.headers, allow_redirects=False
            ) as answer:
                text = (await answer.read())[:300].decode(errors="replace")
        except (self.error, asyncio.TimeoutError, OSError) as error:
            raise EdgelabError(f"{self.url} does not answer: {one_line(error)}") from None
        if answer.status not in (200, *_REJECTED):
            raise EdgelabError(f"{self.url} answers with {answer.status}: {plain_text(text)}")

    async def _on_time(self, begin: float, rate: float) -> None:
        tasks = set()
        for k in range(round(rate * self.seconds)):
            due = begin + k / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.add(task := asyncio.create_task(self._one(due)))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _in_turn(self, begin: float) -> None:
        async def again() -> None:
            while (now := time.perf_counter()) < begin + self.seconds:
                await self._one(now)
                if sum(self.statuses.values()) + sum(self.reasons.values()) >= MAX_REQUESTS:
                    break

        await asyncio.gather(*(again() for _ in range(self.connections)))

    async def _one(self, due: float) -> None:
        self.late.append(time.perf_counter() - due)
        try:
            async with self.session.post(
                self.url, data=self.body, headers=self.headers, allow_redirects=False
            ) as answer:
                await answer.read()
        except (self.error, asyncio.TimeoutError, OSError) as error:
            self.reasons[type(error).__name__] += 1
        else:
            self.statuses[answer.status] += 1
            if answer.status in _REJECTED:
                return
            if answer.status != 200:
                self.reasons[f"HTTP {answer.status}"] += 1
        self.latency.append((due, time.perf_counter() - due))

    def _result(self, seconds: float, cpu: float) -> Load:
        samples = [1e3 * took for _, took in sorted(self.latency)]
        return Load(
            url=self.url,
            rate_per_s=self.rate,
            connections=self.connections,
            seconds=seconds,
            sent=len(self.late),
            ok=self.statuses[200],
            rejected=sum(self.statuses[status] for status in _REJECTED),
            failed=sum(self.reasons.values()),
            reasons=dict(self.reasons.most_common()),
            latency_ms=quantiles(samples),
            late_ms=1e3 * float(np.percentile(self.late, 99)),
            client_cores=cpu / seconds,
            samples_ms=tuple(samples),
        )
