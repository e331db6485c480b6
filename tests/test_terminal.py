"""What a newcomer sees in the terminal: `--help`, the lines before and after training, what is hidden, a dry run."""

# ruff: noqa: F811  # fixtures of another file

import logging
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import logging as transformers_logging

import terminal
from command_line import parse
from conftest import ROOT
from recipe_args import PPOArguments
from rewards import check_signature
from test_bad_input import refusal, settings, start  # noqa: F401  fixtures
from test_recipes import RECIPES, YAMLS, name_of
from trl_ppo import PPOConfig
from trl_ppo.callbacks import RolloutProgress, StageProgress, curve
from trl_ppo.inputs import UserError, first_line, not_finite
from trl_ppo.settings import RENAMED

# --- --help ---------------------------------------------------------------------------------------------------------


def test_the_help_of_no_recipe_waits_for_torch_or_the_trainers():
    """So that it takes a second; each of these takes several."""
    code = (
        "import importlib, sys\nfrom command_line import run\n"
        "for stem in sys.argv[1:]:\n"
        "    main, sys.argv = importlib.import_module(stem).main, [stem, '--help']\n"
        "    try:\n        run(main, f'{stem}.py')\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "slow = {'torch', 'peft', 'datasets', 'scipy', 'pandas', 'bitsandbytes', 'wandb'} & {*sys.modules}\n"
        "print('slow:', *slow)"
    )
    command = [sys.executable, "-c", code, *(script.stem for script in RECIPES)]
    done = subprocess.run(command, cwd=ROOT / "recipes", capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["slow:"], done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(RECIPES)


def test_help_shows_the_projects_keys_then_what_the_yaml_sets_and_help_all_the_rest(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script = ROOT / "recipes" / "sentiment_gpt2_ppo.py"
    types = PPOArguments, "trl_ppo.PPOConfig", "trl.ModelConfig"
    texts = []
    for form in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(str(script), *types, args=[form])
        texts.append(capsys.readouterr().out)
    short, everything = ([*dict.fromkeys(re.findall(r"^  --(\w+)", text, re.MULTILINE))] for text in texts)
    assert "--help-all" in texts[0].splitlines()[1]
    assert short.index("rewards") < short.index("kl_coef") < short.index("output_dir")
    assert {*yaml.safe_load(script.with_suffix(".yaml").read_text())} <= {*short} < {*everything}
    own = {*PPOConfig.__annotations__} | {*PPOConfig.__mro__[1].__annotations__}
    assert own - {*PPOConfig.REFUSED, "REFUSED"} <= {*short}
    assert "adam_beta1" in everything
    assert "adam_beta1" not in short
    assert len(short) < 80 < 200 < len(everything)


# --- Noise ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hidden():
    """Hides noise, and shows it again afterwards."""
    logger = logging.getLogger("transformers.modeling_utils")
    with warnings.catch_warnings():
        warnings.resetwarnings()
        terminal.hide_noise()
        yield
    for each in [each for each in logger.filters if each is terminal._is_no_new_head]:
        logger.removeFilter(each)


def test_a_librarys_warning_of_its_next_version_is_hidden_and_any_other_comes_through(hidden):
    cases = {
        ("transformers.training_args", FutureWarning): False,
        ("torch.optim.lr_scheduler", FutureWarning): False,
        ("my_rewards", FutureWarning): True,
        ("transformersome", FutureWarning): True,
        ("transformers.training_args", UserWarning): True,
        ("torch.optim.lr_scheduler", RuntimeWarning): True,
    }
    for (module, category), shown in cases.items():
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn_explicit("said", category, "file.py", 1, module=module, registry={})
        assert bool(heard) == shown, (module, category)


def test_a_classifiers_new_head_is_no_news_and_any_other_missing_weight_is(
    hidden, gpt2_path, tokenizer, tmp_path, caplog
):
    transformers_logging.enable_propagation()
    try:
        AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=1)
        assert "LOAD REPORT" not in caplog.text
        model = AutoModelForCausalLM.from_pretrained(gpt2_path)
        state = {name: weight for name, weight in model.state_dict().items() if "h.1.ln_1" not in name}
        model.save_pretrained(tmp_path, state_dict=state)
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
        assert "transformer.h.1.ln_1" in caplog.text
        assert "score.weight" in caplog.text
    finally:
        transformers_logging.disable_propagation()


# --- Lines before, during and after training ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_dry_run_says_what_would_be_trained_samples_scores_and_leaves_nothing(
    algorithm, settings, classifier_path, start, capsys, tmp_path
):
    given = settings | {"reward_model": classifier_path, "rewards": {"reward_model": 1.0, "length_penalty": 0.5}}
    given |= {"algorithm": algorithm, "group_size": 2, "save_strategy": "steps", "save_steps": 4}
    given |= {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "early_stopping_patience": 1}
    out = tmp_path / "not" / "made"
    trainer = start(given | {"output_dir": str(out)}, "--dry_run", "true")
    text = capsys.readouterr().out
    assert not out.parent.exists()
    assert trainer.state.global_step == 1
    lines = dict(re.findall(r"^(\w+) {3,}(\S.*)", text, re.MULTILINE))
    assert "8 rows, 8 held out" in lines["data"]
    assert not any("eval_" in key for row in trainer.state.log_history for key in row)
    assert text.count("Completion") == 1, "one table of completions with their scores"
    assert text.rstrip().endswith("dry run: all of this works; nothing is saved")
    assert ("critic" in lines) == (algorithm == "ppo")
    assert {"model", "reference", "reward", "data", "training", "result"} <= {*lines}
    assert lines["model"].endswith("parameters, all trained")
    assert f"× 1: {classifier_path}: " in text
    assert "length_penalty × 0.5" in text


