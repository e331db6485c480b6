"""Render `results.json` of `eval.compare` as Markdown, from that JSON alone.

    python -m eval.report eval_dir/results.json

writes `report.md` beside it. Prompts and completions are untrusted text and are escaped; they show as they are.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

SCHEMA_VERSION = 1
NONE = "–"
TABLE_WIDTH = 120  # characters, where the output is not a terminal and so has no width of its own

LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # controls, and those that reorder text
# Whatever Markdown or HTML could act upon inside a line. Underscores within a word are inert and stay readable.
MARKUP = re.compile(r"[&<>\\`*\[\]|~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)

REWARD_LABELS = {"mean": "mean", "median": "median", "share_positive": "share above 0"}
METRIC_LABELS = {
    "kl": "KL(tuned‖base), nats per sequence",
    "length": "completion length, tokens",
    "missing_eos": "share without EOS",
    "distinct_trigrams": "share of distinct trigrams",
}


class ReportError(Exception):
    """A results file that cannot be rendered; its message is one line for the user."""


def escape(text: str) -> str:
    """`text` on one line of Markdown, shown literally: line breaks become ⏎, markup becomes entities.

    Entities, not backslashes: CommonMark never takes an entity for structure, in a table cell or out of it.
    """
    text = INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", LINE_BREAK.sub(" ⏎ ", text))
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", text)


def code(text: str) -> str:
    """`text` as a code span on one line, fenced with more backticks than it holds in a row."""
    text = INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", LINE_BREAK.sub(" ", text))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table_rows(results: dict) -> list[tuple[str, str, str, str, str]]:
    """The table's cells, not escaped: metric, base, tuned, difference (each `value [low, high]`) and n."""
    metrics = results["metrics"]
    rows = [
        _row(f"{name}: {label}", estimates[key])
        for name, estimates in metrics["rewards"].items()
        for key, label in REWARD_LABELS.items()
    ]
    return rows + [_row(label, metrics[key]) for key, label in METRIC_LABELS.items()]


def render(results: dict) -> str:
    """The whole report as Markdown."""
    tuned, base = (escape(results["models"][role]["path"]) for role in ("tuned", "base"))
    blocks = [
        f"# {tuned} against {base}",
        _markdown_table(
            ["metric", "base", "tuned", "tuned − base", "n"],
            [[escape(label), *figures] for label, *figures in table_rows(results)],
        ),
        "Value and 95 % interval. Both models sampled from the same prompts, so differences are paired. Bootstrap over "
        "prompts; for distinct trigrams a delete-one jackknife. KL is measured on the tuned model's samples. An "
        "interval of no width means that all samples agree, not that the value is certain.",
        "## Where this comes from",
        _provenance(results),
        "## Samples",
        "The first prompts by index, not picked.",
        *_samples(results),
    ]
    return "\n\n".join(blocks) + "\n"


def print_table(results: dict) -> None:
    """Print the table of metrics on the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    table = Table("metric")
    for column in ("base", "tuned", "tuned − base", "n"):
        table.add_column(column, justify="right")
    for row in table_rows(results):
        table.add_row(*map(Text, row))  # Text: square brackets are not rich's markup here
    console.print(table)


def write_atomically(path: Path, text: str) -> None:
    """Write `path` whole or not at all, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_report(results_path: Path) -> Path:
    """Render `results_path` to `report.md` in its folder and return that path; ReportError if it cannot be read."""
    try:
        results = json.loads(results_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {results_path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{results_path} is not JSON: {error}") from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportError(f"{results_path} has schema_version {version!r}, this program reads {SCHEMA_VERSION}")
    report = results_path.with_name("report.md")
    write_atomically(report, render(results))
    return report


def _estimate(estimate: dict | None, sign: str = "") -> str:
    """`value [low, high]`; `sign="+"` writes the sign of positive numbers too."""
    if estimate is None or estimate["mean"] is None:
        return NONE
    style = f"{sign}z.3f"  # z: a rounded −0.0004 is 0.000
    if estimate["low"] is None:
        return f"{estimate['mean']:{style}}"
    return f"{estimate['mean']:{style}} [{estimate['low']:{style}}, {estimate['high']:{style}}]"


def _row(label: str, metric: dict) -> tuple[str, str, str, str, str]:
    return (
        label,
        _estimate(metric["base"]),
        _estimate(metric["tuned"]),
        _estimate(metric["difference"], "+"),
        str(metric["tuned"]["n"]),
    )


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Cells are Markdown already: whatever is untrusted in them is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(results: dict) -> str:
    prompts, hardware = results["prompts"], results["hardware"]
    facts = {
        "command": results["command"],
        "created": f"{results['created']}, in {results['wall_seconds']:.0f} s",
        "commit": results["git_commit"] or "not in git",
        **{role: _with_hash(results["models"][role]) for role in ("base", "tuned")},
        **{f"reward {name}": _with_hash(reward) for name, reward in results["rewards"].items()},
        "prompts": f"{prompts['source']}, split {prompts['split']}, first {prompts['n']}, sha256 {prompts['sha256']}",
        "settings": ", ".join(f"{name} {value}" for name, value in results["settings"].items()),
        "seed": str(results["seed"]),
        "hardware": f"{hardware['cpu']}, {hardware['threads']} threads, GPU {hardware['gpu'] or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    return "\n".join(f"- {escape(name)}: {code(fact)}" for name, fact in facts.items())


def _with_hash(source: dict) -> str:
    return source["path"] + (f", sha256 {source['sha256']}" if source["sha256"] else "")


def _samples(results: dict) -> list[str]:
    """One block of Markdown for each of the first `n_samples` samples."""
    names = list(results["metrics"]["rewards"])
    shown = results["samples"][: results["settings"]["n_samples"]]
    header = ["", "text", *map(escape, names), "tokens", "KL"]
    blocks = []
    for sample in shown:
        rows = [["prompt", escape(sample["prompt"]), *[""] * (len(names) + 2)]]
        rows += [_sample_row(role, sample[role], names) for role in ("base", "tuned")]
        blocks.append(f"### {sample['index']}\n\n{_markdown_table(header, rows)}")
    return blocks


def _sample_row(role: str, side: dict, names: list[str]) -> list[str]:
    tokens = f"{side['tokens']}" + ("" if side["ended"] else ", no EOS")
    kl = NONE if side["kl"] is None else f"{side['kl']:z.2f}"
    return [role, escape(side["completion"]), *[f"{side['scores'][name]:z.3f}" for name in names], tokens, kl]


def main(argv: list[str] | None = None) -> Path:
    """Render the named results file again; returns the report's path."""
    parser = argparse.ArgumentParser(prog="eval.report", description="Render results.json as report.md.")
    parser.add_argument("results", type=Path, help="a results.json written by eval.compare")
    args = parser.parse_args(argv)
    try:
        report = write_report(args.results)
    except ReportError as error:
        sys.exit(f"eval.report: error: {error}")
    print(report)
    return report


if __name__ == "__main__":
    main()
