"""What each step of the timetable runs; none knows of another but through what it left in the course: kernels that do not work, weights, the machine."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from course import Course
from journal import read

# Of a GPU that answers: a measurement, the weights of a network read from disk included.
PATIENCE = 25.0
# Ops of the list (tests/common/speed.rs) whose kernels the counters are read of, by the beginnings of family and name.
COUNTED = (
    "attention 2x4096x4096 heads 8x40", "attention 2x4096x4096 heads 10x64", "norm group 16x4096x320", "conv2d 2x64x64 320 to 320 3x3/1",
    "conv2d 2x16x16 1280 to 1280 3x3/1", "gemm 8192x320x2560", "gemm 8192x1280x320", "gemm_to_input 4096x320x320",
)  # fmt: skip
SECTIONS = ["SpeedOfLight", "LaunchStats", "Occupancy", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats"]


class NotRun(Exception):
    """Why a step has nothing to do here."""


def gpu_check(course: Course, *words) -> list:
    return [course.pack / "gpu_check", *words]


def checking(course: Course, out: str, seconds: float, *words) -> list:
    """The check, or a part of it; what earlier parts found not to work is not run again."""
    command = gpu_check(course, "--device", course.device, "--data", course.tree / "tests/data", "--emulation", course.pack / "emulation.so")
    command += ["--out", course.kept / out, "--time-limit", max(1, int(seconds)), *words]
    quarantined = broken(course)
    return [*command, "--quarantine", ",".join(quarantined)] if quarantined else command


def check(course: Course, step: str, end: float, *words) -> str:
    rows = course.kept / f"{step}.jsonl"
    command = checking(course, step, course.left(end) - 2, "--journal", rows, *words)
    code = course.run(step, command, end, follow=rows)
    found = lines(course, step)
    # A check that ends by itself says so in its last line, whatever it found.
    if code is not None and not any("end" in line for line in found):
        return f"FAILED: ended with {code}: {last_words(course, step)}"
    return verdict(code, found)


def last_words(course: Course, log: str) -> str:
    words = (course.logs / f"{log}.txt").read_text(errors="replace").strip().splitlines()
    return words[-1] if words else "without a word"


def lines(course: Course, *steps: str) -> list[dict]:
    """What programs of these steps, or of all, have written."""
    return [entry["line"] for entry in read(course.journal.path) if isinstance(entry.get("line"), dict) and (not steps or entry["step"] in steps)]


def verdict(code: int | None, lines: list[dict]) -> str:
    """What a check found, and what of it was not reached."""
    rows = [line["row"]["state"] for line in lines if "row" in line]
    sections = {line["section"]["section"]: line["section"] for line in lines if "section" in line}
    unreached = sum(section["items"] - section["reached"] for section in sections.values())
    missing = [kernel for line in lines if "end" in line for kernel in line["end"]["never_launched"]]
    named = sum(1 for line in lines if "incident" in line)
    wrong = [(rows.count("failed"), "rows failed"), (named, "incidents"), (len(missing), "kernels never launched")]
    said = ", ".join(f"{count} {what}" for count, what in wrong if count)
    if said:
        return f"NOT PASSED: {said}"
    if code is None or unreached:
        return f"nothing wrong in {len(rows)} rows; {unreached or 'some'} items not reached, the time was up"
    return "passed" if code == 0 else f"NOT PASSED: exit code {code}"


def broken(course: Course) -> list[str]:
    """Kernels that an earlier step found to hang, to fault or to be wrong."""
    incidents = (line["incident"] for line in lines(course) if "incident" in line)
    return sorted({incident["kernel"] for incident in incidents if incident["quarantined"]})


def hopper(course: Course) -> str:
    """Measurements of whole networks leave the kernels for Hopper out where one of them does not work."""
    return "off" if any("sm90" in kernel for kernel in broken(course)) else "auto"


def prepare(course: Course) -> None:
    """Random weights of the published sizes, written beside all else: CPUs have nothing to do meanwhile."""
    command = [sys.executable, course.tree / "tools/gpu/bench/bench.py", "--prepare", "sd15,sdxl", "--dtype", course.dtype, "--scratch", course.scratch]
    course.behind_the_scenes("weights", command)


def weights(course: Course, model: str, end: float) -> Path | None:
    """The folder of a model, once it is there."""
    if not course.gpu:
        return course.tree / "tests/data" / {"sd15": "tiny-sd1", "sdxl": "tiny-sdxl"}[model]
    folder = course.scratch / f"{model}-{course.dtype}"
    return folder if course.wait_for(folder / "model_index.json", end) else None


def machine(course: Course, end: float) -> str:
    if course.gpu:
        prepare(course)
    facts = course.kept / "machine.jsonl"
    command = [sys.executable, course.tree / "tools/gpu/all/machine.py", "--device", course.device if course.gpu else "cpu", "--dtype", course.dtype]
    code = course.run("machine", [*command, "--out", facts], end, follow=facts)
    return "the time was up" if code is None else "done" if code == 0 else f"ended with {code}, see logs/machine.txt"


def kernels(course: Course, end: float) -> str:
    return check(course, "kernels", end, "--subset", "--only", "conformance,kernels")


def images(course: Course, end: float) -> str:
    return check(course, "images", end, "--subset", "--only", "networks")


def full_check(course: Course, end: float) -> str:
    # Without a GPU all of it takes hours.
    return check(course, "check", end, *([] if course.gpu else ["--subset"]))


def resumed(course: Course, step: str, end: float, command: list, rows: Path, log: str) -> str:
    """A list of measurements: one that hangs or takes its process along is left out, and the rest goes on."""
    patience, ends = PATIENCE if course.gpu else None, []
    while course.left(end) > 1:
        limit = ["--time-limit", max(1, int(course.left(end)) - 1)]
        before = rows.stat().st_size if rows.exists() else 0
        code = course.run(step, [*command, "--resume" if before else "--out", rows, *limit], end, follow=rows, patience=patience, log=log)
        if code == 0:
            return "done" if not ends else f"done, after {len(ends)} times that a measurement failed or hung"
        ends.append(code)
        if before == (rows.stat().st_size if rows.exists() else 0):
            return f"ended with {code} before its first measurement: {last_words(course, log)}"
    return "the time was up"


def profile(course: Course, end: float) -> str:
    what = {"sd15": "unet:2,unet:16,decode:1,gradient:4", "sdxl": "unet:2"} if course.gpu else {"sd15": "unet:1"}
    outcomes, begin = [], course.journal.seconds()
    for number, (model, programs) in enumerate(what.items()):
        # Two thirds for the smaller model's four programs.
        until = end if number == len(what) - 1 else begin + (end - begin) * 2 / 3
        folder = weights(course, model, until)
        if folder is None:
            outcomes.append(f"{model}: its weights were not written in time")
            continue
        rows = course.kept / f"profile-{model}.jsonl"
        command = gpu_check(course, "profile", "--device", course.device, "--dtype", course.dtype, "--model", folder, "--what", programs, "--hopper", hopper(course))
        outcomes.append(f"{model}: {resumed(course, 'profile', until, command, rows, f'profile-{model}')}")
    return "; ".join(outcomes)


def sweep(course: Course, end: float) -> str:
    rows = course.kept / "sweep.jsonl"
    command = gpu_check(course, "sweep", "--device", course.device, "--dtype", course.dtype, "--hopper", hopper(course))
    return resumed(course, "sweep", end, [*command, *([] if course.gpu else ["--quick"])], rows, "sweep")


def bench(course: Course, step: str, end: float, only: list[str]) -> str:
    """Cases of bench/bench.py, on a machine with PyTorch."""
    python = [sys.executable, course.tree / "tools/gpu/bench/bench.py"]
    # Found, not imported, which takes seconds.
    if missing := [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]:
        raise NotRun(f"{sys.executable} has no {', '.join(missing)}")
    rows = course.kept / f"{step}.jsonl"
    device = ["--device", course.device] if course.gpu else ["--device", "cpu", "--engine-device", course.device, "--quick"]
    if course.gpu:
        weights(course, "sd15", end)
    command = [*python, *device, "--program", course.pack / "gpu_check", "--scratch", course.scratch, "--out", course.kept / step, "--journal", rows]
    command += ["--revision", revision(course), "--time-limit", max(1, int(course.left(end)) - 3)]
    command += [*(["--dtype", course.dtype] if course.gpu else []), "--hopper", hopper(course), *(["--only", ",".join(only)] if only else [])]
    code = course.run(step, command, end, follow=rows)
    return "the time was up" if code is None else "done" if code == 0 else f"ended with {code}: a case failed or is wrong, see logs/{step}.txt"


def pytorch(course: Course, end: float) -> str:
    return bench(course, "pytorch", end, ["layout", "unet", "unet-16", "gradient-latents", "decode", "sdxl", "few-ops"] if course.gpu else ["unet", "few-ops"])


def whole_bench(course: Course, end: float) -> str:
    return bench(course, "bench", end, [])


def tool(name: str) -> str:
    """A program of NVIDIA's, in PATH or where its installer puts it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if not found:
        raise NotRun(f"no {name} on this machine")
    return found


