"""The `shapes` world: its attributes, their long-tailed frequencies, exact log-density, sampling, and the aesthetic.

A scene is ten discrete attributes, an `int64` row in the order of `ATTRIBUTES`, and six uniform nuisances (`render.py`). Its density is
a product of ten factors; five of them are conditional on an earlier attribute, so every marginal and posterior is exact by enumeration:

    p(x) = p(shape) p(colour | shape) p(size) p(texture | shape) p(finish) p(position) p(bg | colour) p(bgstyle) p(tilt | shape) p(frame)

A cell of probability 0 is impossible (white on white, a round thing tilted). This file is the only place where the tables stand;
`world.json`, which the Rust side reads, is written from it (`python tools/shapes/world.py FILE`).
"""

import json
import sys
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64


@dataclass(frozen=True)
class Attribute:
    """`p[parent value, value]`; a single row when the attribute has no parent."""

    name: str
    values: tuple[str, ...]
    p: np.ndarray
    given: str | None = None


def _normalised(p) -> np.ndarray:
    p = np.atleast_2d(np.asarray(p, np.float64))
    return p / p.sum(1, keepdims=True)


SHAPES = {
    "circle": 0.236, "square": 0.170, "triangle": 0.135, "star": 0.110, "heart": 0.085, "cross": 0.075, "diamond": 0.060,
    "ring": 0.050, "arrow": 0.0385, "crescent": 0.030, "spiral": 0.006, "star with a hole": 0.0045,
}  # fmt: skip
SHAPE_NAMES = tuple(SHAPES)
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "white", "pink", "cyan", "black")
BACKGROUNDS = ("white", "gray", "dark blue", "black", "beige", "dark green", "brown", "violet")

# The object's and the background's colours, RGB in [0, 1].
COLOUR_RGB = np.array(
    [[214, 40, 40], [40, 80, 220], [40, 160, 70], [245, 205, 40], [240, 130, 30],
     [130, 50, 170], [245, 245, 245], [240, 130, 180], [60, 200, 215], [25, 25, 25]], np.float32) / 255  # fmt: skip
BACKGROUND_RGB = np.array(
    [[240, 240, 240], [128, 128, 132], [25, 35, 90], [15, 15, 18],
     [225, 205, 165], [20, 75, 45], [110, 70, 40], [165, 120, 220]], np.float32) / 255  # fmt: skip


def _colours() -> np.ndarray:
    """35 % for the shape's own colour, the rest by one Zipf-like order with that colour first."""
    zipf = np.array([0.30, 0.22, 0.15, 0.105, 0.075, 0.055, 0.04, 0.028, 0.017, 0.010])
    own = dict(zip(SHAPE_NAMES, "blue red green yellow red white cyan orange red yellow purple yellow".split()))
    p = np.zeros((len(SHAPES), len(COLOURS)))
    for row, shape in enumerate(SHAPE_NAMES):
        head = COLOURS.index(own[shape])
        order = [head] + [c for c in range(len(COLOURS)) if c != head]
        p[row, order] = 0.65 * zipf
        p[row, head] += 0.35
    return p


def _backgrounds() -> np.ndarray:
    p = np.tile([0.36, 0.22, 0.15, 0.10, 0.07, 0.05, 0.03, 0.02], (len(COLOURS), 1))
    for colour, background, factor in (("white", "white", 0), ("black", "black", 0), ("blue", "dark blue", 0.3), ("green", "dark green", 0.3)):
        p[COLOURS.index(colour), BACKGROUNDS.index(background)] *= factor
    return p


def _by_shape(default, **exceptions) -> np.ndarray:
    return np.array([exceptions.get(shape.replace(" ", "_"), default) for shape in SHAPE_NAMES])


