//! The methods that the command line knows: a line each. What is registered here is a method of `compare`, and where it names a
//! switch, of `generate`.

use crate::cli::baselines::{CadsFlags, DdimFlags, NullPromptFlags, SgmsFlags};
use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::minority::flags::MinorityFlags;
use crate::cli::paths::Paths;
use crate::cli::search::{BestOfFlags, EpsilonGreedyFlags, EvolutionFlags, ZeroOrderFlags};
use crate::cli::seed::flags::{ComparedNaoFlags, ComparedSeedFlags};
use crate::methods::ImageMethod;
use crate::{Error, Result};
use clap::builder::PossibleValuesParser;
use clap::parser::ValueSource;
use clap::{ArgGroup, ArgMatches, Args, Command, FromArgMatches};

const METHODS: [Method; 11] = [
    Method::new::<DdimFlags>("ddim"),
    Method::new::<NullPromptFlags>("null-prompt"),
    Method::new::<CadsFlags>("cads").with_switch("cads"),
    Method::new::<SgmsFlags>("sgms").with_switch("sgms"),
    Method::new::<BestOfFlags>("best-of").with_switch("best_of"),
    Method::new::<ZeroOrderFlags>("zero-order").with_switch("zero_order"),
    Method::new::<EpsilonGreedyFlags>("epsilon-greedy").with_switch("epsilon_greedy"),
    Method::new::<EvolutionFlags>("evolution").with_switch("evolution"),
    Method::new::<MinorityFlags>("minority"),
    Method::new::<ComparedSeedFlags>("seed"),
    Method::new::<ComparedNaoFlags>("nao"),
];

struct Method {
    name: &'static str,
    /// The flag of `generate` that chooses it.
    switch: Option<&'static str>,
    augment: fn(Command) -> Command,
    inputs: fn(&ArgMatches, &mut Paths) -> Result<()>,
    make: fn(&ArgMatches, &Context<'_>) -> Result<Box<dyn ImageMethod>>,
}

impl Method {
    const fn new<F: MethodFlags + Args>(name: &'static str) -> Method {
        Method { name, switch: None, augment: F::augment_args, inputs: inputs::<F>, make: make::<F> }
    }

    const fn with_switch(self, switch: &'static str) -> Method {
        Method { switch: Some(switch), ..self }
    }

    /// The flags of this method, some of which may be those of others too.
    fn flags(&self) -> Command {
        (self.augment)(Command::new(self.name))
    }

    fn has(&self, flag: &str) -> bool {
        self.flags().get_arguments().any(|own| own.get_id() == flag)
    }
}

fn is_given(matches: &ArgMatches, flag: &str) -> bool {
    matches.value_source(flag) == Some(ValueSource::CommandLine)
}

/// Adds the flags of methods, once those that several share.
fn add<'m>(command: Command, methods: impl Iterator<Item = &'m Method>) -> Command {
    methods.map(Method::flags).fold(command, |mut command, own| {
        for flag in own.get_arguments() {
            if command.get_arguments().all(|known| known.get_id() != flag.get_id()) {
                // In the order in which they are added.
                command = command.arg(flag.clone().display_order(None));
            }
        }
        for group in own.get_groups() {
            if command.get_groups().all(|known| known.get_id() != group.get_id()) {
                command = command.group(group.clone());
            }
        }
        command
    })
}

/// A flag that the user gave and that no chosen method has, with the methods that have it.
fn idle<'m>(matches: &ArgMatches, methods: &[&'m Method], chosen: &[&Method]) -> Option<(String, Vec<&'m Method>)> {
    for flags in methods.iter().map(|method| method.flags()) {
        for flag in flags.get_arguments() {
            let id = flag.get_id().as_str();
            if let (Some(long), true) = (flag.get_long(), is_given(matches, id))
                && !chosen.iter().any(|method| method.has(id))
            {
                return Some((format!("--{long}"), methods.iter().filter(|method| method.has(id)).copied().collect()));
            }
        }
    }
    None
}

