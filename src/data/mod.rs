//! What users hand in and get back: images, prompt lists, learned tokens.

pub mod images;
pub mod metadata;
pub mod parameters;
mod png_chunks;
pub mod prompts;
pub mod resample;
pub mod textual_inversion;
