//! The command line program, run as a process.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod compare;
mod generate;
mod methods;
mod recommended;
mod terminal;
mod tokens;
