"""Callbacks of a PPO run, the running means that it logs, and its clock."""

import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from transformers import ProgressCallback, TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from .doctor import Doctor
from .inputs import UserError

RESUME = " --resume_from_checkpoint true"


def now(device):
    """Seconds, once the device has done what it was given."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


class RunningMean:
    """A metric's mean over what was added on every rank; TRL's `log` iterates over it, once, on each of them.

    `reduce` sums a tensor over ranks.
    """

    def __init__(self, reduce):
        self.reduce, self.sums = reduce, 0.0

    def add(self, values, mask):
        """`values` where `mask` is 1, but for those that are NaN; both of the same shape."""
        mask = mask * ~values.isnan()
        self.sums = self.sums + torch.stack([values.where(mask > 0, 0).sum(), mask.sum()])

    def __iter__(self):
        total, count = self.reduce(self.sums).tolist()
        yield total / count if count else math.nan  # which TRL's `log` leaves out


class OrderByPass(TrainerCallback):
    """Draws the order of each pass over the prompts from the seed and the pass alone.

    TRL's sampler runs one generator through all passes: a run resumed in a later one would see another order.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Called before the pass's iterator is made."""
        batches = train_dataloader.batch_sampler
        batches = getattr(batches, "batch_sampler", batches)  # out of accelerate's share of a rank
        sampler = getattr(batches, "sampler", None)  # a streamed dataset has none
        if getattr(sampler, "shuffle", False):
            sampler.generator.manual_seed(sampler.seed + int(state.epoch or 0))


class LogBeforeSave(TrainerCallback):
    """Empties the running means at each checkpoint, so that a resumed run logs what an uninterrupted one does."""

    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimiser step."""
        control.should_log |= control.should_save


class StopOnSignal(TrainerCallback):
    """Around a trainer's `train`: SIGTERM or Ctrl-C saves and stops at the rollout's end, a second one ends it at once.

    Every rank stops at the same rollout, whichever got the signal. `train` then ends as `SystemExit` of status 128 +
    the signal's number. (Trainer's `enable_jit_checkpoint` saves within a rollout, and each rank when it hears of it.)
    """

    def __init__(self, trainer):
        self.trainer, self.received, self.stopped, self.before = trainer, 0, 0, {}

    def __enter__(self):
        self.trainer.add_callback(self)
        if threading.current_thread() is threading.main_thread():  # no other one gets signals
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        """Called at the first signal, in the middle of whatever runs."""
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if self.trainer.is_world_process_zero():
            os.write(2, b"\nstopping: saves at the end of this rollout; a second signal (Ctrl-C) leaves at once\n")

    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimiser step; a run resumes exactly from the end of a rollout only."""
        if state.global_step % args.steps_per_rollout == 0:
            received = torch.tensor([self.received], device=args.device)
            self.stopped = int(self.trainer.accelerator.gather(received).max())
            for what in ("log", "save", "training_stop") if self.stopped else ():
                setattr(control, f"should_{what}", True)

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.trainer.remove_callback(self)
        if self.stopped and error is None:
            launcher = "accelerate launch …" if "ACCELERATE_DYNAMO_BACKEND" in os.environ else "python"  # it sets that
            command = f"{launcher} {shlex.join(sys.argv).removesuffix(RESUME)}{RESUME}"
            if not Path(sys.argv[0]).with_name("recipe_args.py").exists():  # a script of the user's has its own options
                command = "trainer.train(resume_from_checkpoint=True)"
            said = f"stopped after step {self.trainer.state.global_step}, saved; to go on: {command}"
            self.trainer.accelerator.print(said, flush=True)
            raise SystemExit(128 + self.stopped)


class SyncReference(SyncRefModelCallback):
    """TRL's callback, which pairs weights by their order: the policy's own, without its critic's."""

    def __init__(self, trainer):
        super().__init__(trainer.ref_model, accelerator=None)
        self.policy = trainer.policy

    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimiser step."""
        own = [weight for name, weight in self.policy.named_parameters() if not name.startswith("critic.")]
        super().on_step_end(args, state, control, model=SimpleNamespace(parameters=lambda: own))


class StopAtKL(TrainerCallback):
    """Ends training at the first rollout whose KL passes `stop_at_kl`, with the weights of the rollout before it.

    KL is that of the policy that sampled a rollout, before its updates: `kept` is a copy on the CPU of all trained
    weights, the critic's too, as they were before the updates of the last rollout below the ceiling. With
    `load_best_model_at_end` it only ends training, and keeps checkpoints past it from being the best.
    """

    def __init__(self, trainer):
        self.trainer, self.limit, self.kept, self.passed = trainer, trainer.args.stop_at_kl, {}, None

    def trained(self):
        """The weights that training moves, by name."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def measured(self, kl):
        """Called in each rollout with its KL, nats per completion over all ranks. `UserError` if none was below."""
        if kl <= self.limit:
            self.kept = {name: weight.detach().to("cpu", copy=True) for name, weight in self.trained().items()}
        elif not self.kept:
            raise UserError(f"stop_at_kl: {self.limit:g} is below {kl:.3g}, the KL that this run starts with")
        else:
            self.passed = kl

    def allows(self, metrics):
        """Whether a checkpoint with these held-out metrics is below the ceiling."""
        return metrics["eval_objective/kl"] <= self.limit

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimiser step; that first one past the ceiling is undone with those before it."""
        if self.passed is not None:
            for name, weight in self.trained().items():
                weight.copy_(self.kept[name])
            control.should_log = control.should_training_stop = True
            control.should_save = False  # a run that resumes from its last checkpoint stops at the same rollout
            rollout = (state.global_step - 1) // args.steps_per_rollout  # counted from 0
            kept = f"the policy of rollout {rollout}, after step {(rollout - 1) * args.steps_per_rollout}"
            if state.best_model_checkpoint:  # which Trainer then loads
                kept = f"the best checkpoint, {Path(state.best_model_checkpoint).name}"
            self.trainer.accelerator.print(
                f"stop_at_kl: training ends: rollout {rollout + 1} has a KL of {self.passed:.3g} nats, above "
                f"{self.limit:g}; {kept}, is kept",
                flush=True,
            )


class RolloutProgress(ProgressCallback):
    """Trainer's progress bar, with a short line a log in place of the forty metrics that the loggers get.

    Behind the bar stand the curves of those in `DRAWN`.
    """

    DRAWN = ("objective/scores", "objective/kl")
    SHOWN: ClassVar[dict[str, str]] = {
        "objective/scores": "score {:.3f}",
        "objective/kl": "kl {:z.2f}",  # z: 0.00, never -0.00
        "completions/mean_length": "length {:.1f}",
        "objective/kl_coef": "β {:.3f}",
        "policy/entropy_avg": "entropy {:.2f}",
        "val/explained_variance": "explained variance {:.2f}",
    }

    parts: tuple = ()  # names of rewards that are shown beside their sum

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called with each row of the log."""
        texts = self.SHOWN | {f"rewards/{name}": f"{name} {{:.3f}}" for name in self.parts}
        if state.is_world_process_zero and self.training_bar is not None:
            for prefix, title in (("", "step"), ("eval_", "held-out, step")):
                shown = [text.format(logs[prefix + name]) for name, text in texts.items() if prefix + name in logs]
                if shown:
                    self.training_bar.write("  ".join([f"{title} {state.global_step}", *shown]))
            curves = {name: [row[name] for row in state.log_history if name in row] for name in self.DRAWN}
            drawn = [f"{self.SHOWN[name].split()[0]} {curve(values)}" for name, values in curves.items() if values]
            self.training_bar.set_postfix_str(" ".join(drawn))


