//! The one error type. Every message names the thing that is wrong and what to do about it.

use std::path::{Path, PathBuf};

/// Everything that can go wrong because of the world (files, flags, devices). Our own bugs are assertions.
#[derive(Debug)]
pub enum Error {
    /// A file or folder could not be read.
    Io { path: PathBuf, source: std::io::Error },
    /// A model folder whose contents cannot be used: which file, what is wrong with it, and the fix.
    Model { path: PathBuf, problem: String },
    /// A request that cannot be served: which parameter, what is wrong, and the fix.
    Request { parameter: &'static str, problem: String },
    /// Flags that contradict each other or are out of range.
    Usage(String),
    /// A device that is absent or too small.
    Device(String),
    /// It has served and cannot any more: why.
    Engine(String),
    /// The output cannot be written.
    Output(std::io::Error),
    /// The driver reported an error. Sticky: the process must stop.
    Cuda { call: &'static str, problem: String },
    /// A kernel did something the SIMT machine forbids (host target, checks on). Sticky as well.
    Kernel(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    pub fn model(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Error::Model { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    pub fn request(parameter: &'static str, problem: impl Into<String>) -> Self {
        Error::Request { parameter, problem: problem.into() }
    }

    /// Process exit code: 2 where the user can mend the input, 1 where the machine failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Cuda { .. } | Error::Kernel(_) | Error::Engine(_) | Error::Output(_) => 1,
            _ => 2,
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Io { path, source } => write!(f, "cannot read {}: {source}", path.display()),
            Error::Model { path, problem } => write!(f, "{}: {problem}", path.display()),
            Error::Request { parameter, problem } => write!(f, "{parameter}: {problem}"),
            Error::Usage(problem) => write!(f, "{problem}"),
            Error::Device(problem) => write!(f, "{problem}"),
            Error::Engine(problem) => write!(f, "the engine has stopped: {problem}"),
            Error::Output(error) => write!(f, "cannot write the output: {error}"),
            Error::Cuda { call, problem } => write!(f, "CUDA {call} failed: {problem}"),
            Error::Kernel(problem) => write!(f, "kernel error: {problem}"),
        }
    }
}

impl std::error::Error for Error {}
