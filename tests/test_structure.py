"""The house: what `PPOTrainer` overrides, which module may import which, and that `trl_ppo` stands by itself."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

import trl_ppo
from conftest import ROOT
from test_ppo_trainer import make_trainer, roll_out
from trl_ppo import PPOTrainer, compat, logprobs

RECIPES = ROOT / "recipes"
SHARED = {"rewards", "preferences", "command_line", "models_and_data"}  # the modules of recipes/ that others may import

# TRL's hooks are private: each of these may drift with the next release, so each needs its reason.
OVERRIDES = {
    "__init__": "the critic on the policy, checked rewards, PPO's own state",
    "_generate_and_score_completions": "the rollout: values, KL inside the reward, GAE",
    "_generate_single_turn": "sampling depends on the trainer's settings alone, and prompts fit the positions",
    "_prepare_inputs": "new mini-batches for each epoch",
    "_compute_loss": "the clipped policy loss and the clipped value loss",
    "training_step": "a rollout's epochs end at stop_epochs_at_kl; seconds of an update",
    "_get_grad_norm": "a gradient that is not finite stops the run before the step",
    "create_optimizer": "a learning rate of the critic's own",
    "prediction_step": "an evaluation samples; it has no loss",
    "_save": "the critic next to the policy",
    "train": "resumes from complete checkpoints only, with the critic and beta",
    "_determine_best_metric": "no checkpoint past stop_at_kl is the best one",
    "_load_best_model": "the critic of the best checkpoint",
}


def test_the_trainer_overrides_these_methods_of_its_parent_and_no_others():
    methods = {name for name, value in vars(PPOTrainer).items() if inspect.isfunction(value)}
    assert {name for name in methods if hasattr(GRPOTrainer, name)} == set(OVERRIDES)
    for name in OVERRIDES:
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (PPOTrainer, GRPOTrainer))
        takes_all = {"args", "kwargs"} & set(ours)
        assert takes_all or list(ours) == list(theirs), f"{name}: the parent's arguments have changed"


def test_the_bridge_from_trls_old_trainer_overrides_one_hook_more_and_nothing_leans_on_it():
    methods = {name for name, value in vars(compat.PPOTrainer).items() if inspect.isfunction(value)}
    assert {name for name in methods if hasattr(GRPOTrainer, name)} == {"__init__", "_tokenize_prompts", "log"}
    ours, theirs = (inspect.signature(cls._tokenize_prompts).parameters for cls in (compat.PPOTrainer, GRPOTrainer))
    assert list(ours) == list(theirs)
    assert hasattr(grpo_trainer, "create_model_from_path"), "where the reference is put"
    for path in [*modules("recipes"), *modules("eval"), *modules("benchmarks")]:
        assert not any(name.endswith("compat") for name, _, _ in imports(path)), path


# --- Imports --------------------------------------------------------------------------------------------------------


def imports(path: Path):
    """(module, whether at the top of the file, line) of each import; relative ones begin with a dot."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            yield name, node in tree.body, node.lineno


def modules(folder: str):
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


OWN = {path.stem for path in RECIPES.glob("*.py")} | {"trl_ppo"}


@pytest.mark.parametrize("path", modules("recipes/trl_ppo"), ids=lambda path: path.name)
def test_trl_ppo_imports_its_own_modules_relatively_and_nothing_of_the_recipes(path):
    for name, _, line in imports(path):
        assert name.split(".")[0] not in OWN | {"eval", "data_prep"}, f"{path}:{line} imports {name}"


def test_trl_ppo_needs_its_cpu_folder_nowhere():
    for path in modules("recipes/trl_ppo"):
        if path.parent.name != "cpu":
            assert not any(name.startswith((".cpu", "trl_ppo.cpu")) for name, _, _ in imports(path)), path


@pytest.mark.parametrize("path", [*modules("eval"), *modules("data_prep")], ids=lambda path: path.name)
def test_evaluation_and_data_preparation_import_of_the_recipes_what_is_shared(path):
    for name, _, line in imports(path):
        module = name.split(".")[0]
        assert module not in OWN - SHARED - {"trl_ppo"}, f"{path}:{line} imports {name}"
    if path.parent.name == "eval":
        late = [name for name, top, _ in imports(path) if name.startswith("trl_ppo") and not top]
        assert not late, f"{path} imports {late} late"


def test_recipes_import_neither_evaluation_nor_data_preparation():
    for path in RECIPES.glob("*.py"):
        for name, _, line in imports(path):
            assert name.split(".")[0] not in ("eval", "data_prep", "benchmarks"), f"{path}:{line} imports {name}"


