"""SeedSelect (Samuel et al., AAAI 2024, arXiv 2304.14530) by torch autograd: the loop of the authors' code, on networks of diffusers and
transformers. `dump_seedselect.py` runs it and lists the settings of a `case`.

Only the starting noise z learns. It is sampled to states s_1 .. s_T; each of the last three, clean or not, is decoded and seen by CLIP:
D(s) = 1 - cos(CLIP(decode(s)), c), with c the normalised mean of the references' features; u is the mean of their clean latents.
L = semantic * (0.05 D(s_{T-2}) + 0.25 D(s_{T-1}) + 0.7 D(s_T)) + appearance * mean (s_T - u)^2 descends by AdamW in z.
rho * (r^2 / 2 - (d - 1) ln r) of the length r of z, d numbers, may be added: the negative logarithm of the chi law of r (Samuel et al. 2023,
arXiv 2306.08687) relative to its least value. Runs shorter than three steps have fewer states, whose weights again sum to 1.

Mode `released`: references are shown to CLIP and the VAE as Pillow resizes them, u is a mean of samples, and generated images are
resized without antialias. Mode `default`: one antialiased path for all, in floats, and u is a mean of means.
"""

import json
import os
from collections import namedtuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPVisionModelWithProjection

import dump
import minority
import models
from dump_models import preprocess

# Inputs of the networks, per reference: `clip` [k, 3, S, S], normalised, and `vae` [k, 3, H, W] in [-1, 1].
Shown = namedtuple("Shown", "clip vae")


class Clip:
    """A CLIP image tower, and how images are shown to it."""

    def __init__(self, tower, statistics):
        self.tower, self.statistics = tower.eval().requires_grad_(False), statistics
        self.side, self.dtype = tower.config.image_size, tower.dtype

    @staticmethod
    def open(folder, dtype=torch.float32):
        config = CLIPConfig.from_pretrained(folder).vision_config
        weights = {}
        for file in filter(lambda file: file.endswith(".safetensors") and file != "golden.safetensors", os.listdir(folder)):
            weights |= load_file(os.path.join(folder, file))
        with models.quiet():
            tower = CLIPVisionModelWithProjection._from_config(config, attn_implementation="sdpa")
        missing, _ = tower.load_state_dict(weights, strict=False)
        assert all(key.endswith("position_ids") for key in missing), missing
        own, statistics = os.path.join(folder, "preprocessor_config.json"), {}
        if os.path.exists(own):
            with open(own) as file:
                numbers = json.load(file)
            statistics = {"mean": numbers["image_mean"], "std": numbers["image_std"]}
        return Clip(tower.to(dtype), statistics)

    def normalise(self, image):
        """Of a square image in [-1, 1]."""
        return preprocess(image, "clip", self.side, **self.statistics)

    def features(self, shown):
        return self.tower(pixel_values=shown).image_embeds

    def see(self, image, mode):
        """Features of generated images in [-1, 1]."""
        shown = preprocess(image, "seedselect" if mode == "released" else "clip", self.side, **self.statistics)
        return self.features(shown)


def tensor(pixels):
    """uint8 [H, W, 3] to [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


def pillow(image, size, crop=None):
    """Pillow's bicubic, with antialias, along rows and then along columns, clamped and rounded to bytes after each, as Pillow 8 did it in one
    call (later versions choose the order); and torchvision's crop of the middle."""
    image = image.resize((size[0], image.height), Image.BICUBIC).resize(size, Image.BICUBIC)
    if crop is None:
        return image
    left, top = (round((side - crop) / 2) for side in size)
    return image.crop((left, top, left + crop, top + crop))


def cover(image, height, width):
    """[1, 3, h, w] resized with antialias to where it just covers the frame, within [-1, 1], then its middle."""
    h, w = image.shape[2:]
    size = [height, w * height // h] if w * height >= h * width else [h * width // w, width]
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, :, top : top + height, left : left + width]


