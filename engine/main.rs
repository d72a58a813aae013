//! The command line. Exit code 2: the input must be mended; 1: the machine failed.

use clap::Parser;
use ponder::Error;
use ponder::args::Args;
use std::io::ErrorKind;
use std::process::ExitCode;

/// glibc's keeps what a flood of large requests has needed, in an arena for each thread.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match ponder::commands::run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ponder: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
