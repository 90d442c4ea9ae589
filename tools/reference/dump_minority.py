"""Writes tests/data/minority: cases of `minority.py` on the tiny pipelines and the embedded model, computed in float32, each compared
with the same in float64. tests/data/README.md lists the tensors; golden.json has every setting of every case.

    python dump_minority.py
"""

import json
import os
import zlib

import torch
from safetensors.torch import load_file
from torch.linalg import vector_norm

import dump
import minority
import philox

KEPT = 64 << 10  # bytes; a larger final variable is not stored
SEEDS, MARGIN = 40, 2  # see `compare`

PROMPT, OTHER, NEGATIVE = dump.PROMPT, "two small green circles", dump.NEGATIVE
LONG = "a red star and a green circle and a blue square and a yellow triangle on a dark blue background with a small white frame and two stripes"
DEFAULTS = {
    "mode": "default", "prompts": [PROMPT], "negatives": None, "size": None, "steps": 10, "spacing": "leading", "guidance": 4.0,
    "seed": 1234, "opt_seed": 4294967300, "k": 3, "lr": None, "lr_decay": 0.0, "t_lo": 0.7, "inter_rate": 1, "second_level": "annealed",
    "lambda": 1.0, "tokens": 1, "position": "end", "base_prompt_after": True, "pool_at": "eos", "variable": "token", "objective": "minority",
    "guided": False, "second": "prompt", "sg_second": False, "squared": False,
}  # fmt: skip
RELEASED = {"mode": "released", "pool_at": "placeholder", "base_prompt_after": False}
WHOLE = {"spread": 0.02, "t_lo": 0.8}  # two steps, shorter ones: of thousands of coordinates some are always close to a change of sign
CASES = {
    "token": {},
    "batch": {"prompts": [PROMPT, OTHER], "negatives": [NEGATIVE, "blue"]},
    "lambda": {"lambda": 0.5},
    "fixed": {"second_level": 0.75},
    "released": RELEASED,
    "repulsion": {"objective": "repulsion", "prompts": [PROMPT] * 3},
    "text": {"variable": "text", **WHOLE},
    "null": {"variable": "null", "guided": True, **WHOLE},
    "naive": {"guided": True, "second": "token", "sg_second": True, "squared": True},
    "tokens-2": {"tokens": 2, "prompts": [PROMPT, OTHER]},
    "start": {"position": "start"},
    "inter-rate": {"inter_rate": 2},
    "keep-context": {"base_prompt_after": False},
    "keep-null": {"variable": "null", "guided": True, "base_prompt_after": False, "negatives": [NEGATIVE], **WHOLE},
    "lr-decay": {"lr_decay": 0.1},
    "released-fixed": {**RELEASED, "second_level": 0.75},
    "guided": {"guided": True},
    "second-token": {"second": "token"},
    "sg-second": {"sg_second": True},
    "squared": {"squared": True, "lambda": 0.5},
    "guidance-1": {"guidance": 1.0},
    "all-steps": {"steps": 4, "t_lo": 0.0},
    "long": {"prompts": [LONG], "tokens": 2, "size": [8, 12]},
    "lightning": {**RELEASED, "steps": 4, "spacing": "trailing", "guidance": 1.0, "t_lo": 0.0},
    "pool-at-placeholder": {"pool_at": "placeholder", "tokens": 2},
    "pool-at-placeholder-start": {"pool_at": "placeholder", "position": "start"},
}
WHICH = {
    "tiny-sd1": [name for name in CASES if not name.startswith("pool")],
    "tiny-sd2": [*CASES][:9],
    "tiny-sdxl": [*CASES],
    "shapes": ["token", "repulsion"],
}


def settings(model, name, what):
    """All of a case's parameters; its learning rate is `spread` of the standard deviation of the token table."""
    case = {**DEFAULTS, "spread": 0.07, "size": [model.pipe.unet.config.sample_size] * 2, **CASES[what]}
    case["lr"] = float(f"{case.pop('spread') * model.towers[0].table.weight.std():.4g}")
    return {"name": f"{name}/{what}", "model": name, **case}


def start(model, case):
    """Unit noise and the token rows that learning starts from, which have the spread of the tables."""
    count, seed = len(case["prompts"]) * case["tokens"], zlib.crc32(case["name"].encode())
    tables = [tower.table.weight for tower in model.towers]
    rows = [table.std().float() * dump.normal(seed + k, count, table.shape[1]) for k, table in enumerate(tables)]
    return minority.normals(case, case["seed"], 0), rows


def compare(log, latents, twin, exact):
    """How far float32 is from float64, and how far the closest coordinate of a first gradient is from changing sign because of that:
    the first step of Adam is lr times the sign, so that a case without such a margin would test the rounding of the day."""
    pairs = {"j": (torch.stack(log["j"]), torch.stack(twin["j"]))}
    pairs |= {"gradient": (log["gradients"][0][0], twin["gradients"][0][0]), "latents": (latents, exact)}
    apart = {key: vector_norm(x - y) / vector_norm(y) for key, (x, y) in pairs.items()}
    steps = [pair for ours, theirs in zip(log["gradients"], twin["gradients"]) for pair in zip(ours, theirs)]
    apart["margin"] = min(y.abs().min() / (x - y).abs().max() for x, y in steps)
    return {key: float(f"{value:.1e}") for key, value in apart.items()}


