"""What was measured as Markdown: goals with what came of them, then every case."""

import statistics
from collections.abc import Callable, Iterator

# An engine in 16 bits may be so many times as far from f32 as PyTorch in the same type, and this in f32.
MARGIN, LEAST = 2.0, 1e-4
# The engine without the kernels for Hopper.
ANY_GPU = "rarebit for any GPU"
# Copies of more bytes than this do not fit a cache.
LARGE = 64e6


def median(case: dict, side: str) -> float:
    return statistics.median(case["ms"][side])


def best(case: dict, without: str = "alone") -> str:
    """PyTorch's fastest way; one that does less than the op is no rival."""
    rivals = [side for side in case["ms"] if side not in ("rarebit", ANY_GPU) and without not in side]
    return min(rivals, key=lambda side: median(case, side))


def ratio(case: dict) -> float:
    return median(case, "rarebit") / median(case, best(case))


def measured(report: dict, *words: str) -> Iterator[dict]:
    return (case for case in report["cases"] if "ms" in case and all(word in case["name"] for word in words))


def roofline(report: dict, case: dict) -> float:
    """Milliseconds that its operations at the rate of the large product, or its bytes at that of the copy, take at least."""
    rates = report["ceilings"]
    return 1e3 * max(case["flops"] / rates["flops_per_s"], case.get("bytes", 0) / rates["bytes_per_s"])


def goals(report: dict) -> list[dict]:
    """Every goal, what was found (none where it was not measured), and whether it is met. They are a GPU's."""
    if report["quick"] or report["device"] == "cpu":
        return []
    first = lambda *words: next(measured(report, *words), None)  # noqa: E731
    peak = report["ceilings"].get("flops_per_s")
    image, compiled = first("sd15 image", "batch 1"), first("sd15 image", "compiled")
    large, back = first("sd15 UNet, batch 16"), first("sd15 UNet and gradient to latents, batch 4")
    step = first("sd15 UNet, batch 2")
    norms = [case for case in measured(report, "norm group") if case["bytes"] >= LARGE]
    heads = [case for case in measured(report, "attention", "4096x4096") if "x64" in case["name"] and "FlashAttention" in case["ms"]]
    gpu = image and image["engine"]["held"]
    found: list[tuple[str, str, float, Callable[[], float | None]]] = [
        ("image / PyTorch eager with SDPA, time", "<=", 0.5, lambda: image and ratio(image)),
        ("image / UNet by max-autotune with graphs, time", "<=", 0.8, lambda: compiled and ratio(compiled)),
        ("image, seconds", "<=", 0.30, lambda: image and median(image, "rarebit") / 1e3),
        ("UNet of batch 16 / the large product, operations per second", ">=", 0.5, lambda: large and large["flops"] / median(large, "rarebit") * 1e3 / peak),
        ("UNet and gradient to latents, batch 4 / autograd, time", "<=", 0.6, lambda: back and ratio(back)),
        ("UNet and gradient to latents, batch 4 / autograd, peak memory", "<=", 0.4, lambda: back and back["peer_peak"] and back["engine"]["held"] / back["peer_peak"]),
        ("group norm and SiLU / copy, bytes per second, the slowest that fits no cache", ">=", 0.8,
         lambda: min((roofline(report, case) / median(case, "rarebit") for case in norms), default=None)),
        ("attention, head dim 64, 4096 tokens / FlashAttention, rate, the slowest", ">=", 0.5,
         lambda: min((median(case, "FlashAttention") / median(case, "rarebit") for case in heads), default=None)),
        ("host's time per sampling step, microseconds", "<=", 20, lambda: image and image["engine"]["host_us"]),
        ("host's time per UNet pass, microseconds", "<=", 20, lambda: step and step["engine"]["host_us"]),
        ("memory held for images / planned, less 1, absolute", "<=", 0.01, lambda: gpu and abs(gpu / image["engine"]["planned"] - 1)),
    ]  # fmt: skip
    out = []
    for name, sign, limit, value in found:
        number = value()
        met = None if number is None else number <= limit if sign == "<=" else number >= limit
        out.append({"goal": name, "sign": sign, "limit": limit, "found": number, "met": met})
    return out


def wrong(report: dict) -> list[str]:
    """Cases whose results are further from f32 than PyTorch's in the same type can excuse."""
    limit = lambda theirs: LEAST + (MARGIN * theirs if report["dtype"] != "f32" else 0)  # noqa: E731
    found = ((case["name"], ours, theirs) for case in measured(report) for ours, theirs in case.get("errors", {}).values())
    return [name for name, ours, theirs in found if not ours <= limit(theirs)]


