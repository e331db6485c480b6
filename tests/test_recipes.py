"""The recipes as a whole, in-process on tiny settings, and the files around them."""

import ast
import importlib
import importlib.util
import shutil
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from command_line import parse
from conftest import ROOT
from data_prep import toy_reviews
from models_and_data import load_split
from trl_ppo.inputs import UserError

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.with_suffix(".yaml").exists())
VARIANTS = sorted((ROOT / "recipes" / "variants").glob("*/*.yaml"))
YAMLS = [*sorted((ROOT / "recipes").glob("*.yaml")), *VARIANTS]


def script_of(config: Path) -> Path:
    """The recipe of a YAML: the one next to it, or the one that its folder of variants is named after."""
    stem = config.parent.name if config in VARIANTS else config.stem
    return ROOT / "recipes" / f"{stem}.py"


def name_of(config: Path) -> str:
    """A YAML's name, with its recipe's."""
    return f"{config.parent.name}-{config.stem}" if config in VARIANTS else config.stem


def arguments(script: Path, *args):
    main = importlib.import_module(script.stem).main
    return parse(str(script), *typing.get_type_hints(main).values(), args=list(args))


def run(stem, *args):
    script = ROOT / "recipes" / f"{stem}.py"
    return importlib.import_module(stem).main(*arguments(script, *args))