ATTRIBUTES = (
    Attribute("shape", SHAPE_NAMES, _normalised(list(SHAPES.values()))),
    Attribute("colour", COLOURS, _normalised(_colours()), "shape"),
    Attribute("size", ("small", "medium", "large"), _normalised([0.22, 0.55, 0.23])),
    # Dots and checks need more room than a thin band or a pierced star leaves: there they do not exist.
    Attribute(
        "texture",
        ("plain", "striped", "dotted", "checkered"),
        _normalised(_by_shape([0.76, 0.14, 0.07, 0.03], crescent=[0.86, 0.06, 0.05, 0.03], spiral=[0.86, 0.14, 0, 0], star_with_a_hole=[0.86, 0.14, 0, 0])),
        "shape",
    ),
    Attribute("finish", ("flat", "shaded", "glossy", "shadowed", "glowing"), _normalised([0.66, 0.15, 0.09, 0.07, 0.03])),
    Attribute("position", ("center", "left", "right", "top", "bottom"), _normalised([0.62, 0.12, 0.12, 0.08, 0.06])),
    Attribute("bg", BACKGROUNDS, _normalised(_backgrounds()), "colour"),
    Attribute("bgstyle", ("flat", "gradient", "vignette", "speckled"), _normalised([0.74, 0.16, 0.07, 0.03])),
    # Half a turn of a square is a square; any turn of a circle is a circle.
    Attribute(
        "tilt",
        ("upright", "tilted", "inverted"),
        _normalised(_by_shape([0.84, 0.12, 0.04], circle=[1, 0, 0], ring=[1, 0, 0], square=[0.88, 0.12, 0], cross=[0.88, 0.12, 0], diamond=[0.88, 0.12, 0])),
        "shape",
    ),
    Attribute("frame", ("none", "framed"), _normalised([0.96, 0.04])),
)
NAMES = tuple(a.name for a in ATTRIBUTES)
SIZES = tuple(len(a.values) for a in ATTRIBUTES)
# No caption ever says how the object is turned or whether the picture has a frame.
UNSPOKEN = ("tilt", "frame")

# Concepts the world holds on purpose, from its head to far in its tail: what a seed or a prompt has to reach.
CONCEPTS = {
    "a circle": {"shape": "circle"},
    "a square": {"shape": "square"},
    "a heart": {"shape": "heart"},
    "a crescent": {"shape": "crescent"},
    "a spiral": {"shape": "spiral"},
    "a star with a hole": {"shape": "star with a hole"},
    "a striped crescent": {"shape": "crescent", "texture": "striped"},
    "a checkered arrow": {"shape": "arrow", "texture": "checkered"},
    "a glowing spiral": {"shape": "spiral", "finish": "glowing"},
    "a striped spiral": {"shape": "spiral", "texture": "striped"},
    "a pink spiral": {"shape": "spiral", "colour": "pink"},
    "a black star with a hole": {"shape": "star with a hole", "colour": "black"},
    "a pink arrow on a violet background": {"shape": "arrow", "colour": "pink", "bg": "violet"},
    "a black heart on a brown background": {"shape": "heart", "colour": "black", "bg": "brown"},
    "a cyan ring on a speckled dark green background": {"shape": "ring", "colour": "cyan", "bg": "dark green", "bgstyle": "speckled"},
    "a black crescent on a violet background": {"shape": "crescent", "colour": "black", "bg": "violet"},
    "a glowing checkered diamond": {"shape": "diamond", "texture": "checkered", "finish": "glowing"},
    "a small glossy black spiral on a beige background": {"shape": "spiral", "colour": "black", "size": "small", "finish": "glossy", "bg": "beige"},
}  # fmt: skip


def column(name: str) -> int:
    return NAMES.index(name)


def value(name: str, word: str) -> int:
    return ATTRIBUTES[column(name)].values.index(word)


def rows(attribute: Attribute, cells: np.ndarray) -> np.ndarray:
    """The row of `attribute.p` that applies to each cell: `[n, values]`."""
    parent = 0 if attribute.given is None else cells[:, column(attribute.given)]
    return attribute.p[np.broadcast_to(parent, len(cells))]


