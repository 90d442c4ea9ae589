//! Networks as builders of programs, one file per network, and their configurations.

pub mod clip_image;
pub mod clip_text;
pub mod config;
pub mod detect;
pub mod gpt2;
pub mod heads;
mod layers;
pub mod parse;
pub mod preprocess;
pub mod reader;
pub mod unet;
pub mod unread;
pub mod vae;

pub use layers::Weights;
