//! In which formats weights are kept, and who decides: one format for all products, or each matrix by what is stored.

use backend::{WeightType, WeightView};

/// In which format the weights of a product are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// As published, in 12 bits where that can be exact, which hardly a matrix resists.
    #[default]
    Bf16 = 16,
    /// 8.5 bits, quantised when loaded.
    Q8 = 8,
    /// 4.5 bits, quantised when loaded.
    Q4 = 4,
}

/// In which formats the weights of all products are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFormats {
    /// All in one.
    All(WeightFormat),
    /// Each matrix in the smallest that keeps what is stored, which may differ from matrix to matrix.
    AsStored,
}

impl WeightFormat {
    /// All formats, the most precise first.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Q8, Self::Q4];

    /// The name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The smallest format that keeps weights of a type, up to an error far below that of the type itself.
    pub fn keeping(stored: WeightType) -> Self {
        match stored {
            WeightType::Bf16 | WeightType::F16 | WeightType::F32 => Self::Bf16,
            WeightType::Q8_0 | WeightType::Q4K | WeightType::Q5K | WeightType::Q6K => Self::Q8,
            // A group of 32 with one scale, as ours: it keeps its values.
            WeightType::Q4_0 => Self::Q4,
        }
    }

    /// Whether weights are rounded to fewer bits than they usually have.
    pub(crate) fn is_quantised(self) -> bool {
        self != Self::Bf16
    }

    /// Most bits of a weight, its share of a scale included.
    pub fn bits(self) -> f64 {
        match self {
            Self::Bf16 => 16.0,
            Self::Q8 => 8.5,
            Self::Q4 => 4.5,
        }
    }
}

impl WeightFormats {
    /// The name in reports, and in settings if there is one.
    pub fn name(self) -> &'static str {
        match self {
            Self::All(format) => format.name(),
            Self::AsStored => "mixed",
        }
    }

    /// Whether weights are rounded to fewer bits than they usually have, at least some.
    pub fn is_quantised(self) -> bool {
        self != WeightFormat::Bf16.into()
    }

    /// Most bits of a weight.
    pub(crate) fn bits(self) -> f64 {
        match self {
            Self::All(format) => format.bits(),
            Self::AsStored => WeightFormat::Bf16.bits(),
        }
    }

    /// The format of matrices that share one operand, or are stacked: the most precise that one of them asks for.
    pub(crate) fn of<'a>(self, views: impl IntoIterator<Item = &'a WeightView>) -> WeightFormat {
        match self {
            Self::All(format) => format,
            Self::AsStored => {
                let formats = views.into_iter().map(|view| WeightFormat::keeping(view.dtype));
                formats.max_by_key(|&format| format as u8).unwrap_or_default()
            }
        }
    }

    /// A number for files.
    pub(crate) fn code(self) -> u64 {
        match self {
            Self::All(format) => format as u64,
            Self::AsStored => 0,
        }
    }
}

impl Default for WeightFormats {
    fn default() -> Self {
        WeightFormat::default().into()
    }
}

impl From<WeightFormat> for WeightFormats {
    fn from(format: WeightFormat) -> Self {
        Self::All(format)
    }
}

#[cfg(test)]
mod tests {
    use backend::WeightData;

    use super::*;

    #[test]
    fn the_most_precise_of_a_stack_decides() {
        let view = |dtype| WeightView {
            rows: 1,
            cols: 256,
            dtype,
            data: WeightData::Dummy { seed: 0, mean: 0.0, std: 1.0 },
        };
        let as_stored = |types: &[WeightType]| {
            let views: Vec<WeightView> = types.iter().copied().map(view).collect();
            assert_eq!(WeightFormats::from(WeightFormat::Q4).of(&views), WeightFormat::Q4);
            WeightFormats::AsStored.of(&views)
        };
        assert_eq!(as_stored(&[WeightType::Q4_0]), WeightFormat::Q4);
        assert_eq!(as_stored(&[WeightType::Q4_0, WeightType::Q8_0, WeightType::Q4_0]), WeightFormat::Q8);
        assert_eq!(as_stored(&[WeightType::Q6K, WeightType::F16]), WeightFormat::Bf16);
    }
}
