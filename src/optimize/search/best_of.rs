//! Best of n: the search that draws every candidate without a look at the others.

use super::{Best, Budget, Evaluate, Strategy, search};
use crate::Result;

/// The best of as many candidates per image as the budget pays for; of equal ones the first. `draw(image, index)` is candidate `index`
/// of an image. A score that is no number is an error.
pub fn best_of<E: Evaluate>(
    images: usize,
    budget: Budget,
    draw: impl Fn(usize, usize) -> E::Candidate,
    evaluation: &mut E,
) -> Result<Vec<Best<E::Candidate, E::Outcome>>> {
    let each = |_| Box::new(EveryDraw) as Box<dyn Strategy<E::Candidate>>;
    search((0..images).map(each).collect(), budget, draw, evaluation)
}

/// Takes every draw as it comes.
pub(super) struct EveryDraw;

impl<C> Strategy<C> for EveryDraw {
    fn next(&mut self, draw: C) -> C {
        draw
    }

    fn scored(&mut self, _candidate: &C, _score: f64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates are numbers, scored by a function of image and number; an evaluation costs 10 forwards.
    struct Made<F> {
        score: F,
        seen: Vec<Vec<u64>>,
    }

    impl<F: Fn(usize, u64) -> f64> Evaluate for Made<F> {
        type Candidate = u64;
        type Outcome = String;

        fn forwards(&self) -> usize {
            10
        }

        fn evaluate(&mut self, candidates: &[u64]) -> Result<Vec<(f64, String)>> {
            self.seen.push(candidates.to_vec());
            let made = |(image, x): (usize, &u64)| ((self.score)(image, *x), format!("made of {x}"));
            Ok(candidates.iter().enumerate().map(made).collect())
        }
    }

    type Found = Result<Vec<Best<u64, String>>>;

    /// What is found, and the candidates of every evaluation.
    fn search(images: usize, forwards: usize, score: impl Fn(usize, u64) -> f64) -> (Found, Vec<Vec<u64>>) {
        let mut made = Made { score, seen: vec![] };
        let found = best_of(images, Budget { forwards }, |image, index| (100 * image + index) as u64, &mut made);
        (found, made.seen)
    }

    #[test]
    fn the_best_of_each_image_within_the_budget() {
        // Image 0 is best at 3, image 1 at 101, whatever the other has.
        let score = |image: usize, x: u64| -(x as f64 - [3.0, 101.0][image]).powi(2);
        let (found, seen) = search(2, 59, score);
        let best = |candidate, index, score| Best { candidate, index, score, outcome: format!("made of {candidate}") };
        assert_eq!(found.unwrap(), [best(3, 3, 0.0), best(101, 1, 0.0)]);
        assert_eq!(seen, [[0, 100], [1, 101], [2, 102], [3, 103], [4, 104]], "59 forwards pay for five evaluations");
        let (alone, _) = search(1, 59, score);
        assert_eq!(alone.unwrap(), [best(3, 3, 0.0)]);
        let (short, _) = search(2, 30, score);
        assert_eq!(short.unwrap(), [best(2, 2, -1.0), best(101, 1, 0.0)]);
    }

    #[test]
    fn of_equal_ones_the_first() {
        let (found, _) = search(1, 40, |_, x| if x == 0 { f64::NEG_INFINITY } else { f64::INFINITY });
        assert_eq!(found.unwrap()[0].index, 1);
        let (found, _) = search(1, 40, |_, _| f64::NEG_INFINITY);
        assert_eq!(found.unwrap()[0].index, 0);
    }

    #[test]
    fn what_cannot_be_searched() {
        for first in [0, 2] {
            let (found, seen) = search(2, 40, |image, x| if (image, x) == (1, 100 + first) { f64::NAN } else { 1.0 });
            let message = found.unwrap_err().to_string();
            assert!(message.contains(&format!("candidate {first} of image 1")), "{message}");
            assert_eq!(seen.len() as u64, first + 1, "nothing is evaluated after it");
        }
        let (found, seen) = search(1, 9, |_, _| 1.0);
        let message = found.unwrap_err().to_string();
        assert!(message.contains("9 UNet forwards") && message.contains("takes 10") && seen.is_empty(), "{message}");
        assert!(Budget { forwards: 9 }.evaluations(0).is_err());
    }
}
