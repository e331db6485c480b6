"""What recipes and evaluation load alike: models and datasets, by Hub id or folder, checked before they are loaded."""

import csv
import gzip
import random
from pathlib import Path
from typing import Any

from trl_ppo.inputs import UserError, first_line, is_messages, looks_local

HERE = Path(__file__).resolve().parent


def check_path(key: str, path: str | None) -> None:
    """UserError, which names `key` and what to do, if `path` is missing, or can only be local and does not exist."""
    if path is None:
        raise UserError(f"{key}: is missing; give a Hub id or a folder")
    if not looks_local(path) or Path(path).expanduser().exists():
        return
    made_by = {f"data/{script.stem}": script.name for script in sorted(HERE.parent.glob("data_prep/*.py"))}
    folder = max((name for name in made_by if Path(path).as_posix().startswith(name)), key=len, default=None)
    advice = f"make it with: python data_prep/{made_by[folder]}" if folder else "make it first, or give a Hub id"
    if (parent := Path(path).parent).is_dir() and parent != Path("."):
        advice += f"; {parent} holds {', '.join(sorted(each.name for each in parent.iterdir())[:8]) or 'nothing'}"
    raise UserError(f"{key}: {path!r} does not exist: {advice}")


def check_model(key: str, path: str | None, head: str | None = None):
    """The configuration of the model at `path`, or of an adapter's base; UserError if it cannot be had.

    With `head`, "CausalLM" or "SequenceClassification", its weights' names and its tokenizer are checked as well.
    """
    from transformers import AutoConfig, AutoTokenizer  # here and below: they take seconds, and --help need not wait

    check_path(key, path)
    try:
        if (Path(path) / "adapter_config.json").is_file():
            from peft import PeftConfig

            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            check_path(f"{key}'s base model", base)
            return AutoConfig.from_pretrained(base)
        if head is None:
            return AutoConfig.from_pretrained(path)
        from trl_ppo.loading import check_tokenizer, load_skeleton

        model = load_skeleton(path, f"{key}: ", head)
        check_tokenizer(model, AutoTokenizer.from_pretrained(path))
        return model.config
    except UserError:
        raise
    except Exception as error:  # a user's folder may be wrong in any way
        raise UserError(f"{key}: {path!r}: no model can be loaded from there: {first_line(error)}") from error


LOADERS = {".csv": "csv", ".csv.gz": "csv", ".parquet": "parquet", ".txt": "text"}  # of single files; others are JSONL


def check_csv(where: str, path: str, separator: str = ",") -> None:
    """UserError for a row with more fields than the header has: pandas would take its first one for an index."""
    csv.field_size_limit(2**31 - 1)
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        header = next(rows, [])
        for row in rows:
            if len(row) > len(header):
                raise UserError(
                    f"{where}: line {rows.line_num} of {path} has {len(row)} fields, the header {len(header)}: put "
                    f"texts that contain {separator!r} in quotation marks"
                )


def load_split(path: str, split: str, columns=(), config: str | None = None, key: str = "dataset_name", advice=""):
    """One split of a Hub dataset, of a local folder of {train,test}.jsonl[.gz] (or csv, parquet), or of one such file.

    Raises:
        UserError: no such path, split or column (with those there are), no rows, unreadable data, no way to the Hub, or
            a value of `columns` that is neither text nor messages.
    """
    import datasets

    check_path(key, path)
    where = f"{key}: {path!r}"
    files = {"path": path, "name": config}
    if Path(path).is_file():
        loader = next((loader for end, loader in LOADERS.items() if path.lower().endswith(end)), "json")
        files = {"path": loader, "data_files": {split: path}}
        if loader == "csv":
            check_csv(where, path)
    try:
        dataset = datasets.load_dataset(**files, split=split)
        if files["path"] == "text" and columns:  # a row a line, whatever the one column is to be called
            dataset = dataset.filter(lambda row: row["text"].strip()).rename_column("text", columns[0])
    except ConnectionError as error:
        raise UserError(f"{where}: {first_line(error)}; connect, or give the path of a local folder") from error
    except StopIteration as error:  # what datasets raises for a file without a single row
        raise UserError(f"{where}: split {split!r} has no rows") from error
    except Exception as error:  # a file of the user's may be wrong in any way
        cause = f": {first_line(error.__cause__)}" if error.__cause__ else ""
        within = sorted(file.parent.as_posix() for file in Path(path).glob(f"*/{split}.jsonl"))
        cause += f"; it holds datasets of its own, name one: {', '.join(within)}" if within else ""
        raise UserError(f"{where}: {first_line(error)}{cause}") from error
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        there = ", ".join(dataset.column_names)
        raise UserError(f"{where}: split {split!r} has no column {', '.join(missing)}; it has {there}{advice}")
    if not len(dataset):
        raise UserError(f"{where}: split {split!r} has no rows")
    for column in columns:
        for row, text in enumerate(dataset[column]):
            if not isinstance(text, str) and not is_messages(text):
                raise UserError(f"{where}: {column!r} of row {row} is {text!r:.60}: not a text, nor a list of messages")
    return dataset


