"""Solutions of lesson 05."""

# %% 05-starts
# Whole steps, and a last one that ends where the data end. Where n is a multiple of step, the last
# one is simply the next. What it overlaps is computed twice, to the same result.


def starts(n, step):
    return [*range(0, n - step, step), n - step]


# %% 05-palette
# Sixteen pixels at a time, then what is left one by one. Here no step may overlap another: the
# pixels are changed where they lie, and what was looked up must not be looked up again.
palette = """
use core::arch::wasm32::*;

#[unsafe(no_mangle)]
#[target_feature(enable = "simd128")]
pub unsafe extern "C" fn palette(at: *mut u8, n: usize, table: *const u8) {
    unsafe {
        let entries = v128_load(table as *const v128);
        let mut i = 0;
        while i + 16 <= n {
            let pixels = at.add(i) as *mut v128;
            v128_store(pixels, u8x16_swizzle(entries, v128_load(pixels)));
            i += 16;
        }
        while i < n {
            *at.add(i) = *table.add(*at.add(i) as usize);
            i += 1;
        }
    }
}"""

# The same in WAT, without a compiler.
palette_wat = """(module
  (memory (export "memory") 1)
  (func (export "palette") (param $at i32) (param $n i32) (param $table i32) (local $end i32)
    (local.set $end (i32.add (local.get $at) (local.get $n)))
    (block $rest (loop $next
      (br_if $rest (i32.gt_u (i32.add (local.get $at) (i32.const 16)) (local.get $end)))
      (v128.store (local.get $at)
        (i8x16.swizzle (v128.load (local.get $table)) (v128.load (local.get $at))))
      (local.set $at (i32.add (local.get $at) (i32.const 16)))
      (br $next)))
    (block $done (loop $next
      (br_if $done (i32.eq (local.get $at) (local.get $end)))
      (i32.store8 (local.get $at)
        (i32.load8_u (i32.add (local.get $table) (i32.load8_u (local.get $at)))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br $next)))))"""
