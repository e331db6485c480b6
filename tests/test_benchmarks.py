"""The benchmark of speed and memory, its own side: that what it measures is the job that it names."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import ppo_throughput, throughput_run
from benchmarks.throughput_jobs import CPU_JOBS, EOS, JOBS, PAD, Job, growing, operations, tiny
from conftest import ROOT

SETTINGS = {"repeats": 1, "rollouts": 1, "threads": 1}


def prompts_of(job, rollouts=1):
    """Left-padded prompts (B, P) of every rollout that is sampled, warm-up included."""
    rows = [torch.tensor(ids).flip(0) for ids in throughput_run.make_prompts(job, rollouts)[: job.batch * 2]]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).flip(1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`measured(name, side)`: one tiny run of a job in this process, with its models built once."""
    folders = {}

    def measure(name, side):
        job = tiny(JOBS[name])
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            throughput_run.build(job, folders[name])
        return throughput_run.measure(side, job, folders[name], rollouts=1)

    return measure


@pytest.mark.parametrize("name", [*CPU_JOBS, "gpt2_large_lora"])
def test_a_job_samples_the_tokens_that_it_names_and_times_every_phase(name, measured):
    job = tiny(JOBS[name])
    result = measured(name, "ours")
    prompts = prompts_of(job)
    lengths = throughput_run.end_lengths(job, prompts) if job.ragged else torch.full((2 * job.batch,), 6)
    assert result["prompt_tokens"] == (prompts != PAD).sum()
    assert result["new_tokens"] == lengths.sum()
    phases = [result[f"{phase}_seconds"] for phase in ("rollout", "scoring", "update")]
    assert min(phases) > 0
    assert sum(phases) == pytest.approx(job.batch / result["samples_per_second"])
    assert result["peak_memory_gb"] >= result["memory_at_start_gb"] > 0.05


def test_a_separate_critic_does_the_same_work(measured):
    ours, separate = (measured("sentiment", side) for side in ("ours", "ours, separate critic"))
    ppo_throughput.check_like_for_like({"ours": [ours], "ours, separate critic": [separate]})


def test_runs_that_did_other_work_are_not_compared(measured):
    run = measured("sentiment", "ours")
    for name, other in (("new_tokens", 1), ("threads", 99), ("versions", run["versions"] | {"torch": "1.0"})):
        with pytest.raises(SystemExit, match="torch" if name == "versions" else name):
            ppo_throughput.check_like_for_like({"ours": [run], "TRL 1.12": [run | {name: other}]})
    ppo_throughput.check_like_for_like(
        {"ours": [run], "TRL 1.12": [run | {"versions": run["versions"] | {"trl": "1.12.0"}}]}
    )


def test_completions_that_were_not_ended_where_they_should_be_stop_the_run():
    job = tiny(JOBS["ragged"])
    asked = [{"new_tokens": 8 * 5}]
    throughput_run.check_lengths(job, asked, [5.0])
    with pytest.raises(RuntimeError, match="lengths are not forced"):
        throughput_run.check_lengths(job, asked, [9.0])
    with pytest.raises(RuntimeError, match="lengths are not forced"):
        throughput_run.check_lengths(job, [], [5.0])


def test_a_completion_ends_at_the_length_that_its_prompt_alone_decides():
    job = JOBS["ragged"]
    prompts = prompts_of(replace(job, batch=256))
    lengths = throughput_run.end_lengths(job, prompts)
    assert lengths.min() >= 4
    assert lengths.max() <= 128
    assert lengths.float().mean() == pytest.approx(66, abs=5)  # uniform; n = 512, standard error 1.6
    more_padding = torch.nn.functional.pad(prompts.flip(0), (7, 0), value=PAD)
    assert throughput_run.end_lengths(job, more_padding).tolist() == lengths.flip(0).tolist()


def test_the_end_token_comes_at_its_length_and_never_before():
    """Whatever a row's place in the batch, and whichever rows have left it."""
    job = JOBS["ragged"]
    prompts = torch.tensor([[PAD, PAD, 7, 8], [2, 3, 4, 5], [9, 9, 9, 9]])
    lengths = throughput_run.end_lengths(job, prompts)
    assert len(set(lengths.tolist())) == 3
    end = throughput_run.EndAt(job, prompt_width=4)
    for rows in ([0, 1, 2], [2, 0]):
        for sampled in range(1, 129):
            generated = torch.full((len(rows), sampled - 1), 5)
            probabilities = end(torch.cat([prompts[rows], generated], 1), torch.randn(len(rows), 10)).softmax(-1)
            ends = (lengths[rows] == sampled).tolist()
            assert (probabilities[:, EOS] == 1).tolist() == ends
            assert (probabilities[:, EOS] == 0).tolist() == [not at for at in ends]
            assert (probabilities[:, PAD] == 0).all()


def test_text_and_tokens_of_a_job_say_the_same():
    job = replace(JOBS["tldr"], batch=2)
    tokenizer = throughput_run.make_tokenizer(job.vocab_size)
    assert len(tokenizer) == job.vocab_size
    for ids in throughput_run.make_prompts(job, rollouts=0):
        prompt, completion = ids[:20], ids[20:]
        text = tokenizer.decode(prompt) + tokenizer.decode([*completion, EOS, PAD], skip_special_tokens=True)
        assert tokenizer(text)["input_ids"] == ids


