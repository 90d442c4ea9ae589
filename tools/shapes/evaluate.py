"""Measures the finished `shapes` model against what it has to show; one JSON file per experiment in `results/`.

    python tools/shapes/evaluate.py EXPERIMENT... --work DIR      (no experiment: all of them, those already measured left out)
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, GPT2LMHeadModel

import captions
import reader
import trainer
import world
from sampling import Model
from train_aesthetic import AestheticHead, embed, load_vision
from train_policy import PLAIN_MENTION, TEMPLATE
from train_reader import reconstruct
from train_text import caption_batch, matches
from train_vae import scenes

RESULTS = Path(__file__).parent / "results"
# Far from every training seed.
SEED = 9000
EXPERIMENTS = {}


def experiment(function):
    EXPERIMENTS[function.__name__] = function
    return function


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([SEED, *key])


def standard_error(x) -> float:
    return float(np.std(x, ddof=1) / math.sqrt(len(x)))


def by_name(values) -> dict[str, float]:
    return {name: round(float(v), 4) for name, v in zip(world.NAMES, values)}


def _density(cells) -> dict:
    log_p = world.log_density(cells)
    possible = np.isfinite(log_p)
    return {"mean_log_density": round(float(log_p[possible].mean()), 3), "standard_error": round(standard_error(log_p[possible]), 3),
            "impossible": round(float(1 - possible.mean()), 4)}  # fmt: skip


# ------------------------------------------------------------------ instruments


@experiment
def instrument(model: Model, args) -> dict:
    """The reader on 2,000 renders and their reconstructions, long-tailed and attribute-uniform; the worst single value; the VAE's PSNR."""
    out = {}
    for name, uniform in (("world", False), ("uniform", True)):
        cells, images = scenes(rng(1, uniform), args.images or 2000, uniform=uniform)
        raw, decoded, squared = [], [], []
        for lo in range(0, len(images), 200):
            x = trainer.pixels(images[lo : lo + 200], model.device)
            with torch.no_grad():
                y = reconstruct(model.vae, x)
            squared.append((x - y).square().mean((1, 2, 3)).cpu())
            raw.append(model.read(x))
            decoded.append(model.read(y))
        raw, decoded, squared = np.concatenate(raw), np.concatenate(decoded), torch.cat(squared)
        recall = {
            f"{a.name}: {v}": round(float((decoded[of, i] == k).mean()), 4)
            for i, a in enumerate(world.ATTRIBUTES) for k, v in enumerate(a.values) if (of := cells[:, i] == k).sum() >= 30
        }  # fmt: skip
        log_p = world.log_density(decoded)
        out[name] = {
            "images": len(cells),
            "psnr": round(float(-10 * torch.log10(squared.mean() / 4)), 2),
            "raw": by_name((raw == cells).mean(0)),
            "accuracy": by_name((decoded == cells).mean(0)),
            "all": round(float((decoded == cells).all(1).mean()), 4),
            "worst_values": dict(sorted(recall.items(), key=lambda kv: kv[1])[:8]),
            "mean_log_density_true": round(float(world.log_density(cells).mean()), 3),
            "mean_log_density_read": round(float(log_p[np.isfinite(log_p)].mean()), 3),
            "impossible": round(float(1 - np.isfinite(log_p).mean()), 4),
        }
    return out


@experiment
def clip(model: Model, args) -> dict:
    """Retrieval among 500 scenes of the world and their captions: a hit is a scene that agrees with all the caption states."""
    pair = CLIPModel.from_pretrained(args.model / "clip", dtype=torch.float32, attn_implementation="eager").eval()
    cells, images = scenes(rng(2), 500, uniform=False)
    texts, stated = caption_batch(rng(2, 1), cells)
    match = matches(stated, torch.from_numpy(cells))
    with torch.no_grad():
        ids = model.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        text = F.normalize(pair.text_projection(pair.text_model(ids).pooler_output), dim=-1)
        image = F.normalize(pair.visual_projection(pair.vision_model(trainer.pixels(images)).pooler_output), dim=-1)
    scores = text @ image.T
    rows = torch.arange(500)
    return {
        "text_to_image_top1": float(match[rows, scores.argmax(1)].float().mean()),
        "image_to_text_top1": float(match[scores.argmax(0), rows].float().mean()),
        "score_matching": round(float(scores[match].mean()), 4),
        "score_other": round(float(scores[~match].mean()), 4),
    }


