"""The trainer itself, on tiny models: what TRL's last PPOTrainer got wrong, row by row of the table of its defects."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)

from trl_ppo import PPOConfig, PPOTrainer
from trl_ppo.checkpoints import load_state
from trl_ppo.cpu import use_tiles
from trl_ppo.cpu.lm_head import PackedTokens
from trl_ppo.critic import ValueModel
from trl_ppo.logprobs import add_logprobs_forward, pad_batch

PROMPTS = [
    "the movie",
    "a great film with",
    "i watched it",
    "the story was so",
    "a",
    "i left early because",
    "the cast",
]

TRAINER_ARGUMENTS = ("eval_dataset", "callbacks", "peft_config", "quantization_config", "rollout_func")


def letter_share(prompts, completions, **columns):
    """Share of the letter e, from 0 to 1: a reward that varies and needs no model."""
    return [completion.count("e") / max(len(completion), 1) for completion in completions]


def prompts(n=16):
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(n)]})


def make_trainer(path, folder, reward_funcs=letter_share, train_dataset=None, policy=None, **set):
    """A trainer on tiny settings; `set` takes the trainer's own arguments and those of its config."""
    own = {name: set.pop(name) for name in TRAINER_ARGUMENTS if name in set}
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "num_iterations": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return PPOTrainer(
        path if policy is None else policy,
        reward_funcs,
        PPOConfig(**(settings | set)),
        prompts() if train_dataset is None else train_dataset,
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        **own,
    )


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps, self.grad_norms = 0, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.grad_norms.append(torch.cat(gradients).norm().item() if gradients else 0.0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps += 1


def give_completions(trainer, completions):
    """Have the trainer 'sample' these token ids, so that a test knows what was scored."""
    trainer._generate_single_turn = lambda *args, **kwargs: ([list(ids) for ids in completions], None)


def roll_out(trainer, texts=None):
    """One rollout in training mode; the texts are its prompts."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": text} for text in texts or PROMPTS[:4]])


# -- The number of steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_row_1_steps_per_rollout_are_ppo_epochs_times_mini_batches(gpt2_path, tmp_path, num_mini_batches):
    counter = CountSteps()
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        callbacks=[counter],
        num_mini_batches=num_mini_batches,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // num_mini_batches,
        num_iterations=3,
        total_episodes=16,
    )
    trainer.train()
    assert counter.steps == 2 * 3 * num_mini_batches  # two rollouts of 8


@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_row_2_ratio_is_1_on_the_first_mini_batch_whatever_their_number(gpt2_path, tmp_path, num_mini_batches):
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        num_mini_batches=num_mini_batches,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // num_mini_batches,
        learning_rate=1e-2,
        total_episodes=8,
    )
    trainer.train()
    ratios = history(trainer, "val/ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert abs(ratios[-1] - 1) > 1e-4  # and the policy did move


def test_row_3_every_rollout_takes_the_same_steps_when_the_dataset_is_exactly_one_batch(gpt2_path, tmp_path):
    counter, micro_batches = CountSteps(), []
    trainer = make_trainer(
        gpt2_path, tmp_path, train_dataset=prompts(8), callbacks=[counter], num_train_epochs=3, num_iterations=2
    )
    training_step = trainer.training_step
    trainer.training_step = lambda *args: micro_batches.append(1) or training_step(*args)
    trainer.train()
    assert counter.steps == 3 * 2
    assert len(micro_batches) == 3 * 2 * 2  # each step is made of two micro-batches


def test_row_4_gradients_are_clipped_and_their_norm_is_logged(gpt2_path, tmp_path):
    counter = CountSteps()
    trainer = make_trainer(gpt2_path, tmp_path, callbacks=[counter], max_grad_norm=1e-3, total_episodes=8)
    trainer.train()
    assert max(counter.grad_norms) == pytest.approx(1e-3, rel=1e-3)
    assert min(history(trainer, "grad_norm")) > 1e-3


def micro_batches_of_one_rollout(path, folder, **set):
    """The token ids of each micro-batch that one rollout of 16 distinct completions is cut into, epoch by epoch."""
    trainer = make_trainer(
        path,
        folder,
        train_dataset=prompts(16),
        num_mini_batches=2,
        per_device_train_batch_size=4,
        num_iterations=2,
        **set,
    )
    give_completions(trainer, [[10 + i] * (1 + i % 5) for i in range(16)])
    trainer.model.train()
    seen = []
    for step in range(trainer.args.steps_per_generation * 2):
        trainer._step = step
        batch = trainer._prepare_inputs([{"prompt": PROMPTS[0]}] * 16)
        seen.append(
            [
                row[mask.bool()][-1].item() - 10
                for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    return first, second


def test_every_epoch_draws_its_mini_batches_anew_from_the_whole_rollout(gpt2_path, tmp_path):
    epochs = micro_batches_of_one_rollout(gpt2_path, tmp_path)
    mini_batches = [[set(epoch[0] + epoch[1]), set(epoch[2] + epoch[3])] for epoch in epochs]
    for first, second in mini_batches:
        assert len(first) == len(second) == 8
        assert first | second == set(range(16))
        assert first not in ({*range(8)}, {*range(8, 16)}), "not the halves in the order of the rollout"
        assert {i % 2 for i in first} == {0, 1}
    assert mini_batches[0] != mini_batches[1]


def test_mini_batches_are_decided_by_the_seed(gpt2_path, tmp_path):
    same = [micro_batches_of_one_rollout(gpt2_path, tmp_path, seed=seed) for seed in (0, 0, 1)]
    assert same[0] == same[1]
    assert same[0] != same[2]


def test_micro_batches_hold_completions_of_like_length(gpt2_path, tmp_path):
    for epoch in micro_batches_of_one_rollout(gpt2_path, tmp_path):
        lengths = [[1 + i % 5 for i in micro_batch] for micro_batch in epoch]
        assert max(lengths[0]) <= min(lengths[1])
        assert max(lengths[2]) <= min(lengths[3])


# -- Precision and checkpointing -----------------------------------------------------------------------------------


def test_row_5_bf16_is_honoured_and_values_stay_in_fp32(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, bf16=True, total_episodes=8)
    dtypes = {"attention": set(), "values": set()}
    trainer.policy.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda module, args, output: dtypes["attention"].add((output.dtype, torch.is_grad_enabled()))
    )
    trainer.policy.critic.register_forward_hook(lambda module, args, output: dtypes["values"].add(output.dtype))
    trainer.train()
    assert (torch.bfloat16, True) in dtypes["attention"]
    assert (torch.float32, True) not in dtypes["attention"]
    assert dtypes["values"] == {torch.float32}


@pytest.mark.parametrize("own_critic", [False, True])
def test_row_6_gradient_checkpointing_recomputes_every_block_the_critics_too(
    gpt2_path, classifier_path, tmp_path, own_critic
):
    calls = {}
    for checkpointing in (False, True):
        trainer = make_trainer(
            gpt2_path,
            tmp_path,
            gradient_checkpointing=checkpointing,
            value_model_path=classifier_path if own_critic else None,
            total_episodes=8,
        )
        trunk = trainer.policy.critic.trunk if own_critic else trainer.policy.transformer
        count = calls[checkpointing] = []
        trunk.h[0].mlp.register_forward_pre_hook(
            lambda module, args, count=count: count.append(1) if torch.is_grad_enabled() else None
        )
        trainer.train()
    assert len(calls[True]) == 2 * len(calls[False]) > 0


# -- Sampling ------------------------------------------------------------------------------------------------------


def test_row_7_the_models_own_generation_config_does_not_leak_into_rollouts(gpt2_path, tmp_path):
    shaped_path = tmp_path / "shaped"
    shutil.copytree(gpt2_path, shaped_path)
    config = json.loads((shaped_path / "generation_config.json").read_text())
    config |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "top_k": 2, "do_sample": True}
    config["suppress_tokens"] = list(range(2, 150))
    (shaped_path / "generation_config.json").write_text(json.dumps(config))
    sampled = []
    for path in (gpt2_path, shaped_path):
        trainer = make_trainer(str(path), tmp_path / "run")
        torch.manual_seed(0)
        sampled.append(roll_out(trainer)["input_ids"].tolist())
    assert sampled[0] == sampled[1]
    assert trainer.policy.generation_config.repetition_penalty == 5.0  # and what is saved keeps it


@pytest.mark.parametrize("model", ["gpt2_path", "llama_path"])
def test_row_7_at_learning_rate_0_the_ratio_is_1_and_kl_is_0(model, tmp_path, request):
    trainer = make_trainer(
        request.getfixturevalue(model),
        tmp_path,
        learning_rate=0.0,
        num_mini_batches=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        temperature=0.7,
        total_episodes=16,
    )
    trainer.train()
    assert history(trainer, "val/ratio") == pytest.approx([1.0] * 8, abs=1e-6)
    assert max(map(abs, history(trainer, "objective/kl"))) <= 1e-6


def test_row_11_generation_stops_at_the_first_end_token(gpt2_path, tmp_path):
    ends = list(range(2, 100))
    trainer = make_trainer(gpt2_path, tmp_path, generation_kwargs={"eos_token_id": ends}, max_completion_length=12)
    rollout = roll_out(trainer, PROMPTS)
    lengths = rollout["completion_mask"].sum(1)
    assert lengths.min() < 12
    for row, mask in zip(rollout["input_ids"], rollout["completion_mask"], strict=True):
        completion = row[-len(mask) :][mask.bool()].tolist()
        assert all(token not in trainer.eos_token_ids for token in completion[:-1])
        assert len(completion) == 12 or completion[-1] in trainer.eos_token_ids


def test_row_29_generation_settings_are_the_configs(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, top_k=1, max_completion_length=9)
    first, second = roll_out(trainer), roll_out(trainer)  # top_k 1 leaves nothing to chance
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
    assert first["completion_mask"].size(1) == 9


def test_completions_that_do_not_fit_the_models_positions_are_refused(gpt2_path, tmp_path):
    with pytest.raises(ValueError, match=r"max_completion_length: 60 after a prompt of \d+ tokens is more than the 64"):
        roll_out(make_trainer(gpt2_path, tmp_path, max_completion_length=60))


def test_a_prompt_without_tokens_is_refused(gpt2_path, tmp_path):
    """Nothing would predict the first token of its completion."""
    with pytest.raises(ValueError, match="prompt: one has no tokens; leave out empty prompts"):
        make_trainer(gpt2_path, tmp_path)._generate_single_turn([[5, 6], []], None, {}, 1)


# -- Where the score goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_rows_8_and_9_the_score_is_paid_on_the_last_real_token_end_token_included(gpt2_path, tmp_path, pad_is_eos):
    seen = []

    def constant(prompts, completions, **columns):
        seen.extend(completions)
        return [10.0, 20.0, 30.0, 40.0]

    trainer = make_trainer(gpt2_path, tmp_path, constant, kl_coef=0.0, lam=0.0)
    tokenizer = trainer.processing_class
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    word = tokenizer("movie")["input_ids"]
    give_completions(trainer, [[eos], [*word, eos], [*word, *word, eos], [*word, *word]])
    rollout = roll_out(trainer)
    assert seen == ["", "movie", "moviemovie", "moviemovie"]
    lengths = rollout["completion_mask"].sum(1)
    assert lengths.tolist() == [1, len(word) + 1, 2 * len(word) + 1, 2 * len(word)]
    # With λ = 0 and no price of KL a token's return is its own reward plus the next value: at the end, the score.
    last = rollout["returns"][torch.arange(4), lengths - 1]
    assert torch.allclose(last, torch.tensor([10.0, 20.0, 30.0, 40.0]), atol=1e-5)
    assert (rollout["returns"] * (1 - rollout["completion_mask"])).abs().max() == 0


def test_row_10_any_declared_end_token_avoids_the_missing_eos_penalty(gpt2_path, tmp_path):
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        lambda completions, **columns: [1.0] * len(completions),
        kl_coef=0.0,
        lam=1.0,
        missing_eos_penalty=5.0,
        generation_kwargs={"eos_token_id": [1, 77]},
    )
    give_completions(trainer, [[50, 1], [50, 77], [50, 51], [77]])
    rollout = roll_out(trainer)
    assert torch.allclose(rollout["returns"][:, 0], torch.tensor([1.0, 1.0, -4.0, 1.0]), atol=1e-5)


def test_row_13_logged_statistics_leave_padding_out(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, learning_rate=0.0, num_iterations=1, total_episodes=8)
    completions = [[5], [6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]] * 2
    give_completions(trainer, completions)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(gpt2_path).eval()
    texts = trainer.train_dataset["prompt"]
    entropies = []
    order = list(trainer._get_train_sampler())[:8]
    for text, completion in zip([texts[i] for i in order], completions, strict=True):
        prompt = trainer.processing_class(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert len(entropies) == sum(map(len, completions))
    assert history(trainer, "policy/entropy_avg")[0] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


# -- Log-probabilities ---------------------------------------------------------------------------------------------


def _plain_logprobs(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["gpt2_path", "llama_path", "tinytalk-gptneo-3m", "stories260k-llama"])
def test_row_17_left_padding_changes_no_log_prob(name, temperature, tiled, request):
    if name.endswith("_path"):
        path = request.getfixturevalue(name)
    else:
        path = str(request.getfixturevalue("shared_data") / "models" / name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    prompts = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in (1, 5, 13, 29)]
    completions = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in (7, 1, 4, 9)]
    expected = [_plain_logprobs(model, p, c, temperature) for p, c in zip(prompts, completions, strict=True)]
    batch = pad_batch(prompts, completions, pad_token_id=0)
    add_logprobs_forward(model, temperature)
    if tiled:
        use_tiles(model, temperature)
    with torch.no_grad():
        scored = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_completion_tokens=9
        ).logprobs
    for row, logprobs in zip(scored, expected, strict=True):
        assert torch.allclose(row[: len(logprobs)], logprobs, atol=1e-5)
        assert (row[len(logprobs) :] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}])
@pytest.mark.parametrize("path", ["gpt2_path", "llama_path"])
def test_in_float32_the_states_kept_from_sampling_spare_the_policy_a_pass(
    path, settings, tmp_path, request, monkeypatch
):
    trainer = make_trainer(request.getfixturevalue(path), tmp_path, temperature=0.7, top_k=50, **settings)
    passes = []
    states = PackedTokens.states
    monkeypatch.setattr(PackedTokens, "states", lambda tokens, trunk: passes.append(trunk) or states(tokens, trunk))
    rollout = roll_out(trainer)
    assert (trainer.policy.base_model in passes) == bool(settings)
    assert trainer.ref_model.base_model in passes
    with torch.no_grad():
        passed = trainer.logprobs(trainer.model, rollout)
    assert trainer.policy.base_model in passes
    exact = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rollout["old_logprobs"], passed.logprobs, **exact)
    torch.testing.assert_close(rollout["old_values"], passed.state_values, **exact)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_states_kept_from_sampling_do_not_pile_up(gpt2_path, tmp_path, settings):
    trainer = make_trainer(gpt2_path, tmp_path, eval_dataset=prompts(4), **settings)
    kept = trainer.policy.generate.keywords["kept"]
    for _ in range(2):
        roll_out(trainer)
        assert not kept, "they are let go of once used"
        trainer.evaluate()
    for _ in range(2):  # and a call that is no rollout keeps its own alone
        trainer.policy.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=299)
        assert kept["states"].shape == (1, 3, 32)


def test_states_of_other_samples_are_not_taken_for_the_rollouts(gpt2_path, tmp_path):
    """A rollout_func may sample more than it returns."""
    trainer = make_trainer(gpt2_path, tmp_path)
    rollout = roll_out(trainer)
    inputs = {name: rollout[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    other = rollout["input_ids"].clone()
    other[0, -1] += 1
    states = torch.randn(*rollout["completion_mask"].shape, 32)
    trainer.policy.generate.keywords["kept"].update(sequences=other, states=states)
    with torch.no_grad():
        again = trainer.policy_logprobs(inputs)
    torch.testing.assert_close(again.logprobs, rollout["old_logprobs"], rtol=0, atol=1e-5)


def test_scoring_leaves_the_plain_forward_and_generate_as_they_were(gpt2_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2_path).eval()
    ids = torch.tensor([[5, 6, 7]])
    logits, sampled = model(ids).logits, model.generate(ids, do_sample=False, max_new_tokens=5)
    add_logprobs_forward(model)
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=5), sampled)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_row_34_no_tensor_of_the_size_of_rollout_times_vocabulary_is_ever_made(tokenizer, tmp_path):
    vocab = 50_000
    config = GPT2Config(vocab_size=vocab, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    largest = {}
    for rollout_size in (8, 32):
        trainer = make_trainer(
            str(tmp_path / "wide"),
            tmp_path,
            train_dataset=prompts(32),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=rollout_size // 4,
            total_episodes=rollout_size,
            num_iterations=1,
        )
        give_completions(trainer, [[5] * 12] * rollout_size)
        with LargestTensor() as mode:
            trainer.train()
        largest[rollout_size] = mode.numel
    assert largest[32] == largest[8] < 32 * 12 * vocab / 4


# -- Trainer's own promises ----------------------------------------------------------------------------------------


def test_row_14_a_dataset_smaller_than_a_rollout_is_refused_before_a_model_loads(gpt2_path, tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"train_dataset: 7 prompts, but one rollout takes 8"):
        PPOTrainer(str(tmp_path / "no-such-model"), letter_share, args, prompts(7))


def test_row_15_logging_steps_are_honoured(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, logging_steps=4, total_episodes=32)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "objective/kl" in entry] == [4, 8]


def test_row_15_a_callbacks_request_to_stop_is_honoured(gpt2_path, tmp_path):
    class StopAtThree(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(gpt2_path, tmp_path, callbacks=[StopAtThree()], total_episodes=64)
    trainer.train()
    assert trainer.state.global_step == 3


def test_row_16_evaluation_reports_score_kl_and_length_on_held_out_prompts(gpt2_path, tmp_path):
    held_out = Dataset.from_dict({"prompt": ["i left early", "the plot", "a wonderful cast"]})
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((trainer.model.training, tuple(prompts)))
        return letter_share(prompts, completions)

    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        reward,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        total_episodes=16,
    )
    trainer.train()
    evaluated = [prompt for training, batch in seen if not training for prompt in batch]
    assert sorted(evaluated) == sorted(list(held_out["prompt"]) * 2)
    for name in ("eval_objective/scores", "eval_objective/kl", "eval_completions/mean_length"):
        assert len(history(trainer, name)) == 2
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_objective/scores"] <= 1


def test_training_metrics_cover_the_whole_rollout_at_the_end_of_a_pass_too(gpt2_path, tmp_path):
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        lambda completions, **columns: [float(i) for i in range(len(completions))],
        train_dataset=prompts(9),
        num_train_epochs=2,
    )
    trainer.train()
    assert history(trainer, "objective/scores") == [3.5, 3.5]


def test_completions_are_logged_as_a_table_with_prompt_score_and_advantage(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, log_completions=True, total_episodes=8, logging_steps=2)
    trainer.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = pandas.read_parquet(file)
    assert len(table) == 8
    assert set(table["prompt"]) <= set(PROMPTS)
    assert table["letter_share"].mean() == pytest.approx(history(trainer, "objective/scores")[0], abs=1e-6)
    assert table["advantage"].notna().all()


def test_evaluation_averages_over_samples_not_over_batches(gpt2_path, tmp_path):
    def first_word_length(prompts, completions, **columns):
        return [float(len(prompt.split()[0])) for prompt in prompts]

    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        first_word_length,
        eval_dataset=Dataset.from_dict({"prompt": ["a b", "a b", "abcdefg b"]}),
        per_device_eval_batch_size=2,
    )
    assert trainer.evaluate()["eval_objective/scores"] == pytest.approx(3.0)


def test_an_evaluation_changes_neither_beta_nor_the_moments_of_the_scores(gpt2_path, tmp_path):
    trainer = make_trainer(
        gpt2_path, tmp_path, eval_dataset=prompts(5), kl_target=1.0, kl_horizon=100, score_norm=True, total_episodes=8
    )
    trainer.train()
    before = trainer.kl_coef, list(trainer.score_sums)
    assert before[1][0] == 8
    assert before[0] != trainer.args.kl_coef
    trainer.evaluate()
    assert (trainer.kl_coef, list(trainer.score_sums)) == before


def test_explained_variance_is_over_the_real_tokens(gpt2_path, tmp_path):
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        lambda completions, **columns: [float(i) for i in range(len(completions))],
        learning_rate=0.0,
        num_iterations=1,
        total_episodes=8,
    )
    give_completions(trainer, [[5], [6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]] * 2)
    rollouts = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: rollouts.append(generate(inputs)) or rollouts[-1]
    trainer.train()
    mask = rollouts[0]["completion_mask"].bool().numpy()
    values, returns = (rollouts[0][name].numpy()[mask] for name in ("old_values", "returns"))
    expected = 1 - np.var(returns - values, ddof=1) / np.var(returns, ddof=1)
    assert history(trainer, "val/explained_variance") == [pytest.approx(expected, abs=1e-5)]


def test_the_objective_is_logged_before_rewards_are_whitened(gpt2_path, tmp_path):
    logged = {}
    for whiten_rewards in (False, True):
        trainer = make_trainer(
            gpt2_path,
            tmp_path,
            lambda completions, **columns: [float(i) for i in range(len(completions))],
            whiten_rewards=whiten_rewards,
            learning_rate=0.0,
            num_iterations=1,
            total_episodes=8,
        )
        trainer.train()
        logged[whiten_rewards] = history(trainer, "objective/rlhf_reward")
    assert logged[True] == logged[False] == [pytest.approx(3.5)]


def test_the_table_of_completions_shows_the_mean_advantage_of_the_real_tokens(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, log_completions=True)
    give_completions(trainer, [[5], [6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]])
    rollout = roll_out(trainer)
    lengths = [1, 6, 2, 3]
    expected = [row[:length].mean().item() for row, length in zip(rollout["advantages"], lengths, strict=True)]
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-6)


# -- The critic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_critic", [False, True])
def test_row_19_the_critic_is_saved_and_restored_and_the_policy_loads_without_it(
    gpt2_path, classifier_path, tmp_path, own_critic, caplog
):
    set = {"value_model_path": classifier_path if own_critic else None}
    trainer = make_trainer(gpt2_path, tmp_path, total_episodes=8, save_strategy="steps", save_steps=2, **set)
    trainer.train()
    trainer.kl_coef = 0.123
    trainer.save_model(str(tmp_path / "final"))
    trained = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]

    fresh = make_trainer(gpt2_path, tmp_path, total_episodes=8, **set)
    start = fresh.policy.state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in trained if name.startswith("critic."))
    fresh._load_from_checkpoint(str(tmp_path / "final"))
    load_state(fresh, tmp_path / "final")
    assert "critic" not in caplog.text  # no warning of unexpected or missing weights
    for name, tensor in fresh.policy.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert fresh.kl_coef == 0.123
    assert (tmp_path / "checkpoint-2" / "critic.safetensors").exists()


@pytest.mark.parametrize("own_critic", [False, True])
def test_what_an_engine_gathered_is_saved_as_policy_and_critic(gpt2_path, classifier_path, tmp_path, own_critic):
    """DeepSpeed and FSDP hand over all weights at once, the critic's among them."""
    trainer = make_trainer(gpt2_path, tmp_path, value_model_path=classifier_path if own_critic else None)
    trainer._save(str(tmp_path / "plain"))
    trainer._save(str(tmp_path / "gathered"), state_dict=dict(trainer.policy.state_dict()))
    for name in ("model.safetensors", "critic.safetensors"):
        plain, gathered = (load_file(tmp_path / folder / name) for folder in ("plain", "gathered"))
        assert plain.keys() == gathered.keys()
        assert len(plain) > 1
        assert all(torch.equal(plain[key], gathered[key]) for key in plain)


def test_row_30_the_critic_is_a_head_on_the_policys_trunk_by_default(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path)
    head = trainer.policy.critic
    assert sum(parameter.numel() for parameter in head.parameters()) == 32 + 1
    give_completions(trainer, [[5, 6, 7], [8, 9], [10], [11, 12, 13]])
    values = roll_out(trainer)["old_values"]
    model = AutoModelForCausalLM.from_pretrained(gpt2_path).eval()
    prompt = trainer.processing_class(PROMPTS[0])["input_ids"]
    for t, seen in enumerate(([], [5], [5, 6])):  # the value of a state is read before its next token
        with torch.no_grad():
            expected = head(model.transformer(torch.tensor([prompt + seen])).last_hidden_state[0, -1:]).item()
        assert values[0, t].item() == pytest.approx(expected, abs=1e-5)


def test_the_value_loss_moves_the_trunk_that_the_head_shares(gpt2_path, tmp_path):
    """With advantages of 0 the policy loss is flat, so what moves the trunk is the value loss alone."""
    trainer = make_trainer(gpt2_path, tmp_path)
    rollout = roll_out(trainer)
    rollout["advantages"] = torch.zeros_like(rollout["advantages"])
    rollout["num_tokens"] = rollout["completion_mask"].sum()
    trainer._compute_loss(trainer.model, rollout).backward()
    assert trainer.policy.transformer.h[0].mlp.c_fc.weight.grad.abs().max() > 0
    assert trainer.policy.critic.weight.grad.abs().max() > 0


def test_row_30_a_separate_critic_starts_from_a_sequence_classifier(gpt2_path, classifier_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, value_model_path=classifier_path)
    assert isinstance(trainer.policy.critic, ValueModel)
    give_completions(trainer, [[5, 6, 7], [8, 9], [10], [11, 12, 13]])
    rollout = roll_out(trainer)
    classifier = AutoModelForSequenceClassification.from_pretrained(classifier_path).eval()
    prompt = trainer.processing_class(PROMPTS[0])["input_ids"]
    for t, seen in enumerate(([], [5], [5, 6])):  # the value of a state is read before its next token
        with torch.no_grad():
            hidden = classifier.transformer(torch.tensor([prompt + seen])).last_hidden_state[0, -1]
            expected = classifier.score(hidden).item()
        assert rollout["old_values"][0, t].item() == pytest.approx(expected, abs=1e-5)


def test_row_30_a_critic_that_cannot_read_the_policys_tokens_is_refused(gpt2_path, llama_path, bert_path, tmp_path):
    several = tmp_path / "several"
    AutoModelForSequenceClassification.from_pretrained(gpt2_path, num_labels=2).save_pretrained(several)
    for path in (bert_path, several):
        with pytest.raises(ValueError, match="not a causal sequence classifier with one label"):
            make_trainer(gpt2_path, tmp_path, value_model_path=str(path))
    other = AutoModelForSequenceClassification.from_pretrained(llama_path, num_labels=1)
    other.resize_token_embeddings(500)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has a vocabulary of 500 tokens, the policy one of \d+; .* tokenizer"):
        make_trainer(gpt2_path, tmp_path, value_model_path=str(tmp_path / "other"))


def test_values_are_clipped_at_the_range_of_the_config(gpt2_path, tmp_path):
    losses = {}
    for cliprange in (1e-6, 1e6):
        trainer = make_trainer(
            gpt2_path, tmp_path, cliprange_value=cliprange, learning_rate=1e-2, total_episodes=8, num_iterations=3
        )
        trainer.train()
        losses[cliprange] = history(trainer, "loss/value_avg")
    # The loss is the larger one of both errors, so values that are held fast make it larger once they have moved.
    assert losses[1e-6][0] == losses[1e6][0]
    assert losses[1e-6][1] > losses[1e6][1]


def test_row_33_the_critic_can_have_a_learning_rate_of_its_own(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, learning_rate=0.0, value_learning_rate=1e-2, total_episodes=8)
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in trainer.policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}


