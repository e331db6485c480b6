"""`--algorithm grpo` and `rloo`: TRL's own trainers in the place of PPO's, on the same prompts, rewards and settings.

Neither has a critic: a completion's advantage comes from the other completions of its prompt, its group.
"""

import functools
from dataclasses import fields

import trl

import trl_ppo
from trl_ppo.inputs import UserError


def make_trainer(algorithm, group_size, args, **kwargs):
    """The trainer of `algorithm`: PPOTrainer, or TRL's with `group_size` completions for each prompt."""
    if algorithm == "ppo":
        return trl_ppo.PPOTrainer(args=args, **kwargs)
    from trl_ppo.callbacks import StageProgress, show_lines  # here, since it takes seconds, and --help need not wait

    trainer_class, config_class = (getattr(trl, algorithm.upper() + name) for name in ("Trainer", "Config"))
    trainer = trainer_class(args=group_config(config_class, args, group_size), **kwargs)
    show_lines(trainer, StageProgress)
    models = [trainer.accelerator.unwrap_model(model) for model in (trainer.model, trainer.ref_model) if model]
    for model in models:
        count_positions(model)
    if (cpu := trl_ppo.cpu_folder(trainer.accelerator.device)) is not None:
        cpu.keep_freed_memory()
        models[0].generate = functools.partial(models[0].generate, custom_generate=cpu.sample)
    return trainer


def group_config(config_class, args, group_size):
    """TRL's config with those of a `PPOConfig`'s settings that it has too, and β for `kl_coef`.

    UserError for a rollout that is not whole groups.
    """
    if group_size < 2 or args.generation_batch_size % group_size:
        raise UserError(
            f"group_size: a rollout of {args.generation_batch_size} completions is not whole groups of {group_size}; "
            "change group_size (2 or more) or per_device_train_batch_size"
        )
    theirs = {each.name for each in fields(config_class) if each.init} - trl_ppo.PPOConfig.REFUSED.keys()
    shared = {name: getattr(args, name) for name in theirs if name in trl_ppo.PPOConfig.__dataclass_fields__}
    used = {"kl_coef", "total_episodes", "num_mini_batches"}
    own = [each for each in fields(trl_ppo.PPOConfig) if each.name not in trl.GRPOConfig.__dataclass_fields__]
    without_effect = [each.name for each in own if each.name not in used and getattr(args, each.name) != each.default]
    if without_effect:
        print(f"algorithm: settings of PPO alone, without effect: {', '.join(without_effect)}")
    names = {"objective/scores": "reward", "rewards/judge": "rewards/judge/mean"}  # TRL's
    metric = shared["metric_for_best_model"]
    shared["metric_for_best_model"] = names.get(metric, metric)
    return config_class(
        **shared | {"adam_epsilon": 1e-8},  # AdamW's own, not PPO's
        beta=args.kl_coef,
        num_generations=group_size,
        num_generations_eval=1,
        steps_per_generation=args.steps_per_generation,
        disable_dropout=True,
    )


def count_positions(model):
    """Give `model(input_ids, attention_mask)` each row's own position ids, from 0 at its first token.

    TRL passes batches padded on the left without them, so a model with absolute positions, like GPT-2, would take the
    padding for text.
    """
    forward = model.forward

    @functools.wraps(forward)  # `generate` reads the signature
    def counted(*args, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if position_ids is None and past_key_values is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return forward(*args, **given, **kwargs)

    model.forward = counted
