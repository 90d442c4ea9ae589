//! What methods are compared with.

pub mod best_of;
pub mod cads;
mod cads_schedule;
pub mod sgms;

pub use cads_schedule::Cads;
