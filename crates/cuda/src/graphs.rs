//! Steps recorded as CUDA graphs: one launch instead of some hundred, which a step that only decodes is too short to hide.
//!
//! A recording holds the number of blocks and the arguments of every launch, so it serves the steps that agree in what
//! [`RecordedShape`] says. Batches are not padded to fewer shapes: tokens that nobody asked for would be routed, and cost the
//! weights of their experts. What a shape is needs to be seen twice before it is recorded, because the first time loads
//! kernels, and because prompts of odd lengths do not come back.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use cudarc::driver::CudaGraph;

use crate::device::Device;

/// Recordings kept at most, and shapes remembered: each takes memory of the device.
const MAX_SHAPES: usize = 512;

/// What a recording depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RecordedShape {
    pub(crate) num_tokens: usize,
    /// Blocks of attention, and of the fold of its parts.
    pub(crate) num_decode_items: usize,
    pub(crate) num_prefill_items: usize,
    pub(crate) num_folds: usize,
    /// Where the step's numbers are; they move while the first steps make room.
    pub(crate) step_address: u64,
}

/// The recordings of a device.
#[derive(Default)]
pub(crate) struct Graphs {
    seen: HashMap<RecordedShape, Option<Graph>>,
    num_replays: u64,
}

struct Graph(CudaGraph);

// SAFETY: the driver lets any thread use a graph, as long as no two do at once; `Graphs` gives it to nobody.
unsafe impl Send for Graph {}

impl Graphs {
    /// Launches what was recorded for a shape; `false` if nothing was.
    pub(crate) fn replay(&mut self, device: &mut Device, shape: &RecordedShape) -> bool {
        let Some(Some(graph)) = self.seen.get(shape) else { return false };
        device.call(|| graph.0.launch());
        self.num_replays += 1;
        true
    }

    /// Whether a shape without a recording is to be recorded now.
    pub(crate) fn is_due(&mut self, shape: &RecordedShape) -> bool {
        let is_full = self.seen.len() >= MAX_SHAPES;
        match self.seen.entry(*shape) {
            Entry::Occupied(_) => true,
            Entry::Vacant(entry) if !is_full => {
                entry.insert(None);
                false
            }
            Entry::Vacant(_) => false,
        }
    }

    /// Keeps what was recorded.
    pub(crate) fn insert(&mut self, shape: RecordedShape, graph: CudaGraph) {
        self.seen.insert(shape, Some(Graph(graph)));
    }

    /// Steps that were one launch.
    pub(crate) fn num_replays(&self) -> u64 {
        self.num_replays
    }
}
