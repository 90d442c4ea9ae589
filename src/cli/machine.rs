//! What the command line asks of the machine: memory, page faults, Ctrl-C, and a stderr that may be closed.

use crate::plan::show_bytes;
use crate::{Error, Result};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// One line to stderr. A closed stderr is no reason to stop.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One line to stdout.
pub fn print_line(line: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{line}").map_err(Error::io("write", "standard output"))
}

/// Refuses a plan that `limit` (`--memory-limit`), or else this machine, cannot hold.
pub fn check_memory(limit: Option<usize>, needed: usize, batch: usize) -> Result<()> {
    let (limit, whose) = match (limit, physical_memory()) {
        (Some(limit), _) => (limit, "--memory-limit is"),
        (None, Some(memory)) => (memory, "this machine has"),
        (None, None) => return Ok(()),
    };
    if needed <= limit {
        return Ok(());
    }
    let flags = if batch > 1 { "--batch or --size" } else { "--size" };
    let (needed, limit) = (show_bytes(needed), show_bytes(limit));
    Err(Error::Memory(format!("the plan needs {needed} and {whose} {limit}; a smaller {flags} needs less")))
}

/// In bytes (`/proc/meminfo`, in KiB there); `None` where there is no such file.
fn physical_memory() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
}

/// Major page faults of this process so far (`/proc/self/stat`, field 12); 0 where there is no such file.
pub fn major_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(9).and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// A flag that the first Ctrl-C raises; the second ends the process at once.
pub fn catch_interrupt() -> Result<Arc<AtomicBool>> {
    let raised = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&raised);
    ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
        say("\nrarebit: stopping after this step; press Ctrl-C again to stop at once");
    })
    .map_err(|error| Error::Usage(format!("cannot watch for Ctrl-C: {error}")))?;
    Ok(raised)
}
