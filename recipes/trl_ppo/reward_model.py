"""`RewardModel`: a sequence classifier as a reward function; and validation of every reward function's values.

>>> reward = RewardModel("runs/sentiment_gpt2_classifier", label="POSITIVE")
>>> reward(["The film"], [" was a delight."])
[3.1]
"""

import asyncio
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import get_callable_name, is_async_callable

from .inputs import UserError, as_text, finite_scores, join, looks_local, reward_failures
from .loading import check_tokenizer, check_weights, load_whole, whole_on_every_rank

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # where classifiers keep their labels


def with_finite_scores(reward_func, args=None):
    """`reward_func`, synchronous or not, whose values are checked by `finite_scores` at each call.

    A call that raises, or takes more than `args.ddp_timeout` seconds, is a `ScoreError`. `UserError` for no function.
    """
    if not callable(reward_func) or isinstance(reward_func, nn.Module):
        raise UserError(
            f"reward_funcs: {reward_func!r:.60} is not a function; wrap a sequence classifier in RewardModel(path)"
        )
    name, timeout = get_callable_name(reward_func), args and args.ddp_timeout

    async def later(prompts, completions, **columns):
        with reward_failures(name):
            async with asyncio.timeout(timeout):  # in this task: of another one SystemExit would end the event loop
                values = await reward_func(prompts=prompts, completions=completions, **columns)
        return finite_scores(name, values, prompts, completions)

    def at_once(prompts, completions, **columns):
        with reward_failures(name), _time_limit(timeout):
            values = reward_func(prompts=prompts, completions=completions, **columns)
        return finite_scores(name, values, prompts, completions)

    wrapper = later if is_async_callable(reward_func) else at_once
    wrapper.__name__ = wrapper.__qualname__ = name  # TRL logs by it
    wrapper.__wrapped__ = reward_func
    return wrapper


