//! Networks as builders of programs, one file per network, and their configurations.

pub mod clip_text;
pub mod config;
pub mod detect;
mod layers;
pub mod parse;
pub mod reader;
pub mod unet;
pub mod vae;
