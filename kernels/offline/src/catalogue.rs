//! Every kernel with every dtype and size that M1-like models ask for.

use cubecl::ir::{AddressType, FloatKind};
use cubecl::prelude::*;

/// Makes a kernel.
pub type Definition = Box<dyn Fn() -> KernelDefinition + Send + Sync>;

/// A kernel at one dtype and size.
pub struct Entry {
    /// The kernel's name.
    pub kernel: String,
    /// The operands' dtype.
    pub dtype: &'static str,
    /// Its comptime sizes, for people.
    pub size: String,
    /// Units (threads) of a cube (block).
    pub units: usize,
    /// Whether its products must run on tensor cores.
    pub tensor_cores: bool,
    /// Makes the kernel.
    pub definition: Definition,
}

/// The dtypes of activations.
pub const TYPES: [(&str, FloatKind); 3] = [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16)];

/// A buffer of its own.
pub const BUFFER: BufferCompilationArg = BufferCompilationArg { inplace: None };

/// A buffer that is there or not.
pub fn option<T: CubePrimitive>(some: bool) -> ComptimeOptionCompilationArg<&'static [T]> {
    if some { ComptimeOptionCompilationArg::Some(BUFFER) } else { ComptimeOptionCompilationArg::None }
}

/// Cubes of `x · y` units, as the operations launch them.
pub fn settings(x: usize, y: usize) -> KernelSettings {
    KernelSettings::new(*CubeDim::new_2d(x as u32, y as u32), ExecutionMode::Unchecked, AddressType::U32)
}

/// All of them.
pub fn entries() -> Vec<Entry> {
    let mut all = crate::attention::entries();
    all.extend(crate::matrix::entries());
    all.extend(crate::rows::entries());
    all
}
