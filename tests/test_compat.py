"""Code for TRL 1.12's PPOTrainer, which `trl_ppo.compat` runs: its calls, its settings, its two scripts."""

import os
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    default_data_collator,
)
from trl import ModelConfig, ScriptArguments, get_peft_config

import trl_ppo
from conftest import ROOT, SENTENCES
from test_ppo_trainer import give_completions, history, letter_share
from trl_ppo import RewardModel, compat
from trl_ppo.checkpoints import load_state
from trl_ppo.compat import PPOConfig, PPOTrainer
from trl_ppo.doctor import look_at_scores
from trl_ppo.inputs import UserError

# The fields that TRL 1.12's PPOConfig had of its own, with their defaults, but for `world_size`.
OF_TRL = {
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
    "learning_rate": 3e-6,
    "adam_epsilon": 1e-8,
}
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def settings(folder, **set):
    """A config of two rollouts of four, most of it by TRL's names."""
    own = {"output_dir": str(folder), "per_device_train_batch_size": 4, "total_episodes": 8, "response_length": 6}
    own |= {"num_ppo_epochs": 2, "num_sample_generations": 0, "learning_rate": 1e-3, "save_strategy": "no"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PPOConfig(**(QUIET | {"gradient_checkpointing": False} | own | set))


def token_rows(tokenizer, n=8):
    """`input_ids` of the first two words of the sentences."""
    texts = [" ".join(SENTENCES[i % len(SENTENCES)].split()[:2]) for i in range(n)]
    return Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})


def build(policy, classifier, folder, set=None, **given):
    """The trainer as TRL's scripts make it, of models that are loaded already; `given` replaces its arguments."""
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    arguments = {
        "args": settings(folder, **(set or {})),
        "processing_class": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained(policy),
        "ref_model": AutoModelForCausalLM.from_pretrained(policy),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(classifier),
        "train_dataset": token_rows(tokenizer),
        "value_model": AutoModelForSequenceClassification.from_pretrained(classifier),
    }
    return PPOTrainer(**(arguments | given))


def roll_out(trainer, rows=None):
    trainer.model.train()
    return trainer._generate_and_score_completions(rows or [trainer.train_dataset[i] for i in range(4)])


# --- TRL's scripts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy(tokenizer, tmp_path_factory):
    """(language model, classifier): folders of GPT-2s whose vocabulary has room for a token more, as Pythia's has."""
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": len(tokenizer) + 20, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "classifier")]
    GPT2LMHeadModel(GPT2Config(**size, **ends)).save_pretrained(folders[0])
    AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=1).save_pretrained(folders[1])
    for folder in folders:
        tokenizer.save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def command_line(roomy, tmp_path, own_cache):
    """What TRL's scripts are started with: two rollouts of eight, on small models and local data."""
    prompts = Dataset.from_dict({"prompt": [sentence[:14] for sentence in SENTENCES * 18]})
    for split in ("train", "test"):
        prompts.to_json(tmp_path / "data" / f"{split}.jsonl")
    text = f"--dataset_name {tmp_path / 'data'} --output_dir {tmp_path / 'out'} --model_name_or_path {roomy[0]} "
    text += f"--sft_model_path {roomy[0]} --reward_model_path {roomy[1]} --per_device_train_batch_size 4 "
    text += "--gradient_accumulation_steps 2 --total_episodes 16 --response_length 6 --use_cpu --bf16 False "
    text += "--learning_rate 1e-3"
    return text.split()


