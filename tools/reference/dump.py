"""Writes tests/data: the tiny pipelines, what diffusers computes with them (golden.safetensors + golden.json), the single-file plans and
the key layouts of the full-size checkpoints. Deterministic: the same versions write the same bytes.

Everything is computed by the real diffusers pipelines in float32 from the stored weights. Layouts are NCHW and [batch, token, channel].
`golden.json` says how each tensor came about; tests/data/README.md lists the names.

    python dump.py --tokenizer TOKENIZER             the tiny pipelines
    python dump.py --model MODEL --name shapes       only golden files, of an existing folder
"""

import argparse
import json
import os
import shutil

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral
from safetensors.torch import load_file, save_file

import models
import single_file
import tiny

PROMPT = "a red star on a dark blue background"
NEGATIVE = "a small green circle"
STEPS, GUIDANCE = 4, 7.5
SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
SPACINGS = ("leading", "linspace", "trailing")
TIMESTEPS = (999.0, 37.0, 420.5)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(folder):
    with models.quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_sampler(pipe, sampler, spacing):
    name, options = SAMPLERS[sampler]
    config = {k: v for k, v in pipe.original_scheduler.items() if k != "use_karras_sigmas"}
    with models.quiet():
        pipe.scheduler = getattr(diffusers, name).from_config(config, timestep_spacing=spacing, **options)


