"""Reddit summaries, step 3 of 3: PPO towards summaries that the reward model prefers (LoRA).

    accelerate launch recipes/qwen_summarize_ppo.py
    accelerate launch recipes/qwen_summarize_ppo.py --config recipes/qwen_summarize_ppo_qlora.yaml

Policy, reference and value head share one base model; a summary without an end token costs `missing_eos_penalty`. The
penalties are there to mix in, by `reward_weights`: the reward model's score, words, repeated trigrams. Watch
`objective/scores` rise while `objective/kl` stays bounded. Writes `output_dir`: adapter, tokenizer and critic;
`python -m eval.predict --model runs/qwen_summarize_ppo --title "…" --post "…"` prints a summary.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from ppo_config import PPOConfig
from ppo_trainer import PPOTrainer
from recipe_args import RecipeArguments, check_weights, load_prompts, one_line_errors, parse, require_path
from rewards import RewardModel, length_penalty, repetition_penalty
from run_support import merge_adapter


@dataclass(kw_only=True)
class PPOArguments(RecipeArguments):
    """What this recipe takes beside the trainer's own settings."""

    reward_model: str = field(metadata={"help": "Sequence classifier that scores post and summary: Hub id or folder."})
    reward_max_length: int = field(default=640, metadata={"help": "Tokens of post and summary that it reads."})
    reward_dtype: str = field(default="bfloat16", metadata={"help": "Of its weights; float32 where memory allows."})
    max_prompt_tokens: int = field(default=512, metadata={"help": "Leave out longer posts."})
    test_prompts: int = field(default=200, metadata={"help": "Held-out posts to evaluate on, from the first on."})


def main(script_args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig):
    script_args.check(model_args)
    check_weights(training_args, ["the reward model", "length_penalty", "repetition_penalty"])
    path = require_path("model_name_or_path", model_args.model_name_or_path)
    reward_path = require_path("reward_model", script_args.reward_model, kind="reward model")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    train = load_prompts(script_args, script_args.dataset_train_split, tokenizer)
    test = None
    if training_args.eval_strategy != "no":
        test = load_prompts(script_args, script_args.dataset_test_split, tokenizer, script_args.test_prompts)

    reward_model = RewardModel(
        reward_path,
        max_length=script_args.reward_max_length,
        dtype=script_args.reward_dtype,
        batch_size=training_args.per_device_train_batch_size,
    )
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    trainer = PPOTrainer(
        model=path,
        reward_funcs=[reward_model, length_penalty, repetition_penalty],
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
    trainer.accelerator.print(f"adapter, tokenizer and critic: {training_args.output_dir}")
    if script_args.merge_adapter and trainer.is_world_process_zero():
        print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    with one_line_errors():
        main(*parse(__file__, PPOArguments, PPOConfig, ModelConfig))
