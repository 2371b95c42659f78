//! What a run did: bytes and errors by kind of layer. Plain data; printing is the program's.

use crate::linear::Squares;

/// Kinds of linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names are those of the projections")]
pub enum Kind {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Kind {
    /// All, in the order of tables.
    pub const ALL: [Kind; 7] = [Kind::Q, Kind::K, Kind::V, Kind::O, Kind::Gate, Kind::Up, Kind::Down];

    /// Name of the projection, as in tensor names.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Q => "q_proj",
            Kind::K => "k_proj",
            Kind::V => "v_proj",
            Kind::O => "o_proj",
            Kind::Gate => "gate_proj",
            Kind::Up => "up_proj",
            Kind::Down => "down_proj",
        }
    }
}

/// All layers of a kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KindReport {
    /// Which.
    pub kind: Kind,
    /// How many there are.
    pub layers: usize,
    /// Their bytes in the input.
    pub bytes_before: u64,
    /// Their bytes in the output.
    pub bytes_after: u64,
    squares: Squares,
}

impl KindReport {
    /// Size of the error relative to that of what it is an error of, both as root mean squares over all layers: of
    /// outputs where there was a calibration, else of weights.
    pub fn relative_error(&self) -> f64 {
        if self.squares.output > 0.0 { (self.squares.error / self.squares.output).sqrt() } else { 0.0 }
    }

    /// Sum of the squared errors: of outputs on the calibration inputs, or of weights.
    pub fn squared_error(&self) -> f64 {
        self.squares.error
    }
}

/// The result of [`quantize`](crate::quantize).
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// By kind, in the order of [`Kind::ALL`].
    pub kinds: Vec<KindReport>,
    /// Whether errors are of outputs on calibration inputs, not of weights.
    pub calibrated: bool,
    /// AWQ's group size; `None` for the other formats.
    pub group_size: Option<usize>,
    /// Bytes of tensors that stay as they are.
    pub bytes_kept: u64,
    /// Bytes of all tensors of the input.
    pub bytes_before: u64,
    /// Bytes of all tensors of the output.
    pub bytes_after: u64,
}

impl Report {
    pub(crate) fn new(calibrated: bool, group_size: Option<usize>) -> Self {
        let squares = Squares::default();
        let empty = |kind| KindReport { kind, layers: 0, bytes_before: 0, bytes_after: 0, squares };
        let kinds = Kind::ALL.map(empty).to_vec();
        Self { kinds, calibrated, group_size, bytes_kept: 0, bytes_before: 0, bytes_after: 0 }
    }

    /// Counts a layer.
    pub(crate) fn add(&mut self, kind: Kind, bytes_before: u64, bytes_after: u64, squares: Squares) {
        if let Some(entry) = self.kinds.iter_mut().find(|entry| entry.kind == kind) {
            entry.layers += 1;
            entry.bytes_before += bytes_before;
            entry.bytes_after += bytes_after;
            entry.squares.error += squares.error;
            entry.squares.output += squares.output;
        }
    }
}
