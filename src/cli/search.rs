//! The flags of the gradient-free searches: best of n, zero-order, ε-greedy, evolution. What they share is one flag for all.

use crate::cli::flags::method::{Context, MethodFlags};
use crate::cli::flags::references::ReferenceFlags;
use crate::cli::flags::values;
use crate::cli::paths::Paths;
use crate::methods::ImageMethod;
use crate::methods::baselines::judge::{Criterion, Score};
use crate::methods::baselines::search::Searched;
use crate::methods::seedselect::Likeness;
use crate::optimize::search::ladder::{EpsilonGreedy, Evolution, Search, ZeroOrder};
use crate::{Error, Result};
use clap::{Args, ValueEnum};

/// Of every search.
#[derive(Args)]
pub struct CommonFlags {
    /// Candidates per image of every search that does not say how many [default: 4]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    #[arg(conflicts_with_all = ["best_of", "zero_order", "epsilon_greedy", "evolution"])]
    pub candidates: Option<u16>,
    /// What the chosen image is the best in [default: references where there are some, else denoising-loss]
    #[arg(long, value_enum, value_name = "SCORE")]
    pub by: Option<By>,
    #[command(flatten)]
    pub references: ReferenceFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Error of the model in predicting the noise in its own image: any model, 8 UNet forwards
    #[value(alias = "elbo")]
    DenoisingLoss,
    /// Minus the exact log-density of what a `shapes` image shows
    Rarity,
    /// Fraction of the prompt's attributes that a `shapes` image shows
    Agreement,
    /// Likeness to --references, by SeedSelect's loss of the final image
    References,
}

/// Candidates of a comparison that does not say how many.
const CANDIDATES: u16 = 4;

impl CommonFlags {
    fn method(&self, context: &Context<'_>, search: Search, n: Option<u16>) -> Result<Box<dyn ImageMethod>> {
        search.check()?;
        let n = n.or(self.candidates).unwrap_or(CANDIDATES).into();
        Ok(Box::new(Searched { search, n, by: self.criterion(context)? }))
    }

    fn criterion(&self, context: &Context<'_>) -> Result<Box<dyn Criterion>> {
        let usual = if self.references.is_empty() { By::DenoisingLoss } else { By::References };
        let by = self.by.unwrap_or(usual);
        if by != By::References && !self.references.is_empty() && !context.several {
            return Err(Error::Usage("--references: --by chooses by something else; leave one of them out".into()));
        }
        Ok(match by {
            By::DenoisingLoss => Box::new(Score::DenoisingLoss),
            By::Rarity => Box::new(Score::Rarity),
            By::Agreement => Box::new(Score::Agreement),
            By::References => Box::new(Likeness::new(self.references.read("--by references")?, context.seed)),
        })
    }
}

/// Of the searches that move.
#[derive(Args)]
pub struct StepFlags {
    /// Searches: how far a candidate is from what it comes from, above 0 (nowhere) to 1 (a fresh noise)
    #[arg(
        long,
        value_name = "S",
        value_parser = values::fraction,
        allow_negative_numbers = true,
        default_value_t = ZeroOrder::default().step
    )]
    pub search_step: f64,
}

/// Of the searches around a pivot.
#[derive(Args)]
pub struct NeighbourFlags {
    /// Zero-order and ε-greedy search: candidates around a noise before the best of them takes its place
    #[arg(
        long,
        value_name = "N",
        value_parser = values::count,
        allow_negative_numbers = true,
        default_value_t = ZeroOrder::default().neighbours
    )]
    pub search_neighbours: usize,
}

#[derive(Args)]
pub struct BestOfFlags {
    /// Keep the best of N images, each from a seed of its own (SEED * N + 0, 1, ...)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub best_of: Option<u16>,
    #[command(flatten)]
    pub common: CommonFlags,
}

impl MethodFlags for BestOfFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.common.references.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        self.common.method(context, Search::BestOf, self.best_of)
    }
}

#[derive(Args)]
pub struct ZeroOrderFlags {
    /// Zero-order search (Ma et al. 2025) for the starting noise: N candidates, the image's own and neighbours of the best so far
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub zero_order: Option<u16>,
    #[command(flatten)]
    pub common: CommonFlags,
    #[command(flatten)]
    pub around: NeighbourFlags,
    #[command(flatten)]
    pub step: StepFlags,
}

impl MethodFlags for ZeroOrderFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.common.references.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let options = ZeroOrder { neighbours: self.around.search_neighbours, step: self.step.search_step };
        self.common.method(context, Search::ZeroOrder(options), self.zero_order)
    }
}

#[derive(Args)]
pub struct EpsilonGreedyFlags {
    /// ε-greedy search (Ramesh & Mardani 2025) for the starting noise: the same with fresh noises among the N
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub epsilon_greedy: Option<u16>,
    #[command(flatten)]
    pub common: CommonFlags,
    #[command(flatten)]
    pub around: NeighbourFlags,
    #[command(flatten)]
    pub step: StepFlags,
    /// ε-greedy search: probability of a fresh noise
    #[arg(
        long,
        value_name = "P",
        value_parser = values::fraction,
        allow_negative_numbers = true,
        default_value_t = EpsilonGreedy::default().epsilon
    )]
    pub search_epsilon: f64,
}

impl MethodFlags for EpsilonGreedyFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.common.references.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let (neighbours, step) = (self.around.search_neighbours, self.step.search_step);
        let options = EpsilonGreedy { neighbours, step, epsilon: self.search_epsilon };
        self.common.method(context, Search::EpsilonGreedy(options), self.epsilon_greedy)
    }
}

#[derive(Args)]
pub struct EvolutionFlags {
    /// Evolutionary search for the starting noise: N candidates in generations, the image's own in the first
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub evolution: Option<u16>,
    #[command(flatten)]
    pub common: CommonFlags,
    #[command(flatten)]
    pub step: StepFlags,
    /// Evolution: candidates of a generation, the elites among them
    #[arg(
        long,
        value_name = "N",
        value_parser = values::count,
        allow_negative_numbers = true,
        default_value_t = Evolution::default().population
    )]
    pub search_population: usize,
    /// Evolution: the best so far, which stay and have the children
    #[arg(
        long,
        value_name = "N",
        value_parser = values::count,
        allow_negative_numbers = true,
        default_value_t = Evolution::default().elites
    )]
    pub search_elites: usize,
    /// Evolution: probability that a child has two parents
    #[arg(
        long,
        value_name = "P",
        value_parser = values::fraction,
        allow_negative_numbers = true,
        default_value_t = Evolution::default().crossover
    )]
    pub search_crossover: f64,
}

impl MethodFlags for EvolutionFlags {
    fn inputs(&self, paths: &mut Paths) {
        self.common.references.inputs(paths);
    }

    fn method(&self, context: &Context<'_>) -> Result<Box<dyn ImageMethod>> {
        let options = Evolution {
            population: self.search_population,
            elites: self.search_elites,
            crossover: self.search_crossover,
            step: self.step.search_step,
        };
        self.common.method(context, Search::Evolution(options), self.evolution)
    }
}