def test_the_critic_with_a_learning_rate_of_its_own_has_no_weight_decay(gpt2_path, tmp_path):
    """Without a value loss its gradient is 0, so nothing but weight decay could move it."""
    trainer = make_trainer(
        gpt2_path, tmp_path, value_learning_rate=1e-2, weight_decay=0.5, vf_coef=0.0, total_episodes=8
    )
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    trainer.train()
    after = trainer.policy.state_dict()
    assert torch.equal(after["critic.weight"], before["critic.weight"])
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])


def test_the_value_head_is_drawn_from_the_runs_seed(gpt2_path, tmp_path):
    heads = [make_trainer(gpt2_path, tmp_path, seed=seed).policy.critic.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# -- Rewards -------------------------------------------------------------------------------------------------------


def test_row_25_plain_functions_are_rewards_and_are_summed_with_their_weights(gpt2_path, tmp_path):
    def one(completions, **columns):
        return [1.0] * len(completions)

    def index(completions, **columns):
        return [float(i) for i in range(len(completions))]

    trainer = make_trainer(gpt2_path, tmp_path, [one, index], reward_weights=[10.0, 2.0], kl_coef=0.0, lam=1.0)
    returns = roll_out(trainer)["returns"][:, 0]
    assert torch.allclose(returns, torch.tensor([10.0, 12.0, 14.0, 16.0]), atol=1e-5)


def test_row_28_extra_columns_reach_the_reward_function(gpt2_path, tmp_path):
    seen = []

    def reward(prompts, completions, wanted, **columns):
        seen.extend(zip(prompts, wanted, strict=True))
        return [0.5 + len(word) for word in wanted]

    data = Dataset.from_dict(
        {"prompt": PROMPTS + PROMPTS[:1], "wanted": [text.upper() for text in PROMPTS + PROMPTS[:1]]}
    )
    make_trainer(gpt2_path, tmp_path, reward, data, total_episodes=8).train()
    assert len(seen) == 8
    assert all(prompt.upper() == wanted for prompt, wanted in seen)


def test_row_32_kl_coef_adapts_when_a_target_is_set_and_is_fixed_otherwise(gpt2_path, tmp_path):
    fixed = make_trainer(gpt2_path, tmp_path, total_episodes=24, learning_rate=0.0)
    fixed.train()
    assert fixed.kl_coef == 0.05
    adaptive = make_trainer(gpt2_path, tmp_path, total_episodes=24, learning_rate=0.0, kl_target=6.0, kl_horizon=100)
    adaptive.train()
    # KL is 0 throughout, so each of three rollouts of 8 takes off the most it may.
    assert adaptive.kl_coef == pytest.approx(0.05 * (1 - 0.2 * 8 / 100) ** 3)
    assert history(adaptive, "objective/kl_coef")[-1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 100) ** 2)


