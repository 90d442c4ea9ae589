"""The parts of `seedselect_uses.py` whose answers are known: `python -m unittest discover -s tools/study` (some seconds)."""

import argparse
import unittest
from pathlib import Path

import numpy as np

import bins
import classes
import classifier
import seedselect
import seedselect_uses
from measure import captions, world


class Bins(unittest.TestCase):
    def test_shares_differ_beyond_the_bound_of_the_test(self):
        # Of 100 each, 50 against 63 is z = 1.85, against 64 z = 2.00.
        self.assertEqual(bins.different(np.array([50, 50]), np.array([63, 37])), 0)
        self.assertEqual(bins.different(np.array([50, 50]), np.array([64, 36])), 2)
        # The same shares of other totals; a bin that is empty in both.
        self.assertEqual(bins.different(np.array([5, 5, 0]), np.array([1000, 1000, 0])), 0)
        self.assertEqual(bins.different(np.array([10, 0, 0]), np.array([1000, 500, 500])), 1)

    def test_one_bin_in_twenty_differs_by_chance(self):
        rng = np.random.default_rng(0)
        found = [bins.different(rng.multinomial(500, [0.25] * 4), rng.multinomial(500, [0.25] * 4)) / 4 for _ in range(2000)]
        self.assertAlmostEqual(np.mean(found), 0.05, delta=0.01)

    def test_entropy_of_known_shares(self):
        for of, expected in (([3, 3, 3, 3], 2), ([7, 0], 0), ([2, 1, 1, 0], 1.5)):
            self.assertAlmostEqual(bins.entropy(np.array(of)), expected)

    def test_groups_far_apart_are_found(self):
        rng = np.random.default_rng(1)
        middles = np.array([[0, 0], [0, 9], [9, 0], [9, 9]])
        points = np.repeat(middles, 50, 0) + rng.normal(size=(200, 2))
        found = bins.nearest(points, bins.k_means(points, 4, rng)).reshape(4, 50)
        self.assertTrue((found == found[:, :1]).all())
        self.assertEqual(len(set(found[:, 0])), 4)

    def test_pixels_are_averaged_in_squares(self):
        image = np.zeros((1, 4, 4, 3), np.uint8)
        image[0, :2, 2:, 1] = 255
        image[0, 3, 0, 0] = 255
        expected = np.zeros((2, 2, 3))
        expected[0, 1, 1], expected[1, 0, 0] = 1, 0.25
        np.testing.assert_allclose(bins.reduce(image, side=2), expected.reshape(1, -1))


class Classes(unittest.TestCase):
    def test_captions_conflict_where_both_state_an_attribute_and_differ(self):
        self.assertTrue(classes.conflict("a red star", "a blue star"))
        self.assertTrue(classes.conflict("a star on the left", "a large star on the right on a navy background"))
        # What one leaves open, the other may state; a synonym states the same.
        self.assertFalse(classes.conflict("a star", "a blue star"))
        self.assertFalse(classes.conflict("a star on a navy background", "a star on a dark blue background"))
        self.assertFalse(classes.conflict("a large star", "a red star"))

    def test_no_scene_fits_two_captions_that_conflict(self):
        rng = np.random.default_rng(2)
        cells = world.sample(rng, 20_000, uniform=True)
        texts = [captions.write(cell, captions.mention(rng), rng) for cell in cells[:60]]
        fit = np.array([np.all([cells[:, world.column(name)] == v for name, v in captions.parse(text).items()], 0) for text in texts])
        for a, of_a in zip(texts, fit):
            for b, of_b in zip(texts, fit):
                self.assertFalse(classes.conflict(a, b) and (of_a & of_b).any(), f"{a} and {b}")
                self.assertEqual(classes.conflict(a, b), classes.conflict(b, a))

    def test_episodes_share_no_class_and_more_begin_with_the_same(self):
        pool = seedselect.concepts("report")
        chosen = classes.choose([*classes.halves(pool)], 4, 8)
        self.assertEqual(chosen[:3], classes.choose([*classes.halves(pool)], 4, 3))
        self.assertEqual(len({caption for episode in chosen for caption in episode}), 8 * 8)
        for episode in chosen:
            self.assertTrue(all(classes.conflict(a, b) for a in episode for b in episode if a != b))

    def test_too_many_episodes_are_refused(self):
        with self.assertRaisesRegex(SystemExit, "there are concepts for 1"):
            classes.choose([["a red star", "a blue star", "a star", "a green star"]], 2, 2)


class Tasks(unittest.TestCase):
    def args(self, **of) -> argparse.Namespace:
        return argparse.Namespace(**{"set": "report", "episodes": 2, "images": None, "work": Path("work")} | of)

    def test_the_tail_is_filled_up(self):
        name, tasks, _ = seedselect_uses.rows(self.args(), "long-tail")[0]
        self.assertEqual([name, len(tasks)], ["all", 2])
        totals = [a + b for a, b in zip(tasks[0].real, tasks[0].made)]
        self.assertEqual(totals, [40] * 4 + [12] * 8)
        self.assertEqual(seedselect_uses.rows(self.args(images=2), "long-tail")[0][1][0].made, (0,) * 8 + (2,) * 4)

    def test_uses_of_default_size_have_enough_concepts(self):
        for use in seedselect_uses.SIZES:
            chosen = seedselect_uses.episodes(self.args(episodes=None), use)
            numbers = [concept.number for of in chosen for concept in of]
            self.assertEqual(len(chosen), seedselect_uses.SIZES[use][0])
            self.assertEqual(len(numbers), len(set(numbers)))


class Classifier(unittest.TestCase):
    def renders(self, count: int, purpose: str) -> list[np.ndarray]:
        texts = ("a red star on the left", "a red star on the right", "a striped red star on the left")
        concepts = [seedselect_uses.Concept(Path(), text, k) for k, text in enumerate(texts)]
        return [seedselect_uses.renders(concept, count, purpose) for concept in concepts]

    def test_half_of_a_class_is_generated_where_it_has_generated_images(self):
        real, made = np.zeros((3, 2, 2, 3), np.uint8), np.full((9, 2, 2, 3), 255, np.uint8)
        for of, expected in ((made, 0.5), (made[:0], 0)):
            images = classifier.draw(real, of, np.random.default_rng(3))
            self.assertEqual(images.shape, (classifier.PER_CLASS, 2, 2, 3))
            self.assertEqual(images.mean() / 255, expected)

    def test_place_and_pattern_are_learned(self):
        classifier.one_thread()
        none = [np.empty((0, 64, 64, 3), np.uint8)] * 3
        model = classifier.train(self.renders(60, "train"), none, 0)
        found = classifier.accuracy(model, self.renders(40, "test"))
        self.assertGreater(min(found), 0.8, found)


if __name__ == "__main__":
    unittest.main()