def load_prompts(args, split: str, tokenizer, seed: int, limit: int | None = None):
    """A dataset with the column `prompt`, texts or messages: those of the wanted length, cut where asked.

    `args` are a recipe's `PPOArguments`.

    Raises:
        UserError: as `load_split`; or no prompt is left.
    """
    column = args.prompt_column
    data = load_split(args.dataset_name, split, [column], args.dataset_config)
    if any(isinstance(text, list) for text in data[column]):
        if args.prompt_tokens:
            raise UserError(f"prompt_tokens: {args.prompt_tokens}: {column!r} holds messages, which cannot be cut")
        if tokenizer.chat_template is None:
            raise UserError(f"dataset_name: {column!r} holds messages, but the tokenizer has no chat template")

    def num_tokens(text):
        if isinstance(text, str):
            return len(tokenizer(text)["input_ids"])
        return len(tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"])

    def fits(row):
        text = row[column]
        if len(text) < args.min_prompt_characters:
            return False
        if args.min_prompt_tokens == 1 and args.max_prompt_tokens is None:
            return True
        return args.min_prompt_tokens <= num_tokens(text) <= (args.max_prompt_tokens or float("inf"))

    kept = data.filter(fits, desc="Filtering prompts")
    if not len(kept):
        raise UserError(f"dataset_name: no prompt of split {split!r} is as long as min_prompt_… and max_prompt_… want")
    if len(kept) < len(data):
        print(f"{split}: {len(data) - len(kept)} of {len(data)} prompts are too short or too long and left out")
    kept = kept.select(range(min(len(kept), limit or len(kept))))
    cut = prompt_cutter(tokenizer, *args.prompt_tokens, seed) if args.prompt_tokens else lambda text: text
    return kept.map(lambda row: {"prompt": cut(row[column])}, desc="Cutting prompts", load_from_cache_file=False)


def prompt_cutter(tokenizer, least: int, most: int, seed: int):
    """A function that cuts texts, one after the other, to their first k tokens; k uniform in least..most."""
    rng = random.Random(seed)

    def cut(text: str) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: rng.randint(least, most)])

    return cut


def merge_adapter(folder, dtype="auto") -> str:
    """Write the model that a LoRA adapter and its base make together to `folder`/merged, with its tokenizer.

    The base is loaded again, so that weights which were quantised for training are merged at full precision. Returns
    the new folder; it loads with plain `AutoModelForCausalLM`, or as a sequence classifier if the adapter is one.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoTokenizer

    from trl_ppo.reward_model import load_classifier

    merged = Path(folder) / "merged"
    if PeftConfig.from_pretrained(folder).task_type == "SEQ_CLS":
        model, tokenizer = load_classifier(folder, dtype)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    return str(merged)


def init_kwargs(training_args, model_args) -> dict[str, Any]:
    """How to load the model: the YAML's `model_init_kwargs`, and TRL's settings of its own for the same."""
    return (training_args.model_init_kwargs or {}) | {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }


def fit_out(trainer) -> None:
    """What every stage but PPO adds to its trainer: short lines, a card that names the base, 4 bits that train."""
    from trl_ppo.callbacks import StageProgress, complete_card, show_lines
    from trl_ppo.logprobs import keep_4bit_differentiable

    show_lines(trainer, StageProgress)
    complete_card(trainer)
    keep_4bit_differentiable(trainer.model)
