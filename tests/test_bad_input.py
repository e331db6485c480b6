"""Bad input of every kind ends in one line that names what is wrong, and where, before training starts.

More of the same stands beside what it is about: the YAML's own form in test_recipe_args.py, the options of the
evaluation in test_eval.py and test_predict.py, checkpoints in test_ppo_resume.py.
"""

import gzip
import io
import json
import math
import shutil
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, Trainer

from command_line import one_line_errors
from eval import compare, predict, report, reward_model
from eval.pairwise import PairwiseJudge
from test_ppo_trainer import history, make_trainer, roll_out
from test_recipes import run
from trl_ppo.loading import load_skeleton

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "total_episodes": 8,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "rewards": {"length_penalty": 1.0},
}
PPO_ALONE = ("max_completion_length", "total_episodes", "rewards", "reward_model", "value_model_path")
NAN, INF = math.nan, math.inf
MESSAGES = [{"role": "user", "content": "the movie"}]


@pytest.fixture
def no_training(monkeypatch):
    """What is let through fails here, instead of training."""
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("it was taken, and training has started"))


@pytest.fixture
def no_weights(monkeypatch):
    """What is let through fails when the first weight is read."""
    load = PreTrainedModel.__dict__["from_pretrained"].__func__

    def from_pretrained(cls, *args, device_map=None, **kwargs):
        assert device_map == "meta", "it was taken, and a model loads"
        return load(cls, *args, device_map=device_map, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


@pytest.fixture(scope="module")
def settings(gpt2_path, tmp_path_factory):
    """Settings that are in order, of a PPO run on 8 prompts."""
    folder = tmp_path_factory.mktemp("in_order")
    write_rows(folder, [{"prompt": "the movie was", "text": "the movie", "label": 1}] * 8)
    return SETTINGS | {"model_name_or_path": gpt2_path, "dataset_name": str(folder), "output_dir": str(folder / "run")}


def write_rows(folder, rows, names=("train.jsonl", "test.jsonl")):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def start(tmp_path, own_cache):
    """Runs a recipe with settings from a YAML; those that are PPO's alone are left out where it is none."""

    def start(settings, *options, stem="sentiment_gpt2_ppo"):
        if not stem.endswith("ppo"):
            settings = {key: value for key, value in settings.items() if key not in PPO_ALONE} | {"max_length": 16}
        (tmp_path / "given.yaml").write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return run(stem, "--config", str(tmp_path / "given.yaml"), *options)

    return start


@pytest.fixture
def refusal(capsys):
    """Runs what must end with status 2, and returns the line that it printed last."""

    def refusal(main, *args, **kwargs) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            main(*args, **kwargs)
        line = capsys.readouterr().err.replace("\r", "\n").rstrip().splitlines()[-1]
        assert stopped.value.code == 2
        assert len(line) > 20
        return line

    return refusal


# --- Settings -------------------------------------------------------------------------------------------------------


def test_the_settings_that_the_cases_change_are_in_order(settings, start, no_training):
    with pytest.raises(pytest.fail.Exception, match="it was taken"):
        start(settings)


NOT_FINITE = (
    "learning_rate kl_coef vf_coef missing_eos_penalty epsilon weight_decay temperature kl_target gamma lora_dropout"
)
BAD_SETTINGS = [
    *[({key: value}, f"{key}: {value}") for key in NOT_FINITE.split() for value in (NAN, INF)],
    ({"rewards": {"length_penalty": NAN}}, "rewards: length_penalty: nan is not a finite number"),
    ({"reward_weights": [INF]}, "reward_weights: inf is not a finite number"),
    ({"reward_weights": [1.0]}, "reward_weights: give each reward its weight in rewards"),
    ({"generation_kwargs": {"typical_p": NAN}}, "generation_kwargs: typical_p: nan is not a finite number"),
    ({"learning_rate": -1.0}, "learning_rate: -1.0 must not be negative"),
    ({"kl_coef": -0.1}, "kl_coef: -0.1 must not be negative"),
    ({"epsilon_high": -0.2}, "epsilon_high: -0.2 must not be negative"),
    ({"max_grad_norm": -1.0}, "max_grad_norm: -1.0 must not be negative"),
    ({"weight_decay": -1.0}, "weight_decay: -1.0 must not be negative"),
    ({"top_k": -1}, "top_k: -1 must not be negative"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers: -1 must not be negative"),
    ({"top_p": 2.0}, "top_p: 2.0 must be above 0 and at most 1"),
    ({"top_p": 0.0}, "top_p: 0.0 must be above 0 and at most 1"),
    ({"min_p": 2.0}, "min_p: 2.0 must lie in [0, 1]"),
    ({"gamma": 1.1}, "gamma: 1.1 must lie in [0, 1]"),
    ({"lam_value": 1.1}, "lam_value: 1.1 must lie in [0, 1]"),
    ({"lam_length_alpha": 0.0}, "lam_length_alpha: 0.0 must be positive"),
    ({"stop_at_kl": 0.0}, "stop_at_kl: 0.0 must be positive"),
    ({"value_warmup_rollouts": -1}, "value_warmup_rollouts: -1 must not be negative"),
    ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha: 1.5 must lie in [0, 1]"),
    ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: 0 must be positive"),
    ({"lora_dropout": 2.0}, "lora_dropout: 2.0 must lie in [0, 1]"),
    ({"adam_beta1": 1.0}, "adam_beta1: 1.0 must lie in [0, 1)"),
    ({"seed": 2**70}, f"seed: {2**70} must lie in [0, 2**32)"),
    ({"seed": -1}, "seed: -1 must lie in [0, 2**32)"),
    ({"lora_r": 0}, "lora_r: 0 must be positive"),
    ({"temperature": 0.0}, "temperature: 0.0 must be positive"),
    ({"repetition_penalty": -1.0}, "repetition_penalty: -1.0 must be positive"),
    ({"save_steps": 0}, "save_steps: 0.0 must be positive"),
    ({"eval_steps": -1}, "eval_steps: -1.0 must be positive"),
    ({"num_mini_batches": 0}, "num_mini_batches: 0 must be positive"),
    ({"num_iterations": -1}, "num_iterations: -1 must be positive"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 must be positive"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 must be positive"),
    ({"total_episodes": -5}, "total_episodes: -5 must be positive"),
    ({"max_completion_length": 0}, "max_completion_length: 0 must be positive"),
    ({"reward_batch_size": 0}, "reward_batch_size: 0 must be positive"),
    ({"reward_max_length": -3}, "reward_max_length: -3 must be positive"),
    ({"test_prompts": -1}, "test_prompts: -1 must be positive"),
    ({"num_train_epochs": -1}, "num_train_epochs: -1.0 must be positive"),
    ({"score_clip": 0.0}, "score_clip: 0.0 must be positive"),
    ({"warmup_steps": -1}, "warmup_steps = -1.0"),
    ({"logging_steps": 0}, "non-zero --logging_steps"),
    ({"prompt_tokens": [8, 2]}, "prompt_tokens: [8, 2] must be two numbers"),
    ({"prompt_tokens": [3]}, "prompt_tokens: [3] must be two numbers"),
    ({"prompt_tokens": [0, 3]}, "prompt_tokens: [0, 3] must be two numbers"),
    ({"min_prompt_tokens": 5, "max_prompt_tokens": 2}, "no prompt of split 'train' is as long as min_prompt_…"),
    ({"num_mini_batches": 64}, "train_dataset: 8 prompts, but one rollout takes"),
    ({"load_in_4bit": True}, "load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft: true"),
    ({"load_in_8bit": True}, "load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft: true"),
    ({"generation_kwargs": "beams"}, "generation_kwargs: beams: not settings of"),
    ({"generation_kwargs": {"no_such": 1}}, "generation_kwargs: ['no_such']: not settings of"),
    (
        {"generation_kwargs": {"stop_strings": ["."]}},
        "generation_kwargs: ['stop_strings']: not settings of GenerationConfig, or without effect",
    ),
    ({"dataset_name": None}, "dataset_name: is missing; give a Hub id or a folder"),
    ({"model_name_or_path": None}, "model_name_or_path: is missing; give a Hub id or a folder"),
    ({"output_dir": None}, "required: --output_dir"),
    ({"rewards": None}, "rewards: None should be an object"),
    ({"rewards": {}}, "rewards: is empty"),
    ({"rewards": {"length": 1.0}}, "rewards: 'length' is not a reward; give reward_model, word_count, length_penalty"),
    ({"rewards": {"reward_model": 1.0}}, "rewards: reward_model has a weight, but reward_model: names no classifier"),
    ({"rewards": {"reward_model": 1.0}, "reward_model": []}, "but reward_model: names no classifier"),
    ({"reward_model": [1]}, "reward_model: [1] should be"),
    ({"reward_variance_coef": 1.0, "reward_model": ["a/b"]}, "reward_variance_coef: is for several classifiers; list"),
    ({"reward_variance_coef": -1.0}, "reward_variance_coef: -1.0 must not be negative"),
    ({"preference_as_reward": True}, "preference_as_reward: true, but rewards: does not name reward_model"),
    ({"reward_model": "a/b", "judge": "a/b"}, "judge: 'a/b' is the reward model, which is optimised; give another"),
    ({"judge": "/no/such"}, "judge: '/no/such' does not exist"),
    (
        {"early_stopping_patience": 2},
        "early_stopping_patience: goes by the best checkpoint; set load_best_model_at_end",
    ),
    ({"rewards": {"gone.py:f": 1.0}}, "rewards: cannot import gone.py:f: FileNotFoundError"),
    ({"rewards": {"math:no_such": 1.0}}, "rewards: cannot import math:no_such: AttributeError"),
    ({"rewards": {"math:pi": 1.0}}, "rewards: math:pi is not a function"),
    ({"optim": "sgdm"}, "optim: 'sgdm' is not one of adamw_torch"),
    ({"lr_scheduler_type": "bendy"}, "lr_scheduler_type: 'bendy' is not one of linear"),
]
REFUSED_BY_A_LIBRARY = [
    ({"report_to": "no_such_logger"}, "transformers: no_such_logger is not supported, only"),
    ({"attn_implementation": "flash"}, 'transformers: Specified `attn_implementation="flash"` is not supported'),
    ({"model_init_kwargs": {"no_such": 1}}, "unexpected keyword argument 'no_such'"),
    ({"use_peft": True, "lora_target_modules": ["no", "nor"]}, "not found in the base model"),
]


@pytest.mark.parametrize(("changed", "said"), BAD_SETTINGS, ids=[said for _, said in BAD_SETTINGS])
def test_a_setting_that_makes_no_sense_is_refused_before_a_model_loads(
    changed, said, settings, start, refusal, no_weights
):
    assert said in refusal(start, settings | changed)


@pytest.mark.parametrize("others", [[], ["runs/gone"]])
def test_a_label_that_a_reward_model_lacks_and_a_member_that_is_missing(
    others, settings, classifier_path, start, refusal, no_weights
):
    given = {"rewards": {"reward_model": 1.0}, "reward_model": [classifier_path, *others]}
    label = None if others else "POSITIVE"
    said = "'runs/gone' does not exist" if others else "has no label 'POSITIVE'; it has 0: LABEL_0"
    line = refusal(start, settings | given | {"reward_label": label})
    assert line.startswith(("reward model '", "reward_model: '"))
    assert said in line


def test_a_run_into_the_folder_of_one_of_several_reward_models(settings, classifier_path, start, refusal, no_weights):
    given = {"rewards": {"reward_model": 1.0}, "reward_model": [classifier_path] * 2, "output_dir": classifier_path}
    assert "is where reward_model is read from" in refusal(start, settings | given)


@pytest.mark.parametrize(("changed", "said"), REFUSED_BY_A_LIBRARY, ids=[said for _, said in REFUSED_BY_A_LIBRARY])
def test_what_a_library_refuses_is_its_own_first_line(changed, said, settings, start, refusal, no_training):
    assert said in refusal(start, settings | changed)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("? [a, b]\n: 1\n", [], "line 1: "),
        ("{}", ["--kl_coef", "nan"], "kl_coef: nan is not a finite number"),
        ("{}", ["--learning_rate", "inf"], "learning_rate: inf is not a finite number"),
        ("{}", ["--rewards", "{length_penalty: .inf}"], "rewards: length_penalty: inf is not a finite number"),
    ],
)
def test_a_mistake_in_the_form_of_the_yaml_or_on_the_command_line(text, options, said, settings, start, refusal):
    assert said in refusal(start, yaml.safe_dump(settings) if text == "{}" else text, *options)


