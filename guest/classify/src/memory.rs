//! The memory that guest and host share: blocks that the guest allocates and the host fills.
//!
//! A pointer from the host counts only if it lies in a live block. So whatever a host passes, it
//! can neither read nor overwrite the guest's own data through an exported function.

use std::cell::RefCell;

use inference::{Error, Status};

/// Unit of allocation: gives every block an alignment that suits all element types.
#[derive(Clone, Copy)]
#[repr(align(16))]
struct Chunk(#[allow(dead_code)] [u8; 16]);

/// Live blocks with the length that the host asked for, sorted by address.
struct Blocks(Vec<(Vec<Chunk>, usize)>);

thread_local! {
    static BLOCKS: RefCell<Blocks> = const { RefCell::new(Blocks(Vec::new())) };
}

impl Blocks {
    /// Index of the first block that begins after `address`.
    fn after(&self, address: usize) -> usize {
        self.0.partition_point(|(chunks, _)| chunks.as_ptr() as usize <= address)
    }

    fn alloc(&mut self, len: usize) -> Option<usize> {
        if len == 0 {
            return None;
        }
        let count = len.div_ceil(size_of::<Chunk>());
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(count).ok()?;
        self.0.try_reserve(1).ok()?;
        // Zeroed, because reading memory that nobody wrote would be undefined behaviour.
        chunks.resize(count, Chunk([0; 16]));
        let address = chunks.as_mut_ptr() as usize;
        self.0.insert(self.after(address), (chunks, len));
        Some(address)
    }

    fn dealloc(&mut self, address: usize, len: usize) -> bool {
        let Some(index) = self.after(address).checked_sub(1) else {
            return false;
        };
        let (chunks, block_len) = &self.0[index];
        let found = chunks.as_ptr() as usize == address && *block_len == len;
        if found {
            self.0.remove(index);
        }
        found
    }

    fn contains(&self, address: usize, bytes: usize) -> bool {
        let Some(index) = self.after(address).checked_sub(1) else {
            return false;
        };
        let (chunks, block_len) = &self.0[index];
        let offset = address - chunks.as_ptr() as usize;
        offset <= *block_len && bytes <= *block_len - offset
    }
}

/// Allocates a zeroed block, aligned to 16 bytes. `None` if `len` is 0 or memory is full.
pub fn alloc(len: usize) -> Option<usize> {
    BLOCKS.with_borrow_mut(|blocks| blocks.alloc(len))
}

/// Frees a block. The pair must be one that [`alloc`] gave, and only once.
pub fn dealloc(address: usize, len: usize) -> Result<(), Error> {
    if BLOCKS.with_borrow_mut(|blocks| blocks.dealloc(address, len)) {
        return Ok(());
    }
    Err(Error::new(
        Status::InvalidArgument,
        format!(
            "no live block of {len} bytes at {address:#x}: freed twice, or with another length"
        ),
    ))
}

/// Types for which every pattern of bits is a value, aligned to their size.
///
/// # Safety
/// Implement it only for types without padding and without invalid bit patterns.
pub unsafe trait Plain {}
// SAFETY: any byte is a u8.
unsafe impl Plain for u8 {}
// SAFETY: any 4 bytes are a u32.
unsafe impl Plain for u32 {}
// SAFETY: any 4 bytes are an f32.
unsafe impl Plain for f32 {}
// SAFETY: any 4 bytes (in Wasm) are a usize.
unsafe impl Plain for usize {}

/// Checks an address from the host; elements are aligned to their size.
fn check(name: &str, address: usize, count: usize, size: usize) -> Result<(), Error> {
    let problem = if address == 0 || count == 0 {
        "null or empty"
    } else if address % size != 0 {
        "misaligned"
    } else {
        let bytes = count.checked_mul(size);
        if bytes.is_some_and(|n| BLOCKS.with_borrow(|blocks| blocks.contains(address, n))) {
            return Ok(());
        }
        "not inside one live block from alloc()"
    };
    Err(Error::new(
        Status::InvalidArgument,
        format!("{name}: {count} x {size} bytes at {address:#x} are {problem}"),
    ))
}

/// `count` values of `T` at a place that the host named, checked.
#[derive(Debug)]
pub struct Region<T> {
    name: &'static str,
    pointer: *mut T,
    count: usize,
}

impl<T: Plain> Region<T> {
    /// `name` is the parameter's name, for messages.
    pub fn new(name: &'static str, address: usize, count: usize) -> Result<Self, Error> {
        check(name, address, count, size_of::<T>())?;
        Ok(Self { name, pointer: address as *mut T, count })
    }

    /// Fails if the two share a byte: a function must not write what it is still reading.
    pub fn disjoint_from<U: Plain>(&self, other: &Region<U>) -> Result<(), Error> {
        let (a, b) = (self.pointer as usize, other.pointer as usize);
        if a + self.count * size_of::<T>() <= b || b + other.count * size_of::<U>() <= a {
            return Ok(());
        }
        Err(Error::new(
            Status::InvalidArgument,
            format!("{} and {} overlap", self.name, other.name),
        ))
    }

    /// # Safety
    /// While the slice lives, nothing may free its block or write to it.
    pub unsafe fn as_slice(&self) -> &[T] {
        // SAFETY: `new` checked null, alignment and bounds; blocks are initialised; T is Plain.
        unsafe { std::slice::from_raw_parts(self.pointer, self.count) }
    }

    /// # Safety
    /// While the slice lives, nothing may free its block, nor read or write it otherwise.
    pub unsafe fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_zeroed_and_aligned() {
        for len in [1, 15, 16, 17, 1000] {
            let address = alloc(len).unwrap();
            assert_eq!(address % 16, 0);
            let mut region = Region::<u8>::new("block", address, len).unwrap();
            // SAFETY: this thread has the only slice of the block.
            let bytes = unsafe { region.as_mut_slice() };
            assert!(bytes.iter().all(|&x| x == 0));
            bytes.fill(7);
            dealloc(address, len).unwrap();
        }
    }

    #[test]
    fn impossible_blocks_are_refused() {
        for len in [0, usize::MAX, isize::MAX as usize] {
            assert_eq!(alloc(len), None, "{len}");
        }
    }

    #[test]
    fn only_live_blocks_can_be_freed() {
        let address = alloc(100).unwrap();
        for (bad_address, bad_len) in [
            (address, 99),
            (address, 101),
            (address, 0),
            (address + 16, 84),
            (address - 16, 100),
            (0, 0),
            (0, 100),
            (usize::MAX, 100),
        ] {
            assert!(dealloc(bad_address, bad_len).is_err(), "{bad_address:#x} {bad_len}");
        }
        dealloc(address, 100).unwrap();
        assert!(dealloc(address, 100).is_err(), "freed twice");
    }

    #[test]
    fn regions_lie_inside_one_block() {
        let (a, b) = (alloc(64).unwrap(), alloc(64).unwrap());
        assert!(Region::<u8>::new("all", a, 64).is_ok());
        assert!(Region::<f32>::new("end", a + 60, 1).is_ok());
        for (address, count) in [(a, 65), (a + 64, 1), (a + 1, 64), (a - 1, 1), (a, usize::MAX)] {
            assert!(Region::<u8>::new("bad", address, count).is_err(), "{address:#x} {count}");
        }
        for (address, count) in [(a, 17), (a + 2, 1), (a, 1 << (usize::BITS - 2)), (a, 0), (0, 1)] {
            assert!(Region::<f32>::new("bad", address, count).is_err(), "{address:#x} {count}");
        }
        dealloc(a, 64).unwrap();
        assert!(Region::<u8>::new("freed", a, 1).is_err());
        dealloc(b, 64).unwrap();
    }

    #[test]
    fn overlap_is_seen() {
        let a = alloc(64).unwrap();
        let region = |offset, count| Region::<u8>::new("region", a + offset, count).unwrap();
        for (x, y, disjoint) in [
            (region(0, 32), region(32, 32), true),
            (region(0, 33), region(32, 32), false),
            (region(32, 1), region(0, 64), false),
            (region(5, 5), region(5, 5), false),
        ] {
            assert_eq!(x.disjoint_from(&y).is_ok(), disjoint);
            assert_eq!(y.disjoint_from(&x).is_ok(), disjoint);
        }
        dealloc(a, 64).unwrap();
    }

    #[test]
    fn many_blocks() {
        let blocks: Vec<_> = (1..500).map(|len| (alloc(len).unwrap(), len)).collect();
        for (i, &(address, len)) in blocks.iter().enumerate() {
            if i % 2 == 0 {
                dealloc(address, len).unwrap();
            }
        }
        for (i, &(address, len)) in blocks.iter().enumerate() {
            assert_eq!(Region::<u8>::new("block", address, len).is_ok(), i % 2 == 1);
        }
    }
}
