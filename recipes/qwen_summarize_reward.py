"""Reddit summaries, step 2 of 3: Qwen learns which of two summaries is better (LoRA, TRL's RewardTrainer).

    python data_prep/summarize_from_feedback.py
    accelerate launch recipes/qwen_summarize_reward.py
    accelerate launch recipes/qwen_summarize_reward.py --config qlora

Pairs of (`prompt`, `chosen`, `rejected`), pairwise loss; the score is read at the summary's end token. Adapter and
score head are both trained and both saved. Accuracy on train and test pairs is printed at the end. Writes `output_dir`:
the adapter with its head, the tokenizer, `reward_report.json` and `reward_report.svg`.
"""

from dataclasses import dataclass, field

import transformers
import trl

import trl_ppo
from command_line import run
from models_and_data import check_model, fit_out, init_kwargs, merge_adapter
from preferences import check_length, join_prompts, load_pairs, report, tokenize_pairs
from recipe_args import RecipeArguments
from terminal import announce


@dataclass(kw_only=True)
class RewardArguments(RecipeArguments):
    """What this recipe takes besides TRL's own settings."""

    train_pairs: int | None = field(default=None, metadata={"help": "Pairs to train on; default all."})
    test_pairs: int = field(default=2000, metadata={"help": "Held-out pairs to evaluate on, from the first on."})


def main(script_args: RewardArguments, training_args: "trl.RewardConfig", model_args: "trl.ModelConfig"):
    script_args.check(model_args)
    script_args.claim_output_dir(training_args, model_args)
    path, max_length = model_args.model_name_or_path, training_args.max_length
    check_length(path, check_model("model_name_or_path", path, "SequenceClassification"), max_length)

    # 1. Pairs: two texts that follow the same prompt, the better one and the other.
    data, config = script_args.dataset_name, script_args.dataset_config
    train = join_prompts(load_pairs(data, script_args.dataset_train_split, config, script_args.train_pairs))
    test = join_prompts(load_pairs(data, script_args.dataset_test_split, config, script_args.test_pairs))

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
        report(reward_model, training_args.output_dir, script_args.dataset_name, train=some, test=test)
        print(f"reward model: {training_args.output_dir}")
        if script_args.merge_adapter:
            print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    run(main, __file__)
