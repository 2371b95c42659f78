//! A picture in memory. Drawing is in `visual`; encoding for the wire is the caller's.

/// An RGB picture, row by row from the top left, three bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, 3]`
    pub rgb: Vec<u8>,
}
