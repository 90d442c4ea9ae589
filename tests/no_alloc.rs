//! After its first run a program runs without a single heap allocation.

mod common;

use common::inputs::no_weights;
use common::{cases, gradients};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::plan::plan;
use rarebit::program::DType;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what it passes on to the system.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator as it came.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_second_run_allocates_nothing() {
    let model = no_weights();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let forward = cases::all().into_iter().chain(cases::across_samples());
    let forward = forward.map(|case| case.program(DType::F32, 2, true).program);
    let backward = gradients::all().into_iter().map(|case| case.backward(DType::F32, 2, true).program);
    for program in forward.chain(backward) {
        let name = program.name.clone();
        // Work handed over from outside the pool would pass through a queue that grows.
        let allocations = pool.install(|| {
            let mut cpu = Cpu::<f32>::new();
            let planned = plan(program, |program, node| cpu.workspace(program, node));
            let id = cpu.load(planned, &model).unwrap();
            cpu.run(id).unwrap();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            cpu.run(id).unwrap();
            cpu.run(id).unwrap();
            ALLOCATIONS.load(Ordering::Relaxed) - before
        });
        assert_eq!(allocations, 0, "{name}");
    }
}
