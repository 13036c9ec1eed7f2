//! What can be proved of the CUDA kernels where no GPU is: every kernel of `m1-kernels` is compiled for sm_90a by both of
//! CubeCL's routes and assembled; registers, spills, shared memory and tensor-core instructions go to a table.
//!
//! `run.sh` beside this crate sets up the tools and calls it.

mod assemble;
mod attention;
mod catalogue;
mod matrix;
mod roofline;
mod rows;
mod table;
mod target;

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Compiles every kernel for sm_90a without a GPU and tells what it takes")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile and assemble all kernels and write the table; fails, with a list, if one cannot be, spills, misses its tensor
    /// cores or rounds to TF32.
    Table {
        /// The site-packages folder with NVIDIA's wheels.
        #[arg(long)]
        tools: PathBuf,
        /// Where PTX, CUDA C++ and machine code go.
        #[arg(long)]
        work: PathBuf,
        /// The Markdown file to write.
        #[arg(long)]
        out: PathBuf,
        /// Hash of the sources, as `run.sh` makes it; the table carries it.
        #[arg(long)]
        sources: String,
        /// Only kernels whose name and size hold this text; their rows are printed, and no file is written.
        #[arg(long)]
        only: Option<String>,
    },
    /// Print the roofline of M1's shapes.
    Roofline,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Roofline => print!("{}", roofline::tables()),
        Command::Table { tools, work, out, sources, only } => {
            let tools = assemble::Tools::open(&tools)?;
            std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
            let mut entries = catalogue::entries();
            let repeated = catalogue::repeated(&entries);
            if !repeated.is_empty() {
                bail!("{} kernels would count twice:\n{}", repeated.len(), repeated.join("\n"));
            }
            if let Some(text) = &only {
                entries.retain(|entry| format!("{} {} {}", entry.kernel, entry.dtype, entry.size).contains(text));
            }
            let mut rows = Vec::new();
            let mut failed = Vec::new();
            for made in table::all(&entries, &tools, &work) {
                match made {
                    Ok(new) => rows.extend(new),
                    Err(error) => failed.push(format!("{error:#}")),
                }
            }
            if !failed.is_empty() {
                bail!("{} kernels cannot be compiled:\n{}", failed.len(), failed.join("\n"));
            }
            if only.is_some() {
                print!("{}", table::markdown(&rows));
            }
            let faults = table::faults(&rows);
            if !faults.is_empty() {
                bail!("{} of {} assemblies not as demanded:\n{}", faults.len(), rows.len(), faults.join("\n"));
            }
            if only.is_some() {
                return Ok(());
            }
            let text = format!(
                "# Kernels on sm_90a, compiled and never run\n\nMade by `kernels/offline/run.sh`; no GPU was there. Sources: `{}`.\n\
                 {} kernels, each by CubeCL's two routes (LLVM to PTX, and CUDA C++ through NVRTC), then ptxas. Demanded of every \
                 one of these {} assemblies, or there is no table: tensor cores where f16/bf16 blocks are multiplied, no TF32, no \
                 spills and no stack frame.\n\nNot counted: products of f16 or bf16 tensors with more than 8 rows outside \
                 the experts, and their gradients, which go to Burn's matmul.\n\n## What each takes\n\n{}\n## What M1's shapes \
                 cost at least\n\n{}",
                sources,
                entries.len(),
                rows.len(),
                table::markdown(&rows),
                roofline::tables()
            );
            let temporary = out.with_extension("md.tmp");
            std::fs::write(&temporary, text).with_context(|| temporary.display().to_string())?;
            std::fs::rename(&temporary, &out).with_context(|| out.display().to_string())?;
            eprintln!("{} rows, all as demanded: {}", rows.len(), out.display());
        }
    }
    Ok(())
}
