"""Render `results.json` of `eval.compare` as Markdown and as one HTML page, from that JSON alone.

    python -m eval.report eval_dir/results.json

writes `report.md` and `report.html` next to it. Prompts and completions are untrusted text and are escaped; they show
as they are.
"""

import json
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from command_line import OneLineParser
from eval.tables import NONE, WORDS, Table, facts, label_of, table_rows, tables, title_of, worst
from eval.verdict import sentences, verdict
from trl_ppo.inputs import first_line

SCHEMA_VERSION = 2
TABLE_WIDTH = 140  # characters, where the output is not a terminal and so has no width of its own

GUIDE = "How to read this, and what to do next: `recipes/guides/read_a_report.md` in the project's folder."

LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # controls, and those that reorder text
# Whatever Markdown or HTML could act upon inside a line. Underscores within a word are inert and stay readable.
MARKUP = re.compile(r"[&<>\\`*\[\]|~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
INTERVAL = re.compile(r"&#91;([-+.\d]+, [-+.\d]+)&#93;")


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


def render(results: dict) -> str:
    """The whole report as Markdown."""
    blocks = [f"# {escape(title_of(results))}", readable(" ".join(verdict(results))), GUIDE]
    blocks += ["Means, with 95 % intervals:", "\n".join(f"- {readable(text)}" for text in sentences(results))]
    for table in tables(results):
        blocks += [f"## {escape(table.title)}", markdown_table(table), escape(table.note)]
    blocks += ["## What the words mean", "\n".join(f"- {word}: {meaning}" for word, meaning in WORDS.items())]
    blocks += [
        "## Where this comes from",
        "\n".join(f"- {escape(name)}: {code(fact)}" for name, fact in facts(results).items()),
    ]
    if results["kind"] == "comparison":
        shown = results["samples"][: results["settings"]["n_samples"]]
        blocks += ["## Samples", "The first prompts by index, not picked.", *_samples(results, shown)]
        if shown:
            name = next(iter(results["rewards"]))
            blocks += [f"## The five lowest by {escape(name)}", *_samples(results, worst(results, name))]
    return "\n\n".join(blocks) + "\n"


def print_table(results: dict) -> None:
    """Print the table of metrics, and what they say in words, on the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    table = TerminalTable()
    table.add_column("metric", overflow="fold")
    for column in ("base", "tuned", "tuned − base", "n"):
        table.add_column(column, justify="right", no_wrap=console.width >= 120)  # below, nothing fits
    for row in table_rows(results):
        table.add_row(*map(Text, row))  # Text: square brackets are not rich's markup here
    console.print(table)
    for text in verdict(results):
        console.print(Text(text))


def write_atomically(path: Path, text: str) -> None:
    """Write `path` whole or not at all, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_results(path: Path) -> dict:
    """The results in a file; ReportError if it cannot be read or has another schema version."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportError(f"{path} has schema_version {version!r}, this program reads {SCHEMA_VERSION}")
    return results


def write_report(results_path: Path) -> list[Path]:
    """Render `results_path` to `report.md` and `report.html` in its folder and return their paths; ReportError."""
    from eval.page import render_page  # here, because importing matplotlib takes a second

    results = read_results(results_path)
    try:
        rendered = {"report.md": render(results), "report.html": render_page(results)}
        "".join(rendered.values()).encode()
    except Exception as error:  # a file that something else wrote, or changed, may be wrong in any way
        raise ReportError(f"{results_path} is not whole: {type(error).__name__} {first_line(error)}") from error
    for name, text in rendered.items():
        write_atomically(results_path.with_name(name), text)
    return [results_path.with_name(name) for name in rendered]


def markdown_table(table: Table) -> str:
    """The table in Markdown, its cells escaped."""
    return _lines([[readable(cell) for cell in row] for row in [table.header, *table.rows]])


def readable(text: str) -> str:
    """`text` escaped, but for the brackets of intervals, which are inert and would be hard to read in the source."""
    return INTERVAL.sub(r"[\1]", escape(text))


def _lines(rows: list[list[str]]) -> str:
    """Cells are Markdown already: whatever is untrusted in them is escaped. The first row is the header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _samples(results: dict, shown: list[dict]) -> list[str]:
    """One block of Markdown for each of the given samples."""
    names = list(results["rewards"])
    header = ["", "text", *(escape(label_of(results, name)) for name in names), "tokens", "log ratio, nats"]
    blocks = []
    for sample in shown:
        texts = [name for name in ("prompt", "reference") if name in sample]
        rows = [[name, escape(sample[name]), *[""] * (len(names) + 2)] for name in texts]
        rows += [_sample_row(role, sample[role], names) for role in ("base", "tuned")]
        blocks.append(f"### {sample['index']}\n\n{_lines([header, *rows])}")
    return blocks


def _sample_row(role: str, side: dict, names: list[str]) -> list[str]:
    tokens = f"{side['tokens']}" + ("" if side["ended"] else ", no EOS")
    kl = NONE if side["kl"] is None else f"{side['kl']:z.2f}"
    return [role, escape(side["completion"]), *[f"{side['scores'][name]:z.3f}" for name in names], tokens, kl]


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog="eval.report", description="Render results.json as Markdown and HTML.")
    parser.add_argument("results", type=Path, help="a results.json written by eval.compare, or its folder")
    return parser


def main(argv: list[str] | None = None) -> list[Path]:
    """Render the named results file again; returns the reports' paths."""
    args = make_parser().parse_args(argv)
    try:
        results = args.results / "results.json" if args.results.is_dir() else args.results
        reports = write_report(results)
    except ReportError as error:
        sys.exit(f"eval.report: error: {error}")
    print(*reports)
    return reports


if __name__ == "__main__":
    main()