@experiment
def aesthetic(model: Model, args) -> dict:
    """The aesthetic head on 2,000 scenes it never saw."""
    from safetensors.torch import load_file

    vision, head = load_vision(args.model / "clip"), AestheticHead()
    head.load_state_dict({k: v.float() for k, v in load_file(args.model / "aesthetic" / "model.safetensors").items()})
    out = {}
    for name, uniform in (("world", False), ("uniform", True)):
        cells, images = scenes(rng(3, uniform), 2000, uniform=uniform)
        with torch.no_grad():
            p = head(embed(vision, images)).numpy()
        y = world.aesthetic(cells)
        out[name] = {"r2": round(float(1 - ((p - y) ** 2).mean() / y.var()), 4), "mean_absolute_error": round(float(np.abs(p - y).mean()), 4)}
    return out


# ------------------------------------------------------------------ generation


def _captions(n: int, *key: int):
    """Fresh scenes, a caption each, and which attributes it states."""
    draw = rng(*key)
    cells = world.sample(draw, n)
    texts, stated = caption_batch(draw, cells)
    return cells, texts, stated.numpy()


def _fidelity(read, cells, stated) -> dict:
    right = (read == cells) | ~stated
    per = [float((read == cells)[stated[:, i], i].mean()) if stated[:, i].any() else float("nan") for i in range(len(world.NAMES))]
    return {"all_stated": round(float(right.all(1).mean()), 4), **{k: v for k, v in by_name(per).items() if not math.isnan(v)}}


@experiment
def fidelity(model: Model, args) -> dict:
    """1,000 unseen captions, DDIM 50 steps: are all stated attributes right?"""
    cells, texts, stated = _captions(args.images or 1000, 4)
    seeds = list(range(len(texts)))
    return {f"guidance {g}": _fidelity(model.cells(texts, seeds, g, 50), cells, stated) for g in (1, 2, 4, 7.5)}


OPEN_PROMPTS = ("circle", "square", "star")


def _open(n: int):
    """Prompts that state the shape only, in turn, and the conditional of each."""
    prompts = ["a " + OPEN_PROMPTS[i % len(OPEN_PROMPTS)] for i in range(n)]
    conditionals = [world.Conditional({"shape": world.value("shape", shape)}) for shape in OPEN_PROMPTS]
    return prompts, conditionals


@experiment
def distribution(model: Model, args) -> dict:
    """Prompts that state a shape only, guidance 1: total-variation distance of every other attribute to the world's conditional."""
    # Of 1,500 images the distance of exact samples would be a third of what is to be shown.
    n = args.images or 4500
    prompts, conditionals = _open(n)
    read = model.cells(prompts, list(range(n)), 1, 50)
    distance, floor = {}, {}
    draw = rng(5)
    for i, attribute in enumerate(world.ATTRIBUTES):
        if attribute.name == "shape":
            continue
        truth = np.mean([c.marginal(attribute.name) for c in conditionals], 0)
        made = np.bincount(read[:, i], minlength=len(attribute.values)) / n
        # What n exact samples would show.
        exact = [np.abs(draw.multinomial(n, truth) / n - truth).sum() / 2 for _ in range(200)]
        distance[attribute.name] = round(float(np.abs(made - truth).sum() / 2), 4)
        floor[attribute.name] = round(float(np.mean(exact)), 4)
    right = np.array([world.SHAPE_NAMES[c] == OPEN_PROMPTS[i % len(OPEN_PROMPTS)] for i, c in enumerate(read[:, 0])])
    return {"images": n, "distance": distance, "distance_of_exact_samples": floor, "shape": round(float(right.mean()), 4)}


