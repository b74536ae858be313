"""A WASI-NN host for Python: guests that import ``wasi_ephemeral_nn`` run here."""

from edgelab.wasinn.abi import Encoding, Errno, Target
from edgelab.wasinn.backends import TensorInfo
from edgelab.wasinn.host import NNLimits, WasiNN, load_graph

__all__ = ["Encoding", "Errno", "NNLimits", "Target", "TensorInfo", "WasiNN", "load_graph"]
