"""Sentiment, step 1 of 3: a language model of movie reviews (supervised fine-tuning with TRL's SFTTrainer).

    accelerate launch recipes/sentiment_gpt2_sft.py
    accelerate launch recipes/sentiment_gpt2_sft.py --config tiny

Fine-tunes `model_name_or_path`, or trains a byte-level BPE and a GPT-2 from scratch when `scratch_layers` is set. The
held-out loss is printed at the end; each YAML's header says what to expect. Writes `output_dir`: model and tokenizer.
"""

from dataclasses import dataclass, field

import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from command_line import run
from models_and_data import check_model, fit_out, init_kwargs, load_split, merge_adapter
from recipe_args import RecipeArguments
from terminal import announce
from trl_ppo.inputs import UserError

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(kw_only=True)
class SFTArguments(RecipeArguments):
    """What this recipe takes besides TRL's own settings."""

    scratch_layers: int = field(default=0, metadata={"help": "Layers of a GPT-2 made from scratch; 0 fine-tunes."})
    scratch_width: int = field(default=256, metadata={"help": "Its hidden size."})
    scratch_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    scratch_vocab: int = field(default=4096, metadata={"help": "Tokens of the byte-level BPE trained for it."})
    first_characters: int | None = field(
        default=None,
        metadata={"help": "Keep only the beginning of each text: faster where `max_length` cuts it anyway."},
    )
    test_rows: int = field(default=1000, metadata={"help": "Held-out texts to evaluate on, from the first on."})


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE of `vocab_size` tokens; the pad token is not the end token, so that the end is learnt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings = {"vocab_size": vocab_size, "special_tokens": [END, PAD], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    backend.train_from_iterator(texts, trainer)
    special = {"eos_token": END, "bos_token": END, "pad_token": PAD}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def scratch_model(script_args, tokenizer, max_length):
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=max_length,
        n_embd=script_args.scratch_width,
        n_layer=script_args.scratch_layers,
        n_head=script_args.scratch_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.GPT2LMHeadModel(config)


def refuse_unused_model(path, layers):
    """UserError where a model is named, and another is made from scratch."""
    if path is not None:
        raise UserError(
            f"model_name_or_path: {path!r} would not be used, since scratch_layers: {layers} makes a new model; to "
            "fine-tune it give --scratch_layers 0"
        )


def load_texts(script_args, split, column):
    """A dataset with nothing but the column of text; a `prompt` and its `completion` make one text."""
    names = load_split(script_args.dataset_name, split, config=script_args.dataset_config).column_names
    parts = ["prompt", "completion"] if column not in names and {"prompt", "completion"} <= set(names) else [column]
    data = load_split(script_args.dataset_name, split, parts, script_args.dataset_config)
    if parts != [column]:
        data = data.map(lambda row: {column: row["prompt"] + row["completion"]}, desc="Joining prompts")
    data = data.select_columns(column)
    if script_args.first_characters is None:
        return data
    return data.map(lambda row: {column: row[column][: script_args.first_characters]}, desc="Cutting texts")


def main(script_args: SFTArguments, training_args: "trl.SFTConfig", model_args: "trl.ModelConfig"):
    script_args.check(model_args)
    script_args.claim_output_dir(training_args, model_args)
    column = training_args.dataset_text_field
    if script_args.scratch_layers:
        refuse_unused_model(model_args.model_name_or_path, script_args.scratch_layers)
    else:
        check_model("model_name_or_path", model_args.model_name_or_path, "CausalLM")
    train = load_texts(script_args, script_args.dataset_train_split, column)
    test = load_texts(script_args, script_args.dataset_test_split, column)
    test = test.select(range(min(len(test), script_args.test_rows)))
    if script_args.scratch_layers:
        transformers.set_seed(training_args.seed)
        tokenizer = train_tokenizer(train[column], script_args.scratch_vocab)
        model = scratch_model(script_args, tokenizer, training_args.max_length)
        print(f"from scratch: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    else:
        model = model_args.model_name_or_path
        training_args.model_init_kwargs = init_kwargs(training_args, model_args)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    trainer = trl.SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
        quantization_config=trl.get_quantization_config(model_args),
    )
    fit_out(trainer)
    announce(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"held-out loss {metrics['eval_loss']:.3f} nats per token, n = {len(trainer.eval_dataset)} texts")
        print(f"model and tokenizer: {training_args.output_dir}")
    if script_args.merge_adapter and trainer.is_world_process_zero():
        print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    run(main, __file__)