def test_row_33_scores_are_normalised_by_their_running_moments_and_clipped(gpt2_path, tmp_path):
    batches = [[1.0, 2.0, 3.0, 10.0], [0.0, -4.0, 7.0, 5.0]]
    queue = list(batches)
    trainer = make_trainer(
        gpt2_path, tmp_path, lambda **columns: queue.pop(0), score_norm=True, score_clip=1.0, kl_coef=0.0, lam=1.0
    )
    roll_out(trainer)
    returns = roll_out(trainer)["returns"][:, 0]
    every = torch.tensor(batches)
    expected = ((every[1] - every.mean()) / every.std()).clamp(-1, 1)
    assert torch.allclose(returns, expected, atol=1e-5)


def test_row_33_stop_epochs_at_kl_skips_the_rest_of_a_rollouts_epochs(gpt2_path, tmp_path):
    weights = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.transformer.wte.weight.detach().clone())

    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        callbacks=[Remember()],
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_iterations=5,
        stop_epochs_at_kl=1e-3,
        total_episodes=16,
    )
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    # The first step moves the policy past the target, the second sees it and is not taken, and so on.
    assert len(weights) == 10
    assert moved[:4] == [False] * 4
    assert moved[4]  # the next rollout starts afresh
    assert moved[5:] == [False] * 4