def table(head: list[str], body: list[list]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def table_of_goals(found: list[dict]) -> str:
    verdict = {True: "met", False: "MISSED", None: "not measured"}
    show = lambda x: "" if x is None else f"{x:.3g}"  # noqa: E731
    return table(["goal", "limit", "found", ""], [[g["goal"], f"{g['sign']} {g['limit']:g}", show(g["found"]), verdict[g["met"]]] for g in found])


def spread(times: list[float]) -> str:
    """Median, and where the fastest and the slowest tenth end."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return f"{statistics.median(ordered):.4g} [{ordered[tenth]:.4g}, {ordered[-1 - tenth]:.4g}]"


def gib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**30:.3g}"


def networks(report: dict) -> str:
    body = []
    for case in report["cases"]:
        if case.get("kind") not in ("network", "image"):
            continue
        ours, rival, engine = median(case, "rarebit"), best(case), case["engine"]
        rate = case["flops"] / ours / 1e9 if "flops" in case else None
        share = f"{rate:.3g} ({100e12 * rate / report['ceilings']['flops_per_s']:.0f} %)" if rate else ""
        compiled = f", compiled in {case['compile_s']:.0f} s" if "compile_s" in case else ""
        memory = [gib(engine["planned"]), gib(engine["held"]), gib(case.get("peer_peak"))]
        # On the CPU the host does the work.
        rest = ["" if engine["held"] is None else f"{engine['host_us']:.1f}", f"{engine['load_s']:.2f}"]
        body.append([case["name"], spread(case["ms"]["rarebit"]), f"{rival}: {spread(case['ms'][rival])}{compiled}", f"{ratio(case):.2f}", share, *memory, *rest])
    head = ["case", "rarebit, ms", "PyTorch, ms", "ratio", "TFLOP/s (of the large product)", "planned, GiB", "held", "PyTorch's peak", "host, us", "load, s"]
    return table(head, body)


def errors(report: dict) -> str:
    """How far the results are from the same weights in f32."""
    body = []
    bad = wrong(report)
    for case in measured(report):
        for name, (ours, theirs) in case.get("errors", {}).items():
            body.append([case["name"], name, f"{ours:.2e}", f"{theirs:.2e}", "WRONG" if case["name"] in bad else "agrees"])
    return table(["case", "result", "rarebit, relative distance to f32", "PyTorch", ""], body)


def kernels(report: dict) -> str:
    body = []
    for case in report["cases"]:
        if case.get("kind") != "op":
            continue
        ours = median(case, "rarebit")
        rival = best(case)
        rate = f"{case['flops'] / ours / 1e9:.3g} TFLOP/s" if case["flops"] else f"{case['bytes'] / ours / 1e6:.3g} GB/s"
        others = ", ".join(f"{side} {1e3 * median(case, side):.1f}" for side in case["ms"] if side not in ("rarebit", rival))
        share = f"{100 * roofline(report, case) / ours:.0f}"
        body.append([case["name"], f"{1e3 * ours:.1f}", f"{rival} {1e3 * median(case, rival):.1f}", f"{ratio(case):.2f}", others, rate, share])
    return table(["op", "rarebit, us", "PyTorch's best, us", "ratio", "others", "rarebit's rate", "of the roofline, %"], body)


def boards(report: dict) -> str:
    keys = ["clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"]
    seen = {key: [float(case["board"][key]) for case in measured(report) if _number(case["board"].get(key))] for key in keys}
    words = dict(zip(keys, ("SM {} MHz", "memory {} MHz", "{} W", "{} degrees"), strict=True))
    said = [words[key].format(f"{min(values):.0f} to {max(values):.0f}") for key, values in seen.items() if values]
    return ", ".join(said) or "not known"


def _number(text: str | None) -> bool:
    try:
        return text is not None and float(text) >= 0
    except ValueError:
        return False


def markdown(report: dict) -> str:
    rates = report["ceilings"]
    driver = next((case["board"]["driver_version"] for case in measured(report) if case["board"].get("driver_version")), "none")
    notes = [f"- {case['name']}: {case.get('failed') or 'not run, ' + case['not_run']}" for case in report["cases"] if "ms" not in case]
    notes += [f"- {case['name']}: {way} does not do it ({why})" for case in measured(report) for way, why in case.get("refused", {}).items()]
    layouts = next((case for case in measured(report) if case["kind"] == "layout"), None)
    layout = "; ".join(f"{side} {spread(ms)} ms" for side, ms in layouts["ms"].items()) if layouts else "not tried, channels first"
    software = f"torch {report['torch']}, CUDA {report['cuda']}, cuDNN {report['cudnn']}, diffusers {report['diffusers']}, driver {driver}"
    return f"""# In turn with PyTorch: {report["device"]}, {report["dtype"]}, {report["date"]}

rarebit {report["revision"]}; {software}. {report["seconds"]:.0f} s{", a test with a tiny model" if report["quick"] else ""}.

Random weights by the published configurations, the same files on both sides; medians of up to {report["rounds"]} rounds by turns, in brackets the fastest
and the slowest tenth; wall time between two waits for the device, both sides warm. PyTorch: diffusers' networks with SDPA, cudnn.benchmark, parameters
frozen, no checkpointing. Below 1, a ratio says that rarebit takes less. `held`: device memory that went with the case, CUDA's own before it left out;
PyTorch's peak: what it allocated, with the weights of the network alone. Load: from opening the files to the first result. Ops: many of one kind in one CUDA graph on
both sides, what they read warm in the cache where it fits.

Ceilings measured here: product of {rates.get("product")} cubed {rates.get("flops_per_s", 0) / 1e12:.3g} TFLOP/s, copy of {rates.get("copied", 0) / 2**30:.2f} GiB
{rates.get("bytes_per_s", 0) / 1e9:.0f} GB/s read and written. The board after the cases: {boards(report)}.
PyTorch's UNet by layout, the faster of which is used: {layout}.

## Goals

{table_of_goals(report["goals"]) if report["goals"] else "They are for a GPU."}
## Results

{errors(report)}
## Networks and images

{networks(report)}
## Ops

{kernels(report)}
## What was not measured

{chr(10).join(notes) or "Nothing was left out."}
"""
