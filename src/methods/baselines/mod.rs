//! What methods are compared with.

pub mod best_of;
pub mod cads;
pub mod ddim;
pub mod null_prompt;
pub mod sgms;