def show(images, mode, clip, height, width):
    """Pillow images as the two networks get them; pixels of the latents' images are given."""
    side = clip.side
    if mode == "released":
        sizes = [(side, side * i.height // i.width) if i.width <= i.height else (side * i.width // i.height, side) for i in images]
        squares = [tensor(pillow(image, size, side)) for image, size in zip(images, sizes)]
        frames = [tensor(pillow(image, (width, height))) for image in images]
    else:
        squares = [cover(tensor(image), side, side) for image in images]
        frames = [cover(tensor(image), height, width) for image in images]
    return Shown(clip.normalise(torch.cat(squares).to(clip.dtype)), torch.cat(frames).to(clip.dtype))


@torch.no_grad()
def targets(model, clip, shown, mode, noise):
    """What the loop is drawn to, and what it was made of: `centroid` [P] and `latents` [4, h, w] from a row per reference."""
    features = clip.features(shown.clip)
    posteriors = [model.pipe.vae.encode(frame[None]).latent_dist for frame in shown.vae]
    mean, std = (torch.cat([getattr(p, what) for p in posteriors]) for what in ("mean", "std"))
    latents = mean + std * noise if mode == "released" else mean
    return {
        "features": features, "centroid": F.normalize(features.mean(0), dim=0), "mean": mean, "std": std,
        "latents": model.pipe.vae.config.scaling_factor * latents.mean(0),
    }  # fmt: skip


class Sampler:
    """A scheduler of diffusers as a function of the noise. States are at the scale the UNet sees."""

    def __init__(self, config, case, dtype):
        name, options = dump.SAMPLERS[case["sampler"]]
        config = {k: v for k, v in config.items() if k != "use_karras_sigmas"}
        with models.quiet():
            self.scheduler = getattr(diffusers, name).from_config(config, timestep_spacing=case["spacing"], **options)
        self.steps, self.dtype = case["steps"], dtype

    def states(self, predict, z):
        """s_1 .. s_T; `predict(x, t)` is the network's output under guidance."""
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps)
        for table in filter(lambda table: hasattr(scheduler, table), ("sigmas", "alphas_cumprod", "final_alpha_cumprod")):
            setattr(scheduler, table, getattr(scheduler, table).to(self.dtype))
        x, states = z * scheduler.init_noise_sigma, []
        for i, t in enumerate(scheduler.timesteps):
            prediction = predict(scheduler.scale_model_input(x, t), t)
            x = self.step(prediction, t, x)
            # Euler's own states have the noise of their level added to clean latents, not mixed with them.
            is_added = isinstance(scheduler, diffusers.EulerDiscreteScheduler)
            states.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5 if is_added else x)
        return states

    def step(self, prediction, t, x):
        """Schedulers round to `torch.float32` whatever they are given."""
        single = torch.float32
        try:
            torch.float32 = self.dtype
            return self.scheduler.step(prediction, t, x).prev_sample
        finally:
            torch.float32 = single


def semantic_weights(case):
    """Of the last states, first to last."""
    kept = case["state_weights"][-min(case["steps"], 3) :]
    return [weight / sum(kept) for weight in kept]


def prior(z, rho):
    r2, d = (z**2).sum(), z.numel()
    q = r2 / (d - 1)
    return rho * (d - 1) / 2 * (q - 1 - q.log())


def losses(case, sampler, predict, decode, clip, target, z):
    """The terms of L, and L; `decode(s)` gives images, nominally in [-1, 1]."""
    states = sampler.states(predict, z)
    weights = semantic_weights(case)
    distances = []
    for state in states[-len(weights) :]:
        seen = clip.see(decode(state), case["mode"])
        distances.append(1 - F.cosine_similarity(seen[0], target["centroid"], dim=0))
    appearance = ((states[-1][0] - target["latents"]) ** 2).mean()
    semantic = sum(weight * distance for weight, distance in zip(weights, distances))
    penalty = prior(z, case["rho"])
    total = case["semantic"] * semantic + case["appearance"] * appearance + penalty
    return {"loss": total, "distances": torch.stack(distances), "appearance": appearance, "prior": penalty, "final": states[-1]}


def select(case, sampler, predict, decode, clip, target, z):
    """Runs the iterations from noise `z` [1, 4, h, w]: what each found before its step, its gradient, and the noise after it."""
    z = z.clone().requires_grad_()
    optimiser = torch.optim.AdamW([z], lr=case["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=case["weight_decay"])
    log = []
    for iteration in range(case["iterations"]):
        if iteration == case["lr_drop_at"]:
            optimiser.param_groups[0]["lr"] = case["lr"] / 10
        found = losses(case, sampler, predict, decode, clip, target, z)
        norm = z.detach().norm()
        (z.grad,) = torch.autograd.grad(found["loss"], z)
        optimiser.step()
        found = {key: value.detach() for key, value in found.items()}
        log.append(found | {"norm": norm, "gradient": z.grad, "z": z.detach().clone()})
    return log


class Networks:
    """`predict` and `decode` of a pipeline under a case's prompt and guidance."""

    def __init__(self, model, case):
        self.model, self.case = model, case
        with torch.no_grad():
            self.condition = model.encode([case["prompt"]])
            negatives = None if case["negative"] is None else [case["negative"]]
            self.null = model.encode_negatives(negatives, self.condition)

    def predict(self, x, t):
        return self.model.predict(x, t, self.condition, self.null, self.case["guidance"])

    def decode(self, state):
        vae = self.model.pipe.vae
        return vae.decode(state / vae.config.scaling_factor).sample


def open_model(name, clip, dtype=torch.float32):
    """A pipeline and a CLIP of tests/data, or the embedded ones."""
    folder = os.path.join(minority.SHAPES if clip == "shapes" else os.path.join(minority.DATA, clip), "clip")
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    return minority.Model(name, dtype), Clip.open(folder, dtype)
