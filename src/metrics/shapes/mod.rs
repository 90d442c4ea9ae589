//! The `shapes` world as an oracle: its density is known exactly, so rarity and agreement are measured, not believed.

mod caption;
mod conditional;
mod eye;
mod reader;
mod report;
mod world;

pub use conditional::{Conditional, TAIL};
pub use eye::{Eye, Sight};
pub use reader::{Instrument, Reader, Reading, Reference};
pub use report::{AttributeReport, Estimate, Judge, Report, Scored, Share, report};
pub use world::{Attribute, Cell, Statement, World};
