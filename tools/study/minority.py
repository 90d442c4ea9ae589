"""Does MinorityPrompt work? Images of many captions by every method of `methods.py`, what they show, and a report.

    python tools/study/minority.py make tune|report|defaults|batch-tune|batch-report [NAME ...]   # images and their readings; resumable
    python tools/study/minority.py report --out DIR                                      # Markdown and JSON from all readings made

Captions are drawn by the world's own grammar; the sets share none. Every method makes the same captions from the same starting noise: ten
captions (one, of a batch) share a seed. Images stay under --work, one folder per set, method and seed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import measure
import methods
from measure import captions, world

PER_SEED = 10
# Set -> (captions, images of each, captions that share a seed). `tune-again` has more noises: what is drawn wrong depends on them.
SETS = {
    "report": (500, 1, PER_SEED),
    "tune": (100, 1, PER_SEED),
    "batch-report": (40, 8, 1),
    "batch-tune": (12, 8, 1),
    "tune-again": (160, 1, 2),
    # The commands without flags, a noise of its own for every caption.
    "defaults": (64, 1, 1),
}
MODEL = ["--guidance", "4", "--steps", "50"]


def caption_sets() -> dict[str, list[str]]:
    """Captions as the world makes them; a later set takes none that an earlier one has."""
    rng, out, taken = np.random.default_rng(20261121), {}, set()
    for name, (count, _, _) in SETS.items():
        found = []
        while len(found) < count:
            caption = captions.write(world.sample(rng, 1)[0], captions.mention(rng), rng)
            if caption not in taken:
                found.append(caption)
        taken |= set(found)
        out[name] = found
    return out


def seed(name: str, chunk: int) -> int:
    """Sets lie a million apart, chunks a hundred: no two images of a method share one by accident."""
    return list(SETS).index(name) * 1_000_000 + chunk * 100


def command(args, method: str) -> list[str]:
    words = methods.words(method)
    if method in methods.WITHOUT_FLAGS:
        return [str(args.rarebit), *words, "--threads", "1", "--quiet", "--json"]
    model = MODEL[2:] if any(word.startswith("--guidance") for word in words) else MODEL
    return [str(args.rarebit), words[0], *model, *words[1:], "--threads", "1", "--quiet", "--json"]


def run(words: list[str]) -> tuple[str, float]:
    """Standard output and seconds of processor time; stops the study where the program fails."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{process.returncode} from {' '.join(words)}")
    return output, usage.ru_utime + usage.ru_stime


def make(args, name: str, method: str, chunk: int) -> None:
    """The images of a method and a seed that are not there yet, and the reading of each."""
    _, each, share = SETS[name]
    folder = args.work / name / method / f"{chunk:03}"
    if (folder / "score.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = caption_sets()[name][chunk * share : (chunk + 1) * share]
    (folder / "prompts.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    many = ["--count", str(each), "--batch", str(each)] if each > 1 else []
    words = command(args, method) + many + ["--seed", str(seed(name, chunk)), "--prompts", str(folder / "prompts.txt")]
    started = time.monotonic()
    made = len(list(folder.glob("*.png")))
    _, processor = run(words + ["--out", str(folder)])
    seconds = {"images": len(list(folder.glob("*.png"))) - made, "processor": processor, "wall": time.monotonic() - started}
    (folder / "seconds.json").write_text(json.dumps(seconds))
    read, _ = run([str(args.rarebit), "score", "--shapes", "--json", "--threads", "1", "--quiet", str(folder)])
    (folder / "score.jsonl.part").write_text("".join(line + "\n" for line in read.splitlines() if '"event":"image"' in line))
    (folder / "score.jsonl.part").rename(folder / "score.jsonl")


def load(args, name: str, method: str, limit: int | None = None) -> list[dict]:
    """The readings of a method in the order of the captions."""
    folders = sorted((args.work / name / method).glob("[0-9]*"))
    _, each, share = SETS[name]
    out = []
    for folder in folders[: limit // share if limit else None]:
        if (folder / "score.jsonl").exists():
            rows = [json.loads(line) for line in (folder / "score.jsonl").read_text().splitlines()]
            # Files are named line-seed.
            out += sorted(rows, key=lambda row: [int(part) for part in Path(row["path"]).stem.split("-")])
    return out


def cost(args, name: str, method: str) -> float:
    """Seconds of one core per image."""
    rows = [json.loads(path.read_text()) for path in (args.work / name / method).glob("*/seconds.json")]
    return sum(row["processor"] for row in rows) / max(sum(row["images"] for row in rows), 1)


def glance(args, name: str, method: str) -> str:
    images = load(args, name, method)
    readings = measure.Readings(images)
    s = readings.summary()
    line = f"n {s['images']} logp {s['log_density']:.2f} (right {s['log_density_right']:.2f}) agree {s['agreement']:.3f} rare {s['rare_share']:.3f}"
    line += f" tail {s['in_tail']:.3f} impossible {s['impossible']:.3f} conf {s['confidence']:.3f} s {cost(args, name, method):.2f}"
    base = load(args, name, methods.plain(method), len(images) // SETS[name][1])
    if len(base) == len(images) and method != methods.plain(method):
        d = measure.difference(readings, measure.Readings(base), SETS[name][2])
        of = lambda key, scale=1: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(scale * x for x in d[key]))  # noqa: E731
        line += f" | d logp {of('log_density')} d agree {of('agreement', 100)} points rare x{of('rare_ratio')}"
    if SETS[name][1] > 1:
        line += f" entropy {np.mean([measure.batch_entropy(images[k : k + 8]) for k in range(0, len(images), 8)]):.3f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "report"])
    parser.add_argument("set", nargs="?", choices=list(SETS))
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--captions", type=int, help="only the first so many")
    parser.add_argument("--rarebit", type=Path, default=Path(__file__).parents[2] / "target/release/rarebit")
    parser.add_argument("--work", type=Path, default=Path("study-work"), help="where images go")
    parser.add_argument("--out", type=Path, help="where the report goes")
    args = parser.parse_args()
    if args.what == "make":
        count, _, share = SETS[args.set]
        names = args.methods or methods.CHOSEN[args.set]
        # Method by method within a seed: whenever it is cut, all have the same captions but for the last few.
        for chunk in range(min(count, args.captions or count) // share):
            for method in names:
                make(args, args.set, method, chunk)
        for method in names:
            print(f"{args.set:12} {method:28} {glance(args, args.set, method)}", flush=True)
    else:
        import tables

        tables.write(args)


if __name__ == "__main__":
    main()
