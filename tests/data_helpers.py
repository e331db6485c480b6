"""What the tests of `data_prep` share: reading and writing of rows, and the check of an error's form."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list) -> Path:
    """Write rows as JSONL, compressed where the name ends in .gz; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(main: Callable, *argv) -> dict[str, int]:
    return main([str(argument) for argument in argv])


def fails_in_one_line(capsys, main: Callable, *argv) -> str:
    """The message of the error that `main` ends with; it must be one line, and a status other than 0."""
    with pytest.raises(SystemExit) as stop:
        run(main, *argv)
    assert stop.value.code not in (0, None)
    printed = capsys.readouterr().err  # by the parser; SystemExit with a text is printed by Python itself
    message = stop.value.code if isinstance(stop.value.code, str) else printed.splitlines()[-1]
    assert "\n" not in message.strip()
    assert "usage" not in printed
    return message


def left_out(printed: str) -> dict[str, int]:
    """Reason → rows, of the lines that say what was left out."""
    lines = [line for line in printed.splitlines() if " rows left out" in line]
    parts = (line.split(" rows left out")[0].rsplit(": ", 1) for line in lines)
    return {reason: int(rows.replace(",", "")) for reason, rows in parts}
