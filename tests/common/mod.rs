//! Shared by the integration tests; each uses a part of it.
#![allow(dead_code)]

pub mod auxiliary;
pub mod cases;
pub mod command;
pub mod emulated;
pub mod golden;
pub mod gradients;
pub mod inputs;
pub mod layouts;
pub mod low_precision;
pub mod minority;
pub mod naive;
pub mod optimised;
pub mod products;
pub mod published;
pub mod recording_driver;
pub mod seedselect;
pub mod sheet;
pub mod tolerance;
