//! What the command line asks of the machine: memory, what came from the disk, Ctrl-C.

use crate::cli::terminal::say;
use crate::plan::{Footprint, show_bytes};
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Refuses a plan that `limit` (`--memory-limit`), or else the device, or else this machine, cannot hold; `remedy` would make it
/// smaller.
pub fn check_memory(limit: Option<usize>, device: Option<usize>, plan: &Footprint, remedy: &str) -> Result<()> {
    let (limit, whose) = match (limit, device, physical_memory()) {
        (Some(limit), _, _) => (limit, "--memory-limit is"),
        (None, Some(memory), _) => (memory, "the device has left"),
        (None, None, Some(memory)) => (memory, "this machine has"),
        (None, None, None) => return Ok(()),
    };
    if plan.total() <= limit {
        return Ok(());
    }
    let advice = if plan.weight_bytes > limit {
        format!("its weights alone take {}, so this model needs a larger limit", show_bytes(plan.weight_bytes))
    } else {
        format!("{remedy} needs less")
    };
    let (needed, limit) = (show_bytes(plan.total()), show_bytes(limit));
    Err(Error::Memory(format!("the plan needs {needed} and {whose} {limit}; {advice}")))
}

/// In bytes (`/proc/meminfo`, in KiB there); `None` where there is no such file.
fn physical_memory() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
}

/// The processor's name (`/proc/cpuinfo`); the architecture's where there is no such file.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// Bytes this process has had the disk deliver so far (`/proc/self/io`); 0 where there is no such file.
pub fn disk_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let field = io.lines().find_map(|line| line.strip_prefix("read_bytes:"));
    field.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
}

/// A flag that the first Ctrl-C raises; the second ends the process at once.
pub fn catch_interrupt() -> Result<Arc<AtomicBool>> {
    let raised = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&raised);
    ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
        say("rarebit: stopping after this step; press Ctrl-C again to stop at once");
    })
    .map_err(|error| Error::Usage(format!("cannot watch for Ctrl-C: {error}")))?;
    Ok(raised)
}
