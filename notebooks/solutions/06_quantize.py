"""Solutions of lesson 06."""

# %% 06-layers
# The first convolution and the first depthwise one: their channels are among the most uneven, they
# have only 32 of them, and every other layer works with what they give.

moved = {}
for name in weights:
    model = changed(lambda n, w, name=name: rounded(w, 4, False) if n == name else w)
    moved[name] = divergence(before, logits(model, dozen))
layers = sorted(moved, key=moved.get)[-2:]

# %% 06-coin
# The doubled sum is above 1 if lost == gained: then both sides hold the middle.


def p_value(lost, gained):
    n, few = lost + gained, min(lost, gained)
    return min(1, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


# %% 06-calibrate
# An even grey gives small values between the layers. All that is larger, in real pictures, is cut.
pictures = np.zeros((32, 3, 224, 224), np.float32)
