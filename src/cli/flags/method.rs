//! How the command line gets a method out of its flags.

use crate::Result;
use crate::cli::paths::Paths;
use crate::methods::ImageMethod;
use crate::pipeline::Pipeline;

/// What a method may want to know beside its own flags.
pub struct Context<'a> {
    pub pipeline: &'a Pipeline,
    /// The model is the embedded one.
    pub embedded: bool,
    /// `--seed`.
    pub seed: u64,
    /// Several methods share the flags.
    pub several: bool,
}

/// The flags of one method.
pub trait MethodFlags {
    /// Every file that is read.
    fn inputs(&self, _paths: &mut Paths) {}

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>>;
}
