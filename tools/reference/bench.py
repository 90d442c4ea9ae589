"""Times the engine against torch eager (float32, the same number of threads) on SD 1.5, call by call in turn, and compares peak memory.

    python bench.py --model DIR [--json OUT.json] [--kinds unet,unet-gradient,decode,decode-gradient,image]

`unet` is one call at 64x64 latents, batch 2; `decode` the VAE at 64x64 latents; `unet-gradient` and `decode-gradient` at batch 1. Two processes load the model, say `ready`, then run once
and print the seconds for every line they get, so that both see the same machine. The program's side is

    bench_cpu MODEL unet|unet-gradient|decode|decode-gradient HEIGHT WIDTH BATCH        (latent sizes)

A gradient is that to the latents, forward and backward, parameters frozen (`autograd.grad` in torch). The peak resident memory of both
processes is read before they end.

`image` is a whole 2-step image in one process, for its wall time and peak resident memory (ru_maxrss of that child).
This process imports nothing large: on Linux a child inherits the high-water mark of the process that started it.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

SHAPES = {"unet": (64, 64, 2), "unet-gradient": (64, 64, 1), "decode": (64, 64, 1), "decode-gradient": (64, 64, 1)}
PROMPT = "a red star on a dark blue background"


def torch_call(model, kind, height, width, batch):
    """A closure that makes one call of a network."""
    import diffusers
    import torch

    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    if kind.startswith("unet"):
        unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet", dtype=torch.float32).eval().requires_grad_(False)
        context = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
        forward = lambda latents: unet(latents, 601.0, context).sample
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32).eval().requires_grad_(False)
        forward = lambda latents: vae.decode(latents / vae.config.scaling_factor).sample
    if not kind.endswith("gradient"):
        return lambda: forward(latents)

    def gradient():
        with torch.enable_grad():
            leaf = latents.clone().requires_grad_(True)
            out = forward(leaf)
            return torch.autograd.grad(out, leaf, torch.ones_like(out))

    return gradient


def torch_image(model, out, steps):
    """A whole image, as a user of diffusers would make it."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    pipe(PROMPT, latents=noise, height=512, width=512, num_inference_steps=steps).images[0].save(out)


def torch_worker(args):
    """The other end of `Worker`, in torch."""
    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    kind, *sizes = args.worker
    if kind == "image":
        return torch_image(args.model, os.devnull if not args.out else args.out, int(sizes[0]))
    call = torch_call(args.model, kind, *map(int, sizes))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A process that runs once per line and answers with the seconds it took."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.expect("ready")

    def expect(self, what=None):
        line = self.process.stdout.readline().strip()
        if not line or (what and line != what):
            sys.exit(f"{shlex.join(self.process.args)}: said {line!r}")
        return line

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.expect())

    def peak_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def interleaved(commands, environment, repeats):
    """Seconds of every call per side, after one warm-up call each, and peak resident bytes; who goes first alternates."""
    workers = {side: Worker(command, environment) for side, command in commands.items()}
    for worker in workers.values():
        worker.run()
    seconds = {side: [] for side in workers}
    for repeat in range(repeats):
        order = list(workers) if repeat % 2 == 0 else list(workers)[::-1]
        for side in order:
            seconds[side].append(workers[side].run())
    peaks = {side: worker.peak_bytes() for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return seconds, peaks


def run_once(command, environment):
    """Wall seconds and peak resident bytes of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description="time the engine against torch on the CPU")
    parser.add_argument("--model", required=True, help="an SD 1.5 diffusers folder (parity.py sd15 --phases build makes one)")
    parser.add_argument("--kinds", default="unet,unet-gradient,decode,decode-gradient,image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of the image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", default="target/release/examples/bench_cpu", help="command that takes MODEL KIND HEIGHT WIDTH BATCH")
    parser.add_argument("--rarebit", default="target/release/rarebit", help="command line program, for the image")
    parser.add_argument("--torch-only", action="store_true")
    parser.add_argument("--json", help="write the results here as well")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return torch_worker(args)
    environment = dict(os.environ, RAYON_NUM_THREADS=str(args.threads), OMP_NUM_THREADS=str(args.threads))
    me = [sys.executable, os.path.abspath(__file__), "--model", args.model, "--threads", str(args.threads)]
    result = {"cpu": cpu_name(), "threads": args.threads, "repeats": args.repeats}
    for kind in args.kinds.split(","):
        if kind == "image":
            out = os.path.join(tempfile.gettempdir(), f"bench-{os.getpid()}.png")
            flags = f"{PROMPT}|--steps|{args.steps}|--size|512x512|--dtype|f32|--device|cpu|--seed|1|--out|{out}|--quiet"
            commands = {
                "torch": [*me, "--out", out, "--worker", "image", str(args.steps)],
                "rarebit": [*shlex.split(args.rarebit), "generate", "--model", args.model, *flags.split("|")],
            }
        else:
            sizes = [str(n) for n in SHAPES[kind]]
            commands = {"torch": [*me, "--worker", kind, *sizes], "rarebit": [*shlex.split(args.program), args.model, kind, *sizes]}
        if args.torch_only:
            del commands["rarebit"]
        if kind == "image":
            runs = {side: run_once(command, environment) for side, command in commands.items()}
            os.remove(out)
            result[kind] = {side: {"seconds": s, "peak_bytes": b} for side, (s, b) in runs.items()}
            report(kind, {side: s for side, (s, _) in runs.items()}, "s")
            report("peak memory", {side: b / 2**30 for side, (_, b) in runs.items()}, "GiB")
        else:
            seconds, peaks = interleaved(commands, environment, args.repeats)
            result[kind] = {side: {"seconds": s, "median": statistics.median(s), "peak_bytes": peaks[side]} for side, s in seconds.items()}
            report(kind, {side: statistics.median(s) for side, s in seconds.items()}, "s")
            report("peak memory", {side: b / 2**30 for side, b in peaks.items()}, "GiB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


def report(what, values, unit):
    line = ", ".join(f"{side} {value:.3f} {unit}" for side, value in values.items())
    ratio = f", rarebit/torch {values['rarebit'] / values['torch']:.2f}" if len(values) == 2 else ""
    print(f"{what}: {line}{ratio}", flush=True)


if __name__ == "__main__":
    main()
