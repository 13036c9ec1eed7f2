//! The command line of MiniMax-M1: `m1 --help`.

#[global_allocator]
static ALLOCATOR: m1_infer::allocator::Allocator = m1_infer::allocator::Allocator;

fn main() -> std::process::ExitCode {
    m1_infer::cli::main()
}
