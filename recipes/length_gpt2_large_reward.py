"""Length, the reward model: DeBERTa-v3 learns which of two answers to an instruction is the better one.

    python data_prep/synthetic_instruct.py
    accelerate launch recipes/length_gpt2_large_reward.py
    accelerate launch recipes/length_gpt2_large_reward.py --config scratch

The wiring is that of `qwen_summarize_reward.py`: pairs of (`prompt`, `chosen`, `rejected`), pairwise loss with TRL's
RewardTrainer. `length_gpt2_large_ppo.py` can add its score to the length penalty, to keep short answers
useful. Writes `output_dir`: a sequence classifier with one label, its tokenizer, `reward_report.json` and
`reward_report.svg`.
"""

from command_line import run
from qwen_summarize_reward import main

if __name__ == "__main__":
    run(main, __file__)
