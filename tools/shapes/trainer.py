"""The training loop all programs share: fixed steps and seeds, checkpoints that resume to the same weights, one or several processes.

What a step sees is a function of (seed, step, rank) alone, and the checkpoint holds everything else, so a run that was cut at any moment
and started again ends in the same weights as one that never stopped. On a CPU use one process per core: two single-threaded processes
with an all-reduce outrun two threads in one process, and do not collapse when another job takes a core. On a GPU use one process and,
if wanted, a larger `--batch` (the steps then shrink in proportion, the learning rate stays).
"""

import argparse
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from muon import Muon

CHECKPOINT_SECONDS = 90
LOG_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that is not the model or the loss; `batch` counts the samples of all processes together."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: int = 100
    # Share of the run at full learning rate before the decay; the decay is a half cosine down to `floor`.
    hold: float = 0.0
    floor: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0

    def rate(self, step: int) -> float:
        done = step / self.steps
        decay = 1.0 if done < self.hold else 0.5 * (1 + math.cos(math.pi * (done - self.hold) / (1 - self.hold)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * decay)


@dataclass(frozen=True)
class Draw:
    """The randomness of one step on one process."""

    rng: np.random.Generator
    batch: int
    device: torch.device
    step: int


# One step: draws a batch, returns the loss and what to log.
Loss = Callable[[Draw], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def arguments(description: str, **more) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints, logs and the finished model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="default: one per core on the CPU, one on a GPU")
    parser.add_argument("--batch", type=int, help="samples per step; the number of steps follows, so that the samples stay the same")
    parser.add_argument("--steps", type=int, help="shorter or longer than the recipe (a trial)")
    for flag, options in more.items():
        parser.add_argument("--" + flag.replace("_", "-"), **options)
    return with_processes(parser.parse_args())


def with_processes(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the default of `--processes`."""
    if args.processes is None:
        args.processes = 1 if args.device != "cpu" else len(os.sched_getaffinity(0))
    return args


def autocast(device: torch.device | str):
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def launch(program: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs `program(args)` in `args.processes` processes; returns when all have ended, or fails with the first that does."""
    if args.processes == 1:
        _process(0, program, args, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (program, args, Path(folder) / "meeting", os.getpid()), args.processes)


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone: a killed run must leave nothing behind that writes checkpoints."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _process(rank: int, program, args, meeting: Path | None, parent: int | None = None) -> None:
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if meeting is not None:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.processes)
    program(args)
    if meeting is not None:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _Average:
    """Exponential moving average of the parameters, warming up from a short memory."""

    def __init__(self, parameters, decay: float):
        self.decay, self.shadow = decay, [p.detach().clone() for p in parameters]

    def update(self, parameters, step: int) -> None:
        keep = min(self.decay, (step + 1) / (step + 20))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - keep)


def train(recipe: Recipe, module: torch.nn.Module, loss: Loss, args: argparse.Namespace, hidden: Sequence[torch.nn.Parameter] = ()) -> None:
    """Trains the parameters of `module` that require gradients; leaves the averaged weights in it (`ema > 0`).

    AdamW, except for the matrices in `hidden`, which Muon trains.
    """
    if args.batch:
        recipe = replace(recipe, batch=args.batch, steps=max(1, recipe.steps * recipe.batch // args.batch))
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    if recipe.batch % world_size():
        raise SystemExit(f"--batch {recipe.batch} does not divide over {world_size()} processes")
    device = torch.device(args.device)
    module.to(device).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    muon = {id(p) for p in hidden}
    others = [p for p in parameters if id(p) not in muon]
    optimizers = [torch.optim.AdamW(others, lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay)]
    if hidden:
        optimizers.append(Muon(hidden, weight_decay=recipe.weight_decay))
    average = _Average(parameters, recipe.ema)
    path = args.work / "checkpoints" / f"{recipe.name}.pt"
    step = _resume(path, recipe, module, optimizers, average, device)
    journal = Journal(args.work / "logs" / f"{recipe.name}.jsonl", recipe, step)
    saved = time.monotonic()
    while step < recipe.steps:
        # Philox keys of numpy and the seed of torch, both from (seed, step, rank).
        words = np.random.SeedSequence([recipe.seed, step, rank()]).generate_state(2, np.uint64)
        torch.manual_seed(int(words[0]) & (2**63 - 1))
        draw = Draw(np.random.default_rng(int(words[1])), recipe.batch // world_size(), device, step)
        value, metrics = loss(draw)
        module.zero_grad(set_to_none=True)
        value.backward()
        norm = _reduce_and_clip(parameters, recipe.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
        average.update(parameters, step)
        step += 1
        journal.add(step, {"loss": value, **metrics, "grad_norm": norm})
        if step == recipe.steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            _save(path, step, recipe, module, optimizers, average)
    if recipe.ema > 0:
        with torch.no_grad():
            for p, a in zip(parameters, average.shadow):
                p.copy_(a)
    module.eval()
    barrier()


def _reduce_and_clip(parameters, limit: float) -> torch.Tensor:
    """Averages the gradients over the processes and scales them to a norm of at most `limit`; returns the norm before."""
    grads = [p.grad for p in parameters]
    if world_size() > 1:
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        flat.div_(world_size())
        for g, f in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
            g.copy_(f)
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


def _save(path: Path, step, recipe, module, optimizers, average) -> None:
    if rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step, "recipe": repr(recipe), "module": module.state_dict(), "average": average.shadow,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }  # fmt: skip
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resume(path: Path, recipe, module, optimizers, average, device) -> int:
    """Every process reads the same file, so all hold the same state; a checkpoint of another recipe is refused."""
    barrier()
    if not path.exists():
        # Every process built the module from the same seed, but a copy from the first makes sure of it.
        if world_size() > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)
            average.shadow = [p.detach().clone() for p in module.parameters() if p.requires_grad]
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["recipe"] != repr(recipe):
        raise SystemExit(f"{path}: left by another recipe; remove it to start over\n  there: {state['recipe']}\n  here:  {recipe!r}")
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    average.shadow = state["average"]
    barrier()
    return state["step"]


class Journal:
    """Prints the mean of what was logged every LOG_EVERY steps and appends it as a JSON line; rank 0 only."""

    def __init__(self, path: Path, recipe: Recipe, step: int):
        self.path, self.recipe, self.sums, self.count = path, recipe, {}, 0
        self.start, self.first = time.monotonic(), step
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, metrics: dict[str, torch.Tensor]) -> None:
        if rank() != 0:
            return
        for name, v in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + v.detach()
        self.count += 1
        if step % LOG_EVERY and step != self.recipe.steps:
            return
        means = {name: round(float(v) / self.count, 5) for name, v in self.sums.items()}
        speed = (step - self.first) * self.recipe.batch / (time.monotonic() - self.start)
        record = {"step": step, "samples_per_s": round(speed, 1), **means}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{self.recipe.name} {step}/{self.recipe.steps}", *(f"{k} {v}" for k, v in record.items() if k != "step"), flush=True)
        self.sums, self.count = {}, 0


def seeded(seed: int) -> None:
    """Before a module is built: its initial weights come from the recipe's seed."""
    torch.manual_seed(seed)


def pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Images `[n, H, W, 3]` uint8 -> `[n, 3, H, W]` f32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def bytes_of(images: torch.Tensor) -> np.ndarray:
    """`[n, 3, H, W]` in [-1, 1] -> `[n, H, W, 3]` uint8, rounded."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
