//! Criterion as all benches here use it: short runs, at least ten calls each, and what is freed is kept as in the programs (whose
//! allocator asks for huge pages besides: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` does that here).

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};

/// With cargo's own arguments: a filter, `--save-baseline NAME`, `--measurement-time SECONDS`, …
pub fn criterion() -> Criterion {
    m1_kernels::base::memory::keep_freed();
    println!("{:?}, {} threads", m1_kernels::base::simd::level(), m1_kernels::base::pool::threads());
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .nresamples(2000)
        .configure_from_args()
}

/// Cases that do the same work. What they share is best made by a `LazyCell`: a filter then leaves it unmade.
pub fn group<'a>(c: &'a mut Criterion, name: &str, work: Throughput) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).throughput(work);
    group
}
