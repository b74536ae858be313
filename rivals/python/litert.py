"""LiteRT (TensorFlow Lite) from Python, on a .tflite file with the same weights."""

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from program import main


def load(model):
    interpreter = Interpreter(model, num_threads=1)
    interpreter.allocate_tensors()
    (given,), (found, *_) = interpreter.get_input_details(), interpreter.get_output_details()
    _, height, width, channels = given["shape"].tolist()
    turned = {}  # the picture in this model's layout, once: it would come from a camera so

    def infer(tensor):
        if "nhwc" not in turned:
            turned["nhwc"] = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))
        interpreter.set_tensor(given["index"], turned["nhwc"])
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])[0]

    return (1, channels, height, width), infer


main(load)