class Given:
    """Stands in for diffusers' noise source: the ancestral sampler gets the stored noises, in order."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def __call__(self, shape, **_):
        return next(self.noises).reshape(shape)


def run(pipe, noise, ancestral_noise=(), steps=STEPS, guidance=GUIDANCE, negative=None):
    """Final latents of a whole run of the pipeline from unit noise."""
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[2:])
    given = Given(ancestral_noise)
    original, ancestral.randn_tensor = ancestral.randn_tensor, given
    # the pipelines only take sizes in multiples of 8, which say nothing for a VAE of factor 2 or 4; the latents decide
    pipe.check_inputs = lambda *_, **__: None
    try:
        final = pipe(
            prompt=PROMPT, negative_prompt=negative, latents=noise.clone(), height=height, width=width, num_inference_steps=steps,
            guidance_scale=guidance, output_type="latent",
        ).images  # fmt: skip
        assert next(given.noises, None) is None, "not every injected noise was used"
        return final
    finally:
        ancestral.randn_tensor = original


def encode(pipe, prompt):
    """Token ids, and what the pipeline feeds its UNet: context, and the pooled vector (of the text tower itself outside SDXL)."""
    out = {}
    for suffix in ("", "_2"):
        tokenizer = getattr(pipe, "tokenizer" + suffix, None)
        if tokenizer is not None:
            ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
            out["ids" + suffix] = ids.to(torch.int32)
    if "ids_2" in out:
        context, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    else:
        context = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        pooled = pipe.text_encoder(out["ids"].long()).pooler_output
    return out | {"context": context, "pooled": pooled}


def unet_call(pipe, dtype, latents, timestep, context, pooled=None, time_ids=None):
    unet = pipe.unet.to(dtype)
    added = None if time_ids is None else {"text_embeds": pooled.to(dtype), "time_ids": time_ids.to(dtype)}
    out = unet(latents.to(dtype), timestep, context.to(dtype), added_cond_kwargs=added).sample
    pipe.unet.to(torch.float32)
    return out


@torch.no_grad()
def golden(pipe, seed, size):
    """All tensors of one pipeline and the index that explains them."""
    tensors, cases = {}, []
    xl = hasattr(pipe, "text_encoder_2")
    factor = pipe.vae_scale_factor
    pipe.original_scheduler = dict(pipe.scheduler.config)

    def put(name, tensor, **how):
        tensor = tensor.contiguous()
        assert tensor.isfinite().all(), name
        tensors[name] = tensor
        cases.append({"name": name, "shape": list(tensor.shape), "dtype": single_file.NAMES[tensor.dtype], **how})

    texts = {"prompt": PROMPT, "negative": NEGATIVE, "empty": "", "marks": "WOW!  a red star, 2 stars!!"}
    encoded = {}
    for key, text in texts.items():
        encoded[key] = encode(pipe, text)
        for kind, tensor in encoded[key].items():
            if not key == "marks" or kind.startswith("ids"):
                put(f"{kind}/{key}", tensor, text=text)

    # UNet: two different conditions in one batch, three times; once not square
    context = torch.cat([encoded["prompt"]["context"], encoded["negative"]["context"]])
    added = {}
    if xl:
        added["pooled"] = torch.cat([encoded["prompt"]["pooled"], encoded["negative"]["pooled"]])
        added["time_ids"] = torch.tensor([[size * factor] * 2 + [0, 0] + [size * factor] * 2, [40.0, 24, 3, 5, 32, 16]], dtype=torch.float32)
    latents = normal(seed + 1, 2, 4, size, size)
    put("unet/latents", latents, seed=seed + 1)
    put("unet/context", context)
    for name, tensor in added.items():
        put(f"unet/{name}", tensor)
    outputs = []
    for t in TIMESTEPS:
        outputs.append(unet_call(pipe, torch.float32, latents, t, context, **added))
        put(f"unet/out_t{t:g}", outputs[-1], timestep=t)
    put("unet/out_t999_f64", unet_call(pipe, torch.float64, latents, 999.0, context, **added), timestep=999.0)
    wide = normal(seed + 2, 1, 4, size, size + size // 2)
    put("unet_wide/latents", wide, seed=seed + 2)
    put("unet_wide/out_t500", unet_call(pipe, torch.float32, wide, 500.0, context[:1], **{k: v[:1] for k, v in added.items()}), timestep=500.0)

    # VAE, both ways; latents at the sampler's scale; once not square
    scale = pipe.vae.config.scaling_factor
    for name, wider in (("vae", 0), ("vae_wide", size // 2)):
        z = normal(seed + 3, 1, 4, size, size + wider)
        put(f"{name}/latents", z, seed=seed + 3)
        put(f"{name}/image", pipe.vae.decode(z / scale).sample, note="not clamped")
        image = normal(seed + 4, 1, 3, size * factor, (size + wider) * factor).clamp(-2, 2) / 2
        put(f"{name}/input", image, seed=seed + 4)
        posterior = pipe.vae.encode(image).latent_dist
        put(f"{name}/mean", posterior.mean, note="not scaled")
        put(f"{name}/logvar", posterior.logvar)

    # whole runs
    noise, injected = normal(seed + 5, 1, 4, size, size), normal(seed + 6, STEPS, 1, 4, size, size)
    put("sample/noise", noise, seed=seed + 5)
    put("sample/ancestral_noise", injected, seed=seed + 6)
    finals = {}
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            set_sampler(pipe, sampler, spacing)
            how = dict(sampler=sampler, spacing=spacing, steps=STEPS, guidance=GUIDANCE, prompt=PROMPT, negative="")
            finals[sampler, spacing] = run(pipe, noise, injected if sampler == "euler-a" else ())
            how |= {"timesteps": [float(t) for t in pipe.scheduler.timesteps], "init_noise_sigma": float(pipe.scheduler.init_noise_sigma)}
            put(f"sample/{sampler}-{spacing}", finals[sampler, spacing], **how)
    set_sampler(pipe, "ddim", "leading")
    how = dict(sampler="ddim", spacing="leading", steps=STEPS, prompt=PROMPT)
    put("sample/ddim-negative", run(pipe, noise, negative=NEGATIVE), **how, guidance=GUIDANCE, negative=NEGATIVE)
    put("sample/ddim-guidance-1", run(pipe, noise, guidance=1.0), **how, guidance=1.0, negative="")
    ten = run(pipe, noise, steps=10)
    put("sample/ddim-10", ten, **{**how, "steps": 10}, guidance=GUIDANCE, negative="")
    put("sample/ddim-10-image", pipe.vae.decode(ten / scale).sample, note="not clamped")
    sanity(tensors, outputs, finals)
    return tensors, cases


def sanity(tensors, outputs, finals):
    """A golden file must be able to fail: outputs vary, and depend on the timestep, the guidance and the text."""

    def differ(a, b, least):
        gap = ((a - b).norm() / b.norm()).item()
        assert gap > least, gap
        return gap

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 8:
            assert tensor.std() > 1e-3, name
    report = {
        "timestep": differ(outputs[0], outputs[1], 0.02),
        "fraction of a timestep": differ(outputs[1], outputs[2], 0.02),
        "guidance": differ(tensors["sample/ddim-guidance-1"], finals["ddim", "leading"], 0.02),
        "negative": differ(tensors["sample/ddim-negative"], finals["ddim", "leading"], 0.005),
        "text": differ(tensors["context/prompt"], tensors["context/negative"], 0.02),
        "f32 against f64": ((outputs[0] - tensors["unet/out_t999_f64"]).norm() / outputs[0].norm()).item(),
        "std of the UNet": outputs[0].std().item(),
        "std of final latents": max(t.std().item() for t in finals.values()),
        "std of the image": tensors["vae/image"].std().item(),
    }
    print("  " + ", ".join(f"{k} {v:.2g}" for k, v in report.items()))
    values = list(finals.items())
    for i, (a, x) in enumerate(values):
        for b, y in values[:i]:
            if a[0] == b[0] == "dpmpp-2m-karras":  # its sigmas do not depend on the spacing
                assert torch.equal(x, y)
            else:
                assert differ(x, y, 0) > 3e-4, (a, b)


@torch.no_grad()
def lightning(pipe, folder):
    """The golden result of tiny-sdxl with the other UNet: 4 Euler steps, trailing, guidance 1."""
    path = os.path.join(folder, "lightning.tmp")
    tiny.write_lightning(folder, path)
    pipe.unet.load_state_dict(load_file(path))
    os.remove(path)
    pipe.unet.to(torch.float32)
    set_sampler(pipe, "euler", "trailing")
    noise = normal(tiny.SEEDS["tiny-sdxl"] * 100 + 5, 1, 4, 8, 8)
    return run(pipe, noise, guidance=1.0), [float(t) for t in pipe.scheduler.timesteps]


def write(folder, tensors, cases):
    save_file(tensors, os.path.join(folder, "golden.safetensors"))
    versions = {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__}
    rows = ",\n".join("  " + json.dumps(case) for case in cases)
    with open(os.path.join(folder, "golden.json"), "w") as file:
        file.write(f'{{"versions": {json.dumps(versions)}, "cases": [\n{rows}\n]}}\n')


def write_rows(path, rows):
    """A plan or layout, one tensor per line."""
    with open(path, "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_layouts(folder):
    """Names and shapes of the full-size published checkpoints, from which a loader must tell what it has been given."""
    os.makedirs(folder, exist_ok=True)
    for name, spec in models.PUBLISHED.items():
        parts = [*models.text_folders(spec), "unet", "vae"]
        shapes, configs = {}, {}
        for part in parts:
            module = models.component(spec, part)
            shapes[part] = {key: tuple(value.shape) for key, value in module.state_dict().items()}
            configs[part] = module.config.to_dict() if part.startswith("text") else dict(module.config)
        rows = single_file.make_plan(shapes, {part: "F16" for part in parts}, configs)
        write_rows(os.path.join(folder, f"{name}.json"), [[key, dtype, shape] for key, _, dtype, shape, _ in rows])


def main():
    parser = argparse.ArgumentParser(description="write the golden files of tests/data")
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "../../tests/data"))
    parser.add_argument("--tokenizer", help="a CLIP tokenizer folder with 819 ids, at most 32 long (that of tests/data/tiny-sd1)")
    parser.add_argument("--model", help="dump golden files of this diffusers folder instead of making tiny ones")
    parser.add_argument("--name", default="shapes", help="folder under --out for --model")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if args.model:
        folder = os.path.join(args.out, args.name)
        os.makedirs(folder, exist_ok=True)
        pipe = load(args.model)
        print(args.name)
        write(folder, *golden(pipe, 900, pipe.unet.config.sample_size))
        return
    if not args.tokenizer:
        parser.error("--tokenizer is needed to make the tiny pipelines")
    write_layouts(os.path.join(args.out, "layouts"))
    for name in tiny.TINY:
        folder = os.path.join(args.out, name)
        shutil.rmtree(folder, ignore_errors=True)
        tiny.write(name, folder, args.tokenizer)
        rows, tensors, configs = single_file.plan(folder)
        single_file.check(rows, tensors, configs)
        write_rows(os.path.join(folder, "single_file.json"), rows)
        pipe = load(folder)
        print(name)
        values, cases = golden(pipe, tiny.SEEDS[name] * 100, 8)
        if name == "tiny-sdxl":
            values["sample/lightning"], timesteps = lightning(pipe, folder)
            how = dict(sampler="euler", spacing="trailing", steps=4, guidance=1.0, prompt=PROMPT, negative="", timesteps=timesteps)
            cases.append({"name": "sample/lightning", "shape": [1, 4, 8, 8], "dtype": "F32", **how, "unet": "unet/ with every tensor's elements in reverse order"})
        write(folder, values, cases)


if __name__ == "__main__":
    main()
