"""Ours, a plain kserve server and a bare loop, with the same model and under the same load.

Each is one process with one thread for inference, on one core that they share in turns; the client
has the other cores for itself. So a server's throughput pays for all that it does: HTTP, JSON, and
the guest. The bare loops have no client; what ours is measured against costs nothing but the work.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelab import models, preprocess
from edgelab.errors import EdgelabError, one_line
from edgelab.load import QUANTILES, Load, binary_request, load, quantiles
from edgelab.measure import (
    Fingerprint,
    Ratio,
    Watch,
    duration,
    html_table,
    ratio,
    row_named,
    text_table,
)

SHARE = 0.7
"""Of a server's own throughput: how much load it gets when its latency is measured."""
_CONNECTIONS = 4  # that keep a server busy


@dataclass(frozen=True, slots=True)
class Side:
    """One server or loop.

    Attributes
    ----------
    name : str
        What it is given, and who answers.
    per_s : float
        Answers a second when it always has something to do; median over rounds.
    to_bare : Ratio
        That, over the bare loop's of the same round. 1 is as fast; 0.85 loses 15 %.
    cpu_ms : float or None
        CPU time of its process for one answer; None if the system does not tell.
    cpu_to_bare : Ratio or None
        The bare loop's CPU time over that, by round: what `to_bare` would be if nobody else used
        its core.
    rate_per_s : float or None
        At which rate the latencies were measured, median over rounds; None for a loop.
    latency_ms : dict of str to float
        Quantiles over the requests of all rounds, from when each was due. Empty for a loop.
    tail : Ratio or None
        p99 over p50, by round.
    sent, ok, rejected, failed : int
        Requests of that measurement.
    """

    name: str
    per_s: float
    to_bare: Ratio
    cpu_ms: float | None
    cpu_to_bare: Ratio | None
    rate_per_s: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    tail: Ratio | None = None
    sent: int = 0
    ok: int = 0
    rejected: int = 0
    failed: int = 0

    def _cells(self) -> tuple[str, ...]:
        cpu = ("", "") if self.cpu_ms is None else (f"{self.cpu_ms:.2f} ms", str(self.cpu_to_bare))
        head = (self.name, f"{self.per_s:,.1f}", str(self.to_bare), *cpu)
        if self.rate_per_s is None or self.tail is None:
            return (*head, *[""] * 8)
        times = (duration(ms).strip() for name, ms in self.latency_ms.items() if name != "max")
        counts = (f"{self.ok:,} / {self.sent:,}", f"{self.rejected:,}")
        return (*head, f"{self.rate_per_s:,.1f}", *times, str(self.tail), *counts)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Servers of one model, measured in the same rounds.

    Attributes
    ----------
    model : str
    sides : tuple of Side
    goals : tuple of str
        What a service should reach, and whether ours does.
    notes : tuple of str
        How it was measured, and what speaks against the numbers.
    environment : Fingerprint
    """

    model: str
    sides: tuple[Side, ...]
    goals: tuple[str, ...]
    notes: tuple[str, ...]
    environment: Fingerprint

    def __getitem__(self, name: str) -> Side:
        """Return a side by its name."""
        return row_named(self.sides, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.model,
            "sides": [asdict(side) for side in self.sides],
            "goals": list(self.goals),
            "notes": list(self.notes),
            "environment": self.environment.to_dict(),
        }

    def __str__(self) -> str:
        table = text_table(_COLUMNS, [side._cells() for side in self.sides])
        return "\n".join([*table, *self.goals, *self.notes])

    def _repr_html_(self) -> str:
        cells = [side._cells() for side in self.sides]
        return html_table("; ".join((*self.goals, *self.notes)), _COLUMNS, cells)


_COLUMNS = (
    "", "answers/s", "/ bare loop", "CPU", "bare / CPU", f"at {SHARE:.0%}: rate",
    *(f"p{q:g}" for q in QUANTILES), "p99 / p50", "ok / sent", "rejected",
)  # fmt: skip


def side_by_side(
    model: str = "signs",
    *,
    image: str | os.PathLike[str] | None = None,
    seconds: float = 2.0,
    rounds: int = 6,
    seed: int = 0,
) -> SideBySide:
    """Measure throughput and latency of our server, of plain kserve, and of bare loops.

    Parameters
    ----------
    model : str
        A name from ``models list``, or an ONNX file.
    image : path, optional
        The picture that is sent; the default ships.
    seconds : float
        For one measurement of throughput; one of latency takes twice as long.
    rounds : int
        Each measures everything once, in a new random order.
    seed : int
        Of the order and of the intervals.

    Raises
    ------
    EdgelabError
        If a server does not start, or does not answer.
    ValueError
        If `seconds` or `rounds` make no sense.
    """
    if not 0 < seconds <= 600 or not 1 <= rounds <= 1000:
        raise ValueError("need 0 < seconds <= 600 and 1 <= rounds <= 1000")
    known = models.load(model)
    encoded = Path(image or models.example_image()).read_bytes()
    watch, shuffle = Watch(threads=1), random.Random(seed).shuffle
    with contextlib.ExitStack() as stack:
        cores = _Cores()
        stack.callback(cores.as_before)
        commands = {
            "the bare loop": _code("_bare_loop", model),
            "edgelab": _serve(model),
            "kserve": _code("_plain_server", model),
        }
        bare, ours, plain = (
            stack.enter_context(_Process(name, command)) for name, command in commands.items()
        )
        for process in (bare, ours, plain):
            process.wait()
            cores.give(process)
        cores.keep()
        tensor = preprocess.preprocess(preprocess.bare_decode(encoded), known.spec)
        bare.write({"tensor": tensor.tolist(), "photo": base64.b64encode(encoded).decode()})
        own = Path(model).stem if Path(model).suffix else model
        jobs: dict[str, _Loop | _Server] = {
            "tensor: bare onnxruntime": _Loop(bare, "tensor"),
            "tensor: again": _Loop(bare, "tensor"),
            "tensor: edgelab": _Server(ours, own, *_tensor_request(known, tensor)),
            "tensor: plain kserve": _Server(plain, "plain", *_tensor_request(known, tensor)),
            "photo: bare Pillow, NumPy, onnxruntime": _Loop(bare, "photo"),
            "photo: edgelab": _Server(ours, own, encoded, {"Content-Type": "image/jpeg"}),
            "photo: plain kserve": _Server(plain, "plain", *_photo_request(encoded)),
        }
        for job in jobs.values():
            job.throughput(min(1.0, seconds))
        seen = {name: _Seen() for name in jobs}
        for _ in range(rounds):
            order = list(jobs)
            shuffle(order)
            for name in order:
                seen[name].measure(jobs[name], seconds)
    return _result(known.spec.name, seen, watch, cores.note, seed)


class _Seen:
    """What was measured of one job."""

    def __init__(self) -> None:
        self.per_s: list[float] = []
        self.cpu_ms: list[float] = []
        self.loads: list[Load] = []

    def measure(self, job: _Loop | _Server, seconds: float) -> None:
        before = job.process.cpu_seconds()
        per_s, count = job.throughput(seconds)
        self.per_s.append(per_s)
        if before is not None and (after := job.process.cpu_seconds()) is not None:
            self.cpu_ms.append(1e3 * (after - before) / count)
        if isinstance(job, _Server):
            self.loads.append(job.at(SHARE * per_s, 2 * seconds))


class _Loop:
    """A loop without a server."""

    def __init__(self, process: _Process, kind: str) -> None:
        self.process, self._kind = process, kind

    def throughput(self, seconds: float) -> tuple[float, int]:
        self.process.write([self._kind, seconds])
        count, took = json.loads(self.process.line())
        return count / took, count


class _Server:
    """A server, and the request that it gets."""

    def __init__(
        self, process: _Process, model: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        self.process, self._body, self._headers = process, body, headers
        self._url = f"{process.url}/models/{model}/infer"

    def throughput(self, seconds: float) -> tuple[float, int]:
        seen = load(
            self._url, self._body, self._headers, rate=None, seconds=seconds,
            connections=_CONNECTIONS, timeout_s=60,
        )  # fmt: skip
        if seen.ok < seen.sent:
            raise EdgelabError(f"{self._url} answered {seen.ok} of {seen.sent}: {seen.reasons}")
        return seen.throughput_per_s, seen.ok

    def at(self, rate: float, seconds: float) -> Load:
        return load(
            self._url, self._body, self._headers, rate=rate, seconds=max(seconds, 2 / rate),
            timeout_s=60,
        )  # fmt: skip


def _result(
    model: str, seen: Mapping[str, _Seen], watch: Watch, placed: str, seed: int
) -> SideBySide:
    sides, base = [], seen["tensor: bare onnxruntime"]
    noise = ratio(seen["tensor: again"].per_s, base.per_s, seed=seed)
    for name, each in seen.items():
        if name == "tensor: again":
            continue
        kind = name.partition(":")[0]
        first = next(name for name in seen if name.startswith(kind))
        more: dict[str, Any] = {
            what: sum(getattr(one, what) for one in each.loads)
            for what in ("sent", "ok", "rejected", "failed")
        }
        if each.loads:
            p99, p50 = ([one.latency_ms[q] for one in each.loads] for q in ("p99", "p50"))
            more |= {
                "rate_per_s": float(np.median([one.rate_per_s or 0.0 for one in each.loads])),
                "latency_ms": quantiles([ms for one in each.loads for ms in one.samples_ms]),
                "tail": ratio(p99, p50, seed=seed),
            }
        sides.append(
            Side(
                name,
                per_s=float(np.median(each.per_s)),
                to_bare=ratio(each.per_s, seen[first].per_s, seed=seed),
                cpu_ms=float(np.median(each.cpu_ms)) if each.cpu_ms else None,
                cpu_to_bare=ratio(seen[first].cpu_ms, each.cpu_ms) if each.cpu_ms else None,
                **more,
            )
        )
    loads = [one for each in seen.values() for one in each.loads]
    bare_ms = [1e3 / per_s for per_s in base.per_s]
    return SideBySide(
        model,
        tuple(sides),
        goals=tuple(_goals(sides)),
        notes=(
            f"{noise.count} rounds in random order; {placed}",
            f"A/A check, the bare loop / itself: {noise}",
            f"latency from when each request was due; the client took at most "
            f"{max(one.client_cores for one in loads):.0%} of a core, and was late by at most "
            f"{duration(max(one.late_ms for one in loads)).strip()} with 99 of 100",
            *(f"warning: {each}" for each in watch.doubts(bare_ms, "the bare loop", noise)),
        ),
        environment=watch.environment,
    )


def _goals(sides: Sequence[Side]) -> Iterator[str]:
    for side in sides:
        if not side.name.endswith(": edgelab"):
            continue
        kept, cpu, tail = side.to_bare, side.cpu_to_bare or side.to_bare, side.tail
        assert tail is not None
        # With neighbours on the core, a server gets more of it than a loop does, as it has more
        # threads. CPU time knows nothing of that; so the goal is reached if both say so.
        yield (
            f"{side.name}: goal throughput >= 0.85 x the bare loop's: {kept}, by CPU time {cpu}: "
            f"{_verdict(min(kept.low, cpu.low) >= 0.85, min(kept.high, cpu.high) < 0.85)}"
        )
        yield (
            f"{side.name}: goal p99 <= 4 x p50 at {SHARE:.0%} load: {tail}: "
            f"{_verdict(tail.high <= 4, tail.low > 4)}"
        )


def _verdict(reached: bool, missed: bool) -> str:
    return "reached" if reached else "missed" if missed else "can't be told from these rounds"


# --- the requests ---------------------------------------------------------------------------------


def _tensor_request(
    model: models.Model, tensor: NDArray[np.float32]
) -> tuple[bytes, dict[str, str]]:
    from edgelab.pipeline import Pipeline

    name = Pipeline(model, threads=1).nn.graph(model.spec.name).inputs[0].name
    return binary_request(name, tensor)


def _photo_request(encoded: bytes) -> tuple[bytes, dict[str, str]]:
    """kserve's HTTP has no binary form for a picture, so it travels as base64 in JSON."""
    text = base64.b64encode(encoded).decode()
    given = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    return json.dumps({"inputs": [given]}).encode(), {"Content-Type": "application/json"}


