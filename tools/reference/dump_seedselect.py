"""Writes tests/data/seedselect: reference images, and cases of `seedselect.py` on the tiny pipelines and the embedded model, computed in
float32 and again in float64 from the same targets. tests/data/README.md lists the tensors; golden.json has every setting of every case.

    python dump_seedselect.py
"""

import json
import os

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.linalg import vector_norm

import dump
import minority
import philox
import seedselect

FOLDER = os.path.join(minority.DATA, "seedselect")
SEEDS, MARGIN = 24, 2  # see `compare`
WHOLE = (0, 4)  # iterations whose gradient is stored
# width, height: larger and smaller than what networks see, wide and tall; of a.png and e.png a crop leaves an odd number of pixels
SIZES = {"a.png": (39, 61), "b.png": (96, 64), "c.png": (72, 72), "d.png": (26, 20), "e.png": (52, 37)}
SHOWN = 2  # references of which the networks' inputs are stored

DEFAULTS = {
    "mode": "released", "prompt": dump.PROMPT, "negative": None, "size": None, "sampler": "ddim", "spacing": "leading", "steps": 4, "guidance": 7.5,
    "seed": 22, "reference_seed": 7, "references": [*SIZES], "iterations": 5, "lr": 0.1, "lr_drop_at": 3, "weight_decay": 0.01,
    "semantic": 10.0, "appearance": 1.0, "state_weights": [0.05, 0.25, 0.7], "rho": 0.0,
}  # fmt: skip
# Random networks make more of every rounding the more guidance they get.
MILD = {"guidance": 3.0}
TALL = {"size": [16, 12], "references": ["a.png", "b.png", "e.png"]}
OURS = {"mode": "default", "weight_decay": 0.0}
CASES = {
    "released": {},
    "default": {**OURS, **MILD},
    "guidance-1": {"guidance": 1.0},
    "negative": {**OURS, "guidance": 2.0, "negative": dump.NEGATIVE},
    "semantic": {**MILD, "appearance": 0.0},
    "appearance": {**MILD, "semantic": 0.0},
    "weights": {**OURS, **MILD, "semantic": 3.0, "appearance": 2.5, "state_weights": [0.3, 0.3, 0.4]},
    "prior": {**OURS, **MILD, "rho": 3.0},
    "steps-1": {"steps": 1},
    "steps-2": {**OURS, "steps": 2},
    "steps-20": {"steps": 20, "guidance": 1.0},
    "steps-10": {**OURS, "steps": 10},
    "euler": {**OURS, **MILD, "sampler": "euler"},
    "dpmpp-2m": {**OURS, **MILD, "sampler": "dpmpp-2m"},
    "one-reference": {**OURS, **MILD, "references": ["b.png"]},
    "constant-lr": {**OURS, **MILD, "lr": 0.02, "lr_drop_at": None},
    "tall-released": {**MILD, **TALL},
    "tall": {**OURS, **MILD, **TALL},
    "long": {**MILD, "iterations": 30},
}
SOME = ["released", "default", "guidance-1", "prior", "steps-1", "euler", "dpmpp-2m"]
WHICH = {
    ("tiny-sd1", "tiny-clip-h"): [name for name in CASES if name != "steps-10"],
    ("tiny-sd2", "tiny-clip-l"): SOME,
    ("tiny-sdxl", "tiny-clip-h"): SOME,
    ("shapes", "shapes"): ["released", "steps-10"],
}


