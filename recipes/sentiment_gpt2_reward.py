"""Sentiment, step 2 of 3: a reward model that prefers positive reviews (pairwise loss, TRL's RewardTrainer).

    accelerate launch recipes/sentiment_gpt2_reward.py
    accelerate launch recipes/sentiment_gpt2_reward.py --config recipes/sentiment_gpt2_reward_tiny.yaml

The dataset holds pairs (`chosen`, `rejected`), or labelled reviews (`text`, `label`) that are paired here: one of
label `preferred_label` over one of the other. The share of held-out pairs that the model orders rightly is printed at
the end. Writes `output_dir`: a sequence classifier with one label, and its tokenizer.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, get_peft_config, get_quantization_config

from recipe_args import UserError, load_split, one_line_errors, parse, require_path
from rewards import RewardModel, encode


@dataclass(kw_only=True)
class RewardArguments(ScriptArguments):
    """What this recipe takes beside TRL's own settings."""

    preferred_label: int = field(default=1, metadata={"help": "Label to prefer where the data is labelled reviews."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})


def pair_by_label(labelled, preferred_label, seed):
    """Labelled reviews → pairs: each of the preferred label over one of the other, matched at random."""
    labelled = labelled.shuffle(seed=seed)
    chosen = [row["text"] for row in labelled if row["label"] == preferred_label]
    rejected = [row["text"] for row in labelled if row["label"] == 1 - preferred_label]
    pairs = list(zip(chosen, rejected, strict=False))
    if not pairs:
        raise UserError(f"preferred_label: {preferred_label}: the data has no pair of labels 0 and 1")
    return Dataset.from_dict({"chosen": [c for c, _ in pairs], "rejected": [r for _, r in pairs]})


def load_pairs(script_args, split, seed):
    data = load_split(script_args.dataset_name, split, config=script_args.dataset_config)
    if {"text", "label"} <= set(data.column_names):
        return pair_by_label(data, script_args.preferred_label, seed)
    return load_split(script_args.dataset_name, split, ["chosen", "rejected"], script_args.dataset_config)


def tokenize(pairs, tokenizer, max_length):
    """Token ids as `RewardModel` makes them when it scores: TRL's own tokenisation wants an EOS that BERT lacks."""
    return pairs.map(
        lambda batch: {
            f"{side}_ids": encode(tokenizer, batch[side], max_length=max_length) for side in ("chosen", "rejected")
        },
        batched=True,
        remove_columns=pairs.column_names,
        desc="Tokenizing pairs",
    )


def check_length(path, max_length):
    """Positions beyond the model's own would be an IndexError in the middle of training."""
    positions = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length: {max_length} is more than the {positions} positions of {path}; lower it")


def main(script_args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig):
    path = require_path("model_name_or_path", model_args.model_name_or_path)
    check_length(path, training_args.max_length)
    train = load_pairs(script_args, script_args.dataset_train_split, training_args.seed)
    test = load_pairs(script_args, script_args.dataset_test_split, training_args.seed)
    test = test.select(range(min(len(test), script_args.test_pairs)))

    tokenizer = AutoTokenizer.from_pretrained(path)
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    trainer = RewardTrainer(
        model=path,
        args=training_args,
        train_dataset=tokenize(train, tokenizer, training_args.max_length),
        eval_dataset=tokenize(test, tokenizer, training_args.max_length),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    if trainer.is_world_process_zero():
        report_accuracy(RewardModel(training_args.output_dir, max_length=training_args.max_length), test)
        print(f"reward model: {training_args.output_dir}")
    return trainer


def report_accuracy(reward_model, pairs):
    """Share of pairs in which the saved model scores `chosen` above `rejected`, ± a 95 % normal interval."""
    chosen, rejected = (reward_model(prompts=[""] * len(pairs), completions=pairs[s]) for s in ("chosen", "rejected"))
    accuracy = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs)
    interval = 1.96 * (accuracy * (1 - accuracy) / len(pairs)) ** 0.5
    print(f"held-out pairwise accuracy {accuracy:.3f} ± {interval:.3f}, n = {len(pairs)} pairs")
    return accuracy


if __name__ == "__main__":
    with one_line_errors():
        main(*parse(__file__, RewardArguments, RewardConfig, ModelConfig))
