//! What the command line asks of the machine: memory, what came from the disk, Ctrl-C.

use crate::cli::terminal::say;
use crate::plan::{Footprint, show_bytes};
use crate::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Refuses a plan that `limit` (`--memory-limit`), or else the device, or else this process, may not hold; `remedy` would make it
/// smaller.
pub fn check_memory(limit: Option<usize>, device: Option<usize>, plan: &Footprint, remedy: &str) -> Result<()> {
    let (limit, whose) = match (limit, device, allowance(&read)) {
        (Some(limit), _, _) => (limit, "--memory-limit is"),
        (None, Some(memory), _) => (memory, "the device has left"),
        (None, None, Some((memory, whose))) => (memory, whose),
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

/// Fails where the process's limits leave it no memory to start with: it would end without a word.
pub fn check_start() -> Result<()> {
    match allowance(&read) {
        Some((0, whose)) => {
            Err(Error::Memory(format!("{whose} less than the {} that any work needs", show_bytes(OWN))))
        }
        Some(_) | None => Ok(()),
    }
}

/// Refuses `bytes` beside the plan, in this process's memory whatever the device, where `None` are more than can be counted; `what`
/// holds them.
pub fn check_host_memory(limit: Option<usize>, bytes: Option<usize>, what: &str) -> Result<()> {
    let (limit, whose) = match (limit, allowance(&read)) {
        (Some(limit), _) => (limit, "--memory-limit is"),
        (None, Some(allowance)) => allowance,
        (None, None) => return Ok(()),
    };
    let bytes = bytes.unwrap_or(usize::MAX);
    match bytes <= limit {
        true => Ok(()),
        false => Err(Error::Memory(format!("{what} takes {} and {whose} {}", show_bytes(bytes), show_bytes(limit)))),
    }
}

/// What the program takes beside its plans: stacks, tokenizers, what planning itself needs.
const OWN: usize = 48 << 20;

/// Reads a file of the system's; `None` where there is none.
fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// How many bytes this process may still take, and who says so: the least of what the machine has, what is left of the process's own
/// limits, and what its cgroup may use. `None` where the system's files say nothing.
fn allowance(read: &dyn Fn(&str) -> Option<String>) -> Option<(usize, &'static str)> {
    let machine = read("/proc/meminfo").and_then(|info| kibibytes(&info, "MemTotal:"));
    let machine = machine.map(|bytes| (bytes, "this machine has"));
    let status = read("/proc/self/status").unwrap_or_default();
    let limits = read("/proc/self/limits").unwrap_or_default();
    let left = |limit: &str, used: &str, whose: &'static str| {
        let limit = limits.lines().find_map(|line| line.strip_prefix(limit))?;
        let limit: usize = limit.split_whitespace().next()?.parse().ok()?;
        Some((limit.saturating_sub(kibibytes(&status, used).unwrap_or(0)).saturating_sub(OWN), whose))
    };
    let space = left("Max address space", "VmSize:", "this process has left of its address space (ulimit -v)");
    let data = left("Max data size", "VmData:", "this process has left of its data segment (ulimit -d)");
    let group = group_limit(read).map(|bytes| (bytes, "this process's cgroup may use"));
    [machine, space, data, group].into_iter().flatten().min_by_key(|(bytes, _)| *bytes)
}

/// A line like `MemTotal:  24588812 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// The least limit of this process's cgroup and those above it, in both versions' files. A container may see its own group as the
/// root, and then the path that `/proc` names is not there.
fn group_limit(read: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let groups = read("/proc/self/cgroup")?;
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        };
        let counts = controllers.is_empty() || controllers.split(',').any(|controller| controller == "memory");
        let groups = Path::new(path.trim_start_matches('/')).ancestors().filter(move |_| counts);
        // "max" is no number.
        let limit = |group: &Path| read(&Path::new(root).join(group).join(file).to_string_lossy())?.trim().parse().ok();
        groups.filter_map(limit).collect::<Vec<usize>>()
    });
    limits.min()
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