def test_a_rollout_after_one_that_was_broken_off_is_used_from_its_first_micro_batch(gpt2_path, tmp_path):
    trainer = make_trainer(
        gpt2_path, tmp_path, learning_rate=1e-2, num_iterations=5, stop_epochs_at_kl=1e-3, total_episodes=24
    )
    losses = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda *args: losses.append(trainer._step) or compute_loss(*args)
    trainer.train()
    # Of five epochs of two micro-batches, each rollout uses the first and the one that finds the policy too far away.
    assert losses == [rollout * 10 + step for rollout in range(3) for step in range(4)]


def test_stop_epochs_at_kl_is_held_against_the_kl_of_the_whole_mini_batch(gpt2_path, tmp_path):
    def skipped(target):
        trainer = make_trainer(
            gpt2_path,
            tmp_path,
            learning_rate=1e-2,
            num_iterations=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            stop_epochs_at_kl=target,
            total_episodes=8,
        )
        losses = []
        compute_loss = trainer._compute_loss
        trainer._compute_loss = lambda *args: losses.append(1) or compute_loss(*args)
        trainer.train()
        return len(losses) < 12, history(trainer, "policy/approxkl_avg")[1]

    _, kl = skipped(1e9)
    assert kl > 0
    assert skipped(kl * 0.9)[0], "four micro-batches add up to more than nine tenths of their sum"
    assert not skipped(kl * 1e3)[0]


