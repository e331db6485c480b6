"""The PPO jobs that `benchmarks/ppo_throughput.py` measures, as plain numbers: nothing here imports torch.

What a process needs at most is counted from its start, and on Linux a child starts with its parent's figure: the
process that starts the measured ones has to stay small.
"""

import json
from dataclasses import asdict, dataclass, replace

PAD, EOS = 0, 1  # prompts and completions hold neither, but for an EOS at the end of a completion


@dataclass(frozen=True)
class Job:
    """One PPO job. Lengths are in tokens and inclusive; a rollout is `batch` completions, one for each prompt.

    Where `new_tokens` holds one number twice no completion ends by itself; else every completion ends in EOS, at a
    length that its prompt decides (`throughput_run.end_lengths`). `forward_batch` is TRL 1.12's
    `local_rollout_forward_batch_size`, its completions per pass in sampling and scoring, which has no counterpart
    here.
    """

    name: str
    architecture: str  # "gpt2" or "qwen2"
    size: dict  # what its config takes besides the vocabulary
    vocab_size: int
    batch: int
    micro_batch: int
    prompt_tokens: tuple
    new_tokens: tuple
    forward_batch: int = 64
    epochs: int = 4
    temperature: float = 1.0
    dtype: str = "float32"
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    lora_targets: str | tuple | None = None
    four_bit: bool = False
    gpu: bool = False
    episodes: int | None = None  # of the published run that the job is a piece of

    @property
    def ragged(self):
        return self.new_tokens[0] < self.new_tokens[1]

    def to_json(self):
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text):
        return Job(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()}
        )


GPT2_30M = {"n_embd": 384, "n_layer": 6, "n_head": 6}
QWEN2_25M = {
    "hidden_size": 128,
    "intermediate_size": 704,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QWEN25_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN25_15B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
# One micro-batch of 16 would need about 20 GB of logits and their gradients in TRL 1.12: 4 micro-batches of 4, as in
# the recipe.
TLDR = {"prompt_tokens": (300, 512), "new_tokens": (53, 53), "micro_batch": 4, "temperature": 0.7}
SENTIMENT = Job("sentiment", "gpt2", GPT2_30M, 50257, 32, 32, (8, 16), (32, 32))
QWEN_GPU = {"dtype": "bfloat16", "gradient_checkpointing": True, "lora_targets": "all-linear", "gpu": True}

JOBS = {
    job.name: job
    for job in (
        SENTIMENT,
        Job("tldr", "qwen2", QWEN2_25M, 151665, 16, **TLDR),
        replace(SENTIMENT, name="ragged", new_tokens=(4, 128)),
        # The settings of the recipes of the same models, in bf16 as accelerate_configs/single_gpu.yaml has it.
        Job(
            "gpt2",
            "gpt2",
            {"n_embd": 768, "n_layer": 12, "n_head": 12},
            50257,
            256,
            128,
            (2, 8),
            (16, 16),
            mixed_precision="bf16",
            gpu=True,
            episodes=51200,
        ),
        Job(
            "gpt2_large_lora",
            "gpt2",
            {"n_embd": 1280, "n_layer": 36, "n_head": 20},
            50257,
            64,
            8,
            (64, 256),
            (128, 128),
            mixed_precision="bf16",
            gradient_checkpointing=True,
            lora_targets=("c_attn", "c_proj"),
            gpu=True,
        ),
        Job("qwen05_lora", "qwen2", QWEN25_05B, 151936, 64, **TLDR, **QWEN_GPU, forward_batch=16),
        Job("qwen15_qlora", "qwen2", QWEN25_15B, 151936, 64, **TLDR, **QWEN_GPU, forward_batch=16, four_bit=True),
    )
}
CPU_JOBS = [name for name, job in JOBS.items() if not job.gpu]


def tiny(job):
    """The same job at sizes that take seconds: to see that it runs, not how fast."""
    if job.architecture == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    else:
        size = {**QWEN2_25M, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape = {"prompt_tokens": (4, 12), "new_tokens": (2, 10) if job.ragged else (6, 6)}
    small = {"size": size, "vocab_size": 400, "batch": 8, "micro_batch": 4 if job.micro_batch < job.batch else 8}
    return replace(job, name=f"smoke-{job.name}", gpu=False, mixed_precision="no", episodes=None, **small, **shape)


GROWTH = {
    "batch size": (8, 16, 32, 64, 128),
    "completion length": (16, 32, 64, 128, 256),
    "vocabulary": (12565, 25129, 50257, 100514, 201028),
    "width": (192, 384, 576, 768),
}


def growing(base=SENTIMENT, growth=GROWTH):
    """`(what grows, its value, job)`: a GPT-2 job with one of its sizes changed at a time."""
    for name, values in growth.items():
        for value in values:
            changed = {
                "batch size": {"batch": value, "micro_batch": value},
                "completion length": {"new_tokens": (value, value)},
                "vocabulary": {"vocab_size": value},
                "width": {"size": {**base.size, "n_embd": value, "n_head": value // 64}},
            }[name]
            yield name, value, replace(base, name=f"{base.name}-{name.replace(' ', '-')}-{value}", **changed)


def operations(job):
    """Floating-point operations for one completion of a GPT-2 job, each phase at its least.

    Two operations a weight and token in a forward pass and four in a backward one; `2·tokens·width` for each of a
    layer's two attention products, for a token that sees `tokens` others. Sampling passes each token once, scoring
    twice (policy, reference), the update `epochs` times forward and backward; the head sees completion tokens alone.
    """
    width, layers = job.size["n_embd"], job.size["n_layer"]
    prompt, new = sum(job.prompt_tokens) / 2, sum(job.new_tokens) / 2
    tokens = prompt + new
    trunk = tokens * layers * (24 * width**2 + 4 * width * tokens / 2)  # 12·width² weights a layer
    head = new * 2 * width * job.vocab_size
    return (1 + 2 + 3 * job.epochs) * (trunk + head)
