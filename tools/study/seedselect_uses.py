"""What is SeedSelect good for? Classifiers that learn rare concepts from few real images and generated ones, and how diverse those are.

    python tools/study/seedselect_uses.py make few-shot "ddim" "seed iterations=8" --episodes 2 --images 2   # try something; resumable
    python tools/study/seedselect_uses.py make                                                               # all uses, the arms in ARMS
    python tools/study/seedselect_uses.py report                                                             # the tables of what is made

An arm is where generated images come from, its name its command line, as in `seedselect.py`. All arms have the same real images, which are
also the references, the same seeds, the same training and the same test.
"""

import argparse
import functools
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import bins
import classes
import classifier
import seedselect
from measure import captions, world
from minority import run

import render  # of the world, whose folder `measure` has put on the path

ARMS = ["ddim", "best-of 30", "seed"]
# Real images alone; and as many fresh real images in the place of generated ones: the most that those could give.
ALONE, REAL = "references", "real"
# Use -> (episodes, repetitions or concepts; generated images of a class, in the long tail of a tail class).
SIZES = {"few-shot": (10, 4), "long-tail": (4, 9), "diversity": (5, 40)}
WAYS = 5
SHOTS = (1, 5)
# Real images of a class in each part of the long tail, and the classes of a part.
PARTS = {"head": 40, "mid": 8, "tail": 3}
EACH = 4
# Fresh real images of a class that test; classifiers trained, whose accuracies are averaged.
TEST = 40
TRAININGS = 2
# Bins of a concept, the renders they are fitted to, and sets of real images, each as many as an arm has, that arms are compared with.
BINS = 10
FITTED = 2000
SETS = 50
BATCH = 4


@dataclass(frozen=True)
class Concept:
    """A caption and where its images go. Concepts of a use differ in their number, which all their random draws come from."""

    folder: Path
    caption: str
    number: int


@dataclass(frozen=True)
class Task:
    """Classes to tell apart: of each, how many real images are given and how many generated ones an arm adds."""

    classes: tuple[Concept, ...]
    real: tuple[int, ...]
    made: tuple[int, ...]


def episodes(args, use: str) -> list[tuple[Concept, ...]]:
    """The classes of every episode; of diversity, one."""
    pool, count = seedselect.concepts(args.set), args.episodes or SIZES[use][0]
    if use == "long-tail":
        chosen = classes.choose([classes.natural(400), *classes.halves(pool)], EACH, count)
    else:
        chosen = classes.choose([pool], WAYS if use == "few-shot" else 1, count)
    folder = args.work / args.set / use
    concept = lambda e, k, caption: Concept(folder / f"{e:03}" / f"class-{k:02}", caption, 100 * e + k)  # noqa: E731
    return [tuple(concept(e, k, caption) for k, caption in enumerate(of)) for e, of in enumerate(chosen)]


def rows(args, use: str) -> list[tuple[str, list[Task], slice]]:
    """What a table shows of classifiers: its name, the tasks, and the classes of each that count."""
    images = args.images or SIZES[use][1]
    if use == "few-shot":
        of = lambda n: [Task(chosen, (n,) * WAYS, (images,) * WAYS) for chosen in episodes(args, use)]  # noqa: E731
        return [(f"{n} shot{'s' * (n > 1)}", of(n), slice(None)) for n in SHOTS]
    real = [count for count in PARTS.values() for _ in range(EACH)]
    # Filled up to what a tail class has then.
    made = [max(0, PARTS["tail"] + images - count) for count in real]
    tasks = [Task(chosen, tuple(real), tuple(made)) for chosen in episodes(args, use)]
    parts = [(part, tasks, slice(k * EACH, (k + 1) * EACH)) for k, part in enumerate(PARTS)]
    return [("all", tasks, slice(None)), *parts]


def all_tasks(args, use: str) -> list[Task]:
    return list(dict.fromkeys(task for _, tasks, _ in rows(args, use) for task in tasks))


