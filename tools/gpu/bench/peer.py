"""The PyTorch side: diffusers' networks on the same weights, by SDPA, and the image a user of diffusers would make with them.

As a program (`python peer.py MODEL --dtype D`) it compiles the UNet by `torch.compile(mode="max-autotune")`, which records CUDA graphs, and then
answers requests on stdin like the engine: {"unet": INPUTS} or {"image": {...}} loads, {"run": N} runs.
"""

import argparse
import gc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Call = Callable[[], object]
Tensors = dict[str, torch.Tensor]


def import_diffusers():
    """diffusers. It imports Pillow for what is not used here: a machine without it will do."""
    if importlib.util.find_spec("diffusers") is None:
        sys.exit("diffusers is not installed; put the wheel that tools/gpu/pack fetched into PYTHONPATH, as tools/gpu/run does")
    if importlib.util.find_spec("PIL") is None:
        pillow = {name: types.ModuleType(name) for name in ("PIL", "PIL.Image", "PIL.ImageOps", "PIL.ImageFilter")}
        for name, module in pillow.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            if "." in name:
                setattr(pillow["PIL"], name.split(".")[1], module)
        pillow["PIL"].__version__ = "11.0.0"
        pillow["PIL.Image"].Image = type("Image", (), {})
        pillow["PIL.Image"].Resampling = types.SimpleNamespace(NEAREST=0, LANCZOS=1, BILINEAR=2, BICUBIC=3)
        sys.modules.update(pillow)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return diffusers


class Peer:
    """The networks of one folder in one type. `channels_last`: convolutions in the layout that tensor cores like."""

    def __init__(self, folder: Path, device: str, dtype: str, channels_last: bool = False):
        self.folder, self.device, self.dtype = folder, torch.device(device), DTYPES[dtype]
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.loaded: dict[str, torch.nn.Module] = {}
        self.made = 0
        torch.backends.cudnn.benchmark = True
        # References are f32, not TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def network(self, name: str) -> torch.nn.Module:
        """`unet`, `vae` or `text_encoder`, loaded once."""
        if name not in self.loaded:
            diffusers = import_diffusers()
            import transformers

            transformers.logging.set_verbosity_error()
            kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
            module = kinds[name].from_pretrained(self.folder / name, torch_dtype=self.dtype).to(self.device).eval().requires_grad_(False)
            self.loaded[name] = module.to(memory_format=self.format) if name != "text_encoder" else module
        return self.loaded[name]

    def release(self) -> None:
        self.loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weight_bytes(self, name: str) -> int:
        return sum(p.nbytes for p in self.network(name).parameters())

    def place(self, inputs: Tensors) -> Tensors:
        """Inputs on the device: the timestep and SDXL's sizes as they are, all else in the networks' type."""
        wide = ("timestep", "size_ids")
        return {name: x.to(self.device, x.dtype if name in wide else self.dtype) for name, x in inputs.items()}

    def predict(self, inputs: Tensors) -> torch.Tensor:
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["size_ids"]} if "pooled" in inputs else None
        latents = inputs["latents"].contiguous(memory_format=self.format)
        # Of one type, whoever calls: compiled, another would be compiled again.
        timestep = inputs["timestep"][0].float()
        return self.network("unet")(latents, timestep, inputs["context"], added_cond_kwargs=added, return_dict=False)[0]

    def gradient(self, inputs: Tensors, to: list[str]) -> tuple[torch.Tensor, ...]:
        """Forward and backward from the cotangent; the parameters are frozen."""
        leaves = {name: inputs[name].detach().clone().requires_grad_(True) for name in to}
        out = self.predict({**inputs, **leaves})
        return torch.autograd.grad(out, list(leaves.values()), inputs["cotangent"])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.network("vae")
        latents = latents.contiguous(memory_format=self.format) / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def image(self, size: int, batch: int, steps: int, guidance: float) -> torch.Tensor:
        """From token ids to bytes on the host, as `StableDiffusionPipeline` goes about it with diffusers' DDIM."""
        diffusers = import_diffusers()
        self.made += 1
        # As CLIP's tokenizer makes them of a prompt of eight words: the two last ids begin it, and end it and fill it up.
        text = self.network("text_encoder")
        end, length = text.config.vocab_size - 1, text.config.max_position_embeddings
        words = [320 + 7 * self.made + k for k in range(8)]
        row = lambda ids: torch.tensor([[end - 1, *ids, *[end] * (length - 1 - len(ids))]] * batch, device=self.device)  # noqa: E731
        context = torch.cat([text(row(ids))[0] for ids in ([], words)])
        config = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        scheduler = diffusers.DDIMScheduler.from_config(config)
        scheduler.set_timesteps(steps, device=self.device)
        unet, vae = self.network("unet").config, self.network("vae").config
        side = size // 2 ** (len(vae.block_out_channels) - 1)
        generator = torch.Generator(self.device).manual_seed(self.made)
        shape = (batch, unet.in_channels, side, side)
        latents = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            uncond, cond = self.predict({"latents": both, "timestep": timestep[None], "context": context}).chunk(2)
            latents = scheduler.step(uncond + guidance * (cond - uncond), timestep, latents, return_dict=False)[0]
        image = (self.decode(latents) / 2 + 0.5).clamp(0, 1)
        return (image.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu()

    def timed(self, call: Call) -> Callable[[int], float]:
        """Milliseconds per call of so many, between two waits."""

        def run(calls: int) -> float:
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            return 1e3 * (time.perf_counter() - start) / calls

        return run

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, name: str, call: Call) -> int | None:
        """What a call allocates at most, with the weights of its network; torch counts on CUDA alone."""
        if self.device.type != "cuda":
            return None
        gc.collect()
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before + self.weight_bytes(name)


def serve(peer: Peer) -> None:
    """Answers requests with a compiled UNet."""
    from safetensors.torch import load_file

    network = torch.compile(peer.network("unet"), mode="max-autotune", fullgraph=True, dynamic=False)

    def compiled(*args, **kwargs):
        # Without it outputs of the step before would be kept alive.
        torch.compiler.cudagraph_mark_step_begin()
        return network(*args, **kwargs)

    compiled.config = network.config
    peer.loaded["unet"] = compiled
    say = lambda value: print(json.dumps(value), flush=True)  # noqa: E731
    say({"ready": True})
    run = None
    for line in sys.stdin:
        try:
            match json.loads(line):
                case {"run": calls}:
                    say({"ms": run(calls)})
                    continue
                case {"unet": path}:
                    inputs = peer.place(load_file(path))
                    call = torch.no_grad()(lambda inputs=inputs: peer.predict(inputs))
                case {"image": settings}:
                    call = lambda settings=settings: peer.image(**settings)  # noqa: E731
            run = peer.timed(call)
            start = time.perf_counter()
            run(3)
            say({"load_s": time.perf_counter() - start})
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side is told
            say({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    serve(Peer(args.model, args.device, args.dtype, args.channels_last))
