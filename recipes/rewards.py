"""Reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float]`, one number each.

Prompts and completions are strings, or lists of `{"role", "content"}` messages. `RewardModel` scores with a sequence
classifier, `length_penalty` and `repetition_penalty` are there to mix in, and `checked` refuses what may not reach the
weights.

    >>> reward = RewardModel("runs/sentiment_gpt2_reward", label="POSITIVE")
    >>> reward(["The film"], [" was a delight."])
    [3.1]
"""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import get_callable_name, is_async_callable

OUTPUTS = ("logit", "probability", "log_probability")
SCORE_OFFSET = "score_offset.json"  # beside a reward model: what its scores are lowered by
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # where classifiers keep their labels


# --- Text -------------------------------------------------------------------------------------------------------


def as_text(text) -> str:
    """A string as it is; messages as their contents, one per line."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message) for message in text)


def _content(message) -> str:
    content = message.get("content") or ""  # None beside a tool call
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)  # [{"type": "text", "text": …}, …]


def word_count(completions, **_) -> list[float]:
    """The number of words (stretches without white space) of each completion."""
    return [float(len(as_text(completion).split())) for completion in completions]


def length_penalty(completions, **_) -> list[float]:
    """Minus the number of words: rewards short completions."""
    return [-count for count in word_count(completions)]


def repetition_penalty(completions, **_) -> list[float]:
    """Minus the share of a completion's word trigrams that it has had already, in [-1, 0]; 0 below four words."""
    return [-repeated_trigrams(as_text(completion)) for completion in completions]


