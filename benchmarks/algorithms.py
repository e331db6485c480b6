"""PPO, GRPO, RLOO, SFT or best-of-n? One task, one reward model and one judge for all, compared at equal KL.

    python benchmarks/algorithms.py --run ppo:learning_rate=3e-4 grpo:learning_rate=1e-4,kl_coef=0.05 --seeds 0 1 2
    python benchmarks/algorithms.py --run sft:learning_rate=3e-4 best_of_n
    python benchmarks/algorithms.py --report

Real IMDB: the sentiment recipe's variant `scratch`, whose models have to be there (see its header). A run is the recipe
itself with `--algorithm` and the settings named; `ppo_own_critic` is PPO with a critic that starts from the reward
model, `sft` fine-tunes on the positive training reviews themselves, and `best_of_n` picks among samples of the base.
Every few rollouts the policy continues the same held-out prompts: score by the reward model, share of positive ones by
a judge that training never saw, and KL to where it started. Seconds are those of one thread's CPU time in training,
without evaluations, so that other work on the machine counts little.

Each run leaves one JSON in `runs/scratch/algorithms`; `--report` adds those to the ones in
`benchmarks/algorithms/scratch.json` and renders them all as a table and a figure next to it. A run that is in either
place is not made again, so that a comparison can be spread over days. A run ends early once its KL has passed 20 nats
at two evaluations in a row: beyond, no figure of the report is read.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from benchmarks import algorithms_report  # noqa: E402

FAMILIES = {  # by variant: prompts and how to cut them, the judge, completions between two evaluations, levels of KL
    "scratch": ("data/imdb/prompts", (2, 8), "runs/scratch/judge", 640, (6.0, 8.0, 10.0)),
    "tiny": ("data/toy_reviews/prompts", None, "data_prep.toy_reviews:lexicon_score", 256, (4.0, 5.0, 6.0)),
}
SETTINGS = {  # what each algorithm's name stands for, before the settings of a run
    "ppo": {},
    "ppo_own_critic": {"value_model_path": "runs/{family}/reward"},
    "grpo": {"algorithm": "grpo", "num_iterations": 1},
    "rloo": {"algorithm": "rloo", "num_iterations": 1},
}
FAR = 20.0  # nats
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]  # of best-of-n


class Evaluator:
    """Scores of a policy on held-out prompts, by copies of the models, so that training sees nothing of it.

    The same prompts and random numbers at each evaluation.
    """

    def __init__(self, family, n_prompts):
        from transformers import AutoTokenizer

        from eval.compare import load_with_logprobs
        from models_and_data import load_split, prompt_cutter
        from rewards import find_function
        from trl_ppo import RewardModel

        prompts, tokens, judge, *_ = FAMILIES[family]
        base = f"runs/{family}/sft"
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.prompts = load_split(prompts, "test", ["prompt"])["prompt"][:n_prompts]
        if tokens:
            self.prompts = list(map(prompt_cutter(self.tokenizer, *tokens, seed=0), self.prompts))
        self.policy, self.base = (load_with_logprobs(base, temperature=1.0) for _ in range(2))
        judge = find_function("judge", judge) if ":" in judge else RewardModel(judge)
        self.judges = {"reward": RewardModel(f"runs/{family}/reward"), "judge": judge}

    def __call__(self, model):
        """Means over the prompts of `model`'s completions: score, share positive by the judge, KL in nats, length."""
        import torch

        weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("critic.")}
        self.policy.load_state_dict(weights)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            ids = self.sample(self.prompts)
            kl = self.logprobs(self.policy, "the policy", ids) - self.logprobs(self.base, "the base", ids)
        texts = self.tokenizer.batch_decode([row for _, row in ids], skip_special_tokens=True)
        scores = {name: judge(prompts=self.prompts, completions=texts) for name, judge in self.judges.items()}
        n = len(texts)
        return {
            "kl": kl.mean().item(),
            "reward": sum(scores["reward"]) / n,
            "judge": sum(score > 0 for score in scores["judge"]) / n,
            "length": sum(len(row) for _, row in ids) / n,
        }

    def sample(self, prompts, batch=128):
        """`(prompt ids, completion ids)` of each prompt."""
        from transformers import GenerationConfig

        from eval.loading import cut_after_eos
        from trl_ppo.cpu import sample

        end, rows = self.tokenizer.eos_token_id, []
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=24, eos_token_id=end, pad_token_id=end)
        for start in range(0, len(prompts), batch):
            inputs = self.tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
            made = self.policy.generate(**inputs, generation_config=config, custom_generate=sample)
            width = inputs["input_ids"].size(1)
            for mask, ids in zip(inputs["attention_mask"], made.tolist(), strict=True):
                rows.append((ids[width - int(mask.sum()) : width], cut_after_eos(ids[width:], [end])))
        return rows

    def logprobs(self, model, title, ids, batch=128):
        """Log-probability of each completion, in nats per completion."""
        from eval.generation import sequence_logprobs

        settings = argparse.Namespace(batch_size=batch)
        return sequence_logprobs(model, *zip(*ids, strict=True), self.tokenizer.eos_token_id, settings, title)


