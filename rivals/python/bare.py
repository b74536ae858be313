"""ONNX Runtime from Python, without Wasm: what the other rows are compared with."""

import onnxruntime
from program import closed, main


def load(model):
    # What edgelab.wasinn.backends.onnx.session_options gives every row, with one thread.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return closed(given.shape), lambda tensor: session.run(None, {given.name: tensor})[0][0]


main(load)
