"""PPO with vLLM as the sampler, against stand-ins for vLLM and its server (`fake_vllm.py`)."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration

import fake_vllm
from command_line import one_line_errors
from test_ppo_trainer import history, make_trainer, prompts, roll_out
from trl_ppo import PPOConfig, importance_weights
from trl_ppo.checkpoints import PPO_FILES, damage, numbered
from trl_ppo.formulas import clipped_policy_loss

LORA = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
ROLLOUT = 8  # completions; two optimiser steps each


@pytest.fixture
def engines(monkeypatch):
    """vLLM's stand-in where TRL looks for vLLM; the engines of the `LLM`s that are made."""
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def serve(engines, gpt2_path, monkeypatch):
    """Starts servers that stop with the test. TRL's client asks a dead one again for a minute; here for an instant."""
    servers, retry = [], vllm_client.Retry
    monkeypatch.setattr(vllm_client, "Retry", lambda **settings: retry(**settings | {"backoff_factor": 0}))

    def start(**settings):
        servers.append(fake_vllm.Server(gpt2_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def of_server(server):
    return {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_group_port": fake_vllm.free_port()}


def job(path, folder, rollouts=3, **set):
    return make_trainer(path, folder, use_vllm=True, total_episodes=ROLLOUT * rollouts, learning_rate=1e-2, **set)


def weights_of(trainer):
    """The policy's weights by the names of a plain model: without the critic, an adapter merged into its base."""
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    return {name: weight.detach() for name, weight in model.named_parameters() if not name.startswith("critic.")}


def watch_sampler(trainer, engine):
    """Whether the sampler's weights are the policy's, noted whenever it is asked to sample."""
    generate, same = trainer.vllm_generation.generate, []

    def compared(**arguments):
        expected, own = weights_of(trainer), dict(engine.model.named_parameters())
        same.append(own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own))
        return generate(**arguments)

    trainer.vllm_generation.generate = compared
    return same


# --- Weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "sleep_mode"])
def test_colocate_the_samplers_weights_are_the_policys_at_every_rollout(gpt2_path, tmp_path, engines, lora, sleep):
    set = {"peft_config": LORA} if lora else {}
    trainer = job(gpt2_path, tmp_path, vllm_enable_sleep_mode=sleep, **set)
    same = watch_sampler(trainer, engines[0])
    before = weights_of(trainer)
    trainer.train()
    assert same == [True] * 3
    assert not all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_server_what_it_receives_is_the_policy_name_by_name(gpt2_path, tmp_path, serve, lora):
    server = serve()
    trainer = job(gpt2_path, tmp_path, **of_server(server), **({"peft_config": LORA} if lora else {}))
    sent, generate = [], trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **arguments: sent.append(weights_of(trainer)) or generate(**arguments)
    trainer.train()
    assert len(server.received) == len(sent) == 3
    for received, policy in zip(server.received, sent, strict=True):
        assert received.keys() == policy.keys()
        assert all(torch.equal(received[name], policy[name]) for name in policy)
    assert not torch.equal(*(update["transformer.h.0.attn.c_attn.weight"] for update in server.received[1:]))


def test_with_a_separate_critic_no_weight_of_it_is_sent(gpt2_path, classifier_path, tmp_path, engines):
    trainer = job(gpt2_path, tmp_path, rollouts=1, value_model_path=classifier_path)
    same = watch_sampler(trainer, engines[0])
    trainer.train()
    assert same == [True]


def test_the_reference_under_lora_keeps_its_weights_though_the_adapter_is_merged_for_each_rollout(
    gpt2_path, tmp_path, engines
):
    trainer = job(gpt2_path, tmp_path, peft_config=LORA)
    base = trainer.policy.transformer.h[0].attn.c_attn.base_layer.weight
    before = base.detach().clone()
    trainer.train()
    torch.testing.assert_close(base, before, rtol=0, atol=1e-7)


def test_the_best_checkpoint_is_what_samples_after_it_was_loaded(gpt2_path, tmp_path, engines):
    falling = iter(range(100, 0, -1))
    trainer = job(
        gpt2_path,
        tmp_path,
        reward_funcs=lambda prompts, completions, **columns: [float(next(falling)) for _ in completions],
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    same = watch_sampler(trainer, engines[0])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.evaluate()
    assert len(same) == 3 + 3 + 1
    assert all(same)


# --- Sampling -----------------------------------------------------------------------------------------------------


def test_sampling_settings_are_the_trainers(gpt2_path, tmp_path, engines):
    shape = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    trainer = job(gpt2_path, tmp_path, **shape)
    roll_out(trainer)
    ends = {"stop_token_ids": trainer.eos_token_ids, "ignore_eos": True}
    assert engines[0].params == [shape | ends | {"max_tokens": 6, "logprobs": 0}] * 4


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_completion_ends_at_any_end_token_and_only_there(gpt2_path, tmp_path, engines, serve, mode, tokenizer):
    ends = list(range(2, 80))
    server = of_server(serve()) if mode == "server" else {}
    trainer = job(gpt2_path, tmp_path, generation_kwargs={"eos_token_id": ends}, missing_eos_penalty=3.0, **server)
    generate, completions = trainer.vllm_generation.generate, []

    def kept(**arguments):
        outputs = generate(**arguments)
        completions.extend(outputs[1])
        return outputs

    trainer.vllm_generation.generate = kept
    trainer.train()
    counted = {*ends, tokenizer.eos_token_id}
    assert not any(counted.intersection(ids[:-1]) for ids in completions)
    assert all(ids[-1] in counted or len(ids) == 6 for ids in completions)
    missing = [ids[-1] not in counted for ids in completions]
    assert 0 < sum(missing) < len(missing)
    first = sum(missing[:ROLLOUT]) / ROLLOUT
    assert history(trainer, "objective/missing_eos")[0] == pytest.approx(first)
    score = history(trainer, "objective/scores")[0]
    assert history(trainer, "objective/rlhf_reward")[0] == pytest.approx(score - 3 * first, abs=1e-5)


def test_an_end_token_of_the_files_that_the_trainer_does_not_know_ends_nothing(gpt2_path, tmp_path, engines):
    trainer = job(gpt2_path, tmp_path)
    engines[0].own_ends = set(range(300))
    batch = roll_out(trainer)
    assert batch["completion_mask"].sum(1).max() == 6


def test_a_prompt_and_completion_that_are_longer_than_vllms_limit_are_refused(gpt2_path, tmp_path, engines):
    trainer = job(gpt2_path, tmp_path, vllm_max_model_length=8)
    with pytest.raises(ValueError, match="more than the 8 positions of vllm_max_model_length"):
        roll_out(trainer)


def test_evaluation_samples_with_the_policys_weights(gpt2_path, tmp_path, engines):
    trainer = job(gpt2_path, tmp_path, eval_dataset=prompts(5), eval_strategy="steps", eval_steps=2)
    same = watch_sampler(trainer, engines[0])
    trainer.train()
    assert len(same) > 5
    assert all(same)
    assert len(history(trainer, "eval_objective/scores")) == 3


# --- The sampler's other log-probabilities --------------------------------------------------------------------------


def test_an_importance_weight_is_the_ratio_of_probabilities_within_its_bounds():
    ours, theirs = torch.tensor([[0.5, 0.2, 0.9, 0.1]]).log(), torch.tensor([[0.25, 0.4, 0.1, 0.4]]).log()
    torch.testing.assert_close(importance_weights(ours, theirs, high=3.0), torch.tensor([[2.0, 0.5, 3.0, 0.25]]))
    torch.testing.assert_close(importance_weights(ours, theirs, 0.4, 1.5), torch.tensor([[1.5, 0.5, 1.5, 0.4]]))
    unknown = torch.full_like(ours, float("nan"))
    assert torch.equal(importance_weights(ours, unknown, high=3.0), torch.ones_like(ours))


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_weighting_the_advantage_is_weighting_the_clipped_loss(weight):
    logprobs, advantages = torch.linspace(-1, 1, 9).repeat(2, 1), torch.tensor([[1.5], [-0.5]])
    loss, clipped = clipped_policy_loss(logprobs, torch.zeros(2, 9), advantages)
    weighted, clipped_too = clipped_policy_loss(logprobs, torch.zeros(2, 9), weight * advantages)
    torch.testing.assert_close(weighted, weight * loss)
    assert torch.equal(clipped, clipped_too)


def test_the_policy_loss_is_corrected_by_bounded_weights_and_nothing_else_changes(gpt2_path, tmp_path, engines):
    """The sampler says of each token that its log-probability differs by so much; of one it says nothing."""
    differences = torch.tensor([[-2.0, -0.5, 0.0, 0.3, 2.0, 0.1], [0.2, -0.1, 0.4, -3.0, 0.0, 1.0]])
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    rollouts = []
    for settings in ({"vllm_importance_sampling_correction": False}, {"vllm_importance_sampling_clip_max": 1.2}):
        trainer = job(gpt2_path, tmp_path, **settings)
        trainer._generate_single_turn = lambda *args: (ids, None)
        own = roll_out(trainer, ["the movie", "a great film"])["old_logprobs"]
        said = [(own - differences)[row, : len(ids[row])].tolist() for row in range(2)]
        said[1][2] = None
        trainer._metrics["train"].clear()
        trainer._generate_single_turn = lambda *args, said=said: (ids, said)
        rollouts.append(roll_out(trainer, ["the movie", "a great film"]))
    plain, corrected = rollouts
    weights = differences.exp().clamp(max=1.2)
    weights[1, 2] = 1.0
    torch.testing.assert_close(corrected["advantages"], plain["advantages"] * weights)
    for name in ("old_logprobs", "old_values", "returns", "input_ids"):
        assert torch.equal(corrected[name], plain[name]), name
    real = corrected["completion_mask"].bool()
    logged = {name: next(iter(values)) for name, values in trainer._metrics["train"].items() if "sampling/" in name}
    assert logged["sampling/importance_sampling_ratio/mean"] == pytest.approx(weights[real].mean().item())
    real[1, 2] = False
    difference = differences[real].abs().mean().item()
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(difference, abs=1e-5)


def test_a_sampler_in_bfloat16_is_noticed_and_corrected_while_kl_starts_at_0(gpt2_path, tmp_path, monkeypatch):
    gaps = []
    for dtype in (torch.float32, torch.bfloat16):
        fake_vllm.install(monkeypatch, dtype)
        trainer = job(gpt2_path, tmp_path, rollouts=1)
        trainer.train()
        gaps.append(history(trainer, "sampling/sampling_logp_difference/mean"))
        ratios = history(trainer, "sampling/importance_sampling_ratio/mean")
        assert ratios == pytest.approx([1] * len(ratios), abs=0.05)
        assert history(trainer, "objective/kl")[0] == 0
    assert max(gaps[0]) < 1e-5
    assert min(gaps[1]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "vllm_importance_sampling_mode: not a setting of PPO"),
        ({"vllm_importance_sampling_cap": 2.0}, "use vllm_importance_sampling_clip_max"),
        ({"vllm_importance_sampling_clip_max": None}, "vllm_importance_sampling_clip_min"),
        ({"generation_kwargs": {"stop_token_ids": [5]}}, "use eos_token_id"),
    ],
)
def test_what_ppo_does_not_do_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, **settings)


