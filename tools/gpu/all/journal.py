"""The journal: one file of JSON lines that holds all that was measured, written line by line so that nothing is lost whenever it ends."""

import json
import os
import time
from pathlib import Path


class Journal:
    """Appends to a file; every line is in it whole, or not at all, as soon as `add` returns."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, step: str, kind: str, data) -> None:
        """`kind` says what `data` is: a fact about the step (begin, end, note, file), or a line that one of its programs wrote (line)."""
        line = json.dumps({"step": step, "at": round(self.seconds(), 2), kind: data}) + "\n"
        os.write(self.file, line.encode())


def read(path: Path) -> list[dict]:
    """Its lines; what was torn where a program was killed is left out."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            found.append(value)
    return found


class Tail:
    """Whole lines of a file that another program appends to, as they come."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def lines(self) -> list:
        """New ones since the last call, decoded; what is no JSON comes as text."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new.rfind(b"\n") + 1
        self.offset += whole
        return [_decoded(line) for line in new[:whole].splitlines() if line.strip()]


def _decoded(line: bytes):
    try:
        return json.loads(line)
    except ValueError:
        return line.decode(errors="replace")