def test_what_reward_functions_log_is_averaged_over_a_rollouts_calls(gpt2_path, tmp_path):
    def words(prompts, completions, log_metric, **_):
        if len(words.given) < 2:
            log_metric("words/once", 7.0)
        words.given.append(sum(len(text.split()) for text in completions) / len(completions))
        log_metric("words/mean", words.given[-1])
        return [0.0] * len(completions)

    words.given = []
    trainer = make_trainer(gpt2_path, tmp_path, words, logging_steps=8, max_steps=8)
    trainer.train()
    assert history(trainer, "words/mean") == pytest.approx([np.mean(words.given)])
    assert history(trainer, "words/once") == [7.0]
    assert len(words.given) > 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_37_a_score_that_is_no_number_stops_the_run_before_the_step(gpt2_path, tmp_path, bad):
    calls = []

    def sometimes_bad(prompts, completions, **columns):
        calls.append(1)
        return [bad if len(calls) == 2 and i == 5 else 1.0 for i in range(len(completions))]

    trainer = make_trainer(gpt2_path, tmp_path, sometimes_bad, total_episodes=32, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=rf"'sometimes_bad' returned {bad} for sample 5"):
        trainer.train()
    assert trainer.state.global_step == 2
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())


def test_row_37_a_loss_that_is_no_number_stops_the_run_before_the_step(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, total_episodes=8, vf_coef=1e38, cliprange_value=1e38)
    before = trainer.policy.transformer.wte.weight.detach().clone()
    give_completions(trainer, [[5, 6]] * 8)
    trainer.policy.critic.weight.data.fill_(1e20)
    with pytest.raises(FloatingPointError, match=r"loss is (inf|nan) at step 0; no step was taken"):
        trainer.train()
    assert torch.equal(trainer.policy.transformer.wte.weight, before)


