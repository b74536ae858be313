"""Solutions of lesson 10."""

# %% 10-cut
# The guest's parser knows whether it was the end that it did not like. It calls that E8.


def judge(text):
    try:
        json.loads(text)
        return "whole"
    except json.JSONDecodeError:
        answer = classifier.infer(text.encode())
        return "cut" if answer["error"]["id"] == "E8" else "wrong"


# %% 10-ship
# One kind of machine (P5), one version (E6), and what all CPUs have (E10).


def may_use(fleet):
    if len({(each.machine, each.wasmtime) for each in fleet}) > 1:
        return None
    return set.intersection(*(set(each.features) for each in fleet))
