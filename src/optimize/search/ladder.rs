//! The gradient-free ladder: the searches by name, with their options.

pub use super::evolution::Evolution;
pub use super::walk::{EpsilonGreedy, ZeroOrder};

use super::best_of::EveryDraw;
use super::evolution::Generations;
use super::mix::Mix;
use super::walk::Walk;
use super::{Best, Budget, Evaluate, Strategy, search};
use crate::Result;
use serde_json::{Map, Value, json};

/// Which search. Its options do not depend on the size of the variable: a step is a share of a candidate, not a length.
///
/// The defaults are ours, for 16 to 96 evaluations: chosen on linear, smooth and rough random functions of 256 standard normal numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Search {
    /// Independent draws.
    BestOf,
    ZeroOrder(ZeroOrder),
    EpsilonGreedy(EpsilonGreedy),
    Evolution(Evolution),
}

impl Search {
    pub fn name(&self) -> &'static str {
        match self {
            Search::BestOf => "best-of",
            Search::ZeroOrder(_) => "zero-order",
            Search::EpsilonGreedy(_) => "epsilon-greedy",
            Search::Evolution(_) => "evolution",
        }
    }

    /// Everything of the search that decides its candidates, but for seed and budget.
    pub fn options(&self) -> Map<String, Value> {
        let options = match self {
            Search::BestOf => json!({}),
            Search::ZeroOrder(options) => json!(options),
            Search::EpsilonGreedy(options) => json!(options),
            Search::Evolution(options) => json!(options),
        };
        options.as_object().cloned().unwrap_or_default()
    }

    /// `Error::Usage` where the options make no search.
    pub fn check(&self) -> Result<()> {
        match self {
            Search::BestOf => Ok(()),
            Search::ZeroOrder(options) => options.walk().check(),
            Search::EpsilonGreedy(options) => options.check(),
            Search::Evolution(options) => options.check(),
        }
    }

    /// The best candidate of each image within the budget, of equal ones the first; `seeds`, one per image, decide what is chosen at
    /// random. `draw(image, index)` is a fresh candidate, independent of all others; the first that is evaluated is `draw(image, 0)`,
    /// so that no search finds less than it. An image's candidates depend on its own draws, seed and scores alone.
    ///
    /// Errors are those of [`Search::check`] and of [`super::best_of::best_of`].
    pub fn run<E>(
        &self,
        seeds: &[u64],
        budget: Budget,
        draw: impl Fn(usize, usize) -> E::Candidate,
        evaluation: &mut E,
    ) -> Result<Vec<Best<E::Candidate, E::Outcome>>>
    where
        E: Evaluate<Candidate: Mix + 'static>,
    {
        self.check()?;
        let strategy = |&seed: &u64| -> Box<dyn Strategy<E::Candidate>> {
            match *self {
                Search::BestOf => Box::new(EveryDraw),
                Search::ZeroOrder(options) => Box::new(Walk::new(options.walk(), seed)),
                Search::EpsilonGreedy(options) => Box::new(Walk::new(options, seed)),
                Search::Evolution(options) => Box::new(Generations::new(options, seed)),
            }
        };
        search(seeds.iter().map(strategy).collect(), budget, draw, evaluation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::normal;

    const SIZE: usize = 64;

    fn noise(seed: u64, draw: u64) -> Vec<f32> {
        let mut noise = vec![0.0; SIZE];
        normal(seed, draw, &mut noise);
        noise
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    fn ladder() -> [Search; 4] {
        let (zero_order, epsilon_greedy) = (ZeroOrder::default(), EpsilonGreedy::default());
        let evolution = Search::Evolution(Evolution::default());
        [Search::BestOf, Search::ZeroOrder(zero_order), Search::EpsilonGreedy(epsilon_greedy), evolution]
    }

    /// Noises scored by a function of the image's seed, the noise and its number; an evaluation costs 10 forwards.
    struct Made<'a, F> {
        seeds: &'a [u64],
        score: F,
        seen: Vec<Vec<Vec<f32>>>,
    }

    impl<F: FnMut(u64, &[f32], usize) -> f64> Evaluate for Made<'_, F> {
        type Candidate = Vec<f32>;
        type Outcome = usize;

        fn forwards(&self) -> usize {
            10
        }

        fn evaluate(&mut self, candidates: &[Vec<f32>]) -> Result<Vec<(f64, usize)>> {
            let index = self.seen.len();
            self.seen.push(candidates.to_vec());
            let of_images = self.seeds.iter().zip(candidates);
            Ok(of_images.map(|(seed, noise)| ((self.score)(*seed, noise, index), index)).collect())
        }
    }

    type Found = Result<Vec<Best<Vec<f32>, usize>>>;

    /// What is found for images of these seeds, and the candidates of every evaluation.
    fn run(
        search: Search,
        seeds: &[u64],
        forwards: usize,
        score: impl FnMut(u64, &[f32], usize) -> f64,
    ) -> (Found, Vec<Vec<Vec<f32>>>) {
        let mut made = Made { seeds, score, seen: vec![] };
        let draw = |image: usize, index: usize| noise(seeds[image], index as u64);
        let found = search.run(seeds, Budget { forwards }, draw, &mut made);
        (found, made.seen)
    }

    /// Minus the squared distance on the unit sphere to a point, a different one for every image.
    fn bowl(seed: u64, x: &[f32]) -> f64 {
        let target = noise(seed, 1 << 40);
        2.0 * dot(x, &target) / (dot(x, x) * dot(&target, &target)).sqrt() - 2.0
    }

    /// The mean of what is found for 32 images.
    fn mean(search: Search, evaluations: usize, score: impl Fn(u64, &[f32]) -> f64) -> f64 {
        let seeds: Vec<u64> = (100..132).collect();
        let (found, _) = run(search, &seeds, 10 * evaluations, |seed, x, _| score(seed, x));
        found.unwrap().iter().map(|best| best.score).sum::<f64>() / seeds.len() as f64
    }

    #[test]
    fn what_a_smooth_landscape_is_worth() {
        let [best_of, others @ ..] = ladder();
        for evaluations in [24, 96] {
            let independent = mean(best_of, evaluations, bowl);
            for search in others {
                let found = mean(search, evaluations, bowl);
                println!("{evaluations} evaluations: {} {found:.3}, best of {independent:.3}", search.name());
                assert!(found > independent + 0.05, "{search:?}, {evaluations}: {found} against {independent}");
            }
        }
    }

    /// Where a score says nothing until it is found, what stays near its draws finds no more than independent ones.
    #[test]
    fn what_a_needle_is_worth() {
        let needle = |_: u64, x: &[f32]| f64::from(dot(x, &noise(7, 1 << 40)) > 2.0 * (SIZE as f64).sqrt());
        let [best_of, others @ ..] = ladder();
        let independent = mean(best_of, 48, needle);
        assert!((0.3..1.0).contains(&independent), "a needle that is found now and then: {independent}");
        for search in others {
            let found = mean(search, 48, needle);
            assert!(found <= independent, "{search:?}: {found} against {independent}");
        }
    }

    #[test]
    fn the_first_candidate_is_the_first_draw_and_nothing_found_is_worse() {
        for search in ladder() {
            let (found, seen) = run(search, &[3, 4], 10 * 40, |seed, x, _| bowl(seed, x));
            let found = found.unwrap();
            for (image, seed) in [3, 4].into_iter().enumerate() {
                assert_eq!(seen[0][image], noise(seed, 0));
                let scores: Vec<f64> = seen.iter().map(|candidates| bowl(seed, &candidates[image])).collect();
                let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let first = scores.iter().position(|score| *score == best).unwrap();
                let of = &found[image];
                assert_eq!((of.score, of.index, of.outcome), (best, first, first), "{search:?}");
                assert_eq!(of.candidate, seen[first][image]);
            }
            // The score of the first draw is the best there is.
            let (found, _) = run(search, &[3], 10 * 20, |_, _, index| -(index as f64));
            assert_eq!((found.as_ref().unwrap()[0].index, &found.unwrap()[0].candidate), (0, &noise(3, 0)));
        }
    }

    #[test]
    fn no_more_than_the_budget_and_nothing_twice() {
        for search in ladder() {
            for (forwards, evaluations) in [(10, 1), (19, 1), (20, 2), (99, 9), (409, 40)] {
                let (found, seen) = run(search, &[3, 4], forwards, |seed, x, _| bowl(seed, x));
                assert!(seen.len() == evaluations && found.is_ok(), "{search:?}: {} of {forwards}", seen.len());
                for image in 0..2 {
                    let mut all: Vec<Vec<u32>> =
                        seen.iter().map(|c| c[image].iter().map(|x| x.to_bits()).collect()).collect();
                    all.sort();
                    all.dedup();
                    assert_eq!(all.len(), evaluations, "{search:?}: a candidate is evaluated again");
                }
            }
            let (found, seen) = run(search, &[3], 9, |seed, x, _| bowl(seed, x));
            assert!(found.unwrap_err().to_string().contains("takes 10") && seen.is_empty());
        }
    }

    #[test]
    fn images_are_searched_apart_and_the_same_again() {
        for search in ladder() {
            let seen = |seeds: &[u64]| run(search, seeds, 10 * 30, |seed, x, _| bowl(seed, x)).1;
            let (together, others) = (seen(&[3, 4]), seen(&[9, 3, 5]));
            for index in 0..30 {
                assert_eq!(together[index][0], others[index][1], "{search:?}, candidate {index}");
                assert_eq!(together[index][1], seen(&[4])[index][0], "{search:?}, candidate {index}");
            }
            assert_eq!(together, seen(&[3, 4]));
        }
    }

    #[test]
    fn candidates_keep_unit_variance() {
        for search in ladder() {
            let (_, seen) = run(search, &[1, 2, 3, 4], 10 * 100, |seed, x, _| bowl(seed, x));
            for image in 0..4 {
                let late = &seen[80..];
                let all: f64 = late.iter().map(|candidates| dot(&candidates[image], &candidates[image])).sum();
                let variance = all / (late.len() * SIZE) as f64;
                // Of 64 numbers, whose own variance is 1 within 0.18.
                assert!((variance - 1.0).abs() < 0.4, "{search:?}: {variance}");
            }
        }
    }

    /// A search that selects for length gets no longer than what it draws.
    #[test]
    fn no_score_makes_noise_louder() {
        for search in ladder() {
            let (found, seen) = run(search, &[1], 10 * 200, |_, x, _| dot(x, x));
            let longest = (0..200).map(|index| dot(&noise(1, index), &noise(1, index))).fold(0.0, f64::max);
            assert!(found.unwrap()[0].score <= longest * (1.0 + 1e-6), "{search:?}");
            assert_eq!(seen.len(), 200);
        }
    }

    #[test]
    fn a_walk_steps_from_its_pivot() {
        let step = 0.3;
        let search = Search::ZeroOrder(ZeroOrder { neighbours: 3, step });
        // The second of the first round is the best, then nothing is better.
        let score = |_: u64, _: &[f32], index: usize| [1.0, 0.0, 2.0][index.min(2)] - if index > 2 { 3.0 } else { 0.0 };
        let (_, seen) = run(search, &[5], 10 * 10, score);
        for (index, candidates) in seen.iter().enumerate().skip(1) {
            let pivot = if index <= 3 { &seen[0][0] } else { &seen[2][0] };
            assert_eq!(candidates[0], pivot.mix(&noise(5, index as u64), step), "candidate {index}");
        }
        // Fresh draws always or never.
        let greedy = |epsilon: f64| {
            let search = Search::EpsilonGreedy(EpsilonGreedy { neighbours: 3, step, epsilon });
            run(search, &[5], 10 * 10, score).1
        };
        assert_eq!(greedy(0.0), seen);
        assert!(greedy(1.0).iter().enumerate().all(|(index, candidates)| candidates[0] == noise(5, index as u64)));
        let fresh = greedy(0.4).iter().enumerate().filter(|(index, c)| c[0] == noise(5, *index as u64)).count();
        assert!((2..9).contains(&fresh), "{fresh} of 10");
    }

    #[test]
    fn evolution_breeds_from_its_elites() {
        let options = Evolution { population: 5, elites: 2, crossover: 0.0, step: 0.4 };
        // The third and the fifth of the first generation are the elites of all that follow.
        let score = |_: u64, _: &[f32], index: usize| [0.0, 0.0, 9.0, 0.0, 8.0][index.min(4)] * f64::from(index < 5);
        let children = |options: Evolution| run(Search::Evolution(options), &[5], 10 * 17, score).1;
        let seen = children(options);
        assert!((0..5).all(|index| seen[index][0] == noise(5, index as u64)));
        let of = |parent: &Vec<f32>| (5..17).filter(|i| seen[*i][0] == parent.mix(&noise(5, *i as u64), 0.4)).count();
        let (first, second) = (of(&seen[2][0]), of(&seen[4][0]));
        assert!(first + second == 12 && first > 1 && second > 1, "{first} and {second} of twelve");
        let crossed = children(Evolution { crossover: 1.0, ..options });
        let equal = 0.5f64.sqrt();
        let (one, other) = (seen[2][0].mix(&seen[4][0], equal), seen[4][0].mix(&seen[2][0], equal));
        for (index, candidates) in crossed.iter().enumerate().skip(5) {
            let from = |parent: &Vec<f32>| candidates[0] == parent.mix(&noise(5, index as u64), 0.4);
            assert!(from(&one) || from(&other), "child {index}");
        }
        // One elite has nobody to cross with.
        let alone = children(Evolution { elites: 1, crossover: 1.0, ..options });
        assert!((5..17).all(|index| alone[index][0] == seen[2][0].mix(&noise(5, index as u64), 0.4)));
    }

    #[test]
    fn infinite_scores() {
        for search in ladder() {
            let (found, _) =
                run(search, &[1], 10 * 30, |_, _, index| [f64::NEG_INFINITY, f64::INFINITY][usize::from(index == 12)]);
            assert_eq!(found.unwrap()[0].index, 12, "{search:?}");
            let (found, _) = run(search, &[1], 10 * 30, |_, _, _| f64::NEG_INFINITY);
            assert_eq!(found.unwrap()[0].index, 0, "{search:?}: of equal ones the first");
        }
    }

    #[test]
    fn a_score_that_is_no_number() {
        for search in ladder() {
            for bad in [0, 11] {
                let score = |seed, _: &[f32], index| if (seed, index) == (8, bad) { f64::NAN } else { 1.0 };
                let (found, seen) = run(search, &[1, 8], 10 * 30, score);
                let message = found.unwrap_err().to_string();
                assert!(message.contains(&format!("candidate {bad} of image 1")), "{message}");
                assert_eq!(seen.len(), bad + 1, "nothing is evaluated after it");
            }
        }
    }

    #[test]
    fn options_that_make_no_search() {
        let refuses = |search: Search, words: &str| {
            let message = run(search, &[1], 100, |_, _, _| 0.0).0.unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        };
        let zero_order = ZeroOrder::default();
        refuses(Search::ZeroOrder(ZeroOrder { neighbours: 0, ..zero_order }), "0 neighbours");
        for step in [0.0, 1.5, f64::NAN] {
            refuses(Search::ZeroOrder(ZeroOrder { step, ..zero_order }), &format!("step of {step}"));
            refuses(Search::Evolution(Evolution { step, ..Evolution::default() }), &format!("step of {step}"));
        }
        refuses(Search::EpsilonGreedy(EpsilonGreedy { epsilon: -0.1, ..EpsilonGreedy::default() }), "probability -0.1");
        let evolution = |population, elites, crossover| Evolution { population, elites, crossover, step: 0.4 };
        refuses(Search::Evolution(evolution(4, 4, 0.5)), "4 elites in a population of 4");
        refuses(Search::Evolution(evolution(4, 0, 0.5)), "0 elites");
        refuses(Search::Evolution(evolution(4, 2, 1.1)), "probability 1.1");
    }

    #[test]
    fn options_are_recorded() {
        let recorded = ladder().map(|search| json!(search.options()));
        assert_eq!(recorded[0], json!({}));
        assert_eq!(recorded[1], json!({"neighbours": 2, "step": 0.4}));
        assert_eq!(recorded[2], json!({"neighbours": 2, "step": 0.4, "epsilon": 0.2}));
        assert_eq!(recorded[3], json!({"population": 8, "elites": 2, "crossover": 0.5, "step": 0.4}));
        assert_eq!(ladder().map(|s| s.name()), ["best-of", "zero-order", "epsilon-greedy", "evolution"]);
    }
}
