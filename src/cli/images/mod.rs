//! Making images on the command line: what is made, how, and where it goes.

pub mod run;
pub mod sheet;
pub mod targets;
pub mod writer;
