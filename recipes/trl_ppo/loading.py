"""Models from a folder or the Hub. What their files lack is an error here; transformers would make it up at random."""

import logging
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoConfig
from transformers.integrations import deepspeed as hf_deepspeed

from .inputs import UserError, first_line

# What says which files `from_pretrained` reads.
PLACE = ("revision", "subfolder", "variant", "cache_dir", "token", "trust_remote_code")


@contextmanager
def whole_on_every_rank():
    """Under ZeRO-3 `from_pretrained` gives each rank a share of the weights, which only DeepSpeed's engine can run."""
    saved, hf_deepspeed._hf_deepspeed_config_weak_ref = hf_deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = saved


@contextmanager
def _faults_of(path, what, key):
    """UserError that names the place, for whatever goes wrong; without transformers' table of what is missing there."""
    report = logging.getLogger("transformers.modeling_utils")
    report.disabled, was_disabled = True, report.disabled
    try:
        yield
    except Exception as error:  # a user's folder may be wrong in any way
        raise UserError(f"{key}{path!r} is not {what}: {first_line(error)}") from error
    finally:
        report.disabled = was_disabled


def load_whole(auto_class, path, what, key="", may_lack=False, **kwargs):
    """`auto_class.from_pretrained(path)`; on the device "meta" it reads no weights.

    Raises UserError, which says that `path` is not `what`, for files that cannot be read, lack weights (unless they
    `may_lack` some), or hold them in other shapes; and for weights that are NaN or infinite.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _faults_of(path, what, key):
        model, info = auto_class.from_pretrained(path, **kwargs)
        if "score.bias" in info["unexpected_keys"]:
            model, info = _with_bias(type(model)).from_pretrained(path, **kwargs)
        if info["missing_keys"] and not may_lack:
            raise ValueError(f"it has no {', '.join(sorted(info['missing_keys'])[:3])}")
        for name, theirs, ours in info["mismatched_keys"]:
            raise ValueError(f"{name} is {[*theirs]}, which config.json wants to be {[*ours]}")
    check_weights(model)
    return model


def _with_bias(cls):
    """A classifier's class, its head with a bias, as in Huang et al. 2024; transformers would drop it (TRL's 1783)."""

    def init(self, config):
        cls.__init__(self, config)
        self.score = torch.nn.Linear(self.score.in_features, self.score.out_features)

    return type(cls.__name__, (cls,), {"__init__": init})


@whole_on_every_rank()
def load_skeleton(path, key="", head="CausalLM", **kwargs):
    """The model at `path` without its weights, whose names and shapes are checked; a classifier may lack its head yet.

    Raises UserError as `load_whole`, and for a classifier where a language model is asked for.
    """
    what, auto_class = ("a language model", "a model")[head != "CausalLM"], getattr(transformers, f"AutoModelFor{head}")
    kwargs = {name: value for name, value in kwargs.items() if name in PLACE}
    with _faults_of(path, what, key):
        config = AutoConfig.from_pretrained(path, **kwargs)
        said = config.architectures
        if head == "CausalLM" and (not said or "Classification" in said[0]):
            raise ValueError(f"its config.json says {said}")
        if hasattr(config, "quantization_config"):  # the names of its weights are the quantiser's own
            with torch.device("meta"):
                return auto_class.from_config(config)
    return load_whole(auto_class, path, what, key, may_lack=head != "CausalLM", device_map="meta", **kwargs)


def check_usable(model, tokenizer):
    """UserError as `check_weights` and `check_tokenizer`."""
    check_weights(model)
    check_tokenizer(model, tokenizer)


def check_weights(model):
    """UserError for weights that are NaN or infinite."""
    path = model.config._name_or_path
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            raise UserError(f"{path!r}: {name} is NaN or infinite in places; take an earlier checkpoint")


def check_tokenizer(model, tokenizer):
    """UserError for a tokenizer that is empty, or another model's."""
    path = model.config._name_or_path
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{path!r}: its tokenizer knows no words; put tokenizer.json and tokenizer_config.json there")
    ids = {*tokenizer.get_vocab().values()} - {tokenizer.unk_token_id}  # which transformers adds where there is none
    largest = max({*ids, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0})
    if largest >= (size := model.get_input_embeddings().num_embeddings):
        raise UserError(f"{path!r} has {size} tokens, but its tokenizer's ids go up to {largest}; give it its own")
