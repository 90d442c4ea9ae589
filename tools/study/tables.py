"""The report of the study: Markdown tables and one JSON file from all readings that were made."""

import json
import platform
import subprocess
from pathlib import Path

import numpy as np

import measure
import methods
import minority


def machine(args) -> dict:
    """What it ran on, and with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = sum(line.startswith("processor") for line in lines)
    version = subprocess.run([str(args.rarebit), "--version"], capture_output=True, text=True).stdout.strip()
    return {"cpu": model, "cores": cores, "threads_per_process": 1, "rarebit": version, "python": platform.python_version(), "numpy": np.__version__}


def tried(args, name: str) -> list[str]:
    """The methods of a set that have readings, DDIM first."""
    found = [path.name for path in (args.work / name).iterdir() if list(path.glob("*/score.jsonl"))]
    return sorted(found, key=lambda m: (list(methods.START).index(m.split()[0]) if m.split()[0] in methods.START else 9, m))


def measured(args, name: str) -> dict:
    """Summary, cost and difference to plain DDIM of every method of a set; a method tried on fewer captions meets DDIM on those."""
    out = {}
    for method in tried(args, name):
        images = minority.load(args, name, method)
        readings = measure.Readings(images)
        plain = methods.plain(method)
        base_images = minority.load(args, name, plain, len(images) // minority.SETS[name][1])
        base = measure.Readings(base_images)
        out[method] = {"command": minority.command(args, method)[1:], **readings.summary(), "seconds": minority.cost(args, name, method)}
        out[method]["command"] = " ".join(f'"{w}"' if " " in w else w for w in out[method]["command"])
        if method != plain and base.prompts == readings.prompts:
            out[method]["against_ddim"] = measure.difference(readings, base, minority.SETS[name][2])
            out[method]["ddim_agreement"] = float(base.right.mean())
        if minority.SETS[name][1] > 1:
            out[method]["batches"] = batches(images, base_images)
    return out


def batches(images: list[dict], base: list[dict], each: int = 8) -> dict:
    """Attribute entropy of batches, and against DDIM's, paired by caption."""
    split = lambda rows: [rows[k : k + each] for k in range(0, len(rows), each)]  # noqa: E731
    entropy, base_entropy = (np.array([measure.batch_entropy(b) for b in split(rows)]) for rows in (images, base))
    right = lambda rows: np.array([np.mean([not i["wrong"] for i in b]) for b in split(rows)])  # noqa: E731
    gain = lambda a, b: a.mean(1) / b.mean(1) - 1  # noqa: E731
    return {
        "captions": len(entropy),
        "entropy": float(entropy.mean()),
        "gain": measure.interval(gain, entropy, base_entropy),
        "agreement": measure.interval(lambda d: d.mean(1), right(images) - right(base)),
    }


def _with(interval: list[float], digits: int = 2, scale: float = 1) -> str:
    value, low, high = (scale * x for x in interval)
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _ratio(interval: list[float]) -> str:
    return f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"


