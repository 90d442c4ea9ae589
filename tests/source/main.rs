//! What holds for the source itself: which module imports which, no circles of files, and no machine's paths in any file.

mod circles;
mod layering;
mod paths;
