//! From PTX or CUDA C++ to machine code, and what it takes: ptxas, NVRTC and nvdisasm, as PyPI's wheels carry them.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use libloading::{Library, Symbol};

/// Where the tools are.
pub struct Tools {
    ptxas: PathBuf,
    nvdisasm: PathBuf,
    nvrtc: Library,
    includes: Vec<PathBuf>,
}

/// What a kernel's machine code takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of registers written to and read from memory for want of room.
    pub spills: usize,
    /// Bytes of a thread's frame in memory.
    pub stack: usize,
    /// Bytes of shared memory that the code itself declares (the launch adds the rest).
    pub shared: usize,
    /// Tensor-core instructions in the SASS.
    pub tensor: usize,
    /// Those of them that round f32 operands to TF32.
    pub tf32: usize,
}

impl Tools {
    /// Looks for the tools below `root`, the site-packages folder of the wheels.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let nvidia = root.join("nvidia");
        let ptxas = nvidia.join("cuda_nvcc/bin/ptxas");
        let nvdisasm = ["cu13/bin/nvdisasm", "cuda_nvdisasm/bin/nvdisasm"].map(|path| nvidia.join(path));
        let nvdisasm = nvdisasm.into_iter().find(|path| path.exists());
        let nvdisasm = nvdisasm.with_context(|| format!("{}: no nvdisasm", nvidia.display()))?;
        if !ptxas.exists() {
            bail!(
                "{}: no such file; expected the wheel nvidia-cuda-nvcc-cu12 below {}",
                ptxas.display(),
                root.display()
            );
        }
        let library = nvidia.join("cuda_nvrtc/lib/libnvrtc.so.12");
        // SAFETY: loading NVIDIA's compiler library runs only its own initialisers.
        let nvrtc = unsafe { Library::new(&library) }.with_context(|| library.display().to_string())?;
        let includes = ["cuda_runtime/include", "cuda_nvcc/include", "cuda_cccl/include"].map(|dir| nvidia.join(dir));
        Ok(Self { ptxas, nvdisasm, nvrtc, includes: includes.into() })
    }

    /// CUDA C++ to PTX, by NVRTC.
    pub fn nvrtc(&self, name: &str, source: &str) -> anyhow::Result<String> {
        type Program = *mut c_void;
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

        let mut options =
            vec!["--gpu-architecture=compute_90a".to_string(), "--std=c++17".into(), "-default-device".into()];
        options.extend(self.includes.iter().map(|dir| format!("--include-path={}", dir.display())));
        let options = options.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let (source, name) = (CString::new(source)?, CString::new(name)?);
        // SAFETY: the functions have the types of nvrtc.h; all pointers live through the calls; texts are read into
        // buffers of the size that NVRTC says.
        unsafe {
            let create: Symbol<Create> = self.nvrtc.get(b"nvrtcCreateProgram")?;
            let compile: Symbol<Compile> = self.nvrtc.get(b"nvrtcCompileProgram")?;
            let destroy: Symbol<Destroy> = self.nvrtc.get(b"nvrtcDestroyProgram")?;
            let text = |program: Program, size: &[u8], get: &[u8]| -> anyhow::Result<String> {
                let (size, get): (Symbol<Size>, Symbol<Text>) = (self.nvrtc.get(size)?, self.nvrtc.get(get)?);
                let mut len = 0;
                size(program, &mut len);
                let mut bytes = vec![0u8; len.max(1)];
                get(program, bytes.as_mut_ptr().cast());
                bytes.truncate(len.saturating_sub(1));
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            };
            let mut program: Program = std::ptr::null_mut();
            let status = create(&mut program, source.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null());
            if status != 0 {
                bail!("nvrtcCreateProgram: error {status}");
            }
            let status = compile(program, pointers.len() as c_int, pointers.as_ptr());
            let result = if status == 0 {
                text(program, b"nvrtcGetPTXSize", b"nvrtcGetPTX")
            } else {
                let log = text(program, b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog")?;
                Err(anyhow::anyhow!("NVRTC error {status}: {log}"))
            };
            destroy(&mut program);
            result
        }
    }

    /// PTX to machine code for sm_90a, and what that takes.
    pub fn assemble(&self, folder: &Path, name: &str, ptx: &str) -> anyhow::Result<Resources> {
        let (source, cubin) = (folder.join(format!("{name}.ptx")), folder.join(format!("{name}.cubin")));
        std::fs::write(&source, ptx)?;
        let output = Command::new(&self.ptxas).args(["-arch=sm_90a", "-v", "-o"]).arg(&cubin).arg(&source).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("ptxas: {said}");
        }
        let sass = Command::new(&self.nvdisasm).args(["-c"]).arg(&cubin).output()?;
        if !sass.status.success() {
            bail!("nvdisasm: {}", String::from_utf8_lossy(&sass.stderr));
        }
        let sass = String::from_utf8_lossy(&sass.stdout);
        resources(&said, &sass)
    }
}