# --- Data -----------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "null": ([None] * 8, "'prompt' of row 0 is None: not a text"),
    "a null among texts": (["a film"] * 6 + [None], "'prompt' of row 6 is None: not a text"),
    "a number": ([3] * 8, "'prompt' of row 0 is 3: not a text"),
    "a boolean": ([True] * 8, "'prompt' of row 0 is True: not a text"),
    "a list of texts": ([["a", "b"]] * 8, "'prompt' of row 0 is ['a', 'b']: not a text"),
    "an empty list": ([[]] * 8, "'prompt' of row 0 is []: not a text"),
    "a mapping": ([{"a": "b"}] * 8, "'prompt' of row 0 is {'a': 'b'}: not a text"),
    "rows of mixed types": (["a film", 3] * 4, "'prompt' of row 1 is 3: not a text"),
    "messages without a role": ([[{"content": "x"}]] * 8, "'prompt' of row 0 is [{'content': 'x'}]: not a text"),
    "messages without a template": ([MESSAGES] * 8, "'prompt' holds messages, but the tokenizer has no chat template"),
}


def prompts_of(values):
    return [{"prompt": value} for value in values]


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_prompt_that_is_no_text_is_named_with_its_row(case, settings, start, refusal, no_weights, tmp_path):
    values, said = BAD_ROWS[case]
    write_rows(tmp_path / "data", prompts_of(values))
    line = refusal(start, settings | {"dataset_name": str(tmp_path / "data")})
    assert line.startswith("dataset_name: ")
    assert said in line


