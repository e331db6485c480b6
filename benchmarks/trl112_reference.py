"""What TRL 1.12's PPOTrainer computes on fixed models and rollouts, for tests/test_fidelity.py to hold ours to.

TRL 1.12.0 is its last release with a PPOTrainer, and cannot share an environment with this project's TRL:

    python3 -m venv .venv-trl112
    .venv-trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
    .venv-trl112/bin/python benchmarks/trl112_reference.py --output tests/data/trl112_reference.json

About ten seconds on one CPU core; the file that it writes is committed. Two runs on one machine write the same bytes.

TRL's `train()` runs as it is, its own sampling loop included. Only what enters it is fixed: `torch.multinomial` hands
out the completions below, and the reward model the scores below. What it computes is read from the local variables of
`train()` whenever it calls one of three functions: its whitening, `backward` and `log`.

Shapes in the dump: B = 8 completions of at most C = 6 tokens, of which 1 to 6 are real (`LENGTHS`). A mask is 1 where
TRL counts a token: `mask` in its policy loss, `mask_p1` in its rewards and value loss. `logprobs`, `ref_logprobs`,
`values`, `kl`, `rewards`, `whitened_rewards`, `raw_advantages`, `advantages` and `returns` are (B, C), `scores` (B,).
`micro_batches` come in the order of training; `rows` says which completions each one holds.
"""

import argparse
import copy
import json
import platform
import sys
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    set_seed,
)

# ---------------------------------------------------------------------------------------------------------------
# Models, prompts, completions and scores: the test builds its own from these too
# ---------------------------------------------------------------------------------------------------------------

PAD, EOS, VOCAB_SIZE, WIDTH = 0, 1, 20, 6
NUM_PROMPTS = 16  # twice the batch: on the last batch of a pass over the data TRL would step on every micro-batch
LENGTHS = {
    # An immediate end, ends with and without room for one more position, and two that are cut off.
    "mixed": [1, 2, 3, 4, 5, 6, 6, 6],
    # No room after any: the one shape of rollout on which TRL's bookkeeping and ours coincide.
    "full": [6] * 8,
}
NUM_CUT_OFF = {"mixed": 2, "full": 3}  # the last so many rows do not end in EOS
SCORES = [1.5, -0.5, 2.0, 0.25, -1.0, 0.75, 3.0, -2.0]


@dataclass
class Case:
    """One run: the settings that differ between runs, by TRL's names where it has one."""

    architecture: str
    completions: str
    kl_estimator: str
    whiten_rewards: bool
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.5
    vf_coef: float = 0.1
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    missing_eos_penalty: float | None = None
    critic_on_policy_trunk: bool = False  # the critic's trunk has the policy's weights, as under a value head
    pad_is_eos: bool = False


CASES = {
    "gpt2 mixed k1": Case("gpt2", "mixed", "k1", False),
    "gpt2 mixed k3 whitened": Case("gpt2", "mixed", "k3", True, gamma=0.9),
    "gpt2 full k1 whitened": Case("gpt2", "full", "k1", True),
    "gpt2 full k3": Case("gpt2", "full", "k3", False, temperature=0.7, missing_eos_penalty=1.0),
    "llama mixed k1 whitened": Case("llama", "mixed", "k1", True, temperature=0.7, missing_eos_penalty=1.0),
    "llama mixed k3": Case("llama", "mixed", "k3", False, critic_on_policy_trunk=True),
    "llama full k1": Case("llama", "full", "k1", False, gamma=0.9, critic_on_policy_trunk=True),
    "llama full k3 whitened": Case("llama", "full", "k3", True),
    "gpt2 mixed k1, pad = eos": Case("gpt2", "mixed", "k1", False, pad_is_eos=True),
}

