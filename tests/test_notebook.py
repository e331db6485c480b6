"""The notebook `recipes/learn_ppo.ipynb`: its code, its formulas, its words, and what it shows; whole only when asked.

The whole of it runs by `make notebook-test`, since that takes minutes.
"""

import ast
import builtins
import importlib.util
import json
import re
import subprocess
import sys

import pytest

import notebook_cells
from conftest import ROOT
from trl_ppo import PPOConfig
from trl_ppo.doctor import SAYS

PATH = ROOT / "recipes" / "learn_ppo.ipynb"
CELLS = notebook_cells.load(PATH)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SAID = "\n\n".join(notebook_cells.text_of(cell) for cell in CELLS if cell["cell_type"] == "markdown")
TERMS = ("policy", "reference", "critic", "KL", "nat", "rollout", "step", "mini-batch", "advantage", "beta")
TERMS += ("explained variance",)
FORMULAS = ("kl_estimate", "token_rewards", "gae", "whiten", "clipped_policy_loss", "clipped_value_loss")
FORMULAS += ("explained_variance", "next_kl_coef")


def tagged(*tags):
    """Whether a cell has one of these tags."""
    return lambda cell: any(tag in cell["metadata"].get("tags", ()) for tag in tags)


def fresh():
    """The notebook again, so that no test sees another's outputs."""
    return notebook_cells.load(PATH)


