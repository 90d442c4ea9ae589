"""Does SeedSelect work? Rare concepts of the embedded model by every arm, from the same references and seeds, and what their images show.

    python tools/study/seedselect.py make tune "ddim" "best-of 24" "seed iterations=8" --concepts 12   # try something; resumable
    python tools/study/seedselect.py make report                                                      # the arms in ARMS
    python tools/study/seedselect.py report                                                           # the table of what is made

Concepts are the captions that the model draws wrong most often (`tools/shapes/results/hard.json`), in two sets that share none. References
are real images of the world that fit the caption, drawn afresh: what the caption leaves open differs among them. The reader of
`rarebit score --shapes` judges, which no arm sees. An arm's name is its command line, as in `methods.py`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
import measure  # noqa: E402
from minority import run  # noqa: E402

SHAPES = Path(__file__).parents[1] / "shapes"
REFERENCES = 4
SEEDS = 4
STEPS = 20
GUIDANCE = 4
# Concepts of a set, in the order of one shuffle of all.
SETS = {"tune": slice(0, 40), "report": slice(40, 120)}
ARMS = {
    "tune": ["ddim"],
    # As many images as the default costs: 24 starts of 8 steps, 6 iterations of 8 steps there and back, the last iterate, the image of 20.
    "report": [
        *["ddim", "best-of 21", "zero-order 21", "evolution 21"],
        *["seed", "seed start=nao", "seed norm-prior=0.01", "seed mode=released"],
    ],
}
SEARCHES = ("best-of", "zero-order", "epsilon-greedy", "evolution")
RESAMPLES = 10_000


def concepts(name: str) -> list[str]:
    """Captions of a set."""
    hard = json.loads((SHAPES / "results/hard.json").read_text())["prompts"]
    found = sorted(hard)
    random.Random(20261129).shuffle(found)
    return found[SETS[name]]


def words(arm: str, references: Path) -> list[str]:
    """The arguments of an arm."""
    first, *rest = arm.split()
    if first == "ddim":
        return ["generate"]
    if first in SEARCHES:
        flags = [f"--{part}" for part in rest[1:]]
        return ["generate", f"--{first}={rest[0]}", "--by=references", "--references", str(references), *flags]
    if first == "seed":
        return ["seed", "--references", str(references), *(f"--{part}" for part in rest)]
    sys.exit(f"'{arm}' is no arm; ddim, {', '.join(SEARCHES)}, seed")


def draw_references(concept: str, folder: Path, seed: int, count: int) -> None:
    """A folder of real images of a concept, where it is not there."""
    if not folder.exists():
        part = folder.with_suffix(".part")
        draw = [sys.executable, str(SHAPES / "draw.py"), str(part), "--prompt", concept]
        run([*draw, "--count", str(count), "--seed", str(seed)])
        part.rename(folder)


def make(args, name: str, arm: str, index: int, concept: str) -> None:
    """The images of an arm and a concept, and the reading of each, where they are not there."""
    folder = args.work / name / f"{index:03}"
    references, images = folder / "references", folder / arm.replace(" ", "_")
    if (images / "score.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw_references(concept, references, 7_000_000 + index, REFERENCES)
    images.mkdir(exist_ok=True)
    first, *rest = words(arm, references)
    sampling = [f"--steps={STEPS}", f"--guidance={GUIDANCE}", f"--seed={1000 * index}", f"--count={SEEDS}", f"--batch={SEEDS}"]
    _, seconds = run([str(args.rarebit), first, concept, *rest, *sampling, "--threads=1", "--quiet", "--out", str(images / "i.png")])
    read, _ = run([str(args.rarebit), "score", "--shapes", "--json", "--threads=1", "--quiet", str(images)])
    rows = [line for line in read.splitlines() if '"event":"image"' in line]
    (images / "seconds").write_text(str(seconds / SEEDS))
    (images / "score.jsonl").write_text("".join(f"{line}\n" for line in rows))


def load(args, name: str, arm: str) -> dict[int, list[dict]]:
    """Readings by concept."""
    found = {}
    for path in sorted((args.work / name).glob(f"[0-9]*/{arm.replace(' ', '_')}/score.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if len(rows) == SEEDS:
            found[int(path.parents[1].name)] = rows
    return found


def right(rows: list[dict]) -> float:
    return float(np.mean([not row["wrong"] for row in rows]))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 %, percentile bootstrap over concepts."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def entropy(rows: list[dict]) -> float:
    """Of the values read in the images of a concept, nats, mean over the attributes its caption leaves open."""
    return float(measure.batch_entropy(rows))


def table(args, name: str, arms: list[str]) -> None:
    plain = load(args, name, "ddim")
    print("| arm | concepts | images all right, % | against ddim, points | entropy of what is open | s per image |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        found = load(args, name, arm)
        if not found:
            continue
        shares = np.array([right(rows) for rows in found.values()])
        low, high = interval(shares)
        line = f"| {arm} | {len(found)} | {100 * shares.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}] |"
        both = [concept for concept in found if concept in plain]
        gains = np.array([right(found[concept]) - right(plain[concept]) for concept in both])
        line += " " + "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in (gains.mean(), *interval(gains)))) if both else " "
        seconds = np.mean([float(path.read_text()) for path in (args.work / name).glob(f"[0-9]*/{arm.replace(' ', '_')}/seconds")])
        print(f"{line} | {np.mean([entropy(rows) for rows in found.values()]):.2f} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "report"])
    parser.add_argument("set", choices=list(SETS), nargs="?", default="report")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--concepts", type=int, help="only the first so many")
    parser.add_argument("--rarebit", type=Path, default=Path(__file__).parents[2] / "target/release/rarebit")
    parser.add_argument("--work", type=Path, default=Path("study-seedselect"), help="where images go")
    args = parser.parse_args()
    arms = args.arms or ARMS[args.set]
    if args.what == "make":
        # Arm by arm within a concept: whenever it is cut, all have the same concepts but for the last.
        for index, concept in enumerate(concepts(args.set)[: args.concepts]):
            for arm in arms:
                make(args, args.set, arm, index, concept)
    table(args, args.set, arms)


if __name__ == "__main__":
    main()
