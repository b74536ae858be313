"""This project: a guest in wasmtime, whose model runs in ONNX Runtime through WASI-NN."""

from program import closed, main

from edgelab.classify import Classifier
from edgelab.runtime import Guest
from edgelab.wasinn import WasiNN


def load(model, wasm, classes):
    with open(model, "rb") as file:
        host = WasiNN({"model": file.read()}, threads=1)
    guest = Classifier(Guest(wasm, host=[host]).instantiate())
    graph = guest.load_graph("model")

    def infer(tensor):
        logits = guest.compute(graph, tensor, int(classes))
        return logits, guest.top_k(logits, 1)[0][0]

    return closed(host.graph("model").inputs[0].shape), infer


main(load)