def ncu(course: Course, end: float) -> str:
    """Each counted op is loaded and run, and of each kernel the first launch is read."""
    program = tool("ncu")
    if not course.gpu:
        raise NotRun("no GPU")
    worker = gpu_check(course, "bench-worker", "--device", course.device, "--dtype", course.dtype, "--hopper", hopper(course))
    listed = subprocess.run([str(word) for word in worker], input='"shapes"\n', capture_output=True, text=True, timeout=30, check=False, env=course.environment())
    shapes = json.loads(listed.stdout.splitlines()[-1])
    chosen = [index for index, op in enumerate(shapes) if f"{op['family']} {op['name']}".startswith(COUNTED)]
    requests = course.scratch / "ncu.requests"
    requests.write_text("".join(json.dumps({"op": {"index": index, "together": 1}}) + "\n" for index in chosen))
    # The clocks are the machine's to set.
    words = ["--clock-control", "none", "--kernel-id", ":::1", "--csv", "--page", "details", "--print-units", "base"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    counted = course.logs / "ncu.csv"
    command = ["bash", "-c", 'requests=$1 log=$2; shift 2; "$@" <"$requests" >"$log"', "ncu", requests, counted, program, *words, *worker]
    code = course.run("ncu", command, end, log="ncu")
    course.journal.add("ncu", "line", {"ncu": counters(counted)})
    return "the time was up" if code is None else "done" if code == 0 else f"ended with {code}, see logs/ncu.txt"


# Counters for the report, by the names that ncu prints.
SHOWN = {
    "Duration": "duration, ns", "Compute (SM) Throughput": "compute, %", "Memory Throughput": "memory, %", "DRAM Throughput": "DRAM, %",
    "L2 Cache Throughput": "L2, %", "Registers Per Thread": "registers", "Achieved Occupancy": "occupancy, %", "Executed Ipc Active": "IPC",
    "Warp Cycles Per Issued Instruction": "cycles between a warp's instructions",
}  # fmt: skip


def counters(path: Path) -> list[dict]:
    """One entry for each kernel from ncu's table, whose lines name kernel, counter and value; none of it is known to be there."""
    import csv

    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    found: dict[str, dict] = {}
    for row in csv.DictReader(lines[start:]) if start is not None else []:
        name, counter = row.get("Kernel Name"), SHOWN.get(row.get("Metric Name") or "")
        if name and counter:
            found.setdefault(name, {"kernel": name}).setdefault(counter, row.get("Metric Value"))
    return list(found.values())


def sanitizers(course: Course, end: float) -> str:
    """NVIDIA's checkers over every kernel, those at shapes of real models first, half of the time each."""
    program, outcomes, begin = tool("compute-sanitizer"), [], course.journal.seconds()
    if not course.gpu:
        raise NotRun("no GPU")
    names = ["memcheck", "synccheck"]
    for number, name in enumerate(names):
        until = begin + (end - begin) * (number + 1) / len(names)
        said = course.logs / f"{name}.txt"
        command = [program, "--tool", name, "--error-exitcode", "99", "--print-limit", "20", "--log-file", said]
        command += checking(course, name, course.left(until) - 4, "--subset", "--one-process", "--only", "kernels")
        code = course.run("sanitizers", command, until, log=f"sanitizers-{name}")
        summary = [line for line in (said.read_text(errors="replace").splitlines() if said.exists() else []) if "SUMMARY" in line]
        verdict = {0: "nothing found", 99: f"FOUND ERRORS, see logs/{name}.txt", None: "stopped, the time was up"}.get(code, f"ended with {code}")
        course.journal.add("sanitizers", "line", {"sanitizer": name, "verdict": verdict, "summary": summary[-1:]})
        outcomes.append(f"{name}: {verdict}")
    return "; ".join(outcomes)


def revision(course: Course) -> str:
    packed = course.pack / "revision"
    return packed.read_text().strip() if packed.exists() else "a working tree"


def probe(course: Course) -> str | None:
    """Why the device cannot be used; none if it can."""
    command = gpu_check(course, "bench-worker", "--device", course.device, "--dtype", course.dtype)
    course.run("start", command, course.journal.seconds() + 60, log="probe")
    words = last_words(course, "probe")
    return None if '"ready"' in words else words


RUN: dict[str, Callable[[Course, float], str]] = {
    "machine": machine, "kernels": kernels, "images": images, "profile": profile, "sweep": sweep, "pytorch": pytorch, "ncu": ncu,
    "sanitizers": sanitizers, "check": full_check, "bench": whole_bench,
}  # fmt: skip
