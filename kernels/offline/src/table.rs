//! The table of what every kernel takes, and the demands it must meet.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::assemble::{Resources, Tools};
use crate::catalogue::Entry;
use crate::target::{Route, compile, sm90};

/// One line: a kernel by one route.
pub struct Row {
    kernel: String,
    dtype: &'static str,
    size: String,
    route: Route,
    units: usize,
    shared: usize,
    resources: Resources,
    must_use_tensor_cores: bool,
}

impl Row {
    /// Blocks that fit one multiprocessor at once.
    fn blocks(&self) -> usize {
        let warps = self.units.div_ceil(32);
        // A warp's registers are given out 256 at a time.
        let registers = warps * (self.resources.registers * 32).next_multiple_of(256);
        let shared = self.shared + self.resources.shared + 1024;
        let limits = [sm90::REGISTERS / registers.max(1), sm90::THREADS / (warps * 32), sm90::SHARED / shared];
        limits.into_iter().min().unwrap_or(0).min(sm90::BLOCKS)
    }

    /// Kernel, dtype, size and route.
    fn name(&self) -> String {
        format!("{} {} {}, {}", self.kernel, self.dtype, self.size, self.route.name())
    }

    /// What is wrong with it.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.resources.spills > 0 {
            faults.push(format!("spills {} bytes", self.resources.spills));
        }
        if self.resources.stack > 0 {
            faults.push(format!("a stack frame of {} bytes", self.resources.stack));
        }
        if self.must_use_tensor_cores && self.resources.tensor == 0 {
            faults.push("no tensor-core instruction".into());
        }
        if self.resources.tf32 > 0 {
            faults.push("f32 rounded to TF32".into());
        }
        if self.blocks() == 0 {
            faults.push("does not fit a multiprocessor".into());
        }
        faults
    }
}

/// The rows of all entries, in their order; all cores share the work.
pub fn all(entries: &[Entry], tools: &Tools, folder: &Path) -> Vec<anyhow::Result<Vec<Row>>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(entries.len()));
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(entry) = entries.get(at) else { break };
            let made = rows(entry, tools, folder);
            eprintln!("{} {} {}", entry.kernel, entry.dtype, entry.size);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((at, made));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |count| count.get()) {
            scope.spawn(work);
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, made)| made).collect()
}

/// Compiles an entry by both routes.
fn rows(entry: &Entry, tools: &Tools, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for route in [Route::Ptx, Route::Cpp] {
        let name = format!("{}_{}", entry.file(), route.name().to_lowercase());
        let failed = |error: anyhow::Error| error.context(name.clone());
        let code = {
            // One at a time: CubeCL's compilers say nothing about threads.
            static COMPILING: Mutex<()> = Mutex::new(());
            let _one = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
            compile(entry.instance.define(), route).map_err(failed)?
        };
        let ptx = match route {
            Route::Ptx => code.source,
            Route::Cpp => {
                std::fs::write(folder.join(format!("{name}.cu")), &code.source)?;
                tools.nvrtc(&name, &code.source).map_err(failed)?
            }
        };
        rows.push(Row {
            kernel: entry.kernel.clone(),
            dtype: entry.dtype,
            size: entry.size.clone(),
            route,
            units: entry.units(),
            shared: code.shared,
            resources: tools.assemble(folder, &name, &ptx).map_err(failed)?,
            must_use_tensor_cores: entry.tensor_cores,
        });
    }
    Ok(rows)
}

/// Everything that is wrong, a line each.
pub fn faults(rows: &[Row]) -> Vec<String> {
    let named = |row: &Row, fault: String| format!("{}: {fault}", row.name());
    rows.iter().flat_map(|row| row.faults().into_iter().map(move |fault| named(row, fault))).collect()
}

/// The table as Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| kernel | dtype | size | route | units | registers | spills | shared memory | blocks / SM | tensor-core instructions |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            row.kernel,
            row.dtype,
            row.size,
            row.route.name(),
            row.units,
            row.resources.registers,
            row.resources.spills,
            row.shared + row.resources.shared,
            row.blocks(),
            row.resources.tensor
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(registers: usize, shared: usize, units: usize) -> Row {
        Row {
            kernel: "k".into(),
            dtype: "f32",
            size: "128".into(),
            route: Route::Ptx,
            units,
            shared,
            resources: Resources { registers, spills: 0, stack: 0, shared: 0, tensor: 0, tf32: 0 },
            must_use_tensor_cores: false,
        }
    }

    #[test]
    fn blocks_are_bound_by_the_scarcest() {
        assert_eq!(row(32, 0, 128).blocks(), 16); // threads
        assert_eq!(row(255, 0, 128).blocks(), 2); // registers: 4 warps × 8192
        assert_eq!(row(32, 100 << 10, 128).blocks(), 2); // shared memory
        assert_eq!(row(32, 0, 32).blocks(), 32); // blocks
        assert_eq!(row(32, 300 << 10, 128).blocks(), 0);
    }

    #[test]
    fn faults_are_named() {
        let mut row = row(32, 0, 128);
        assert!(row.faults().is_empty());
        row.dtype = "bf16";
        row.resources = Resources { registers: 32, spills: 8, stack: 16, shared: 0, tensor: 0, tf32: 3 };
        row.must_use_tensor_cores = true;
        let expected =
            ["spills 8 bytes", "a stack frame of 16 bytes", "no tensor-core instruction", "f32 rounded to TF32"];
        assert_eq!(row.faults(), expected);
    }
}
