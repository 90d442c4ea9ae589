//! The methods that the command line knows: a line each. What is registered here is a method of `compare`, and where it names a
//! switch, of `generate`.

use crate::cli::baselines::{BestOfFlags, CadsFlags, DdimFlags, NullPromptFlags, SgmsFlags};
use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::minority::flags::MinorityFlags;
use crate::cli::paths::Paths;
use crate::cli::seed::flags::ComparedSeedFlags;
use crate::methods::ImageMethod;
use crate::{Error, Result};
use clap::builder::PossibleValuesParser;
use clap::parser::ValueSource;
use clap::{ArgGroup, ArgMatches, Args, Command, FromArgMatches};

const METHODS: [Method; 7] = [
    Method::new::<DdimFlags>("ddim"),
    Method::new::<NullPromptFlags>("null-prompt"),
    Method::new::<CadsFlags>("cads").with_switch("cads"),
    Method::new::<SgmsFlags>("sgms").with_switch("sgms"),
    Method::new::<BestOfFlags>("best-of").with_switch("best_of"),
    Method::new::<MinorityFlags>("minority"),
    Method::new::<ComparedSeedFlags>("seed"),
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

    /// The flags of this method that the user gave.
    fn given(&self, matches: &ArgMatches) -> Option<String> {
        let flags = (self.augment)(Command::new(self.name));
        let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let given = flags.get_arguments().find(|flag| is_given(flag.get_id().as_str()))?;
        given.get_long().map(|long| format!("--{long}"))
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
        let is_on = |switch: &str| self.0.value_source(switch) == Some(ValueSource::CommandLine);
        for (method, switch) in METHODS.iter().filter_map(|method| Some((method, method.switch?))) {
            if let (Some(flag), false) = (method.given(&self.0), is_on(switch)) {
                return Err(Error::Usage(format!("{flag}: does nothing without --{switch}")));
            }
        }
        let chosen = METHODS.iter().find(|method| method.switch.is_some_and(is_on));
        (chosen.unwrap_or(&METHODS[0]).make)(&self.0, context)
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
        for method in METHODS.iter().filter(|method| names.iter().all(|name| *name != method.name)) {
            if let Some(flag) = method.given(&self.0) {
                return Err(Error::Usage(format!("{flag}: '{}' is not among --methods", method.name)));
            }
        }
        let find = |name: &&String| METHODS.iter().find(|method| method.name == **name);
        names.iter().filter_map(find).map(|method| (method.make)(&self.0, context)).collect()
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
        let switched = || METHODS.iter().filter_map(|method| Some((method, method.switch?)));
        let command = switched().fold(command, |command, (method, _)| (method.augment)(command));
        command.group(ArgGroup::new("method").args(switched().map(|(_, switch)| switch)))
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
        let command = METHODS.iter().fold(command.arg(methods), |command, method| (method.augment)(command));
        // --methods says it.
        command.mut_arg("cads", |flag| flag.hide(true))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Listed::augment_args(command)
    }
}
