"""The trial behind "one object per scene": trains a copy of the UNet on, for one scene in eight, two objects, and measures both kinds.

A scene of two has a small object on either side of a flat ground of one colour, and the caption "a red star and a blue ring". Writes
results/two_objects.json; the shipped model is left alone.
"""

import json

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

import captions
import evaluate
import make_data
import render
import sampling
import tokenizer
import train_unet
import trainer
import world

PHASE = train_unet.Phase(
    trainer.Recipe("two-objects", steps=600, batch=96, learning_rate=5e-4, seed=31, ema=0.998), coarse=((4, 2.0), (16, 8.0))
)
SHARE = 1 / 8
SCENES = 8192
# What the caption states of each object.
SHAPE, COLOUR = world.column("shape"), world.column("colour")
MIDDLE = render.IMAGE_SIZE // 2


def pairs(rng: np.random.Generator, n: int) -> np.ndarray:
    """Cells `[n, 2, 10]`: the left and the right object of a scene; plain but for shape and colour, on the first one's ground."""
    left, right = world.sample(rng, n), world.sample(rng, n)
    for cells, side in ((left, "left"), (right, "right")):
        cells[:, world.column("position")] = world.value("position", side)
        cells[:, world.column("size")] = world.value("size", "small")
        for name, word in (("texture", "plain"), ("finish", "flat"), ("bgstyle", "flat"), ("tilt", "upright"), ("frame", "none")):
            cells[:, world.column(name)] = world.value(name, word)
    right[:, world.column("bg")] = left[:, world.column("bg")]
    return np.stack([left, right], 1)


def draw(rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """Images `[n, 64, 64, 3]` of pairs: the left half of the one scene, the right half of the other."""
    left, right = (render.render(cells[:, k], render.sample_nuisances(rng, len(cells))) for k in (0, 1))
    left[:, :, MIDDLE:] = right[:, :, MIDDLE:]
    return left


def caption(pair: np.ndarray) -> str:
    return " and ".join(captions.write(cell, {"shape", "colour"}) for cell in pair)


def seen_apart(images: torch.Tensor) -> list[torch.Tensor]:
    """Each object alone, as the reader knows scenes: the other half filled with the ground of its outer edge."""
    halves = []
    for near, far in ((slice(0, MIDDLE), slice(MIDDLE, None)), (slice(MIDDLE, None), slice(0, MIDDLE))):
        alone = images.clone()
        edge = 0 if near.start == 0 else -1
        alone[..., far] = images[..., edge].mean(2)[..., None, None]
        halves.append(alone)
    return halves


def fidelity(model: sampling.Model, tests: np.ndarray) -> dict:
    """Prompts of two at guidance 4, DDIM 25 steps, and 200 ordinary captions for comparison."""
    prompts = [caption(pair) for pair in tests]
    reads = []
    for lo in range(0, len(prompts), sampling.BATCH):
        seeds = list(range(lo, min(lo + sampling.BATCH, len(prompts))))
        images = model.generate(prompts[lo : lo + sampling.BATCH], seeds, 4, 25)
        reads.append(np.stack([model.read(half) for half in seen_apart(images)], 1))
    read = np.concatenate(reads)
    right = (read == tests)[:, :, [SHAPE, COLOUR]].all(2)
    swapped = (read == tests[:, ::-1])[:, :, [SHAPE, COLOUR]].all((1, 2))
    cells, texts, stated = evaluate._captions(200, 31)
    one = evaluate._fidelity(model.cells(texts, list(range(200)), 4, 25), cells, stated)
    return {"both_right": round(float(right.all(1).mean()), 3), "an_object_right": round(float(right.mean()), 3),
            "swapped": round(float(swapped.mean()), 3), "one_object_all_stated": one["all_stated"]}  # fmt: skip


def program(args) -> None:
    folder = args.work / "model"
    encode = tokenizer.WordEncoder(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", attn_implementation="eager").eval()
    cells, latents = make_data.load(args.work)
    model = sampling.Model(folder)
    rng = np.random.default_rng(PHASE.recipe.seed)
    two = pairs(rng, SCENES)
    images = draw(rng, two)
    with torch.no_grad(), trainer.autocast("cpu"):
        encoded = [model.vae.encode(trainer.pixels(images[lo : lo + 128])).latent_dist.mean for lo in range(0, SCENES, 128)]
    two_latents = torch.cat(encoded).float() * model.vae.config.scaling_factor
    alphas = train_unet.scheduler().alphas_cumprod
    unet = train_unet.build(train_unet.VARIANTS["a"][0])
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())

    def loss(draw):
        texts, rows = [], []
        for _ in range(draw.batch):
            if draw.rng.random() < SHARE:
                row = draw.rng.integers(SCENES)
                texts.append(caption(two[row]))
                rows.append(two_latents[row])
            else:
                row = draw.rng.integers(len(cells))
                texts.append(captions.write(cells[row], captions.mention(draw.rng), draw.rng))
                rows.append(latents[row].float())
            if draw.rng.random() < train_unet.CAPTION_DROPOUT:
                texts[-1] = ""
        with torch.no_grad(), trainer.autocast("cpu"):
            context = text(torch.from_numpy(encode(texts))).last_hidden_state
        return train_unet.denoising_loss(unet, torch.stack(rows), context, alphas, PHASE)

    test = pairs(np.random.default_rng(evaluate.SEED), 200)
    real = np.stack([model.read(half) for half in seen_apart(trainer.pixels(draw(rng, test)))], 1)
    out = {"reader_on_real_scenes": round(float((real == test)[:, :, [SHAPE, COLOUR]].all((1, 2)).mean()), 3), "before": fidelity(model, test)}
    trainer.train(PHASE.recipe, unet, loss, args)
    model.unet = unet
    out["after"] = fidelity(model, test)
    if trainer.rank() == 0:
        (evaluate.RESULTS / "two_objects.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    trainer.launch(program, trainer.arguments(__doc__.splitlines()[0]))
