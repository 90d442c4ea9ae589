//! What methods are compared with.

pub mod cads;
pub mod ddim;
pub mod judge;
pub mod null_prompt;
pub mod search;
pub mod sgms;