def run(model, exact, case):
    """A case's tensors and its row of golden.json; `exact` is the same model in float64, which must agree."""
    for attempt in range(SEEDS):
        case = case | {"opt_seed": DEFAULTS["opt_seed"] + 10 * attempt}
        noise, rows = start(model, case)
        latents, log = minority.sample(model, case, noise, rows)
        double, twin = minority.sample(exact, case, noise.double(), [part.double() for part in rows])
        apart = compare(log, latents, twin, double)
        if apart["margin"] > MARGIN:
            break
    assert apart["margin"] > MARGIN and max(apart["j"], apart["gradient"], apart["latents"]) < 1e-4, (case["name"], apart)
    tensors = {"noise": noise, "j": torch.stack(log["j"]), "latents": latents}
    names = ["final"] if case["variable"] != "token" else ["final.0", "final.1"]
    if case["variable"] == "token":
        tensors |= {f"rows.{k}": part for k, part in enumerate(rows)}
    for name, gradient, value in zip(names, log["gradients"][0], log["final"]):
        assert gradient.norm() > 0
        tensors |= {"gradient.1" if name == "final.1" else "gradient": gradient} | ({name: value} if value.nbytes < KEPT else {})
    facts = {key: log[key] for key in ("optimised_steps", "timesteps", "second_timesteps")} | {"float64": apart}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    return {f"{case['name']}/{key}": tensor.contiguous() for key, tensor in tensors.items()}, case | facts


def report(row, j):
    """Sum over samples of J at the first and last iteration of each optimised step; the noise differs, so it need not grow."""
    sums = j.sum(1).reshape(-1, row["k"])
    print(f"{row['name']:36} {row['float64']} " + " ".join(f"{x[0]:.4g}>{x[-1]:.4g}" for x in sums), flush=True)


@torch.no_grad()
def check(model, name):
    """The encoders and a run without optimisation against the pipeline's, the causal prefix, and the constants of the authors' schedule."""
    prompts = [PROMPT, OTHER, LONG, ""]
    plain = model.encode(prompts)
    for k, prompt in enumerate(prompts):
        expected = dump.encode(model.pipe, prompt)
        ids = [tower.ids(prompt, 0, "end")[0] for tower in model.towers]
        assert ids == [expected[key][0].tolist() for key in ("ids", "ids_2")[: len(ids)]]
        assert (plain.context[k] - expected["context"][0]).abs().max() < 1e-5
        assert not model.xl or (plain.pooled[k] - expected["pooled"][0]).abs().max() < 1e-5
    assert all(len(tower.tokenizer(LONG, add_special_tokens=False).input_ids) > tower.length - 2 for tower in model.towers)
    place = model.towers[0].ids(PROMPT, 1, "end")[0].index(minority.PLACE)
    learnt = model.encode([PROMPT], [dump.normal(0, 1, tower.table.weight.shape[1]) for tower in model.towers])
    moved = (learnt.context[0] - plain.context[0]).abs().amax(1)
    assert moved[:place].max() < 1e-5 and moved[place:].min() > 1e-3
    golden = load_file(os.path.join(minority.DATA, name, "golden.safetensors"))
    noise = golden["sample/noise"]
    rows = [torch.zeros(1, tower.table.weight.shape[1]) for tower in model.towers]
    latents, _ = minority.sample(model, {**DEFAULTS, "size": noise.shape[2:], "guidance": dump.GUIDANCE, "t_lo": 1}, noise, rows)
    assert (latents - golden["sample/ddim-10"]).norm() < 1e-4 * latents.norm()
    if name == "shapes":  # a schedule of its own
        return
    long = minority.Released(model, {**DEFAULTS, "steps": 50})
    levels = {981: 0.0058437838, 961: 0.0073652446, 901: 0.0141511420, 1: 0.99915, 999: 0.0047166989, 249: 0.6770708151}
    assert all(abs(long.level(t) - a) < 1e-6 for t, a in levels.items()) and abs(long.table[750] - 0.05616985) < 1e-6
    assert long.timesteps[:5] == [981, 961, 941, 921, 901] and [long.second(t)[0] for t in long.timesteps[:5]] == [38, 58, 78, 98, 118]
    few = minority.Released(model, {**DEFAULTS, "steps": 4, "spacing": "trailing"})
    assert few.timesteps == [999, 749, 499, 249] and [few.second(t)[0] for t in few.timesteps] == [250, 500, 750, 1000]


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    philox.check()
    tensors, rows = {}, []
    for name, cases in WHICH.items():
        model, exact = minority.Model(name), minority.Model(name, torch.float64)
        check(model, name)
        for what in cases:
            found, row = run(model, exact, settings(model, name, what))
            report(row, found[row["name"] + "/j"])
            tensors |= found
            rows.append(row)
    folder = os.path.join(minority.DATA, "minority")
    os.makedirs(folder, exist_ok=True)
    dump.write(folder, tensors, rows)
    sizes = {file: os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder)}
    print(json.dumps(sizes))
    assert sum(sizes.values()) < 1.5e6


if __name__ == "__main__":
    main()
