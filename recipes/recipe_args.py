"""What recipes take besides TRL's settings: dataclasses that `command_line.parse` fills, and checks of their values.

They load no weights before every value is checked, and write to `output_dir` only what no other run writes to.
"""

import dataclasses
import fcntl
import os
import re
import tempfile
from pathlib import Path
from typing import ClassVar

from trl import ScriptArguments

from models_and_data import check_model, check_path
from trl_ppo.inputs import UserError
from trl_ppo.settings import PPOSettings


def _option(help, default=None):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True)
class OutputArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and what every recipe takes that writes to `output_dir`."""

    overwrite_output_dir: bool = _option("Train into a folder that holds a run; its checkpoints are set aside.", False)

    CHECKPOINT_FILES: ClassVar[tuple] = ()  # what a checkpoint must hold besides Trainer's files
    dry_run: ClassVar[bool] = False  # what has it claims no folder

    def claim_output_dir(self, training_args, model_args) -> None:
        """Take `output_dir` for this run alone, and put the checkpoint to resume from, or None, into `training_args`.

        UserError for a folder that cannot be written to, that another run is writing to, that a model is read from, or
        that holds a run already.
        """
        from trl_ppo.checkpoints import checkpoint_to_resume, numbered, set_aside  # torch waits until here

        folder, main = Path(training_args.output_dir), training_args.process_index == 0
        for key in ("model_name_or_path", "reward_model", "value_model_path"):
            given = [getattr(args, key, None) for args in (self, training_args, model_args)]
            paths = [path for value in given for path in (value if isinstance(value, list) else [value])]
            if any(path and folder.resolve() == Path(path).resolve() for path in paths):
                raise UserError(f"output_dir: '{folder}' is where {key} is read from; give another folder")
        if self.dry_run:
            return
        if main:
            lock_folder(folder)
        given = training_args.resume_from_checkpoint
        if main and str(given).lower() == "true" and not numbered(folder):
            self._refuse_a_run(folder, [])  # before it says that there is nothing to resume from
        training_args.resume_from_checkpoint = checkpoint_to_resume(given, training_args, self.CHECKPOINT_FILES)
        if not main or training_args.resume_from_checkpoint is not None:
            return
        self._refuse_a_run(folder, numbered(folder))
        set_aside(numbered(folder))

    def _refuse_a_run(self, folder, checkpoints) -> None:
        there = [name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
        there += [path.name for path in checkpoints]
        if there and not self.overwrite_output_dir:
            goes_on = "--resume_from_checkpoint true to go on with it, " if checkpoints else ""
            raise UserError(
                f"output_dir: '{folder}' holds a run already ({there[-1]}); give {goes_on}another output_dir, or "
                "--overwrite_output_dir true"
            )


_LOCKS: dict[Path, int] = {}  # folder → its descriptor; the lock on it ends with this process, however that ends


def lock_folder(folder: Path) -> None:
    """Make `folder` and lock it; UserError if it cannot be written to, or another run has locked it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: '{folder}' cannot be made: {error.strerror}; give another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir: '{folder}' cannot be written to; give another folder, or the right to write")
    if folder not in _LOCKS:
        _LOCKS[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(_LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output_dir: another run is writing to '{folder}' (after Ctrl-C until its rollout ends); wait, or give "
            "another folder"
        ) from error
    except OSError:  # a file system without locks
        pass


@dataclasses.dataclass(kw_only=True)
class RecipeArguments(OutputArguments):
    """What every recipe that can train an adapter takes."""

    merge_adapter: bool = _option("With use_peft: write adapter and base as one model to output_dir/merged.", False)

    def check(self, model_args) -> None:
        """UserError for what does not go together, and for folders that do not exist."""
        if self.merge_adapter and not model_args.use_peft:
            raise UserError("merge_adapter: true, but use_peft is false, so there is no adapter; set use_peft: true")
        if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
            raise UserError("load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft: true")
        if re.fullmatch(r"[\w.]+", modules := str(model_args.lora_target_modules)):
            model_args.lora_target_modules = None if modules == "None" else [modules]  # TRL would make it a regex
        check_path("dataset_name", self.dataset_name)
        if model_args.model_name_or_path is not None:  # none where a model is made from scratch
            check_path("model_name_or_path", model_args.model_name_or_path)


@dataclasses.dataclass(kw_only=True)
class PPOArguments(RecipeArguments):
    """What the PPO recipes take: the rewards with their weights, and which prompts."""

    rewards: dict[str, float] = dataclasses.field(
        metadata={
            "help": "Each reward and its weight, which may be negative; 0 logs it only. A reward is reward_model, a "
            "function of recipes/rewards.py, or one of your own as file.py:function."
        }
    )
    algorithm: str = dataclasses.field(
        default="ppo",
        metadata={
            "help": "ppo, or TRL's own grpo or rloo on the same prompts and rewards, with kl_coef as their β and the "
            "settings that they share.",
            "choices": ["ppo", "grpo", "rloo"],
        },
    )
    group_size: int = _option("Completions of each prompt under grpo and rloo.", 8)
    reward_model: list[str] | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The sequence classifier that rewards call reward_model: Hub id or folder; or a list of them, of "
            "which the lowest score counts."
        },
    )
    reward_variance_coef: float | None = _option("With several: the mean score minus this × their variance counts.")
    preference_as_reward: bool = _option("Its score becomes the chance to beat a completion of the reference.", False)
    judge: str | None = _option(
        "A classifier that training never optimises, logged as rewards/judge; load_best_model_at_end goes by it."
    )
    early_stopping_patience: int | None = _option(
        "Evaluations in a row that find nothing better after which training ends; needs load_best_model_at_end."
    )
    reward_label: str | None = _option("Which of its labels counts, if it has several.")
    reward_max_length: int = _option("Tokens that it reads; longer texts lose their beginning.", 512)
    reward_dtype: str = _option("Of its weights.", "float32")
    reward_batch_size: int = _option("Texts that it scores at a time.", 64)
    dry_run: bool = _option("Check all, train one step and print some of its completions; save nothing.", False)
    prompt_column: str = _option("Column to take prompts from.", "prompt")
    prompt_tokens: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Cut each prompt to a random number of tokens: least and most."}
    )
    min_prompt_characters: int = _option("Leave out shorter texts.", 1)
    min_prompt_tokens: int = _option("The same in tokens, before they are cut.", 1)
    max_prompt_tokens: int | None = _option("Leave out longer ones.")
    test_prompts: int = _option("Held-out prompts to evaluate on, from the first on.", 512)

    SETTINGS: ClassVar[type] = PPOSettings
    CHECKPOINT_FILES: ClassVar[tuple] = ("critic.safetensors", "ppo_state.json")

    def check(self, training_args, model_args) -> None:
        """UserError for rewards that cannot be had, and for what does not go together; loads no model."""
        from rewards import check_signature, find_function  # light, but it may import a file of the user's

        super().check(model_args)
        if self.algorithm != "ppo":
            self.CHECKPOINT_FILES = ()
        if training_args.reward_weights is not None:
            raise UserError("reward_weights: give each reward its weight in rewards: {name: weight}")
        if (cut := self.prompt_tokens) and not (len(cut) == 2 and 0 < cut[0] <= cut[1]):
            raise UserError(f"prompt_tokens: {cut} must be two numbers, the least and the most, as in [2, 8]")
        if not self.rewards:
            raise UserError("rewards: is empty; name at least one, as in rewards: {reward_model: 1.0}")
        if self.preference_as_reward and "reward_model" not in self.rewards:
            raise UserError("preference_as_reward: true, but rewards: does not name reward_model; add it, or set false")
        if self.reward_variance_coef is not None and len(self.reward_models) < 2:
            raise UserError("reward_variance_coef: is for several classifiers; list them in reward_model")
        for name in self.rewards:
            if name != "reward_model":
                check_signature("rewards", name, find_function("rewards", name))
            elif not self.reward_models:
                raise UserError("rewards: reward_model has a weight, but reward_model: names no classifier")
        for path in self.reward_models if "reward_model" in self.rewards else ():
            self._check_classifier("reward_model", path)
        if self.judge is not None:
            self._check_judge(training_args)
        if self.early_stopping_patience is not None and not training_args.load_best_model_at_end:
            raise UserError("early_stopping_patience: goes by the best checkpoint; set load_best_model_at_end: true")

    def claim_output_dir(self, training_args, model_args) -> None:
        """As that of every recipe; a dry run leaves the folder alone, and takes one step with one that goes again."""
        super().claim_output_dir(training_args, model_args)
        if self.dry_run:
            self._folder = tempfile.TemporaryDirectory(prefix="dry_run_")
            short = {"output_dir": self._folder.name, "max_steps": 1, "logging_strategy": "no"}
            silent = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": [], "eval_on_start": False}
            silent |= {"eval_delay": 2, "resume_from_checkpoint": None}  # held-out prompts are loaded, that is all
            shown = {"log_completions": True, "num_completions_to_print": 4}
            for name, value in (short | silent | shown).items():
                setattr(training_args, name, value)

    def _check_judge(self, training_args) -> None:
        """The judge is another model than the one that is optimised; the best checkpoint is then the one it prefers."""
        if self.judge in self.reward_models:
            raise UserError(f"judge: {self.judge!r} is the reward model, which is optimised; give another classifier")
        self._check_classifier("judge", self.judge)
        if training_args.metric_for_best_model == "objective/scores":
            training_args.metric_for_best_model = "rewards/judge"

    def _check_classifier(self, key: str, path: str) -> None:
        from transformers.utils import find_adapter_config_file

        from trl_ppo.reward_model import label_index

        config = check_model(key, path, "SequenceClassification")
        is_classifier = "Classification" in str(config.architectures)  # and no adapter, whose labels are its own
        if is_classifier and find_adapter_config_file(path) is None:
            label_index(path, config.id2label, self.reward_label)

    @property
    def reward_models(self) -> list[str]:
        """Those of `reward_model`: none, one, or an ensemble."""
        given = self.reward_model or []
        return given if isinstance(given, list) else [given]

    def load_rewards(self, training_args, model_args) -> list:
        """The reward functions, in the order of `rewards`, and the judge, whose weights go into `training_args`."""
        from rewards import find_function

        training_args.reward_weights = list(self.rewards.values())
        functions = [
            find_function("rewards", name)
            if name != "reward_model"
            else self._load_reward_model(training_args, model_args)
            for name in self.rewards
        ]
        if self.judge is not None:
            functions.append(self._load_classifier(self.judge))
            functions[-1].__name__ = "judge"  # by which its scores are logged
            training_args.reward_weights.append(0.0)
        return functions

    def callbacks(self) -> list:
        """What the trainer calls besides its own: transformers' early stopping, where it is asked for."""
        from transformers import EarlyStoppingCallback

        patience = None if self.dry_run else self.early_stopping_patience
        return [] if patience is None else [EarlyStoppingCallback(patience)]

    def _load_classifier(self, path: str):
        from trl_ppo import RewardModel

        settings = {"label": self.reward_label, "max_length": self.reward_max_length, "dtype": self.reward_dtype}
        return RewardModel(path, batch_size=self.reward_batch_size, **settings)

    def _load_reward_model(self, training_args, model_args):
        from trl import get_quantization_config

        from rewards import ensemble, preference, reference_sampler

        models = [self._load_classifier(path) for path in self.reward_models]
        if len(models) > 1:
            reward = ensemble(models, self.reward_variance_coef)
        else:
            reward = models[0]
            reward.__name__ = "reward_model"  # as the YAML has it, whatever its folder is called
        if not self.preference_as_reward:
            return reward
        path, quantization = model_args.model_name_or_path, get_quantization_config(model_args)
        return preference(reward, reference_sampler(path, training_args, quantization))
