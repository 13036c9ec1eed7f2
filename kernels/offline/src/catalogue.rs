//! Every kernel as a model's passes launch it on this device: text, prefill, decoding and gradients, with every dtype and
//! size that M1-like models ask for.

use std::collections::{HashMap, HashSet};

use cubecl::ir::{AddressType, FloatKind};
use cubecl::prelude::*;

/// A kernel at one dtype and size.
pub struct Entry {
    /// The kernel's name, and its use.
    pub kernel: String,
    /// The operands' dtype.
    pub dtype: &'static str,
    /// Its comptime sizes, for people.
    pub size: String,
    /// Whether its products must run on tensor cores.
    pub tensor_cores: bool,
    /// The kernel itself.
    pub instance: Box<dyn CubeKernel>,
}

impl Entry {
    /// Units (threads) of a cube (block).
    pub fn units(&self) -> usize {
        let dim = self.instance.id().cube_dim;
        (dim.x * dim.y * dim.z) as usize
    }

    /// Name, dtype and size as a file's name.
    pub fn file(&self) -> String {
        let name = format!("{}_{}_{}", self.kernel, self.dtype, self.size).to_lowercase();
        name.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
    }
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

/// Entries that are the same instance as one before, or of the same name; each would count twice.
pub fn repeated(entries: &[Entry]) -> Vec<String> {
    let (mut files, mut instances) = (HashSet::new(), HashMap::new());
    let mut repeated = Vec::new();
    for entry in entries {
        let name = entry.file();
        if let Some(first) = instances.insert(entry.instance.id(), name.clone()) {
            repeated.push(format!("{name} is {first}"));
        }
        if !files.insert(name.clone()) {
            repeated.push(format!("{name} comes twice"));
        }
    }
    repeated
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn no_instance_counts_twice() {
        let mut all = entries();
        assert_eq!(repeated(&all), Vec::<String>::new());
        // Another name does not make another instance.
        let [mut again, same] = [crate::rows::entries(), crate::rows::entries()].map(|mut rows| rows.remove(0));
        again.kernel += " again";
        all.extend([again, same]);
        assert_eq!(repeated(&all).len(), 3);
    }

    /// Names of the functions in `folder` that are launched.
    fn launched(folder: &Path, names: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                launched(&path, names);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for part in text.split("#[cube(launch").skip(1) {
                let function = part.split("pub fn ").nth(1).unwrap();
                names.push(function.split(['<', '(']).next().unwrap().to_string());
            }
        }
    }

    #[test]
    fn every_kernel_of_the_sources_is_here() {
        let mut names = Vec::new();
        launched(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../src"), &mut names);
        assert!(names.len() > 20, "{names:?}");
        let all = entries();
        let here: HashSet<&str> = all.iter().filter_map(|entry| entry.kernel.split(' ').next()).collect();
        names.retain(|name| !here.contains(name.as_str()));
        assert_eq!(names, Vec::<String>::new());
    }
}
