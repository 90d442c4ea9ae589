"""Benchmarks of the engine interleaved with PyTorch on the same random weights; writes bench.md and bench.json (tools/gpu/README.md).

    python bench.py --out DIR                       on a GPU, at most 9 minutes
    python bench.py --device cpu --quick --out DIR   a tiny model and a few ops on the CPU, as a test of this program

Both sides are warm, stay loaded while a case lasts, and run by turns: a round is a stretch of one and a stretch of each other, and who goes
first goes last in the next. A stretch is timed between two waits for the device.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ops
import tables
from engine import Failed, Late, Process
from peer import Peer, Tensors, import_diffusers

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "reference"))
SIZES = {"tiny-sd1": 64, "tiny-sdxl": 64, "sd15": 512, "sdxl": 1024}
# So many times over an op is done in one graph.
TOGETHER = 20


class TimeUp(Exception):
    """What is left of the time does not suffice."""


class Bench:
    """Everything that is known while it runs."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.start, self.cases = args, time.monotonic(), []
        self.cuda, self.scratch = args.device != "cpu", args.scratch
        self.ceilings: dict[str, float] = {}
        self.channels_last = False
        self.peers: dict[str, Peer] = {}

    def left(self) -> float:
        return self.args.time_limit - (time.monotonic() - self.start)

    def need(self, seconds: float) -> None:
        if self.left() < (0 if self.args.quick else seconds):
            raise TimeUp("the time was up")

    def model(self, name: str) -> Path:
        """A folder of random weights by the published configuration, written once; a tiny one is part of the tests' data."""
        if name.startswith("tiny"):
            return HERE.parents[2] / "tests" / "data" / name
        folder = self.scratch / f"{name}-{self.args.dtype}"
        if not (folder / "model_index.json").exists():
            import_diffusers()
            import models

            spec = models.PUBLISHED[name]
            for part in ["unet", "vae", *models.text_folders(spec)]:
                # Published files name text towers so; not every version of transformers does.
                first = next(iter(models.component(spec, part).state_dict()))
                prefix = "text_model." if part == "text_encoder" and not first.startswith("text_model.") else ""
                models.write_component(spec, part, str(folder), 0, self.args.dtype, prefix=prefix)
            # Without tokenizers the engine takes CLIP's own, of 77 tokens.
            models.write_pipeline(spec, str(folder))
        return folder

    def peer(self, name: str) -> Peer:
        """One model's networks at a time."""
        if name not in self.peers:
            for peer in self.peers.values():
                peer.release()
            self.peers = {name: Peer(self.model(name), self.args.device, self.args.dtype, self.channels_last)}
        return self.peers[name]

    def engine(self, model: str | None = None, hopper: str | None = None) -> Process:
        hopper = hopper or self.args.hopper
        device = self.args.engine_device or self.args.device
        command = [str(self.args.program), "bench-worker", "--device", device, "--dtype", self.args.dtype, "--hopper", hopper]
        return Process(command + (["--model", str(self.model(model))] if model else []), self.patience())

    def patience(self) -> float:
        """Seconds after which a GPU hangs, the reading of weights included; a CPU may take longer."""
        return 45 if self.cuda and not self.args.engine_device else 3600

    def inputs(self, model: str, batch: int) -> tuple[Path, Tensors]:
        """What the networks of a model read, of unit scale, as a file and as tensors."""
        config = json.loads((self.model(model) / "unet" / "config.json").read_text())
        levels = json.loads((self.model(model) / "vae" / "config.json").read_text())["block_out_channels"]
        tokens = json.loads((self.model(model) / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
        side = SIZES[model] // 2 ** (len(levels) - 1)
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        # In the networks' type from the start, so that all sides read the same numbers.
        narrow = lambda x: x.to(Peer(HERE, "cpu", self.args.dtype).dtype).float()  # noqa: E731
        latents = (batch, config["in_channels"], side, side)
        tensors = {"latents": narrow(draw(*latents)), "context": narrow(draw(batch, tokens, config["cross_attention_dim"]))}
        tensors |= {"cotangent": narrow(draw(*latents)), "timestep": torch.tensor([601.0])}
        if config.get("addition_embed_type"):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            sizes = torch.tensor([[SIZES[model], SIZES[model], 0, 0, SIZES[model], SIZES[model]]] * batch).float()
            tensors |= {"pooled": narrow(draw(batch, pooled)), "size_ids": sizes}
        path = self.scratch / f"{model}-{batch}.inputs"
        save_file(tensors, str(path))
        return path, tensors

    def in_turn(self, sides: dict[str, Callable[[int], float]], rounds: int | None = None, stretch: float = 30.0) -> dict[str, list[float]]:
        """Milliseconds per call of every side and round, a stretch of calls at a time; fewer rounds, but three, where the time is short."""
        calls = {}
        for name, run in sides.items():
            run(1)
            calls[name] = max(1, min(200, round(stretch / max(run(1), 1e-3))))
        found = {name: [] for name in sides}
        for number in range(rounds or self.args.rounds):
            if number >= 3 and self.left() < 15:
                break
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                found[name].append(sides[name](calls[name]))
        return found

    def keep(self, case: dict) -> None:
        """A case that is done: in the journal at once, if there is one."""
        self.cases.append(case)
        self.note("case", case)

    def note(self, kind: str, value) -> None:
        if self.args.journal:
            with self.args.journal.open("a") as file:
                file.write(json.dumps({kind: value}) + "\n")

    def add(self, name: str, times: dict[str, list[float]], **facts) -> None:
        # Asking takes longer than an op.
        state = board() if self.cuda and facts["kind"] != "op" else {}
        self.keep({"name": name, "ms": times, "board": state, **facts})
        medians = ", ".join(f"{side} {statistics.median(ms):.3f} ms" for side, ms in times.items())
        print(f"{time.monotonic() - self.start:4.0f} s  {name}: {medians}", file=sys.stderr, flush=True)


def board() -> dict[str, str]:
    """Clocks in MHz, watts and degrees as they are right now."""
    keys = ["clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version"]
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        line = ""
    return dict(zip(keys, (word.strip() for word in line.split(",")), strict=False)) if line else {}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def network(bench: Bench, model: str, kind: str, batch: int, to: str | None = None) -> None:
    """The UNet or the decoder, or the UNet with its gradient, alone; how far both sides are from the same weights in f32."""
    path, inputs = bench.inputs(model, batch)
    peer, outputs = bench.peer(model), bench.scratch / "outputs"
    placed = peer.place(inputs)

    def compute(peer: Peer, placed: Tensors) -> dict[str, torch.Tensor]:
        if to:
            both = ["latents", "context"]
            return {f"d_{leaf}": x for leaf, x in zip(both, peer.gradient(placed, both), strict=True)}
        with torch.no_grad():
            return {"image": peer.decode(placed["latents"])} if kind == "decode" else {"prediction": peer.predict(placed)}

    if to:
        call = lambda: peer.gradient(placed, [to])  # noqa: E731
    else:
        call = torch.no_grad()(lambda: peer.decode(placed["latents"]) if kind == "decode" else peer.predict(placed))
    ours, theirs = {}, compute(peer, placed)
    exact = Peer(peer.folder, bench.args.device, "f32")
    # A reference runs once: trying out convolutions would take longer than it.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        reference = compute(exact, exact.place(inputs))
    exact.release()
    with bench.engine(model) as engine:
        request = {"inputs": str(path), "outputs": str(outputs)} | ({} if kind == "decode" else {"to": to})
        facts = engine.ask({kind: request})
        ours = load_file(str(outputs))
        errors = {name: [distance(ours[name], x), distance(theirs[name], x)] for name, x in reference.items()}
        del reference, theirs
        times = bench.in_turn({"rarebit": engine.run, "eager": peer.timed(call)})
    peak = peer.peak_bytes("vae" if kind == "decode" else "unet", call)
    title = {"unet": "UNet", "decode": "VAE decode"}[kind] + (f" and gradient to {to}" if to else "")
    name = f"{model} {title}, batch {batch}"
    bench.add(name, times, kind="network", engine=facts, flops=facts["flops"], peer_peak=peak, errors=errors, layout=layout(peer))


def layout(peer: Peer) -> str:
    return "channels last" if peer.format == torch.channels_last else "channels first"


def choose_layout(bench: Bench, model: str) -> None:
    """The layout of convolutions in which PyTorch's UNet is faster, for all that follows."""
    inputs, times = bench.inputs(model, 2)[1], {}
    for last in (False, True):
        peer = Peer(bench.model(model), bench.args.device, bench.args.dtype, last)
        placed = peer.place(inputs)
        run = peer.timed(torch.no_grad()(lambda peer=peer, placed=placed: peer.predict(placed)))
        run(3)
        times["channels last" if last else "channels first"] = [run(3) for _ in range(5)]
        peer.release()
    medians = [statistics.median(ms) for ms in times.values()]
    bench.channels_last = medians[1] < medians[0]
    bench.add(f"{model} UNet, batch 2, PyTorch's layouts", times, kind="layout")


def image(bench: Bench, model: str, batch: int, steps: int) -> None:
    """Whole images, from prompt to bytes."""
    settings = {"size": SIZES[model], "batch": batch, "steps": steps, "guidance": 7.5}
    peer = bench.peer(model)
    peer.image(**settings)
    with bench.engine(model) as engine:
        facts = engine.ask({"image": settings})
        times = bench.in_turn({"rarebit": engine.run, "eager": peer.timed(lambda: peer.image(**settings))}, 5)
    name = f"{model} image {SIZES[model]}, {steps} DDIM steps, guidance 7.5, batch {batch}"
    bench.add(name, times, kind="image", engine=facts, layout=layout(peer))


# One op of each kind that takes the most of SD 1.5's time, by the beginnings of their names.
FEW = ("attention 2x4096x4096 heads 8x40", "attention 2x4096x4096 heads 10x64", "attention 2x4096x77 heads 8x40", "norm group 2x4096x320", "norm group 16x4096x320",
       "conv2d 2x64x64 320 to 320 3x3/1", "conv2d 2x32x32 640 to 640 3x3/1", "conv2d 2x16x16 1280 to 1280 3x3/1", "gemm 8192x320x2560", "gemm 8192x1280x320",
       "gemm 2048x640x640", "gemm 512x1280x10240", "conv2d_to_input 1x64x64 320 to 320 3x3/1")  # fmt: skip


def kernels(bench: Bench, few: bool = False) -> None:
    """Every op of the list, or a few, as many times over in one graph on all sides; on Hopper also by the engine's kernels for any GPU."""
    peer = Peer(HERE, bench.args.device, bench.args.dtype)
    together = TOGETHER if bench.cuda else 1
    hoppers = {"rarebit": bench.args.hopper}
    if bench.args.hopper != "off" and bench.cuda and torch.cuda.get_device_capability(bench.args.device)[0] == 9:
        hoppers[tables.ANY_GPU] = "off"
    engines = {side: bench.engine(hopper=hopper) for side, hopper in hoppers.items()}
    try:
        shapes = engines["rarebit"].ask("shapes")
        if bench.args.quick:
            smallest = {op["family"]: op for op in sorted(shapes, key=lambda op: -op["flops"] - op["bytes"])}
            chosen = [index for index, op in enumerate(shapes) if op in smallest.values()]
        else:
            chosen = [index for index, op in enumerate(shapes) if not few or f"{op['family']} {op['name']}".startswith(FEW)]
        for number, index in enumerate(chosen):
            if bench.left() < 10:
                bench.keep({"name": f"{len(chosen) - number} ops", "not_run": "the time was up"})
                break
            op = shapes[index]
            name = f"{op['family']} {op['name']}"
            try:
                for engine in engines.values():
                    engine.ask({"op": {"index": index, "together": together}})
                ways, refused = ops.runners(peer, op["shape"], bench.args.dtype, together)
                times = bench.in_turn({side: engine.run for side, engine in engines.items()} | ways, 7, 10.0)
                times = {side: [ms / together for ms in found] for side, found in times.items()}
                bench.add(name, times, kind="op", family=op["family"], flops=op["flops"], bytes=op["bytes"], refused=refused)
            except Failed as error:
                bench.keep({"name": name, "failed": str(error)})
                for side, engine in engines.items():
                    engine.close()
                    engines[side] = bench.engine(hopper=hoppers[side])
    finally:
        for engine in engines.values():
            engine.close()


def compiled(bench: Bench, model: str, steps: int) -> None:
    """PyTorch's best: the UNet by max-autotune in a process of its own, for as long as it may take, with what it found kept for the next run."""
    path, _ = bench.inputs(model, 2)
    settings = {"size": SIZES[model], "batch": 1, "steps": steps, "guidance": 7.5}
    bench.peers.clear()
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(bench.scratch / "inductor")}
    command = [sys.executable, str(HERE / "peer.py"), str(bench.model(model)), "--device", bench.args.device, "--dtype", bench.args.dtype]
    budget = lambda: min(bench.args.compile_limit, bench.left() - 30)  # noqa: E731
    with Process(command + (["--channels-last"] if bench.channels_last else []), bench.patience(), environment) as other:
        try:
            took = other.ask({"unet": str(path)}, budget())["load_s"]
        except Late as error:
            raise TimeUp("torch.compile was not done in time; another run goes on from its cache") from error
        with bench.engine(model) as engine:
            facts = engine.ask({"unet": {"inputs": str(path), "outputs": str(bench.scratch / "outputs"), "to": None}})
            times = bench.in_turn({"rarebit": engine.run, "max-autotune": other.run})
        bench.add(f"{model} UNet, batch 2, compiled", times, kind="network", engine=facts, flops=facts["flops"], compile_s=took)
        other.ask({"image": settings}, budget())
        with bench.engine(model) as engine:
            facts = engine.ask({"image": settings})
            times = bench.in_turn({"rarebit": engine.run, "max-autotune": other.run}, 5)
        bench.add(f"{model} image {SIZES[model]}, {steps} DDIM steps, UNet compiled", times, kind="image", engine=facts)


def cases(bench: Bench) -> dict[str, tuple[float, Callable[[], None]]]:
    """What is measured, the most important first, and the seconds that must be left to begin it."""
    model, xl, steps = ("tiny-sd1", "tiny-sdxl", 4) if bench.args.quick else ("sd15", "sdxl", 50)
    large = 4 if bench.args.quick else 16
    return {
        "layout": (20, lambda: choose_layout(bench, model)),
        "image": (30, lambda: image(bench, model, 1, steps)),
        "unet": (20, lambda: network(bench, model, "unet", 2)),
        "gradient-latents": (20, lambda: network(bench, model, "unet", 4, "latents")),
        "unet-16": (20, lambda: network(bench, model, "unet", large)),
        "decode": (20, lambda: network(bench, model, "decode", 1)),
        "gradient-context": (20, lambda: network(bench, model, "unet", 4, "context")),
        "ops": (30, lambda: kernels(bench)),
        "few-ops": (15, lambda: kernels(bench, few=True)),
        "sdxl": (30, lambda: network(bench, xl, "unet", 2)),
        "sdxl-gradient": (60, lambda: network(bench, xl, "unet", 1, "latents")),
        "sdxl-decode": (30, lambda: network(bench, xl, "decode", 1)),
        # Last: it may take minutes.
        "compiled": (90, lambda: compiled(bench, model, steps)),
    }


def by_default(name: str, quick: bool) -> bool:
    """Compiling takes minutes, of a tiny model too; few ops are some of all."""
    return name != "few-ops" and not (quick and name == "compiled")


def measure(bench: Bench) -> None:
    """Runs the cases and writes the report after each: the caller may end this before it ends itself."""
    peer = Peer(HERE, bench.args.device, bench.args.dtype)
    bench.ceilings = ops.ceilings(peer, bench.args.dtype)
    bench.note("head", head(bench))
    known = cases(bench)
    for name in bench.args.only or [name for name in known if by_default(name, bench.args.quick)]:
        seconds, case = known[name]
        try:
            bench.need(seconds)
            case()
        except TimeUp as why:
            bench.keep({"name": name, "not_run": str(why)})
        except Exception as error:  # noqa: BLE001 - one case must not take the rest along
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            bench.keep({"name": name, "failed": reason})
            print(f"{name}: {reason}", file=sys.stderr, flush=True)
        write(bench)


def head(bench: Bench) -> dict:
    """What is known of the machine and the run."""
    args = bench.args
    device = torch.cuda.get_device_name(args.device) if bench.cuda else "cpu"
    return {
        "schema": 1, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "device": device, "dtype": args.dtype, "revision": args.revision,
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "diffusers": import_diffusers().__version__,
        "threads": torch.get_num_threads(), "quick": args.quick, "rounds": args.rounds, "hopper": args.hopper, "ceilings": bench.ceilings,
    }  # fmt: skip


def write(bench: Bench) -> dict:
    args = bench.args
    report = {**head(bench), "seconds": time.monotonic() - bench.start, "cases": bench.cases}
    report["goals"] = tables.goals(report)
    folder = args.out / f"{report['date']}-{'-'.join(re.findall('[a-z0-9]+', report['device'].lower()))}"
    folder.mkdir(parents=True, exist_ok=True)
    # A part does not take the place of the whole.
    stem = "-".join(["bench", *(args.only or [])])
    for file, text in ((f"{stem}.json", json.dumps(report, indent=1) + "\n"), (f"{stem}.md", tables.markdown(report))):
        (folder / f"{file}.partial").write_text(text)
        (folder / f"{file}.partial").replace(folder / file)
    bench.folder = folder
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="benchmarks of the engine interleaved with PyTorch")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the report's folder is made")
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu")
    parser.add_argument("--engine-device", help="where the engine alone runs, such as emulated")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"), help="default: bf16, on the CPU f32")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds; what was not reached is reported as not run")
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds that torch.compile may take")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--hopper", choices=("auto", "off", "always"), default="auto", help="what the engine's kernels for Hopper do")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these cases, such as image,unet,ops, in a report of their own")
    parser.add_argument("--quick", action="store_true", help="a tiny model and the smallest op of each kind: a test of this program")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "rarebit-bench", help="weights and what the compiler found, kept")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="where every case is appended as soon as it is done, a line of JSON each")
    parser.add_argument("--revision", default="a working tree", help="of the engine, for the report")
    parser.add_argument("--prepare", type=lambda text: text.split(","), metavar="MODELS", help="write the random weights of sd15,sdxl into --scratch, and end")
    built = HERE.parents[2] / "target/release/examples/gpu_check"
    parser.add_argument("--program", type=Path, default=built if built.exists() else None, help="gpu_check")
    args = parser.parse_args()
    if not args.program and not args.prepare:
        parser.error("there is no gpu_check: cargo build --release --example gpu_check, or give --program")
    if args.device != "cpu" and not args.prepare and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --device cpu --quick tests this program without one")
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    bench = Bench(args)
    if unknown := set(args.only or []) - set(cases(bench)):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    bench.scratch.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        return [print(bench.model(name), flush=True) for name in args.prepare] and 0
    measure(bench)
    report = write(bench)
    print(tables.table_of_goals(report["goals"]))
    print(bench.folder)
    return 0 if report["cases"] and not any("failed" in case for case in report["cases"]) and not tables.wrong(report) else 1


if __name__ == "__main__":
    sys.exit(main())
