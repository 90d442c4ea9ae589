"""Makes the `shapes` model from nothing: trains every part in order, then writes the f16 folders the project ships.

Stages that are done are skipped and a stage that was cut goes on from its checkpoint, so the same command finishes what an earlier one
began. `--export-only` ships what is trained so far.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import trainer
import world

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMBEDDED = ROOT / "src" / "assets" / "shapes"
SECOND = ROOT / "tests" / "data" / "shapes-b"
# Megabytes (10^6) of all files: the embedded folder without the reader; the reader and the second UNet.
LIMITS = {"embedded": 14.0, "reader and shapes-b": 9.0}

# Program with its flags, the folder it leaves (in the work folder) when it is done, and how many processes made the shipped weights: the
# big ones take what there is (two then), the small ones run alone. A stage needs those above it.
ALL, ALONE = None, 1
STAGES = (
    ("train_text.py", "model/text_encoder", ALONE),
    ("train_vae.py", "model/vae", ALL),
    ("make_data.py", "data/done", ALL),
    ("train_unet.py", "model/unet", ALL),
    ("train_reader.py", "model/reader", ALONE),
    ("train_vision.py", "model/clip", ALONE),
    ("train_aesthetic.py", "model/aesthetic", ALONE),
    ("train_policy.py", "model/prompt_policy", ALONE),
    ("train_unet.py --variant b", "model-b/unet", ALL),
)
FOLDERS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler", "clip", "aesthetic", "prompt_policy", "reader")


def train(args) -> None:
    for program, made, processes in STAGES:
        if (args.work / made).exists():
            continue
        script, *flags = program.split()
        processes = str(processes or args.processes)
        command = [sys.executable, str(HERE / script), *flags, "--work", str(args.work), "--device", args.device, "--processes", processes]
        print("$", program, flush=True)
        # The stages that take a bigger batch on a GPU; the others are minutes anyway and keep their recipe.
        if args.batch and script in ("train_vae.py", "train_unet.py"):
            command += ["--batch", str(args.batch)]
        subprocess.run(command, check=True)
        if made == "data/done":
            (args.work / made).touch()


def export_folder(source: Path, target: Path) -> int:
    """A model folder with its weights in f16; returns its bytes. Files that are not the source's are left alone."""
    target.mkdir(parents=True, exist_ok=True)
    size = 0
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        out = target / path.name
        if path.suffix == ".safetensors":
            tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(tensors, out, metadata={"format": "pt"})
            out.chmod(0o644)
        elif path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            for part in (config, *(v for v in config.values() if isinstance(v, dict))):
                # A folder of the machine it was trained on.
                part.pop("_name_or_path", None)
                # Only transformers says the type; diffusers takes that of the file.
                for key in ("dtype", "torch_dtype"):
                    if part.get(key):
                        part[key] = "float16"
            out.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif path.name != "generation_config.json":
            shutil.copyfile(path, out)
        else:
            continue
        size += out.stat().st_size
    return size


def export(args) -> None:
    sizes = {}
    for name in FOLDERS:
        if (args.work / "model" / name).exists():
            sizes[name] = export_folder(args.work / "model" / name, EMBEDDED / name)
    (EMBEDDED / "world.json").write_text(json.dumps(world.as_json(), indent=1) + "\n", encoding="utf-8")
    second = 0
    for name in ("unet", "scheduler"):
        if (args.work / "model-b" / name).exists():
            second += export_folder(args.work / "model-b" / name, SECOND / name)
    totals = {"embedded": sum(sizes.values()) - sizes.get("reader", 0), "reader and shapes-b": sizes.get("reader", 0) + second}
    for name, size in sizes.items():
        print(f"{name:>14} {size / 1e6:6.2f} MB")
    for name, size in totals.items():
        print(f"{name:>14} {size / 1e6:6.2f} MB of {LIMITS[name]}")
        if size > LIMITS[name] * 1e6:
            raise SystemExit(f"{name}: over {LIMITS[name]} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints, logs (about 1 GB)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="default: one per core on the CPU, one on a GPU")
    parser.add_argument("--batch", type=int, help="samples per step of autoencoder and UNets (a GPU likes 512)")
    parser.add_argument("--export-only", action="store_true")
    args = trainer.with_processes(parser.parse_args())
    if not args.export_only:
        train(args)
    export(args)


if __name__ == "__main__":
    main()
