"""The checkpoint that a run resumes from: whole, the same one on every rank, made with settings that fit."""

import json
import math
import time
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from accelerate.utils import gather_object, is_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .critic import CRITIC, load_critic, save_critic
from .inputs import UserError

STATE, TRAINER_STATE, BELOW_KL = "ppo_state.json", "trainer_state.json", "below_kl.safetensors"
REFERENCE = "reference.safetensors"  # where sync_ref_model moves it
PPO_FILES = (CRITIC, STATE)  # what a checkpoint of PPO holds besides Trainer's files

# Settings that a resumed run cannot change; whose values are the checkpoint's, whatever is given; that do not matter.
FIXED = ("policy", "adapter", "critic", "optim", "generation_batch_size", "num_mini_batches", "num_iterations")
FIXED += ("sync_ref_model",)
THEIRS = ("kl_coef", "learning_rate", "value_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
UNRELATED = ("output_dir", "resume_", "log", "save_", "eval_", "report_to", "run_name", "disable_tqdm", "hub_", "push_")


def files_beside_the_policy(args):
    """The names of those that a run of PPO with these settings cannot resume without."""
    return PPO_FILES + (REFERENCE,) * args.sync_ref_model


def damage(checkpoint, rank=0, also=()):
    """The first file of a checkpoint that is missing or cut off, or None; Trainer writes `trainer_state.json` last."""
    folder = Path(checkpoint)
    needed = [TRAINER_STATE, f"rng_state_{rank}.pth" if rank else "rng_state*.pth", *also]
    if not (folder / "latest").is_file():  # DeepSpeed's, which keeps weights and optimiser in a folder of its own
        needed += ["*model*", "optimizer*", "scheduler.pt"]
    faults = [name for name in needed if not any(folder.glob(name))]
    return next(iter(faults + [path.name for path in sorted(folder.glob("*.*")) if not _is_whole(path)]), None)


def _is_whole(path):
    """Whether a file opens and ends where it should; no tensor is read."""
    try:
        if path.suffix == ".safetensors":
            safe_open(path, "pt").__enter__()
        elif path.suffix in (".pt", ".pth", ".bin"):
            ZipFile(path).close()
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            if path.name == STATE:
                return math.isfinite(sum([content["kl_coef"], *content["score_sums"]])) and "settings" in content
            return path.name != TRAINER_STATE or content["global_step"] > 0
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, BadZipFile):
        return False
    return True


def _step(checkpoint):
    return int(checkpoint.name.partition("-")[2])


