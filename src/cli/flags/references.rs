//! Reference images, which several methods read.

use crate::cli::paths::Paths;
use crate::methods::seedselect::References;
use crate::{Error, Result};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args)]
pub struct ReferenceFlags {
    /// Images of what is to be shown, for what chooses or optimises by them: PNG, JPEG or WebP files, or folders of them
    #[arg(long, value_name = "DIR|FILE", num_args = 1..)]
    references: Vec<PathBuf>,
}

impl ReferenceFlags {
    pub fn is_empty(&self) -> bool {
        self.references.is_empty()
    }

    pub fn inputs(&self, paths: &mut Paths) {
        self.references.iter().for_each(|path| paths.input("--references", path));
    }

    /// All of them, whole, for `whom`.
    pub fn read(&self, whom: &str) -> Result<Arc<References>> {
        if self.is_empty() {
            return Err(Error::Usage(format!("{whom}: needs --references, images of what is to be shown")));
        }
        Ok(Arc::new(References::read(&self.references)?.whole()?))
    }
}
