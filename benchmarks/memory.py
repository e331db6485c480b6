"""How much memory does a PPO recipe take, and for what? Computed from its YAML, without a GPU and without the weights.

    python -m benchmarks.memory --recipe qwen_summarize_ppo
    python -m benchmarks.memory --recipe qwen_summarize_ppo --config qlora --per_device_train_batch_size 2
    python -m benchmarks.memory --recipe qwen_summarize_ppo --model_name_or_path Qwen/Qwen2.5-7B

The models are made of torch's fake tensors, which have a shape and a type but no memory, and a rollout's passes run on
them: sampling's prefill and its last token, a micro-batch of log-probs, a batch of the reward model, two micro-batches
forward and back. What would be allocated is counted as it comes and goes; weights, optimiser and gradients by their
sizes. All prompts and completions are as long as the recipe allows. Further options are the recipe's own.

Not counted: what CUDA itself takes (about 0.5 GB), and what an allocator cannot use between blocks.
"""

import argparse
import importlib
import sys
import typing
import weakref
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from peft import get_peft_model
from random_models import MODELS, configuration
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from trl import get_peft_config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from command_line import one_line_errors, parse
from trl_ppo.critic import ValueHead, ValueModel
from trl_ppo.logprobs import CompletionTokens, add_logprobs_forward

ROLES = ["policy", "reference", "critic", "reward model", "optimiser", "gradients", "KV cache", "logits", "activations"]
PPO_RECIPES = sorted(path.stem for path in Path(__file__).resolve().parent.parent.glob("recipes/*_ppo.py"))
AUTOCAST = {"no": nullcontext}
AUTOCAST |= {"bf16": partial(torch.autocast, "cpu", torch.bfloat16), "fp16": partial(torch.autocast, "cpu", torch.half)}


class Count(TorchDispatchMode):
    """The bytes of what is allocated within, now and at most, beside the weights of the modules."""

    def __init__(self, *modules):
        super().__init__()
        self.now = self.peak = 0
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.weights = [tensor.untyped_storage() for tensor in tensors]  # are no allocation, nor is a view of them
        self.known = {id(storage) for storage in self.weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


class FullRows(CompletionTokens):
    """Every prompt and completion of a micro-batch at its longest: nothing to find out from the tokens."""

    def __init__(self, input_ids, attention_mask, num_completion_tokens, **_):
        rows, width = input_ids.shape
        self.ids, self.attention_mask = input_ids, attention_mask
        self.targets = input_ids[:, -num_completion_tokens:].reshape(-1)
        self.shape = rows, num_completion_tokens
        self.row = torch.arange(rows).repeat_interleave(num_completion_tokens, output_size=len(self.targets))
        self.position = torch.arange(width - num_completion_tokens - 1, width - 1).repeat(rows)

    def spread(self, per_token):
        return per_token.view(self.shape)


def size_of(module, trainable=False):
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trainable)


def make(name, auto, dtype):
    """A model on "meta": of the table in random_models.py, or by the configuration in a folder or on the Hub."""
    config = configuration(name)[0] if name in MODELS else AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return auto.from_config(config, dtype=getattr(torch, dtype))


def models(script, training, model):
    """The policy with its critic, the same in its adapter if it has one, the reward model or None; on "meta"."""
    policy, reward = make(model.model_name_or_path, AutoModelForCausalLM, model.dtype), None
    add_logprobs_forward(policy, training.temperature, training.cast_lm_head_to_fp32)
    policy.completion_tokens = FullRows
    lora = get_peft_config(model)
    wrapped = policy if lora is None else get_peft_model(policy, lora)
    if model.load_in_4bit:  # as TRL does
        for parameter in (each for each in wrapped.parameters() if each.requires_grad):
            parameter.data = parameter.data.bfloat16()
    policy.critic = ValueHead(policy.config.get_text_config().hidden_size)
    if training.value_model_path:
        classifier = make(training.value_model_path, AutoModelForSequenceClassification, "float32")
        policy.critic = ValueModel.__new__(ValueModel)
        torch.nn.Module.__init__(policy.critic)
        policy.critic.trunk, policy.critic.head = classifier.base_model, classifier.score
    wrapped.train()
    if training.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        if lora is not None:
            wrapped.enable_input_require_grads()
    if "reward_model" in script.rewards:
        reward = make(script.reward_models[0], AutoModelForSequenceClassification, script.reward_dtype).eval()
    return policy, wrapped, reward


