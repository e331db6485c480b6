"""Reddit summaries, step 2 of 3: Qwen learns which of two summaries is better (LoRA, TRL's RewardTrainer).

    python data_prep/summarize_from_feedback.py
    accelerate launch recipes/qwen_summarize_reward.py
    accelerate launch recipes/qwen_summarize_reward.py --config recipes/qwen_summarize_reward_qlora.yaml

Pairs of (`prompt`, `chosen`, `rejected`), pairwise loss; the score is read at the summary's end token. Adapter and
score head are both trained and both saved. Accuracy on train and test pairs is printed at the end. Writes `output_dir`:
the adapter with its head, the tokenizer, `reward_report.json` and `reward_report.svg`.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

from preferences import center_scores, check_length, load_pairs, report, tokenize_pairs
from recipe_args import RecipeArguments, one_line_errors, parse, require_path
from rewards import RewardModel
from run_support import keep_trainable, merge_adapter


@dataclass(kw_only=True)
class RewardArguments(RecipeArguments):
    """What this recipe takes beside TRL's own settings."""

    train_pairs: int | None = field(default=None, metadata={"help": "Pairs to train on; default all."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})
    center_scores: bool = field(default=False, metadata={"help": "Afterwards, let the mean score of `chosen` be 0."})


def main(script_args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig):
    script_args.check(model_args)
    path = require_path("model_name_or_path", model_args.model_name_or_path)
    check_length(path, training_args.max_length)
    train = load_pairs(script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config)
    test = load_pairs(script_args.dataset_name, script_args.dataset_test_split, script_args.dataset_config)
    train = train.select(range(min(len(train), script_args.train_pairs or len(train))))
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
        train_dataset=tokenize_pairs(train, tokenizer, training_args.max_length),
        eval_dataset=tokenize_pairs(test, tokenizer, training_args.max_length),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    keep_trainable(trainer.model)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    if trainer.is_world_process_zero():
        reward_model = RewardModel(training_args.output_dir, max_length=training_args.max_length)
        some = train.select(range(min(len(train), len(test))))
        center_scores(reward_model, some["chosen"][:] if script_args.center_scores else [], training_args.output_dir)
        report(reward_model, training_args.output_dir, train=some, test=test)
        print(f"reward model: {training_args.output_dir}")
        if script_args.merge_adapter:
            print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    with one_line_errors():
        main(*parse(__file__, RewardArguments, RewardConfig, ModelConfig))
