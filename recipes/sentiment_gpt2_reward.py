"""Sentiment, step 2 of 3: a reward model that prefers positive reviews (TRL's RewardTrainer), or a classifier of them.

    accelerate launch recipes/sentiment_gpt2_reward.py
    accelerate launch recipes/sentiment_gpt2_reward.py --config recipes/sentiment_gpt2_reward_tiny.yaml

The dataset holds pairs (`chosen`, `rejected`), or labelled reviews (`text`, `label`) that are paired here: one of
label `preferred_label` over one of the other. `loss: pairwise` trains on pairs; `loss: cross_entropy` fits the labels,
NEGATIVE and POSITIVE. The share of pairs that the model orders rightly is printed at the end, for either. Writes
`output_dir`: a sequence classifier, its tokenizer, `reward_report.json` and `reward_report.svg`.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

from preferences import center_scores, check_length, load_pairs, report, tokenize_pairs
from recipe_args import RecipeArguments, UserError, load_split, one_line_errors, parse, require_path
from rewards import RewardModel, encode
from run_support import keep_trainable, merge_adapter

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}


@dataclass(kw_only=True)
class RewardArguments(RecipeArguments):
    """What this recipe takes beside TRL's own settings."""

    loss: str = field(
        default="pairwise",
        metadata={"help": "Order pairs, or fit labels.", "choices": ["pairwise", "cross_entropy"]},
    )
    preferred_label: int = field(default=1, metadata={"help": "Label to prefer where the data is labelled reviews."})
    train_pairs: int | None = field(default=None, metadata={"help": "Pairs (labelled texts) to train on; default all."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})
    center_scores: bool = field(default=False, metadata={"help": "Afterwards, let the mean score of texts be 0."})
    scratch_layers: int = field(default=0, metadata={"help": "Layers of a BERT made from scratch; 0 fine-tunes."})
    scratch_width: int = field(default=128, metadata={"help": "Its hidden size."})
    scratch_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    scratch_vocab: int = field(default=8192, metadata={"help": "Tokens of the WordPiece vocabulary made for it."})


def pair_by_label(labelled, preferred_label, seed):
    """Labelled reviews → pairs: each of the preferred label over one of the other, matched at random."""
    labelled = labelled.shuffle(seed=seed)
    chosen = [row["text"] for row in labelled if row["label"] == preferred_label]
    rejected = [row["text"] for row in labelled if row["label"] == 1 - preferred_label]
    pairs = list(zip(chosen, rejected, strict=False))
    if not pairs:
        raise UserError(f"preferred_label: {preferred_label}: the data has no pair of labels 0 and 1")
    return Dataset.from_dict({"chosen": [c for c, _ in pairs], "rejected": [r for _, r in pairs]})


def load_either(script_args, split, seed, limit):
    """The first pairs of a split; those of labelled reviews are made here."""
    data = load_split(script_args.dataset_name, split, config=script_args.dataset_config)
    if {"text", "label"} <= set(data.column_names):
        pairs = pair_by_label(data, script_args.preferred_label, seed)
    else:
        pairs = load_pairs(script_args.dataset_name, split, script_args.dataset_config)
    return pairs.select(range(min(len(pairs), limit or len(pairs))))


def label_sides(pairs, preferred_label):
    """Pairs → labelled texts: chosen has the preferred label, rejected the other."""
    labels = [preferred_label] * len(pairs) + [1 - preferred_label] * len(pairs)
    return Dataset.from_dict({"text": [*pairs["chosen"], *pairs["rejected"]], "labels": labels})


def scratch_model(script_args, texts, max_length, seed):
    """A random BERT and a WordPiece vocabulary made from the texts; one label for pairs, two to be fitted."""
    set_seed(seed)
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=script_args.scratch_vocab, show_progress=False)
    pieces.post_processor = BertProcessing(*((mark, pieces.token_to_id(mark)) for mark in ("[SEP]", "[CLS]")))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=max_length, **special)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=script_args.scratch_width,
        num_hidden_layers=script_args.scratch_layers,
        num_attention_heads=script_args.scratch_heads,
        intermediate_size=4 * script_args.scratch_width,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1 if script_args.loss == "pairwise" else 2,
    )
    return BertForSequenceClassification(config), tokenizer


def pairwise_trainer(model, tokenizer, train, test, training_args, model_args):
    return RewardTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenize_pairs(train, tokenizer, training_args.max_length),
        eval_dataset=tokenize_pairs(test, tokenizer, training_args.max_length),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )


def classifier_trainer(model, tokenizer, train, test, training_args, preferred_label):
    """transformers' own Trainer, since TRL's knows pairs alone; the same texts, read the same way."""
    if isinstance(model, str):
        model = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=2, **training_args.model_init_kwargs
        )
    model.config.id2label, model.config.label2id = LABELS, {name: label for label, name in LABELS.items()}

    def tokenized(pairs):
        return label_sides(pairs, preferred_label).map(
            lambda batch: {"input_ids": encode(tokenizer, batch["text"], max_length=training_args.max_length)},
            batched=True,
            remove_columns=["text"],
            desc="Tokenizing texts",
        )

    collator = DataCollatorWithPadding(tokenizer)
    return Trainer(model, training_args, collator, tokenized(train), tokenized(test), processing_class=tokenizer)


def main(script_args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig):
    script_args.check(model_args)
    if script_args.loss == "cross_entropy" and model_args.use_peft:
        raise UserError("loss: cross_entropy trains whole models here; set use_peft: false, or loss: pairwise")
    seed, max_length = training_args.seed, training_args.max_length
    if not script_args.scratch_layers:
        path = require_path("model_name_or_path", model_args.model_name_or_path)
        check_length(path, max_length)
    train = load_either(script_args, script_args.dataset_train_split, seed, script_args.train_pairs)
    test = load_either(script_args, script_args.dataset_test_split, seed, script_args.test_pairs)

    if script_args.scratch_layers:
        model, tokenizer = scratch_model(script_args, train["chosen"][:] + train["rejected"][:], max_length, seed)
        print(f"from scratch: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    else:
        model, tokenizer = path, AutoTokenizer.from_pretrained(path)
        training_args.model_init_kwargs = {
            "dtype": model_args.dtype,
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
        }
    if script_args.loss == "pairwise":
        trainer = pairwise_trainer(model, tokenizer, train, test, training_args, model_args)
    else:
        trainer = classifier_trainer(model, tokenizer, train, test, training_args, script_args.preferred_label)
    keep_trainable(trainer.model)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    if trainer.is_world_process_zero():
        label = None if script_args.loss == "pairwise" else LABELS[script_args.preferred_label]
        reward_model = RewardModel(training_args.output_dir, label=label, max_length=max_length)
        some = train.select(range(min(len(train), len(test))))
        texts = some["chosen"][:] + some["rejected"][:] if script_args.center_scores else []
        center_scores(reward_model, texts, training_args.output_dir)
        report(reward_model, training_args.output_dir, train=some, test=test)
        print(f"reward model: {training_args.output_dir}")
        if script_args.merge_adapter:
            print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    with one_line_errors():
        main(*parse(__file__, RewardArguments, RewardConfig, ModelConfig))
