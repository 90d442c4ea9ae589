"""A process that answers a line of JSON on stdin with one on stdout: the engine (`gpu_check bench-worker`), or compiled PyTorch (peer.py)."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading


class Failed(Exception):
    """The process could not do what it was asked; what it said."""


class Late(Failed):
    """It did not answer in time."""


class Process:
    """One that is alive until it is closed; `with` closes it."""

    def __init__(self, command: list[str], patience: float, environment: dict[str, str] | None = None):
        """`patience`: seconds that an answer may take."""
        self.patience = patience
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.complaints: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._overhear, daemon=True).start()
        try:
            self._answer(patience)
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def _overhear(self) -> None:
        for line in self.process.stderr:
            self.complaints = [*self.complaints, line.strip()][-40:]

    def _answer(self, within: float):
        try:
            line = self.answers.get(timeout=max(within, 0.1))
        except queue.Empty:
            raise Late(f"no answer within {within:.0f} s") from None
        if line is None:
            status = self.process.wait()
            raise Failed(f"its process ended with {status}: {next((c for c in reversed(self.complaints) if c), 'without a word')}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(answer["error"])
        return answer

    def ask(self, request, within: float | None = None):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # It ended: the answer says how.
        return self._answer(self.patience if within is None else within)

    def run(self, calls: int) -> float:
        """Milliseconds per call of what was loaded last."""
        return self.ask({"run": calls})["ms"]

    def close(self) -> None:
        """Ends it and what it started: compilers have workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
