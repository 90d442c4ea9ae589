//! Which flags the user gave, for commands that share groups of flags and have no use for some of them.

use crate::cli::progress::Reporter;
use clap::ArgMatches;
use clap::parser::ValueSource;

/// The names of the subcommand's flags that were given.
pub struct Given(Vec<String>);

impl Given {
    pub fn of(matches: &ArgMatches) -> Given {
        let Some((_, matches)) = matches.subcommand() else { return Given(vec![]) };
        let ids = matches.ids().map(|id| id.as_str());
        let given = ids.filter(|id| matches.value_source(id) == Some(ValueSource::CommandLine));
        Given(given.filter(|id| id.chars().all(|c| !c.is_ascii_uppercase())).map(str::to_string).collect())
    }

    /// Says of each given flag that `is_unused` that it changes nothing; `why`.
    pub fn warn_of(&self, is_unused: impl Fn(&str) -> bool, why: &str) {
        for id in self.0.iter().filter(|id| is_unused(id)) {
            Reporter::new(false, true).warn(&format!("--{} changes nothing {why}", id.replace('_', "-")));
        }
    }
}
