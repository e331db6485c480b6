"""The paths of a GPU, without one: what runs where a model does not lie on a CPU, and in fewer bits."""

import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from pretend_device import DEVICE, pretend_device
from test_ppo_trainer import history, make_trainer, prompts, roll_out
from trl_ppo import PPOConfig, RewardModel
from trl_ppo.logprobs import pad_batch

LORA = {
    "gpt2_path": LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    "qwen2_path": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "llama_path": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


COMPLETIONS = [[5], [6, 7, 8, 1], [10, 11], [12, 13, 14, 15, 16, 1], [17, 18], [19, 1], [20, 21, 22], [23, 24, 25]]


def train(path, folder, **set):
    """One rollout, its updates, an evaluation, everything optional switched on; `(trainer, samples, saved weights)`."""
    trainer = make_trainer(
        path,
        folder,
        per_device_train_batch_size=2,
        num_mini_batches=2,
        num_iterations=1,
        total_episodes=8,
        eval_dataset=prompts(2),
        temperature=0.7,
        whiten_rewards=True,
        score_norm=True,
        score_clip=1.0,
        missing_eos_penalty=1.0,
        kl_target=1.0,
        stop_epochs_at_kl=10.0,
        log_completions=True,
        optim="sgd",
        learning_rate=1e-2,
        **set,
    )
    sample, sampled = trainer._generate_single_turn, []

    def sample_and_replace(prompt_ids, *args, **kwargs):  # by completions of many lengths
        completion_ids, logprobs = sample(prompt_ids, *args, **kwargs)
        sampled.append(completion_ids)
        return COMPLETIONS[: len(prompt_ids)], logprobs

    trainer._generate_single_turn = sample_and_replace
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer, sampled, {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("model", "kind"),
    [*((model, kind) for model in LORA for kind in ("full", "lora")), ("gpt2_path", "separate critic")],
)
def test_a_run_on_the_device_mixes_no_devices_and_ends_as_one_on_the_cpu(
    model, kind, classifier_path, tmp_path, request, monkeypatch
):
    """Sampling, log-probs, reward model, loss, backward, optimiser, evaluation and saving."""
    path = request.getfixturevalue(model)
    options = {
        "full": {},
        "lora": {"peft_config": LORA[model], "gradient_checkpointing": True},
        "separate critic": {"value_model_path": classifier_path, "gradient_checkpointing": True},
    }[kind]
    monkeypatch.setattr("trl_ppo.trainer.cpu_folder", lambda device: None)
    _, samples, expected = train(path, tmp_path / "cpu", reward_funcs=RewardModel(classifier_path), **options)
    with pretend_device():
        reward = RewardModel(classifier_path)
        trainer, sampled, weights = train(path, tmp_path / "device", use_cpu=False, reward_funcs=reward, **options)
    assert {reward.device, trainer.accelerator.device} == {DEVICE}
    assert {parameter.device for parameter in trainer.model.parameters()} == {DEVICE}
    assert sampled == samples
    assert weights.keys() == expected.keys()
    for file, tensors in expected.items():
        assert weights[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (weights[file][name] - tensor).abs().max() < 5e-5, name  # SGD moves the most by 0.001 and more


# -- What a GPU refuses, or does later ---------------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_refuses():
    with pretend_device():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        for mixed in (lambda: there + here, lambda: torch.where(there > 0, there, here), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="tensors on pretend:0 and on the CPU"):
                mixed()
        with pytest.raises(RuntimeError, match="no float64"):
            there.double()
        assert (there * 2 + torch.tensor(1.0)).tolist() == [3.0, 3.0]  # a scalar may lie anywhere
        assert there[torch.tensor([0])].device == DEVICE  # and so may an index
        assert torch.equal(there.cpu(), here)


def test_attention_with_padding_is_the_same_on_the_device():
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 5, 5).tril().bool()
    mask[1, :, :, :2] = False  # padding on the left; its own rows see nothing
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with pretend_device():
        there = [tensor.to(DEVICE) for tensor in (query, key, value, mask)]
        result = torch.nn.functional.scaled_dot_product_attention(*there[:3], attn_mask=there[3])
        assert torch.allclose(result.cpu()[0], expected[0], atol=1e-6)
        assert torch.allclose(result.cpu()[1, :, 2:], expected[1, :, 2:], atol=1e-6)


def test_every_time_that_is_logged_is_read_once_the_device_is_idle(gpt2_path, tmp_path, monkeypatch):
    clock, readings = time.perf_counter, []
    with pretend_device() as backend:
        trainer = make_trainer(gpt2_path, tmp_path, use_cpu=False, total_episodes=16)
        read = SimpleNamespace(perf_counter=lambda: readings.append(backend.busy) or clock())
        monkeypatch.setattr("trl_ppo.callbacks.time", read)
        trainer.train()
    assert len(history(trainer, "time/update")) == 2
    assert len(readings) >= 8  # start, sampled, scored and updated
    assert not any(readings)


def test_a_single_process_does_not_split_its_models_over_the_gpus_that_it_sees(gpt2_path, tmp_path, monkeypatch):
    """TRL loads with device_map="auto" where the device is no CPU."""
    asked = []
    load = GPT2LMHeadModel.from_pretrained.__func__

    def from_pretrained(cls, *args, device_map="not given", **kwargs):
        if device_map == "meta":  # a look at the files
            return load(cls, *args, device_map=device_map, **kwargs)
        asked.append(device_map)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", classmethod(from_pretrained))
    with pretend_device():
        make_trainer(gpt2_path, tmp_path, use_cpu=False)
        make_trainer(gpt2_path, tmp_path, use_cpu=False, model_init_kwargs={"device_map": {"": 1}})
    assert asked == [None, None, {"": 1}, {"": 1}]  # policy and reference; who asks for a map gets it


# -- Fewer bits --------------------------------------------------------------------------------------------------------


def is_rounded(tensor):
    """Whether every number of a tensor fits into bfloat16."""
    return torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("separate", [False, True])
def test_under_autocast_values_are_not_rounded(gpt2_path, classifier_path, tmp_path, separate):
    critic = {"value_model_path": classifier_path} if separate else {}
    assert not is_rounded(roll_out(make_trainer(gpt2_path, tmp_path, bf16=True, **critic))["old_values"])


@pytest.mark.parametrize("on_cpu", [False, True])
def test_cast_lm_head_to_fp32_is_honoured_in_log_probs(llama_path, tmp_path, monkeypatch, on_cpu):
    """The head's product in float32, on states of bfloat16; for policy and reference."""
    if not on_cpu:
        monkeypatch.setattr("trl_ppo.trainer.cpu_folder", lambda device: None)
    prompt, completion = [5, 6, 7], [8, 9, 10, 11, 12, 13]
    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        states = model.model(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 : -1]
        logits = states.float() @ model.lm_head.weight.float().T
    expected = logits.log_softmax(-1)[torch.arange(6), torch.tensor(completion)]
    batch = pad_batch([prompt], [completion], pad_token_id=0)
    far = {}
    for cast in (False, True):
        trainer = make_trainer(llama_path, tmp_path, model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=cast)
        with torch.no_grad():
            both = trainer.logprobs(trainer.model, batch).logprobs, trainer._ref_logprobs(batch).logprobs
        far[cast] = [(logprobs[0] - expected).abs().max().item() for logprobs in both]
    assert max(far[True]) < 1e-6 < 1e-5 < min(far[False])


def in_fp16(trainer, **scaler):
    """What accelerate sets up on a GPU when its config says fp16; it refuses a CPU, torch does not."""
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)


