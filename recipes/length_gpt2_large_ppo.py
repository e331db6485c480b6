"""Length, PPO: GPT-2 Large learns to answer in few words.

    python data_prep/synthetic_instruct.py
    accelerate launch recipes/length_gpt2_large_ppo.py
    accelerate launch recipes/length_gpt2_large_ppo.py --config recipes/length_gpt2_large_ppo_scratch.yaml

The score of an answer is minus the number of its words, `reward_weights` times; with `reward_model` a classifier's
score is added, so that answers get short but stay answers. Watch `completions/mean_length` fall while `objective/kl`
stays bounded, and `objective/missing_eos`: an answer that is cut off is not short. Writes `output_dir`: policy (or
adapter), tokenizer and critic.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from ppo_config import PPOConfig
from ppo_trainer import PPOTrainer
from recipe_args import RecipeArguments, check_weights, load_prompts, one_line_errors, parse, require_path
from rewards import RewardModel, length_penalty
from run_support import merge_adapter


@dataclass(kw_only=True)
class PPOArguments(RecipeArguments):
    """What this recipe takes beside the trainer's own settings."""

    reward_model: str | None = field(
        default=None, metadata={"help": "Classifier to mix in: Hub id or folder; reward_weights then has two numbers."}
    )
    max_prompt_tokens: int = field(default=256, metadata={"help": "Leave out longer prompts."})
    test_prompts: int = field(default=256, metadata={"help": "Held-out prompts to evaluate on, from the first on."})


def main(script_args: PPOArguments, training_args: PPOConfig, model_args: ModelConfig):
    script_args.check(model_args)
    check_weights(training_args, ["length_penalty"] + ["the classifier"] * (script_args.reward_model is not None))
    path = require_path("model_name_or_path", model_args.model_name_or_path)
    reward_funcs = [length_penalty]
    if script_args.reward_model is not None:
        require_path("reward_model", script_args.reward_model, kind="reward model")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    train = load_prompts(script_args, script_args.dataset_train_split, tokenizer)
    test = None
    if training_args.eval_strategy != "no":
        test = load_prompts(script_args, script_args.dataset_test_split, tokenizer, script_args.test_prompts)
    if script_args.reward_model is not None:
        reward_funcs.append(RewardModel(script_args.reward_model))

    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    trainer = PPOTrainer(
        model=path,
        reward_funcs=reward_funcs,
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