def like_trls_scripts(*options):
    """What they do, in their order."""
    script, args, of_model = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_into_dataclasses(
        [*options]
    )
    shutil.rmtree(args.output_dir, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(of_model.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(args.reward_model_path, num_labels=1) for _ in range(2)
    )
    policy = AutoModelForCausalLM.from_pretrained(args.sft_model_path, dtype=torch.float32)
    peft_config = get_peft_config(of_model)
    ref_policy = AutoModelForCausalLM.from_pretrained(args.sft_model_path) if peft_config is None else None
    data = load_dataset(script.dataset_name, split=script.dataset_train_split)

    def tokenise(rows):
        return data.select(rows).map(
            lambda batch: {"input_ids": tokenizer(batch["prompt"], padding=False)["input_ids"]},
            batched=True,
            remove_columns=data.column_names,
            num_proc=args.dataset_num_proc,
        )

    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=tokenise(range(100)),
        eval_dataset=tokenise(range(100, len(data))),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.generate_completions()
    return trainer


@pytest.mark.parametrize(
    "options",
    ["--missing_eos_penalty 1.0 --stop_token eos", "--use_peft --lora_target_modules c_attn c_proj --num_ppo_epochs 1"],
)
def test_a_script_like_trls_trains_saves_and_shows_completions(command_line, roomy, options, capsys):
    trainer = like_trls_scripts(*command_line, *options.split())
    epochs = 1 if "--use_peft" in options else 4
    assert trainer.state.global_step == 2 * epochs
    assert len(history(trainer, "objective/scores")) == 2, "TRL logged each rollout"
    assert history(trainer, "episode") == [trainer.args.batch_size, 2 * trainer.args.batch_size]
    assert history(trainer, "lr") == history(trainer, "learning_rate")
    assert trainer.state.episode == 2 * trainer.args.batch_size
    assert [abs(kl) < 1e-5 for kl in history(trainer, "objective/kl")] == [True, False]
    folder = Path(trainer.args.output_dir)
    saved, start = load_file(folder / "critic.safetensors"), load_file(Path(roomy[1]) / "model.safetensors")
    assert not torch.equal(saved["head.weight"], start["score.weight"]), "the critic has learnt"
    AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(trainer.processing_class)
    printed = capsys.readouterr().out
    assert [printed.count(f" Step {step} ") for step in (epochs, 2 * epochs)] == [1, 2], "while training, at its end"


@pytest.mark.skipif(
    "TRL_PPO_SCRIPTS" not in os.environ, reason="TRL_PPO_SCRIPTS: not set to TRL's examples/scripts/ppo"
)
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("ppo.py", "--missing_eos_penalty 1.0 --num_ppo_epochs 1"),
        ("ppo.py", "--use_peft --lora_target_modules c_attn c_proj"),
        ("ppo_tldr.py", "--dataset_test_split test --stop_token eos --eval_strategy steps --eval_steps 1"),
    ],
)
def test_trls_own_scripts_run_with_the_import_changed(script, options, command_line, tmp_path, monkeypatch):
    text = (Path(os.environ["TRL_PPO_SCRIPTS"]) / script).read_text()
    changed, imports = re.subn(r"from trl\.experimental\.ppo import", "from trl_ppo.compat import", text)
    assert imports == 1
    (tmp_path / script).write_text(changed)
    monkeypatch.setattr(sys, "argv", [script, *command_line, *options.split()])
    trainer = runpy.run_path(str(tmp_path / script), run_name="__main__")["trainer"]
    assert trainer.state.global_step == 2 * trainer.args.num_ppo_epochs
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "critic.safetensors").is_file()


def test_push_to_hub_takes_the_datasets_name(gpt2_path, classifier_path, tmp_path, monkeypatch):
    trainer = build(gpt2_path, classifier_path, tmp_path / "out")
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/mine"))
    hub = SimpleNamespace(upload_folder=lambda repo_id, **_: repo_id)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    assert trainer.push_to_hub(dataset_name="org/prompts") == "me/mine"
    assert "org/prompts" in (tmp_path / "out" / "README.md").read_text()


# --- Settings -------------------------------------------------------------------------------------------------------


def test_every_setting_of_trl_1_12_is_there_with_its_default():
    fields = PPOConfig.__dataclass_fields__
    assert {name: fields[name].default for name in OF_TRL} == OF_TRL


def documented():
    """{TRL 1.12's name: what the guide says it is here}, from the table."""
    text = (ROOT / "recipes" / "guides" / "from_trl.md").read_text()
    table = text.split("## Names of PPOConfig")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines() if row.startswith("| `")]
    return {name: now for names, now in rows for name in re.findall(r"`(\w+)`", names)}


def test_code_and_table_agree_on_the_names():
    table, fields = documented(), PPOConfig.__dataclass_fields__
    own = set(fields) - set(trl_ppo.PPOConfig.__dataclass_fields__)
    assert own <= set(OF_TRL) | {"exp_name"}
    assert set(table) == set(OF_TRL) - {"learning_rate", "push_to_hub"} | {"exp_name", "world_size"}
    for name in table:
        if name in own:
            now = fields[name].metadata["help"]
            for said in re.findall(r"\w+_\w+", now if now in fields else ""):
                assert said in table[name], f"{name}: {now}, but the table says {table[name]}"


