"""Checks of the world and the training loop: `python -m unittest discover -s tools/shapes` (a minute)."""

import argparse
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

import captions
import render
import tokenizer
import train_policy
import trainer
import world


class World(unittest.TestCase):
    def test_density_is_a_distribution(self):
        whole = world.Conditional({})
        self.assertAlmostEqual(whole.total, 1, places=5)
        cells = world.sample(np.random.default_rng(0), 200_000)
        log_p = world.log_density(cells)
        self.assertTrue(np.isfinite(log_p).all())
        # Four standard errors of the mean.
        self.assertLess(abs(log_p.mean() - whole.mean_log_density()), 4 * log_p.std() / len(log_p) ** 0.5)
        self.assertAlmostEqual((log_p < whole.quantile(0.1)).mean(), 0.1, delta=0.005)

    def test_conditional_matches_rejection(self):
        stated = {"bg": world.value("bg", "dark blue"), "texture": world.value("texture", "striped")}
        cells = world.sample(np.random.default_rng(1), 400_000)
        kept = cells[np.all([cells[:, world.column(k)] == v for k, v in stated.items()], 0)]
        exact = world.Conditional(stated)
        self.assertAlmostEqual(exact.total, len(kept) / len(cells), delta=0.001)
        drawn = exact.sample(np.random.default_rng(7), 20_000)
        self.assertTrue(all((drawn[:, world.column(k)] == v).all() for k, v in stated.items()))
        for name in ("shape", "colour", "tilt"):
            for cells in (kept, drawn):
                share = np.bincount(cells[:, world.column(name)], minlength=len(exact.marginal(name))) / len(cells)
                self.assertLess(np.abs(share - exact.marginal(name)).max(), 0.02)

    def test_impossible_is_said(self):
        with self.assertRaises(world.Impossible):
            world.Conditional({"shape": world.value("shape", "spiral"), "texture": world.value("texture", "dotted")})

    def test_uniform_sampling_is_possible_and_balanced(self):
        cells = world.sample(np.random.default_rng(2), 50_000, uniform=True)
        self.assertTrue(np.isfinite(world.log_density(cells)).all())
        self.assertLess(np.abs(np.bincount(cells[:, 0]) / len(cells) - 1 / 12).max(), 0.01)

    def test_every_attribute_changes_the_picture(self):
        draw = np.random.default_rng(3)
        cells = world.sample(draw, 300, uniform=True)
        nuisances = render.sample_nuisances(draw, len(cells))
        images = render.render(cells, nuisances).astype(int)
        for i, attribute in enumerate(world.ATTRIBUTES):
            other = cells.copy()
            other[:, i] = (other[:, i] + 1) % len(attribute.values)
            possible = np.isfinite(world.log_density(other))
            change = np.abs(render.render(other[possible], nuisances[possible]) - images[possible]).sum((1, 2, 3))
            self.assertGreater(change.min(), 500, attribute.name)


class Captions(unittest.TestCase):
    def test_parse_reads_what_was_written(self):
        draw = np.random.default_rng(4)
        for cell in world.sample(draw, 3000, uniform=True):
            mentioned = captions.mention(draw)
            stated = captions.parse(captions.write(cell, mentioned, draw))
            self.assertEqual(stated, {name: int(cell[world.column(name)]) for name in mentioned})

    def test_every_phrase_is_read_as_its_value(self):
        for name, values in captions.LEXICON.items():
            for v, options in enumerate(values):
                self.assertAlmostEqual(sum(p for _, p in options), 1)
                for phrase, _ in options:
                    caption = captions.compose({"shape": "circle"} | {name: phrase})
                    self.assertEqual(captions.parse(caption)[name], v, caption)

    def test_other_sentences_are_refused(self):
        for text in ("", "a", "red circle", "a red", "a circle circle", "a circle on the moon", "a red blue circle", "a circle on a white", "a white background"):
            with self.assertRaises(captions.NotACaption, msg=text):
                captions.parse(text)

    def test_details_keep_what_was_stated(self):
        for before, after in zip(*train_policy.pairs(np.random.default_rng(5), 500)):
            stated, more = captions.parse(before), captions.parse(after)
            self.assertEqual(stated, {k: more[k] for k in stated})

    def test_every_word_is_one_token(self):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.write(Path(folder))
            ours, theirs = tokenizer.WordEncoder(Path(folder)), CLIPTokenizer.from_pretrained(folder)
            draw = np.random.default_rng(6)
            texts = [captions.write(c, captions.mention(draw), draw) for c in world.sample(draw, 200)] + [""]
            texts += [phrase for values in captions.LEXICON.values() for options in values for phrase, _ in options]
            expected = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
            np.testing.assert_array_equal(ours(texts), expected)


def _toy(args):
    """A small regression through the real loop."""
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 1)

    def loss(draw):
        x = torch.from_numpy(draw.rng.standard_normal((draw.batch, 4))).float() + 0.1 * torch.randn(draw.batch, 4)
        if draw.step == args.stop:
            raise KeyboardInterrupt
        return (network(x) - x.sum(1, keepdim=True)).square().mean(), {}

    trainer.train(trainer.Recipe("toy", steps=30, batch=8, learning_rate=0.1, seed=1, ema=0.9), network, loss, args)
    if trainer.rank() == 0:
        torch.save(network.state_dict(), args.work / "out.pt")


class Resume(unittest.TestCase):
    def run_toy(self, work, processes, stop=None):
        args = argparse.Namespace(work=Path(work), device="cpu", processes=processes, batch=None, steps=None, stop=stop)
        trainer.launch(_toy, args)
        return torch.load(Path(work) / "out.pt", weights_only=True)

    def test_a_cut_run_ends_in_the_same_weights(self):
        seconds, trainer.CHECKPOINT_SECONDS = trainer.CHECKPOINT_SECONDS, 0
        try:
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
                whole = self.run_toy(one, 1)
                with self.assertRaises(KeyboardInterrupt):
                    self.run_toy(two, 1, stop=17)
                resumed = self.run_toy(two, 1)
            for name in whole:
                self.assertTrue(torch.equal(whole[name], resumed[name]), name)
        finally:
            trainer.CHECKPOINT_SECONDS = seconds

    def test_two_processes_agree(self):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            first, second = self.run_toy(one, 2), self.run_toy(two, 2)
        for name in first:
            self.assertTrue(torch.equal(first[name], second[name]), name)


if __name__ == "__main__":
    unittest.main()