def diverse(args) -> tuple[list[Concept], int]:
    """Concepts, and the images of each."""
    return [concept for (concept,) in episodes(args, "diversity")], args.images or SIZES["diversity"][1]


def write(path: Path, text: str) -> None:
    """A file that appears whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.rename(path)


def seed(concept: Concept) -> int:
    """Of its first image, whatever the arm."""
    return 10_000 * concept.number


def references(concept: Concept, count: int) -> Path:
    """The folder of so many real images, drawn where they are not there."""
    folder = concept.folder / f"{count}-references" / "real"
    folder.parent.mkdir(parents=True, exist_ok=True)
    seedselect.draw_references(concept.caption, folder, seed(concept) + count, count)
    return folder


def renders(concept: Concept, count: int, purpose: str) -> np.ndarray:
    """`[count, 64, 64, 3]`, real images of their own for each purpose."""
    rng = np.random.default_rng([*purpose.encode(), concept.number])
    cells = world.Conditional(captions.parse(concept.caption)).sample(rng, count)
    return render.render(cells, render.sample_nuisances(rng, count))


def home(concept: Concept, arm: str, shots: int) -> Path:
    """The folder of an arm's images. Plain ones know no references: any number has the same."""
    return (concept.folder if arm == "ddim" else concept.folder / f"{shots}-references") / arm.replace(" ", "_")


def missing(concept: Concept, arm: str, shots: int, count: int) -> int:
    return max(0, count - len(list(home(concept, arm, shots).glob("*.png"))))


def generate(args, concept: Concept, arm: str, shots: int, count: int) -> None:
    """The first `count` images of an arm, those that are not there, and what they cost."""
    folder, lacking = home(concept, arm, shots), missing(concept, arm, shots, count)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompt.txt"
    if prompts.exists() and prompts.read_text() != f"{concept.caption}\n":
        sys.exit(f"{folder}: holds images of another caption than '{concept.caption}'; give another --work")
    write(prompts, f"{concept.caption}\n")
    first, *rest = seedselect.words(arm, references(concept, shots))
    sampling = [f"--steps={seedselect.STEPS}", f"--guidance={seedselect.GUIDANCE}", f"--seed={seed(concept)}"]
    files = [f"--count={count}", f"--batch={min(BATCH, lacking)}", "--prompts", str(prompts), "--out", str(folder)]
    _, seconds = run([str(args.rarebit), first, *rest, *sampling, *files, "--threads=1", "--quiet"])
    spent = costs(folder) + [{"images": lacking, "seconds": seconds}]
    write(folder / "seconds.jsonl", "".join(f"{json.dumps(row)}\n" for row in spent))


def costs(folder: Path) -> list[dict]:
    """Images and processor seconds of every run that made some."""
    path = folder / "seconds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seconds_each(folders: list[Path]) -> float:
    """Processor seconds per image; not a number where no run has ended."""
    spent = [row for folder in folders for row in costs(folder)]
    return sum(row["seconds"] for row in spent) / sum(row["images"] for row in spent) if spent else float("nan")


def read(folder: Path, count: int) -> np.ndarray:
    """`[count, 64, 64, 3]`, the first images of a folder by their number, which their names end in."""
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem.split("-")[-1]))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths[:count]])


