//! Shared by the integration tests; each uses a part of it.
#![allow(dead_code)]

pub mod around;
pub mod cases;
pub mod command;
pub mod emulated;
pub mod feed;
pub mod golden;
pub mod gradients;
pub mod layouts;
pub mod minority;
pub mod naive;
pub mod noting;
pub mod optimised;
pub mod products;
pub mod published;
pub mod rounded;
pub mod sheet;
pub mod storage;
