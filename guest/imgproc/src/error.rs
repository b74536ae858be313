use std::fmt;

/// What can be wrong with an image or its parameters. Each message carries the numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    InvalidArgument(String),
    OutOfMemory(String),
    /// Too large, or without any pixel.
    ImageSize(String),
    /// NaN or infinity where a finite number is needed.
    NotFinite(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument(message)
            | Self::OutOfMemory(message)
            | Self::ImageSize(message)
            | Self::NotFinite(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

/// `vec![0; len]` that reports a full memory instead of aborting: a guest's memory is often limited.
pub fn try_zeros<T: Clone + Default>(len: usize) -> Result<Vec<T>, Error> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| {
        let bytes = len.saturating_mul(size_of::<T>());
        Error::OutOfMemory(format!("no memory for {bytes} bytes; raise the guest's memory limit"))
    })?;
    values.resize(len, T::default());
    Ok(values)
}