@pytest.fixture
def in_its_folder(monkeypatch):
    """The notebook's folder, where Jupyter runs it; what its cells change of the process is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(PATH.parent)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it clones or installs though all is there"))


# --- Its code -------------------------------------------------------------------------------------------------------


def test_every_code_cell_compiles_and_what_it_imports_exists(in_its_folder):
    notebook_cells.run(fresh(), {}, tagged("install"))  # puts the project's folders on the path
    modules = set()
    for number, cell in enumerate(CODE, 1):
        for node in ast.walk(ast.parse(notebook_cells.text_of(cell), f"cell {number}")):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules |= {*names, *([node.module] if isinstance(node, ast.ImportFrom) else [])}
    assert {"trl_ppo", "toy_reviews", "matplotlib.pyplot"} <= modules
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


def test_every_name_that_a_cell_uses_is_made_by_it_or_by_one_before(in_its_folder):
    known = {*dir(builtins)}
    for number, cell in enumerate(CODE, 1):
        tree = ast.parse(notebook_cells.text_of(cell))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            if isinstance(node, ast.arg):
                known.add(node.arg)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.asname or alias.name for alias in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used <= known, f"cell {number}: {used - known}"


def test_without_the_repository_the_first_cell_asks_for_its_address_or_clones_and_installs(tmp_path, monkeypatch):
    (cell,) = [cell for cell in CODE if tagged("install")(cell)]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="address of the repository"):
        exec(notebook_cells.text_of(cell), {})
    commands = []

    def pretend(command, check):
        commands.append([str(part) for part in command])
        if command[0] == "git":
            (command[-1] / "recipes" / "trl_ppo").mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", pretend)
    source = notebook_cells.text_of(cell).replace('REPOSITORY = ""', 'REPOSITORY = "https://host/it.git"')
    exec(source, {})
    assert [command[0] for command in commands] == ["git", sys.executable]
    assert commands[0][1:3] == ["clone", "https://host/it.git"]
    assert commands[1][-1] == str(tmp_path / "rlhf_recipes" / "requirements.txt")
    monkeypatch.chdir(tmp_path)
    exec(source, {})  # a second time, as after a restart
    assert len(commands) == 2


def test_the_formula_cells_agree_with_the_numbers_worked_out_by_hand(in_its_folder):
    namespace, ran = {}, fresh()
    notebook_cells.run(ran, namespace, tagged("install", "quick"))
    shown = [cell for cell in ran["cells"] if cell.get("outputs") and tagged("formula")(cell)]
    assert len(shown) == len([cell for cell in CODE if tagged("formula")(cell)]) >= len(FORMULAS)
    for name in FORMULAS:
        cell = next(cell for cell in shown if re.search(rf"\b{name}\(", notebook_cells.text_of(cell)))
        with pytest.raises(AssertionError):
            notebook_cells.run_cell(cell, namespace | {name: twice(namespace[name])}, 1)


def twice(formula):
    """A formula whose every result is doubled."""

    def doubled(*args, **kwargs):
        result = formula(*args, **kwargs)
        return tuple(2 * part for part in result) if isinstance(result, tuple) else 2 * result

    return doubled


# --- Its words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_explained_where_it_first_stands(term):
    first = re.search(rf"(\*\*)?\b{term}\b", SAID, re.IGNORECASE)
    assert first[1] == "**", SAID[first.start() - 60 : first.end() + 60]


def test_every_file_and_setting_that_it_names_exists():
    for link in re.findall(r"\]\(([^)#]+)", SAID):
        assert (PATH.parent / link).exists(), link
    for name in re.findall(r"\b(?:recipes|data_prep|tests)/[\w./-]*\w", SAID):
        assert (ROOT / name).exists(), name
    for call in re.findall(r"`(ppo\(.*?\))`:", SAID):
        keys = {keyword.arg for keyword in ast.parse(call).body[0].value.keywords}
        assert keys <= {*PPOConfig.__dataclass_fields__}
    for setting in re.findall(r"`(\w+)=", SAID):
        assert setting in PPOConfig.__dataclass_fields__, setting


def test_no_formula_within_a_sentence_is_broken_over_two_lines():
    """A line that then began with a minus would become a list."""
    sentences = re.sub(r"\$\$.*?\$\$", "", SAID, flags=re.DOTALL)
    assert not [line for line in sentences.splitlines() if line.count("$") % 2]


# --- What it shows --------------------------------------------------------------------------------------------------


def shown_in(cells):
    """All that cells have printed."""
    return "\n".join("".join(output["text"]) for cell in cells for output in cell["outputs"] if "text" in output)


def lines_of_the_doctor(cell):
    return {name for name in SAYS if f"doctor ({name})" in shown_in([cell])}


def check_what_is_shown(code):
    """A healthy run without a word of the doctor, that writes friendlier reviews; two sick ones, told apart."""
    healthy, too_fast, cheated = [
        cell for cell in code if re.search(r"^\w+ = ppo\(", notebook_cells.text_of(cell), re.M)
    ]
    assert "the doctor says nothing" in shown_in([healthy])
    assert {"jump", "clipped"} & lines_of_the_doctor(too_fast)
    assert {"KL", "repetition", "entropy", "same"} & lines_of_the_doctor(cheated)
    counts = dict(re.findall(r"^(before|after): (\d+) of 200", shown_in(code), re.MULTILINE))
    assert int(counts["after"]) > int(counts["before"]) + 50
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", ())]
    assert len(pictures) == 5


def test_what_is_committed_is_a_whole_run_without_a_trace_of_the_machine():
    text = PATH.read_text()
    assert len(text) < 400_000
    assert not re.search(r"/(root|home|tmp|work|Users|content|mnt)/", json.dumps([cell["outputs"] for cell in CODE]))
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [output for cell in CODE for output in cell["outputs"] if output["output_type"] == "error"]
    assert re.search(r"^commit [0-9a-f]{40}, .+ thread\(s\), seed 42$", shown_in(CODE), re.MULTILINE)
    check_what_is_shown(CODE)


@pytest.mark.slow
def test_the_whole_notebook_runs_and_shows_what_it_should(tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(PATH.parent)
    ran, namespace = fresh(), {"__name__": "__main__"}
    notebook_cells.run(ran, namespace, tagged("install"))
    monkeypatch.chdir(tmp_path)  # data and models go where pytest clears up
    notebook_cells.run(ran, namespace, lambda cell: not tagged("install")(cell))
    check_what_is_shown([cell for cell in ran["cells"] if cell["cell_type"] == "code"][1:])


@pytest.mark.slow
def test_a_jupyter_kernel_runs_it_too(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel for Jupyter's own run")
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel for Jupyter's own run")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel for Jupyter's own run")
    # Its first cell finds the repository from where it starts; a copy keeps what it writes out of this one.
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    ran = nbformat.from_dict(fresh())
    nbclient.NotebookClient(ran, timeout=3600, resources={"metadata": {"path": str(copy / "recipes")}}).execute()
    check_what_is_shown([cell for cell in ran.cells if cell.cell_type == "code"])