def test_row_37_a_gradient_that_is_no_number_stops_the_run_before_the_step(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, total_episodes=8)
    before = trainer.policy.transformer.wte.weight.detach().clone()
    trainer.policy.transformer.ln_f.bias.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (inf|nan) at step 0; no step was taken"):
        trainer.train()
    assert torch.equal(trainer.policy.transformer.wte.weight, before)


def test_row_38_a_reward_function_with_too_few_values_is_named_with_both_counts(gpt2_path, tmp_path):
    def short(completions, **columns):
        return [1.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="'short' returned 3 values for 4 completions"):
        roll_out(make_trainer(gpt2_path, tmp_path, short))


def test_a_sample_that_one_reward_passes_over_is_scored_by_the_others_and_by_none_is_an_error(gpt2_path, tmp_path):
    def even(completions, **columns):
        return [1.0 if i % 2 == 0 else None for i in range(len(completions))]

    def odd(completions, **columns):
        return [3.0 if i % 2 else None for i in range(len(completions))]

    trainer = make_trainer(gpt2_path, tmp_path, [even, odd], kl_coef=0.0, lam=1.0)
    returns = roll_out(trainer)["returns"][:, 0]
    assert torch.allclose(returns, torch.tensor([1.0, 3.0, 1.0, 3.0]), atol=1e-5)
    with pytest.raises(ValueError, match=r"every one returned None for sample 1"):
        roll_out(make_trainer(gpt2_path, tmp_path, even))