def table(head: list[str], body: list[list]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def main_table(results: dict) -> str:
    head = ["method", "images", "log-density", "of right images", "rare share, %", "in tail, %", "agreement, %", "impossible, %", "confidence", "s per image"]
    body = []
    for method, r in results.items():
        shares = [f"{100 * r[k]:.1f}" for k in ("rare_share", "in_tail", "agreement", "impossible")]
        body.append([method, r["images"], f"{r['log_density']:.2f}", f"{r['log_density_right']:.2f}", *shares, f"{r['confidence']:.3f}", f"{r['seconds']:.2f}"])
    return table(head, body)


def difference_table(results: dict) -> str:
    head = ["method − DDIM", "captions", "log-density", "where both are right", "rare share, ratio", "ratio of right images", "in tail, points", "agreement, points"]
    body = []
    for method, r in results.items():
        if d := r.get("against_ddim"):
            cells = [_with(d["log_density"]), _with(d["log_density_both_right"]), _ratio(d["rare_ratio"]), _ratio(d["rare_ratio_right"])]
            body.append([method, r["images"], *cells, _with(d["in_tail"], 1, 100), _with(d["agreement"], 1, 100)])
    return table(head, body)


def attribute_table(results: dict, key: str, names) -> str:
    body = [[method, *(f"{100 * r[key][name]:.1f}" if name in r[key] else "" for name in names)] for method, r in results.items()]
    return table(["method", *names], body)


def front_table(results: dict) -> str:
    """Everything that was tried, one line each: the numbers that make the front, and what was given up for them."""
    head = ["method", "captions", "log-density − DDIM", "agreement − DDIM, points", "agreement, %", "rare share, ratio", "impossible, %", "s per image"]
    body = []
    for method, r in results.items():
        if d := r.get("against_ddim"):
            last = [f"{100 * r['agreement']:.1f}", _ratio(d["rare_ratio"]), f"{100 * r['impossible']:.1f}", f"{r['seconds']:.2f}"]
            body.append([method, r["images"], _with(d["log_density"]), _with(d["agreement"], 1, 100), *last])
    return table(head, body)


def batch_table(results: dict) -> str:
    head = ["method", "captions", "entropy, nats", "gain over DDIM, %", "agreement − DDIM, points", "log-density", "agreement, %", "s per image"]
    body = []
    for method, r in results.items():
        b = r["batches"]
        against = [_with(b["gain"], 1, 100), _with(b["agreement"], 1, 100)] if method != "ddim" else ["", ""]
        body.append([method, b["captions"], f"{b['entropy']:.3f}", *against, f"{r['log_density']:.2f}", f"{100 * r['agreement']:.1f}", f"{r['seconds']:.2f}"])
    return table(head, body)


def rivals_table(args, name: str) -> str:
    """MinorityPrompt against everything but DDIM, paired on the captions both have."""
    head = ["difference", "captions", "log-density", "agreement, points", "rare share, ratio"]
    everything = {method: minority.load(args, name, method) for method in tried(args, name)}
    body = []
    # A learning rate of 0 is a rival: the token's words without optimisation.
    is_ours = lambda m: m.startswith("mp") and not m.startswith("mp lr=0 ")  # noqa: E731
    for ours in filter(is_ours, everything):
        for rival in (m for m in everything if not is_ours(m) and m != "ddim" and methods.plain(m) == methods.plain(ours)):
            n = min(len(everything[ours]), len(everything[rival]))
            both = [measure.Readings(everything[method][:n]) for method in (ours, rival)]
            d = measure.difference(*both, minority.SETS[name][2])
            body.append([f"{ours} − {rival}", n, _with(d["log_density"]), _with(d["agreement"], 1, 100), _ratio(d["rare_ratio"])])
    return table(head, body)


def write(args) -> None:
    of = machine(args)
    results = {name: measured(args, name) for name in minority.SETS if (args.work / name).exists()}
    sets = minority.caption_sets()
    used = {name: max(r["images"] for r in results[name].values()) // minority.SETS[name][1] for name in results}
    worlds = {name: measure.world_itself(sets[name][:count]) for name, count in used.items()}
    names = measure.world.NAMES
    words = [f"{of['cpu']}, {of['cores']} cores, one thread per process; {of['rarebit']}, Python {of['python']}, numpy {of['numpy']}.\n"]
    words.append("Made by `python tools/study/minority.py report`; what the columns are: `tools/study/README.md`.\n")
    for name, title in (
        ("report", "Reported captions"),
        ("tune", "Tuning captions: all that was tried"),
        ("tune-again", "More tuning captions, eighty noises"),
    ):
        if name not in results:
            continue
        r = results[name]
        words.append(f"## {title}\n")
        w = worlds[name]
        words.append(f"Draws from the world under the same {used[name]} captions: log-density {w['log_density']:.2f}, rare share {100 * w['rare_share']:.1f} %.\n")
        if name == "report":
            words += [main_table(r), difference_table(r), rivals_table(args, name), "Right, %, where stated:\n", attribute_table(r, "right", list(measure.captions.MENTION))]
            words += ["Rare values, %, where not stated:\n", attribute_table(r, "rare", names)]
            words.append(table(["method", "command"], [[m, f"`rarebit {v['command']}`"] for m, v in r.items()]))
        else:
            words.append(front_table(r))
    for name, title in (("batch-report", "Batches of 8, reported captions"), ("batch-tune", "Batches of 8, tuning captions")):
        if name in results:
            words += [f"## {title}\n", batch_table(results[name])]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text("\n".join(words), encoding="utf-8")
    everything = {"machine": of, "world": worlds, "results": results}
    (args.out / "study.json").write_text(json.dumps(_rounded(everything), indent=0) + "\n", encoding="utf-8")


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value