@pytest.mark.parametrize(
    ("stem", "row", "said"),
    [
        ("sentiment_gpt2_sft", {"text": 3}, "'text' of row 0 is 3"),
        ("sentiment_gpt2_sft", {"prompt": "a", "completion": None}, "'completion' of row 0 is None"),
        ("qwen_summarize_sft", {"prompt": "a", "completion": 3}, "'completion' of row 0 is 3"),
        ("sentiment_gpt2_reward", {"chosen": "a", "rejected": 3}, "'rejected' of row 0 is 3"),
        ("sentiment_gpt2_reward", {"text": None, "label": 1}, "'text' of row 0 is None"),
        ("qwen_summarize_reward", {"chosen": ["a"], "rejected": "b"}, "'chosen' of row 0 is ['a']"),
        ("sentiment_gpt2_classifier", {"text": 3, "label": 1}, "'text' of row 0 is 3"),
    ],
)
def test_a_text_of_the_other_recipes_that_is_none(stem, row, said, settings, start, refusal, no_weights, tmp_path):
    write_rows(tmp_path / "data", [row] * 8)
    assert said in refusal(start, settings | {"dataset_name": str(tmp_path / "data")}, stem=stem)


@pytest.mark.parametrize("column", ["completions", "prompts", "log_metric"])
def test_a_column_that_reward_functions_get_from_elsewhere(column, settings, start, refusal, no_weights, tmp_path):
    write_rows(tmp_path / "data", [{"prompt": "a film", column: "x"}] * 8)
    line = refusal(start, settings | {"dataset_name": str(tmp_path / "data")})
    assert line.startswith(f"train_dataset: rename column '{column}'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:-20],
            "Compressed file ended before the end-of-stream marker",
        ),
        (b"garbage", "Not a gzipped file"),
        (gzip.compress(b'{"prompt": "\\ud800"}\n', mtime=0), "surrogate"),
        (gzip.compress(b"\xff\xfe\xff", mtime=0), "dataset_name"),
    ],
)
def test_a_file_that_is_damaged(content, said, settings, start, refusal, no_weights, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(content)
    line = refusal(start, settings | {"dataset_name": str(tmp_path / "data")})
    assert line.startswith(f"dataset_name: '{tmp_path}/data': ")
    assert said in line


def test_messages_are_not_cut(settings, start, refusal, no_weights, tmp_path):
    write_rows(tmp_path / "data", prompts_of([MESSAGES] * 8))
    line = refusal(start, settings | {"dataset_name": str(tmp_path / "data"), "prompt_tokens": [2, 8]})
    assert line.startswith("prompt_tokens: [2, 8]: 'prompt' holds messages, which cannot be cut")


# --- Models ---------------------------------------------------------------------------------------------------------


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["extra1", "extra2"])
    tokenizer.save_pretrained(folder)