@pytest.mark.parametrize(
    ("name", "value", "new", "meant"),
    [
        ("num_ppo_epochs", 3, "num_iterations", 3),
        ("response_length", 9, "max_completion_length", 9),
        ("cliprange", 0.3, "epsilon", 0.3),
        ("exp_name", "mine", "run_name", "mine"),
        ("stop_token_id", 7, "generation_kwargs", {"eos_token_id": 7}),
    ],
)
def test_an_old_name_sets_the_new_one_and_says_so_once(tmp_path, name, value, new, meant):
    with pytest.warns(FutureWarning) as said:
        args = PPOConfig(str(tmp_path), **QUIET, **{name: value})
    assert (getattr(args, new), getattr(args, name)) == (meant, value)
    (message,) = [str(each.message) for each in said if str(each.message).startswith(name)]
    assert new in message
    assert "\n" not in message


def test_new_names_alone_are_taken_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated")
        args = PPOConfig(str(tmp_path), **QUIET, num_iterations=2, max_completion_length=256, epsilon=0.1)
    assert (args.num_ppo_epochs, args.response_length, args.cliprange) == (2, 256, 0.1)


@pytest.mark.parametrize(
    ("set", "fix"),
    [
        ({"batch_size": 64}, "set those"),
        ({"mini_batch_size": 64}, "set those"),
        ({"num_total_batches": 10}, "set those"),
        ({"ref_adapter_name": "ref"}, "leave it out"),
        ({"response_length": 9, "max_completion_length": 8}, "give one of the two"),
        ({"stop_token_id": 7, "stop_token": "eos"}, "give one of them"),
        ({"stop_token_id": 7, "generation_kwargs": {"top_k": 3}}, "give one of them"),
        ({"stop_token": "."}, "name another token by stop_token_id"),
        ({"num_mini_batches": 3}, "do not divide a rollout of 4"),
    ],
)
def test_a_setting_that_cannot_be_kept_is_refused_in_one_line(tmp_path, set, fix):
    with pytest.raises(ValueError, match=fix) as error:
        settings(tmp_path, **set)
    assert str(error.value).startswith(tuple(set))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("micro", "accumulated", "mini"), [(8, 1, 4), (2, 4, 2), (6, 2, 4), (4, 2, 1)])
def test_a_rollout_is_as_large_as_trls_and_has_as_many_mini_batches(tmp_path, micro, accumulated, mini):
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
    args = settings(tmp_path, **sizes, num_mini_batches=mini, total_episodes=2 * micro * accumulated)
    assert args.generation_batch_size == args.batch_size == micro * accumulated
    assert args.per_device_train_batch_size <= micro
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == args.mini_batch_size
    assert args.mini_batch_size * mini == args.batch_size
    assert (args.num_total_batches, args.max_steps) == (2, 2 * 2 * mini)


def test_a_step_is_a_rollout_as_in_trl(tmp_path):
    every = {"logging_steps": 2, "eval_steps": 3, "save_steps": 4, "warmup_steps": 5, "save_strategy": "steps"}
    args = settings(tmp_path, **every, num_mini_batches=2)
    assert {name: getattr(args, name) for name in every if name != "save_strategy"} == {
        name: value * 4 for name, value in every.items() if name != "save_strategy"
    }
    assert settings(tmp_path).logging_steps == 2  # each rollout, of two steps
    assert settings(tmp_path, warmup_steps=0.1).warmup_steps == 0.1


# --- Models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_reward_model_gives_the_scores_that_our_reward_model_gives_the_texts(
    gpt2_path, classifier_path, tmp_path, pad
):
    folder = shutil.copytree(classifier_path, tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path, pad_token=pad, padding_side="left")
    tokenizer.save_pretrained(folder)
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(SENTENCES[:4])["input_ids"]]
    rows = Dataset.from_dict({"input_ids": [row[:3] for row in ids]})
    trainer = build(gpt2_path, folder, tmp_path / "out", processing_class=tokenizer, train_dataset=rows)
    give_completions(trainer, [row[3:] for row in ids])
    roll_out(trainer)
    expected = RewardModel(str(folder)).score(SENTENCES[:4])
    assert trainer._logs["rewards"]["reward_model"] == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-3


def test_the_score_is_read_at_the_last_token_also_after_an_end_at_once(gpt2_path, classifier_path, tmp_path):
    trainer = build(gpt2_path, classifier_path, tmp_path)
    eos = trainer.processing_class.eos_token_id
    completions = [[eos], [5, 6, eos], [7, 8, 9, 10], [11]]
    give_completions(trainer, completions)
    roll_out(trainer)
    classifier = AutoModelForSequenceClassification.from_pretrained(classifier_path).eval()
    for i, told in enumerate(trainer._logs["rewards"]["reward_model"]):
        ids = torch.tensor([trainer.train_dataset[i]["prompt"].ids + completions[i]])
        with torch.no_grad():
            states = classifier.transformer(ids).last_hidden_state
            assert told == pytest.approx(classifier.score(states)[0, -1, 0].item(), abs=1e-6)