def without_memory(module):
    """Fake tensors in place of a module's meta tensors, which autocast does not know; tied weights stay tied."""
    fakes = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    fakes[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                tensors[name] = None if tensor is None else fakes[id(tensor)]


def in_4_bits(policy, nested):
    """Bytes that bitsandbytes saves, with a scale for 64 weights; those of the largest layer while it is unpacked."""
    left_out = "lora_", "critic", "lm_head"
    layers = [module for name, module in policy.named_modules() if not any(part in name for part in left_out)]
    weights = [layer.weight for layer in layers if isinstance(layer, torch.nn.Linear)]
    bits = 4 + (8 / 64 + 32 / (64 * 256) if nested else 32 / 64)
    return sum(w.numel() * (w.element_size() - bits / 8) for w in weights), max(w.numel() * 2 for w in weights)


def sampling(policy, samples, prompt, new, temperature, autocast):
    """The larger of two moments, all prompts at once and the last token but one: (count, bytes of cache, of logits)."""
    text = policy.config.get_text_config()
    words, peaks = samples * text.vocab_size, []
    with torch.no_grad(), Count(policy) as count, autocast():
        ids, mask = torch.ones(samples, prompt, dtype=torch.long), torch.ones(samples, 1, prompt, prompt).bool()
        cache = DynamicCache()
        logits = policy(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
        _, heads, _, width = cache.layers[0].keys.shape
        dtype, token = cache.layers[0].keys.dtype, 2 * len(cache.layers) * heads * width * samples
        peaks.append((count.peak, token * dtype.itemsize * prompt, words * logits.element_size()))
    with torch.no_grad(), Count(policy) as count, autocast():
        cache = DynamicCache()
        for layer in range(text.num_hidden_layers):
            cache.update(*(torch.empty(samples, heads, prompt + new - 2, width, dtype=dtype) for _ in "kv"), layer)
        ids, mask = ids[:, :1], torch.ones(samples, 1, 1, prompt + new - 1).bool()
        logits = policy(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        kept = logits.element_size()
        torch.multinomial((logits[:, -1].to(torch.float32, copy=True) / temperature).softmax(-1), 1)
        peaks.append((count.peak, token * dtype.itemsize * (prompt + new - 1), words * (kept + 3 * 4)))
    return max(peaks)


def memory(script, training, model, mixed_precision="no", triton=True):
    """Phase → role → bytes, of a PPO recipe's parsed arguments; `triton` as on a GPU, else TRL's head without it."""
    rows, new = training.per_device_train_batch_size, training.max_completion_length
    prompt = script.max_prompt_tokens or max(script.prompt_tokens)
    samples = rows * training.gradient_accumulation_steps * training.num_mini_batches
    policy, wrapped, reward = models(script, training, model)
    saved, unpacked = in_4_bits(policy, model.use_bnb_nested_quant) if model.load_in_4bit else (0, 0)
    trainable, own, autocast = size_of(wrapped, trainable=True), size_of(policy.critic), AUTOCAST[mixed_precision]
    static = {"policy": size_of(wrapped) - own - saved, "critic": own, "optimiser": 2 * trainable}
    references = (not model.use_peft) + script.preference_as_reward
    rewards = len(script.reward_models) * size_of(reward) if reward else 0  # of an ensemble's first, and others like it
    static |= {"reference": references * static["policy"], "reward model": rewards}
    bytes_of_logit = policy.dtype.itemsize if mixed_precision == "no" else 2
    tile = {"logits": min(rows * new, TOKEN_CHUNK_SIZE) * _CHUNKED_LOGPROB_CHUNK_SIZE * bytes_of_logit}
    phases = {}

    def note(phase, peak, **roles):
        phases[phase] = static | roles | {"activations": peak + unpacked - sum(roles.values())}

    with FakeTensorMode(), ExitStack() as patches:
        for name in ("_forward_tile", "_backward_tile") if triton else ():  # Triton allocates nothing beside the tile
            patches.enter_context(mock.patch(f"trl.kernels.chunked_logprob.{name}"))
        without_memory(wrapped)
        wrapped.eval()  # generation has gradient checkpointing off
        peak, cache, logits = sampling(wrapped, samples, prompt, new, training.temperature, autocast)
        note("sampling", peak, **{"KV cache": cache, "logits": logits})
        ids = torch.ones(rows, prompt + new, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids, "num_completion_tokens": new}
        with torch.no_grad(), Count(wrapped) as count, autocast():
            wrapped(**batch)
        note("log-probs", count.peak, **tile)
        if reward is not None:
            without_memory(reward)
            longest = getattr(reward.config, "max_position_embeddings", script.reward_max_length)
            text = torch.ones(script.reward_batch_size, min(prompt + new, script.reward_max_length, longest)).long()
            with torch.no_grad(), Count(reward) as count:
                reward(input_ids=text)
            note("scores", count.peak)
        wrapped.train()
        with Count(wrapped) as count:
            for _ in range(min(2, training.gradient_accumulation_steps)):  # the second finds gradients there
                with autocast():
                    tokens = wrapped(**batch)
                (tokens.logprobs.float().sum() + tokens.state_values.float().sum()).backward()
        note("update", count.peak, gradients=trainable, **tile)
    return phases


def table(phases):
    """GB (10⁹ bytes): a row a role, and the total; a column a phase."""
    lines = [[role, *(each.get(role, 0) for each in phases.values())] for role in ROLES]
    lines.append(["total", *(sum(each.values()) for each in phases.values())])
    shown = [["GB", *phases], ["---"] * (1 + len(phases))]
    shown += [[name, *(f"{size / 1e9:.2f}" for size in sizes)] for name, *sizes in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


class Parser(argparse.ArgumentParser):
    """Leaves what it does not know to the recipe, as `options`."""

    def parse_args(self, args=None, namespace=None):
        known, rest = self.parse_known_args(args, namespace)
        return argparse.Namespace(**vars(known), options=rest)


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, choices=PPO_RECIPES, help="whose YAML is read")
    parser.add_argument("--mixed_precision", default="bf16", choices=AUTOCAST, help="of the accelerate config")
    return parser


@one_line_errors()
def main(argv=None):
    args = make_parser().parse_args(argv)
    recipe = importlib.import_module(args.recipe)
    types = typing.get_type_hints(recipe.main).values()
    transformers.logging.set_verbosity_error()
    phases = memory(*parse(recipe.__file__, *types, args=[*args.options, "--use_cpu", "true"]), args.mixed_precision)
    print(table(phases))
    print(f"peak {max(sum(each.values()) for each in phases.values()) / 1e9:.1f} GB, computed")


if __name__ == "__main__":
    main()
