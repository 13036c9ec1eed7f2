//! The command line of MiniMax-M1: `m1 --help`.

fn main() -> std::process::ExitCode {
    m1_infer::cli::main()
}