/// `one, two or three`.
fn any_of(words: &[String]) -> String {
    match words {
        [all @ .., last] if !all.is_empty() => format!("{} or {last}", all.join(", ")),
        _ => words.concat(),
    }
}

fn flags<F: FromArgMatches>(matches: &ArgMatches) -> Result<F> {
    F::from_arg_matches(matches).map_err(|error| Error::Usage(error.to_string()))
}

fn inputs<F: MethodFlags + FromArgMatches>(matches: &ArgMatches, paths: &mut Paths) -> Result<()> {
    flags::<F>(matches)?.inputs(paths);
    Ok(())
}

fn make<F: MethodFlags + FromArgMatches>(matches: &ArgMatches, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
    flags::<F>(matches)?.method(context)
}

/// One method, by its switch: plain sampling without.
pub struct Switched(ArgMatches);

impl Switched {
    pub fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let switched: Vec<&Method> = METHODS.iter().filter(|method| method.switch.is_some()).collect();
        let is_on = |method: &&&Method| method.switch.is_some_and(|switch| is_given(&self.0, switch));
        let chosen: Vec<&Method> = switched.iter().filter(is_on).copied().collect();
        if let Some((flag, methods)) = idle(&self.0, &switched, &chosen) {
            let switches = methods.iter().filter_map(|method| method.switch);
            let switches: Vec<String> = switches.map(|id| format!("--{}", id.replace('_', "-"))).collect();
            return Err(Error::Usage(format!("{flag}: does nothing without {}", any_of(&switches))));
        }
        (chosen.first().copied().unwrap_or(&METHODS[0]).make)(&self.0, context)
    }
}

/// Several methods, by their names.
pub struct Listed(ArgMatches);

/// What `--methods` is without it.
const USUAL: &str = "ddim,best-of,minority,cads";

impl Listed {
    /// Every file that is read.
    pub fn inputs(&self, paths: &mut Paths) -> Result<()> {
        METHODS.iter().try_for_each(|method| (method.inputs)(&self.0, paths))
    }

    pub fn methods(&self, context: &Context<'_>) -> Result<Vec<Box<dyn ImageMethod>>> {
        let names: Vec<&String> = self.0.get_many("methods").into_iter().flatten().collect();
        let find = |name: &&String| METHODS.iter().find(|method| method.name == **name);
        let chosen: Vec<&Method> = names.iter().filter_map(find).collect();
        if let Some((flag, methods)) = idle(&self.0, &METHODS.each_ref(), &chosen) {
            let names: Vec<String> = methods.iter().map(|method| format!("'{}'", method.name)).collect();
            return Err(Error::Usage(format!("{flag}: {} is not among --methods", any_of(&names))));
        }
        chosen.iter().map(|method| (method.make)(&self.0, context)).collect()
    }
}

impl FromArgMatches for Switched {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Switched, clap::Error> {
        Ok(Switched(matches.clone()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0 = matches.clone();
        Ok(())
    }
}

impl Args for Switched {
    fn augment_args(command: Command) -> Command {
        let switched = || METHODS.iter().filter(|method| method.switch.is_some());
        let command = add(command, switched()).mut_arg("candidates", |flag| flag.hide(true));
        command.group(ArgGroup::new("method").args(switched().filter_map(|method| method.switch)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Switched::augment_args(command)
    }
}

impl FromArgMatches for Listed {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Listed, clap::Error> {
        Ok(Listed(matches.clone()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0 = matches.clone();
        Ok(())
    }
}

impl Args for Listed {
    fn augment_args(command: Command) -> Command {
        let methods = clap::Arg::new("methods")
            .long("methods")
            .value_name("NAME,NAME,...")
            .value_delimiter(',')
            .default_value(USUAL)
            .value_parser(PossibleValuesParser::new(METHODS.iter().map(|method| method.name)))
            .help("Methods, a column each");
        let command = add(command.arg(methods), METHODS.iter());
        // --methods says it.
        command.mut_arg("cads", |flag| flag.hide(true))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Listed::augment_args(command)
    }
}
