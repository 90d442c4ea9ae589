"""The timetable: what is done on a GPU in which order, broad before deep, and the second by which each step must end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    step: str
    # Of a run of FULL seconds; a shorter or longer run has the same shares. None: what is left.
    seconds: int | None
    what: str


FULL = 590
# To write the report and pack what came back.
RESERVE = 5

CHECK = [
    Entry("kernels", 40, "conformance with one seed; every kernel of the build at shapes of real models, those for Hopper beside those for any GPU"),
    Entry("images", 25, "the embedded model's image, the tiny models"),
    Entry("sanitizers", 60, "memcheck and synccheck over the check's kernels, those at shapes of real models first"),
    Entry("check", None, "the full check"),
]
TIMETABLES = {
    "all": [
        Entry("machine", 15, "versions, imports, ceilings (a product of 8192 cubed, a copy of 2 GiB), the gap between empty kernels of a graph"),
        *CHECK[:2],
        Entry("profile", 60, "every op of the real networks: SD 1.5 at batch 2 and 16, SDXL at 2, decode, gradient"),
        Entry("sweep", 60, "tile, splits and stages of products, by shape"),
        Entry("pytorch", 150, "interleaved with PyTorch: UNet of 2 and 16, gradient, decode, SDXL's UNet of 2, a short list of ops"),
        Entry("ncu", 60, "hardware counters of eight kernels"),
        *CHECK[2:],
    ],
    "check": CHECK,
    "bench": [
        Entry("machine", 15, "versions, imports, ceilings"),
        Entry("bench", None, "every case of the benchmarks interleaved with PyTorch"),
    ],
}


def schedule(part: str, total: float) -> list[tuple[Entry, float, float]]:
    """Each entry of a part with the second at which it is due to begin and the one by which it must have ended. What a step leaves is the next
    ones' to use; what a step would take beyond its end it does not get."""
    entries, at, found = TIMETABLES[part], 0.0, []
    usable = total - RESERVE
    fixed = sum(entry.seconds or 0 for entry in entries)
    # Twice the time is twice that of each step; the last one may have to go without.
    scale = min(total / FULL, usable / fixed)
    for entry in entries:
        end = usable if entry.seconds is None else min(at + entry.seconds * scale, usable)
        found.append((entry, at, end))
        at = end
    return found


def table(part: str, total: float) -> str:
    """The schedule for people, with what it adds up to."""
    rows = schedule(part, total)
    lines = [f"{begin:6.0f} {end - begin:6.0f}  {entry.step:<11} {entry.what}" for entry, begin, end in rows]
    lines.append(f"{rows[-1][2]:6.0f} {RESERVE:6.0f}  {'report':<11} the report, and one file of all that came back")
    spent = sum(end - begin for _, begin, end in rows) + RESERVE
    return "\n".join([" begin   for  step        what", *lines, f"{'':6} {spent:6.0f}  seconds of {total:.0f}"])
