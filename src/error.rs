//! The one error type: what is wrong, where, and what to do, in one line; `exit_code` maps it to the command line.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, prompt or value the user gave makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused to read or write a path.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A file was read but its content is malformed.
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    /// A tensor of a checkpoint is missing or is not what the architecture needs.
    #[error("{}: tensor '{key}': {what}", path.display())]
    Tensor { path: PathBuf, key: String, what: String },
    /// The model is not one this engine builds.
    #[error("{0}")]
    Model(String),
    /// A program is malformed; names the op, its shapes and the model line that appended it.
    #[error("program '{program}': {what} (appended at {at})")]
    Program { program: String, what: String, at: String },
    /// The plan does not fit the memory limit.
    #[error("{0}")]
    Memory(String),
    /// The GPU is not there, cannot run this build, or failed.
    #[error("{0}")]
    Device(String),
    /// Numbers went wrong while running; names the op.
    #[error("{0}")]
    Numeric(String),
    /// What came of a run holds infinities or NaN. It does not say where they begin: the same run does after
    /// [`Executor::set_check_finite`](crate::exec::Executor::set_check_finite).
    #[error("{0} is not finite; --check-finite names the op where that begins")]
    NotFinite(String),
    /// Some of what was asked for failed, and that was said when it did; the rest is done.
    #[error("{0}")]
    Incomplete(String),
    /// A measurement is worse than it may be.
    #[error("{0}")]
    Regression(String),
    /// The user pressed Ctrl-C.
    #[error("interrupted; finished images are kept, and a --prompts run, or seed --resume, goes on where it stopped")]
    Interrupted,
}

impl Error {
    /// Wraps an I/O error with the action ("read", "write", "create") and the path it failed on.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// A malformed file.
    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    /// Says of numbers that went wrong when they did.
    pub fn during(self, what: impl std::fmt::Display) -> Error {
        match self {
            Error::Numeric(wrong) => Error::Numeric(format!("{what}: {wrong}")),
            other => other,
        }
    }

    /// 2 for wrong usage, 3 for a measurement that got worse, 1 for everything else that failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Regression(_) => 3,
            _ => 1,
        }
    }
}
