"""Timings that can be compared: interleaved, repeated, and said with the machine they belong to."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from edgelab.aot import available_cores, cpu_features


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and tail of repeated measurements.

    Attributes
    ----------
    median_ms, p95_ms : float
        Milliseconds.
    count : int
    """

    median_ms: float
    p95_ms: float
    count: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Summary:
        """Summarise samples in milliseconds; at least one."""
        if len(samples_ms) == 0:
            raise ValueError("no samples: measure with repeats >= 1")
        median, p95 = np.percentile(samples_ms, (50, 95))
        return cls(float(median), float(p95), len(samples_ms))

    def to_dict(self) -> dict[str, float]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def interleaved(
    rows: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3, seed: int = 0
) -> dict[str, list[float]]:
    """Time functions in turns, in a new random order each round, so that all meet the same noise.

    Parameters
    ----------
    rows : mapping of str to callable
    repeats : int
        Rounds; each calls every function once.
    warmup : int
        Rounds that are not counted.
    seed : int
        Seed of the order.

    Returns
    -------
    dict of str to list of float
        Milliseconds; entry ``k`` of every list comes from the same round.

    Raises
    ------
    ValueError
        If `repeats` is not positive or `warmup` is negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"need repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    order, samples = list(rows), {name: list[float]() for name in rows}
    shuffle = random.Random(seed).shuffle
    for turn in range(-warmup, repeats):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            rows[name]()
            elapsed = (time.perf_counter() - start) * 1e3
            if turn >= 0:
                samples[name].append(elapsed)
    return samples


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much longer one row takes than another, from paired rounds.

    Attributes
    ----------
    median : float
        Median of the per-round ratios.
    low, high : float
        95 % bootstrap interval of that median.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_dict(self) -> dict[str, float]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def ratio(samples_ms: Sequence[float], baseline_ms: Sequence[float], *, seed: int = 0) -> Ratio:
    """Compare two rows of `interleaved` round by round.

    Parameters
    ----------
    samples_ms, baseline_ms : sequence of float
        Two rows of one `interleaved` result.
    seed : int
        Seed of the bootstrap.

    Raises
    ------
    ValueError
        If the rows are empty or not of the same length.
    """
    if len(samples_ms) != len(baseline_ms) or len(samples_ms) == 0:
        raise ValueError(f"rows of {len(samples_ms)} and {len(baseline_ms)} samples are no pairs")
    ratios = np.asarray(samples_ms) / np.asarray(baseline_ms)
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The machine and the versions that a timing belongs to."""

    cpu: str
    cores: int
    features: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    load: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


# What decides about speed here: SIMD widths, FMA, and the dot products that INT8 kernels use.
_TELLING = {"sse4_1", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16",
            "amx_int8", "asimd", "asimddp", "i8mm", "sve"}  # fmt: skip


def fingerprint() -> Fingerprint:
    """Describe this machine, now."""
    versions = {}
    for package in ("edgelab", "wasmtime", "onnxruntime", "numpy", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return Fingerprint(
        cpu=_cpu_name(),
        cores=available_cores(),
        features=tuple(f for f in cpu_features() if f in _TELLING),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=sys.version.split()[0],
        versions=versions,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
