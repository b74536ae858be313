"""edgelab: run Rust/Wasm guests with WASI-NN from Python, and measure what that costs.

The names below are loaded on first use, so that ``import edgelab`` stays cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelab.build import guest_path as guest_path
    from edgelab.classify import Classifier as Classifier
    from edgelab.errors import EdgelabError as EdgelabError
    from edgelab.pipeline import Pipeline as Pipeline
    from edgelab.pool import Pool as Pool
    from edgelab.runtime import Guest as Guest
    from edgelab.runtime import Limits as Limits
    from edgelab.wasinn import WasiNN as WasiNN

__version__ = "0.1.0"

# ONNX Runtime 1.32 reports what it runs to its maker, unless told not to before it is imported.
# Whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "Classifier": "edgelab.classify",
    "EdgelabError": "edgelab.errors",
    "Guest": "edgelab.runtime",
    "Limits": "edgelab.runtime",
    "Pipeline": "edgelab.pipeline",
    "Pool": "edgelab.pool",
    "WasiNN": "edgelab.wasinn",
    "guest_path": "edgelab.build",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'edgelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
