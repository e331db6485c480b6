"""Sentiment, step 2 of 3: a reward model that prefers positive reviews (TRL's RewardTrainer).

    accelerate launch recipes/sentiment_gpt2_reward.py
    accelerate launch recipes/sentiment_gpt2_reward.py --config tiny

The dataset holds pairs (`chosen`, `rejected`), or labelled reviews (`text`, `label`) that are paired here: one of label
`preferred_label` over one of the other. Pairwise accuracy is printed at the end. Writes `output_dir`: a sequence
classifier, its tokenizer, `reward_report.json` and `reward_report.svg`. `sentiment_gpt2_classifier.py` fits the labels
instead.
"""

from dataclasses import dataclass, field

import transformers
import trl

import trl_ppo
from command_line import run
from models_and_data import check_model, fit_out, init_kwargs, load_split, merge_adapter
from preferences import check_length, join_prompts, load_pairs, report, tokenize_pairs
from recipe_args import RecipeArguments
from terminal import announce
from trl_ppo.inputs import UserError


@dataclass(kw_only=True)
class RewardArguments(RecipeArguments):
    """What this recipe takes besides TRL's own settings."""

    preferred_label: int | None = field(
        default=None, metadata={"help": "Label to prefer where the data is labelled reviews; default 1."}
    )
    train_pairs: int | None = field(default=None, metadata={"help": "Pairs to train on; default all."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})


def pair_by_label(labelled, preferred_label, seed):
    """Labelled reviews → pairs: each of the preferred label over one of the other, matched at random."""
    from datasets import Dataset  # here, since it takes a second, and --help need not wait

    labelled = labelled.shuffle(seed=seed)
    chosen = [row["text"] for row in labelled if row["label"] == preferred_label]
    rejected = [row["text"] for row in labelled if row["label"] == 1 - preferred_label]
    pairs = list(zip(chosen, rejected, strict=False))
    if not pairs:
        raise UserError(f"preferred_label: {preferred_label}: the data has no pair of labels 0 and 1")
    return Dataset.from_dict({"chosen": [c for c, _ in pairs], "rejected": [r for _, r in pairs]})


def load_either(script_args, split, seed, limit):
    """The first pairs of a split, each side a whole text; those of labelled reviews are made here."""
    data = load_split(script_args.dataset_name, split, config=script_args.dataset_config)
    if {"text", "label"} <= set(data.column_names):
        data = load_split(script_args.dataset_name, split, ["text"], script_args.dataset_config)
        label = 1 if script_args.preferred_label is None else script_args.preferred_label
        pairs = pair_by_label(data, label, seed)
        return pairs.select(range(min(len(pairs), limit or len(pairs))))
    if script_args.preferred_label is not None:
        raise UserError(
            f"preferred_label: {script_args.preferred_label}: the data holds pairs, of which `chosen` is preferred; "
            "leave it out, or give labelled texts"
        )
    return join_prompts(load_pairs(script_args.dataset_name, split, script_args.dataset_config, limit))


def main(script_args: RewardArguments, training_args: "trl.RewardConfig", model_args: "trl.ModelConfig"):
    script_args.check(model_args)
    script_args.claim_output_dir(training_args, model_args)
    path, max_length = model_args.model_name_or_path, training_args.max_length
    check_length(path, check_model("model_name_or_path", path, "SequenceClassification"), max_length)

    # 1. Pairs of reviews.
    seed = training_args.seed
    train = load_either(script_args, script_args.dataset_train_split, seed, script_args.train_pairs)
    test = load_either(script_args, script_args.dataset_test_split, seed, script_args.test_pairs)

    # 2. Train.
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    training_args.model_init_kwargs = init_kwargs(training_args, model_args)
    trainer = trl.RewardTrainer(
        model=path,
        args=training_args,
        train_dataset=tokenize_pairs(train, tokenizer, max_length),
        eval_dataset=tokenize_pairs(test, tokenizer, max_length),
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
        quantization_config=trl.get_quantization_config(model_args),
    )
    fit_out(trainer)
    announce(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    # 3. How well the saved model orders pairs.
    if trainer.is_world_process_zero():
        reward_model = trl_ppo.RewardModel(training_args.output_dir, max_length=max_length)
        some = train.select(range(min(len(train), len(test))))
        dataset = script_args.dataset_name if script_args.preferred_label is None else None
        report(reward_model, training_args.output_dir, dataset, train=some, test=test)
        print(f"reward model: {training_args.output_dir}")
        if script_args.merge_adapter:
            print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    run(main, __file__)
