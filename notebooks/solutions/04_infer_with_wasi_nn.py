"""Solutions of lesson 04."""

# %% 04-pack
# "<" means little-endian, and no padding but what the format says: 3x. (Without "<", struct pads
# as this machine's C compiler does: the same 20 bytes here, by luck.)


def pack(dims_at, rank, kind, data_at, size):
    return struct.pack("<IIB3xII", dims_at, rank, kind, data_at, size)


# %% 04-prepare
# The order (2, 1, 0) is right for a library that gives blue, green, red. These pixels are red,
# green, blue already, so it exchanged two channels. nn.explain tells after some pictures:
#
#     for place, context in zip((9, 11, 17, 31), [new_context()] * 4):
#         infer(prepare(Signs("test", 64)[place].image), context)
#         print(nn.explain(instance).findings)


def prepare(image):
    pixels = resize_crop(image, spec.resize, spec.crop) / 255
    planes = [(pixels[..., c] - spec.mean[c]) / spec.std[c] for c in (0, 1, 2)]
    return np.stack(planes)[None].astype(np.float32)


# %% 04-needed
# No room at all is the surest way to be refused. The errno says so and is dropped; the size was
# written to 0x60 first.
needed = (
    five[:-1]
    + """
  (func (export "needed") (param $context i32) (result i32)
    (drop (call $get_output (local.get $context) (i32.const 0)
                            (i32.const 0x100) (i32.const 0) (i32.const 0x60)))
    (i32.load (i32.const 0x60))))"""
)