def curve(values, width=12):
    """At most `width` blocks, ▁ for the least of `values` and █ for the most; each the mean of a stretch of them."""
    stretches = [stretch.mean() for stretch in np.array_split(values, min(width, len(values)))]
    least, most = min(stretches), max(stretches)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - least) / ((most - least) or 1))] for mean in stretches)


class StageProgress(RolloutProgress):
    """The same for trainers of TRL's and transformers'."""

    DRAWN = ("loss", "reward")
    SHOWN: ClassVar[dict[str, str]] = {
        "loss": "loss {:.3f}",
        "mean_token_accuracy": "token accuracy {:.3f}",
        "accuracy": "accuracy {:.3f}",
        "margin": "margin {:.2f}",
        "reward": "score {:.3f}",
        "kl": "kl {:z.3f}",
        "completions/mean_length": "length {:.1f}",
        "entropy": "entropy {:.2f}",
    }


def show_lines(trainer, progress=RolloutProgress):
    """Put `progress` in the place of Trainer's own bar, if it has one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        callback = progress()
        callback.parts = _parts_of_the_score(trainer)
        trainer.add_callback(callback)


def _parts_of_the_score(trainer):
    """The names of a trainer's rewards that have a weight, if they are several, and a recipe's judge."""
    names = getattr(trainer, "reward_func_names", ())
    weights = getattr(trainer, "reward_weights", ())
    weighted = tuple(name for name, weight in zip(names, weights, strict=True) if weight)
    return (weighted if len(weighted) > 1 else ()) + tuple(name for name in names if name == "judge")


CRITIC = """
## The critic

`critic.safetensors` holds the critic, which the model does not need to write. A further PPO run starts from it with
`critic_path` in `trl_ppo.PPOConfig`, the folder or a copy of this repository; `ppo_state.json` has β and what else a
resumed run needs.
"""


def complete_card(trainer):
    """Has TRL's model cards name a base that is no model of the Hub ("None"), start from a plain text where there is no
    chat template, and say what the critic's file is for."""
    create = trainer.create_model_card

    def create_and_complete(*args, **kwargs):
        create(*args, **kwargs)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            base = trainer.accelerator.unwrap_model(trainer.model).config._name_or_path
            said = f"is a fine-tuned version of `{base}`" if base else "was trained from scratch"
            text = card.read_text().replace("is a fine-tuned version of [None](https://huggingface.co/None)", said)
            text = text.replace('model="None"', f'model="{trainer.args.output_dir}"')
            if getattr(trainer.processing_class, "chat_template", None) is None:  # a plain text is all that it reads
                text = re.sub('question = ".*"', 'question = "The"', text)
                text = text.replace('[{"role": "user", "content": question}]', "question").replace("=128", "=24")
            critic = CRITIC if hasattr(getattr(trainer, "policy", None), "critic") else ""
            card.write_text(text.rstrip() + "\n" + critic)

    trainer.create_model_card = create_and_complete


def add_callbacks(trainer):
    """PPO's callbacks, and those that settings ask for."""
    for callback in (OrderByPass, LogBeforeSave):
        trainer.add_callback(callback)
    complete_card(trainer)
    show_lines(trainer)
    if trainer.args.doctor:
        trainer.add_callback(Doctor(trainer))
    if trainer.args.sync_ref_model:
        trainer.pop_callback(SyncRefModelCallback)
        trainer.add_callback(SyncReference(trainer))
    trainer.ceiling = None if trainer.args.stop_at_kl is None else StopAtKL(trainer)
    if trainer.ceiling is not None:
        trainer.add_callback(trainer.ceiling)
