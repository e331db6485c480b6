"""Run by test_ppo_ranks.py under torchrun, or in one process: the same jobs whatever the number of ranks.

Completions are a function of the prompt alone, so the ranks together see what a single process sees.
"""

import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from peft import LoraConfig

import fake_vllm
from test_ppo_trainer import letter_share, make_trainer, prompts
from test_vllm import watch_sampler


def fixed_completion(prompt_ids):
    generator = torch.Generator().manual_seed(sum(prompt_ids))
    length = int(torch.randint(1, 7, (1,), generator=generator))
    return torch.randint(2, 290, (length,), generator=generator).tolist()


def logged_share(prompts, completions, log_metric, **columns):
    shares = letter_share(prompts, completions)
    log_metric("logged/share", sum(shares) / len(shares))
    if os.environ.get("RANK", "0") == "0":
        log_metric("logged/by_rank_0_alone", 7.0)
    return shares


logged_share.__name__ = "letter_share"


def job(path, folder, lora=False, **set):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "per_device_train_batch_size": 8 // ranks,
        "gradient_accumulation_steps": 1,
        "train_dataset": prompts(16),
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "whiten_rewards": True,
        "kl_target": 1.0,
        "kl_horizon": 100,
        "score_norm": True,
    }
    if lora:
        settings["peft_config"] = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make_trainer(path, folder, **({"reward_funcs": logged_share} | settings | set))
    trainer._generate_single_turn = lambda prompt_ids, *_: ([fixed_completion(ids) for ids in prompt_ids], None)
    return trainer


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def run(path, folder, lora):
    trainer = job(path, folder / "whole", lora)
    trainer.train()
    whole = trained(trainer)
    trainer.save_model(str(folder / "final"))

    # As if it had been broken off after its second rollout: only the checkpoint is there.
    resumed = job(path, folder / "resumed", lora)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    same = all(torch.equal(tensor, whole[name]) for name, tensor in trained(resumed).items())

    drift = 0.0
    for tensor in whole.values():
        on_every_rank = trainer.accelerator.gather(tensor.flatten()[None])
        drift = max(drift, (on_every_rank - on_every_rank[0]).abs().max().item())
    if trainer.accelerator.is_main_process:
        torch.save(whole, folder / "trained.pt")
        logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
        report = {"ranks": trainer.accelerator.num_processes, "resumed_equals_whole": same, "drift": drift}
        (folder / "report.json").write_text(json.dumps(report | {"logged": logged, "kl_coef": trainer.kl_coef}))
    trainer.accelerator.wait_for_everyone()


def stop_epochs(path, folder):
    """A rollout that stops after its second step, at three quarters of that step's KL: no rank alone has so much."""
    free = job(path, folder / "free", num_train_epochs=1, num_iterations=4, stop_epochs_at_kl=1e9)
    free.train()
    kl = [entry["policy/approxkl_avg"] for entry in free.state.log_history if "policy/approxkl_avg" in entry]
    trainer = job(path, folder / "stopped", num_train_epochs=1, num_iterations=4, stop_epochs_at_kl=0.75 * kl[1])
    steps = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda *args: steps.append(trainer._step) or compute_loss(*args)
    trainer.train()
    used = gather_object([steps])
    if trainer.accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps({"used": used, "kl": kl}))
    trainer.accelerator.wait_for_everyone()


def stability(path, folder):
    """A warm-up of the critic, and a ceiling right below the last rollout's KL: one rank alone is below it."""
    settings = {"value_warmup_rollouts": 1, "kl_estimator": "k3"}
    free, starts = job(path, folder / "free", stop_at_kl=1e9, **settings), []
    react = free._react_to_kl
    free._react_to_kl = lambda kl: starts.append(trained(free)) or react(kl)
    free.train()
    kl = [entry["objective/kl"] for entry in free.state.log_history if "objective/kl" in entry]
    stopped = job(path, folder / "stopped", stop_at_kl=0.999 * kl[3], **settings)
    stopped.train()
    end, moved = trained(stopped), [name for name in starts[0] if not torch.equal(starts[0][name], starts[1][name])]
    same = [[torch.equal(end[name], start[name]) for name in end] for start in starts]
    mine = {"step": stopped.state.global_step, "same": [all(each) for each in same], "moved": moved}
    of_ranks = gather_object([mine])
    if stopped.accelerator.is_main_process:
        torch.save(end, folder / "trained.pt")
        (folder / "report.json").write_text(json.dumps({"kl": kl, "of_ranks": of_ranks}))
    stopped.accelerator.wait_for_everyone()


def evaluate(path, folder):
    """Five held-out prompts, which two ranks in batches of two cannot share out evenly."""
    trainer = job(path, folder, eval_dataset=prompts(5), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()


def diagnose(path, folder):
    """Two rollouts without a score: what the doctor says on each rank."""
    trainer = job(path, folder, num_train_epochs=1, reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts))
    with redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    said = gather_object([re.findall(r"^doctor \((\w+)\)", printed.getvalue(), re.MULTILINE)])
    if trainer.accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(said))
    trainer.accelerator.wait_for_everyone()


def sample_with_vllm(path, folder, mode):
    """Three rollouts with LoRA: the sampler's weights, and which prompts a rank's completions belong to."""
    engines = fake_vllm.install(pytest.MonkeyPatch())
    settings = {"use_vllm": True, "vllm_mode": mode, "vllm_group_port": fake_vllm.free_port()}
    if mode == "server" and os.environ.get("RANK", "0") == "0":  # the other rank calls no server
        server = fake_vllm.Server(path)
        engines, settings["vllm_server_base_url"] = [server.engine], server.url
    batch = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(
        path,
        folder,
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        total_episodes=24,
        learning_rate=0.01,
        **settings,
    )
    generate, completions = trainer.vllm_generation.generate, []

    def kept(prompts, **arguments):
        outputs = generate(prompts=prompts, **arguments)
        completions.extend(zip(prompts, outputs[1], strict=True))
        return outputs

    trainer.vllm_generation.generate = kept
    same = [watch_sampler(trainer, engine) for engine in engines]
    trainer.train()
    same, sampled, completions = (gather_object(rows) for rows in (same, [e.sampled for e in engines], completions))
    if trainer.accelerator.is_main_process:
        sampled = [list(pair) for of_engine in sampled for pair in of_engine]
        own = [list(pair) for pair in completions]
        report = {"same": same, "completions": len(own), "own": sorted(own) == sorted(sampled)}
        (folder / "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2])
    for name, with_lora in (("full", False), ("lora", True)):
        run(model_path, output / name, with_lora)
    stop_epochs(model_path, output / "stop_epochs")
    stability(model_path, output / "stability")
    evaluate(model_path, output / "evaluate")
    diagnose(model_path, output / "doctor")
    for mode in ("colocate", "server"):
        sample_with_vllm(model_path, output / f"vllm_{mode}", mode)