def test_the_logged_mean_of_a_reward_is_over_the_samples_that_it_scored(gpt2_path, tmp_path):
    def seldom(completions, **columns):
        return [4.0 if i == 0 else None for i in range(len(completions))]

    def always(completions, **columns):
        return [1.0] * len(completions)

    trainer = make_trainer(gpt2_path, tmp_path, [seldom, always], total_episodes=8, num_iterations=1)
    trainer.train()
    assert history(trainer, "rewards/seldom") == [4.0]
    assert history(trainer, "rewards/always") == [1.0]
    assert history(trainer, "objective/scores") == [pytest.approx((5.0 + 7 * 1.0) / 8)]


def test_a_model_as_reward_is_refused_with_what_to_do(gpt2_path, tmp_path):
    with pytest.raises(ValueError, match=r"'runs/reward' is not a function; wrap .* in RewardModel"):
        make_trainer(gpt2_path, tmp_path, "runs/reward")


def test_row_36_prompts_may_be_conversations(llama_path, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(llama_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts[0], completions[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS + PROMPTS[:1]]})
    make_trainer(str(folder), tmp_path, reward, data, total_episodes=8).train()
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"


@pytest.mark.parametrize("given", [{"tools": [len]}, {"environment_factory": dict}])
def test_what_the_parent_takes_and_ppo_cannot_honour_is_refused_before_a_model_loads(tmp_path, given):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=rf"^{next(iter(given))}: not supported by PPOTrainer"):
        PPOTrainer(str(tmp_path / "no-such-model"), letter_share, args, prompts(8), **given)


