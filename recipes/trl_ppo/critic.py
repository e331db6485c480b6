"""The critic: a value head on the policy's trunk or a model of its own, and the checkpoints that hold it.

Shapes: N completion tokens, H the hidden size.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import disable_dropout_in_model

from .inputs import UserError, first_line
from .loading import load_whole

CRITIC = "critic.safetensors"  # next to the policy, which is written as if it had none


class ValueHead(nn.Linear):
    """V(s_t) from the policy's own last hidden state; weights from N(0, 1/√(d+1)), bias 0 (Huang et al. 2024)."""

    def __init__(self, hidden_size, seed=0):
        super().__init__(hidden_size, 1)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.weight.copy_(torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1))
            self.bias.zero_()

    def forward(self, states, tokens=None):
        """The policy's states (N, H) → values (N,)."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A separate critic, initialised from a causal sequence classifier with one label, usually the reward model.

    Raises `UserError` where the classifier is not causal (it would see the future), has several labels, or reads
    another vocabulary than the policy's.
    """

    def __init__(self, path, vocab_size, classifier=None, **init_kwargs):
        super().__init__()
        what, key = "a trained classifier", "value_model_path: " if classifier is None else "value_model: "
        classifier = classifier or load_whole(AutoModelForSequenceClassification, path, what, key, **init_kwargs)
        head = getattr(classifier, "score", None)
        if head is None or head.out_features != 1:
            raise UserError(f"{key}'{path}' is not a causal sequence classifier with one label")
        if classifier.config.vocab_size != vocab_size:
            raise UserError(
                f"{key}'{path}' has a vocabulary of {classifier.config.vocab_size} tokens, the policy one "
                f"of {vocab_size}; the critic reads the policy's tokens, so train it with the policy's tokenizer"
            )
        self.trunk, self.head = classifier.base_model, head
        disable_dropout_in_model(self.trunk)

    def forward(self, states, tokens):
        """`CompletionTokens` → values (N,), from states of its own."""
        states = tokens.states(self.trunk)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.to(self.head.weight.dtype)).squeeze(-1).float()


def attach_critic(policy, args, device, classifier=None):
    """Put the critic that the settings ask for on the policy, which is saved as if it had none; or a `classifier` that
    is loaded already, whose weights are then the critic's own."""
    config = policy.config.get_text_config()
    if classifier is not None:
        policy.critic = ValueModel(classifier.config._name_or_path, config.vocab_size, classifier).to(
            device, torch.float32
        )
    elif args.value_model_path is None:
        dtype = policy.dtype if is_deepspeed_zero3_enabled() else torch.float32  # ZeRO-3 wants one type of weight
        policy.critic = ValueHead(config.hidden_size, args.seed).to(device, dtype)
    else:
        kernels = {k: v for k, v in (args.model_init_kwargs or {}).items() if k == "activation_function"}
        critic = ValueModel(args.value_model_path, config.vocab_size, dtype=torch.float32, **kernels)
        policy.critic = critic.to(device)
    if args.critic_path is not None:
        start_from(args.critic_path, policy.critic)
    names = {f"critic.{name}" for name in policy.critic.state_dict()}
    policy._keys_to_ignore_on_save |= names | set(policy.all_tied_weights_keys)


def check_critic_file(args):
    """UserError where `critic_path` holds no critic, or one of the other kind; reads names alone."""
    file = Path(args.critic_path) / CRITIC
    try:
        with safe_open(file, "pt") as weights:
            is_head = "trunk" not in {name.partition(".")[0] for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"critic_path: {str(file)!r}: {first_line(error)}; give the folder of a PPO run") from error
    if is_head and args.value_model_path is not None:
        raise UserError(f"critic_path: {args.critic_path!r} holds a value head; leave out value_model_path")
    if not is_head and args.value_model_path is None:
        raise UserError(f"critic_path: {args.critic_path!r} holds a critic of its own; give its value_model_path too")


def start_from(path, critic):
    """Give the critic the weights of an earlier run's; UserError where they do not fit, or are NaN or infinite."""
    theirs, ours = load_file(Path(path) / CRITIC), critic.state_dict()
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [[*weights[name].shape] if name in weights else "missing" for weights in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(f"critic_path: {path!r}: {name} is {shapes[0]} there, {shapes[1]} in the critic asked for")
        if not theirs[name].isfinite().all():
            raise UserError(f"critic_path: {path!r}: {name} is NaN or infinite in places; take an earlier checkpoint")
    critic.load_state_dict(theirs)


def split_group(optimizer, parameters, learning_rate):
    """Give some of an optimiser's parameters a group of their own, without weight decay."""
    chosen = {id(parameter) for parameter in parameters}
    own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in chosen]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    optimizer.add_param_group({"params": own, "lr": learning_rate, "weight_decay": 0.0})


def drop_policy_gradients(model, critic):
    """Drop every gradient of `model` but the critic's own: what has none, optimisers leave as it is, its state too."""
    own = {id(parameter) for parameter in critic.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.grad = None


# --- Checkpoints --------------------------------------------------------------------------------------------------


def critic_weights(critic, state_dict=None):
    """The critic's weights by name, out of the whole model's `state_dict` where an engine has gathered one."""
    if state_dict is None:
        return critic.state_dict()
    return {name.rpartition("critic.")[2]: weight for name, weight in state_dict.items() if "critic." in name}


def save_critic(weights, folder):
    """Write `critic.safetensors`."""
    save_file({name: weight.contiguous().cpu() for name, weight in weights.items()}, Path(folder) / CRITIC)


def load_critic(critic, folder):
    """Read `critic.safetensors`, where weights are sharded each rank its share."""
    set_model_state_dict(critic, load_file(Path(folder) / CRITIC), options=StateDictOptions(full_state_dict=True))
