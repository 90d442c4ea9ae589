"""Runs the programs of a timetable's steps: each within its time, what it writes taken into the journal as it is written, what it says kept in a log."""

import ctypes
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from journal import Journal, Tail

# Between two looks at what a program wrote.
LOOK = 0.1
# For a program that is asked to end.
GRACE = 3.0
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Whoever ends this with -9 does not leave its programs on the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Course:
    """What every step knows."""

    # The checkout, and the programs that were packed: one file, or a folder of them.
    tree: Path
    pack: Path
    device: str
    # Where the journal, the report and the packed logs go: three files.
    out: Path
    # Seconds since the journal began by which all must be done.
    total: float
    dtype: str = "bf16"
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rarebit-all-")))

    def __post_init__(self):
        self.out.mkdir(parents=True, exist_ok=True)
        # What comes back, beside what is of no use afterwards: programs, weights, inputs.
        self.kept = self.scratch / "all"
        self.logs = self.kept / "logs"
        self.logs.mkdir(parents=True)
        self.journal = Journal(self.out / "all.jsonl")
        if self.pack.is_file():
            with tarfile.open(self.pack) as tar:
                tar.extractall(self.scratch / "pack", filter="data")
            self.pack = self.scratch / "pack"
        self.behind: list[subprocess.Popen] = []
        self.tails: dict[Path, Tail] = {}

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    def left(self, end: float) -> float:
        return end - self.journal.seconds()

    def environment(self) -> dict[str, str]:
        """The embedded model is read from the checkout, diffusers from the pack, where it holds them."""
        path = [*map(str, sorted(self.pack.glob("diffusers-*.whl"))), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"RAREBIT_ASSETS": str(self.tree / "src/assets"), "PYTHONPATH": ":".join(path), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, name: str, command: list, extra: dict[str, str] | None = None) -> subprocess.Popen:
        """Starts a program whose words go to `logs/NAME.txt`."""
        with (self.logs / f"{name}.txt").open("ab") as log:
            log.write(f"$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            return subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment() | (extra or {}),
                cwd=self.tree, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def run(
        self, step: str, command: list, end: float, follow: Path | None = None, patience: float | None = None, log: str | None = None
    ) -> int | None:
        """Runs a program until it ends, and takes the lines of `follow` into the journal. Its exit code; none where its time was up, or where it
        wrote no line for `patience` seconds."""
        # A file that is gone on with is read on from where it was left.
        tail, heard = self.tails.setdefault(follow, Tail(follow)) if follow else None, time.monotonic()
        process = self.start(log or step, command)
        try:
            while True:
                code = process.poll()
                lines = tail.lines() if tail else []
                for line in lines:
                    self.journal.add(step, "line", line)
                if lines:
                    heard = time.monotonic()
                if code is not None:
                    return code
                if self.left(end) <= 0 or (patience is not None and time.monotonic() - heard > patience):
                    return None
                time.sleep(LOOK)
        finally:
            stop(process)
            for line in tail.lines() if tail else []:
                self.journal.add(step, "line", line)

    def behind_the_scenes(self, name: str, command: list) -> None:
        """Starts a program that nothing waits for yet."""
        self.behind.append(self.start(name, command))

    def wait_for(self, ready: Path, end: float) -> bool:
        """Waits for what a program behind the scenes makes."""
        while not ready.exists():
            if self.left(end) <= 0 or all(process.poll() is not None for process in self.behind):
                return ready.exists()
            time.sleep(LOOK)
        return True

    def close(self) -> None:
        for process in self.behind:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ends a program and all it started: asked first, then killed."""
    for name, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, name)
            process.wait(wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    # Its own children, if it left any.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
