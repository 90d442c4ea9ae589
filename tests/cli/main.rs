//! The command line program, run as a process.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod compare;
mod files;
mod flags;
mod generate;
mod kills;
mod methods;
mod models;
mod outputs;
mod recommended;
mod resume;
mod seed;
mod terminal;
mod tokens;