def test_the_models_have_the_sizes_that_the_jobs_promise():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    gpt2, qwen2 = JOBS["sentiment"], JOBS["tldr"]
    with torch.device("meta"):
        policy = GPT2LMHeadModel(GPT2Config(**gpt2.size, vocab_size=gpt2.vocab_size))
        assert policy.num_parameters() == pytest.approx(30e6, rel=0.05)
        config = Qwen2Config(**qwen2.size, vocab_size=qwen2.vocab_size, tie_word_embeddings=True)
        assert Qwen2ForCausalLM(config).num_parameters() == pytest.approx(25e6, rel=0.05)


def test_every_job_reads_back_as_it_was_written():
    for job in JOBS.values():
        assert Job.from_json(job.to_json()) == job


def test_the_other_environment_differs_in_trl_alone():
    ours = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    changed = set(ppo_throughput.pins()) ^ set(ours)
    assert changed == {"trl==1.12.0", next(line for line in ours if line.startswith("trl=="))}


def test_a_summary_pairs_the_runs_of_a_repeat():
    def run(samples, memory):
        return dict.fromkeys(ppo_throughput.FIGURES, 1.0) | {
            "samples_per_second": samples,
            "peak_memory_gb": memory,
            "peak_gpu_gb": None,
        }

    # The machine halves its speed in the second repeat: medians of the sides would say 3 or 1.5.
    runs = {"ours": [run(6, 1), run(3, 1), run(6, 1)], "TRL 1.12": [run(2, 4), run(1, 2), run(1, 4)]}
    summary = ppo_throughput.summarise(runs)
    assert summary["ours"]["samples_per_second"] == {"median": 6, "low": 3, "high": 6}
    assert summary["ours / TRL 1.12"]["samples_per_second"] == {"median": 3, "low": 3, "high": 6}
    assert summary["ours / TRL 1.12"]["peak_memory_gb"] == {"median": 0.25, "low": 0.25, "high": 0.5}
    assert summary["ours"]["peak_gpu_gb"] is None
    assert "GPU" not in ppo_throughput.table(summary)


def test_exponents_are_those_of_a_power_law():
    x = [1, 2, 4, 7]
    assert ppo_throughput.exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)


def test_operations_grow_with_what_grows():
    """In no more than proportion to length and vocabulary but for attention, and to the square of the width."""
    by_name = {}
    for name, value, job in growing():
        by_name.setdefault(name, []).append((value, operations(job)))
    slopes = {name: ppo_throughput.exponent(*zip(*points, strict=True)) for name, points in by_name.items()}
    assert slopes["batch size"] == pytest.approx(0)
    assert 0.5 < slopes["completion length"] < 1.1
    assert 0 < slopes["vocabulary"] < 1
    assert 1 < slopes["width"] < 2


def test_a_measurement_is_printed_and_written_whole(tmp_path, measured, monkeypatch, capsys):
    result = measured("sentiment", "ours")
    monkeypatch.setattr(ppo_throughput, "run", lambda *args: result)
    monkeypatch.setattr(ppo_throughput, "built", lambda *args: tmp_path)
    ppo_throughput.main(["--smoke", "--ours_only", "--job", "sentiment", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "smoke-sentiment.json").read_text())
    assert content["runs"]["ours"] == [result]
    assert content["settings"] == SETTINGS
    assert content["commit"]
    assert content["processor"]
    assert content["runs"]["ours"][0]["versions"]["trl"]
    assert "| samples/s | rollout, s | scoring, s | update, s | peak memory, GB |" in capsys.readouterr().out


def test_growth_is_written_as_numbers_and_as_a_figure(tmp_path, measured, monkeypatch):
    result = measured("sentiment", "ours")

    def run(python, side, job, *rest):  # twice the time for twice the batch: seconds a sample stay
        return result | {"peak_memory_gb": job.batch / 10}

    monkeypatch.setattr(ppo_throughput, "run", run)
    monkeypatch.setattr(ppo_throughput, "built", lambda *args: tmp_path)
    ppo_throughput.main(["--smoke", "--grow", "--output", str(tmp_path)])
    fitted = json.loads((tmp_path / "smoke-growth.json").read_text())["exponents"]["batch size"]
    assert fitted == pytest.approx({"seconds per sample": 0, "operations per sample": 0, "peak memory": 1}, abs=1e-9)
    assert (tmp_path / "smoke-growth.svg").read_text().count("<svg") == 1


def test_repeats_end_where_the_next_would_be_late_and_the_first_is_complete(tmp_path, measured, monkeypatch):
    result, clock = measured("sentiment", "ours"), [0.0]

    def run(*args):
        clock[0] += 100
        return result

    monkeypatch.setattr(ppo_throughput, "run", run)
    monkeypatch.setattr(ppo_throughput, "built", lambda *args: tmp_path)
    monkeypatch.setattr(ppo_throughput.time, "monotonic", lambda: clock[0])
    sides = ["ours", "ours, separate critic"]
    for minutes, repeats in ((1, 1), (11, 3), (None, 5)):  # a repeat takes 200 s
        runs = ppo_throughput.measure(tiny(JOBS["sentiment"]), tmp_path, sides, 5, 1, 1, minutes)
        assert [len(runs[side]) for side in sides] == [repeats, repeats]


def test_a_setting_out_of_range_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(SystemExit, match="repeats: 0 must be 1 or more"):
        ppo_throughput.main(["--repeats", "0", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_job_for_a_gpu_is_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="gpt2 needs a GPU") as stopped:
        ppo_throughput.main(["--job", "gpt2", "--output", str(tmp_path / "none")])
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "none").exists()
