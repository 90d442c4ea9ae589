//! Rewards: differentiable numbers of an image, higher is better.
//!
//! A reward appends ops; where they go is the caller's choice: after the decoder, so that a gradient reaches what was decoded, or
//! into a [`Scorer`], for images that are there already. `examples/reward.rs` is one of a few lines.

mod aesthetic;
mod clip;
mod scorer;
mod shapes;

pub use aesthetic::Aesthetic;
pub use clip::Clip;
pub(crate) use clip::image_features;
pub use scorer::{LoadedScorer, Scorer};
pub use shapes::Attributes;

use crate::Result;
use crate::exec::Executor;
use crate::program::{Builder, DType, Program, ValueId};

/// What an image is worth, alone or under a prompt.
///
/// Buffers begin with the reward's name. The caller writes the prompts before it runs what was appended: a buffer has one content, whichever
/// programs read it.
pub trait Reward {
    fn name(&self) -> &str;

    /// Appends ops from `image [B, H, W, 3]`, in [-1, 1] and of any float type, to a number per image `[B]` of the accumulator type.
    ///
    /// Its weights are those of the model that the program is loaded with.
    fn append(&self, b: &mut Builder, image: ValueId) -> ValueId;

    /// A program that runs once for `batch` prompts, after [`Reward::write`]; what it makes of them lies in buffers that
    /// [`Reward::append`] reads. `dtype` is that of the program appended to. `None`: nothing is to be made of the prompts.
    fn prepare(&self, _dtype: DType, _batch: usize) -> Result<Option<Program>> {
        Ok(None)
    }

    /// Writes what is to be known of the prompts, one per image, into the buffers of the loaded programs.
    fn write(&self, _executor: &mut dyn Executor, _prompts: &[&str]) -> Result<()> {
        Ok(())
    }
}

/// `x [B, ..]` summed per image: `[B]`, of the accumulator type.
fn total(b: &mut Builder, x: ValueId) -> ValueId {
    let shape = b.shape(x);
    let x = b.to_accumulator(x);
    let ones = b.constant(&shape, 1.0);
    let ones = b.to_accumulator(ones);
    b.dot(x, ones)
}
