//! Flags with the same meaning in every subcommand, defined once: a file per group.

pub mod device;
pub mod given;
pub mod images;
pub mod method;
pub mod model;
pub mod optimizer;
pub mod output;
pub mod references;
pub mod sampling;
pub mod values;
