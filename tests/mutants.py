"""Does a test fail when a line of the PPO code is wrong? `make mutants` breaks one line at a time and says.

Each mutant is a line's text, what it becomes, and the tests that should notice. The text stands in exactly one file of
`recipes/`, wherever that is, so the list outlives a move; a text that is no longer found is an error. The libraries are
imported once, and each mutant is tried in a fork of that process, on a copy of the project.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one mutant; a hang is noticed too

TRAINER, RANKS, RESUME = "tests/test_ppo_trainer.py", "tests/test_ppo_ranks.py", "tests/test_ppo_resume.py"
FORMULAS, LORA, DECODING = "tests/test_ppo_formulas.py", "tests/test_ppo_lora.py", "tests/test_decoding.py"


class Mutant(NamedTuple):
    """A fault: the text it replaces, the tests to run, and, if no test can fail on it, why."""

    fault: str
    old: str
    new: str
    tests: str
    equivalent: str | None = None


MUTANTS = [
    Mutant("epsilon_low and epsilon_high swapped", "ratio.clamp(1 - epsilon_low, 1 + epsilon_high)",
           "ratio.clamp(1 - epsilon_high, 1 + epsilon_low)", FORMULAS),
    Mutant("the value head ignores the seed", "return ValueHead(config.hidden_size, self.args.seed)",
           "return ValueHead(config.hidden_size)", TRAINER),
    Mutant("the flag that skips epochs survives into the next rollout",
           "self._rollout, self._skip_epochs = self._generate_and_score_completions(generation_batch), False",
           "self._rollout = self._generate_and_score_completions(generation_batch)", TRAINER),
    Mutant("mini-batches not redrawn for each epoch",
           "if self._buffered_inputs is None or self._step % steps_per_epoch == 0:",
           "if self._buffered_inputs is None or self._step % self._micro_batches_per_rollout == 0:", TRAINER),
    Mutant("mini-batches not random", "torch.randperm(len(lengths)).to(lengths.device)",
           "torch.arange(len(lengths)).to(lengths.device)", TRAINER),
    Mutant("kl_coef adapts in evaluation too", 'if mode == "train" and self.args.kl_target is not None:',
           "if self.args.kl_target is not None:", TRAINER),
    Mutant("a ref adapter ignored", 'adapter_name="ref" if "ref" in model.peft_config else None', "adapter_name=None", LORA),
    Mutant("a reward of None counts as 0 in the logged mean", "column.nan_to_num(), (~column.isnan()).float()",
           "column.nan_to_num()", TRAINER),
    Mutant("score_norm takes evaluation's samples into its moments", 'if mode == "train":\n                moments',
           "if True:\n                moments", TRAINER),
    Mutant("epochs stopped by one rank alone", "moved = self._sum_over_ranks(self._mini_batch_kl).item()",
           "moved = self._mini_batch_kl.item()", RANKS),
    Mutant("epochs stopped by the last micro-batch alone", "self._mini_batch_kl += (0.5", "self._mini_batch_kl = (0.5", TRAINER),
    Mutant("a gradient norm that is not finite let through",
           "if not self.args.fp16 and not math.isfinite(grad_norm):", "if False:", TRAINER),
    Mutant("the critic's own group gets weight decay", '"weight_decay": 0.0', '"weight_decay": self.args.weight_decay', TRAINER),
    Mutant("explained variance counts padding", "real = mask.bool()", "real = torch.ones_like(mask).bool()", TRAINER),
    Mutant("the objective is logged after whitening", 'self._track("objective/rlhf_reward", sequence_reward)',
           'self._track("objective/rlhf_reward", rewards.sum(1))', TRAINER),
    Mutant("states kept from sampling pile up", "self._sampled_states.clear()", "pass", TRAINER),
    Mutant("the table's advantage averaged over padding", "advantages.sum(1) / mask.sum(1)", "advantages.mean(1)", TRAINER),
    Mutant("the sampler's seed does not change with the pass", "self.sampler.seed + self.current_pass()", "self.sampler.seed",
           RESUME),
    Mutant("the last checkpoint chosen by name", 'int(path.name.rpartition("-")[2])', "path.name", RESUME),
    Mutant("a checkpoint without its random state taken for whole",
           'return "global_step" in state and any(Path(checkpoint).glob("rng_state*.pth"))', 'return "global_step" in state',
           RESUME),
    Mutant("a draw at the very end of the distribution",
           "threshold = threshold.minimum(torch.nextafter(total, torch.zeros_like(total)))", "pass", DECODING),
    Mutant("rows that have ended are overwritten", "stopping_criteria(input_ids, None) & ~ended",
           "stopping_criteria(input_ids, None)", DECODING),
    Mutant("samples that only fill up the last batch are counted",
           "values, mask = self.accelerator.gather_for_metrics((values, mask))", "pass", RANKS),
]  # fmt: skip


def copy_project(folder: Path) -> None:
    """The files that git knows or would take, into `folder`."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def find(mutant: Mutant, folder: Path) -> Path:
    """The one file that holds the mutant's text; SystemExit if that is not so."""
    found = [path for path in sorted((folder / "recipes").rglob("*.py")) if mutant.old in path.read_text()]
    if len(found) != 1 or found[0].read_text().count(mutant.old) != 1:
        raise SystemExit(
            f"mutant {mutant.fault!r}: its text stands in {len(found)} files, not once in one: {mutant.old}"
        )
    return found[0]


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Whether one of the mutant's tests fails on it, in a fork of this process."""
    path = find(mutant, folder)
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        child = os.fork()
        if not child:
            run_tests(mutant, folder)
        return wait(child) != 0
    finally:
        path.write_text(text)


def run_tests(mutant: Mutant, folder: Path) -> None:
    """In the fork: pytest on the mutant's tests until the first failure; never returns."""
    import pytest

    os.setsid()
    os.chdir(folder)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]))


def wait(child: int) -> int:
    """The fork's exit status; one that hangs is killed with what it started, which counts as a failure."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Try the mutants; prints each, and how many were caught. Returns 1 if one lives that is not marked equivalent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose fault contains this text")
    parser.add_argument("--check", action="store_true", help="only look whether every text is found")
    args = parser.parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if args.only in mutant.fault]
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # a mutant of the same size within a second would be read from the cache
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for mutant in mutants:
            find(mutant, folder)
        if args.check:
            return 0
        import peft
        import torch
        from trl import GRPOTrainer, RewardTrainer, SFTTrainer

        torch.set_num_threads(1)
        print(
            f"{len(mutants)} mutants; {peft.__name__} and {len({GRPOTrainer, RewardTrainer, SFTTrainer})} trainers loaded"
        )
        survived = []
        for mutant in mutants:
            started = time.monotonic()
            caught = is_caught(mutant, folder)
            said = "caught" if caught else "equivalent" if mutant.equivalent else "SURVIVED"
            print(f"{said:10} {time.monotonic() - started:4.0f} s  {mutant.fault}", flush=True)
            if not caught:
                survived.append(mutant)
    print(f"{len(mutants)} tried, {len(mutants) - len(survived)} caught, {len(survived)} survived")
    for mutant in survived:
        print(f"survived: {mutant.fault}: {mutant.equivalent or 'no test fails on it'}")
    return int(any(not mutant.equivalent for mutant in survived))


if __name__ == "__main__":
    sys.exit(main())
