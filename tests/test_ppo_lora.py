"""LoRA and quantised bases: policy, reference and critic share one frozen trunk."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from test_ppo_trainer import give_completions, history, make_trainer, prompts, roll_out


def lora(**set):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | set))


def test_row_31_with_lora_only_the_adapter_and_the_value_head_train(llama_path, tmp_path):
    trainer = make_trainer(llama_path, tmp_path, peft_config=lora(), total_episodes=16, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name or "critic." in name for name in moved)
    assert any("critic." in name for name in moved)
    assert any("lora_B" in name for name in moved)


def test_with_lora_the_reference_is_the_base_with_the_adapter_off(llama_path, tmp_path):
    trainer = make_trainer(llama_path, tmp_path, peft_config=lora(), total_episodes=16, learning_rate=1e-2)
    assert trainer.ref_model is None
    trainer.train()
    kl = history(trainer, "objective/kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[-1]) > 1e-4
    give_completions(trainer, [[5, 6, 7], [8, 9], [10], [11, 12, 13]])
    trainer.kl_coef = 1.0
    rollout = roll_out(trainer)
    base = AutoModelForCausalLM.from_pretrained(llama_path).eval()
    from test_ppo_trainer import PROMPTS, _plain_logprobs

    with torch.no_grad():
        reference = trainer._ref_logprobs(
            {key: rollout[key] for key in ("input_ids", "attention_mask", "completion_mask")}
        ).logprobs
    prompt = trainer.processing_class(PROMPTS[0])["input_ids"]
    assert torch.allclose(reference[0], _plain_logprobs(base, prompt, [5, 6, 7], 1.0), atol=1e-5)


def test_a_policy_that_comes_with_an_adapter_is_its_own_reference(llama_path, tmp_path):
    """TRL keeps the adapter as it was loaded under the name ref; the base without it is another model."""
    torch.manual_seed(0)
    config = lora(init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama_path), config).save_pretrained(tmp_path / "adapter")
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(llama_path, tmp_path / "run", policy=policy, learning_rate=1e-2, total_episodes=16)
    assert "ref" in trainer.model.peft_config
    trainer.train()
    kl = history(trainer, "objective/kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[-1]) > 1e-4
    assert all("lora_" in name or "critic." in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_the_saved_adapter_loads_without_a_warning_and_gives_the_policy(llama_path, tmp_path):
    trainer = make_trainer(llama_path, tmp_path, peft_config=lora(), total_episodes=16, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # not the libraries' FutureWarnings to each other
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-5)
    assert (tmp_path / "final" / "critic.safetensors").exists()


def test_lora_and_gradient_checkpointing_train_together(llama_path, tmp_path):
    trainer = make_trainer(llama_path, tmp_path, peft_config=lora(), gradient_checkpointing=True, total_episodes=8)
    trainer.train()
    assert min(history(trainer, "grad_norm")) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_trains_its_adapter_and_value_head(llama_path, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    trainer = make_trainer(
        llama_path,
        tmp_path,
        peft_config=lora(),
        quantization_config=config,
        total_episodes=16,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        eval_dataset=prompts(4),
    )
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert f"Linear{'4bit' if bits == 4 else '8bitLt'}" in kinds
    trainer.evaluate()  # repacks 4-bit weights on some CPUs, if it is let
    trainer.train()
    kl = history(trainer, "objective/kl")
    assert kl[0] == pytest.approx(0, abs=1e-3)
    assert all(value == value for value in history(trainer, "grad_norm"))
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert (tmp_path / "checkpoint-4" / "critic.safetensors").exists()
