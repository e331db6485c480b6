"""Runs a notebook without Jupyter, its code cells in order in one namespace, and writes into it what they show.

    python tests/notebook_cells.py recipes/learn_ppo.ipynb

It prints the seconds of each section. As in Jupyter, a cell shows what it prints, its figures, and its last expression
unless that ends with a semicolon; what goes to stderr is not kept. An error ends it, with the cell's number, and leaves
the file as it was.
"""

import argparse
import ast
import base64
import io
import json
import os
import time
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt


def load(path: Path) -> dict:
    """The notebook's JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict) -> str:
    """A cell's source."""
    return "".join(cell["source"])


def run_cell(cell: dict, namespace: dict, number: int) -> None:
    """Runs one code cell, and puts into it what it shows."""
    source = text_of(cell)
    tree = ast.parse(source)
    shows = isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = ast.Expression(tree.body.pop().value) if shows else None
    result = None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            result = eval(compile(last, f"cell {number}", "eval"), namespace)
    cell["execution_count"], cell["outputs"] = number, []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": lines})
    for figure in map(plt.figure, plt.get_fignums()):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", bbox_inches="tight")
        shown = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": "<Figure>"}
        cell["outputs"].append({"data": shown, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    if result is not None:
        html = getattr(result, "_repr_html_", None)
        shown = {"text/html": html(), "text/plain": "<HTML>"} if html else {"text/plain": repr(result)}
        cell["outputs"].append(
            {"data": shown, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        )


def run(notebook: dict, namespace: dict, wanted=lambda cell: True) -> dict[str, float]:
    """Runs the code cells that are `wanted`; returns the seconds of each section, by its heading."""
    matplotlib.use("Agg")
    section, seconds, number = "", {}, 0
    for cell in notebook["cells"]:
        headings = [line for line in text_of(cell).splitlines() if line.startswith("## ")]
        if cell["cell_type"] == "markdown":
            section = headings[-1].removeprefix("## ") if headings else section
        elif wanted(cell):
            number += 1
            started = time.perf_counter()
            run_cell(cell, namespace, number)
            seconds[section] = seconds.get(section, 0) + time.perf_counter() - started
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Runs the notebook from its own folder, as Jupyter does, and writes it back."""
    parser = argparse.ArgumentParser(description="Run a notebook and keep what its cells show.")
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args(argv).notebook.resolve()
    notebook = load(path)
    os.chdir(path.parent)
    seconds = run(notebook, {"__name__": "__main__"})
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for section, spent in seconds.items():
        print(f"{spent:6.1f} s  {section}")
    print(f"{sum(seconds.values()):6.1f} s  in all; {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
