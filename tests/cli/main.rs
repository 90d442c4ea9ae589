//! The command line program, run as a process.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod compare;
mod files;
mod generate;
mod methods;
mod models;
mod recommended;
