"""Sentiment, another reward: a classifier of reviews, fitted to their labels NEGATIVE and POSITIVE (cross-entropy).

    accelerate launch recipes/sentiment_gpt2_classifier.py
    accelerate launch recipes/sentiment_gpt2_classifier.py --config scratch

The dataset holds labelled reviews (`text`, `label` 0 or 1), or pairs whose `chosen` side is positive. Fine-tunes
`model_name_or_path`, or makes a BERT and its vocabulary from scratch when `scratch_layers` is set; transformers' own
Trainer does the rest. Any PPO recipe takes the result as reward model with `reward_label: POSITIVE`. The share of
held-out pairs that it orders correctly is printed at the end. Writes `output_dir`: classifier, tokenizer,
`reward_report.json` and `reward_report.svg`.
"""

from dataclasses import dataclass, field

import transformers
import trl
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing

import trl_ppo
from command_line import run
from models_and_data import check_model, fit_out
from preferences import check_length, report
from recipe_args import OutputArguments
from sentiment_gpt2_reward import load_either
from terminal import announce
from trl_ppo.inputs import UserError

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}


@dataclass(kw_only=True)
class ClassifierArguments(OutputArguments):
    """What this recipe takes besides transformers' settings."""

    max_length: int = field(default=512, metadata={"help": "Tokens of a text; longer ones lose their beginning."})
    preferred_label: int | None = field(default=None, metadata={"help": "Label whose score is reported; default 1."})
    train_pairs: int | None = field(default=None, metadata={"help": "Texts of each label to train on; default all."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})
    scratch_layers: int = field(default=0, metadata={"help": "Layers of a BERT made from scratch; 0 fine-tunes."})
    scratch_width: int = field(default=128, metadata={"help": "Its hidden size."})
    scratch_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    scratch_vocab: int = field(default=8192, metadata={"help": "Tokens of the WordPiece vocabulary made for it."})


def scratch_model(script_args, texts, seed):
    """A random BERT and a WordPiece vocabulary made from the texts."""
    transformers.set_seed(seed)
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=script_args.scratch_vocab, show_progress=False)
    pieces.post_processor = BertProcessing(*((mark, pieces.token_to_id(mark)) for mark in ("[SEP]", "[CLS]")))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    max_length = script_args.max_length
    settings = special | {"model_max_length": max_length}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **settings)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=script_args.scratch_width,
        num_hidden_layers=script_args.scratch_layers,
        num_attention_heads=script_args.scratch_heads,
        intermediate_size=4 * script_args.scratch_width,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config), tokenizer


def tokenize_sides(pairs, tokenizer, label, max_length):
    """Pairs → token ids and labels: `chosen` has the given label, `rejected` the other."""
    from datasets import Dataset  # here, since they take seconds, and --help need not wait

    from trl_ppo.reward_model import encode

    texts = [*pairs["chosen"], *pairs["rejected"]]
    labels = [label] * len(pairs) + [1 - label] * len(pairs)
    return Dataset.from_dict({"input_ids": encode(tokenizer, texts, max_length=max_length), "labels": labels})


def main(
    script_args: ClassifierArguments, training_args: "transformers.TrainingArguments", model_args: "trl.ModelConfig"
):
    if model_args.use_peft:
        raise UserError("use_peft: true, but this recipe trains whole models; set use_peft: false")
    script_args.claim_output_dir(training_args, model_args)
    seed, max_length = training_args.seed, script_args.max_length
    if not script_args.scratch_layers:
        path = model_args.model_name_or_path
        check_length(path, check_model("model_name_or_path", path, "SequenceClassification"), max_length)
    train = load_either(script_args, script_args.dataset_train_split, seed, script_args.train_pairs)
    test = load_either(script_args, script_args.dataset_test_split, seed, script_args.test_pairs)

    if script_args.scratch_layers:
        model, tokenizer = scratch_model(script_args, train["chosen"][:] + train["rejected"][:], seed)
        print(f"from scratch: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    else:
        kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, **kwargs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model.config.id2label, model.config.label2id = LABELS, {name: label for label, name in LABELS.items()}

    label = 1 if script_args.preferred_label is None else script_args.preferred_label
    train_texts, test_texts = (tokenize_sides(pairs, tokenizer, label, max_length) for pairs in (train, test))
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, training_args, collator, train_texts, test_texts, processing_class=tokenizer)
    fit_out(trainer)
    announce(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    if trainer.is_world_process_zero():
        reward_model = trl_ppo.RewardModel(training_args.output_dir, label=LABELS[label], max_length=max_length)
        some = train.select(range(min(len(train), len(test))))
        report(reward_model, training_args.output_dir, train=some, test=test)
        print(f"classifier: {training_args.output_dir}")
    return trainer


if __name__ == "__main__":
    run(main, __file__)