SHARED = {"vocab_size": VOCAB_SIZE, "num_labels": 1, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
GPT2 = GPT2Config(**SHARED, n_positions=16, n_embd=8, n_layer=1, n_head=2)
LLAMA = LlamaConfig(
    **SHARED,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)
ARCHITECTURES = {
    "gpt2": (GPT2, GPT2LMHeadModel, GPT2ForSequenceClassification),
    "llama": (LLAMA, LlamaForCausalLM, LlamaForSequenceClassification),
}


def draw(name, shape, seed):
    """Standard normal numbers that depend on a parameter's name and shape and on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode())))


@torch.no_grad()
def build(model_class, config, seed, noise=0.0):
    """A model whose weights no library version can change; `noise` is how far it is from the one without."""
    model = model_class(copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
        parameter.copy_(centre + 0.3 * draw(name, parameter.shape, seed) + noise * draw(name, parameter.shape, "noise"))
    return model


def build_models(case):
    """`(policy, ref_model, value_model)`: the reference close to the policy, the critic a sequence classifier."""
    config, causal_lm, classifier = ARCHITECTURES[case.architecture]
    critic_seed = "policy" if case.critic_on_policy_trunk else "critic"
    return (
        build(causal_lm, config, "policy"),
        build(causal_lm, config, "policy", noise=0.05),
        build(classifier, config, critic_seed),
    )


def checksum(*models):
    """Σ|w| over all weights, to tell that two builds are the same."""
    return sum(parameter.double().abs().sum().item() for model in models for parameter in model.parameters())


def make_prompts():
    """Sixteen prompts of 2 to 5 tokens, none special."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB_SIZE, (2 + i % 4,), generator=generator).tolist() for i in range(NUM_PROMPTS)]


def make_completions(kind):
    """Eight lists of tokens, of `LENGTHS[kind]`, that end in EOS but for the last few."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS[kind]]
    finished = len(rows) - NUM_CUT_OFF[kind]
    return [[*row[:-1], EOS] for row in rows[:finished]] + rows[finished:]


# ---------------------------------------------------------------------------------------------------------------
# TRL's trainer, and what is read from it
# ---------------------------------------------------------------------------------------------------------------


def make_tokenizer(pad_id):
    """One word for each token id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"w{pad_id}", eos_token=f"w{EOS}", padding_side="left"
    )


def make_trainer(case, models, output_dir):
    """TRL's trainer for one rollout of two micro-batches and two PPO epochs, the second one with a moved policy."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, ref_model, value_model = models
    tokenizer = make_tokenizer(EOS if case.pad_is_eos else PAD)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    args = PPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        learning_rate=0.05,  # large, so that ratios and values leave their clip ranges
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_ppo_epochs=2,
        total_episodes=8,
        num_sample_generations=0,
        response_length=WIDTH,
        stop_token="eos",
        temperature=case.temperature,
        missing_eos_penalty=case.missing_eos_penalty,
        whiten_rewards=case.whiten_rewards,
        kl_coef=case.kl_coef,
        kl_estimator=case.kl_estimator,
        cliprange=case.cliprange,
        vf_coef=case.vf_coef,
        cliprange_value=case.cliprange_value,
        gamma=case.gamma,
        lam=case.lam,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_model,
        reward_model=build(type(value_model), value_model.config, "reward"),
        train_dataset=Dataset.from_dict({"input_ids": make_prompts()}),
        value_model=value_model,
    )


def norm(gradients):
    """Euclidean norm of several gradients together; a parameter that the loss does not reach has none."""
    return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()


class Recorder:
    """Fixes the completions and scores of TRL's `train()`, and keeps its local variables; `dump` has the result.

    Every method named `on_…` stands in for a function that `train()` calls, which it calls in turn.
    """

    def __init__(self, trainer, case):
        from trl.experimental.ppo import ppo_trainer

        self.module, self.trainer, self.case = ppo_trainer, trainer, case
        self.completions = make_completions(case.completions)
        self.dump = {"micro_batches": []}
        self.original = {name: getattr(ppo_trainer, name) for name in ("batch_generation", "get_reward")}
        self.original |= {"masked_whiten": ppo_trainer.masked_whiten, "log": trainer.log}
        self.original["backward"] = trainer.accelerator.backward

    def run(self):
        """Train, and return the dump."""
        with ExitStack() as patches:
            for name in ("batch_generation", "get_reward", "masked_whiten"):
                patches.enter_context(mock.patch.object(self.module, name, getattr(self, f"on_{name}")))
            patches.enter_context(mock.patch.object(self.trainer.accelerator, "backward", self.on_backward))
            patches.enter_context(mock.patch.object(self.trainer, "log", self.on_log))
            self.trainer.train()
        return self.dump

    def on_batch_generation(self, *args):
        """TRL's and transformers' own generation, but that every draw gives the next token of our completions."""
        padded = torch.tensor([row + [PAD] * (WIDTH - len(row)) for row in self.completions])
        with mock.patch.object(torch, "multinomial", side_effect=padded.split(1, dim=1)):
            return self.original["batch_generation"](*args)

    def on_get_reward(self, model, query_responses, pad_token_id, context_length):
        """TRL's own for the critic; for the reward model our scores, and where TRL would have read its own."""
        logits, rewards, ends = self.original["get_reward"](model, query_responses, pad_token_id, context_length)
        if model is self.trainer.reward_model:
            self.dump["score_read_at"] = (ends - context_length).tolist()
            rewards = torch.tensor(SCORES)
        return logits, rewards, ends

    def on_masked_whiten(self, values, mask, shift_mean=True):
        self.dump["raw_advantages" if shift_mean else "raw_rewards"] = values.tolist()
        return self.original["masked_whiten"](values, mask, shift_mean)

    def on_backward(self, loss):
        """Before the first update the rollout; before each the micro-batch."""
        self.original["backward"](loss)
        local = sys._getframe(1).f_locals
        if not self.dump["micro_batches"]:
            self.dump |= self.rollout(local)
        self.dump["micro_batches"].append(
            {"rows": local["micro_batch_inds"].tolist()}
            | {name: local[name].tolist() for name in ("new_logprobs", "vpred", "pg_loss", "vf_loss", "loss")}
        )
        if len(self.dump["micro_batches"]) == 2:  # the gradient of the first step, over its two micro-batches
            wrapper = self.trainer.model
            self.dump["policy_grad_norm"] = norm(p.grad for p in wrapper.policy.parameters())
            self.dump["value_grad_norm"] = norm(p.grad for p in wrapper.value_model.parameters())

    def rollout(self, local):
        """TRL's rollout under this project's names."""
        self.check_responses(local["responses"])
        queries = local["queries"]
        rewards = local["rewards"].tolist()
        named = {
            name: local[name].tolist() for name in ["logprobs", "ref_logprobs", "values", "scores", "kl", "returns"]
        }
        return named | {
            "prompts": [row[row != self.trainer.processing_class.pad_token_id].tolist() for row in queries],
            "completions": self.completions,
            "mask": (~local["padding_mask"]).int().tolist(),
            "mask_p1": (~local["padding_mask_p1"]).int().tolist(),
            "rewards": self.dump.pop("raw_rewards", rewards),
            "whitened_rewards": rewards if self.case.whiten_rewards else None,
            "raw_advantages": self.dump["raw_advantages"],
            "advantages": local["advantages"].tolist(),
        }

    def check_responses(self, responses):
        """Raise if TRL did not sample our completions, each followed by padding."""
        pad_id = self.trainer.processing_class.pad_token_id
        expected = [row + [pad_id] * (WIDTH - len(row)) for row in self.completions]
        if responses.tolist() != expected:
            raise RuntimeError(f"completions: TRL sampled {responses.tolist()}, not {expected}")

    def on_log(self, metrics):
        """After the last update: what TRL logs, and its statistics of every micro-batch."""
        local = sys._getframe(1).f_locals
        for i, micro_batch in enumerate(self.dump["micro_batches"]):
            for name in ["approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio"]:
                micro_batch[name] = local[f"{name}_stats"].flatten()[i].item()
        self.dump["metrics"] = {name: value for name, value in metrics.items() if name != "eps"}  # eps is a speed


