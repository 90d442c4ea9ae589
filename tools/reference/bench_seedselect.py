"""Times one iteration of SeedSelect (forward, backward and update) by diffusers on the CPU, as the authors' code runs it: float32, the UNet
checkpointed block by block, prompt and negative as one batch of 2. Prints seconds and the peak resident memory of the process.

    python bench_seedselect.py --model DIR/sd15 [--size 256] [--steps 10,20] [--guidance 7.5] [--threads 2] [--json OUT.json]

The model is an SD 1.5 diffusers folder (`parity.py sd15 --phases build` makes one); the CLIP is an image tower as large as ViT-L/14 with
random weights, or that of `--clip` (a folder as tests/data/tiny-clip-h). Each number of steps runs in a process of its own, for its peak.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

VIT_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=14,
    projection_dim=768, hidden_act="quick_gelu",
)  # fmt: skip


def random_clip(seedselect, torch):
    """A tower with ViT-L/14's sizes."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    return seedselect.Clip(CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L)), {})


def measure(args, steps):
    """Seconds of each iteration after the first, which warms up, and peak bytes."""
    import diffusers
    import torch

    import seedselect

    torch.set_num_threads(args.threads)
    with seedselect.models.quiet():
        unet = diffusers.UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", dtype=torch.float32).requires_grad_(False)
        vae = diffusers.AutoencoderKL.from_pretrained(args.model, subfolder="vae", dtype=torch.float32).eval().requires_grad_(False)
        scheduler = diffusers.DDIMScheduler.from_pretrained(args.model, subfolder="scheduler")
    # diffusers checkpoints in training only; there is no dropout
    unet.train()
    unet.enable_gradient_checkpointing()
    clip = seedselect.Clip.open(args.clip) if args.clip else random_clip(seedselect, torch)
    side = args.size // 2 ** (len(vae.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    context = normal(2, args.tokens, unet.config.cross_attention_dim)

    def predict(x, t):
        if args.guidance == 1:
            return unet(x, t, context[1:]).sample
        without, given = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        return without + args.guidance * (given - without)

    decode = lambda state: vae.decode(state / vae.config.scaling_factor).sample
    case = {"mode": "released", "sampler": "ddim", "spacing": "leading", "steps": steps, "semantic": 10.0, "appearance": 1.0, "rho": 0.0}
    case |= {"state_weights": [0.05, 0.25, 0.7], "lr": 0.1, "lr_drop_at": 3, "weight_decay": 0.01, "iterations": 1}
    sampler = seedselect.Sampler(scheduler.config, case, torch.float32)
    target = {"centroid": torch.nn.functional.normalize(normal(clip.tower.config.projection_dim), dim=0), "latents": normal(4, side, side)}
    z, seconds = normal(1, 4, side, side), []
    for _ in range(1 + args.repeats):
        start = time.perf_counter()
        log = seedselect.select(case, sampler, predict, decode, clip, target, z)
        seconds.append(time.perf_counter() - start)
        assert log[0]["gradient"].isfinite().all() and log[0]["gradient"].norm() > 0
    return {"steps": steps, "seconds": seconds[1:], "first": seconds[0], "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser(description="time one iteration of SeedSelect by diffusers on the CPU")
    parser.add_argument("--model", required=True, help="an SD 1.5 diffusers folder")
    parser.add_argument("--clip", help="a CLIP folder of transformers; without it a random one with ViT-L/14's sizes")
    parser.add_argument("--size", type=int, default=256, help="of the image, in pixels")
    parser.add_argument("--steps", default="10,20")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--tokens", type=int, default=77)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the results here as well")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return print(json.dumps(measure(args, args.worker)))
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    results = []
    for steps in args.steps.split(","):
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--worker", steps]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = " ".join(f"{s:.2f}" for s in results[-1]["seconds"])
        print(f"{steps} steps: {seconds} s an iteration, peak memory {results[-1]['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "size": args.size, "guidance": args.guidance, "runs": results}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
