"""OpenVINO from Python, on the same ONNX file."""

import openvino
from program import closed, main


def load(model):
    core = openvino.Core()
    network = core.read_model(model)
    shape = closed(side.get_length() if side.is_static else 0
                   for side in network.inputs[0].partial_shape)  # fmt: skip
    network.reshape(list(shape))
    # The same float32 as all rows; by default it computes in bfloat16 where the CPU can.
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    return shape, lambda tensor: request.infer([tensor], share_inputs=True)[0][0]


main(load)
