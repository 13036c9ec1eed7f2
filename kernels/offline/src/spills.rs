//! The assemblies that spill, all of attention.
//!
//! ptxas is free to take more registers there, and does not: with `.minnctapersm 1` in the PTX, for which CubeCL has no word,
//! none of them spills.

/// The largest stack frame that they may have.
pub const MOST: usize = 24;

/// Kernel, dtype, size and route of each, as [`crate::table`] names them. One that no longer spills is to be struck.
pub const SPILLING: [&str; 36] = [
    "softmax_attend (16 queries, text, blocks: 2) f32 64, LLVM",
    "softmax_attend (16 queries, pieces, blocks: 2) f32 64, LLVM",
    "softmax_attend (16 queries, text, blocks: 4) f16 64, LLVM",
    "softmax_attend (32 queries, pieces, blocks: 4) f16 64, NVRTC",
    "softmax_attend (16 queries, text, blocks: 4) bf16 64, LLVM",
    "softmax_attend (queries f32, chunk, first launch, blocks: 2) bf16 64, LLVM",
    "softmax_attend (queries f32, 16 queries, pieces, blocks: 2) bf16 64, LLVM",
    "softmax_attend (16 queries, blocks: 2) f32 96, LLVM",
    "softmax_attend (16 queries, text, blocks: 2) f32 96, LLVM",
    "softmax_attend (32 queries, text, blocks: 2) f32 96, LLVM",
    "softmax_attend (32 queries, text, blocks: 2) f32 96, NVRTC",
    "softmax_attend (queries f32, 16 queries, blocks: 2) bf16 96, LLVM",
    "softmax_attend (chunk, first launch, blocks: 2) f32 128, LLVM",
    "softmax_attend (8 queries, text, blocks: 2) f32 128, NVRTC",
    "softmax_attend (16 queries, text, blocks: 2) f32 128, LLVM",
    "softmax_attend (32 queries, blocks: 2) f32 128, NVRTC",
    "softmax_attend (32 queries, text, blocks: 2) f32 128, LLVM",
    "softmax_attend (32 queries, text, blocks: 2) f32 128, NVRTC",
    "softmax_attend (32 queries, pieces, blocks: 2) f32 128, LLVM",
    "softmax_attend (32 queries, pieces, blocks: 2) f32 128, NVRTC",
    "softmax_attend (64 queries, text, blocks: 2) f32 128, LLVM",
    "softmax_attend (first chunk, blocks: 1) f16 128, NVRTC",
    "softmax_attend (32 queries, pieces, blocks: 4) f16 128, LLVM",
    "softmax_attend (32 queries, text, blocks: 4) bf16 128, NVRTC",
    "softmax_attend (32 queries, pieces, blocks: 4) bf16 128, LLVM",
    "softmax_attend (32 queries, pieces, blocks: 4) bf16 128, NVRTC",
    "softmax_attend (queries f32, chunk, first launch, blocks: 2) bf16 128, LLVM",
    "softmax_attend (queries f32, 32 queries, blocks: 2) bf16 128, NVRTC",
    "softmax_attend (queries f32, 32 queries, pieces, blocks: 2) bf16 128, LLVM",
    "softmax_attend (queries f32, 32 queries, pieces, blocks: 2) bf16 128, NVRTC",
    "lightning_scan (dk, dv, states) f32 128, 64-bit addresses, NVRTC",
    "softmax_attend (first chunk, blocks: 1) f32 128, 64-bit addresses, NVRTC",
    "lightning_scan (forward, states) f16 128, 64-bit addresses, LLVM",
    "softmax_backward_queries f16 128, 64-bit addresses, LLVM",
    "lightning_scan (forward, states) bf16 128, 64-bit addresses, LLVM",
    "softmax_backward_queries bf16 128, 64-bit addresses, LLVM",
];