@contextmanager
def _time_limit(seconds):
    """TimeoutError after so many seconds; not in a thread other than the main one, which no signal reaches."""

    def ring(*_):
        raise TimeoutError(f"no scores after {seconds} s (ddp_timeout)")

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.alarm(seconds)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class RewardModel:
    """The score that a sequence classifier gives to prompt + completion, as a reward function.

    Args:
        path: a Hub id or a local folder: a classifier, encoder or decoder, or a PEFT adapter of one.
        label: the label whose logit is the score, by name or index; needed when there are several.
        max_length: longer texts lose their beginning (what is scored stands at the end); the model's own limit holds
            as well.
        batch_size: texts per forward pass; texts of similar length share a pass.
        dtype: of the weights, as `from_pretrained` takes it.
        device: default is this process's device (`accelerate.PartialState`).
        add_eos: whether an end token is put after the text; default as in `encode`, that is as TRL's `RewardTrainer`
            trains.

    Raises:
        FileNotFoundError: `path` is a local one and does not exist.
        UserError: no or an unknown `label` where there are several; no trained classification head at `path`; a
            tokenizer with neither padding nor end token.
    """

    def __init__(
        self,
        path: str,
        *,
        label: str | int | None = None,
        max_length: int = 512,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        add_eos: bool | None = None,
    ):
        if isinstance(path, torch.nn.Module):
            raise UserError(
                f"RewardModel: takes a folder or a Hub id, no {type(path).__name__}; save it, with its tokenizer"
            )
        path = os.path.expanduser(str(path))
        if looks_local(path) and not Path(path).exists():
            raise FileNotFoundError(f"reward model {path!r} does not exist: train it first or give a Hub id")
        self.batch_size = batch_size
        self.model, self.tokenizer = load_classifier(path, dtype)
        self.device = torch.device(device) if device is not None else PartialState().device
        self.model.to(self.device).eval().requires_grad_(False)
        config = self.model.config
        self.label = label_index(path, config.id2label, label)
        self._pad_token_id = self._set_padding(path, config)
        self._max_length, self._add_eos = _length_limit(max_length, config), add_eos
        if add_eos and self.tokenizer.eos_token_id is None:
            raise UserError(f"add_eos: the tokenizer of {path!r} has no end token")
        name = Path(path).resolve().name if Path(path).exists() else path.rsplit("/", 1)[-1]
        self.__name__ = name if label is None else f"{name}_{config.id2label[self.label]}"

    def __call__(self, prompts, completions, **_) -> list[float]:
        """One score for each completion, in their order."""
        return self.score([join(p, c) for p, c in zip(prompts, completions, strict=True)])

    @torch.no_grad()
    def score(self, texts) -> list[float]:
        """One score for each text (a string or a list of messages), in their order."""
        token_ids = self.token_ids(texts)
        by_length = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        scores = [0.0] * len(token_ids)
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            for i, score in zip(batch, self._forward([token_ids[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    def token_ids(self, texts) -> list[list[int]]:
        """What the model reads of each text; see `encode`."""
        ids = encode(self.tokenizer, texts, max_length=self._max_length, add_eos=self._add_eos)
        return [row or [self._pad_token_id] for row in ids]

    def _forward(self, token_ids) -> list[float]:
        # On the right: positions count from the first token, and a decoder's head finds the last token before the
        # padding. With padding = end token that is the one before the end token, in a batch as alone, as in training.
        inputs = self.tokenizer.pad({"input_ids": token_ids}, padding_side="right", return_tensors="pt")
        return self.model(**inputs.to(self.device)).logits[:, self.label].float().tolist()

    def _set_padding(self, path, config) -> int:
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UserError(f"the tokenizer of {path!r} has neither a padding token nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the head looks for it to find the last token
        return tokenizer.pad_token_id


def _length_limit(max_length, config) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions) if positions and positions > 0 else max_length


def label_index(path, id2label: dict[int, str], label) -> int:
    """The index of the label that `label` names, or of the only one; UserError for none such."""
    known = ", ".join(f"{i}: {id2label[i]}" for i in sorted(id2label))
    if label is None:
        if len(id2label) > 1:
            raise UserError(f"reward model {path!r} has several labels; name the one that counts ({known})")
        return next(iter(id2label))
    for index, name in id2label.items():
        if label == name or (not isinstance(label, bool) and str(label) == str(index)):
            return index
    raise UserError(f"reward model {path!r} has no label {label!r}; it has {known}")


# --- Tokens -------------------------------------------------------------------------------------------------------


def encode(tokenizer, texts, *, max_length: int = 512, add_eos: bool | None = None) -> list[list[int]]:
    """Token ids as a classifier reads them, in training and in scoring alike.

    Each text (a string, or messages rendered with the tokenizer's chat template) gets the tokenizer's own special
    tokens; one longer than `max_length` loses its beginning. As TRL's `RewardTrainer` does, plain text gets an end
    token, and text from a chat template gets none: `add_eos` None. What the tokenizer closes itself ([SEP]) gets none
    either.
    """
    closes_itself = tokenizer("a")["input_ids"][-1:] != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    eos_for_plain = tokenizer.eos_token_id is not None and not closes_itself

    def encode_one(text):
        templated = not isinstance(text, str) and tokenizer.chat_template is not None
        text = tokenizer.apply_chat_template(text, tokenize=False) if templated else as_text(text)
        with_eos = add_eos if add_eos is not None else eos_for_plain and not templated
        limit = min(tokenizer.model_max_length, max_length) - with_eos
        # A template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=limit)["input_ids"]
        return [*ids, tokenizer.eos_token_id] if with_eos and ids[-1:] != [tokenizer.eos_token_id] else ids

    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        return [encode_one(text) for text in texts]
    finally:
        tokenizer.truncation_side = side


# --- Loading ------------------------------------------------------------------------------------------------------


@whole_on_every_rank()
def load_classifier(path: str, dtype):
    """The classifier at `path` and its tokenizer. A head that was never trained is an error, not a random score."""
    if find_adapter_config_file(path) is not None:
        model, tokenizer = _load_adapter(path, dtype)
    else:
        model = _load_with_head(path, dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def _load_with_head(path, dtype):
    return load_whole(AutoModelForSequenceClassification, path, "a trained classifier", dtype=dtype)


def _load_adapter(path, dtype):
    # Imported here, since it takes seconds and most reward models have no adapter.
    from peft import AutoPeftModelForSequenceClassification, PeftConfig
    from peft.utils import load_peft_weights

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    heads = [weight for name, weight in load_peft_weights(path, device="cpu").items() if name.endswith(HEADS)]
    if heads:  # how many labels there are is written nowhere else
        kwargs = {"num_labels": heads[-1].shape[0]}
    else:
        _load_with_head(base, dtype)
        kwargs = {}
    model = AutoPeftModelForSequenceClassification.from_pretrained(path, dtype=dtype, **kwargs)
    check_weights(model)
    has_tokenizer = not Path(path).exists() or (Path(path) / "tokenizer_config.json").exists()
    return model, AutoTokenizer.from_pretrained(path if has_tokenizer else base)