def curve_callback(points, evaluate, steps, completions):
    """A callback that adds to `points` before training and after every `steps` optimiser steps."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        seconds, since = 0.0, 0.0

        def measure(self, state, model):
            self.seconds += time.process_time() - self.since if state.global_step else 0.0
            model = getattr(model, "module", model)
            points.append(
                {"episodes": state.global_step // steps * completions, "seconds": self.seconds} | evaluate(model)
            )
            print(json.dumps(points[-1]), flush=True)
            self.since = time.process_time()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.measure(state, model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % steps == 0:
                self.measure(state, model)
                control.should_training_stop |= all(point["kl"] > FAR for point in points[-2:])

    return Curve()


def train(family, name, settings, seed, folder, n_prompts):
    """One run of an algorithm of `SETTINGS`, by the recipe; the points of its curve, and what it logged."""
    from trl import ModelConfig

    import sentiment_gpt2_ppo as recipe
    from command_line import parse
    from group_trainers import make_trainer
    from recipe_args import PPOArguments
    from trl_ppo import PPOConfig
    from trl_ppo.doctor import Doctor

    start = algorithms_report.STARTS[family] if name.startswith("ppo") else {}
    settings = (
        start | SETTINGS[name] | settings | {"seed": seed, "output_dir": str(folder), "overwrite_output_dir": "true"}
    )
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value).format(family=family))]
    parsed = parse(recipe.__file__, PPOArguments, PPOConfig, ModelConfig, args=["--config", family, *words])
    if name == "ppo":
        parsed[1].value_model_path = None  # whatever the recipe's own critic is
    rollout, every, points = parsed[1].generation_batch_size, FAMILIES[family][3], []
    steps = every // rollout * parsed[1].steps_per_rollout
    curve = curve_callback(points, Evaluator(family, n_prompts), steps, every)

    def make_trainer_with_curve(*args, callbacks, **kwargs):
        return make_trainer(*args, callbacks=[*callbacks, curve], **kwargs)

    try:
        recipe.make_trainer = make_trainer_with_curve
        trainer = recipe.main(*parsed)
    finally:
        recipe.make_trainer = make_trainer
    wanted = ("val/explained_variance", "objective/kl", "objective/kl_coef")
    logged = {key: [round(row[key], 4) for row in trainer.state.log_history if key in row] for key in wanted}
    doctors = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Doctor)]
    return points, logged | {"doctor": sorted(doctors[0].said) if doctors else None}


def fine_tune(family, settings, seed, folder, n_prompts, batch=128):
    """SFT of the same model on the positive reviews' beginnings, as long as prompt and completion together."""
    from trl import SFTConfig, SFTTrainer

    from models_and_data import load_split

    texts = positive_beginnings(load_split("data/imdb/pairs", "train", ["chosen"]))
    every, points = FAMILIES[family][3], []
    config = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        max_length=32,
        per_device_train_batch_size=batch,
        max_steps=6400 // batch,
        lr_scheduler_type="linear",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        learning_rate=float(settings.get("learning_rate", 3e-4)),
    )
    curve = curve_callback(points, Evaluator(family, n_prompts), every // batch, every)
    SFTTrainer(f"runs/{family}/sft", args=config, train_dataset=texts, callbacks=[curve]).train()
    return points, {}


def positive_beginnings(pairs):
    """The first 300 characters of the positive reviews."""
    return pairs.map(lambda row: {"text": row["chosen"][:300]}, remove_columns=pairs.column_names)


def best_of_n(family, seed, n_prompts):
    """The expected result of picking the best of n samples of the base by the reward, for every n of `SIZES`."""
    import numpy as np
    import torch

    from eval.best_of_n import expected_best, kl_bound

    evaluator, started = Evaluator(family, n_prompts), time.process_time()
    torch.manual_seed(seed)
    scores = {name: [] for name in evaluator.judges}
    for _ in range(max(SIZES)):
        texts = evaluator.tokenizer.batch_decode([c for _, c in evaluator.sample(evaluator.prompts)])
        for name, judge in evaluator.judges.items():
            scores[name].append(judge(prompts=evaluator.prompts, completions=texts))
    rewards, judged = np.array(scores["reward"]).T, np.array(scores["judge"]).T > 0
    seconds = (time.process_time() - started) / max(SIZES) / n_prompts
    return [
        {
            "n": n,
            "kl": kl_bound(n),
            "seconds": seconds * n,  # for each completion that is wanted
            "reward": expected_best(rewards, rewards, n).mean(),
            "judge": expected_best(rewards, judged, n).mean(),
        }
        for n in SIZES
    ], {}


def run(family, name, settings, seed, path, n_prompts):
    """One run, to its JSON."""
    from eval.machine import git_commit
    from eval.provenance import peak_memory
    from eval.report import write_atomically

    folder, started = path.with_suffix(""), time.time()
    if name == "best_of_n":
        points, logged = best_of_n(family, seed, n_prompts)
    elif name == "sft":
        points, logged = fine_tune(family, settings, seed, folder, n_prompts)
    else:
        points, logged = train(family, name, settings, seed, folder, n_prompts)
    shutil.rmtree(folder, ignore_errors=True)  # nothing but what this run has written
    result = {
        "family": family,
        "algorithm": name,
        "settings": settings,
        "seed": seed,
        "n_prompts": n_prompts,
        "models": fingerprint(family),
        "points": points,
        "logged": logged,
        "peak_memory_gb": round(peak_memory()["process"] / 1024**3, 3),
        "wall_seconds": round(time.time() - started, 1),
        "commit": (git_commit() or "")[:7],
    }
    write_atomically(path, json.dumps(result) + "\n")


def fingerprint(family):
    """Of the models that every run of a family starts from: runs with others are not compared with these."""
    digest = hashlib.sha256()
    for path in sorted(Path("runs", family).glob("*/model.safetensors")):
        if path.parent.name in ("sft", "reward", "judge"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def parse_run(text):
    """`grpo:learning_rate=1e-4,kl_coef=0.05` → the name and its settings."""
    name, _, settings = text.partition(":")
    if name not in [*SETTINGS, "sft", "best_of_n"]:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join([*SETTINGS, 'sft', 'best_of_n'])}")
    pairs = [each.partition("=") for each in re.split(r",(?![^[]*])", settings) if each]  # but not within a list
    return name, {key: value for key, _, value in pairs}


def path_of(family, name, settings, seed):
    """Where a run's JSON is."""
    words = [name, *(f"{key}={value}" for key, value in settings.items()), str(seed)]
    return Path("runs") / family / "algorithms" / (re.sub(r"[^\w.=+-]+", "_", "-".join(words)) + ".json")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=parse_run, nargs="+", default=[], metavar="ALGORITHM[:KEY=VALUE,…]")
    parser.add_argument("--family", choices=FAMILIES, default="scratch", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n_prompts", type=int, default=512, help="held-out ones (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="render what is there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    os.chdir(ROOT)
    folder, results = Path("runs") / args.family / "algorithms", Path("benchmarks") / "algorithms"
    done = algorithms_report.collect(folder, results / f"{args.family}.json")
    for seed in args.seeds:
        for name, settings in args.run:
            path = path_of(args.family, name, settings, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or algorithms_report.key(name, settings, seed) in done:
                continue
            if args.here:
                run(args.family, name, settings, seed, path, args.n_prompts)
                continue
            word = ":".join([name, ",".join(f"{key}={value}" for key, value in settings.items())])
            command = [sys.executable, __file__, "--family", args.family, "--run", word, "--seeds", str(seed)]
            command += ["--n_prompts", str(args.n_prompts), "--here"]
            subprocess.run(command, check=False)  # the next ones do not wait for one that fails
    if args.report:
        print(algorithms_report.write(folder, results / args.family, FAMILIES[args.family][-1]))


if __name__ == "__main__":
    main()
