//! Making images on the command line: what is made, how, and where it goes.

pub mod account;
pub mod comparison;
pub mod failures;
pub mod finished;
pub mod ledger;
pub mod preview;
pub mod record;
pub mod run;
pub mod scores;
pub mod sheet;
pub mod state;
pub mod stopwatch;
pub mod targets;
pub mod trace;
pub mod work;
pub mod writer;
