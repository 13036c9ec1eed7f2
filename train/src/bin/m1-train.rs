//! `m1-train`: see `m1-train --help`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: m1_infer::allocator::Allocator = m1_infer::allocator::Allocator;

fn main() -> ExitCode {
    match m1_train::cli::run() {
        Ok(code) => code,
        // A reader that closed the pipe (`| head`) has seen what it wanted.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", m1_train::cli::told(&e));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|e| e.downcast_ref().is_some_and(broken))
}
