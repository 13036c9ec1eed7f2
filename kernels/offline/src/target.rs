//! The device that kernels are compiled for: an H800 or H100 (sm_90a), as CubeCL's CUDA runtime would describe it, made
//! by hand because none is here.

use std::sync::Arc;

use cubecl::cuda::CUDA_MAX_BINDINGS;
use cubecl::cuda::compiler::{CudaBackend, CudaCompilationOptions, CudaCompiler, CudaRepresentation};
use cubecl::ir::features::Features;
use cubecl::ir::nvidia::SmArch;
use cubecl::ir::{DeviceIdentity, DeviceProperties, HardwareProperties, MemoryDeviceProperties, TargetProperties};
use cubecl::prelude::*;
use cubecl_cpp::shared::register_wmma_features;
use cubecl_llvm::nvptx::ptx_version::PtxVersion;

/// Streaming multiprocessors' limits of sm_90.
pub mod sm90 {
    /// 32-bit registers of one multiprocessor.
    pub const REGISTERS: usize = 65_536;
    /// Threads resident at once.
    pub const THREADS: usize = 2048;
    /// Blocks resident at once.
    pub const BLOCKS: usize = 32;
    /// Bytes of shared memory for blocks; each block takes another KiB for itself.
    pub const SHARED: usize = 228 << 10;
    /// Bytes that one block may ask for.
    pub const SHARED_PER_BLOCK: usize = 227 << 10;
}

/// Properties of the device, with the tensor-core shapes of sm_90.
pub fn properties() -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: CUDA_MAX_BINDINGS,
        max_shared_memory_size: sm90::SHARED_PER_BLOCK,
        max_cube_count: (2_147_483_647, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(132),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: "H800".into(), fingerprint: "ptx_sm90".into(), physical: None };
    let mut properties = DeviceProperties::new(
        Features::default(),
        MemoryDeviceProperties::new(20 << 30, 512),
        hardware,
        cubecl::profile::TimingMethod::Device,
        identity,
    );
    cubecl_cpp::register_supported_types(&mut properties);
    register_tensor_cores(&mut properties);
    Arc::new(properties)
}

fn register_tensor_cores(properties: &mut DeviceProperties) {
    use cubecl_cpp::cuda::arch::CudaArchitecture;
    use cubecl_cpp::cuda::mma::CudaCmmaCompiler;
    let arch = CudaArchitecture { version: 90, tensor_cores: true };
    register_wmma_features(CudaCmmaCompiler::Cpp.supported_cmma_combinations(&arch), properties);
}

/// Properties of the compilation target.
pub fn target() -> Arc<TargetProperties> {
    Arc::new(TargetProperties::default())
}

/// How CubeCL turns a kernel into code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// PTX, through LLVM: CubeCL's default.
    Ptx,
    /// CUDA C++, for NVRTC.
    Cpp,
}

impl Route {
    /// The compiler's name.
    pub fn name(self) -> &'static str {
        match self {
            Route::Ptx => "LLVM",
            Route::Cpp => "NVRTC",
        }
    }
}

/// A kernel's code by one route.
pub struct Code {
    /// PTX or CUDA C++.
    pub source: String,
    /// Bytes of shared memory that its launch reserves.
    pub shared: usize,
}

/// Compiles a kernel; nothing is run.
pub fn compile(definition: KernelDefinition, route: Route) -> anyhow::Result<Code> {
    use cubecl::Compiler;
    let mut options = CudaCompilationOptions {
        arch: Some(SmArch::new(90, true)),
        ptx_version: PtxVersion::for_driver(12_090),
        ..Default::default()
    };
    options.cpp.warp_size = 32;
    options.cpp.supports_features.grid_constants = true;
    options.cpp.supports_features.fast_math = true;
    let backend = if route == Route::Ptx { CudaBackend::Llvm } else { CudaBackend::Cpp };
    let compiled =
        CudaCompiler::new(backend).compile(definition, &options).map_err(|error| anyhow::anyhow!("{error:?}"))?;
    let shared = compiled.shared_memory_size();
    let source = match compiled {
        CudaRepresentation::Llvm(module) => {
            // SAFETY: the PTX is a C string that LLVM wrote, ended by a zero.
            unsafe { std::ffi::CStr::from_ptr(module.ptx.as_ptr()) }.to_string_lossy().into_owned()
        }
        CudaRepresentation::Cpp(kernel) => kernel.to_string(),
    };
    Ok(Code { source, shared })
}