def test_a_run_says_its_episodes_rollouts_and_steps_and_names_no_critic_that_it_has_not(
    settings,
    start,
    capsys,
    tmp_path,
):
    four = {"per_device_train_batch_size": 2, "num_mini_batches": 2, "num_iterations": 2, "total_episodes": 8}
    start(settings | four, "--output_dir", str(tmp_path / "ppo"))
    text = capsys.readouterr().out
    assert "episodes 8, rollouts 2 of 4, steps 8" in text
    assert f"policy, tokenizer and critic: {tmp_path / 'ppo'}" in text
    start(settings | four, "--output_dir", str(tmp_path / "rloo"), "--algorithm", "rloo", "--group_size", "2")
    text = capsys.readouterr().out
    assert "episodes 8, rollouts 2 of 4, steps 8" in text
    assert f"policy and tokenizer: {tmp_path / 'rloo'}" in text
    assert "critic" not in text


@pytest.mark.parametrize(
    ("progress", "logs", "line"),
    [
        (StageProgress, {"mean_token_accuracy": 0.25, "loss": 0.5}, "step 3  loss 0.500  token accuracy 0.250"),
        (StageProgress, {"eval_loss": 0.5, "eval_margin": 0.1, "x": 1}, "held-out, step 3  loss 0.500  margin 0.10"),
        (RolloutProgress, {"loss": 0.5, "objective/kl": 0.25}, "step 3  kl 0.25"),
        (StageProgress, {"train_runtime": 3.0}, None),
    ],
)  # fmt: skip
def test_a_row_of_the_log_is_a_short_line(progress, logs, line):
    lines, drawn = [], []
    bar = progress()
    bar.training_bar = SimpleNamespace(write=lines.append, set_postfix_str=drawn.append)
    history = [{"loss": 4.0, "objective/kl": 0.0}, logs]
    bar.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=3, log_history=history), None, logs=logs)
    assert lines == ([line] if line else [])
    assert drawn == ["kl ▁█" if progress is RolloutProgress else "loss █▁" if "loss" in logs else "loss ▁"]


def test_a_run_that_is_mostly_warm_up_says_so(settings, start, capsys, tmp_path):
    plain = {"max_steps": "8", "output_dir": str(tmp_path / "run"), "overwrite_output_dir": "true"}
    for warmup, said in ((8, True), (2, False)):
        options = [word for key, value in plain.items() for word in (f"--{key}", value)]
        start(settings, *options, "--warmup_steps", str(warmup), stem="sentiment_gpt2_sft")
        assert (f"note        8 steps, of which {warmup} warm up" in capsys.readouterr().out) == said


def test_a_curve_goes_from_the_least_to_the_most_in_a_few_blocks():
    assert curve(range(8)) == "▁▂▃▄▅▆▇█"
    assert curve([2.0]) == curve([-1.0]) == "▁"
    assert curve([0, 2, 10, 12, 0, 0], width=3) == "▂█▁"
    assert len(curve(range(1000))) == 12


def test_a_line_shows_each_reward_that_has_a_weight_beside_their_sum_and_the_judge(
    settings, classifier_path, start, tmp_path
):
    given = settings | {"reward_model": classifier_path, "output_dir": str(tmp_path / "two")}
    weights = {"reward_model": 1.0, "length_penalty": 0.5, "repetition_penalty": 0.0}
    trainer = start(given | {"rewards": weights}, "--disable_tqdm", "false")
    [bar] = [each for each in trainer.callback_handler.callbacks if isinstance(each, RolloutProgress)]
    assert {*bar.parts} == {"reward_model", "length_penalty"}
    logged = {name for row in trainer.state.log_history for name in row if name.startswith("rewards/")}
    assert logged == {f"rewards/{name}" for name in weights}
    judged = given | {"rewards": {"length_penalty": 0.5}, "judge": classifier_path, "reward_model": None}
    trainer = start(judged, "--disable_tqdm", "false", "--overwrite_output_dir", "true")
    [bar] = [each for each in trainer.callback_handler.callbacks if isinstance(each, RolloutProgress)]
    assert bar.parts == ("judge",)