def test_quantised_weights_are_refused_before_a_model_loads(gpt2_path, tmp_path, engines):
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="use_vllm: not with load_in_4bit"):
        make_trainer(gpt2_path, tmp_path, policy="no/such/model", use_vllm=True, quantization_config=four_bits)


def test_without_vllm_it_is_said_before_a_model_loads(gpt2_path, tmp_path):
    with pytest.raises(ValueError, match="use_vllm: vLLM is not installed"):
        make_trainer(gpt2_path, tmp_path, policy="no/such/model", use_vllm=True)


# --- Servers that are slow, die or come back ------------------------------------------------------------------------


def test_a_slow_server_is_waited_for(gpt2_path, tmp_path, serve):
    server = serve(delay=1.0)
    trainer = job(gpt2_path, tmp_path, rollouts=1, **of_server(server))
    trainer.train()
    assert history(trainer, "time/generate")[0] > 1


def test_a_server_that_is_not_there_is_one_line(gpt2_path, tmp_path, serve, capsys):
    address = f"http://127.0.0.1:{fake_vllm.free_port()}"
    with pytest.raises(SystemExit) as stop, one_line_errors():
        job(gpt2_path, tmp_path, vllm_mode="server", vllm_server_base_url=address, vllm_server_timeout=0)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"vLLM server can't be reached at {address}" in said.splitlines()[-1]


