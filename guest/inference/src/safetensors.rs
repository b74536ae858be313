//! Reader of the safetensors format: a length (u64), a JSON header, then the tensors' bytes.
//!
//! The crate of that name does the same; it would make the guest 60 KB larger.

use crate::json::{Json, integer};

pub struct SafeTensors<'a> {
    header: Json,
    data: &'a [u8],
}

impl<'a> SafeTensors<'a> {
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, String> {
        let cut = || format!("cut off: {} bytes do not hold the header", bytes.len());
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(cut)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| cut())?;
        let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
        let header = Json::parse(header).map_err(|error| format!("header: {error}"))?;
        Ok(Self { header, data })
    }

    /// A value of `__metadata__`; all of them are strings.
    pub fn metadata(&self, key: &str) -> Result<&str, String> {
        self.header
            .get("__metadata__")
            .and_then(|metadata| metadata.get(key)?.text())
            .ok_or_else(|| format!("__metadata__ has no string {key}"))
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        match &self.header {
            Json::Object(entries) => entries.iter().filter(|(k, _)| k != "__metadata__").count(),
            _ => 0,
        }
    }

    pub fn contains(&self, name: &str) -> bool {
        self.header.get(name).is_some()
    }

    /// Shape and values of an F32 tensor.
    pub fn f32(&self, name: &str) -> Result<(Vec<usize>, impl Iterator<Item = f32> + 'a), String> {
        let info = self.header.get(name).ok_or_else(|| format!("no tensor {name}"))?;
        if info.get("dtype").and_then(Json::text) != Some("F32") {
            return Err(format!("tensor {name} is not of dtype F32"));
        }
        let sizes = |key| -> Option<Vec<usize>> {
            let numbers = info.get(key)?.numbers()?.iter();
            numbers.map(|&number| integer(number).map(|size| size as usize)).collect()
        };
        let (Some(shape), Some(offsets)) = (sizes("shape"), sizes("data_offsets")) else {
            return Err(format!("tensor {name}: shape or data_offsets are not whole numbers"));
        };
        let [begin, end] = offsets[..] else {
            return Err(format!("tensor {name}: data_offsets are not two numbers"));
        };
        let bytes = self
            .data
            .get(begin..end)
            .ok_or_else(|| format!("tensor {name} is not inside the file (cut off?)"))?;
        let needed = shape.iter().try_fold(4_usize, |bytes, &n| bytes.checked_mul(n));
        if needed != Some(bytes.len()) {
            return Err(format!("tensor {name}: {} bytes do not fit its shape", bytes.len()));
        }
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok((shape, values))
    }
}
