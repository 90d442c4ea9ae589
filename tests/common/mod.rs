//! Shared by the integration tests; each uses a part of it.
#![allow(dead_code)]

pub mod command;
pub mod golden;
pub mod layouts;
