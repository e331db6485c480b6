"""Reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float]`, one number each.

Prompts and completions are strings, or lists of `{"role", "content"}` messages. A YAML maps each function's name to a
weight; a function of your own is named by file and function: `rewards: {my_rewards.py:no_shouting: 0.5}`.
"""

import importlib
import importlib.util
import inspect
import sys
import zlib
from pathlib import Path

import numpy as np

from trl_ppo.inputs import UserError, as_text, first_line


def word_count(completions, **_) -> list[float]:
    """The number of words (stretches without white space) of each completion."""
    return [float(len(as_text(completion).split())) for completion in completions]


def length_penalty(completions, **_) -> list[float]:
    """Minus the number of words: rewards short completions."""
    return [-count for count in word_count(completions)]


def repetition_penalty(completions, **_) -> list[float]:
    """Minus the share of a completion's word trigrams that it has had already, in [-1, 0]; 0 below four words."""
    return [-repeated_trigrams(as_text(completion)) for completion in completions]


def rouge1(completions, reference, **_) -> list[float]:
    """Words shared with the dataset's column `reference`: ROUGE-1's F1, in [0, 1] (Lin 2004).

    As a reward beside another one, which keeps the text fluent: Paulus et al. 2017, arXiv:1705.04304.
    """
    return rouge(reference, map(as_text, completions), ["rouge1"])["rouge1"]


def rouge(references, texts, kinds) -> dict[str, list[float]]:
    """F-measures of these kinds of ROUGE by the `rouge-score` library, words stemmed, each (n,)."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second to import

    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scored = [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]
    return {kind: [row[kind].fmeasure for row in scored] for kind in kinds}


def repeated_trigrams(text: str) -> float:
    """The share of a text's own word trigrams that repeat an earlier one; 0 for a text without trigrams."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


# --- What several reward models, or a reference, make of a score ----------------------------------------------------


def ensemble(reward_models, variance_coef=None):
    """Several reward models as one reward function (Coste et al. 2023, arXiv:2310.02743).

    A completion's score is the lowest that a model gives it (worst-case optimisation), or with `variance_coef` k the
    models' mean minus k × their variance (uncertainty-weighted optimisation). A NaN stays one. Each model's mean score
    is logged too.
    """

    def reward_ensemble(prompts, completions, log_metric=None, **_):
        scores = np.array([model(prompts, completions) for model in reward_models])  # (models, completions)
        for number, (model, mean) in enumerate(zip(reward_models, scores.mean(1), strict=True), start=1):
            if log_metric:
                log_metric(f"rewards/reward_ensemble/{number}_{model.__name__}", mean)
        combined = scores.min(0) if variance_coef is None else scores.mean(0) - variance_coef * scores.var(0)
        return combined.tolist()

    return reward_ensemble


def preference(reward, sample_reference):
    """Preference as reward, PAR (Fu et al. 2025, arXiv:2502.18770): how likely a completion beats the reference's own.

    σ(reward(prompt, completion) − reward(prompt, the reference's completion)), in [0, 1], with one completion of the
    reference for each prompt, from `sample_reference(prompts)`. The mean of the reward itself is logged too.
    """

    def preference_as_reward(prompts, completions, log_metric=None, **_):
        own = np.array(reward(prompts, completions, log_metric=log_metric))
        if log_metric:
            log_metric(f"rewards/{reward.__name__}", own.mean())
        margins = own - reward(prompts, sample_reference(prompts))
        return (0.5 + 0.5 * np.tanh(margins / 2)).tolist()  # σ without overflow

    return preference_as_reward


def reference_sampler(path, args, quantization_config=None):
    """A function `prompts -> completions` that samples the model at `path` with the settings of PPO's rollouts.

    What it draws depends on `args.seed` and the prompts alone: a resumed run gets the completions of an unbroken one.
    """
    # Here, since they take seconds, and evaluation takes its plain functions from this file.
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from trl_ppo import cpu_folder
    from trl_ppo.loading import load_whole, whole_on_every_rank

    device = PartialState().device
    kwargs = (args.model_init_kwargs or {}) | {"quantization_config": quantization_config, "device_map": device}
    with whole_on_every_rank():
        model = load_whole(AutoModelForCausalLM, path, "a language model", **kwargs)
    fast = {} if (cpu := cpu_folder(device)) is None else {"custom_generate": cpu.sample}
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    settings |= {"max_new_tokens": args.max_completion_length, "eos_token_id": sorted(ends) or None}
    settings |= {"do_sample": True, "pad_token_id": tokenizer.pad_token_id} | (args.generation_kwargs or {})
    config = GenerationConfig(**settings, disable_compile=True)
    model.generation_config = GenerationConfig()  # which would fill in what the settings leave open

    def sample(prompts):
        chat = {"tokenize": False, "add_generation_prompt": True} | (args.chat_template_kwargs or {})
        texts = [p if isinstance(p, str) else tokenizer.apply_chat_template(p, **chat) for p in prompts]
        special = isinstance(prompts[0], str)  # a template writes the special tokens itself
        batch = tokenizer(texts, add_special_tokens=special, padding=True, return_tensors="pt").to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(repr((args.seed, prompts)).encode()))
            ids = model.generate(batch.input_ids, attention_mask=batch.attention_mask, generation_config=config, **fast)
        return tokenizer.batch_decode(ids[:, batch.input_ids.size(1) :], skip_special_tokens=True)

    return sample


def find_function(key: str, name: str):
    """The reward function called `name`: one of this file, `file.py:function` or `module:function`.

    Raises UserError, which names `key`, if there is none.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon:
        here = {
            name: function
            for name, function in globals().items()
            if inspect.isfunction(function) and "completions" in inspect.signature(function).parameters
        }
        if name in here:
            return here[name]
        raise UserError(
            f"{key}: {name!r} is not a reward; give reward_model, {', '.join(here)}, or a function of your own as "
            "file.py:function"
        )
    try:
        function = getattr(
            _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place), function_name
        )
    except Exception as error:  # a file of the user's may fail in any way
        raise UserError(f"{key}: cannot import {name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise UserError(f"{key}: {name} is not a function")
    return function


def check_signature(key: str, name: str, function) -> None:
    """UserError for a function that cannot be called as TRL calls rewards, with what its first line has to be."""
    given = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
    try:
        inspect.signature(function).bind_partial(**dict.fromkeys(given))
    except TypeError as error:
        raise UserError(
            f"{key}: {name}: {error}; write def {name.rpartition(':')[2]}(prompts, completions, **columns)"
        ) from error
    except ValueError:  # some of C have no signature to look at
        pass


def _load_file(path: Path):
    path = path.expanduser().resolve()
    if str(path) not in sys.modules:  # under its path, so that it shadows no other module
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[str(path)] = module
    return sys.modules[str(path)]