def repeated_trigrams(text: str) -> float:
    """The share of a text's own word trigrams that repeat an earlier one; 0 for a text without trigrams."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


# --- Sequence classifiers -----------------------------------------------------------------------------------------


def looks_local(path: str) -> bool:
    """Whether `path` can only be a folder on this machine: not of the Hub's form `name` or `org/name`."""
    path = str(path)
    return path.startswith((".", "/", "~", "runs/", "data/")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def encode(tokenizer, texts, *, max_length: int | None = 512, add_eos: bool | None = None) -> list[list[int]]:
    """Token ids as a classifier reads them, in training and in scoring alike.

    Each text (a string, or messages rendered with the tokenizer's chat template) gets the tokenizer's own special
    tokens; one longer than `max_length` loses its beginning. As TRL's `RewardTrainer` does, plain text gets an end
    token, and text from a chat template gets none: `add_eos` None. What the tokenizer closes itself ([SEP]) gets none
    either.
    """
    if add_eos is None:
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        closes_itself = tokenizer("a")["input_ids"][-1:] != plain[-1:]
        eos_for_plain, eos_for_chat = tokenizer.eos_token_id is not None and not closes_itself, False
    else:
        eos_for_plain = eos_for_chat = add_eos
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        return [
            _encode(tokenizer, text, max_length, eos_for_chat if _takes_template(tokenizer, text) else eos_for_plain)
            for text in texts
        ]
    finally:
        tokenizer.truncation_side = side


def _takes_template(tokenizer, text) -> bool:
    return not isinstance(text, str) and tokenizer.chat_template is not None


def _encode(tokenizer, text, max_length, add_eos) -> list[int]:
    from_template = _takes_template(tokenizer, text)
    text = tokenizer.apply_chat_template(text, tokenize=False) if from_template else as_text(text)
    limit = min(tokenizer.model_max_length, max_length or 1_000_000)  # fast tokenizers take no infinity
    ids = tokenizer(
        text,
        add_special_tokens=not from_template,  # the template writes them itself
        truncation=True,
        max_length=limit - add_eos,
    )["input_ids"]
    eos = tokenizer.eos_token_id
    return [*ids, eos] if add_eos and ids[-1:] != [eos] else ids


class RewardModel:
    """The score that a sequence classifier gives to prompt + completion, as a reward function.

    Args:
        path: a Hub id or a local folder: a classifier, encoder or decoder, or a PEFT adapter of one.
        label: the label whose score counts, by name or index; needed when there are several.
        max_length: longer texts lose their beginning (what is scored stands at the end); the model's own limit holds
            as well.
        batch_size: texts per forward pass; texts of similar length share a pass.
        dtype: of the weights, as `from_pretrained` takes it.
        device: default is this process's device (`accelerate.PartialState`).
        include_prompt: False scores the completion alone.
        output: `logit`, less the offset that centring wrote beside the reward model; or `probability` or
            `log_probability` of the label (a sigmoid for one label, a softmax for several).
        add_eos: whether an end token is put after the text; default as in `encode`, that is as TRL's `RewardTrainer`
            trains.

    Raises:
        FileNotFoundError: `path` is a local one and does not exist.
        ValueError: no or an unknown `label` where there are several; `output` unknown; no trained classification head
            at `path`; a tokenizer with neither padding nor end token.
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
        include_prompt: bool = True,
        output: str = "logit",
        add_eos: bool | None = None,
    ):
        path = os.path.expanduser(str(path))
        if looks_local(path) and not Path(path).exists():
            raise FileNotFoundError(f"reward model {path!r} does not exist: train it first or give a Hub id")
        if output not in OUTPUTS:
            raise ValueError(f"output: {output!r} is not one of {', '.join(OUTPUTS)}")
        self.batch_size, self.include_prompt, self.output = batch_size, include_prompt, output
        self.model, self.tokenizer = load_classifier(path, dtype)
        self.device = torch.device(device) if device is not None else PartialState().device
        self.model.to(self.device).eval().requires_grad_(False)
        config = self.model.config
        self.label = _label_index(path, config.id2label, label)
        self.score_offset = _read_offset(path) if output == "logit" else 0.0
        self._pad_token_id = self._set_padding(path, config)
        self._max_length, self._add_eos = _length_limit(max_length, config), add_eos
        if add_eos and self.tokenizer.eos_token_id is None:
            raise ValueError(f"add_eos: the tokenizer of {path!r} has no end token")
        name = Path(path).resolve().name if Path(path).exists() else path.rsplit("/", 1)[-1]
        self.__name__ = name if label is None else f"{name}_{config.id2label[self.label]}"

    def __call__(self, prompts, completions, **_) -> list[float]:
        """One score for each completion, in their order."""
        if not self.include_prompt:
            return self.score(completions)
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
                scores[i] = score - self.score_offset
        return scores

    def token_ids(self, texts) -> list[list[int]]:
        """What the model reads of each text; see `encode`."""
        ids = encode(self.tokenizer, texts, max_length=self._max_length, add_eos=self._add_eos)
        return [row or [self._pad_token_id] for row in ids]

    def _forward(self, token_ids) -> list[float]:
        # On the right: positions count from the first token, and a decoder's head finds the last token before the
        # padding. With padding = end token that is the one before the end token, in a batch as alone, as in training.
        inputs = self.tokenizer.pad({"input_ids": token_ids}, padding_side="right", return_tensors="pt")
        logits = self.model(**inputs.to(self.device)).logits.float()
        return self._activate(logits)[:, self.label].tolist()

    def _activate(self, logits):
        if self.output == "logit":
            return logits
        alone = logits.shape[-1] == 1 or self.model.config.problem_type == "multi_label_classification"
        log_probability = logsigmoid(logits) if alone else logits.log_softmax(-1)
        return log_probability if self.output == "log_probability" else log_probability.exp()

    def _set_padding(self, path, config) -> int:
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the tokenizer of {path!r} has neither a padding token nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the head looks for it to find the last token
        return tokenizer.pad_token_id


def _read_offset(path) -> float:
    file = Path(path) / SCORE_OFFSET
    return json.loads(file.read_text())["score_offset"] if file.is_file() else 0.0


def _length_limit(max_length, config) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions) if positions and positions > 0 else max_length


def join(prompt, completion):
    """The text that is scored, prompt + completion: both strings, or both messages; a mixture becomes a string."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    if isinstance(prompt, list):
        return [*prompt, {"role": "assistant", "content": completion}]
    return prompt + as_text(completion)


def _label_index(path, id2label: dict[int, str], label) -> int:
    known = ", ".join(f"{i}: {id2label[i]}" for i in sorted(id2label))
    if label is None:
        if len(id2label) > 1:
            raise ValueError(f"reward model {path!r} has several labels; name the one that counts ({known})")
        return next(iter(id2label))
    for index, name in id2label.items():
        if label == name or (not isinstance(label, bool) and str(label) == str(index)):
            return index
    raise ValueError(f"reward model {path!r} has no label {label!r}; it has {known}")


@contextmanager
def _whole_on_every_rank():
    """Under ZeRO-3 `from_pretrained` gives each rank a share of the weights, which only DeepSpeed's engine can run."""
    saved, hf_deepspeed._hf_deepspeed_config_weak_ref = hf_deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = saved


@_whole_on_every_rank()
def load_classifier(path: str, dtype):
    """The classifier at `path` and its tokenizer. A head that was never trained is an error, not a random score."""
    if find_adapter_config_file(path) is not None:
        return _load_adapter(path, dtype)
    model = _load_with_head(path, dtype)
    return model, AutoTokenizer.from_pretrained(path)


def _load_with_head(path, dtype):
    model, info = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{path!r} is not a trained classifier: it has no {missing}")
    return model


def _load_adapter(path, dtype):
    # Imported here, since it takes seconds and most reward models are whole.
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
    has_tokenizer = not Path(path).exists() or (Path(path) / "tokenizer_config.json").exists()
    return model, AutoTokenizer.from_pretrained(path if has_tokenizer else base)


# --- What may not reach the weights -----------------------------------------------------------------------------


def checked(reward_func):
    """`reward_func`, synchronous or not, with its values checked: Python floats or None, one for each completion.

    None says "does not apply to this sample", as in TRL. Tensors and NumPy numbers are accepted.

    Raises (when called):
        ValueError: a number of values other than that of the completions, or a value that is NaN, infinite or no
            number. It names the function, and the sample by its index and the start of its text.
    """
    name = get_callable_name(reward_func)
    if is_async_callable(reward_func):

        async def wrapper(prompts, completions, **columns):
            values = await reward_func(prompts=prompts, completions=completions, **columns)
            return _floats(name, values, prompts, completions)

    else:

        def wrapper(prompts, completions, **columns):
            values = reward_func(prompts=prompts, completions=completions, **columns)
            return _floats(name, values, prompts, completions)

    wrapper.__name__ = wrapper.__qualname__ = name  # TRL logs by it
    wrapper.__doc__ = reward_func.__doc__
    return wrapper


def _floats(name, values, prompts, completions) -> list[float | None]:
    try:
        values = list(values)
    except TypeError as error:
        kind = type(values).__name__
        raise ValueError(f"reward function {name!r} returned {kind}, not a list of {len(completions)}") from error
    if len(values) != len(completions):
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    return [_finite(name, i, value, prompts[i], completions[i]) for i, value in enumerate(values)]


def _finite(name, index, value, prompt, completion) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):  # NaN compares false
        prompt, completion = (repr(as_text(text)[:60]) for text in (prompt, completion))
        raise ValueError(
            f"reward function {name!r} returned {value!r} for sample {index}: prompt {prompt}, completion {completion}"
        )
    return number
