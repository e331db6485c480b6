"""A file of results as they come, from which a program that was stopped goes on."""

import json
import os
from pathlib import Path

from trl_ppo.inputs import UserError


class ResumableLog:
    """A JSONL whose first line is a fingerprint, whatever decides the results, and whose groups of lines are results.

    A group is on disk whole or not at all as far as a reader is concerned: torn lines, and those of a group without its
    last line, are left out and written over. UserError when the file holds other things, or was made with another
    fingerprint; with `overwrite` the latter is replaced when the first group is there.
    """

    holds = item = "results"  # what its error messages say

    def __init__(self, path: Path, fingerprint: dict, overwrite: bool = False):
        self.path, self.fingerprint = path, json.loads(json.dumps(fingerprint))
        self._end = 0  # of the last whole group, in bytes
        if path.exists():
            self._read(overwrite)

    def is_line(self, line) -> bool:
        """Whether the JSON of a line is one of a result."""
        raise NotImplementedError

    def ends_group(self, line: dict) -> bool:
        """Whether the line is its group's last."""
        return True

    def take(self, lines: list[dict]) -> None:
        """Hold the lines of a whole group in memory."""
        raise NotImplementedError

    def _read(self, overwrite: bool) -> None:
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file; give another --output")
        with self.path.open("rb") as stream:
            theirs = _whole_line(stream.readline())
            if theirs is None or (theirs != self.fingerprint and overwrite):
                return
            if theirs != self.fingerprint:
                raise UserError(
                    f"{self.path} holds {self.holds} with another {_difference(theirs, self.fingerprint)}; give "
                    "another --output, or --overwrite to replace them"
                )
            self._end, group = stream.tell(), []
            while (line := _whole_line(stream.readline())) is not None:
                if not self.is_line(line):
                    raise UserError(f"{self.path}: {line!r:.60} is no {self.item} of this program; delete the file")
                group.append(line)
                if self.ends_group(line):
                    self.take(group)
                    self._end, group = stream.tell(), []

    def write(self, lines: list[dict]) -> None:
        """Add a group, synced to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = lines if self._end else [self.fingerprint, *lines]
        with self.path.open("r+b" if self._end else "wb") as stream:
            stream.truncate(self._end)
            stream.seek(self._end)
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            stream.flush()
            os.fsync(stream.fileno())
            self._end = stream.tell()
        self.take(lines)


def _whole_line(line: bytes) -> dict | None:
    """The line's JSON, None if it is torn or the file is at its end."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _difference(theirs: dict, ours: dict) -> str:
    """The first setting in which two fingerprints differ, with both values."""
    theirs = theirs if isinstance(theirs, dict) else {}
    name = next(name for name in [*ours, *theirs] if theirs.get(name) != ours.get(name))
    return f"{name} ({theirs.get(name)}, now {ours.get(name)})"
