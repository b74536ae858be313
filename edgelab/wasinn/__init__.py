"""A WASI-NN host for Python: guests that import ``wasi_ephemeral_nn`` run here."""

from edgelab.wasinn.abi import Encoding, Era, Errno, Target
from edgelab.wasinn.backends import TensorInfo, load_graph
from edgelab.wasinn.explain import Explanation, Finding, LikelyMistake
from edgelab.wasinn.host import NNLimits, WasiNN

__all__ = [
    "Encoding",
    "Era",
    "Errno",
    "Explanation",
    "Finding",
    "LikelyMistake",
    "NNLimits",
    "Target",
    "TensorInfo",
    "WasiNN",
    "load_graph",
]