def test_a_step_that_the_loss_scaler_leaves_out_does_not_end_the_run(gpt2_path, tmp_path):
    """Its gradients are not finite and no fault; fp16 of the accelerate config alone."""
    trainer = make_trainer(gpt2_path, tmp_path, total_episodes=16)
    in_fp16(trainer, init_scale=2.0**40)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert not trainer.args.fp16
    assert trainer.accelerator.scaler.get_scale() == 2.0**36  # halved at each of the four steps
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("by_launcher", [False, True])
def test_stop_epochs_at_kl_is_refused_with_fp16_whose_scaler_cannot_leave_a_step_out(monkeypatch, by_launcher):
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr(PPOConfig, "_validate_args", lambda self: None)  # refuses fp16 on a CPU
    with pytest.raises(
        ValueError, match="stop_epochs_at_kl: the loss scaler of fp16 cannot leave out a step; use bf16"
    ):
        PPOConfig("none", use_cpu=True, bf16=False, fp16=not by_launcher, stop_epochs_at_kl=0.1)


def test_continuous_batching_is_refused_where_trl_would_cast_the_trained_weights():
    options = {"use_cpu": True, "use_transformers_continuous_batching": True}
    with pytest.raises(ValueError, match=r"bf16: true with use_transformers_continuous_batching: .* set bf16: false"):
        PPOConfig("none", **options)  # bf16 is TRL's default
    PPOConfig("none", bf16=False, **options)
