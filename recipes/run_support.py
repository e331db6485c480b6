"""What a run needs beside its algorithm: progress that can be read, and checkpoints from which it resumes exactly."""

import json
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Sampler
from transformers import ProgressCallback, TrainerCallback


class SeededByPass(Sampler):
    """A sampler whose order depends on the seed and the pass alone, so that a resumed run sees the same prompts."""

    def __init__(self, sampler, current_pass):
        self.sampler, self.current_pass = sampler, current_pass

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.current_pass())
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class LogBeforeSave(TrainerCallback):
    """Empties the running means at each checkpoint, so that a resumed run logs what an uninterrupted one does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save


class RolloutProgress(ProgressCallback):
    """Trainer's progress bar, with a short line a log in place of the forty metrics that the loggers get."""

    SHOWN: ClassVar[dict[str, str]] = {
        "objective/scores": "score {:.3f}",
        "objective/kl": "kl {:.2f}",
        "completions/mean_length": "length {:.1f}",
        "objective/kl_coef": "β {:.3f}",
        "policy/entropy_avg": "entropy {:.2f}",
        "val/explained_variance": "explained variance {:.2f}",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            for prefix, title in (("", "step"), ("eval_", "held-out, step")):
                shown = [text.format(logs[prefix + name]) for name, text in self.SHOWN.items() if prefix + name in logs]
                if shown:
                    self.training_bar.write("  ".join([f"{title} {state.global_step}", *shown]))


def is_whole(checkpoint):
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        return "global_step" in json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder):
    """The whole checkpoint of the most steps in `folder`, or None; half-written ones are passed over."""
    whole = [path for path in Path(folder).glob("checkpoint-*") if is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
