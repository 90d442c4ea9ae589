"""Bins of real images, and whether other images fall into them as often: k-means, NDB, entropy."""

import numpy as np

# 95 % of a normal distribution, both sides.
Z = 1.959964


def reduce(images: np.ndarray, side: int = 16) -> np.ndarray:
    """`[n, h, w, 3]` of bytes -> `[n, side * side * 3]` in [0, 1]: means of squares of pixels."""
    n, height, width, channels = images.shape
    squares = images.reshape(n, side, height // side, side, width // side, channels)
    return (squares.mean((2, 4)) / 255).reshape(n, -1)


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The bin of every point."""
    return (np.square(centres).sum(1) - 2 * points @ centres.T).argmin(1)


def k_means(points: np.ndarray, count: int, rng: np.random.Generator, rounds: int = 100) -> np.ndarray:
    """`count` centres by Lloyd's rounds, from the start of k-means++ (Arthur and Vassilvitskii 2007)."""
    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < count:
        squared = np.square(points - centres[nearest(points, centres)]).sum(1)
        centres = np.concatenate([centres, points[rng.choice(len(points), size=1, p=squared / squared.sum())]])
    for _ in range(rounds):
        of = nearest(points, centres)
        # A centre that no point is nearest to stays where it is.
        moved = np.stack([points[of == k].mean(0) if (of == k).any() else centre for k, centre in enumerate(centres)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def different(counts: np.ndarray, reference: np.ndarray) -> int:
    """NDB (Richardson and Weiss 2018): the number of bins whose two shares differ by the two-proportion z-test at 0.05."""
    n, m = counts.sum(), reference.sum()
    together = (counts + reference) / (n + m)
    error = np.sqrt(together * (1 - together) * (1 / n + 1 / m))
    return int((np.abs(counts / n - reference / m) > Z * error).sum())


def entropy(counts: np.ndarray) -> float:
    """Of the shares, bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
