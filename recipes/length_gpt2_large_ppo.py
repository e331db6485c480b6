"""Length, PPO: GPT-2 Large learns to answer in few words.

    python data_prep/synthetic_instruct.py
    accelerate launch recipes/length_gpt2_large_ppo.py
    accelerate launch recipes/length_gpt2_large_ppo.py --config scratch

The wiring is that of `qwen_summarize_ppo.py`. The score of an answer falls with the number of its words; add
`reward_model` to the YAML's `rewards` to keep short answers useful. Watch `completions/mean_length` fall while
`objective/kl` stays bounded, and `objective/missing_eos`: an answer that is cut off is not short. Writes `output_dir`:
policy (or adapter), tokenizer and critic.
"""

from command_line import run
from qwen_summarize_ppo import main

if __name__ == "__main__":
    run(main, __file__)
