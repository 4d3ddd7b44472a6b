//! Rotary position embedding as a table, so that every backend turns by the same angles and a scaling
//! rule (linear, Llama 3, YaRN) would be a change to the table alone.

/// Cosines and sines of every position, `[max_positions, head_dim / 2]` each, f32.
///
/// Source: RoFormer (arXiv 2104.09864), in the half-split layout of Hugging Face's `rotate_half`: feature
/// `i` is paired with feature `i + head_dim / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Number of paired features, `head_dim / 2`.
    pub half_dim: usize,
    /// `[max_positions, half_dim]`.
    pub cos: Vec<f32>,
    /// `[max_positions, half_dim]`.
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// Computes the unscaled table: `angle(position, i) = position * theta^(-2i / head_dim)`.
    ///
    /// Angles are computed in f32 as `transformers` does, so that long positions round alike.
    pub fn new(theta: f32, head_dim: usize, max_positions: usize) -> Self {
        let half_dim = head_dim / 2;
        let inverse_frequencies: Vec<f32> =
            (0..half_dim).map(|i| 1.0 / theta.powf((2 * i) as f32 / head_dim as f32)).collect();
        let angles = (0..max_positions)
            .flat_map(|position| inverse_frequencies.iter().map(move |f| position as f32 * f));
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Self { half_dim, cos, sin }
    }

    /// Number of positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.cos.len() / self.half_dim
    }
}
