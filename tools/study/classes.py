"""Captions as the classes of a classifier: no scene fits two of them, and no class is met twice."""

import functools
import json
import sys

import numpy as np

import seedselect
from measure import captions, world


stated = functools.cache(captions.parse)


def conflict(a: str, b: str) -> bool:
    """Whether no scene fits both captions: they state different values of an attribute."""
    a, b = stated(a), stated(b)
    return any(a[name] != b[name] for name in a.keys() & b.keys())


def take(pool: list[str], count: int, beside: list[str]) -> list[str]:
    """The first captions of the pool that conflict with each other and with all `beside`, at most `count`; they leave the pool."""
    found = []
    for caption in pool:
        if len(found) < count and all(conflict(caption, other) for other in [*beside, *found]):
            found.append(caption)
    pool[:] = [caption for caption in pool if caption not in found]
    return found


def natural(count: int) -> list[str]:
    """Captions as the world makes them; the model draws 98.6 % of such right at guidance 4 (`tools/shapes/results/fidelity.json`)."""
    rng = np.random.default_rng(20261130)
    return [captions.write(world.sample(rng, 1)[0], captions.mention(rng), rng) for _ in range(count)]


def halves(pool: list[str]) -> tuple[list[str], list[str]]:
    """The hard concepts that the model draws right more often, and the others, both in the pool's order."""
    success = json.loads((seedselect.SHAPES / "results/hard.json").read_text())["prompts"]
    easier = sorted(pool, key=success.get)[len(pool) // 2 :]
    return [c for c in pool if c in easier], [c for c in pool if c not in easier]


def choose(pools: list[list[str]], each: int, episodes: int) -> list[list[str]]:
    """The classes of every episode, `each` from every pool. More episodes begin with the same ones."""
    found = []
    for episode in range(episodes):
        classes = []
        for pool in pools:
            classes += take(pool, each, classes)
        if len(classes) < each * len(pools):
            sys.exit(f"--episodes {episodes}: there are concepts for {episode}")
        found.append(classes)
    return found
