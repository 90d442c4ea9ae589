"""What the images of the study show, and how sure that is: rarity, agreement, diversity, paired bootstrap intervals.

An image arrives as the JSON object that `rarebit score --shapes --json` writes for it: what its caption states, what was read, the exact
log-density of what was read. Which values are rare under a caption comes from `world.Conditional`, which enumerates the world's cells.
"""

import functools
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
import captions  # noqa: E402
import world  # noqa: E402

# A value of an attribute left open is rare when its exact probability under the caption is below this.
RARE = 0.1
RESAMPLES = 10_000


@functools.cache
def marginals(caption: str) -> dict[str, np.ndarray]:
    """p(value | what the caption states) of every attribute it leaves open: one marginal per attribute, by enumeration."""
    stated = captions.parse(caption)
    conditional = world.Conditional(stated)
    return {name: conditional.marginal(name) for name in world.NAMES if name not in stated}


@functools.cache
def chance_of_rare(caption: str) -> tuple[float, int]:
    """Expected number of rare values among the attributes left open in a scene of the world itself, and how many are open."""
    chances = marginals(caption)
    return sum(float(p[p < RARE].sum()) for p in chances.values()), len(chances)


def reading(image: dict) -> dict:
    """One image as numbers."""
    chances = marginals(image["prompt"])
    rare = {name: bool(p[world.value(name, image["read"][name])] < RARE) for name, p in chances.items()}
    return {
        "log_density": np.nan if image["impossible"] else image["log_density"],
        "impossible": image["impossible"],
        "right": not image["wrong"],
        "in_tail": bool(image["in_tail"]),
        "rare": sum(rare.values()),
        "rare_names": [name for name, is_rare in rare.items() if is_rare],
        "open": len(rare),
        "confidence": image["confidence"],
        "stated": list(image["stated"]),
        "wrong": list(image["wrong"]),
    }


class Readings:
    """The images of one method, one per caption, as columns."""

    def __init__(self, images: list[dict]):
        rows = [reading(image) for image in images]
        self.prompts = [image["prompt"] for image in images]
        for key in ("log_density", "impossible", "right", "in_tail", "rare", "open", "confidence"):
            setattr(self, key, np.array([row[key] for row in rows], float))
        self.rows = rows
        self.good = self.right * (1 - self.impossible)

    def summary(self) -> dict:
        good = self.good > 0
        return {
            "images": len(self.rows),
            "log_density": _mean(self.log_density),
            "log_density_right": _mean(self.log_density[good]),
            "impossible": _mean(self.impossible),
            "agreement": _mean(self.right),
            "rare_share": float(self.rare.sum() / self.open.sum()),
            "rare_share_right": float(self.rare[good].sum() / max(self.open[good].sum(), 1)),
            "in_tail": _mean(self.in_tail),
            "in_tail_and_right": _mean(self.in_tail * self.good),
            "confidence": _mean(self.confidence),
            "confidence_low": float(np.mean(self.confidence < 0.9)),
            "right": self.right_by_attribute(),
            "rare": self.rare_by_attribute(),
        }

    def right_by_attribute(self) -> dict[str, float]:
        out = {}
        for name in world.NAMES:
            of = [row for row in self.rows if name in row["stated"]]
            if of:
                out[name] = float(np.mean([name not in row["wrong"] for row in of]))
        return out

    def rare_by_attribute(self) -> dict[str, float]:
        out = {}
        for name in world.NAMES:
            of = [row for row in self.rows if name not in row["stated"]]
            if of:
                out[name] = float(np.mean([name in row["rare_names"] for row in of]))
        return out


def world_itself(prompts: list[str]) -> dict:
    """What exact draws from the world under the captions would show."""
    expected, opened = np.array([chance_of_rare(p) for p in prompts]).T
    mean = [world.Conditional(captions.parse(p)).mean_log_density() for p in prompts]
    return {"log_density": float(np.mean(mean)), "rare_share": float(expected.sum() / opened.sum())}


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def interval(statistic, *columns: np.ndarray, together: int = 1) -> list[float]:
    """`[value, low, high]`: 95 % of the statistic over resampled rows (captions), `together` neighbours at a time; every column is
    resampled alike."""
    rng = np.random.default_rng(0)
    groups = np.arange(len(columns[0])).reshape(-1, together)
    n = len(groups)
    values = []
    # A resample of few captions can hold nothing to divide by: it is left out.
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        for _ in range(10):
            rows = groups[rng.integers(n, size=(RESAMPLES // 10, n))].reshape(RESAMPLES // 10, -1)
            values.append(statistic(*(column[rows] for column in columns)))
        value = float(statistic(*(column[None] for column in columns))[0])
        low, high = np.nanquantile(np.concatenate(values), [0.025, 0.975])
    return [value, float(low), float(high)]


def difference(method: Readings, base: Readings, together: int) -> dict:
    """The method against the base, paired by caption: differences and, for shares of rare values, the ratio. `together`: captions
    that share their starting noise."""
    assert method.prompts == base.prompts
    of = functools.partial(interval, together=together)
    mean = lambda d: np.nanmean(d, 1)  # noqa: E731
    both = np.where((method.good * base.good) > 0, method.log_density - base.log_density, np.nan)
    ratio = lambda a, b: (a[..., 0].sum(1) / a[..., 1].sum(1)) / (b[..., 0].sum(1) / b[..., 1].sum(1))  # noqa: E731
    open_right = lambda r: np.stack([r.rare * r.good, r.open * r.good], -1)  # noqa: E731
    return {
        "log_density": of(mean, method.log_density - base.log_density),
        "log_density_both_right": of(mean, both),
        "agreement": of(mean, method.right - base.right),
        "in_tail": of(mean, method.in_tail - base.in_tail),
        "rare_ratio": of(ratio, np.stack([method.rare, method.open], -1), np.stack([base.rare, base.open], -1)),
        "rare_ratio_right": of(ratio, open_right(method), open_right(base)),
    }


def batch_entropy(images: list[dict]) -> float:
    """Mean over the attributes the caption leaves open of the entropy (nats) of the values read in the batch."""
    out = []
    for name in marginals(images[0]["prompt"]):
        counts = np.unique([image["read"][name] for image in images], return_counts=True)[1]
        p = counts / counts.sum()
        out.append(float(-(p * np.log(p)).sum()))
    return float(np.mean(out))
