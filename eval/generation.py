"""Completions of many prompts and their log-probabilities, in batches of like length; kept on disk as they come."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.loading import cut_after_eos, set_stop_ids
from eval.resumable_log import ResumableLog
from trl_ppo.inputs import UserError, first_line
from trl_ppo.logprobs import pad_batch


class CompletionLog(ResumableLog):
    """The completions of a run as they are made: `{"index", "ids", "completion", "last"}` a line, a batch a group."""

    holds, item = "completions made", "sample"

    def __init__(self, path: Path, fingerprint: dict, overwrite: bool = False):
        self.ids: dict[int, list[int]] = {}
        super().__init__(path, fingerprint, overwrite)
        self.resumed = len(self.ids)

    def is_line(self, line) -> bool:
        ids = line.get("ids") if isinstance(line, dict) and {"index", "last"} <= {*line} else None
        return isinstance(ids, list) and len(ids) > 0 and all(type(i) is int and i >= 0 for i in ids)

    def ends_group(self, line: dict) -> bool:
        return line["last"]

    def take(self, lines: list[dict]) -> None:
        self.ids |= {line["index"]: line["ids"] for line in lines}

    def append(self, indices: Sequence[int], ids: list[list[int]], texts: list[str]) -> None:
        """Add one batch."""
        self.write(
            [
                {"index": index, "ids": row, "completion": text, "last": index == indices[-1]}
                for index, row, text in zip(indices, ids, texts, strict=True)
            ]
        )


def generate(
    model, tokenizer, prompt_ids: list[list[int]], eos: list[int], settings, title: str, log=None, stream: int = 0
) -> list[list[int]]:
    """One completion for each prompt, up to and including its first EOS, in the prompts' order.

    Batch b of the prompts sorted by length is drawn with a seed made of `settings.seed`, `stream` and b, so that two
    models draw from the same random numbers and a resumed run draws what an unbroken one would. `log` takes each
    batch as it comes and gives those that it has already. UserError if generation fails.
    """
    set_stop_ids(model, tokenizer, eos)
    completions: dict[int, list[int]] = {} if log is None else dict(log.ids)
    by_length = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))  # longest first: memory
    for number, indices in enumerate(batches(by_length, settings.batch_size, f"generate {title}")):
        if all(index in completions for index in indices):
            continue
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, stream, number]).generate_state(1)[0]))
        try:
            ids = _sample(model, tokenizer, [prompt_ids[index] for index in indices], eos, settings)
        except RuntimeError as error:  # no chances to draw from (NaN weights), or no memory
            raise UserError(f"the {title} model cannot generate: {first_line(error)}") from error
        completions |= dict(zip(indices, ids, strict=True))
        if log is not None:
            log.append(indices, ids, tokenizer.batch_decode(ids, skip_special_tokens=True))
    return [completions[index] for index in range(len(prompt_ids))]


def _sample(model, tokenizer, prompt_ids: list[list[int]], eos: list[int], settings) -> list[list[int]]:
    batch = pad_batch(prompt_ids, [[]] * len(prompt_ids), tokenizer.pad_token_id)
    sequences = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
    )
    return [cut_after_eos(ids, eos) for ids in sequences[:, batch["input_ids"].size(1) :].tolist()]


def sequence_logprobs(
    model, prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_id: int, settings, title: str
) -> np.ndarray:
    """Σ_t log π(y_t | prompt, y_<t) of each completion (n,), in nats, at the sampling temperature.

    `model` has `trl_ppo.logprobs.add_logprobs_forward` at that temperature. Sums are in float64.
    """
    sums = np.zeros(len(prompt_ids))
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for indices in batches(by_length, settings.batch_size, f"log-probabilities by {title}"):
        batch = pad_batch([prompt_ids[i] for i in indices], [completion_ids[i] for i in indices], pad_id)
        width = batch.pop("completion_mask").size(1)
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.no_grad():
            logprobs = model(**inputs, num_completion_tokens=width).logprobs  # 0 where they are padding
        sums[indices] = logprobs.double().sum(1).cpu().numpy()
    return sums


def batches(indices: Sequence[int], size: int, title: str) -> Iterator[list[int]]:
    """`indices` in order, at most `size` at a time, under a progress bar of samples."""
    with tqdm(total=len(indices), desc=title, unit="sample") as bar:
        for start in range(0, len(indices), size):
            yield list(indices[start : start + size])
            bar.update(min(size, len(indices) - start))
