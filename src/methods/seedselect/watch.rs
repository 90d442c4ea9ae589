//! What is looked at and kept of a run besides its images.

use super::cache::ReferenceCache;
use super::held_out::HeldOut;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// What is done beside a run; nothing of it changes a pixel.
#[derive(Clone, Default)]
pub struct Watch {
    /// Scores the image of every iteration.
    pub judge: Option<HeldOut>,
    /// After every so many iterations the best images so far are shown.
    pub preview: Option<NonZeroUsize>,
    /// Keeps what is made of references.
    pub cache: Option<Arc<dyn ReferenceCache>>,
}

impl Watch {
    /// Whether the best images so far are shown after an iteration, the first of which is 0.
    pub(super) fn shows(&self, iteration: usize) -> bool {
        self.preview.is_some_and(|every| (iteration + 1).is_multiple_of(every.get()))
    }

    /// How often they are in a run of so many iterations.
    pub(super) fn previews(&self, iterations: usize) -> usize {
        self.preview.map_or(0, |every| iterations / every.get())
    }
}
