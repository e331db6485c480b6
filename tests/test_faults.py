"""What goes wrong while a run trains or resumes: nothing is lost, and one line says what it was."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from trl import ModelConfig

from command_line import one_line_errors
from conftest import ROOT
from recipe_args import OutputArguments, PPOArguments, lock_folder
from test_ppo_resume import assert_same_end, job
from test_ppo_trainer import letter_share
from trl_ppo.checkpoints import PPO_FILES, checkpoint_to_resume, damage, numbered
from trl_ppo.inputs import ScoreError, UserError


@pytest.fixture(scope="module")
def finished(gpt2_path, tmp_path_factory):
    """A run of two rollouts with a checkpoint after each, left alone."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = job(gpt2_path, folder, num_train_epochs=1)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run(finished, gpt2_path, tmp_path):
    """A copy of its folder, and a new trainer for it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", job(gpt2_path, tmp_path / "run", num_train_epochs=1)


class Args:
    """The part of the training arguments that a resume and the output folder depend on."""

    def __init__(self, folder, resume=None):
        self.output_dir, self.resume_from_checkpoint, self.process_index = str(folder), resume, 0
        self.max_steps = -1


def files_of(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir())


# --- Damaged checkpoints --------------------------------------------------------------------------------------------

NEEDED = [
    "trainer_state.json",
    "model.safetensors",
    "critic.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "ppo_state.json",
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_of_which_a_file_is_missing_empty_or_cut_off_is_damaged(run, name):
    file = run[0] / "checkpoint-8" / name
    whole = file.read_bytes()
    assert damage(file.parent, also=PPO_FILES) is None
    for kept in (0, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:kept])
        assert damage(file.parent, also=PPO_FILES) == name
    file.unlink()
    assert file.match(damage(file.parent, also=PPO_FILES))


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"kl_coef": NaN, "score_sums": [0, 0, 0], "settings": {}}'])
def test_a_state_that_says_nothing_or_nan_is_damaged(run, text):
    (run[0] / "checkpoint-8" / "ppo_state.json").write_text(text)
    assert damage(run[0] / "checkpoint-8", also=PPO_FILES) == "ppo_state.json"


def test_a_resume_passes_over_a_damaged_checkpoint_says_so_and_ends_as_a_run_left_alone(finished, run, capsys):
    folder, trainer = run
    os.truncate(folder / "checkpoint-8" / "optimizer.pt", 1000)
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-8-backup")
    trainer.train(resume_from_checkpoint="true")
    said = capsys.readouterr().out
    assert f"{folder}/checkpoint-8 is passed over: optimizer.pt is missing or cut off\n" in said
    assert f"resume_from_checkpoint: goes on from {folder}/checkpoint-4\n" in said
    assert_same_end(trainer, finished[1])
    kept = list((folder / "old_checkpoints").glob("*/checkpoint-8/optimizer.pt"))
    assert len(kept) == 1, "nothing of the user's is deleted"


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    for name in ("checkpoint-8", "checkpoint-16", "checkpoint-4", "checkpoint-32-backup", "old_checkpoints"):
        (tmp_path / name).mkdir()
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-16", "checkpoint-8", "checkpoint-4"]


def test_a_damaged_checkpoint_that_was_named_is_refused_in_one_line(run):
    folder, trainer = run
    (folder / "checkpoint-8" / "critic.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-8' is not whole: critic.safetensors is missing or cut off"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_a_resume_with_nothing_to_resume_from_says_so(gpt2_path, tmp_path, capsys):
    trainer = job(gpt2_path, tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert "resume_from_checkpoint: nothing to resume from, a new run\n" in capsys.readouterr().out
    assert trainer.state.global_step == 4


def test_checkpoints_newer_than_the_one_named_are_set_aside(run):
    folder, trainer = run
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert files_of(folder / "checkpoint-8") == files_of(next((folder / "old_checkpoints").glob("*/checkpoint-8")))


# --- Ranks ----------------------------------------------------------------------------------------------------------


def resume_of_two_ranks(monkeypatch, seen_by_rank_1):
    """What rank 0 of two chooses in a folder where it sees two whole checkpoints."""

    def both(mine):
        return [*mine, {name: seen_by_rank_1.get(name[-1], "trainer_state.json") for name in mine[0]}]

    monkeypatch.setattr("trl_ppo.checkpoints.gather_object", both)


def test_ranks_resume_from_the_newest_checkpoint_that_is_whole_on_all_of_them(run, monkeypatch, capsys):
    """Killed after rank 0 had written all of its own, and before rank 1 had."""
    resume_of_two_ranks(monkeypatch, {"8": "rng_state_1.pth", "4": None})
    assert checkpoint_to_resume("true", Args(run[0])) == f"{run[0]}/checkpoint-4"
    assert "checkpoint-8 is passed over: rng_state_1.pth is missing or cut off" in capsys.readouterr().out


def test_a_rank_that_does_not_see_the_folder_is_an_error_not_a_new_run(run, monkeypatch):
    resume_of_two_ranks(monkeypatch, {})
    for given in ("true", f"{run[0]}/checkpoint-8"):
        with pytest.raises(UserError, match=r"rank 1 has no .*checkpoint-8'; all machines must share output_dir"):
            checkpoint_to_resume(given, Args(run[0]))


# --- Other settings than the checkpoint's -----------------------------------------------------------------------------


def test_a_resume_says_which_settings_differ_and_which_value_is_used(gpt2_path, run, capsys):
    folder, _ = run
    trainer = job(gpt2_path, folder, num_train_epochs=1, learning_rate=0.5, kl_coef=0.7, gamma=0.9)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    lines = capsys.readouterr().out.splitlines()
    (kept,) = [line for line in lines if "kept from the checkpoint: " in line]
    (changed,) = [line for line in lines if "resume_from_checkpoint: changed: " in line]
    assert "learning_rate 0.001 (you gave 0.5)" in kept
    assert "kl_coef 0.05 (you gave 0.7)" in kept
    assert changed.endswith("changed: gamma 0.9 (was 1.0)")
    assert trainer.state.log_history[-2]["learning_rate"] < 0.001
    assert trainer.kl_coef < 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_iterations": 1, "save_steps": 2}, "made with num_iterations: 2, not 1"),
        ({"value_learning_rate": 0.1}, "made with critic: value head, not value head, with a learning rate of its own"),
        ({"per_device_train_batch_size": 2}, "made with generation_batch_size: 8, not 4"),
        ({"model": "llama"}, "made with policy: gpt2 of 2 × 32, vocabulary of .*, not llama of 2 × 32"),
        ({"critic": "own"}, "made with critic: value head, not gpt2 of 2 × 32"),
        ({"adapter": "lora"}, "made with adapter: None, not rank 4 on c_attn"),
    ],
)
def test_what_a_run_cannot_change_is_refused_in_one_line(run, gpt2_path, llama_path, classifier_path, change, says):
    from peft import LoraConfig

    change = dict(change)
    path = llama_path if change.pop("model", None) else gpt2_path
    if change.pop("critic", None):
        change["value_model_path"] = classifier_path
    if change.pop("adapter", None):
        change["peft_config"] = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = job(path, run[0], num_train_epochs=1, **change)
    with pytest.raises(UserError, match=says) as refused:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(refused.value)


# --- Signals --------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_rollouts_end_and_prints_the_command_that_goes_on(
    gpt2_path, finished, tmp_path, monkeypatch, capfd, number, status
):
    script = "recipes/x.py" if number == signal.SIGTERM else "mine.py"  # of ours, or of the user's
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), "--config", "my file.yaml"])
    trainer = job(gpt2_path, tmp_path, num_train_epochs=1, callbacks=[SignalAt(2, number)], save_strategy="no")
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    assert damage(tmp_path / "checkpoint-4", also=PPO_FILES) is None
    said = capfd.readouterr()
    command = f"python {ROOT / script} --config 'my file.yaml' --resume_from_checkpoint true"
    command = command if number == signal.SIGTERM else "trainer.train(resume_from_checkpoint=True)"
    assert said.out.splitlines()[-1] == f"stopped after step 4, saved; to go on: {command}"
    assert "a second signal (Ctrl-C) leaves at once" in said.err
    resumed = job(gpt2_path, tmp_path, num_train_epochs=1, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in finished[1].policy.state_dict().items():
        assert tensor.equal(resumed.policy.state_dict()[name]), name


# --- The output folder ------------------------------------------------------------------------------------------------


def claim(folder, resume=None, **set):
    args = Args(folder, resume)
    OutputArguments(**set).claim_output_dir(args, ModelConfig(model_name_or_path="a/model"))
    return args.resume_from_checkpoint


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed_or_overwritten(run):
    folder, _ = run
    with pytest.raises(UserError, match=r"holds a run already \(checkpoint-4\); give --resume_from_checkpoint true"):
        claim(folder)
    assert claim(folder, "true") == f"{folder}/checkpoint-8"
    assert claim(folder, overwrite_output_dir=True) is None
    assert not list(folder.glob("checkpoint-*")), "a later resume must not take the old run's"
    assert len(list(folder.glob("old_checkpoints/*/checkpoint-*/trainer_state.json"))) == 2
    assert claim(folder) is None


@pytest.mark.parametrize("key", ["model_name_or_path", "reward_model", "value_model_path"])
def test_a_folder_that_a_model_is_read_from_is_refused_even_to_be_overwritten(tmp_path, key):
    (tmp_path / "model").mkdir()
    script = PPOArguments(dataset_name="data", rewards={}, overwrite_output_dir=True)
    args, model = SimpleNamespace(output_dir=str(tmp_path / "model"), process_index=0), ModelConfig()
    owner = next(each for each in (model, script, args) if hasattr(each, key) or each is args)
    setattr(owner, key, f"{tmp_path}/other/../model/")
    with pytest.raises(UserError, match=f"output_dir: .*model' is where {key} is read from; give another folder"):
        script.claim_output_dir(args, model)


def test_a_finished_model_without_checkpoints_is_not_trained_over_by_a_resume(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a run already \(config.json\); give another output_dir"):
        claim(tmp_path, "true")
    assert capsys.readouterr().out == "", "not: a new run"


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: .*file' cannot be made: File exists"):
        claim(tmp_path / "file")
    with pytest.raises(UserError, match=r"output_dir: .*run' cannot be made: Not a directory"):
        claim(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as root everything can be written to
    with pytest.raises(UserError, match="cannot be written to"):
        claim(tmp_path)


def test_two_runs_cannot_write_to_one_folder_and_a_dead_one_blocks_nobody(tmp_path):
    code = (
        "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True)"
    )
    command = [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="output_dir: another run is writing to"):
            lock_folder(tmp_path)
    finally:
        other.kill()
        other.wait()
    lock_folder(tmp_path)


# --- Rewards, disk ----------------------------------------------------------------------------------------------------


def broken(prompts, completions, **columns):
    raise ConnectionError("the scorer is down")


async def hangs_later(prompts, completions, **columns):
    await asyncio.sleep(30)


async def broken_later(prompts, completions, **columns):
    raise ConnectionError("the scorer is down")


def hangs(prompts, completions, **columns):
    time.sleep(30)


def leaves(prompts, completions, **columns):
    sys.exit(0)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (broken, r"'broken' failed: ConnectionError: the scorer is down \(test_faults.py, line [0-9]+\)"),
        (broken_later, r"'broken_later' failed: ConnectionError: the scorer is down \(test_faults.py, line [0-9]+\)"),
        (hangs, "'hangs' failed: TimeoutError: no scores after 1 s"),
        (hangs_later, "'hangs_later' failed: TimeoutError"),
        (leaves, "'leaves' failed: SystemExit"),
    ],
)
def test_a_reward_function_that_breaks_is_named_in_one_line(gpt2_path, tmp_path, reward, says):
    trainer = job(gpt2_path, tmp_path, reward_funcs=[letter_share, reward], ddp_timeout=1)
    with pytest.raises(ScoreError, match=f"reward function {says}") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_disk_that_is_full_ends_a_run_with_one_line_and_its_resume_ends_as_a_run_left_alone(
    finished, gpt2_path, tmp_path, monkeypatch, capsys
):
    """The stand-in for a full disk lets no file grow past the size of the policy: the optimiser's does not fit."""
    import resource

    limit = (finished[0] / "checkpoint-8" / "model.safetensors").stat().st_size + 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = job(gpt2_path, tmp_path, num_train_epochs=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == 2
    assert "a file could not be written to its end; is the disk full?" in capsys.readouterr().err.splitlines()[-1]
    assert damage(tmp_path / "checkpoint-4", also=PPO_FILES)
    resumed = job(gpt2_path, tmp_path, num_train_epochs=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, finished[1])


# --- The fault runner -------------------------------------------------------------------------------------------------


def test_the_fault_runner_breaks_runs_of_one_process_and_of_two_and_loses_none(tmp_path):
    kinds = ["rank", "two_runs"]
    command = [
        sys.executable,
        "benchmarks/faults.py",
        "--moments",
        "1",
        "--kinds",
        *kinds,
        "--output",
        str(tmp_path / "f"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 of 2 lost" in done.stdout
