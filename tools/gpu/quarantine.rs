//! Which kernels are to blame for what went wrong, and are not launched again: the rest of the check goes on without them.

use rarebit::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What is known of kernels by now; it crosses to the next process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Known {
    /// Launched by a run that passed.
    pub proven: BTreeSet<String>,
    /// Blamed once already.
    pub named: BTreeSet<String>,
    /// Not to be launched.
    pub quarantined: BTreeSet<String>,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    pub section: String,
    /// The case, with its type.
    pub name: String,
    /// The kernel that is to blame, if it is known.
    pub kernel: Option<String>,
    /// Whether that is not launched again.
    pub quarantined: bool,
    pub what: String,
}

impl Known {
    pub fn take(&mut self, incident: &Incident) {
        let Some(kernel) = &incident.kernel else { return };
        self.named.insert(kernel.clone());
        if incident.quarantined {
            self.quarantined.insert(kernel.clone());
        }
    }

    /// Of what a run launched that came out wrong, the kernel to blame: the only one that no passed run has launched, else of those
    /// that the run is `about` the first such one, or the first. None if it launched one that was blamed before.
    pub fn blame<'a>(&self, launched: &'a [String], about: &'a [String]) -> Option<&'a String> {
        if launched.iter().any(|kernel| self.named.contains(kernel)) {
            return None;
        }
        let is_unproven = |kernel: &&String| !self.proven.contains(*kernel);
        let mut unproven = launched.iter().filter(is_unproven);
        if let (Some(only), None) = (unproven.next(), unproven.next()) {
            return Some(only);
        }
        let mut about = about.iter().filter(|kernel| launched.contains(kernel));
        about.clone().find(is_unproven).or(about.next())
    }
}

/// What is on the device.
#[derive(Clone, Debug, PartialEq)]
pub enum Outstanding {
    Kernel(String),
    Graph,
}

/// What the run at hand did on the device.
#[derive(Debug, Default)]
pub struct Doings {
    /// Kernels, each once, in the order of their first launch.
    pub launched: Vec<String>,
    /// What did not come back in order.
    pub outstanding: Option<Outstanding>,
    /// The kernel that the run requested and that is quarantined.
    pub refused: Option<String>,
}

/// Both, as every executor of a device shares them.
#[derive(Default)]
pub struct Kernels {
    pub known: Known,
    pub doings: Doings,
}

impl Kernels {
    /// Before a program is loaded that will launch the kernel.
    pub fn ask(&mut self, kernel: &str) -> Result<()> {
        if self.known.quarantined.contains(kernel) {
            self.doings.refused.get_or_insert_with(|| kernel.to_string());
            return Err(Error::Device(format!("kernel {kernel} is in quarantine")));
        }
        Ok(())
    }

    pub fn start(&mut self, what: Outstanding) {
        if let Outstanding::Kernel(kernel) = &what
            && !self.doings.launched.contains(kernel)
        {
            self.doings.launched.push(kernel.clone());
        }
        self.doings.outstanding = Some(what);
    }

    pub fn back(&mut self) {
        self.doings.outstanding = None;
    }
}
