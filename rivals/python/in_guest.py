"""This project: a guest in wasmtime that runs the whole model by itself, with the crate tract."""

from program import main

from edgelab.classify import Classifier
from edgelab.runtime import Guest


def load(model, wasm, classes, side):
    guest = Classifier(Guest(wasm).instantiate())
    with open(model, "rb") as file:
        graph = guest.load_graph(file.read())

    def infer(tensor):
        logits = guest.compute(graph, tensor, int(classes))
        return logits, guest.top_k(logits, 1)[0][0]

    return (1, 3, int(side), int(side)), infer


main(load)