def draw(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """One column per row of `chances [n, values]`, which need not be normalised."""
    cumulative = chances.cumsum(1)
    # Scaled by the last column so that rounding can never run past the end; `>=` never picks a value of probability 0.
    return (rng.random((len(chances), 1)) * cumulative[:, -1:] >= cumulative).sum(1)


def sample(rng: np.random.Generator, n: int, *, uniform: bool = False) -> np.ndarray:
    """`[n, 10]` cells from the world, or each attribute uniform over what is possible (`uniform`)."""
    cells = np.zeros((n, len(ATTRIBUTES)), np.int64)
    for i, attribute in enumerate(ATTRIBUTES):
        chances = rows(attribute, cells)
        cells[:, i] = draw(rng, (chances > 0).astype(np.float64) if uniform else chances)
    return cells


def log_density(cells: np.ndarray) -> np.ndarray:
    """Natural log of the probability of each cell; `-inf` for impossible ones."""
    terms = [np.take_along_axis(rows(a, cells), cells[:, i : i + 1], 1)[:, 0] for i, a in enumerate(ATTRIBUTES)]
    with np.errstate(divide="ignore"):
        return np.log(np.stack(terms, 1)).sum(1)


class Impossible(ValueError):
    """The world holds nothing of the kind."""


class Conditional:
    """p(cell | stated attributes), by enumeration: marginals, log-density quantiles, mean and samples. Raises `Impossible`."""

    def __init__(self, stated: dict[str, int]):
        grids = [np.array([stated[a.name]]) if a.name in stated else np.arange(len(a.values)) for a in ATTRIBUTES]
        self.shape = tuple(len(g) for g in grids)
        self.grids = grids
        log_p = np.zeros(self.shape, np.float32)
        for i, attribute in enumerate(ATTRIBUTES):
            with np.errstate(divide="ignore"):
                table = np.log(attribute.p).astype(np.float32)
            axes = [1] * len(self.shape)
            axes[i] = len(grids[i])
            if attribute.given is None:
                term = table[0][grids[i]].reshape(axes)
            else:
                parent = column(attribute.given)
                axes[parent] = len(grids[parent])
                # The parent always stands before its child.
                term = table[np.ix_(grids[parent], grids[i])].reshape(axes)
            log_p = log_p + term
        self.log_p = log_p
        p = np.exp(log_p.astype(np.float64))
        self.total = p.sum()
        if self.total == 0:
            raise Impossible(", ".join(ATTRIBUTES[column(name)].values[v] for name, v in stated.items()))
        self.p = p / self.total

    def marginal(self, name: str) -> np.ndarray:
        """p(value | stated) over all values of the attribute (0 where the statement excludes it)."""
        i = column(name)
        out = np.zeros(SIZES[i])
        out[self.grids[i]] = self.p.sum(tuple(k for k in range(len(self.shape)) if k != i))
        return out

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`[n, 10]` cells."""
        mass = self.p.ravel().cumsum()
        flat = np.searchsorted(mass, rng.random(n) * mass[-1], side="right")
        return np.stack([grid[at] for grid, at in zip(self.grids, np.unravel_index(flat, self.shape))], 1)

    def mean_log_density(self) -> float:
        possible = self.p > 0
        return float((self.p[possible] * self.log_p[possible]).sum())

    def quantile(self, q: float) -> float:
        """The log-density below which a share `q` of the conditional's mass lies."""
        order = np.argsort(self.log_p, axis=None)
        mass = self.p.ravel()[order].cumsum()
        return float(self.log_p.ravel()[order[np.searchsorted(mass, q * mass[-1])]])


# The synthetic aesthetic: a base, the contrast of object and background, and a bonus per value. About 3 to 10, mean near 6.
AESTHETIC_BASE = 3.0
AESTHETIC_CONTRAST = 2.0
AESTHETIC = {
    "finish": (0.0, 1.2, 1.8, 1.5, 2.6),
    "bgstyle": (0.0, 1.2, 1.6, 0.2),
    "position": (1.0, 0.4, 0.4, 0.2, 0.2),
    "size": (-0.5, 0.6, 0.3),
    "texture": (0.3, 0.1, 0.2, -0.4),
    "frame": (0.0, 0.6),
}


def aesthetic(cells: np.ndarray) -> np.ndarray:
    contrast = np.abs(COLOUR_RGB[cells[:, column("colour")]] - BACKGROUND_RGB[cells[:, column("bg")]]).mean(1)
    score = AESTHETIC_BASE + AESTHETIC_CONTRAST * contrast.astype(np.float64)
    for name, bonus in AESTHETIC.items():
        score = score + np.array(bonus)[cells[:, column(name)]]
    return score


def as_json() -> dict:
    from captions import grammar

    attributes = [{"name": a.name, "given": a.given, "values": list(a.values), "p": a.p.tolist()} for a in ATTRIBUTES]
    return {
        "image_size": IMAGE_SIZE,
        "attributes": attributes,
        "grammar": grammar(),
        "aesthetic": {
            "base": AESTHETIC_BASE,
            "contrast": AESTHETIC_CONTRAST,
            "colour_rgb": COLOUR_RGB.round(6).tolist(),
            "bg_rgb": BACKGROUND_RGB.round(6).tolist(),
            "bonus": {k: list(v) for k, v in AESTHETIC.items()},
        },
    }


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(as_json(), file, indent=1)
        file.write("\n")
