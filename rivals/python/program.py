"""What the programs here share: arguments in, a label, logits and times out.

A program imports nothing but what it runs the model with, so that its start costs no more.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_REPEATS = 1_000_000


def main(load: Callable[..., tuple[tuple[int, ...], Callable[[Any], Any]]]) -> None:
    """Load a model, and run it on a prepared picture.

    Parameters
    ----------
    load : callable
        Takes the model's path and the arguments after REPEATS. It returns the input's shape, and
        a function from that input (float32) to the logits; or to the logits and the index of the
        best one, if it finds that in a way of its own.
    """
    name = Path(sys.argv[0]).stem
    try:
        model, tensor, labels, count, *more = sys.argv[1:]
        repeats = int(count)
        if not 0 <= repeats <= MAX_REPEATS:
            raise ValueError
    except ValueError:
        print(f"usage: {name} MODEL TENSOR.f32 LABELS.txt REPEATS ...", file=sys.stderr)
        raise SystemExit(2) from None
    shape, infer = load(model, *more)
    values = np.fromfile(tensor, "<f4")
    if values.size != np.prod(shape):
        raise SystemExit(f"{name}: {tensor} has {values.size} values; the model takes {shape}")
    values = values.reshape(shape)

    def run() -> tuple[Any, int]:
        answer = infer(values)
        return answer if isinstance(answer, tuple) else (answer, int(answer.argmax()))

    logits, best = run()
    names = Path(labels).read_text(encoding="utf-8").splitlines()
    if len(names) != len(logits):
        raise SystemExit(f"{name}: {len(names)} labels for {len(logits)} logits")
    print(names[best], flush=True)
    print(*np.array(logits).tolist())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    if times:
        print(*times)


def closed(shape: Any) -> tuple[int, ...]:
    """Return a shape whose open sides, such as the batch, are 1."""
    return tuple(side if isinstance(side, int) and side > 0 else 1 for side in shape)
