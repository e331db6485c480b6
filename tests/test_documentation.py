"""What the documentation says can be run can be run: every command, path and setting in it exists and parses."""

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import GRPOTrainer, ModelConfig

from command_line import parse
from conftest import ROOT
from recipe_args import PPOArguments
from test_recipes import VARIANTS, YAMLS, name_of, script_of
from trl_ppo import PPOConfig, PPOTrainer

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
CODE = ("recipes", "data_prep", "eval", "benchmarks")
SCRIPTS = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
CONFIGS = [*YAMLS, *sorted((ROOT / "accelerate_configs").glob("*.yaml"))]
COMMAND = re.compile(r"^(?:accelerate launch|python|make) (?:\\\n|[^\n])*", re.MULTILINE)
FOLDERS = ("recipes", "accelerate_configs", "data_prep", "eval", "tests", "benchmarks")


def prose(path: Path) -> str:
    """What a file says to people: Markdown whole, docstrings of a script, the comments of a YAML."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    if path.suffix == ".py":
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        return "\n".join(ast.get_docstring(n) or "" for n in ast.walk(ast.parse(text)) if isinstance(n, nodes))
    return "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


def commands(path: Path):
    """Each command in a block or in backticks; of a usage line its optional arguments too, N standing for 1."""
    text = prose(path)
    inline = re.findall(r"`((?:accelerate launch|python|make) [^`]+)`", text)
    blocks = COMMAND.findall("\n".join(line.strip() for line in text.splitlines() if "`" not in line))
    plain = [found.replace("\\\n", " ").replace("[", "").replace("]", "").replace(" N", " 1") for found in blocks]
    return [shlex.split(re.sub(r"\s#\s.*", "", found)) for found in plain + inline]


EVERY = [(path, command) for path in [*DOCUMENTS, *SCRIPTS, *CONFIGS] for command in commands(path)]


def test_the_documentation_holds_the_commands_that_it_should():
    assert len(EVERY) > 20
    readme = [" ".join(command) for command in commands(ROOT / "README.md")]
    assert {"make demo", "make test"} <= set(readme)
    for stage in ("sft", "reward", "ppo"):
        assert any(f"recipes/sentiment_gpt2_{stage}.py" in command for command in readme)
    assert any("eval.compare" in command for command in readme)


@pytest.mark.parametrize(("path", "command"), EVERY, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_every_documented_command_exists_and_parses(path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(command[1:]) <= set(targets)
    elif command[:2] == ["accelerate", "launch"]:
        launch = command[2:]
        if launch == ["--config_file"]:  # named, not given
            return
        options = launch_command_parser().parse_args(launch)
        assert options.config_file is None or (ROOT / options.config_file).is_file()
        script = ROOT / options.training_script
        types = typing.get_type_hints(importlib.import_module(script.stem).main).values()
        parse(str(script), *types, args=options.training_script_args)
    elif command[:2] == ["python", "-m"]:
        parser = importlib.import_module(command[2]).make_parser()
        if command[3:]:  # else the module is named alone
            parser.parse_args(command[3:])
    elif command[1].startswith("recipes/"):
        types = typing.get_type_hints(importlib.import_module(Path(command[1]).stem).main).values()
        parse(str(ROOT / command[1]), *types, args=command[2:])
    else:
        script = ROOT / command[1]
        importlib.import_module(f"{script.parent.name}.{script.stem}").make_parser().parse_args(command[2:])


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS, *CONFIGS], ids=lambda path: path.name)
def test_every_path_of_the_project_that_is_named_exists(path):
    for name in re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]", prose(path)):
        if Path(name).stem != "x":  # recipes/x.py stands for any recipe
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("heading", ["Names of PPOConfig", "From TRL 0.11 and older"])
def test_every_setting_that_the_tables_of_old_names_map_to_exists(heading):
    text = (ROOT / "recipes" / "guides" / "from_trl.md").read_text()
    table = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    known = set(PPOConfig.__dataclass_fields__) - set(PPOConfig.REFUSED)
    known |= set(ModelConfig.__dataclass_fields__)
    known |= {*inspect.signature(PPOTrainer).parameters, *inspect.signature(GRPOTrainer).parameters}
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) > 15
    for row in rows:
        for name in re.findall(r"`(\w+)`", row):
            assert name in known, name


def test_every_metric_that_the_trainer_tracks_is_in_the_glossary():
    glossary = (ROOT / "recipes" / "README.md").read_text()
    names = re.findall(r'_track\(f?"([\w/{}]+)"', (ROOT / "recipes" / "trl_ppo" / "trainer.py").read_text())
    assert len(names) > 15
    for name in names:
        assert f"`{name.replace('{name}', '<function>')}`" in glossary, name


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_a_yaml_header_gives_its_command_and_what_to_expect(path):
    header = prose(path)
    script = str(script_of(path).relative_to(ROOT))
    launched = [command for command in commands(path) if command[:2] == ["accelerate", "launch"] and script in command]
    wanted = ["--config", path.stem] if path in VARIANTS else []
    assert any(command[command.index(script) + 1 :][:2] == wanted for command in launched), "its own command"
    measured = all(re.search(sign, header) for sign in (r"\d+ (?:s|min)\b", r"\d\.\d GB of memory", r"\d\.\d"))
    not_run = "memory, time" in header and "not yet run" in header
    assert measured or not_run, "time, memory and number, or 'not yet run'"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_an_accelerate_config_is_short_and_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert 6 <= len(yaml.safe_load(path.read_text())) <= 10
    assert load_config_from_file(str(path)).num_processes >= 1


def test_the_table_of_defects_has_38_rows_and_every_test_it_names_exists():
    table = (ROOT / "tests" / "README.md").read_text().split("## What TRL's last PPOTrainer got wrong")[1]
    rows = {int(row.split("|")[1]): row for row in table.splitlines() if re.match(r"\| \d+ \|", row)}
    assert sorted(rows) == list(range(1, 39))
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.M))
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "not yet run" in row, f"row {number} shows nothing and does not say so"
        assert set(named) <= defined, f"row {number}: {set(named) - defined}"


# --- Examples, run as they stand ------------------------------------------------------------------------------------


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def demo_folder(gpt2_path, classifier_path, tmp_path, monkeypatch):
    """A working directory with models where `make demo` puts them."""
    for name, source in (("sft", gpt2_path), ("reward", classifier_path)):
        shutil.copytree(source, tmp_path / "runs" / "tiny" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_reward_of_ones_own_works_as_it_stands(demo_folder):
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "def no_shouting" in block]
    name = re.match(r"# (\S+)\n", code)[1]
    (demo_folder / name).write_text(code)
    (setting,) = [block for block in blocks(ROOT / "README.md", "yaml") if name in block]
    args = PPOArguments(dataset_name="x", reward_model="runs/tiny/reward", **yaml.safe_load(setting))
    config = PPOConfig("out", use_cpu=True, bf16=False, per_device_train_batch_size=8, report_to="none")
    args.check(config, ModelConfig())
    _, no_shouting = args.load_rewards(config, ModelConfig())
    assert config.reward_weights == [1.0, 0.5]
    assert no_shouting(prompts=["a", "b"], completions=["NO", "no"]) == [-1.0, 0.0]


def test_the_readmes_script_trains_as_it_stands(demo_folder):
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "PPOTrainer(" in block]
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 64 // 8 * 4


def test_the_guides_translation_of_an_old_script_trains_as_it_stands(demo_folder):
    (code,) = [
        block for block in blocks(ROOT / "recipes" / "guides" / "from_trl.md", "python") if "reward_funcs=" in block
    ]
    namespace = {}
    exec(compile(code, "from_trl.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert trainer.state.global_step == 32 // 16 * 4 * 4
    lengths = {len(trainer.processing_class(row["prompt"])["input_ids"]) for row in trainer.train_dataset}
    assert min(lengths) == 2
    assert max(lengths) == 7
    assert (demo_folder / "runs" / "mine" / "critic.safetensors").is_file()


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.name)
def test_every_mapping_of_rewards_in_the_documentation_parses(path):
    for found in re.findall(r"rewards: (\{[^}\n]*\})", prose(path)):
        weights = yaml.safe_load(found)
        if "weight" not in weights.values():  # rewards: {name: weight} stands for any
            assert all(isinstance(weight, float) for weight in weights.values()), found