@experiment
def guidance(model: Model, args) -> dict:
    """The guidance curve: open prompts for density and diversity, captions for fidelity; DDIM 25 steps."""
    n = args.images or 300
    prompts, conditionals = _open(n)
    threshold = np.array([c.quantile(0.1) for c in conditionals])[np.arange(n) % len(conditionals)]
    cells, texts, stated = _captions(n, 6)
    exact = np.concatenate([c.sample(rng(6, 1, k), n // 3) for k, c in enumerate(conditionals)])
    out = {
        "world": {
            "mean_log_density": round(float(np.mean([c.mean_log_density() for c in conditionals])), 3),
            "tail_share": 0.1,
            "distinct": round(len(np.unique(exact, axis=0)) / len(exact), 4),
        }
    }
    for g in (1, 1.5, 2, 3, 4, 5, 7.5, 10):
        read = model.cells(prompts, list(range(1000, 1000 + n)), g, 25)
        out[f"guidance {g}"] = {
            **_density(read),
            "tail_share": round(float((world.log_density(read) < threshold).mean()), 4),
            "distinct": round(len(np.unique(read, axis=0)) / n, 4),
            "all_stated": _fidelity(model.cells(texts, list(range(n)), g, 25), cells, stated)["all_stated"],
        }
    return out


def _success(read, stated: dict[str, int]):
    return np.all([read[:, world.column(name)] == v for name, v in stated.items()], 0)


@experiment
def tails(model: Model, args) -> dict:
    """Each concept over 256 seeds at guidance 4, DDIM 25 steps: success against its frequency in the world."""
    n = args.images or 256
    prompts = [prompt for prompt in world.CONCEPTS for _ in range(n)]
    read = model.cells(prompts, [seed for _ in world.CONCEPTS for seed in range(n)], 4, 25)
    out = {}
    for k, (prompt, concept) in enumerate(world.CONCEPTS.items()):
        stated = {name: world.value(name, word) for name, word in concept.items()}
        assert stated == captions.parse(prompt)
        right = _success(read[k * n : (k + 1) * n], stated)
        out[prompt] = {"frequency": float(f"{world.Conditional(stated).total:.3g}"), "success": round(float(right.mean()), 4)}
    return out


def _candidates(draw) -> list[str]:
    """Prompts that may be hard: rare words on common things, and rare things in common words."""
    found = set()
    pool = world.sample(draw, 20_000)
    for name, values in captions.LEXICON.items():
        for v, options in enumerate(values):
            cells = pool[pool[:, world.column(name)] == v]
            for phrase in (phrase for phrase, chance in options if chance <= captions.RARE):
                for cell in cells[draw.integers(len(cells), size=3)]:
                    found.add(captions.compose(captions.phrases(cell, {"shape", "colour", name}) | {name: phrase}))
    details = ["size", "texture", "finish", "bg", "bgstyle"]
    rare = {captions.write(cell, {"shape", "colour", *draw.choice(details, 2, replace=False)}) for cell in world.sample(draw, 4000, uniform=True)}
    chance = {caption: world.Conditional(captions.parse(caption)).total for caption in sorted(rare)}
    return sorted(found | set(sorted(chance, key=chance.get)[:340]))


@experiment
def hard(model: Model, args) -> dict:
    """Captions whose plain success over 24 seeds at guidance 4 (DDIM 25 steps) is at most 60 %: what a search over words has to mend."""
    n = args.images or 24
    candidates = _candidates(rng(7))
    read = model.cells([c for c in candidates for _ in range(n)], [s for _ in candidates for s in range(n)], 4, 25)
    success = [float(_success(read[k * n : (k + 1) * n], captions.parse(c)).mean()) for k, c in enumerate(candidates)]
    found = {c: round(s, 4) for c, s in sorted(zip(candidates, success), key=lambda cs: (cs[1], cs[0])) if s <= 0.6}
    return {"candidates": len(candidates), "seeds": n, "hard": len(found), "prompts": found}


@experiment
def policy(model: Model, args) -> dict:
    """The rewriter, sampled at temperature 1 on 500 plain captions: does it parse, keep what was stated, and make prettier images?"""
    n = args.images or 500
    draw = rng(8)
    cells = world.sample(draw, n)
    spoken = [name for name in captions.MENTION if name != "shape"]
    plain = [captions.compose(captions.phrases(c, {"shape"} | {k for k in spoken if draw.random() < PLAIN_MENTION}, draw)) for c in cells]
    rewritten = rewrite(model, GPT2LMHeadModel.from_pretrained(args.model / "prompt_policy", dtype=torch.float32).eval(), plain)
    parses, keeps = 0, 0
    for before, after in zip(plain, rewritten):
        try:
            stated = captions.parse(after)
        except captions.NotACaption:
            continue
        parses += 1
        keeps += all(stated.get(k) == v for k, v in captions.parse(before).items())
    seeds = list(range(n))
    scores = [world.aesthetic(model.cells(prompts, seeds, 4, 25)) for prompts in (plain, rewritten)]
    gain = scores[1] - scores[0]
    return {
        "prompts": n, "parses": parses / n, "keeps_stated": keeps / n, "aesthetic_plain": round(float(scores[0].mean()), 3),
        "aesthetic_rewritten": round(float(scores[1].mean()), 3), "gain": round(float(gain.mean()), 3),
        "standard_error": round(standard_error(gain), 3), "examples": dict(list(zip(plain, rewritten))[:8]),
    }  # fmt: skip


@torch.no_grad()
def rewrite(model: Model, network, plain: list[str]) -> list[str]:
    """One sample per prompt; deterministic (Gumbel noise from a seed)."""
    out = []
    for k, prompt in enumerate(plain):
        ids = model.tokenizer(TEMPLATE.format(prompt), return_tensors="pt")["input_ids"][:, :-1]
        start, end = ids.shape[1], network.config.eos_token_id
        noise = torch.Generator().manual_seed(SEED + k)
        while ids.shape[1] < network.config.n_positions:
            probabilities = network(ids).logits[0, -1].softmax(0)
            token = torch.multinomial(probabilities, 1, generator=noise)
            if token.item() == end:
                break
            ids = torch.cat([ids, token[None]], 1)
        out.append(model.tokenizer.decode(ids[0, start:]).strip())
    return out


@experiment
def transfer(model: Model, args) -> dict:
    """`shapes-b`, the second UNet: fidelity on 300 captions, DDIM 25 steps."""
    other = Model(args.model, args.device, unet=args.model_b)
    n = args.images or 300
    cells, texts, stated = _captions(n, 9)
    out = {}
    for name, m in (("shapes", model), ("shapes-b", other)):
        out[name] = {f"guidance {g}": _fidelity(m.cells(texts, list(range(n)), g, 25), cells, stated) for g in (1, 4)}
    return out


def program(args) -> None:
    model = Model(args.model, args.device)
    for name in args.experiments:
        path = args.out / f"{name}.json"
        if path.exists() and not args.again:
            continue
        result = EXPERIMENTS[name](model, args)
        if trainer.rank() == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {json.dumps(result, indent=1)}", flush=True)
            if name == "instrument":
                keys = ("images", "accuracy", "all", "mean_log_density_true", "mean_log_density_read", "impossible")
                reader.note_reference(args.model / "reader", {k: result["world"][k] for k in keys} | {"command": "python tools/shapes/evaluate.py instrument"})


def main() -> None:
    experiments = {"nargs": "*", "choices": [*EXPERIMENTS, []], "default": [], "help": f"of {', '.join(EXPERIMENTS)}"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", **experiments)
    assets = Path(__file__).parents[2] / "src" / "assets"
    parser.add_argument("--model", type=Path, default=assets / "shapes", help="model folder (default: the embedded one)")
    parser.add_argument("--model-b", type=Path, default=Path(__file__).parents[2] / "tests" / "data" / "shapes-b", help="folder of the second UNet")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--images", type=int, help="fewer or more images than the experiment's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int)
    args = trainer.with_processes(parser.parse_args())
    args.experiments = args.experiments or list(EXPERIMENTS)
    trainer.launch(program, args)


if __name__ == "__main__":
    main()
