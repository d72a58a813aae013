//! `cargo bench --bench kernels -- ARGS`: the same as `ponder bench kernels ARGS`.

use clap::Parser;
use ponder::args::Args;
use std::process::ExitCode;

fn main() -> ExitCode {
    // cargo adds --bench.
    let args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let args = ["ponder", "bench", "kernels"].map(String::from).into_iter().chain(args);
    match ponder::commands::run(Args::parse_from(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ponder: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