# ---------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------


def rounded(x):
    """Floats to 9 significant digits, which is what a float32 has, at any depth."""
    if isinstance(x, float):
        return float(f"{x:.9g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def to_json(x, depth=3, indent=""):
    """JSON with one line for each entry of the outermost `depth` levels, so that a person can read it."""
    if not depth or not isinstance(x, dict):
        return json.dumps(x)
    lines = [f"{indent} {json.dumps(name)}: {to_json(value, depth - 1, indent + ' ')}" for name, value in x.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def run_case(case):
    """The dump of one case."""
    models = build_models(case)
    total = checksum(*models)
    # TRL leaves NumPy's generator, which shuffles its micro-batches, as it finds it. After this seed the first two
    # micro-batches of a mixed rollout hold 23 and 10 tokens, so that the mean of their means is not the mean.
    set_seed(3)
    with tempfile.TemporaryDirectory() as output_dir:
        dump = Recorder(make_trainer(case, models, output_dir), case).run()
    return {"settings": asdict(case), "checksum": total, **dump}


def main(output):
    packages = ("trl", "torch", "transformers", "accelerate", "datasets")
    dump = {
        "command": f".venv-trl112/bin/python benchmarks/trl112_reference.py --output {output}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cases": {name: run_case(case) for name, case in CASES.items()},
    }
    if dump["versions"]["trl"] != "1.12.0":
        raise SystemExit(f"trl: this is {dump['versions']['trl']}; make the environment of the docstring, with 1.12.0")
    Path(output).write_text(to_json(rounded(dump)) + "\n")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="where to write the JSON")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args().output)