def test_no_imports_go_round_in_a_circle():
    """Between the modules of recipes/, trl_ppo's own ones, and eval's."""
    paths = [*RECIPES.glob("*.py"), *modules("recipes/trl_ppo"), *modules("eval")]

    def name_of(path):
        parts = path.with_suffix("").relative_to(RECIPES if RECIPES in path.parents else ROOT).parts
        return ".".join(part for part in parts if part != "__init__")

    graph = {}
    for path in paths:
        name = name_of(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set()
        for target, _, _ in imports(path):
            dots = len(target) - len(target.lstrip("."))
            if dots:
                parts = package.split(".")
                target = ".".join([*parts[: len(parts) - dots + 1], *([target[dots:]] if target[dots:] else [])])
            found.add(target)
        graph[name] = found
    graph = {name: {target for target in found if target in graph and target != name} for name, found in graph.items()}
    assert len(graph["trl_ppo.trainer"]) > 5
    assert "trl_ppo.logprobs" in graph["trl_ppo.cpu.lm_head"]
    while graph:  # take away what imports nothing of the rest
        leaves = {name for name, found in graph.items() if not found}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}


def test_what_is_shared_imports_without_torch():
    """Data preparation and --help need not wait for it."""
    code = "import sys, trl_ppo, trl_ppo.inputs, recipe_args, rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=RECIPES).returncode == 0


def test_trl_ppo_gives_the_trainer_and_every_formula_by_name():
    defined = {name for name, value in vars(trl_ppo.formulas).items() if inspect.isfunction(value)}
    assert set(trl_ppo.__all__) == defined | {"PPOTrainer", "PPOConfig", "RewardModel"}
    assert all(callable(getattr(trl_ppo, name)) for name in trl_ppo.__all__)
    with pytest.raises(ImportError):
        exec("from trl_ppo import no_such_name")


# --- trl_ppo by itself ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from datasets import Dataset
from trl_ppo import PPOConfig, PPOTrainer, RewardModel, gae

policy, classifier, output = sys.argv[1:]


def brevity(prompts, completions, **columns):
    return [-0.1 * len(completion.split()) for completion in completions]


settings = {"use_cpu": True, "bf16": False, "max_completion_length": 6, "report_to": "none", "disable_tqdm": True}
args = PPOConfig(output_dir=output, per_device_train_batch_size=4, total_episodes=8, **settings)
prompts = Dataset.from_dict({"prompt": ["the movie", "a great film with", "i watched it", "the story was so"] * 2})
trainer = PPOTrainer(policy, [RewardModel(classifier), brevity], args, prompts)
trainer.train()
trainer.save_model()
print(trainer.state.global_step, "trl_ppo.cpu" in sys.modules)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install .` puts into site-packages, without its dependencies."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(RECIPES, source / "recipes", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


def test_pip_installs_trl_ppo_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"trl_ppo"}
    expected = {str(path.relative_to(RECIPES)) for path in modules("recipes/trl_ppo")}
    assert {str(path.relative_to(installed)) for path in installed.rglob("*.py")} == expected


@pytest.mark.parametrize("with_cpu_folder", [True, False])
def test_a_script_elsewhere_trains_with_what_was_installed(
    installed, gpt2_path, classifier_path, tmp_path, with_cpu_folder
):
    package = shutil.copytree(installed / "trl_ppo", tmp_path / "site" / "trl_ppo")
    if not with_cpu_folder:
        shutil.rmtree(package / "cpu")
    (tmp_path / "mine.py").write_text(SCRIPT)
    assert len(SCRIPT.strip().splitlines()) <= 25
    env = os.environ | {"PYTHONPATH": str(package.parent)}
    command = [sys.executable, "mine.py", gpt2_path, classifier_path, "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"8 {with_cpu_folder}"
    assert (tmp_path / "out" / "critic.safetensors").exists()


def test_without_the_cpu_folder_a_rollout_is_the_same_but_for_rounding(gpt2_path, tmp_path, monkeypatch):
    fast = make_trainer(gpt2_path, tmp_path)
    monkeypatch.setattr("trl_ppo.trainer.cpu_folder", lambda device: None)
    plain = make_trainer(gpt2_path, tmp_path)
    assert plain.policy.completion_tokens is logprobs.CompletionTokens
    assert "generate" not in vars(plain.policy)
    for trainer in (fast, plain):
        trainer._generate_single_turn = lambda *args, **kwargs: ([[5], [6, 7, 8, 9], [10, 11], [12, 13, 14]], None)
    ours, theirs = roll_out(fast), roll_out(plain)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