TRUNK = "transformer.h.0.attn.c_attn.weight"
DAMAGE = {  # how, and what is said
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "is not a",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 99), "is not a"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is not a"),
    "another shape": (lambda f: change_config(f, n_positions=32), "transformer.wpe.weight is [64, 32]"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"model_type'), "JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "unknown type": (lambda f: change_config(f, model_type="no_such"), "no_such"),
    "a tokenizer cut off": (lambda f: (f / "tokenizer.json").write_text('{"version'), ""),
    "no tokenizer": (without_tokenizer, "its tokenizer knows no words"),
    "a tokenizer of more tokens": (with_more_tokens, "but its tokenizer's ids go up to"),
    "a tensor missing": (lambda f: change_weights(f, lambda w: w.pop(TRUNK)), f"it has no {TRUNK}"),
    "NaN": (lambda f: change_weights(f, lambda w: w[TRUNK].fill_(NAN)), f"{TRUNK} is NaN or infinite in places"),
}
ROLES = {  # which recipe reads the folder, and by which key
    "policy": ("sentiment_gpt2_ppo", "model_name_or_path", {}),
    "reward model": ("sentiment_gpt2_ppo", "reward_model", {"rewards": {"reward_model": 1.0}}),
    "critic": ("sentiment_gpt2_ppo", "value_model_path", {}),
    "start of fine-tuning": ("sentiment_gpt2_sft", "model_name_or_path", {}),
    "start of a reward model": ("qwen_summarize_reward", "model_name_or_path", {}),
}
NOT_SEEN = {  # by whom: a head is new there, NaN is the first loss, and a critic reads the policy's tokens
    ("start of fine-tuning", "NaN"),
    ("start of a reward model", "NaN"),
    ("start of a reward model", "a tensor missing"),
    *(("critic", case) for case in DAMAGE if "tokenizer" in case),
}