/// Reads ptxas's report and the disassembly; an error if they do not say what is asked of them.
fn resources(report: &str, sass: &str) -> anyhow::Result<Resources> {
    // The numbers before `what`, one for each function of the file that has one.
    let all = |what: &str| -> anyhow::Result<Vec<usize>> {
        let heads = report.match_indices(what).map(|(at, _)| report[..at].trim_end());
        heads
            .map(|head| head.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default())
            .map(|digits| digits.parse().with_context(|| format!("ptxas gives no number of {what}: {report}")))
            .collect()
    };
    let said = |what: &str| -> anyhow::Result<Vec<usize>> {
        let numbers = all(what)?;
        if numbers.is_empty() {
            bail!("ptxas says nothing of {what}: {report}");
        }
        Ok(numbers)
    };
    let sum = |numbers: Vec<usize>| numbers.into_iter().sum::<usize>();
    let instructions = |what: &str| sass.lines().filter(|line| line.contains(what)).count();
    if instructions("EXIT") == 0 {
        bail!("nvdisasm shows no kernel: {sass}");
    }
    Ok(Resources {
        registers: said("registers")?.into_iter().max().unwrap_or_default(),
        spills: sum(said("bytes spill stores")?) + sum(said("bytes spill loads")?),
        stack: sum(said("bytes stack frame")?),
        // Only where there are any.
        shared: sum(all("bytes smem")?),
        tensor: instructions("HMMA") + instructions("HGMMA") + instructions("IMMA"),
        tf32: instructions(".TF32"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ptxas_and_nvdisasm_print() {
        let report = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : Function properties for k\n    \
                      0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\nptxas info    : Used 96 registers, used 1 \
                      barriers, 1024 bytes smem\n";
        let sass = "  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n  FFMA R1, R2, R3, R1 ;\n  HMMA.1688.F32.TF32 R4, R8, R12, R4 ;\n  \
                    EXIT ;\n";
        let expected = Resources { registers: 96, spills: 40, stack: 0, shared: 1024, tensor: 2, tf32: 1 };
        assert_eq!(resources(report, sass).unwrap(), expected);
        // A function that was not inlined counts too.
        let called = format!("{report}    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n");
        assert_eq!(resources(&called, sass).unwrap(), Resources { spills: 44, stack: 8, ..expected });
    }

    #[test]
    fn what_is_not_said_is_no_zero() {
        let report = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 96 registers\n";
        assert_eq!(resources(report, "EXIT ;").unwrap().registers, 96);
        assert!(resources(report, "").is_err());
        for word in ["registers", "bytes stack frame", "bytes spill stores", "bytes spill loads"] {
            assert!(resources(&report.replace(word, "of something"), "EXIT ;").is_err(), "{word}");
        }
        assert!(resources(&report.replace("96", "few"), "EXIT ;").is_err());
    }
}
