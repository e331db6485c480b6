"""TRL 1.12's `PPOConfig` and `PPOTrainer`, removed in 1.13, on this package's: a script of theirs changes its import.

>>> from trl_ppo.compat import PPOConfig, PPOTrainer

Their arguments, settings, names and defaults; not their faults. The guide is recipes/guides/from_trl.md.
"""

import copy
import math
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_rich_available
from trl.trainer import grpo_trainer
from trl.trainer.utils import print_prompt_completions_sample

from . import config, trainer
from .config import setting
from .critic import attach_critic
from .inputs import UserError
from .reward_model import RewardModel, label_index
from .settings import RENAMED_IN_PYTHON as NOW

FOLLOWS = "it follows from per_device_train_batch_size, gradient_accumulation_steps and total_episodes; set those"
ADAPTER = "leave it out: the reference is the policy as it starts"


@dataclass
class PPOConfig(config.PPOConfig):
    """TRL 1.12's settings by their old names, with their defaults; and all of ours. Steps count rollouts, as they did:
    `logging_steps`, `eval_steps`, `save_steps`, `warmup_steps`, `max_steps`.

    Raises `ValueError`, in one line, for an old name that cannot be kept, and where old and new name disagree.
    """

    adam_epsilon: float = setting(1e-8, "Epsilon of AdamW.")
    temperature: float = setting(0.7, "Sampling temperature.")
    max_completion_length: int | None = setting(53, "Tokens of a completion, at most.")
    logging_steps: float = setting(1, "Rollouts between two logs.")
    dataset_num_proc: int | None = setting(None, "Processes for the script's own dataset.map.")
    # Old names, each with what it is now.
    num_ppo_epochs: int = setting(4, "num_iterations")
    response_length: int = setting(53, "max_completion_length")
    cliprange: float = setting(0.2, "epsilon")
    exp_name: str | None = setting(None, "run_name")
    stop_token: Literal["eos"] | None = setting(None, NOW["stop_token"])
    stop_token_id: int | None = setting(None, NOW["stop_token_id"])
    sft_model_path: str = setting("EleutherAI/pythia-160m", NOW["sft_model_path"])
    reward_model_path: str = setting("EleutherAI/pythia-160m", NOW["reward_model_path"])
    local_rollout_forward_batch_size: int = setting(64, NOW["local_rollout_forward_batch_size"])
    num_sample_generations: int = setting(10, NOW["num_sample_generations"])
    batch_size: int | None = setting(None, FOLLOWS)
    local_batch_size: int | None = setting(None, FOLLOWS)
    micro_batch_size: int | None = setting(None, FOLLOWS)
    mini_batch_size: int | None = setting(None, FOLLOWS)
    local_mini_batch_size: int | None = setting(None, FOLLOWS)
    num_total_batches: int | None = setting(None, FOLLOWS)
    model_adapter_name: str | None = setting(None, ADAPTER)
    ref_adapter_name: str | None = setting(None, ADAPTER)

    def __post_init__(self):
        known = self.__dataclass_fields__
        own = [name for name in PPOConfig.__annotations__ if name not in config.PPOConfig.__dataclass_fields__]
        for name in own:
            now, value = known[name].metadata["help"], getattr(self, name)
            given = value != known[name].default
            if given and now in (FOLLOWS, ADAPTER):
                raise ValueError(f"{name}: {value!r}: {now}")
            if given and name != "dataset_num_proc":
                warnings.warn(f"{name}: in trl_ppo.PPOConfig and PPOTrainer it is {now}", FutureWarning, stacklevel=3)
            if now in known:  # two names of one setting
                if given and getattr(self, now) not in (known[now].default, value):
                    raise ValueError(f"{name}: {value!r}, but {now}: {getattr(self, now)!r}; give one of the two")
                setattr(self, now, value if given else getattr(self, now))
                setattr(self, name, getattr(self, now))
        if self.stop_token not in (None, "eos"):
            raise ValueError(f"stop_token: {self.stop_token!r} is not 'eos'; name another token by stop_token_id")
        if self.stop_token_id is not None:
            if self.stop_token or self.generation_kwargs:
                raise ValueError("stop_token_id: not beside stop_token or generation_kwargs; give one of them")
            self.generation_kwargs = {"eos_token_id": self.stop_token_id}
        self.remove_unused_columns = False  # nor did TRL 1.12, whatever it said
        # There a rollout did not grow with num_mini_batches: its share of a rollout is what ours accumulates.
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.num_mini_batches < 1 or batch % self.num_mini_batches:
            raise ValueError(f"num_mini_batches: {self.num_mini_batches} do not divide a rollout of {batch} a rank")
        share = batch // self.num_mini_batches
        self.per_device_train_batch_size = math.gcd(self.per_device_train_batch_size, share)
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps", "max_steps"):
            if (getattr(self, name) or 0) >= 1:  # below, it is a share of all steps
                setattr(self, name, int(getattr(self, name)) * self.steps_per_rollout)
        super().__post_init__()
        if self.model_init_kwargs.keys() == {"device_map"}:  # ours, not the user's
            self.model_init_kwargs = None  # the models are loaded already: the parent would warn of it
        ranks = self.generation_batch_size // batch
        self.local_batch_size, self.batch_size = batch, batch * ranks
        self.local_mini_batch_size, self.mini_batch_size = share, share * ranks
        self.micro_batch_size = self.per_device_train_batch_size * ranks
        self.num_total_batches = self.total_episodes and self.total_episodes // self.batch_size


