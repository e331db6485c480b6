"""Sentiment, step 3 of 3: PPO towards reviews that a sentiment classifier likes.

    accelerate launch recipes/sentiment_gpt2_ppo.py
    accelerate launch recipes/sentiment_gpt2_ppo.py --config recipes/sentiment_gpt2_ppo_tiny.yaml

The model is given the first few tokens of a review and continues it; the score is the classifier's logit, to which
`reward_weights` mixes a price of words and of repeated trigrams (0 by default). To use a reward of your own, write a
function with this signature, put it into `reward_funcs` in `main`, and give it a weight:

    def my_reward(prompts, completions, **columns) -> list[float]: ...

Watch `objective/scores` rise while `objective/kl` stays bounded. Writes `output_dir`: policy, tokenizer and critic.
"""

import random
from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from ppo_config import PPOConfig
from ppo_trainer import PPOTrainer
from recipe_args import RecipeArguments, UserError, check_weights, load_split, one_line_errors, parse, require_path
from rewards import RewardModel, length_penalty, repetition_penalty
from run_support import merge_adapter


@dataclass(kw_only=True)
class PPOArguments(RecipeArguments):
    """What this recipe takes beside the trainer's own settings."""

    reward_model: str = field(metadata={"help": "Sequence classifier that scores the review: Hub id or folder."})
    reward_label: str | None = field(default=None, metadata={"help": "Which of its labels, if it has several."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column to take prompts from."})
    prompt_tokens: list[int] | None = field(
        default=None, metadata={"help": "Cut each prompt to a random number of tokens: least and most."}
    )
    min_prompt_characters: int = field(default=1, metadata={"help": "Leave out shorter texts."})
    min_prompt_tokens: int = field(default=1, metadata={"help": "The same in tokens, before they are cut."})
    test_prompts: int = field(default=512, metadata={"help": "Held-out prompts to evaluate on, from the first on."})


def load_prompts(script_args, split, tokenizer, seed):
    """A dataset with the column `prompt`: whole, or its first few tokens, their number drawn with `seed`."""
    column = script_args.prompt_column
    data = load_split(script_args.dataset_name, split, columns=[column], config=script_args.dataset_config)

    def tokens(row):
        return tokenizer(row[column], add_special_tokens=False)["input_ids"]

    def is_long_enough(row):
        if len(row[column]) < script_args.min_prompt_characters:
            return False
        return script_args.min_prompt_tokens == 1 or len(tokens(row)) >= script_args.min_prompt_tokens

    data = data.filter(is_long_enough, desc="Filtering prompts")
    if not len(data):
        raise UserError(f"dataset {script_args.dataset_name!r}: no text of {split!r} is as long as min_prompt_… wants")
    rng = random.Random(seed)

    def cut(row):
        if script_args.prompt_tokens is None:
            return {"prompt": row[column]}
        return {"prompt": tokenizer.decode(tokens(row)[: rng.randint(*script_args.prompt_tokens)])}

    return data.map(cut, desc="Cutting prompts", load_from_cache_file=False)


def main(script_args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig):
    script_args.check(model_args)
    check_weights(training_args, ["the classifier", "length_penalty", "repetition_penalty"])
    path = require_path("model_name_or_path", model_args.model_name_or_path)
    reward_path = require_path("reward_model", script_args.reward_model, kind="reward model")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    train = load_prompts(script_args, script_args.dataset_train_split, tokenizer, training_args.seed)
    test = None
    if training_args.eval_strategy != "no":
        test = load_prompts(script_args, script_args.dataset_test_split, tokenizer, training_args.seed)
        test = test.select(range(min(len(test), script_args.test_prompts)))

    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    trainer = PPOTrainer(
        model=path,
        reward_funcs=[RewardModel(reward_path, label=script_args.reward_label), length_penalty, repetition_penalty],
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.print(f"policy, tokenizer and critic: {training_args.output_dir}")
    if script_args.merge_adapter and trainer.is_world_process_zero():
        print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    with one_line_errors():
        main(*parse(__file__, PPOArguments, PPOConfig, ModelConfig))
