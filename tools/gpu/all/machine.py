"""What machine this is: versions, what can be imported, and what it does at best. Writes lines of JSON, each as soon as it is known."""

import argparse
import importlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))


def words(*command: str) -> str:
    """The last line that a program prints, or why it prints none."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/local/cuda/bin")
    if not program:
        return "not found"
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"ended with {done.returncode}"


def version(module: str) -> str:
    try:
        return str(getattr(importlib.import_module(module), "__version__", "there"))
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being imported is what is to be told
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def gap(device: str) -> dict[str, float]:
    """Microseconds from one kernel that does next to nothing to the next in a CUDA graph, and of a replay of one such kernel from the host."""
    import torch

    x, stream, found = torch.zeros(1, device=device), torch.cuda.Stream(), {}
    for name, count in (("kernel in a graph, us", 1000), ("graph of one kernel, us", 1)):
        with torch.cuda.stream(stream):
            x.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                x.add_(1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replays, times = 1 if count > 1 else 200, []
        for _ in range(5):
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / replays / count)
        found[name] = sorted(times)[2]
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    def tell(**facts) -> None:
        with args.out.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    tell(system=f"{platform.platform()}, Python {platform.python_version()}, {platform.machine()}")
    if args.device != "cpu":
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        tell(board=words("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
        tell(nvcc=words("nvcc", "--version"), ncu=words("ncu", "--version"), compute_sanitizer=words("compute-sanitizer", "--version"))
    # Ceilings before the slower imports: the time may be up in them.
    tell(torch=version("torch"))
    try:
        import ops
        from peer import Peer
    except ImportError as error:
        tell(ceilings=f"not measured: {error}")
        return 0
    dtype = args.dtype if args.device != "cpu" else "f32"
    tell(ceilings=ops.ceilings(Peer(Path(), args.device, dtype), dtype))
    if args.device != "cpu":
        tell(gap=gap(args.device))
    tell(imports={name: version(name) for name in ("safetensors", "transformers", "diffusers")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
