"""The timetable, the journal and the report, with programs made up for it: `python -m unittest discover -s tools/gpu/all`."""

import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
from pathlib import Path

import journal
import steps
import summary
import timetable

HERE = Path(__file__).resolve().parent

# Writes rows as gpu_check does, a few at once; what it is told to do stands in place of a section's name.
PROGRAM = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
rows = words[words.index("--journal") + 1]
section = words[words.index("--only") + 1] if "--only" in words else "all"
with open(rows, "a") as file:
    for n in range(40):
        row = dict(section=section, name=f"case {{n}}", dtype="f16", state="passed" if n < 38 else "failed", error=1e-3 * (1 + n),
                   allowed=3.85e-2, milliseconds=1.0, what="made up", kernels=["k"])
        file.write(json.dumps(dict(row=row)) + "\\n")
        file.flush()
        time.sleep(0.005)
    if "conformance" in section:
        file.write(json.dumps(dict(incident=dict(section=section, name="case 38 f16", kernel="wrong_f16", quarantined=True, what="off by a lane"))) + "\\n")
    file.write(json.dumps(dict(end=dict(seconds=0.2, never_launched=[]))) + "\\n")
print("quarantined", words[words.index("--quarantine") + 1] if "--quarantine" in words else "none", flush=True)
sys.exit(1 if "conformance" in section else 0)
"""


def pack(folder: Path) -> Path:
    program = folder / "gpu_check"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    (folder / "revision").write_text("made-up\n")
    return folder


def start(out: Path, packed: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE), *words, "--device", "emulated", "--pack", str(packed)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(out.parent)})


class Timetable(unittest.TestCase):
    def test_it_adds_up_to_the_limit(self):
        for part in timetable.TIMETABLES:
            for total in (60, 240, 590, 3600):
                rows = timetable.schedule(part, total)
                self.assertEqual(rows[-1][2] + timetable.RESERVE, total, part)
                self.assertTrue(all(before[2] == after[1] for before, after in zip(rows, rows[1:])))
                self.assertTrue(all(begin < end for _, begin, end in rows), (part, total))
        longer = timetable.schedule("all", 1180)
        self.assertEqual([end - begin for _, begin, end in longer[:2]], [30, 80])
        self.assertEqual(sum(entry.seconds or 0 for entry in timetable.TIMETABLES["all"]), 470)
        self.assertIn("590  seconds of 590", timetable.table("all", 590))

    def test_every_step_has_its_commands(self):
        self.assertEqual({entry.step for part in timetable.TIMETABLES.values() for entry in part}, set(steps.RUN))


class Whole(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.folder / "pack").mkdir()
        self.pack = pack(self.folder / "pack")

    def test_three_files_come_back_and_the_page_says_what_failed(self):
        out = self.folder / "out"
        self.assertEqual(start(out, self.pack, "check", str(out), "60").wait(60), 1)
        self.assertEqual(sorted(path.name for path in out.iterdir()), ["all.jsonl", "all.md", "all.tar.gz"])
        page = (out / "all.md").read_text()
        self.assertIn("All steps of the timetable were gone through", page)
        self.assertIn("| kernels | conformance,kernels | 38 | 2 | 0 |", page)
        self.assertIn("- **wrong_f16, not launched again**: conformance,kernels, case 38 f16: off by a lane", page)
        self.assertIn("6 rows failed", page)
        self.assertRegex(page, r"\| kernels \|[^\n]*NOT PASSED: 2 rows failed, 1 incidents \|")
        # Sanitizers have nothing to do without a GPU.
        self.assertRegex(page, r"\| sanitizers \|[^\n]*not run: no ")
        # What one step found to be wrong the next are told.
        with tarfile.open(out / "all.tar.gz") as tar:
            self.assertIn(b"quarantined wrong_f16", tar.extractfile("all/logs/images.txt").read())
        # A second run does not write over the first.
        self.assertEqual(start(out, self.pack, "check", str(out), "60").wait(60), 2)

    def test_killed_at_any_moment_it_keeps_what_was_measured(self):
        moments = random.Random(1)
        most = 0
        for number in range(20):
            out = self.folder / f"out{number}"
            process = start(out, self.pack, "check", str(out), "60")
            time.sleep(moments.uniform(0.1, 1.6))
            process.send_signal(signal.SIGKILL)
            process.wait()
            if not (out / "all.jsonl").exists():
                continue
            rows = sum(1 for line in (out / "all.jsonl").read_bytes().split(b"\n") if b'"row"' in line and line.endswith(b"}"))
            self.assertEqual(subprocess.run([sys.executable, str(HERE), "report", str(out)], capture_output=True, check=False).returncode, 0)
            page = (out / "all.md").read_text()
            told = re.findall(r"^\| \w+ \| [\w,]+ \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
            self.assertEqual(sum(int(count) for line in told for count in line), rows)
            self.assertEqual("Broken off" in page, b'"done"' not in (out / "all.jsonl").read_bytes())
            most = max(most, rows)
        self.assertGreater(most, 40)
        # Nothing goes on behind its back.
        time.sleep(0.3)
        left = subprocess.run(["pgrep", "-f", str(self.pack / "gpu_check")], capture_output=True, text=True, check=False).stdout
        self.assertEqual(left, "")


class Verdict(unittest.TestCase):
    ROW, END = {"row": {"state": "passed"}}, {"end": {"seconds": 1.0, "never_launched": []}}

    def test_what_a_check_found(self):
        section = lambda reached: {"section": {"section": "ops", "items": 5, "reached": reached}}  # noqa: E731
        self.assertEqual(steps.verdict(0, [section(0), self.ROW, section(5), self.END]), "passed")
        self.assertEqual(steps.verdict(1, [self.ROW, section(2), self.END]), "nothing wrong in 1 rows; 3 items not reached, the time was up")
        self.assertEqual(steps.verdict(None, [self.ROW]), "nothing wrong in 1 rows; some items not reached, the time was up")
        self.assertEqual(steps.verdict(1, [section(5), {"end": {"never_launched": ["k"]}}]), "NOT PASSED: 1 kernels never launched")
        self.assertEqual(steps.verdict(1, [section(5), self.END]), "NOT PASSED: exit code 1")


class Journal(unittest.TestCase):
    def test_a_torn_line_is_left_out(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "all.jsonl"
            journal.Journal(path).add("machine", "line", {"ms": 1.5})
            whole = path.read_bytes()
            path.write_bytes(whole + whole[: len(whole) // 2])
            self.assertEqual([entry["line"] for entry in journal.read(path)], [{"ms": 1.5}])
            self.assertIn("Broken off", summary.markdown(journal.read(path)))

    def test_lines_come_whole_as_another_writes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            tail = journal.Tail(path)
            self.assertEqual(tail.lines(), [])
            path.write_text('{"a": 1}\n{"b"')
            self.assertEqual(tail.lines(), [{"a": 1}])
            path.write_text('{"a": 1}\n{"b": 2}\nwords\n')
            self.assertEqual(tail.lines(), [{"b": 2}, "words"])

    def test_counters_of_a_table_that_is_not_as_expected(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ncu.csv"
            self.assertEqual(steps.counters(path), [])
            path.write_text('==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","k","Duration","nsecond","1200"\n"0","k","Odd","",""\n')
            self.assertEqual(steps.counters(path), [{"kernel": "k", "duration, ns": "1200"}])
            self.assertIn("| k | 1200 |", summary.counters([{"ncu": steps.counters(path)}]))

    def test_measurements_of_ops_and_cuts(self):
        op = {"what": "unet:2", "op": "gemm 8x8", "count": 3, "kernels": ["gemm_rr_64_f16"], "ms": 0.5, "least_ms": 0.25}
        whole = {"what": "unet:2", "ops": 7, "launches": 9, "least_ms": 1.0, "ms": 2.0}
        broken = {"what": "unet:2", "op": "norm", "count": 1, "error": "a fault"}
        page = summary.profile([{"profile": {"model": "/x/sd15-bf16"}}, op, broken, whole])
        self.assertIn("**sd15-bf16 unet:2**: whole 2.000 ms in 9 launches, at least 1.000 ms by peak rates; its parts alone 1.500 ms", page)
        self.assertIn("| gemm 8x8 | 3 | 0.5000 | 1.500 | 2.0 | gemm_rr_64_f16 |", page)
        self.assertIn("- failed: norm: a fault", page)
        cut = lambda tile, ms: {"case": "c", "tile": tile, "hopper": True, "splits": 1, "stages": 5, "ms": ms}  # noqa: E731
        page = summary.sweep([{"sweep": 1}, {"begin": {}}, cut("128", 0.003), cut("160", 0.002)])
        self.assertIn("| c | 2 | 128 Hopper, 1 parts, 5 stages | 3.0 | 160 Hopper, 1 parts, 5 stages | 2.0 | 1.50 |", page)
        self.assertEqual(summary.sweep([]) + summary.profile([]), "")


if __name__ == "__main__":
    unittest.main()
