"""What every command of eval/ needs to start: options and models that are checked early, loaded, or refused in a line.

A model is a folder or Hub id, whole or a LoRA adapter, which is merged into its base model.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from models_and_data import check_model
from trl_ppo.inputs import UserError, first_line
from trl_ppo.loading import check_tokenizer, check_weights, load_skeleton, load_whole


def at_least(lowest: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: whole numbers from `lowest` up, to `most`."""

    def whole_number(text: str) -> int:
        number = int(text)
        if not lowest <= number <= most:
            up_to = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be at least {lowest}{up_to}, not {number}")
        return number

    return whole_number


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return number


def is_adapter(path: str) -> bool:
    """Whether the folder holds a PEFT adapter instead of a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of_adapter(path: str) -> str:
    """The path or Hub id of the model that the adapter belongs to."""
    from peft import PeftConfig  # here, because importing peft is slow and prints where bitsandbytes has no GPU

    return PeftConfig.from_pretrained(path).base_model_name_or_path


def load_tokenizer(path: str):
    """The model's tokenizer, or its base model's if it is an adapter without one."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of_adapter(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer can be loaded from there: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked: any token will do
    return tokenizer


def check_language_model(option: str, path: str) -> PreTrainedConfig:
    """The model's configuration; UserError unless its files hold every weight and, if any, a tokenizer of its own."""
    config = check_model(option, path)
    if not is_adapter(path):
        skeleton = load_skeleton(path, f"{option}: ")
        if not Path(path).is_dir() or any(Path(path).glob("tokenizer*")):
            check_tokenizer(skeleton, load_tokenizer(path))
    return config


def load_model(path: str) -> torch.nn.Module:
    """The causal LM in float32, on the GPU if there is one; an adapter is merged into its base model."""
    if is_adapter(path):
        model = _load_adapter(path)
    else:
        model = load_whole(AutoModelForCausalLM, path, "a language model", dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_adapter(path: str) -> torch.nn.Module:
    from peft import AutoPeftModelForCausalLM

    try:
        model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).merge_and_unload()
    except Exception as error:  # a user's folder may be wrong in any way
        raise UserError(f"{path}: no language model can be loaded from there: {first_line(error)}") from error
    check_weights(model)
    return model


def check_vocabulary(base: PreTrainedConfig, tuned: PreTrainedConfig, tokenizer, tuned_path: str) -> None:
    """UserError unless the base can score the tuned model's tokens: same count, same meaning."""
    sizes = [config.get_text_config().vocab_size for config in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise UserError(f"base has {sizes[0]} tokens and {tuned_path} {sizes[1]}: KL needs one vocabulary")
    if (Path(tuned_path) / "tokenizer.json").is_file():
        theirs = load_tokenizer(tuned_path).get_vocab()
        changed = next((token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index), None)
        if changed is not None:
            raise UserError(f"base and {tuned_path} number the token {changed!r} differently: KL needs one vocabulary")


def generation_config(path: str, config: PreTrainedConfig) -> GenerationConfig:
    """The generation settings of the model at `path`, as loading it would find them, without loading it."""
    try:
        return GenerationConfig.from_pretrained(base_of_adapter(path) if is_adapter(path) else path)
    except OSError:  # the model has no such file
        return GenerationConfig.from_model_config(config)


def stop_ids(configs: Iterable[GenerationConfig], tokenizer) -> list[int]:
    """Every EOS id that one of the models or the tokenizer declares: models that are compared must stop alike."""
    declared = {tokenizer.eos_token_id}
    for config in configs:
        ids = config.eos_token_id
        declared.update(ids if isinstance(ids, list) else [ids])
    return sorted(declared - {None})


def set_stop_ids(model, tokenizer, eos: list[int]) -> None:
    """Replace the model's generation settings by its stop and padding tokens alone.

    `generate` fills what a call leaves open (top_p, min_length, …) from the model's own file; nothing may leak.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=eos or None, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )


def positions_of(config: PreTrainedConfig) -> float:
    """How many positions the model has, infinity where its configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def cut_after_eos(ids: list[int], eos: list[int]) -> list[int]:
    """`ids` up to and including the first of the EOS ids; all of them if there is none."""
    end = next((index for index, token in enumerate(ids) if token in eos), len(ids))
    return ids[: end + 1]
