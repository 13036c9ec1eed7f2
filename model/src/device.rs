//! Where to run: `auto`, `cuda[:n]`, `wgpu[:n]` or `cpu`, chosen at run time from what was compiled in and what is there.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;

/// What `--device` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA, then a wgpu GPU, then the CPU. A software Vulkan driver is not a GPU.
    #[default]
    Auto,
    /// CUDA device n.
    Cuda(usize),
    /// The n-th wgpu adapter, real GPUs first.
    Wgpu(usize),
    /// The CPU.
    Cpu,
}

/// Why a device can't be used; each text names what would be right.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// Not a device's name.
    #[error("--device {0}: not a device; use auto, cpu, wgpu, wgpu:N, cuda or cuda:N")]
    Unknown(String),
    /// The backend is not in this binary.
    #[error("--device {0}: this binary was built without it; build with --features {0}, or use --device cpu")]
    NotBuilt(&'static str),
    /// There is no such device here.
    #[error("--device {name}:{index}: no such device; found: {found}")]
    Missing {
        /// Backend asked for.
        name: &'static str,
        /// Number asked for.
        index: usize,
        /// What there is.
        found: String,
    },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || DeviceError::Unknown(text.to_string());
        let (name, index) = match text.split_once(':') {
            None => (text, None),
            Some((name, index)) => (name, Some(index.parse::<usize>().map_err(|_| unknown())?)),
        };
        match (name, index) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            ("wgpu", index) => Ok(Self::Wgpu(index.unwrap_or(0))),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Wgpu(0) => f.write_str("wgpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Wgpu(n) => write!(f, "wgpu:{n}"),
        }
    }
}

/// A device and the one line that says which it is.
#[derive(Debug, Clone)]
pub struct OpenDevice {
    /// Where tensors go.
    pub device: Device,
    /// For people, for example `CPU (2 threads)`.
    pub name: String,
    /// Whether it is the CPU.
    pub is_cpu: bool,
    /// Whether it is a processor posing as a GPU (a software Vulkan driver).
    pub is_software: bool,
}

impl DeviceChoice {
    /// Finds the device.
    ///
    /// # Errors
    /// If it is not compiled in or not there; `auto` always finds the CPU.
    pub fn open(self) -> Result<OpenDevice, DeviceError> {
        match self {
            Self::Cpu => Ok(cpu()),
            Self::Cuda(index) => cuda(index),
            Self::Wgpu(index) => wgpu(index, true),
            Self::Auto => Ok(cuda(0).or_else(|_| wgpu(0, false)).unwrap_or_else(|_| cpu())),
        }
    }
}

fn cpu() -> OpenDevice {
    let threads = m1_kernels::base::pool::threads();
    let name = format!("CPU ({threads} thread{})", if threads == 1 { "" } else { "s" });
    OpenDevice { device: Device::flex(), name, is_cpu: true, is_software: false }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<OpenDevice, DeviceError> {
    Err(DeviceError::NotBuilt("cuda"))
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<OpenDevice, DeviceError> {
    use burn::tensor::DeviceType;

    // Burn panics where the driver is missing (libcuda), so ask quietly whether there is one first.
    let count = if libcuda_present() { Device::enumerate(DeviceType::Cuda).into_vec().len() } else { 0 };
    if index >= count {
        let found = if count == 0 { "no CUDA device".to_string() } else { format!("{count} CUDA devices") };
        return Err(DeviceError::Missing { name: "cuda", index, found });
    }
    Ok(OpenDevice {
        device: Device::cuda(index),
        name: format!("CUDA device {index}"),
        is_cpu: false,
        is_software: false,
    })
}

#[cfg(feature = "cuda")]
fn libcuda_present() -> bool {
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loading NVIDIA's driver library runs only its own initialisers; nothing is called in it.
    names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok())
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: usize, _: bool) -> Result<OpenDevice, DeviceError> {
    Err(DeviceError::NotBuilt("wgpu"))
}

/// Adapters in Burn's order: discrete, integrated and virtual GPUs, then (only if `software`) processors posing as one.
#[cfg(feature = "wgpu")]
fn wgpu(index: usize, software: bool) -> Result<OpenDevice, DeviceError> {
    use burn::tensor::DeviceKind;
    use burn::tensor::wgpu::wgpu::DeviceType;

    let adapters = adapters();
    let kinds = [DeviceType::DiscreteGpu, DeviceType::IntegratedGpu, DeviceType::VirtualGpu, DeviceType::Cpu];
    let mut devices = Vec::new();
    for kind in &kinds[..if software { 4 } else { 3 }] {
        for (n, (name, _)) in adapters.iter().filter(|(_, k)| k == kind).enumerate() {
            let (device, note) = match kind {
                DeviceType::DiscreteGpu => (DeviceKind::DiscreteGpu(n), ""),
                DeviceType::IntegratedGpu => (DeviceKind::IntegratedGpu(n), ""),
                DeviceType::VirtualGpu => (DeviceKind::VirtualGpu(n), ""),
                _ if n == 0 => (DeviceKind::Cpu, ", a software driver: right, and slow"),
                _ => continue,
            };
            devices.push((device, format!("wgpu ({name}{note})")));
        }
    }
    let found = match devices.len() {
        0 => "no wgpu adapter".to_string(),
        _ => devices.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join("; "),
    };
    match devices.into_iter().nth(index) {
        Some((kind, name)) => {
            let is_software = kind == DeviceKind::Cpu;
            Ok(OpenDevice { device: Device::wgpu(kind), name, is_cpu: false, is_software })
        }
        None => Err(DeviceError::Missing { name: "wgpu", index, found }),
    }
}

/// Name and kind of every adapter, without opening one.
#[cfg(feature = "wgpu")]
fn adapters() -> Vec<(String, burn::tensor::wgpu::wgpu::DeviceType)> {
    use burn::tensor::wgpu::wgpu::{Backends, Instance, InstanceDescriptor};

    let backends = if cfg!(target_os = "macos") { Backends::METAL } else { Backends::VULKAN | Backends::DX12 };
    let mut descriptor = InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    let instance = Instance::new(descriptor);
    pollster::block_on(instance.enumerate_adapters(backends))
        .into_iter()
        .map(|adapter| adapter.get_info())
        .map(|info| (info.name, info.device_type))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{DeviceChoice, DeviceError};

    #[test]
    fn names_are_read_and_written() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:1", DeviceChoice::Cuda(1)),
            ("wgpu", DeviceChoice::Wgpu(0)),
            ("wgpu:2", DeviceChoice::Wgpu(2)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cpu:1", "auto:0", "wgpu:-1"] {
            assert_eq!(text.parse::<DeviceChoice>(), Err(DeviceError::Unknown(text.to_string())));
        }
    }

    #[test]
    fn auto_always_finds_something_that_is_no_software_driver() {
        let open = DeviceChoice::Auto.open().unwrap();
        assert!(!open.name.contains("software"), "{}", open.name);
    }
}