/// A flag that the first Ctrl-C, SIGTERM or SIGHUP raises; the second ends the process at once. What the parent has this process
/// ignore (a shell's `&`, `nohup`) stays ignored.
pub fn catch_interrupt() -> Result<Arc<AtomicBool>> {
    let raised = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&raised);
    let status = read("/proc/self/status").unwrap_or_default();
    let heeded = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(&status, *signal));
    let failed = |error| Error::Usage(format!("cannot watch for Ctrl-C: {error}"));
    let mut signals = Signals::new(heeded).map_err(failed)?;
    let watch = move || {
        for signal in signals.forever() {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(1);
            }
            let again = if signal == SIGINT { "press Ctrl-C again" } else { "signal again" };
            say(&format!("rarebit: stopping after this step; {again} to stop at once"));
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(failed)?;
    Ok(raised)
}

/// The most memory this process has held, where the system says.
pub fn peak_bytes() -> Option<u64> {
    let status = read("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// By the mask in `/proc/self/status`: 16 hex digits, signal 1 the lowest bit.
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24588812 kB\nMemFree:         6291456 kB\n";
    const STATUS: &str = "Name:\trarebit\nVmSize:\t  102400 kB\nVmData:\t   51200 kB\nSigIgn:\t0000000000001002\n";

    fn limits(space: &str, data: &str) -> String {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max data size             {data:<20} unlimited            bytes     \n\
             Max address space         {space:<20} unlimited            bytes     \n"
        )
    }

    fn found(files: &[(&str, &str)]) -> Option<(usize, &'static str)> {
        allowance(&|path| files.iter().find(|(name, _)| *name == path).map(|(_, text)| text.to_string()))
    }

    #[test]
    fn the_least_of_all_limits() {
        let (meminfo, status) = (("/proc/meminfo", MEMINFO), ("/proc/self/status", STATUS));
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[meminfo, status]), Some((24588812 << 10, "this machine has")));
        for (space, data, bytes, word) in [
            ("unlimited", "unlimited", 24588812 << 10, "machine"),
            ("2147483648", "unlimited", (2 << 30) - (148 << 20), "ulimit -v"),
            ("2147483648", "1073741824", (1 << 30) - (98 << 20), "ulimit -d"),
            ("1024", "unlimited", 0, "ulimit -v"),
        ] {
            let limits = limits(space, data);
            let (found, whose) = found(&[meminfo, status, ("/proc/self/limits", &limits)]).unwrap();
            assert!(found == bytes && whose.contains(word), "{space} {data}: {found} {whose}");
        }
    }

    #[test]
    fn cgroups_of_both_versions() {
        let of = |group: &str, limits: &[(&str, &str)]| {
            let files: Vec<_> =
                [("/proc/meminfo", MEMINFO), ("/proc/self/cgroup", group)].iter().chain(limits).copied().collect();
            found(&files).unwrap().0
        };
        let whole = 24588812 << 10;
        let two = "0::/user.slice/job.scope\n";
        let own = "/sys/fs/cgroup/user.slice/job.scope/memory.max";
        assert_eq!(of(two, &[(own, "max\n")]), whole);
        assert_eq!(of(two, &[(own, "1073741824\n")]), 1 << 30);
        let above = ("/sys/fs/cgroup/user.slice/memory.max", "536870912\n");
        assert_eq!(of(two, &[(own, "1073741824\n"), above]), 512 << 20, "the group above allows less");
        assert_eq!(of("0::/\n", &[("/sys/fs/cgroup/memory.max", "4096\n")]), 4096, "a container's root");
        let one = "5:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n0::/\n";
        let limit = |group: &str| format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes");
        assert_eq!(of(one, &[(&limit("/docker/0123"), "1073741824\n")]), 1 << 30);
        assert_eq!(of(one, &[(&limit(""), "1073741824\n")]), 1 << 30, "the container sees its group as the root");
        assert_eq!(of(one, &[(&limit("/docker/0123"), "9223372036854771712\n")]), whole);
        assert_eq!(of("garbage", &[]), whole);
    }

    #[test]
    fn ignored_signals() {
        assert!(is_ignored(STATUS, SIGINT) && !is_ignored(STATUS, SIGHUP) && !is_ignored(STATUS, SIGTERM));
        assert!(!is_ignored("", SIGINT) && !is_ignored("SigIgn:\tx\n", SIGINT));
    }
}