def numbered(folder):
    """The folders `checkpoint-<step>` in `folder`, most steps first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def checkpoint_to_resume(given, args, also=()):
    """The folder that every rank resumes from, None for a new run; `True` (or "true") means the newest whole one.

    Rank 0 chooses, and says what; it moves newer checkpoints, damaged or of another attempt, to `old_checkpoints`, so
    that no later resume takes them. `also` names files that must be there besides Trainer's. Raises `UserError` where
    the checkpoint that was named is damaged, or where a rank does not see it.
    """
    if not given or str(given).lower() == "false":
        return None
    newest, say = str(given).lower() == "true", print if args.process_index == 0 else lambda *_: None
    candidates = numbered(args.output_dir) if newest else [Path(given)]
    of_ranks = gather_object([{str(path): damage(path, args.process_index, also) for path in candidates}])
    chosen = None
    if not newest and args.process_index == 0 and not Path(given).is_dir():
        raise UserError(f"resume_from_checkpoint: {given!r} is no folder; give true, false or a checkpoint's folder")
    for name in of_ranks[0]:
        faults = [theirs.get(name, TRAINER_STATE) for theirs in of_ranks]
        fault = next(filter(None, faults), None)
        if fault is None:
            chosen = name
            break
        if faults[0] is None and fault == TRAINER_STATE:
            rank = faults.index(fault)
            raise UserError(f"resume_from_checkpoint: rank {rank} has no {name!r}; all machines must share output_dir")
        if not newest:
            raise UserError(f"resume_from_checkpoint: {name!r} is not whole: {fault} is missing or cut off")
        say(f"resume_from_checkpoint: {name} is passed over: {fault} is missing or cut off")
    if newest:
        say(f"resume_from_checkpoint: {f'goes on from {chosen}' if chosen else 'nothing to resume from, a new run'}")
    step = json.loads((Path(chosen) / TRAINER_STATE).read_text())["global_step"] if chosen else 0
    if 0 < args.max_steps < step:
        asked = f"the {args.max_steps} steps that total_episodes or max_steps asks for"
        say(f"resume_from_checkpoint: '{chosen}' is past {asked}: no training, its model is the result")
    if args.process_index == 0:
        set_aside([path for path in numbered(args.output_dir) if _step(path) > step])
    return chosen


def set_aside(checkpoints):
    """Move checkpoints that a run does not go on from to `old_checkpoints/<time>` beside them; says so."""
    for path in checkpoints:
        target = path.parent / "old_checkpoints" / time.strftime("%Y%m%d-%H%M%S") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{path} is moved to {path.rename(target)}", flush=True)


def _settings(trainer):
    """What a checkpoint notes of how it was made."""
    model, critic, args = trainer.accelerator.unwrap_model(trainer.model), trainer.policy.critic, trainer.args
    lora = model.peft_config["default"] if is_peft_model(model) else None
    own = "" if args.value_learning_rate is None else ", with a learning rate of its own"
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(UNRELATED)} | {
        "policy": _size(trainer.policy.config),
        "adapter": lora and f"rank {getattr(lora, 'r', None)} on {', '.join(sorted(lora.target_modules or ()))}",
        "critic": (_size(critic.trunk.config) if hasattr(critic, "trunk") else "value head") + own,
        "rewards": dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)),
        "ranks": args.world_size,
    }
    return json.loads(json.dumps(settings, default=str))


def _size(config):
    text = config.get_text_config()
    return f"{text.model_type} of {text.num_hidden_layers} × {text.hidden_size}, vocabulary of {text.vocab_size}"


def save_state(trainer, folder, critic):
    """Write the critic's weights, and what else a rollout depends on besides the policy's."""
    save_critic(critic, folder)
    state = {"kl_coef": trainer.kl_coef, "score_sums": trainer.score_sums, "settings": _settings(trainer)}
    (Path(folder) / STATE).write_text(json.dumps(state))
    if Path(folder).name.startswith("checkpoint-"):  # a run's end needs neither
        if trainer.ceiling is not None:
            save_file(trainer.ceiling.kept, Path(folder) / BELOW_KL)
        if trainer.args.sync_ref_model:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters()
            save_file({name: weight.detach().contiguous() for name, weight in reference}, Path(folder) / REFERENCE)


def load_state(trainer, folder):
    """Read it back; says which settings are not the checkpoint's. `UserError` for one that a run cannot change."""
    state = json.loads((Path(folder) / STATE).read_text())
    then, now = state["settings"], _settings(trainer)
    other = [name for name in now if now[name] != then.get(name)]
    for name in set(FIXED) & set(other):
        raise UserError(
            f"resume_from_checkpoint: '{folder}' was made with {name}: {then.get(name)}, not {now[name]}; give that, "
            "or start a new run in another output_dir"
        )
    kept = [f"{name} {then.get(name)} (you gave {now[name]})" for name in other if name in THEIRS]
    changed = [f"{name} {now[name]} (was {then.get(name)})" for name in other if name not in THEIRS]
    for what, settings in (("kept from the checkpoint", kept), ("changed", changed)):
        if settings and trainer.args.process_index == 0:
            print(f"resume_from_checkpoint: {what}: {'; '.join(settings)}", flush=True)
    trainer.kl_coef, trainer.score_sums = state["kl_coef"], state["score_sums"]
    if not trainer.is_deepspeed_enabled:  # whose engine loads the critic with the policy
        load_critic(trainer.policy.critic, folder)
    if trainer.ceiling is not None and (Path(folder) / BELOW_KL).exists():
        trainer.ceiling.kept = load_file(Path(folder) / BELOW_KL)
    if trainer.args.sync_ref_model and (Path(folder) / REFERENCE).exists():
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        reference.load_state_dict(load_file(Path(folder) / REFERENCE), strict=False)  # tied weights are there once
