//! Where images go.

use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub struct OutputFlags {
    /// The PNG to write, or a folder [default: image.png; images/ for --prompts]
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Write the final latents of the images made: safetensors, tensor `latents`
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,
    /// Make images again that --prompts finds already made
    #[arg(long)]
    pub overwrite: bool,
    /// Stop at the first image that fails; without, the others are made, and the exit code says that one failed
    #[arg(long)]
    pub strict: bool,
    /// Write no text chunks into the PNGs
    #[arg(long)]
    pub no_metadata: bool,
}