@pytest.fixture(scope="module")
def originals(gpt2_path, classifier_path, tmp_path_factory):
    pairs = tmp_path_factory.mktemp("pairs")
    write_rows(pairs, [{"chosen": "a good film", "rejected": "a bad film"}] * 8)
    return {"reward model": classifier_path, "critic": classifier_path, "pairs": str(pairs)}


@pytest.mark.parametrize(
    ("role", "case"), [(role, case) for role in ROLES for case in DAMAGE if (role, case) not in NOT_SEEN]
)
def test_a_damaged_model_folder(role, case, settings, originals, start, refusal, no_training, tmp_path):
    stem, key, more = ROLES[role]
    folder = tmp_path / "model"
    shutil.copytree(originals.get(role, settings["model_name_or_path"]), folder)
    damage, said = DAMAGE[case]
    damage(folder)
    given = settings | {key: str(folder)} | more
    if stem == "qwen_summarize_reward":
        given["dataset_name"] = originals["pairs"]
    line = refusal(start, given, stem=stem)
    assert str(folder) in line
    assert said in line


def test_a_classifier_is_no_policy(settings, classifier_path, start, refusal, no_weights):
    line = refusal(start, settings | {"model_name_or_path": classifier_path})
    assert line.endswith("is not a language model: its config.json says ['GPT2ForSequenceClassification']")


def test_a_language_model_is_no_reward_model_and_no_critic(settings, gpt2_path, start, refusal, no_training):
    for key in ("reward_model", "value_model_path"):
        line = refusal(start, settings | {key: gpt2_path, "rewards": {"reward_model": 1.0}, "reward_model": gpt2_path})
        assert line.endswith("is not a trained classifier: it has no score.weight")


def test_a_folder_of_quantised_weights_is_no_damaged_one(llama_path, tmp_path):
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(llama_path, quantization_config=in_4_bits).save_pretrained(tmp_path)
    assert load_skeleton(str(tmp_path)).config.vocab_size == load_skeleton(llama_path).config.vocab_size


# --- Rewards --------------------------------------------------------------------------------------------------------


def raising(error):
    def give(completions):
        raise error

    return give


BAD_REWARDS = {
    "a set": (lambda completions: {1.0, 2.0, 3.0, 4.0}, "returned set, not a list of 4"),
    "a mapping": (lambda completions: dict.fromkeys(range(4), 1.0), "returned dict, not a list of 4"),
    "a text": (lambda completions: "1234", "returned str, not a list of 4"),
    "bytes": (lambda completions: b"1234", "returned bytes, not a list of 4"),
    "nothing": (lambda completions: None, "returned NoneType, not a list of 4"),
    "a number": (lambda completions: 1.0, "returned float, not a list of 4"),
    "too few": (lambda completions: [1.0], "returned 1 values for 4 completions"),
    "a text for a number": (lambda completions: ["high"] * 4, "returned 'high' for sample 0: prompt"),
    "more than float32 holds": (lambda completions: [0.0, 1e308, 0.0, 0.0], "returned 1e+308 for sample 1: prompt"),
    "a square beyond float32": (lambda completions: [1e20] * 4, "returned 1e+20 for sample 0: prompt"),
    "an error": (raising(KeyError("length")), "failed: KeyError: 'length' (test_bad_input.py, line"),
    "an error without words": (raising(AssertionError()), "failed: AssertionError: AssertionError (test_bad_input.py"),
    "an error of a library": (lambda completions: json.loads("{"), "failed: JSONDecodeError: Expecting"),
    "the end of the program": (raising(SystemExit(0)), "failed: SystemExit: 0 (test_bad_input.py, line"),
}