# --- the processes --------------------------------------------------------------------------------


def _serve(model: str) -> list[str]:
    own = f"{Path(model).stem}={model}" if Path(model).suffix else model
    return [
        sys.executable, "-m", "edgelab", "serve", own, "--http-port=0", "--no-grpc", "--workers=1",
        "--queue=64", "--max-seconds=60",
    ]  # fmt: skip


def _code(function: str, model: str) -> list[str]:
    return [sys.executable, "-c", f"from edgelab import servers; servers.{function}({model!r})"]


class _Process:
    """A process that says on its first line where it listens, or that it is ready."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        environment = {**os.environ, "EDGELAB_TOKEN": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment,
        )  # fmt: skip
        self.url, self.pid = "", self._process.pid

    def __enter__(self) -> _Process:
        return self

    def wait(self) -> None:
        self.url = self.line().split()[-1]

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise EdgelabError(f"{self._name} ended: {one_line(Exception((said or ['?'])[-1]))}")
        return line

    def write(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def cpu_seconds(self) -> float | None:
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):  # another system
            return None

    def __exit__(self, *_: Any) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class _Cores:
    """One core for what is measured and the others for the client, where that is possible."""

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0) if sys.platform == "linux" else set()
        self._theirs = set(sorted(self._all)[:1]) if len(self._all) > 1 else set()
        self.note = (
            f"one core for what is measured, {len(self._all) - 1} for the client alone; a bare "
            "loop runs without any client"
            if self._theirs
            else "they share the cores with the client, whose work is in the numbers"
        )

    def give(self, process: _Process) -> None:
        """Let a process run on the one core, with all its threads and those to come."""
        if sys.platform == "linux" and self._theirs:
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), self._theirs)

    def keep(self) -> None:
        """Run on the other cores."""
        if sys.platform == "linux" and self._theirs:
            os.sched_setaffinity(0, self._all - self._theirs)

    def as_before(self) -> None:
        """Run where it did at first."""
        if sys.platform == "linux":
            os.sched_setaffinity(0, self._all)


# --- what runs in them ----------------------------------------------------------------------------


class _Bare:
    """The model as everybody runs it: Pillow, NumPy, and a session of ONNX Runtime."""

    def __init__(self, name: str) -> None:
        import onnxruntime

        from edgelab.wasinn.backends.onnx import session_options

        model = models.load(name)
        self.spec = model.spec
        self._session = onnxruntime.InferenceSession(
            model.data, session_options(1), providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def infer(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._session.run(None, {self._input: tensor})[0]
        return logits

    def classify(self, encoded: bytes, top: int = 3) -> list[tuple[str, float]]:
        logits = self.infer(preprocess.preprocess(preprocess.bare_decode(encoded), self.spec))[0]
        probabilities = preprocess.softmax(logits)
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.spec.labels[i], float(probabilities[i])) for i in best]


def _bare_loop(model: str) -> None:
    """Take the inputs, then for each line on stdin loop for so many seconds, and tell how often."""
    bare = _Bare(model)
    print("ready", flush=True)
    given = json.loads(sys.stdin.readline())
    tensor = np.array(given["tensor"], np.float32)
    photo = base64.b64decode(given["photo"])
    for line in sys.stdin:
        kind, seconds = json.loads(line)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() < begin + seconds:
            if kind == "tensor":
                bare.infer(tensor)
            else:
                bare.classify(photo)
            count += 1
        print(json.dumps([count, time.perf_counter() - begin]), flush=True)


def _plain_server(model: str) -> None:
    """Serve a model by kserve as its documentation shows: a class with ``load`` and ``predict``.

    kserve would listen on all addresses; it gets a socket of this machine only.
    """
    import kserve
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.infer_type import InferOutput, InferResponse
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension
    from kserve.protocol.rest.server import RESTServer

    from edgelab.serve import listen

    class Plain(kserve.Model):  # type: ignore[misc]
        def load(self) -> bool:
            self.bare = _Bare(model)
            self.ready = True
            return True

        def predict(self, payload: Any, headers: Any = None) -> Any:
            given = payload.inputs[0]
            if given.name == "image":
                found = self.bare.classify(base64.b64decode(given.data[0]))
                labels, probabilities = zip(*found, strict=True)
                outputs = [
                    InferOutput("label", [len(labels)], "BYTES", list(labels)),
                    InferOutput("probability", [len(labels)], "FP32", list(probabilities)),
                ]
            else:
                logits = self.bare.infer(given.as_numpy())
                outputs = [InferOutput("logits", list(logits.shape), "FP32", logits)]
            return InferResponse(
                payload.id or "", self.name, outputs, use_binary_outputs=payload.use_binary_outputs
            )

    plain, known = Plain("plain"), kserve.ModelRepository()
    plain.load()
    known.update(plain)
    listener = listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/v2", flush=True)
    server = RESTServer(
        "kserve.model_server:app", DataPlane(known), ModelRepositoryExtension(known), http_port=0
    )
    server.run(sockets=[listener])
