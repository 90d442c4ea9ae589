"""One command for the minutes on a GPU: runs a timetable, keeps everything as it is measured, and writes a report (tools/gpu/README.md).

    python3 tools/gpu/all all DIR [SECONDS]         all that is worth knowing, broad before deep (590 s)
    python3 tools/gpu/all check|bench DIR [SECONDS]  a part
    python3 tools/gpu/all all --timetable            what it would do, and when
    python3 tools/gpu/all report DIR                 the report of what is in DIR, also after a run that was killed
"""

import argparse
import datetime
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import summary
import timetable
from course import Course
from steps import RUN, NotRun, probe, revision

TREE = Path(__file__).resolve().parents[3]


def run(course: Course, part: str) -> bool:
    """All steps in order; whether nothing went wrong in what there was to do here, and time to do."""
    outcomes = []
    plan = timetable.schedule(part, course.total)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    head = {"part": part, "date": today, "device": course.device, "dtype": course.dtype, "revision": revision(course), "seconds": course.total}
    course.journal.add("start", "head", head | {"timetable": [[entry.step, begin, end, entry.what] for entry, begin, end in plan]})
    for entry, _, end in plan:
        course.journal.add(entry.step, "begin", round(course.left(end), 1))
        say(course, f"{entry.step}: {entry.what}")
        try:
            outcome = RUN[entry.step](course, end) if course.left(end) > 2 else "not run: the time was up"
        except NotRun as why:
            outcome = f"not run: {why}"
        except Exception as error:  # noqa: BLE001 - one step must not take the rest along
            outcome = f"FAILED: {type(error).__name__}: {error}"
        course.journal.add(entry.step, "end", outcome)
        say(course, f"{entry.step}: {outcome}")
        outcomes.append(outcome)
        write(course)
    course.journal.add("start", "done", True)
    write(course)
    return not any(word in outcome for outcome in outcomes for word in ("NOT PASSED", "FAILED", "FOUND", "ended with"))


def say(course: Course, words: str) -> None:
    print(f"{course.journal.seconds():4.0f} s  {words}", file=sys.stderr, flush=True)


def write(course: Course) -> None:
    """The report of what is known so far, and all logs in one file; each takes its place whole."""
    summary.write(course.out)
    packed = course.out / "all.tar.gz"
    with tarfile.open(packed.with_suffix(".partial"), "w:gz") as tar:
        tar.add(course.kept, arcname="all")
    packed.with_suffix(".partial").replace(packed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*timetable.TIMETABLES, "report"])
    parser.add_argument("out", nargs="?", type=Path, metavar="DIR", help="where the report goes: all.md, all.jsonl, all.tar.gz")
    parser.add_argument("seconds", nargs="?", type=float, default=timetable.FULL, help="that it may take [590]")
    parser.add_argument("--timetable", action="store_true", help="print what would be done, and when")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or emulated: a rehearsal without a GPU")
    parser.add_argument("--dtype", default="bf16", choices=("f16", "bf16"), help="of what is timed")
    parser.add_argument("--pack", type=Path, default=TREE / "target/gpu-check.tar.xz", help="what tools/gpu/pack made, or a folder of it")
    args = parser.parse_intermixed_args()
    if args.timetable:
        # Seconds may come alone: there is no DIR to give.
        total = float(args.out.name) if args.out and args.out.name.isdigit() else args.seconds
        print(timetable.table(args.part if args.part in timetable.TIMETABLES else "all", total))
        return 0
    if args.out is None:
        parser.error("give a DIR for the report")
    if args.part == "report":
        if not (args.out / "all.jsonl").exists():
            parser.error(f"{args.out} has no all.jsonl; give the DIR of a run")
        summary.write(args.out)
        print(args.out / "all.md")
        return 0
    if args.seconds < 30:
        parser.error("less than 30 seconds are no use")
    if not (args.pack / "gpu_check").exists() and not args.pack.is_file():
        parser.error(f"there is no {args.pack}; tools/gpu/pack makes it")
    if (args.out / "all.jsonl").exists():
        parser.error(f"{args.out} holds a run already; give another DIR")
    course = Course(tree=TREE, pack=args.pack.resolve(), device=args.device, out=args.out, total=args.seconds, dtype=args.dtype)
    if course.gpu and (why := probe(course)):
        shutil.rmtree(course.scratch, ignore_errors=True)
        (args.out / "all.jsonl").unlink()
        print(f"run: {why}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        passed = run(course, args.part)
    finally:
        course.close()
        write(course)
        shutil.rmtree(course.scratch, ignore_errors=True)
    print((args.out / "all.md").read_text().split("\n## ")[0])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