def test_a_dry_run_may_name_a_folder_that_holds_a_run_and_leaves_it_as_it_is(settings, start, tmp_path):
    start(settings, "--output_dir", str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    start(settings, "--output_dir", str(tmp_path / "run"), "--dry_run", "true")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_the_next_command_is_the_yamls_own_with_the_paths_of_this_run():
    text = "# PPO.\n#   python -m eval.compare --base a/b --tuned runs/x \\\n"
    text += "#     --reward r=a/c#UP --output runs/x_report\n# Hardware: none.\nkey: 1\n"
    theirs = {"model_name_or_path": "a/b", "reward_model": "a/c", "output_dir": "runs/x", "max_completion_length": 16}
    given = theirs | {"reward_model": "mine/c", "output_dir": "runs/y"}
    command = terminal.next_command(text, theirs, given)
    assert command == "python -m eval.compare --base a/b --tuned runs/y --reward r=mine/c#UP --output runs/y_report"
    plain = command
    rewards = {"reward_model": 1.0, "length_penalty": 0.1, "mine.py:calm": 0.5}
    command = terminal.next_command(text, theirs | {"rewards": {"reward_model": 1.0}}, given | {"rewards": rewards})
    added = " --reward length_penalty=rewards:length_penalty --reward calm=mine.py:calm"
    assert command.endswith(f"--output runs/y_report{added}")
    alone = {"rewards": {"mine.py:calm": 0.5}, "reward_model": None}
    command = terminal.next_command(text, theirs | {"rewards": {"reward_model": 1.0}}, given | alone)
    assert command.split("--tuned runs/y ")[1] == "--output runs/y_report --reward calm=mine.py:calm"
    assert "--output runs/x_report" in terminal.next_command(text, theirs, theirs)
    judged = text.replace("--output", "--judge j=a:f --output")
    for data, there in (("a/data", True), ("mine/data", False)):
        command = terminal.next_command(judged, theirs | {"dataset_name": "a/data"}, given | {"dataset_name": data})
        assert ("--judge" in command) == there
    short = terminal.next_command(text, theirs, given | {"max_completion_length": 8})
    assert short == f"{plain} --max_new_tokens 8"
    assert terminal.next_command(text, theirs | {"reward_label": "UP"}, given | {"reward_label": "DOWN"}) is None
    assert terminal.next_command("# PPO.\n#   accelerate launch recipes/x.py\nkey: 1\n", theirs, given) is None


@pytest.mark.parametrize("config", [path for path in YAMLS if "eval.compare" in path.read_text()], ids=name_of)
def test_every_command_that_a_header_names_next_evaluates_what_its_yaml_writes(config):
    values = yaml.safe_load(config.read_text())
    words = terminal.next_command(config.read_text(), values, values | {"output_dir": "runs/mine"}).split()
    assert words[words.index("--tuned") + 1] == "runs/mine"
    assert words[words.index("--base") + 1] == values["model_name_or_path"]


def test_the_demo_counts_its_stages_and_gives_the_seconds_that_were_measured():
    recipe = (ROOT / "Makefile").read_text().split("\ndemo: .venv")[1].split("\n\n")[0].splitlines()[1:]
    stages = [line for line in recipe if not line.startswith("\t\t")]
    assert [bool(re.match(r'\t@echo "\d of 5: ', line)) for line in stages] == [True, False] * 5
    assert re.findall(r'"(\d) of 5', "\n".join(stages)) == [*"12345"]
    table = (ROOT / "recipes" / "README.md").read_text()
    for line, command in zip(stages[2:8:2], stages[3:8:2], strict=True):
        stem = re.search(r"recipes/(\w+)\.py --config tiny", command)[1]
        seconds = re.search(rf"^\| `{stem}` tiny \|[^|]*\| (\d+) \|", table, re.MULTILINE)[1]
        assert f"about {seconds} s; next" in line


# --- Known stumbles -------------------------------------------------------------------------------------------------


def test_every_old_name_in_the_table_is_answered_with_the_new_one(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "recipes" / "guides" / "from_trl.md").read_text()
    table = guide.split("## Names of PPOConfig")[1].split("\n## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    names = {old: re.findall(r"\w+", new) for olds, new in rows for old in re.findall(r"`(\w+)`", olds)}
    kept = ("stop_token_id", "temperature")
    changed = {old: new for old, new in names.items() if old not in (*new, *kept) and not {"out", "own"} & {*new}}
    assert len(changed) > 7
    for old, new in changed.items():
        assert RENAMED[old] in new, old
    script = str(ROOT / "recipes" / "sentiment_gpt2_ppo.py")
    for option in ("--num_ppo_epochs", "--response-length"):
        with pytest.raises(SystemExit):
            parse(script, PPOArguments, PPOConfig, "trl.ModelConfig", args=[option, "3"])
        line = capsys.readouterr().err
        assert line.rstrip().endswith(f"it is called --{RENAMED[option[2:].replace('-', '_')]} now")


def test_the_command_line_takes_a_mapping_and_null(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [
        "--generation_kwargs",
        '{"top_k": 5}',
        "--reward_label",
        "null",
        "--prompt_tokens=null",
        "--kl_target",
        "3",
    ]
    script_args, training_args = parse(
        str(ROOT / "recipes" / "sentiment_gpt2_ppo.py"), PPOArguments, PPOConfig, "trl.ModelConfig", args=words
    )[:2]
    assert training_args.generation_kwargs == {"top_k": 5}
    assert (script_args.reward_label, script_args.prompt_tokens, training_args.kl_target) == (None, None, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "fsdp2"], "launch --config_file accelerate_configs/fsdp2.yaml recipes/sentiment_gpt2_ppo"),
        (["--config", "accelerate_configs/zero2.yaml"], "--config_file accelerate_configs/zero2.yaml recipes/"),
    ],
)  # fmt: skip
def test_accelerates_configs_are_not_the_recipes(options, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    types = PPOArguments, PPOConfig, "trl.ModelConfig"
    script = str(ROOT / "recipes" / "sentiment_gpt2_ppo.py")
    with pytest.raises(SystemExit):
        parse(script, *types, args=options)
    assert said in capsys.readouterr().err


def test_a_logger_that_is_not_installed_is_named_with_how_to_install_it(settings, start, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    line = refusal(start, settings | {"report_to": "trackio"})
    assert line.endswith("report_to: trackio is not installed; pip install trackio, or set report_to: none")


def test_one_lora_target_is_the_end_of_a_modules_name_and_no_pattern(settings, start):
    lora = ["--use_peft", "true", "--lora_target_modules", "c_attn", "--dry_run", "true"]
    trainer = start(settings, *lora)
    assert trainer.model.peft_config["default"].target_modules == {"c_attn"}


def test_a_resume_from_what_is_no_folder_says_what_may_be_given(settings, start, refusal):
    line = refusal(start, settings, "--resume_from_checkpoint", "flase")
    assert line == "resume_from_checkpoint: 'flase' is no folder; give true, false or a checkpoint's folder"


def test_a_resume_with_fewer_episodes_than_the_checkpoint_has_had_says_so(settings, start, capsys, tmp_path):
    given = settings | {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / "run")}
    start(given)
    capsys.readouterr()
    start(given, "--resume_from_checkpoint", "true", "--total_episodes", "4")
    assert "checkpoint-8' is past the 4 steps that" in capsys.readouterr().out


def only_texts(texts):
    return [0.0 for _ in texts]


def no_columns(prompts, completions):
    return [0.0 for _ in completions]


def all_by_name(completions, label, **columns):
    return [0.0 for _ in completions]


@pytest.mark.parametrize("function", [only_texts, no_columns])
def test_a_reward_function_of_another_signature_is_told_the_right_one(function):
    name = f"my_rewards.py:{function.__name__}"
    with pytest.raises(
        UserError, match=rf"{name}: .*; write def {function.__name__}\(prompts, completions, \*\*columns\)"
    ):
        check_signature("rewards", name, function)


@pytest.mark.parametrize("function", [all_by_name, SimpleNamespace, lambda **anything: [0.0]])
def test_a_reward_function_that_can_be_called_is_let_through(function):
    check_signature("rewards", "name", function)


def test_a_loss_that_is_no_number_says_what_to_change_and_a_message_is_not_cut_at_a_colon():
    assert "no step was taken: lower learning_rate" in str(not_finite("loss", float("nan"), 3))
    assert first_line(ValueError("errors in GPT2:\n\tsize mismatch\nmore")) == "errors in GPT2: size mismatch"
    assert first_line(ValueError("\none\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


MISSING = "There were missing keys in the checkpoint model loaded: {}."


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["critic.head.weight", "lm_head.weight"], False), (["critic.head.weight", "h.0.mlp.weight"], True)],
)
def test_weights_that_a_resumed_run_finds_elsewhere_are_not_said_to_be_missing(names, shown):
    said = logging.LogRecord("transformers.trainer", logging.WARNING, "", 0, MISSING.format(names), None, None)
    assert bool(logging.getLogger("transformers.trainer").filter(said)) is shown
