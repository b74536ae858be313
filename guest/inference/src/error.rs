use std::fmt;

/// Kinds of errors, with the negative numbers by which the guest's functions return them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// Null, empty, misaligned, overlapping, of a wrong length, or out of range.
    InvalidArgument = -1,
    OutOfMemory = -2,
    /// An image that is too large or has no pixels.
    ImageSize = -3,
    InvalidModel = -4,
    NoModel = -5,
    WasiNn = -6,
    /// NaN or infinity where a finite number is needed.
    NotFinite = -7,
}

/// A status for programs and a message for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    pub status: Status,
    pub message: String,
}

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<imgproc::Error> for Error {
    fn from(error: imgproc::Error) -> Self {
        let status = match error {
            imgproc::Error::InvalidArgument(_) => Status::InvalidArgument,
            imgproc::Error::OutOfMemory(_) => Status::OutOfMemory,
            imgproc::Error::ImageSize(_) => Status::ImageSize,
            imgproc::Error::NotFinite(_) => Status::NotFinite,
        };
        Self::new(status, error.to_string())
    }
}
