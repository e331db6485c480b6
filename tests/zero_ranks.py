"""Run by test_ppo_deepspeed.py under torchrun: the jobs of two_ranks.py with DeepSpeed's ZeRO in place of DDP."""

import json
import sys
from pathlib import Path

import deepspeed

from trl_ppo import PPOConfig, RewardModel
from two_ranks import job


def zero(stage):
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,  # SGD, so that rounding stays rounding
        "gradient_clipping": "auto",
        **dict.fromkeys(automatic, "auto"),
    }


def run(path, folder, stage, lora):
    whole = job(path, folder / "whole", lora, deepspeed=zero(stage))
    whole.train()
    whole.save_model(str(folder / "final"))
    resumed = job(path, folder / "resumed", lora, deepspeed=zero(stage))
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    resumed.save_model(str(folder / "resumed" / "final"))
    if whole.accelerator.is_main_process:
        logged = [
            [entry for entry in t.state.log_history if "objective/kl" in entry or "val/ratio" in entry]
            for t in (whole, resumed)
        ]
        report = {
            "ranks": whole.accelerator.num_processes,
            "logged": logged,
            "kl_coef": [whole.kl_coef, resumed.kl_coef],
        }
        (folder / "report.json").write_text(json.dumps(report))
    whole.accelerator.wait_for_everyone()


def scores(path):
    return RewardModel(path, device="cpu")(["the movie", "a"], [" was good and i loved it", " film"])


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    model_path, adapter_path, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    alone = scores(adapter_path)
    settings = PPOConfig(  # from here on from_pretrained partitions what it loads
        str(output), deepspeed=zero(3), use_cpu=True, bf16=False, per_device_train_batch_size=2, report_to="none"
    )
    same = scores(adapter_path) == alone
    del settings
    for stage in (2, 3):
        for name in ("full", "lora"):
            run(model_path, output / f"{stage}-{name}", stage, name == "lora")
    (output / "rewards.json").write_text(json.dumps(same))