def test_tokens_of_an_environment_are_refused_not_trained_on(gpt2_path, tmp_path):
    def rollout(prompts, trainer, mask):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        result = {"prompt_ids": ids, "completion_ids": [[5, 6, 7]] * len(ids), "logprobs": None}
        return result | ({"env_mask": [[1, 0, 1]] * len(ids)} if mask else {})

    plain = make_trainer(gpt2_path, tmp_path, rollout_func=lambda prompts, trainer: rollout(prompts, trainer, False))
    assert roll_out(plain)["completion_mask"].tolist() == [[1, 1, 1]] * 4
    masked = make_trainer(gpt2_path, tmp_path, rollout_func=lambda prompts, trainer: rollout(prompts, trainer, True))
    with pytest.raises(ValueError, match="rollout_func: returned env_mask"):
        roll_out(masked)


# -- Settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("beta", 0.1, "use kl_coef"),
        ("num_generations", 8, "one completion for each prompt"),
        ("loss_type", "grpo", "the loss is PPO's"),
        ("scale_rewards", "batch", "score_norm"),
        ("steps_per_generation", 4, "num_mini_batches"),
        ("kl_estimator", "k2", "must be 'k1' or 'k3'"),
        ("gamma", 1.5, r"must lie in \[0, 1\]"),
        ("num_mini_batches", 0, "must be positive"),
        ("kl_target", -1.0, "must be positive"),
        ("per_device_train_batch_size", 1, "no variance to whiten"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(tmp_path, setting, value, said):
    with pytest.raises(ValueError, match=rf"^{setting}: .*{said}"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{setting: value})


def test_every_refused_setting_is_one_of_the_parents(tmp_path):
    assert set(PPOConfig.REFUSED) <= set(PPOConfig.__dataclass_fields__)


def test_total_episodes_sets_max_steps_in_whole_rollouts_and_says_so_when_rounded(tmp_path, capsys):
    config = PPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=3,
        num_iterations=5,
        total_episodes=25,
    )
    assert config.max_steps == 2 * 5 * 3  # two rollouts of 24
    assert config.total_episodes == 48
    said = "total_episodes: 25 is rounded up to 48, whole rollouts of 24 completions\n"
    assert said in capsys.readouterr().out
    PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, total_episodes=8)
    assert "total_episodes" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^total_episodes: "):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, total_episodes=8, max_steps=8)


# -- Does it learn? ------------------------------------------------------------------------------------------------


def test_the_score_rises_and_reference_weights_stay(gpt2_path, tmp_path):
    def token_share(completion_ids, **columns):
        return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]

    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        token_share,
        train_dataset=prompts(64),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        num_iterations=4,
        total_episodes=64 * 15,
    )
    reference = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    trainer.train()
    scores = history(trainer, "objective/scores")
    assert scores[0] < 0.45
    assert scores[-1] > 0.8
    assert all(torch.equal(tensor, reference[name]) for name, tensor in trainer.ref_model.state_dict().items())


def test_the_same_seed_gives_the_same_weights_bit_for_bit(gpt2_path, tmp_path):
    weights = []
    for _ in range(2):
        trainer = make_trainer(gpt2_path, tmp_path, total_episodes=16, num_mini_batches=2)
        trainer.train()
        weights.append(trainer.policy.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert Path(tmp_path).exists()


def test_splitting_a_mini_batch_into_micro_batches_changes_the_update_by_rounding_alone(gpt2_path, tmp_path):
    weights = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make_trainer(
            gpt2_path,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            total_episodes=8,
            num_iterations=1,
            optim="sgd",
            learning_rate=0.1,
        )
        give_completions(trainer, [[5], [6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]] * 2)
        trainer.train()
        weights.append(trainer.policy.state_dict())
    start = AutoModelForCausalLM.from_pretrained(gpt2_path).transformer.wte.weight
    assert (weights[0]["transformer.wte.weight"] - start).abs().max() > 1e-4
    for other in weights[1:]:
        for name in other:
            assert torch.allclose(weights[0][name], other[name], atol=1e-5), name
