//! The `shapes` world as an oracle: its density is known exactly, so rarity and agreement can be measured.

mod caption;
mod conditional;
mod reader;
mod report;
mod scorer;
mod world;

pub use conditional::{Conditional, TAIL};
pub use reader::{Instrument, Reader, Reading, Reference};
pub use report::{AttributeReport, Estimate, Fraction, Judge, Report, Scored, report};
pub use scorer::{ShapesScore, ShapesScorer};
pub use world::{Attribute, Cell, Statement, World};
