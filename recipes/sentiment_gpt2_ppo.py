"""Sentiment, step 3 of 3: PPO towards reviews that a sentiment classifier likes.

    accelerate launch recipes/sentiment_gpt2_ppo.py
    accelerate launch recipes/sentiment_gpt2_ppo.py --config tiny

The model is given the first few tokens of a review and continues it; the score is the classifier's logit. `rewards` in
the YAML gives each reward its weight. To add a function of your own, add one entry there:

    rewards: {reward_model: 1.0, my_rewards.py:no_shouting: 0.5}

Watch `objective/scores` rise while `objective/kl` stays bounded. Writes `output_dir`: policy, tokenizer and critic.
"""

import transformers
import trl

import trl_ppo
from command_line import run
from group_trainers import make_trainer
from models_and_data import check_model, init_kwargs, load_prompts, merge_adapter
from recipe_args import PPOArguments
from terminal import announce


def main(script_args: PPOArguments, training_args: "trl_ppo.PPOConfig", model_args: "trl.ModelConfig"):
    script_args.check(training_args, model_args)
    script_args.claim_output_dir(training_args, model_args)
    path = model_args.model_name_or_path
    check_model("model_name_or_path", path, "CausalLM")

    # 1. Prompts: the first few tokens of each review.
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    train = load_prompts(script_args, script_args.dataset_train_split, tokenizer, training_args.seed)
    test = None
    if training_args.eval_strategy != "no":
        test_split, limit = script_args.dataset_test_split, script_args.test_prompts
        test = load_prompts(script_args, test_split, tokenizer, training_args.seed, limit)

    # 2. Policy, reference, critic and rewards.
    training_args.model_init_kwargs = init_kwargs(training_args, model_args)
    trainer = make_trainer(
        script_args.algorithm,
        script_args.group_size,
        model=path,
        reward_funcs=script_args.load_rewards(training_args, model_args),
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        callbacks=script_args.callbacks(),
        peft_config=trl.get_peft_config(model_args),
        quantization_config=trl.get_quantization_config(model_args),
    )

    # 3. Train, and save.
    announce(trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if script_args.dry_run:
        trainer.accelerator.print("dry run: all of this works; nothing is saved")
        return trainer
    trainer.save_model()
    trainer.save_state()
    written = "policy, tokenizer and critic" if script_args.algorithm == "ppo" else "policy and tokenizer"
    trainer.accelerator.print(f"{written}: {training_args.output_dir}")
    if script_args.merge_adapter and trainer.is_world_process_zero():
        print(f"merged model: {merge_adapter(training_args.output_dir, model_args.dtype)}")
    return trainer


if __name__ == "__main__":
    run(main, __file__)