def test_the_doctor_swaps_the_prompts_of_a_reward_model_too(gpt2_path, classifier_path, tmp_path):
    blind = AutoModelForSequenceClassification.from_pretrained(classifier_path)
    with torch.no_grad():  # its score is read from the last token's embedding
        for name, weight in blind.named_parameters():
            if "c_proj" in name or "wpe" in name:
                weight.zero_()
    found = []
    for reward_model in (blind, AutoModelForSequenceClassification.from_pretrained(classifier_path)):
        trainer = build(gpt2_path, classifier_path, tmp_path, reward_model=reward_model)
        trainer._rollout = roll_out(trainer)
        found.append([bool(true) for name, true, *_ in look_at_scores(trainer) if name == "blind"])
    assert found == [[True], [False]]


def test_the_critic_starts_from_the_value_models_weights_learns_and_is_saved(gpt2_path, classifier_path, tmp_path):
    value_model = AutoModelForSequenceClassification.from_pretrained(classifier_path, dtype=torch.bfloat16)
    with torch.no_grad():
        value_model.score.weight.normal_()  # so that no file has them
    before = {name: weight.float() for name, weight in value_model.state_dict().items()}
    trainer = build(gpt2_path, classifier_path, tmp_path, value_model=value_model)
    critic = trainer.policy.critic.state_dict()
    assert len(critic) == len(before)
    for name, weight in critic.items():
        theirs = before[name.replace("trunk.", "transformer.").replace("head.", "score.")]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, theirs), name
    trainer.train()
    trainer.save_model()
    assert not torch.equal(trainer.policy.critic.head.weight, before["score.weight"])
    fresh = build(gpt2_path, classifier_path, tmp_path)
    load_state(fresh, tmp_path)  # as a run that resumes does
    trained = trainer.policy.critic.state_dict()
    for name, weight in fresh.policy.critic.state_dict().items():
        assert torch.equal(weight, trained[name]), name


def test_policy_and_critic_are_there_by_their_old_names(gpt2_path, classifier_path, tmp_path):
    given = AutoModelForSequenceClassification.from_pretrained(classifier_path)
    trainer = build(gpt2_path, classifier_path, tmp_path, value_model=given)
    assert trainer.policy_model is trainer.policy
    assert trainer.value_model is given
    assert trainer.policy.critic.head is given.score, "it is trained in place"
    assert (other := build(gpt2_path, classifier_path, tmp_path, value_model=None)).value_model is other.policy.critic


def test_trl_ppo_itself_names_all_old_settings_and_arguments_at_once(gpt2_path, tmp_path):
    with pytest.raises(TypeError, match=r"num_ppo_epochs \(now num_iterations\); nonsense; old names"):
        trl_ppo.PPOConfig(output_dir=str(tmp_path), num_ppo_epochs=2, nonsense=1)
    old = {
        "batch_size": "× num_mini_batches",
        "reward_model_path": r"reward_funcs=RewardModel\(path\)",
        "gama": "gamma\\?",
    }
    for name, hint in old.items():
        with pytest.raises(TypeError, match=rf"{name} \(.*{hint}"):
            trl_ppo.PPOConfig(output_dir=str(tmp_path), **{name: 1})
    with pytest.raises(UserError, match=r"^ref_model, reward_model: PPOTrainer takes model, .*trl_ppo.compat"):
        trl_ppo.PPOTrainer(model=gpt2_path, args=None, ref_model=1, reward_model=2)
    with pytest.raises(UserError, match=r"^args: str is no PPOConfig"):
        trl_ppo.PPOTrainer(gpt2_path, len, gpt2_path, [])
    args = trl_ppo.PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(UserError, match=r"'runs/nowhere' does not exist in /"):
        trl_ppo.PPOTrainer("runs/nowhere", len, args, [1] * 8)
    with pytest.raises(UserError, match="needs reward_funcs, train_dataset"):
        trl_ppo.PPOTrainer(model=gpt2_path, args=trl_ppo.PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_without_a_value_model_the_critic_is_a_head_on_the_policy(gpt2_path, classifier_path, tmp_path):
    trainer = build(gpt2_path, classifier_path, tmp_path, value_model=None)
    assert set(trainer.policy.critic.state_dict()) == {"weight", "bias"}


def test_the_reference_is_the_model_that_was_given(gpt2_path, classifier_path, tmp_path):
    torch.manual_seed(5)
    other = GPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(gpt2_path).config)
    trainer = build(gpt2_path, classifier_path, tmp_path, ref_model=other)
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
    rollout = roll_out(trainer)
    told = trainer._ref_logprobs(rollout).logprobs
    assert (told - rollout["old_logprobs"]).abs().max() > 0.01
    assert history(trainer, "objective/kl") == []
    ids, width = rollout["input_ids"], rollout["completion_mask"].size(1)
    row = rollout["attention_mask"][0].bool()
    plain = GPT2LMHeadModel(other.config).eval()
    plain.load_state_dict(other.state_dict())
    with torch.no_grad():
        logits = plain(ids[0][row][None]).logits[0] / 0.7
    n = int(rollout["completion_mask"][0].sum())
    expected = logits.log_softmax(-1)[-n - 1 : -1].gather(1, ids[0, -width:][:n, None]).squeeze(1)
    torch.testing.assert_close(told[0, :n], expected, rtol=0, atol=1e-5)


