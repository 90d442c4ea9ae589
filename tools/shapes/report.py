"""Writes what `evaluate.py` measured into README.md (between its two markers) and draws the guidance curve, `results/guidance.png`."""

import json
import sys
from pathlib import Path

import world
from evaluate import EXPERIMENTS, RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- measured: python tools/shapes/report.py -->", "<!-- end -->"


def table(header, rows) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]) + "\n"


def percent(x) -> str:
    return f"{100 * x:.1f}"


def instrument(r) -> str:
    columns = ["accuracy, %", *world.NAMES, "all ten"]
    rows = [[f"{kind}, {what}", *(percent(r[kind][key][n]) for n in world.NAMES), percent(r[kind]["all"]) if key == "accuracy" else ""]
            for kind in r for what, key in (("as rendered", "raw"), ("reconstructed", "accuracy"))]  # fmt: skip
    worst = ", ".join(f"{k} {percent(v)}" for k, v in r["uniform"]["worst_values"].items())
    density = "; ".join(
        f"{kind}: mean log-density {r[kind]['mean_log_density_read']} (true {r[kind]['mean_log_density_true']}), impossible {percent(r[kind]['impossible'])} %"
        for kind in r
    )
    psnr = ", ".join(f"{r[kind]['psnr']} dB ({kind})" for kind in r)
    return f"Autoencoder: PSNR {psnr}.\n\n{table(columns, rows)}\nLeast read values (reconstructed, uniform): {worst}. Read on reconstructions: {density}.\n"


def clip(r) -> str:
    return (f"Text to image top-1 of 500: {percent(r['text_to_image_top1'])} %; image to text {percent(r['image_to_text_top1'])} %. "
            f"Mean cosine of matching pairs {r['score_matching']}, of others {r['score_other']}.\n")  # fmt: skip


def aesthetic(r) -> str:
    return "; ".join(f"{kind}: R² {v['r2']}, mean absolute error {v['mean_absolute_error']}" for kind, v in r.items()) + ".\n"


def _fidelity_table(r) -> str:
    names = [n for n in world.NAMES if n not in world.UNSPOKEN]
    rows = [[setting, percent(v["all_stated"]), *(percent(v[n]) if n in v else "" for n in names)] for setting, v in r.items()]
    return table(["right, %", "all stated", *names], rows)


def fidelity(r) -> str:
    return _fidelity_table(r)


def distribution(r) -> str:
    names = list(r["distance"])
    rows = [["generated", *(r["distance"][n] for n in names)], [f"{r['images']} exact samples", *(r["distance_of_exact_samples"][n] for n in names)]]
    return table(["distance", *names], rows)


def guidance(r) -> str:
    columns = ["", "mean log-density", "tail share", "distinct cells", "impossible", "all stated right, %"]
    rows = [
        [k, f"{v['mean_log_density']}" + (f" ± {v['standard_error']}" if "standard_error" in v else ""), v["tail_share"], v["distinct"],
         v.get("impossible", 0), percent(v["all_stated"]) if "all_stated" in v else ""] for k, v in r.items()
    ]  # fmt: skip
    plot(r)
    return table(columns, rows) + "\n![guidance curve](results/guidance.png)\n"


def plot(r) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {float(k.split()[1]): v for k, v in r.items() if k.startswith("guidance")}
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    panels = (("mean_log_density", "mean log-density (nats)"), ("tail_share", "share below the world's 10 % quantile"), ("all_stated", "all stated attributes right"))
    for axis, (key, label) in zip(axes, panels):
        axis.plot(list(settings), [v[key] for v in settings.values()], "o-", color="#1f5fa8", label="generated")
        if key in r["world"]:
            axis.axhline(r["world"][key], color="#888", linestyle="--", label="world")
            axis.legend(frameon=False)
        axis.set(xlabel="guidance scale", title=label)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "guidance.png", dpi=110, metadata={"Software": None})


def tails(r) -> str:
    return table(["prompt", "frequency in the world", "success, %"], [[k, v["frequency"], percent(v["success"])] for k, v in r.items()])


def hard(r) -> str:
    some = list(r["prompts"].items())
    shown = some[:: max(1, len(some) // 12)]
    return (f"{r['hard']} of {r['candidates']} candidates succeed on at most 60 % of {r['seeds']} seeds; all in `results/hard.json`. Some of them:\n\n"
            + table(["prompt", "success, %"], [[k, percent(v)] for k, v in shown]))  # fmt: skip


def policy(r) -> str:
    text = (f"{r['prompts']} plain captions: {percent(r['parses'])} % of the rewrites parse, {percent(r['keeps_stated'])} % keep everything stated; aesthetic of the "
            f"images {r['aesthetic_plain']} → {r['aesthetic_rewritten']}, gain {r['gain']} ± {r['standard_error']}.\n\n")  # fmt: skip
    return text + table(["plain", "rewritten"], list(r["examples"].items()))


def transfer(r) -> str:
    return _fidelity_table({f"{name}, {setting}": v for name, settings in r.items() for setting, v in settings.items()})


def main() -> None:
    sections = []
    for name, measure in EXPERIMENTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            body = globals()[name](json.loads(path.read_text(encoding="utf-8")))
            sections.append(f"### {name}\n\n`python tools/shapes/evaluate.py {name}`: {measure.__doc__.strip()}\n\n{body}")
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{README}: the markers are gone: {BEGIN} … {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(head + BEGIN + "\n\n" + "\n".join(sections) + "\n" + END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
