//! What holds for the source itself: which module imports which, and no machine's paths in any file.

mod layering;
mod paths;