def test_without_a_reference_it_is_a_copy_of_the_policy_and_not_of_its_folder(gpt2_path, classifier_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(gpt2_path)
    with torch.no_grad():
        policy.transformer.wpe.weight.normal_()
    trainer = build(gpt2_path, classifier_path, tmp_path, model=policy, ref_model=None)
    rollout = roll_out(trainer)
    torch.testing.assert_close(trainer._ref_logprobs(rollout).logprobs, rollout["old_logprobs"], rtol=0, atol=1e-5)
    with torch.no_grad():
        policy.transformer.wpe.weight.normal_()  # as training would
    assert (trainer._ref_logprobs(rollout).logprobs - trainer.logprobs(policy, rollout).logprobs).abs().max() > 0.01


def test_a_function_is_a_reward_in_the_place_of_a_model(gpt2_path, classifier_path, tmp_path):
    trainer = build(gpt2_path, classifier_path, tmp_path, reward_model=letter_share)
    give_completions(trainer, [trainer.processing_class("eel").input_ids] * 4)
    roll_out(trainer)
    assert [*trainer._logs["rewards"]["letter_share"]] == [pytest.approx(2 / 3)] * 4


# --- Prompts --------------------------------------------------------------------------------------------------------


def test_the_ids_of_prompts_arrive_unchanged(gpt2_path, classifier_path, tmp_path):
    """Also where their text has other ids: letter by letter, or with a special token in the middle."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path, padding_side="left")
    letters = tokenizer.convert_tokens_to_ids([*"movie"])
    rows = [letters, [*letters[:2], tokenizer.eos_token_id, 9], [5], [7, 8, 9, 10]]
    assert tokenizer("movie")["input_ids"] != letters
    trainer = build(gpt2_path, classifier_path, tmp_path, train_dataset=Dataset.from_dict({"input_ids": rows}))
    rollout = roll_out(trainer)
    width = rollout["completion_mask"].size(1)
    prompts = zip(rollout["input_ids"][:, :-width], rollout["attention_mask"][:, :-width].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in prompts] == rows


@pytest.mark.parametrize(
    ("pad", "columns", "kept"),
    [
        ("<pad>", {}, [[5, 6, 1], [7]]),  # <pad> is no content
        ("<eos>", {}, [[0, 5, 6, 1], [0, 0, 0, 7]]),  # an end may be
        ("<eos>", {"attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1]]}, [[5, 6, 1], [7]]),
    ],
)
def test_padding_in_the_dataset_is_left_out(tokenizer, gpt2_path, pad, columns, kept):
    own = AutoTokenizer.from_pretrained(gpt2_path, pad_token=pad)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"]) == [0, 1]
    rows = Dataset.from_dict({"input_ids": [[0, 5, 6, 1], [0, 0, 0, 7]], "lengths": [4, 4]} | columns)
    rows.set_format("torch")
    prompts = compat.with_prompts("train_dataset", rows, own)
    assert [row["prompt"].ids for row in prompts] == kept
    assert prompts[0].keys() == {"prompt", "lengths"}


# --- generate_completions -------------------------------------------------------------------------------------------


def test_samples_are_shown_as_often_as_asked_for_and_leave_training_as_it_is(
    gpt2_path, classifier_path, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(compat, "print_prompt_completions_sample", lambda *args: shown.append(args))
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path)
    rows = token_rows(tokenizer, 10)
    four_rollouts = {"num_sample_generations": 2, "total_episodes": 16, "num_ppo_epochs": 1, "log_completions": True}
    trainer = build(gpt2_path, classifier_path, tmp_path, four_rollouts, eval_dataset=rows)
    trainer.train()
    assert [args[-1] for args in shown] == [1, 3]  # after these steps, of one each
    assert len([*(tmp_path / "completions").iterdir()]) == 4, "what log_completions writes of each rollout"
    trainer.model.train()
    temperatures, sample = [], trainer._sample
    trainer._sample = lambda prompts: temperatures.append(trainer.generation_config.temperature) or sample(prompts)
    trainer.generate_completions()
    assert temperatures == [0.01] * 2  # batches
    prompts, completions, scores, *_ = shown[-1]
    assert len(prompts) == len(completions) == len(scores["score"]) == 5
    assert trainer.generation_config.temperature == 0.7
    assert trainer.model.training
    assert not trainer._metrics["eval"]
    texts = [" ".join(sentence.split()[:2]) for sentence in SENTENCES]
    assert set(prompts) <= set(texts)
    trainer.eval_dataset = None
    trainer.generate_completions()
    assert len(shown) == 3


# --- Wrong use ------------------------------------------------------------------------------------------------------


def adapted(path):
    model = AutoModelForSequenceClassification.from_pretrained(path)
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["c_attn"], fan_in_fan_out=True))


def of_two_labels(path):
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda gpt2, _: {"model": gpt2}, "model: .* is no model of transformers; load it"),
        (
            lambda _, head: {"reward_model": head},
            r"reward_model: \w+ is no model of transformers; give a classifier, or a function of yours: def reward\(",
        ),
        (lambda *_: {"reward_model": None}, "reward_model: NoneType is no model of transformers"),
        (lambda *_: {"args": trl_ppo.PPOConfig("out", **QUIET)}, "args: PPOConfig is not trl_ppo.compat.PPOConfig"),
        (lambda *_: {"data_collator": default_data_collator}, "data_collator: rows are not padded here; leave it out"),
        (lambda *_: {"train_dataset": Dataset.from_dict({"prompt": ["a"] * 8})}, "train_dataset: .* input_ids; add it"),
        (lambda *_: {"eval_dataset": [{"input_ids": [5]}]}, "eval_dataset: .* input_ids; add it"),
        (lambda *_: {"peft_config": LoraConfig(target_modules=["c_attn"])}, "ref_model: with PEFT .* give None"),
        (lambda _, head: {"value_model": adapted(head)}, "value_model: .* without adapter"),
        (lambda _, head: {"value_model": of_two_labels(head)}, "value_model: .* with one label"),
        (lambda _, head: {"reward_model": of_two_labels(head)}, "reward_model.* has several labels"),
    ],
)
def test_wrong_use_is_one_line(gpt2_path, classifier_path, tmp_path, given, said):
    with pytest.raises(UserError, match=said) as error:
        build(gpt2_path, classifier_path, tmp_path, **given(gpt2_path, classifier_path))
    assert "\n" not in str(error.value)


def test_one_model_in_two_places_is_refused(gpt2_path, classifier_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2_path)
    with pytest.raises(UserError, match="model and ref_model: are one and the same object"):
        build(gpt2_path, classifier_path, tmp_path, model=model, ref_model=model)
    classifier = AutoModelForSequenceClassification.from_pretrained(classifier_path)
    with pytest.raises(UserError, match="value_model and reward_model: are one and the same object"):
        build(gpt2_path, classifier_path, tmp_path, value_model=classifier, reward_model=classifier)


def test_a_pad_token_that_the_models_do_not_know_is_refused_with_the_way_out(gpt2_path, classifier_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"model: knows .*: tokenizer.pad_token = tokenizer.eos_token"):
        build(gpt2_path, classifier_path, tmp_path, processing_class=tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path)
    tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorWithPadding(tokenizer)
    build(gpt2_path, classifier_path, tmp_path, processing_class=tokenizer, data_collator=collator)


def test_the_parents_loader_is_itself_again_after_a_failure(gpt2_path, classifier_path, tmp_path):
    loader = compat.grpo_trainer.create_model_from_path
    with pytest.raises(UserError, match="prompts, but one rollout takes"):
        build(gpt2_path, classifier_path, tmp_path, {"per_device_train_batch_size": 16})
    assert compat.grpo_trainer.create_model_from_path is loader