class PPOTrainer(trainer.PPOTrainer):
    """TRL 1.12's `PPOTrainer`: models that are loaded already, and datasets of `input_ids`.

    `reward_model` may also be a reward function, as `trl_ppo.PPOTrainer` takes them; without a `value_model` the
    critic is a head on the policy. The reference is `ref_model`, or a copy of the policy; with PEFT, the adapter off.

    Raises `UserError`, in one line, for what cannot be kept.
    """

    def __init__(
        self,
        args,
        processing_class,
        model,
        ref_model,
        reward_model,
        train_dataset,
        value_model=None,
        data_collator=None,
        eval_dataset=None,
        optimizers=(None, None),
        callbacks=None,
        peft_config=None,
    ):
        if not isinstance(args, PPOConfig):
            raise UserError(f"args: {type(args).__name__} is not trl_ppo.compat.PPOConfig; import both from there")
        if not isinstance(data_collator, DataCollatorWithPadding | None):
            raise UserError("data_collator: rows are not padded here; leave it out, and change the dataset instead")
        is_function = callable(reward_model) and not isinstance(reward_model, nn.Module)
        optional = {"ref_model": ref_model, "value_model": value_model}
        models = {"model": model} | {name: each for name, each in optional.items() if each is not None}
        check_models(models if is_function else {**models, "reward_model": reward_model}, processing_class)
        if any(getattr(value_model, name, None) is not None for name in ("peft_config", "hf_quantizer")):
            raise UserError("value_model: it trains in full; load it without adapter and quantization_config")
        with reference_for(model, ref_model, peft_config):
            super().__init__(
                model,
                reward_model if is_function else TokenReward(reward_model, processing_class, args),
                args,
                with_prompts("train_dataset", train_dataset, processing_class),
                eval_dataset=with_prompts("eval_dataset", eval_dataset, processing_class),
                processing_class=processing_class,
                optimizers=optimizers,
                callbacks=callbacks,
                peft_config=peft_config,
            )
        self._given_value_model = value_model
        if value_model is not None:
            attach_critic(self.policy, args, self.accelerator.device, value_model)
        elif not args.value_model_path:
            warnings.warn("value_model: None, so the critic is a value head on the policy", FutureWarning, stacklevel=2)
        if eval_dataset is not None and args.num_sample_generations > 0:
            self.add_callback(ShowSamples(self))

    @property
    def policy_model(self):
        """TRL 1.12's name of the policy."""
        return self.policy

    @property
    def value_model(self):
        """The critic: the model that was given, which is trained in place, or the value head on the policy."""
        return self.policy.critic if self._given_value_model is None else self._given_value_model

    def _tokenize_prompts(self, prompts):
        """The parent's: token ids, images, other inputs. The ids are the dataset's own, whatever text they make."""
        return [prompt.ids for prompt in prompts], None, {}

    def log(self, logs, start_time=None):
        """The parent's, with TRL 1.12's `episode`, `eps` (episodes per second) and `lr` in the rows of training."""
        if "learning_rate" in logs:
            rollouts = -(-self.state.global_step // self.args.steps_per_rollout)
            self.state.episode = rollouts * self.args.batch_size
            logs |= {"episode": self.state.episode, "lr": logs["learning_rate"]}
            if start_time is not None:
                logs["eps"] = int(self.state.episode / (time.time() - start_time))
        super().log(logs, start_time)

    def generate_completions(self, sampling=False):
        """Print five held-out prompts, answers at a temperature of 0.01, and scores; `sampling` takes one batch alone.

        Without an `eval_dataset` it does nothing.
        """
        if self.eval_dataset is None:
            return
        sampler = self.vllm_generation if self.use_vllm else self.generation_config
        before, sampler.temperature, training = sampler.temperature, 0.01, self.model.training
        self.model.eval()
        texts, scores = [], []
        for rows in self.get_eval_dataloader():
            prompts = [row["prompt"] for row in rows]
            _, completions, completion_ids = self._sample(prompts)
            scores += self._calculate_rewards(rows, prompts, completions, completion_ids)[:, 0].tolist()
            texts += gather_object([*zip(prompts, completions, strict=True)])
            if sampling:
                break
        sampler.temperature = before
        self.model.train(training)
        self._metrics["eval"].clear()  # they are an evaluation's, which this is not
        if self.accelerator.is_main_process and is_rich_available():
            shown = {"score": scores[:5]}
            print_prompt_completions_sample(*zip(*texts[:5], strict=True), shown, None, self.state.global_step)


class ShowSamples(TrainerCallback):
    """Prints samples `num_sample_generations` times in a run."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Called after each optimiser step."""
        rollout, part = divmod(state.global_step, args.steps_per_rollout)
        every = max(1, state.max_steps // args.steps_per_rollout // args.num_sample_generations)
        if part == 0 and (rollout - 1) % every == 0:
            self.trainer.generate_completions(sampling=True)


class TokenReward(RewardModel):
    """A classifier that is loaded already, and reads the tokens of prompt and completion as they were sampled.

    Padding, and the token whose score counts, are `RewardModel`'s: the last one that is no padding, the end included.
    """

    def __init__(self, model, tokenizer, args):
        if any(hasattr(weight, "ds_id") for weight in model.parameters()):
            raise UserError("reward_model: ZeRO-3 has split it between the ranks; give RewardModel(path) in its place")
        self.model, self.tokenizer = model.to(args.device).eval().requires_grad_(False), tokenizer
        self.device, self.batch_size = args.device, getattr(args, "local_rollout_forward_batch_size", 64)
        self.label = label_index("reward_model", model.config.id2label, None)
        self._set_padding("reward_model", model.config)
        self.__name__ = "reward_model"

    def __call__(self, prompts, completions, completion_ids=None, **_):
        """One score for each completion, in their order; the doctor gives texts alone."""
        prompts = [getattr(text, "ids", None) or self.tokenizer(text)["input_ids"] for text in prompts]
        completions = completion_ids or self.tokenizer(completions, add_special_tokens=False)["input_ids"]
        return self.score([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])

    def token_ids(self, texts):
        """They are token ids already."""
        return texts


class Prompt(str):
    """The text of a prompt, which holds the token `ids` that the dataset has."""


def with_prompts(name, dataset, tokenizer):
    """The dataset with `Prompt`s in the place of `input_ids`, made as its rows are read; without what is padding."""
    if dataset is None:
        return None
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        raise UserError(f"{name}: no Dataset with a column input_ids; add it, or take trl_ppo.PPOTrainer, for text")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None  # an end may be content

    def add_prompts(batch):
        masks = batch.pop("attention_mask", None) or [[token != pad for token in ids] for ids in batch["input_ids"]]
        kept = [[t for t, m in zip(*row, strict=True) if m] for row in zip(batch.pop("input_ids"), masks, strict=True)]
        prompts = [Prompt(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]
        for prompt, ids in zip(prompts, kept, strict=True):
            prompt.ids = ids
        return {**batch, "prompt": prompts}

    return dataset.with_transform(add_prompts)


def check_models(models, tokenizer):
    """UserError for what is no loaded model, is given twice, or does not know all tokens of the tokenizer."""
    for name, model in models.items():
        if not hasattr(model, "get_input_embeddings"):
            needed = "load it"
            if name == "reward_model":
                needed = "give a classifier, or a function of yours: def reward(prompts, completions, **columns)"
            raise UserError(f"{name}: {type(model).__name__} is no model of transformers; {needed}")
        same = [other for other in models if models[other] is model]
        if same != [name]:
            raise UserError(f"{' and '.join(same)}: are one and the same object; load it once for each")
        known = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            raise UserError(
                f"{name}: knows {known} tokens, processing_class {len(tokenizer)}; all models must have one tokenizer, "
                "and pad with a token that it has: tokenizer.pad_token = tokenizer.eos_token"
            )


@contextmanager
def reference_for(policy, ref_model, peft_config):
    """Have the parent take this reference, where it would load one from the policy's path."""
    if peft_config is not None or is_peft_model(policy):
        if ref_model is not None:
            raise UserError("ref_model: with PEFT it is the policy as it starts; give None")
    elif ref_model is None and is_deepspeed_zero3_enabled():
        raise UserError("ref_model: None, but ZeRO-3 has split the policy, of which it would be a copy; load it again")
    else:
        ref_model = ref_model or copy.deepcopy(policy)
    saved = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: ref_model
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = saved
