"""Reddit summaries, step 1 of 3: Qwen learns from people's TL;DRs (LoRA, TRL's SFTTrainer).

    accelerate launch recipes/qwen_summarize_sft.py
    accelerate launch recipes/qwen_summarize_sft.py --config qlora

The dataset holds posts (`prompt`, ending in `TL;DR:`) and summaries (`completion`); the loss counts the summary's
tokens alone, unless `completion_only_loss: false`. A dataset of `text` makes it language modelling, with which a small
Qwen2 from scratch begins (`scratch_layers`, and `scratch_vocab` for a byte-level BPE of its own). Prints the held-out
loss before and after, and a summary. Writes `output_dir`: the adapter, its tokenizer and, with `merge_adapter`, the
whole model in `merged`, where PPO starts.
"""

from dataclasses import dataclass, field

import transformers
import trl

from command_line import run
from models_and_data import check_model, fit_out, init_kwargs, load_split, merge_adapter
from recipe_args import RecipeArguments
from sentiment_gpt2_sft import refuse_unused_model, train_tokenizer
from terminal import announce


@dataclass(kw_only=True)
class SFTArguments(RecipeArguments):
    """What this recipe takes besides TRL's own settings."""

    test_rows: int = field(default=500, metadata={"help": "Held-out posts to evaluate on, from the first on."})
    scratch_layers: int = field(default=0, metadata={"help": "Layers of a Qwen2 made from scratch; 0 fine-tunes."})
    scratch_width: int = field(default=128, metadata={"help": "Its hidden size."})
    scratch_heads: int = field(default=4, metadata={"help": "Its attention heads, half as many for keys and values."})
    scratch_vocab: int | None = field(
        default=None,
        metadata={"help": "Tokens of a byte-level BPE trained for it; without it the model's own tokenizer."},
    )


def scratch_model(script_args, tokenizer, max_length):
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=script_args.scratch_width,
        intermediate_size=4 * script_args.scratch_width,
        num_hidden_layers=script_args.scratch_layers,
        num_attention_heads=script_args.scratch_heads,
        num_key_value_heads=max(1, script_args.scratch_heads // 2),
        max_position_embeddings=max(1024, 2 * max_length),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.Qwen2ForCausalLM(config)


def load_posts(script_args, split, text):
    """A dataset with nothing but posts and summaries, or with whole texts where it holds those alone."""
    names = load_split(script_args.dataset_name, split, config=script_args.dataset_config).column_names
    columns = [text] if text in names and "prompt" not in names else ["prompt", "completion"]
    data = load_split(script_args.dataset_name, split, columns, script_args.dataset_config)
    return data.select_columns(columns)


def main(script_args: SFTArguments, training_args: "trl.SFTConfig", model_args: "trl.ModelConfig"):
    script_args.check(model_args)
    script_args.claim_output_dir(training_args, model_args)
    path, text = model_args.model_name_or_path, training_args.dataset_text_field
    own_tokenizer = script_args.scratch_layers and script_args.scratch_vocab
    if own_tokenizer:
        refuse_unused_model(path, script_args.scratch_layers)
    else:
        check_model("model_name_or_path", path, None if script_args.scratch_layers else "CausalLM")
    train = load_posts(script_args, script_args.dataset_train_split, text)
    test = load_posts(script_args, script_args.dataset_test_split, text)
    test = test.select(range(min(len(test), script_args.test_rows)))
    if own_tokenizer:
        texts = (" ".join(row.values()) for row in train)
        tokenizer = train_tokenizer(texts, script_args.scratch_vocab)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if script_args.scratch_layers:
        transformers.set_seed(training_args.seed)
        model = scratch_model(script_args, tokenizer, training_args.max_length)
        print(f"from scratch: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    else:
        model = path
        training_args.model_init_kwargs = init_kwargs(training_args, model_args)

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
    before = None if training_args.resume_from_checkpoint else trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        started = "" if before is None else f"{before:.3f} → "
        print(f"held-out loss {started}{after:.3f} nats per token, n = {len(test)} posts")
        if "prompt" in test.column_names:
            print(f"a held-out summary: {summarize(trainer.model, tokenizer, test[0]['prompt'])}")
        print(f"model and tokenizer: {training_args.output_dir}")
        if script_args.merge_adapter:
            print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


def summarize(model, tokenizer, prompt):
    """The likeliest summary, token by token; up to 53 tokens, as long as the paper's."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=53, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    run(main, __file__)