def test_a_server_that_dies_ends_the_run_and_one_that_comes_back_gets_all_weights_again(
    gpt2_path, tmp_path, serve, capsys
):
    set = {"save_strategy": "steps", "save_steps": 2}
    dying = serve(die_at=3)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        job(gpt2_path, tmp_path, rollouts=4, **of_server(dying), **set).train()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"host='127.0.0.1', port={dying.port}" in said.splitlines()[-1]
    assert numbered(tmp_path)[0].name == "checkpoint-4"
    assert damage(tmp_path / "checkpoint-4", also=PPO_FILES) is None

    server = serve(port=dying.port)
    trainer = job(gpt2_path, tmp_path, rollouts=4, **of_server(server), **set)
    same = watch_sampler(trainer, server.engine)
    trainer.train(resume_from_checkpoint=True)
    assert same == [True] * 2
    assert trainer.state.global_step == 8


def test_a_server_that_was_restarted_under_a_run_ends_it_at_the_next_rollout(gpt2_path, tmp_path, serve):
    """It has the first weights again, and no group to get new ones by."""
    first = serve()
    trainer = job(gpt2_path, tmp_path, **of_server(first))

    class Restart(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                first.stop()
                serve(port=first.port)

    trainer.add_callback(Restart())
    with pytest.raises(Exception, match="weight transfer engine has not been initialised"):
        trainer.train()
    assert trainer.state.global_step == 2


# --- What this holds on to in TRL -----------------------------------------------------------------------------------


def test_the_private_names_of_trl_that_are_touched_are_still_there():
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    sync, generate = inspect.getsource(VLLMGeneration.sync_weights), inspect.getsource(VLLMGeneration.generate)
    assert sync.count("self._iter_named_params()") == 4
    assert generate.count("self.generation_kwargs") == 2