@pytest.mark.parametrize("config", YAMLS, ids=name_of)
def test_every_yaml_fits_its_recipe(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    script_args, training_args, _ = arguments(script_of(config), "--config", str(config))
    values = yaml.safe_load(config.read_text())
    assert training_args.output_dir == values["output_dir"]
    assert values["output_dir"].startswith("runs/")
    assert script_args.dataset_name == values["dataset_name"]


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
def test_a_variant_holds_every_key_and_says_which_differ_from_the_defaults(config):
    """Nothing is inherited: what a variant does can be read in it alone."""
    script = script_of(config)
    assert script in RECIPES
    default = yaml.safe_load(script.with_suffix(".yaml").read_text())
    text = config.read_text()
    different, same = text.split(f"\n# Different from {script.stem}.yaml:\n")[1].split("\n# The same:\n")
    different, same = yaml.safe_load(different), yaml.safe_load(same)
    assert default.keys() <= different.keys() | same.keys()
    assert same == {key: default[key] for key in same}
    assert all(key not in default or different[key] != default[key] for key in different)


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_a_recipe_needs_no_arguments(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = yaml.safe_load(script.with_suffix(".yaml").read_text())
    assert arguments(script)[1].learning_rate == defaults["learning_rate"]


def test_no_two_yamls_of_a_stage_write_to_the_same_folder():
    folders = [yaml.safe_load(path.read_text())["output_dir"] for path in YAMLS]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("folder", ["recipes", "data_prep", "eval"])
def test_no_module_shadows_the_standard_library_or_an_installed_package(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert path.stem not in sys.stdlib_module_names, path
        if folder != "eval":  # a launcher puts recipes/ on sys.path, and a run by path or `import data_prep` data_prep/
            spec = importlib.util.find_spec(path.stem)
            assert spec is None or Path(spec.origin).resolve() == path.resolve(), f"{path} shadows {spec.origin}"


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_importing_a_recipe_parses_no_arguments_and_runs_nothing(script):
    for node in ast.parse(script.read_text()).body:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.If)
        assert isinstance(node, allowed)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Data, then the three steps of the tiny family, each on a fraction of its settings."""
    folder = tmp_path_factory.mktemp("family")
    toy_reviews.main(["--output", str(folder / "data"), "--train", "96", "--test", "24"])
    small = ["--per_device_train_batch_size", "16", "--disable_tqdm", "true"]
    trainers = {}
    for stage, options in {
        "sft": ["--dataset_name", "data/sft", "--max_steps", "4", "--scratch_width", "32"],
        "reward": ["--model_name_or_path", "sft", "--dataset_name", "data/pairs", "--max_steps", "4"],
        "ppo": ["--model_name_or_path", "sft", "--reward_model", "reward", "--dataset_name", "data/prompts"],
    }.items():
        options = [str(folder / value) if "/" in value or value in trainers else value for value in options]
        if stage == "ppo":
            options += ["--total_episodes", "32", "--max_completion_length", "6", "--eval_strategy", "steps"]
            options += ["--eval_steps", "8", "--logging_steps", "1"]
        trainers[stage] = run(
            f"sentiment_gpt2_{stage}", "--config", "tiny", *small, "--output_dir", str(folder / stage), *options
        )
    return folder, trainers


def test_the_sft_recipe_writes_a_language_model_and_its_tokenizer(toy_run):
    folder, _ = toy_run
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    model = AutoModelForCausalLM.from_pretrained(folder / "sft")
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() < 2_000_000
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("a fine film .")["input_ids"]) == "a fine film ."


def test_the_demos_model_has_less_than_two_million_parameters():
    settings = yaml.safe_load((ROOT / "recipes" / "variants" / "sentiment_gpt2_sft" / "tiny.yaml").read_text())
    width, layers = settings["scratch_width"], settings["scratch_layers"]
    embeddings = (settings["scratch_vocab"] + settings["max_length"]) * width
    assert embeddings + layers * (12 * width**2 + 13 * width) + 2 * width < 2_000_000


def test_the_reward_recipe_writes_a_classifier_with_one_label(toy_run):
    folder, _ = toy_run
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward").config.num_labels == 1


def test_the_ppo_recipe_writes_policy_tokenizer_and_critic_and_reports_score_and_kl(toy_run):
    folder, trainers = toy_run
    assert (folder / "ppo" / "critic.safetensors").exists()
    AutoTokenizer.from_pretrained(folder / "ppo")
    trained = AutoModelForCausalLM.from_pretrained(folder / "ppo").state_dict()
    started = AutoModelForCausalLM.from_pretrained(folder / "sft").state_dict()
    assert trained.keys() == started.keys()
    logged = [entry for entry in trainers["ppo"].state.log_history if "objective/scores" in entry]
    assert logged[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert any("eval_objective/scores" in entry for entry in trainers["ppo"].state.log_history)


def test_prompts_are_cut_to_the_wanted_number_of_tokens(toy_run):
    from models_and_data import load_prompts
    from recipe_args import PPOArguments

    folder, _ = toy_run
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    script_args = PPOArguments(
        rewards={"length_penalty": 1.0},
        dataset_name=str(folder / "data" / "sft"),
        prompt_column="text",
        prompt_tokens=[2, 5],
        min_prompt_characters=60,
    )
    data = load_prompts(script_args, "train", tokenizer, seed=0)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in data]
    assert set(lengths) == {2, 3, 4, 5}
    assert all(row["text"].startswith(row["prompt"]) and len(row["text"]) >= 60 for row in data)
    assert load_prompts(script_args, "train", tokenizer, seed=0)["prompt"][:] == data["prompt"][:]


def test_a_small_qwen_reads_texts_with_a_tokenizer_of_its_own_and_then_learns_summaries(tmp_path, capsys):
    import json

    texts = [f"POST: the film number {n} was good, and so was its music\n\nTITLE:" for n in range(24)]
    kinds = {
        "pretrain": lambda text: {"text": f"{text} a film"},
        "sft": lambda text: {"prompt": text, "completion": " a"},
    }
    for kind, make in kinds.items():
        (tmp_path / kind).mkdir()
        for split in ("train", "test"):
            (tmp_path / kind / f"{split}.jsonl").write_text("\n".join(json.dumps(make(text)) for text in texts))
    small = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--bf16", "false", "--disable_tqdm", "true"]
    size = ["--scratch_layers", "1", "--scratch_width", "32", "--scratch_vocab", "280"]
    for config, kind, more in (("scratch_pretrain", "pretrain", size), ("scratch", "sft", [])):
        more += ["--model_name_or_path", str(tmp_path / "first")] if kind == "sft" else []
        folder = str(tmp_path / ("first" if kind == "pretrain" else "second"))
        data = ["--dataset_name", str(tmp_path / kind), "--output_dir", folder, "--save_strategy", "no"]
        run("qwen_summarize_sft", "--config", config, *small, *data, *more)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.vocab_size == 280
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    printed = capsys.readouterr().out
    assert printed.count("a held-out summary") == 1  # a language model of whole texts has none
    assert printed.count("held-out loss") == 2


def test_labelled_reviews_are_paired_with_the_preferred_label_chosen(tmp_path):
    from datasets import Dataset

    from sentiment_gpt2_reward import pair_by_label

    labelled = Dataset.from_dict(
        {"text": [f"good {i}" for i in range(6)] + [f"bad {i}" for i in range(4)], "label": [1] * 6 + [0] * 4}
    )
    for preferred, word in ((1, "good"), (0, "bad")):
        pairs = pair_by_label(labelled, preferred, seed=0)
        assert len(pairs) == 4
        assert all(row["chosen"].startswith(word) and not row["rejected"].startswith(word) for row in pairs)


def test_a_reward_model_is_not_trained_beyond_its_positions(toy_run, tmp_path):
    folder, _ = toy_run
    with pytest.raises(UserError, match="max_length: 65 is more than the 64 positions of"):
        run(
            "sentiment_gpt2_reward",
            *["--config", "tiny", "--model_name_or_path", str(folder / "sft")],
            *["--dataset_name", str(folder / "data" / "pairs"), "--max_length", "65", "--output_dir", str(tmp_path)],
        )


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_lora_and_quantisation_are_keys_of_the_yaml_and_the_merged_model_is_the_policy(toy_run, tmp_path, bits):
    folder, _ = toy_run
    values = yaml.safe_load((ROOT / "recipes" / "variants" / "sentiment_gpt2_ppo" / "tiny.yaml").read_text()) | {
        "model_name_or_path": str(folder / "sft"),
        "reward_model": str(folder / "reward"),
        "dataset_name": str(folder / "data" / "prompts"),
        "output_dir": str(tmp_path / "ppo"),
        "total_episodes": 16,
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["c_attn", "c_proj"],
        "merge_adapter": True,
        "disable_tqdm": True,
    }
    if bits:
        values[f"load_in_{bits}bit"] = True
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(values))
    trainer = run("sentiment_gpt2_ppo", "--config", str(tmp_path / "lora.yaml"))

    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "critic." in name for name in trainable)
    layers = {type(module).__name__ for module in trainer.model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt", None: "Conv1D"}[bits] in layers
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "merged", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    with_adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ppo").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "ppo" / "merged")("a fine film", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole, apart = merged.eval()(ids).logits, with_adapter(ids).logits
        with with_adapter.disable_adapter():
            before = with_adapter(ids).logits
    assert torch.allclose(whole, apart, atol=1e-4)
    assert not torch.allclose(whole, before, atol=1e-4)


@pytest.mark.parametrize(
    ("stem", "options", "said"),
    [
        ("sentiment_gpt2_sft", ["--dataset_name", "data/no/such"], "data/no/such"),
        ("sentiment_gpt2_sft", ["--merge_adapter", "true"], "merge_adapter: true, but use_peft is false"),
        ("sentiment_gpt2_ppo", ["--merge_adapter", "true"], "merge_adapter: true, but use_peft is false"),
        ("sentiment_gpt2_reward", ["--model_name_or_path", "runs/no-such"], "model_name_or_path: 'runs/no-such'"),
        ("sentiment_gpt2_ppo", ["--model_name_or_path", "runs/no-such"], "model_name_or_path: 'runs/no-such'"),
        ("sentiment_gpt2_ppo", ["--reward_model", "runs/no-such"], "reward_model: 'runs/no-such'"),
        ("sentiment_gpt2_ppo", ["--loss_type", "grpo"], "loss_type: not a setting of PPO; the loss is PPO's"),
    ],
)
def test_what_is_missing_ends_in_one_line_before_a_model_loads(stem, options, said, capsys, monkeypatch):
    from command_line import one_line_errors

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        run(stem, *options)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line


# --- Rewards in the YAML --------------------------------------------------------------------------------------------


def rewards_of(**set):
    from recipe_args import PPOArguments

    return PPOArguments(dataset_name="stanfordnlp/imdb", **set)


def training(tmp_path):
    from trl_ppo import PPOConfig

    return PPOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, report_to="none")


def test_a_function_of_ones_own_needs_nothing_but_its_name_and_weight(tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def shouting(prompts, completions, **columns):\n    return [float(c.isupper()) for c in completions]\n"
    )
    args = rewards_of(rewards={"length_penalty": 0.0, f"{tmp_path}/my_rewards.py:shouting": -2.0})
    config = training(tmp_path)
    args.check(config, ModelConfig())
    functions = args.load_rewards(config, ModelConfig())
    assert config.reward_weights == [0.0, -2.0]
    assert [function(prompts=["a"], completions=["NO"]) for function in functions] == [[-1.0], [1.0]]
    assert [function.__name__ for function in functions] == ["length_penalty", "shouting"]


def test_a_reward_model_that_the_yaml_leaves_out_is_not_loaded(tmp_path):
    args = rewards_of(rewards={"length_penalty": 1.0}, reward_model="runs/no-such-model")
    args.check(training(tmp_path), ModelConfig())
    assert len(args.load_rewards(training(tmp_path), ModelConfig())) == 1


def test_a_reward_of_weight_0_is_logged_and_changes_nothing(toy_run, tmp_path):
    folder, _ = toy_run

    def train(name, rewards):
        options = ["--model_name_or_path", "sft", "--reward_model", "reward", "--dataset_name", "data/prompts"]
        options = [str(folder / value) if not value.startswith("--") else value for value in options]
        options += ["--total_episodes", "32", "--per_device_train_batch_size", "16", "--max_completion_length", "6"]
        options += ["--disable_tqdm", "true", "--output_dir", str(tmp_path / name), "--rewards", rewards]
        return run("sentiment_gpt2_ppo", "--config", "tiny", *options)

    alone = train("alone", "{reward_model: 1.0}")
    both = train("both", "{reward_model: 1.0, repetition_penalty: 0.0}")
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), both.model.parameters(), strict=True))
    logged = {name for entry in both.state.log_history for name in entry}
    assert "rewards/repetition_penalty" in logged
    assert "rewards/repetition_penalty" not in {name for entry in alone.state.log_history for name in entry}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_judge_that_changes_nothing_picks_the_checkpoint_and_ends_a_run_that_gets_no_better(
    toy_run, tmp_path, algorithm
):
    folder, _ = toy_run
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    torch.nn.init.zeros_(judge.score.weight)  # nothing is better than anything
    shutil.copytree(folder / "reward", tmp_path / "judge")
    judge.save_pretrained(tmp_path / "judge")
    options = ["--model_name_or_path", str(folder / "sft"), "--reward_model", str(folder / "reward")]
    options += ["--dataset_name", str(folder / "data" / "prompts"), "--disable_tqdm", "true", "--algorithm", algorithm]
    options += ["--total_episodes", "96", "--per_device_train_batch_size", "16", "--max_completion_length", "6"]
    options += ["--num_iterations", "1", "--save_strategy", "steps", "--save_steps", "1"]
    options += ["--eval_strategy", "steps", "--eval_steps", "1", "--test_prompts", "12"]
    picks = ["--judge", str(tmp_path / "judge"), "--load_best_model_at_end", "true", "--early_stopping_patience", "2"]

    free = run("sentiment_gpt2_ppo", "--config", "tiny", *options, "--output_dir", str(tmp_path / "free"))
    picked = run("sentiment_gpt2_ppo", "--config", "tiny", *options, *picks, "--output_dir", str(tmp_path / "picked"))
    assert free.state.global_step == 6
    assert picked.state.global_step == 3
    assert picked.state.best_metric == 0
    assert picked.state.best_model_checkpoint.endswith("checkpoint-1")
    third, ours = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("free", "picked"))
    assert all(torch.equal(third[name], ours[name]) for name in third)


def test_the_chance_to_beat_the_reference_by_several_reward_models_is_trained_on_and_logged(toy_run, tmp_path):
    folder, _ = toy_run
    sft, reward = str(folder / "sft"), str(folder / "reward")
    data = ["--dataset_name", str(folder / "data" / "prompts"), "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    options = [
        "--reward_model",
        f"[{reward}, {reward}]",
        "--reward_variance_coef",
        "1",
        "--preference_as_reward",
        "true",
    ]
    options += ["--total_episodes", "32", "--per_device_train_batch_size", "16", "--max_completion_length", "6"]
    options += ["--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "8", "--test_prompts", "12"]
    trainer = run("sentiment_gpt2_ppo", "--config", "tiny", "--model_name_or_path", sft, *data, *options)
    for mode in ("", "eval_"):
        (entry, *_) = [entry for entry in trainer.state.log_history if f"{mode}objective/scores" in entry]
        chance = entry[f"{mode}rewards/preference_as_reward"]
        assert 0.3 < chance < 0.7  # nothing, or next to nothing, is learnt yet
        assert entry[f"{mode}objective/scores"] == pytest.approx(chance)
        first, second = (entry[f"{mode}rewards/reward_ensemble/{number}_reward"] for number in (1, 2))
        assert first == second == pytest.approx(entry[f"{mode}rewards/reward_ensemble"], abs=1e-5)


def test_every_setting_of_ppo_is_written_out_in_a_yaml():
    """And so has a worked example; those that are TRL's are TRL's to show."""
    from trl import GRPOConfig

    from trl_ppo import PPOConfig

    own = {field.name for field in fields(PPOConfig)} - {field.name for field in fields(GRPOConfig)}
    values = yaml.safe_load((ROOT / "recipes/variants/sentiment_gpt2_ppo/tiny_separate_critic.yaml").read_text())
    assert len(own) > 15
    assert own <= values.keys()


# --- Smaller things -------------------------------------------------------------------------------------------------


def test_a_preferred_label_is_refused_where_the_data_holds_pairs(toy_run, tmp_path):
    folder, _ = toy_run
    options = ["--config", "tiny", "--model_name_or_path", str(folder / "sft"), "--preferred_label", "0"]
    options += ["--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="preferred_label: 0: the data holds pairs, of which `chosen` is preferred"):
        run("sentiment_gpt2_reward", *options, "--dataset_name", str(folder / "data" / "pairs"))


def test_the_card_of_a_model_made_from_scratch_says_so(toy_run, tmp_path):
    folder, _ = toy_run
    data = ["--dataset_name", str(folder / "data" / "sft"), "--output_dir", str(tmp_path)]
    size = ["--scratch_width", "32", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    run("sentiment_gpt2_sft", "--config", "tiny", *data, *size, "--disable_tqdm", "true")
    assert "This model was trained from scratch" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("recipe", ["sentiment_gpt2_sft", "sentiment_gpt2_reward"])
def test_a_recipe_of_trls_own_trainers_resumes_too_and_refuses_a_folder_that_holds_a_run(
    toy_run, tmp_path, recipe, capsys
):
    folder, _ = toy_run
    data = {"sentiment_gpt2_sft": "sft", "sentiment_gpt2_reward": "pairs"}[recipe]
    options = ["--config", "tiny", "--dataset_name", str(folder / "data" / data), "--output_dir", str(tmp_path)]
    options += ["--scratch_width", "32"] if data == "sft" else ["--model_name_or_path", str(folder / "sft")]
    options += ["--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true", "--max_steps"]
    run(recipe, *options, "1")
    with pytest.raises(UserError, match=r"holds a run already \(checkpoint-1\)"):
        run(recipe, *options, "2")
    trainer = run(recipe, *options, "2", "--resume_from_checkpoint", "true")
    assert f"resume_from_checkpoint: goes on from {tmp_path}/checkpoint-1\n" in capsys.readouterr().out
    assert trainer.state.global_step == 2


def test_center_rewards_coefficient_centres_the_scores_that_any_reader_sees(toy_run, tmp_path):
    """Without it the pairwise loss leaves the mean where it was: here at 3, by a bias put into the last layer norm."""
    folder, _ = toy_run
    start = AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1)
    direction = start.score.weight.detach()[0]
    start.transformer.ln_f.bias.data += 3 * direction / direction.square().sum()
    start.save_pretrained(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    tokenizer.save_pretrained(tmp_path / "start")
    texts = [row["chosen"] for row in load_split(str(folder / "data" / "pairs"), "train")]
    means = {}
    for coefficient in ("0.0", "0.1"):
        output = str(tmp_path / coefficient)
        options = ["--model_name_or_path", str(tmp_path / "start"), "--dataset_name", str(folder / "data" / "pairs")]
        options += ["--center_rewards_coefficient", coefficient, "--max_steps", "30", "--learning_rate", "3e-3"]
        run("sentiment_gpt2_reward", "--config", "tiny", *options, "--output_dir", output, "--disable_tqdm", "true")
        reader = AutoModelForSequenceClassification.from_pretrained(output).eval()
        with torch.no_grad():
            ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"] for text in texts[:32]]
            means[coefficient] = sum(reader(input_ids=row).logits.item() for row in ids) / 32
    assert abs(means["0.1"]) < 0.5 < 1.5 < means["0.0"]