def added(concept: Concept, arm: str, shots: int, count: int) -> np.ndarray:
    """The images of a class that an arm adds to its real ones."""
    if arm == ALONE or count == 0:
        return np.empty((0, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.uint8)
    return renders(concept, count, "more") if arm == REAL else read(home(concept, arm, shots), count)


def result(task: Task, arm: str) -> Path:
    """The file of a task's accuracies, one per class."""
    name = f"{arm.replace(' ', '_')}.{min(task.real)}-real.{max(task.made)}-made.json"
    return task.classes[0].folder.parent / name


def classify(task: Task, arm: str) -> None:
    each = list(zip(task.classes, task.real, task.made))
    real = [read(references(concept, shots), shots) for concept, shots, _ in each]
    made = [added(concept, arm, shots, count) for concept, shots, count in each]
    test = [renders(concept, TEST, "test") for concept in task.classes]
    found = [classifier.accuracy(classifier.train(real, made, k), test) for k in range(TRAININGS)]
    write(result(task, arm), json.dumps(np.mean(found, 0).tolist()))


def wanted(args, use: str, arms: list[str]) -> list[tuple[Concept, str, int, int]]:
    """Concept, arm, references and number of all images of a use."""
    if use == "diversity":
        concepts, count = diverse(args)
        return [(concept, arm, seedselect.REFERENCES, count) for concept in concepts for arm in arms]
    each = [of for task in all_tasks(args, use) for of in zip(task.classes, task.real, task.made)]
    found = [(concept, arm, shots, count) for concept, shots, count in each for arm in arms if count]
    return list({home(*key[:3]): key for key in found}.values())


def price(args, arm: str) -> float:
    """Processor seconds of an image, measured on one."""
    concept = Concept(args.work / "price", seedselect.concepts("tune")[0], 0)
    key = (concept, arm, seedselect.REFERENCES, 1)
    if missing(*key):
        generate(args, *key)
    return seconds_each([home(*key[:3])])


def in_parallel(args, function, calls: list[tuple]) -> None:
    """In processes of one thread each; the first failure ends all."""
    with ProcessPoolExecutor(args.jobs, initializer=classifier.one_thread) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make(args, arms: list[str]) -> None:
    """Says what is missing and its price, then makes it: references, images, classifiers."""
    lacking = [key for use in args.uses for key in wanted(args, use, arms) if missing(*key)]
    tasks = [task for use in args.uses if use != "diversity" for task in all_tasks(args, use)]
    trainings = [(task, arm) for task in tasks for arm in (ALONE, *arms, REAL) if not result(task, arm).exists()]
    prices = {arm: price(args, arm) for arm in dict.fromkeys(arm for _, arm, _, _ in lacking)}
    minutes = sum(prices[key[1]] * missing(*key) for key in lacking) / 60
    minutes += sum(TRAININGS * classifier.seconds(len(task.classes)) for task, _ in trainings) / 60
    each = ", ".join(f"{arm} {seconds:.1f}" for arm, seconds in prices.items())
    print(f"{sum(missing(*key) for key in lacking)} images (seconds each: {each or '-'}), {TRAININGS * len(trainings)} trainings: ", end="")
    print(f"about {minutes:.0f} minutes of one core, {minutes / args.jobs:.0f} of {args.jobs}", flush=True)
    drawn = {(concept, shots) for task in tasks for concept, shots in zip(task.classes, task.real)}
    drawn |= {(concept, shots) for concept, _, shots, _ in lacking}
    in_parallel(args, references, sorted(drawn, key=str))
    in_parallel(args, functools.partial(generate, args), lacking)
    in_parallel(args, classify, trainings)


def spread(values: list[float], scale: float = 100, form: str = ".1f") -> str:
    """Mean and 95 % interval."""
    return "{:{f}} [{:{f}}, {:{f}}]".format(*(scale * x for x in (np.mean(values), *seedselect.interval(np.array(values)))), f=form)


def against(values: dict, base: dict, **form) -> str:
    """Differences, paired by episode or concept; nothing where none has both."""
    both = sorted(values.keys() & base.keys())
    return spread([values[k] - base[k] for k in both], **form) if both else ""


def accuracies(tasks: list[Task], counted: slice, arm: str) -> dict[int, float]:
    """By episode, of those whose classifiers are trained."""
    paths = {k: result(task, arm) for k, task in enumerate(tasks)}
    return {k: float(np.mean(json.loads(path.read_text())[counted])) for k, path in paths.items() if path.exists()}


def table_of_classifiers(args, use: str, arms: list[str]) -> None:
    print(f"\n| {use} | arm | episodes | accuracy, % | against {ALONE}, points | against + ddim, points |\n|---|---|---|---|---|---|")
    for name, tasks, counted in rows(args, use):
        of = {arm: accuracies(tasks, counted, arm) for arm in dict.fromkeys((ALONE, "ddim", *arms, REAL))}
        for arm in (arm for arm in (ALONE, *arms, REAL) if of[arm]):
            # Each arm against those that stand before it.
            bases = {ALONE: [], "ddim": [ALONE]}.get(arm, [ALONE, "ddim"])
            differences = [against(of[arm], of[base], form="+.1f") if base in bases else "" for base in (ALONE, "ddim")]
            label = arm if arm == ALONE else f"+ {arm}"
            print(f"| {name} | {label} | {len(of[arm])} | {spread(list(of[arm].values()))} | {' | '.join(differences)} |")


def counts(images: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """How many images are in each bin."""
    return np.bincount(bins.nearest(bins.reduce(images), centres), minlength=len(centres))


def measured(concept: Concept, count: int, arms: list[str]) -> dict[str, tuple[float, float]]:
    """Entropy in bits and NDB of each arm whose images are made, and of as many real images: the mean of several sets."""
    fitted = renders(concept, FITTED, "bins")
    centres = bins.k_means(bins.reduce(fitted), BINS, np.random.default_rng(0))
    whole = counts(fitted, centres)
    of = lambda images: (bins.entropy(counts(images, centres)), bins.different(counts(images, centres), whole))  # noqa: E731
    found = {arm: of(read(home(concept, arm, seedselect.REFERENCES), count)) for arm in arms if not missing(concept, arm, seedselect.REFERENCES, count)}
    real = [of(images) for images in np.split(renders(concept, SETS * count, "compared"), SETS)]
    return {REAL: tuple(np.mean(real, 0)), **found}


def table_of_diversity(args, arms: list[str]) -> None:
    concepts, count = diverse(args)
    found = [measured(concept, count, arms) for concept in concepts]
    column = lambda arm, k: {c: float(of[arm][k]) for c, of in enumerate(found) if arm in of}  # noqa: E731
    print(f"\n| diversity of {count} images | concepts | entropy, bits | against {REAL} | NDB of {BINS} | s per image |\n|---|---|---|---|---|---|")
    for arm in (arm for arm in (REAL, *arms) if column(arm, 0)):
        entropy, ndb = column(arm, 0), column(arm, 1)
        difference = against(entropy, column(REAL, 0), scale=1, form="+.2f") if arm != REAL else ""
        seconds = f"{seconds_each([home(concepts[c], arm, seedselect.REFERENCES) for c in entropy]):.1f}" if arm != REAL else ""
        line = f"| {arm} | {len(entropy)} | {spread(list(entropy.values()), scale=1, form='.2f')} | {difference}"
        print(f"{line} | {spread(list(ndb.values()), scale=1, form='.2f')} | {seconds} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "report"])
    parser.add_argument("use", choices=[*SIZES, "all"], nargs="?", default="all")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--set", choices=list(seedselect.SETS), default="report", help="of concepts; 'tune' to try things")
    parser.add_argument("--episodes", type=int, help="episodes, repetitions of the long tail, or concepts of diversity")
    parser.add_argument("--images", type=int, help="generated images of a class, in the long tail of a tail class")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--rarebit", type=Path, default=Path(__file__).parents[2] / "target/release/rarebit")
    parser.add_argument("--work", type=Path, default=Path("study-seedselect-uses"), help="where images go")
    args = parser.parse_args()
    args.uses = list(SIZES) if args.use == "all" else [args.use]
    arms = args.arms or ARMS
    if args.what == "make":
        make(args, arms)
    for use in args.uses:
        table_of_diversity(args, arms) if use == "diversity" else table_of_classifiers(args, use, arms)


if __name__ == "__main__":
    main()
