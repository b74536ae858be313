"""Solutions of lesson 01."""

# %% 01-brighten
# Both arguments are u32, so the sum has room, and `min` cuts it. `pixel.saturating_add(by)` would
# saturate too, but at 4,294,967,295: the largest u32, not the largest byte.
brighten = """
#[unsafe(no_mangle)]
pub extern "C" fn brighten(pixel: u32, by: u32) -> u32 {
    pixel.saturating_add(by).min(255)
}"""

# The same in WAT, without a compiler: `select` takes the first value if the condition holds.
brighten_wat = """(module
  (func (export "brighten") (param i32 i32) (result i32) (local $sum i32)
    (local.set $sum (i32.add (local.get 0) (local.get 1)))
    (select (i32.const 255) (local.get $sum) (i32.gt_u (local.get $sum) (i32.const 255)))))"""

# %% 01-hog
# memory.grow gives the old size in pages, or -1 if the host refuses. Going on while it is not -1
# takes all there is. A guest that ignores the -1 loops for ever, until the host stops it.
hog = """(module
  (memory (export "memory") 1)
  (func (export "hog") (result i32)
    (loop $again
      (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (memory.size)))"""
