"""Solutions of lesson 07."""

# %% 07-three
# A guest that stays is not compiled again, so "aot" would do in place of "instance", too.
three = {"instance", "model", "binary"}

# %% 07-ahead
# An image is taken only when there is room: the oldest future was given before.

from collections import deque


def stream(submit, images, ahead):
    waiting = deque()
    for image in images:
        waiting.append(submit(image))
        if len(waiting) == ahead:
            yield waiting.popleft()
    yield from waiting


# %% 07-lru
# To use a model is to move it to the end. What is at the front goes first.


def who_stays(requests, sizes, limit):
    loaded = []
    for name in requests:
        if name in loaded:
            loaded.remove(name)
        loaded.append(name)
        while sum(sizes[each] for each in loaded) > limit:
            loaded.pop(0)
    return loaded