def picture(number, width, height):
    """A disc on a slanted gradient, of integers alone."""
    y, x = np.mgrid[:height, :width]
    ramp = [(x * (3 + number) + y * 2) % 256, (y * 255) // (height - 1), (x * 160) // (width - 1) + 20 * number]
    inside = (2 * x - width + number) ** 2 + (2 * y - height - number) ** 2 < (min(width, height) * 2 // 3) ** 2
    disc = [230 - 30 * number, 40 * number, 90]
    return Image.fromarray(np.stack([np.where(inside, d, r) for d, r in zip(disc, ramp)], axis=2).astype(np.uint8))


def write_pictures():
    os.makedirs(FOLDER, exist_ok=True)
    for number, (name, size) in enumerate(SIZES.items()):
        picture(number, *size).save(os.path.join(FOLDER, name), optimize=True)


def settings(model, names, what):
    name, clip = names
    return {"name": f"{name}/{what}", "model": name, "clip": clip, **DEFAULTS, "size": [model.pipe.unet.config.sample_size] * 2, **CASES[what]}


def make_targets(model, clip, case):
    """The targets of a case and what they were made of; equal ones have the same name."""
    factor, count = model.pipe.vae_scale_factor, len(case["references"])
    height, width = (side * factor for side in case["size"])
    images = [Image.open(os.path.join(FOLDER, name)).convert("RGB") for name in case["references"]]
    shown = seedselect.show(images, case["mode"], clip, height, width)
    noise = torch.stack([torch.from_numpy(philox.normal(case["reference_seed"], i, (4, *case["size"]))) for i in range(count)])
    found = seedselect.targets(model, clip, shown, case["mode"], noise.to(clip.dtype))
    found |= {"noise": noise} if case["mode"] == "released" else {}
    if case["model"] != "shapes":  # large ones, and nothing new in them
        found |= {"clip": shown.clip[:SHOWN], "vae": shown.vae[:SHOWN]}
    return f"{case['model']}/targets-{case['mode']}-{height}x{width}-{count}", found


def noise(case):
    return torch.from_numpy(philox.normal(case["seed"], 0, (1, 4, *case["size"])))


def run(networks, clip, case, target):
    """One run's log, by what is logged: tensors with a row per iteration."""
    sampler = seedselect.Sampler(networks.model.pipe.scheduler.config, case, clip.dtype)
    target = {key: target[key].to(clip.dtype) for key in ("centroid", "latents")}
    log = seedselect.select(case, sampler, networks.predict, networks.decode, clip, target, noise(case).to(clip.dtype))
    return {key: torch.stack([row[key] for row in log]) for key in log[0]}


def relative(x, y):
    return (vector_norm(x - y) / vector_norm(y)).item()


def compare(found, exact):
    """How far float32 is from float64: the largest relative distance of a loss, of a D, of a gradient, of z at the end; and how far the closest
    coordinate of the first gradient is from changing sign because of that: the first step of Adam is lr times the sign, so that a case
    without such a margin would test the rounding of the day."""
    rows = range(min(len(found["loss"]), 5))
    x, y = found["gradient"][0], exact["gradient"][0]
    apart = {
        "loss": max(relative(found["loss"][i], exact["loss"][i]) for i in rows),
        "distances": ((found["distances"] - exact["distances"]) / exact["distances"])[:5].abs().max().item(),
        "gradient": max(relative(found["gradient"][i], exact["gradient"][i]) for i in rows),
        "z": relative(found["z"][rows[-1]], exact["z"][rows[-1]]),
        "margin": (y.abs().min() / (x - y).abs().max()).item(),
    }
    return {key: float(f"{value:.1e}") for key, value in apart.items()}


def kept(case, log, is_exact):
    """The tensors of one run that are stored; of a long one the losses alone."""
    if case["iterations"] > 5:
        return {"loss": log["loss"]}
    rows = {key: log[key] for key in ("loss", "distances", "appearance", "prior", "norm")} | {"gradient_norm": log["gradient"].flatten(1).norm(dim=1)}
    tensors = rows | {f"gradient.{i}": log["gradient"][i] for i in WHOLE} | {"z.5": log["z"][4]}
    return tensors if is_exact else tensors | {"z.1": log["z"][0], "final": log["final"][0]}


def search(networks, clips, case, target):
    """The case with the first seed whose runs in float32 and float64 stay close, and the two logs."""
    for attempt in range(SEEDS):
        case = case | {"seed": DEFAULTS["seed"] + attempt}
        logs = [run(network, clip, case, target) for network, clip in zip(networks, clips)]
        apart = compare(*logs)
        if apart["margin"] > MARGIN and max(apart["loss"], apart["distances"]) < 3e-5 and apart["gradient"] < 5e-4:
            return case | {"float64": apart}, logs
    raise AssertionError((case["name"], apart))


def check(model, name):
    """The sampler without optimisation against the pipelines' own runs, and the schedule of the authors' code."""
    if name == "shapes":
        return
    golden = seedselect.load_file(os.path.join(minority.DATA, name, "golden.safetensors"))
    with torch.no_grad():
        networks = seedselect.Networks(model, DEFAULTS)
        for name in ("ddim", "euler", "dpmpp-2m"):
            sampler = seedselect.Sampler(model.pipe.scheduler.config, DEFAULTS | {"sampler": name}, torch.float32)
            states = sampler.states(networks.predict, golden["sample/noise"])
            assert relative(states[-1], golden[f"sample/{name}-leading"]) < 1e-4, name
    levels = seedselect.diffusers.DDIMScheduler.from_config(seedselect.models.SD15["scheduler"])
    levels.set_timesteps(20)
    assert levels.timesteps.tolist() == [951 - 50 * i for i in range(20)]
    assert abs(levels.alphas_cumprod[951] - 0.00815500) < 1e-7 and abs(levels.final_alpha_cumprod - 0.99915) < 1e-6


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    philox.check()
    write_pictures()
    tensors, rows = {}, []

    def put(name, tensor):
        assert tensor.isfinite().all(), name
        tensors[name] = tensor.contiguous().clone()

    for names, cases in WHICH.items():
        model, clip = seedselect.open_model(*names)
        exact_model, exact_clip = seedselect.open_model(*names, torch.float64)
        check(model, names[0])
        for what in cases:
            case = settings(model, names, what)
            case["targets"], target = make_targets(model, clip, case)
            _, exact_target = make_targets(exact_model, exact_clip, case)
            far = {key: relative(target[key], exact_target[key]) for key in ("features", "latents")}
            assert max(far.values()) < 1e-4, (case["name"], far)
            networks = [seedselect.Networks(one, case) for one in (model, exact_model)]
            case, logs = search(networks, (clip, exact_clip), case, target)
            found = {f"{case['targets']}/{key}": value for key, value in target.items()}
            found |= {f"{case['name']}/noise": noise(case)[0]}
            for log, precision in zip(logs, ("", "f64/")):
                found |= {f"{case['name']}/{precision}{key}": value for key, value in kept(case, log, bool(precision)).items()}
            for name, tensor in found.items():
                put(name, tensor)
            rows.append(case)
            losses = " ".join(f"{loss:.4g}" for loss in logs[0]["loss"][:5])
            print(f"{case['name']:26} seed {case['seed']} {case['float64']} |g| {logs[0]['gradient'][0].norm():.2g} L {losses}", flush=True)
    write(tensors, rows)
    sizes = {file: os.path.getsize(os.path.join(FOLDER, file)) for file in sorted(os.listdir(FOLDER))}
    print(json.dumps(sizes))
    assert sum(sizes.values()) < 1.2e6


def write(tensors, rows):
    dump.write(FOLDER, tensors, rows)
    path = os.path.join(FOLDER, "golden.json")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace('"diffusers":', f'"transformers": "{transformers.__version__}", "pillow": "{Image.__version__}", "diffusers":', 1))


if __name__ == "__main__":
    main()
