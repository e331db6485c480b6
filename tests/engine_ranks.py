"""Run by test_engines.py under `accelerate launch` with the project's configs: does an engine train, save and resume?

The jobs are those of two_ranks.py. accelerate does not shard on a CPU; here it is made to, so that FSDP2 runs on gloo.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from test_ppo_trainer import prompts
from trl_ppo import PPOConfig, RewardModel
from two_ranks import job

BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_objective/scores",
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def shard_on_cpu():
    """Have accelerate take ranks on a CPU for FSDP's, and have FSDP2 ask gloo for sums: it knows no means."""
    original, factors = AcceleratorState.__init__, _fsdp_collectives._get_gradient_divide_factors

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    _fsdp_collectives._get_gradient_divide_factors = lambda *args, **kwargs: factors(
        *args[:5], **(kwargs | {"force_sum_reduction_for_comms": True})
    )


def make(path, critic_path, folder, case, **set):
    """The trainer of a case such as "bf16-lora"; Adam with so large an ε is nearly SGD: rounding stays rounding."""
    options = case.split("-")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if "bf16" in options else "no"
    AcceleratorState._reset_state()
    set |= {"lora": "lora" in options, "bf16": "bf16" in options}
    set |= {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.5}
    if "critic" in options:
        set["value_model_path"] = critic_path
    trainer = job(path, folder, **set)
    if "sampled" in options:
        del trainer._generate_single_turn  # so that the policy samples, instead of two_ranks.py
    return trainer


def run(paths, folder, case):
    whole = make(*paths, folder / "whole", case)
    whole.train()
    whole.save_model(str(folder / "final"))
    resumed = make(*paths, folder / "resumed", case)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    resumed.save_model(str(folder / "resumed" / "final"))
    # Four evaluations, of which the second is said to be the best.
    best = make(*paths, folder / "best", case, eval_dataset=prompts(4), **BEST)
    said, evaluate = iter([1.0, 2.0, 0.5, 0.0]), best.evaluate
    best.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_objective/scores": next(said)}
    best.train()
    best.save_model(str(folder / "best" / "final"))
    if whole.accelerator.is_main_process:
        report = {
            "engine": whole.accelerator.distributed_type.value,
            "ranks": whole.accelerator.num_processes,
            "kinds": sorted({type(parameter).__name__ for parameter in whole.policy.critic.parameters()}),
            "logged": [entry for entry in whole.state.log_history if "val/ratio" in entry],
            "kl_coef": [whole.kl_coef, resumed.kl_coef],
        }
        (folder / "report.json").write_text(json.dumps(report))
    whole.accelerator.wait_for_everyone()


def scores(path):
    return RewardModel(path, device="cpu")(["the movie", "a"], [" was good and i loved it", " film"])


if __name__ == "__main__":
    *model_paths, adapter_path, output = sys.argv[1:5]
    alone = scores(adapter_path)
    shard_on_cpu()
    settings = PPOConfig(output, use_cpu=True, bf16=False, per_device_train_batch_size=2, report_to="none")
    # Under ZeRO-3, from here on from_pretrained partitions what it loads.
    Path(output, "scores.json").write_text(json.dumps([alone, scores(adapter_path)]))
    for case in sys.argv[5:]:
        run(model_paths, Path(output) / case, case)