@pytest.fixture(scope="module")
def reward_trainer(gpt2_path, tmp_path_factory):
    def my_reward(prompts, completions, **columns):
        return trainer.give(completions)

    async def later(prompts, completions, **columns):
        return trainer.give_later(completions)

    trainer = make_trainer(gpt2_path, tmp_path_factory.mktemp("rewards"), [my_reward, later])
    return trainer


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_reward_function_that_fails_is_named(case, asynchronous, reward_trainer, refusal):
    def fine(completions):
        return [1.0] * len(completions)

    give, said = BAD_REWARDS[case]
    reward_trainer.give, reward_trainer.give_later = (fine, give) if asynchronous else (give, fine)
    line = refusal(roll_out, reward_trainer)
    assert line.startswith(f"reward function '{'later' if asynchronous else 'my_reward'}' {said}")
    assert "(test_bad_input.py, line" in line or "failed" not in line  # its own line, not that of a library


def test_reward_functions_that_all_say_none_are_named(reward_trainer, refusal):
    reward_trainer.give = reward_trainer.give_later = lambda completions: [1.0, 1.0, None, 1.0]
    line = refusal(roll_out, reward_trainer)
    assert line == "reward_funcs: every one returned None for sample 2 (my_reward, later)"


def test_a_reward_function_may_say_none_to_every_sample_beside_one_that_speaks(gpt2_path, tmp_path):
    def silent(prompts, completions, **columns):
        return [None] * len(completions)

    def speaks(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    trainer = make_trainer(gpt2_path, tmp_path, [silent, speaks], total_episodes=16, logging_steps=2)
    trainer.train()
    assert history(trainer, "rewards/silent") == [None] * 2
    assert history(trainer, "objective/scores") == pytest.approx(history(trainer, "rewards/speaks"))


def test_a_policy_that_has_diverged_ends_in_one_line(gpt2_path, tmp_path, refusal):
    trainer = make_trainer(gpt2_path, tmp_path, learning_rate=1e30, max_grad_norm=0.0, total_episodes=32)
    line = refusal(trainer.train)
    assert "no step was taken" in line or "it has diverged" in line


# --- Evaluation -----------------------------------------------------------------------------------------------------


def huge(prompts, completions, **columns):
    return [1e300] * len(completions)


def stops(prompts, completions, **columns):
    raise SystemExit(0)


def letters(prompts, completions, **columns):
    return [len(completion) - 10.5 for completion in completions]


@pytest.fixture(scope="module")
def compared(gpt2_path, tmp_path_factory):
    """The options of a comparison, and what it wrote."""
    folder = tmp_path_factory.mktemp("compared")
    write_rows(folder, prompts_of(["the movie was", "a great film", "i watched it", "a terrible plot"]))
    options = ["--base", gpt2_path, "--tuned", gpt2_path, "--prompts", str(folder / "test.jsonl")]
    options += ["--reward", f"letters={__name__}:letters", "--max_new_tokens", "4"]
    compare.main([*options, "--output", str(folder / "out")])
    return options, folder / "out"


@pytest.mark.parametrize("option", ["--base", "--tuned"])
@pytest.mark.parametrize("case", [case for case in DAMAGE if case != "no tokenizer"])
def test_a_damaged_model_ends_a_comparison(option, case, compared, gpt2_path, refusal, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(gpt2_path, folder)
    damage, said = DAMAGE[case]
    damage(folder)
    line = refusal(compare.main, [*compared[0], option, str(folder), "--output", str(tmp_path / "out")])
    assert str(folder) in line
    assert said in line


def test_a_classifier_is_no_tuned_model(compared, classifier_path, refusal, tmp_path, no_weights):
    line = refusal(compare.main, [*compared[0], "--tuned", classifier_path, "--output", str(tmp_path)])
    assert "is not a language model" in line


@pytest.mark.parametrize(("name", "said"), [("huge", "returned 1e+300 for sample 0"), ("stops", "SystemExit: 0")])
def test_a_reward_that_cannot_be_used_ends_a_comparison(name, said, compared, refusal, tmp_path):
    line = refusal(compare.main, [*compared[0], "--reward", f"x={__name__}:{name}", "--output", str(tmp_path)])
    assert "reward function 'x'" in line
    assert said in line


def breaks_on_nothing(prompts, completions, **columns):
    return [1 / len(completion) for completion in completions]


PAIRS = [{"prompt": "a", "chosen": "b c", "rejected": "d"}, {"prompt": "e", "chosen": "f g", "rejected": "h"}]
LETTERS = f"x={__name__}:letters"
BAD_CHECKS = {  # rows of the pairs, options that replace those in order, what is said
    "no name": (PAIRS, ["--reward", "rewards:word_count"], "--reward rewards:word_count: expected NAME="),
    "no reward": (PAIRS, ["--reward", "x=rewards:none"], "--reward x: cannot import rewards:none"),
    "no classifier": (PAIRS, ["--reward", "x=runs/no_such"], "--reward x"),
    "no pairs": (PAIRS, ["--pairs", "runs/no_such"], "--pairs: 'runs/no_such'"),
    "one pair": (PAIRS[:1], [], "split test has 1 rows; an interval needs at least 2"),
    "n_pairs": (PAIRS, ["--n_pairs", "1"], "--n_pairs: must be at least 2, not 1"),
    "no rejected": ([{"chosen": "a"}] * 2, [], "no column rejected"),
    "an empty text": ([*PAIRS, {"prompt": "a", "chosen": "", "rejected": "b"}], [], "'chosen' of row 2 is not a text"),
    "no text": ([{"chosen": 3, "rejected": 4}] * 2, [], "'chosen' of row 0 is 3: not a text"),
    "half of best-of-n": (PAIRS, ["--base", "x"], "give --prompts and --judge too, or none of them"),
    "the judge is the reward": (PAIRS, ["--judge", LETTERS], "the name 'x' is taken"),
    "cuts the wrong way round": (
        PAIRS,
        [f"--judge=y={__name__}:breaks_on_nothing", "--base={gpt2}", "--prompts={pairs}", "--prompt_tokens", "3", "2"],
        "--prompt_tokens 3 2: MIN is above MAX",
    ),
    "a reward that breaks": (PAIRS, ["--reward", f"x={__name__}:breaks_on_nothing"], "'x, an empty text' failed"),
    "an output that is a file": (PAIRS, ["--output", __file__], "is not a folder that can be written to"),
}


@pytest.mark.parametrize("case", BAD_CHECKS)
def test_a_check_of_a_reward_with_bad_input_ends_in_one_line(case, refusal, gpt2_path, tmp_path, own_cache, no_weights):
    rows, options, said = BAD_CHECKS[case]
    write_rows(tmp_path, rows)
    pairs = str(tmp_path / "test.jsonl")
    options = [option.format(gpt2=gpt2_path, pairs=pairs) for option in options]
    given = ["--reward", LETTERS, "--pairs", pairs, "--output", str(tmp_path / "out"), *options]
    assert said in refusal(reward_model.main, given)
    assert not (tmp_path / "out").exists()


BAD_LINES = {
    "other keys": {"text": "a"},
    "ids beyond the vocabulary": {"index": 0, "ids": [5, 10**6], "completion": "a", "last": True},
    "negative ids": {"index": 0, "ids": [-5], "completion": "a", "last": True},
    "no ids": {"index": 0, "ids": [], "completion": "a", "last": True},
    "ids that are texts": {"index": 0, "ids": ["a"], "completion": "a", "last": True},
    "a list": [1, 2],
    "a number": 3,
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_file_of_completions_that_holds_something_else(case, compared, refusal, tmp_path, no_weights):
    shutil.copytree(compared[1] / "completions", tmp_path / "completions")
    path = tmp_path / "completions" / "base.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(first + "\n" + json.dumps(BAD_LINES[case]) + "\n")
    before = path.read_bytes()
    line = refusal(compare.main, [*compared[0], "--output", str(tmp_path)])
    assert str(path) in line
    assert "delete the file" in line
    assert path.read_bytes() == before


@pytest.mark.parametrize("first", ["[1]", "3", '{"other": "keys"}', None])
def test_completions_of_another_program(first, compared, refusal, tmp_path, no_weights):
    path = tmp_path / "completions" / "base.jsonl"
    path.parent.mkdir()
    if first is None:
        path.mkdir()
    else:
        path.write_text(first + "\n")
    assert str(path) in refusal(compare.main, [*compared[0], "--output", str(tmp_path)])


JUDGE = ["--pairwise_judge", f"{__name__}:prefers_first"]
BAD_JUDGES = {
    "a server without a model": (["--pairwise_judge", "http://localhost:1/v1"], "expected URL#MODEL"),
    "a port that is none": (["--pairwise_judge", "http://localhost:port/v1#m"], "http://localhost:port/v1"),
    "no such folder": (["--pairwise_judge", "./nowhere"], "--pairwise_judge: './nowhere'"),
    "a classifier": (["--pairwise_judge", "{classifier}"], "is not a language model"),
    "no such function": (["--pairwise_judge", f"{__name__}:nothing"], "--pairwise_judge: cannot import"),
    "no such prompt": ([*JUDGE, "--judge_prompt", "{tmp}/none"], "--judge_prompt {tmp}/none: No such file"),
    "a prompt without B": ([*JUDGE, "--judge_prompt", "{tmp}/without_b"], "without_b: has no {b}"),
    "a prompt in another encoding": ([*JUDGE, "--judge_prompt", "{tmp}/latin"], "latin: not utf-8"),
    "a prompt for nobody": (["--judge_prompt", "{tmp}/latin"], "--judge_prompt: there is no --pairwise_judge"),
    "no question at a time": ([*JUDGE, "--judge_concurrency", "0"], "--judge_concurrency: must be at least 1"),
    "no time to answer": ([*JUDGE, "--judge_timeout", "nan"], "--judge_timeout: must be above 0"),
    "settings that are none": ([*JUDGE, "--judge_settings", "[1]"], "--judge_settings: must be a JSON object"),
    "settings that are no JSON": ([*JUDGE, "--judge_settings", "a=1"], "--judge_settings: must be a JSON object"),
}


def prefers_first(prompts, pairs):
    return [0] * len(pairs)


@pytest.mark.parametrize("case", BAD_JUDGES)
def test_a_pairwise_judge_that_is_none(case, compared, classifier_path, refusal, tmp_path, no_weights):
    (tmp_path / "without_b").write_text("{prompt} {a}")
    (tmp_path / "latin").write_bytes(b"\xe9 {prompt} {a} {b}")
    options, said = BAD_JUDGES[case]
    options = [option.replace("{tmp}", str(tmp_path)).replace("{classifier}", classifier_path) for option in options]
    line = refusal(compare.main, [*compared[0], *options, "--output", str(tmp_path / "out")])
    assert said.replace("{tmp}", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", ['{"question": "a"}', '{"question": "a", "answer": ["A"]}', '{"answer": "A"}', "[1]"])
def test_a_file_of_answers_that_holds_something_else(row, compared, refusal, tmp_path, no_weights):
    path = tmp_path / "answers.jsonl"
    options = [*compared[0], *JUDGE, "--output", str(tmp_path)]
    PairwiseJudge(compare.make_parser().parse_args(options)).log.add({})
    path.write_text(path.read_text() + row + "\n")
    line = refusal(compare.main, options)
    assert str(path) in line
    assert "delete the file" in line


def set_at(results, value, *keys):
    for key in keys[:-1]:
        results = results[key]
    results[keys[-1]] = value


BAD_RESULTS = {
    "half of a surrogate pair": lambda r: set_at(r, "\ud800", "samples", 0, "prompt"),
    "a text for a number": lambda r: set_at(r, "high", "metrics", "kl", "tuned", "mean"),
    "no samples": lambda r: r.pop("samples"),
    "no metrics": lambda r: r.pop("metrics"),
    "samples that are a number": lambda r: set_at(r, 3, "samples"),
    "a sample without scores": lambda r: r["samples"][0]["tuned"].pop("scores"),
    "another kind": lambda r: set_at(r, "other", "kind"),
}


@pytest.mark.parametrize("case", [*BAD_RESULTS, "deep nesting"])
def test_results_that_are_not_whole_end_in_one_line(case, compared, tmp_path):
    path = tmp_path / "results.json"
    if case == "deep nesting":
        path.write_text("[" * 100_000)
    else:
        results = json.loads((compared[1] / "results.json").read_text())
        BAD_RESULTS[case](results)
        path.write_text(json.dumps(results))
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path)])
    assert str(path) in stopped.value.code
    assert "\n" not in stopped.value.code
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("options", "piped", "said"),
    [
        (["--seed", str(2**70), "--prompt", "a"], b"", "--seed: must be at least 0 and at most"),
        ([], b"\xff\xfe\xff\n", "what is piped in is not utf-8"),
        (["--prompt", "a film \udcff"], b"", "is no text"),
        (["--file", "{tmp}/rows.jsonl"], b"", "prompt 1: the prompt"),
    ],
)
def test_a_prediction_from_what_is_no_text(options, piped, said, gpt2_path, refusal, tmp_path, monkeypatch):
    write_rows(tmp_path, prompts_of(["fine", "\ud800"]), ["rows.jsonl"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    options = [option.format(tmp=tmp_path) for option in options]
    assert said in refusal(predict.main, ["--model", gpt2_path, "--max_new_tokens", "2", *options])
