"""eval/: intervals that can be believed, an exact KL, and a report that shows untrusted text as text."""

import copy
import html
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from eval import compare, generation, intervals, loading, prompts, provenance, report, tables
from trl_ppo.logprobs import add_logprobs_forward

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"the {noun} was {word}" for noun in ("movie", "film", "plot", "cast") for word in ("so", "not", "good")]
HOSTILE = "<script>alert(1)</script> | a | `b` *c* [d](javascript:e) ![f](g) &lt; \\| _h_ ~~i~~ snake_case <b>"


def letters(prompts, completions, **columns):
    """A reward for these tests: above zero for some samples, below for others."""
    return [len(completion) - 10.5 for completion in completions]


def echo_column(prompts, completions, stars, **columns):
    return [float(star) for star in stars]


def too_few(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)


def sometimes_nan(prompts, completions, **columns):
    return [float("nan") if prompt == PROMPTS[5] else 1.0 for prompt in prompts]


@pytest.fixture(autouse=True, scope="module")
def quiet_datasets(tmp_path_factory):
    """Datasets cached for these tests alone, without progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": prompt, "stars": index} for index, prompt in enumerate(PROMPTS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def changed_copy(path: str, folder: Path, noise: float = 0.05) -> str:
    """The model at `path` with noise on every weight, saved in `folder` with the same tokenizer."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn_like(weight))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tuned_path(gpt2_path, tmp_path_factory) -> str:
    return changed_copy(gpt2_path, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def run(gpt2_path, prompts_path, tmp_path_factory):
    """Compares the random GPT-2 with `tuned` in this process; returns the results and the output folder."""

    def run(tuned, *options, reward=f"letters={__name__}:letters", output=None):
        output = output or tmp_path_factory.mktemp("eval") / "out"
        argv = ["--base", gpt2_path, "--tuned", tuned, "--prompts", prompts_path, "--output", str(output)]
        argv += ["--reward", reward, "--max_new_tokens", "6", "--batch_size", "5", *options]
        return compare.main(argv), output

    return run


@pytest.fixture(scope="module")
def finished(run, tuned_path, bert_path):
    """One comparison of different models with a function and a classifier as rewards."""
    return run(tuned_path, "--reward", f"judge={bert_path}#POSITIVE", "--n_samples", "3", "--max_new_tokens", "30")


def sequence_kl(loaded: dict, prompt_ids, completion_ids, pad_id: int, drawn_with) -> np.ndarray:
    """log π_tuned − log π_base of each completion (n,)."""
    base, tuned = (
        generation.sequence_logprobs(
            add_logprobs_forward(loaded[role], drawn_with.temperature),
            prompt_ids,
            completion_ids,
            pad_id,
            drawn_with,
            role,
        )
        for role in ("base", "tuned")
    )
    return tuned - base


def settings(**changes):
    return SimpleNamespace(**{"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "batch_size": 5, **changes})


def estimates(metrics: dict) -> dict[str, dict]:
    """Every metric of a results file by name."""
    by_reward = {f"{name}/{key}": rows[key] for name, rows in metrics["rewards"].items() for key in rows}
    return by_reward | {name: metric for name, metric in metrics.items() if name != "rewards"}


# --- Intervals --------------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_of_a_mean_agrees_with_students_t_on_normal_data():
    values = np.random.default_rng(0).normal(3, 2, 400)
    estimate = intervals.interval(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert estimate["mean"] == pytest.approx(values.mean())
    assert estimate["n"] == 400
    assert (estimate["low"], estimate["high"]) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_the_interval_agrees_with_scipys_own_bias_corrected_bootstrap(statistic):
    values = np.random.default_rng(1).exponential(2, 300)
    ours = intervals.interval(values, statistic)
    theirs = stats.bootstrap((values,), statistic, method="BCa", rng=7).confidence_interval
    assert ours["low"] < statistic(values) < ours["high"]
    width = theirs.high - theirs.low
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.2 * width)


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(2)
    drawn = [intervals.interval(rng.normal(1, 1, 60), seed=seed) for seed in range(200)]
    covered = np.mean([estimate["low"] <= 1 <= estimate["high"] for estimate in drawn])
    assert 0.90 <= covered <= 0.99


def test_a_paired_difference_is_the_interval_of_the_differences_and_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    base = rng.normal(0, 5, 200)
    tuned = base + rng.normal(1, 0.5, 200)
    paired = intervals.paired_difference(base, tuned)
    assert paired == pytest.approx(intervals.interval(tuned - base))
    assert paired["high"] - paired["low"] < 0.2 * np.ptp(stats.ttest_ind(tuned, base).confidence_interval())


def test_the_difference_of_medians_is_not_the_median_of_the_differences():
    base, tuned = [0.0, 1.0, 5.0], [4.0, 0.0, 6.0]
    assert intervals.paired_difference(base, tuned, np.median)["mean"] == 3.0
    assert intervals.interval(np.subtract(tuned, base), np.median)["mean"] == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9 / 3])
@pytest.mark.parametrize("n", [2, 7, 1001])
@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_equal_samples_give_an_interval_of_no_width(value, n, statistic):
    for estimate in intervals.compare_pairs([value] * n, [value] * n, statistic).values():
        assert estimate["low"] == estimate["mean"] == estimate["high"]
    assert intervals.interval([value] * n, statistic)["mean"] == pytest.approx(value)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_too_few_or_not_finite_samples_are_refused(values):
    with pytest.raises(ValueError, match="an interval needs"):
        intervals.interval(values)


def some_texts(rng: random.Random, n: int) -> list[str]:
    def words():
        return rng.choices("abcdef", [9, 5, 3, 2, 1, 1], k=rng.randint(1, 9))

    return [" ".join(words()) for _ in range(n)]


def share_by_hand(texts: list[str]) -> float:
    trigrams = [tuple(text.split()[i : i + 3]) for text in texts for i in range(len(text.split()) - 2)]
    return len(set(trigrams)) / len(trigrams)


def test_the_trigram_interval_is_the_jackknife_of_leaving_out_each_text_in_turn():
    base, tuned = some_texts(random.Random(0), 30), some_texts(random.Random(1), 30)
    tuned[3] = tuned[4] = "x y z"  # a trigram that two texts share
    left_out = {
        name: np.array([share_by_hand(texts[:i] + texts[i + 1 :]) for i in range(30)])
        for name, texts in (("base", base), ("tuned", tuned))
    }
    left_out["difference"] = left_out["tuned"] - left_out["base"]
    values = {"base": share_by_hand(base), "tuned": share_by_hand(tuned)}
    values["difference"] = values["tuned"] - values["base"]
    for name, estimate in intervals.distinct_ngrams(base, tuned, 3).items():
        error = np.sqrt(29 / 30 * np.square(left_out[name] - left_out[name].mean()).sum())
        assert estimate["mean"] == pytest.approx(values[name])
        assert estimate["high"] - estimate["mean"] == pytest.approx(stats.t.ppf(0.975, 29) * error)
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]


def test_the_trigram_interval_covers_the_expected_share_where_a_bootstrap_of_texts_never_does():
    rng = random.Random(4)
    expected = np.mean([share_by_hand(some_texts(rng, 60)) for _ in range(300)])
    covered, bootstrapped = [], []
    for _ in range(100):
        texts = some_texts(rng, 60)
        estimate = intervals.distinct_ngrams(texts, texts, 3)["base"]
        covered.append(estimate["low"] <= expected <= estimate["high"])
        resampled = [share_by_hand(rng.choices(texts, k=60)) for _ in range(40)]
        bootstrapped.append(np.quantile(resampled, 0.975) >= share_by_hand(texts))
    assert np.mean(covered) >= 0.93
    assert np.mean(bootstrapped) <= 0.05


def test_texts_without_trigrams_have_no_share_and_one_with_them_has_no_interval():
    none = intervals.distinct_ngrams(["", "a b"], ["", "a"], 3)["base"]
    one = intervals.distinct_ngrams(["a b c", "a b"], ["", ""], 3)
    assert none == {"mean": None, "low": None, "high": None, "n": 2}
    assert one["base"] == {"mean": 1.0, "low": None, "high": None, "n": 2}
    assert one["difference"]["mean"] is None


# --- KL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2_path", "llama_path"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_of_a_sequence_is_the_difference_of_its_unpadded_log_softmaxes(model, temperature, request, tmp_path):
    path = request.getfixturevalue(model)
    loaded = {"base": loading.load_model(path), "tuned": loading.load_model(changed_copy(path, tmp_path))}
    plain = copy.deepcopy(loaded)
    tokenizer = loading.load_tokenizer(path)
    prompt_ids = tokenizer(PROMPTS)["input_ids"]
    assert len({len(ids) for ids in prompt_ids}) > 1  # so that some are padded
    drawn = generation.generate(loaded["tuned"], tokenizer, prompt_ids, [], settings(temperature=temperature), "")
    drawn = [ids[: 1 + index % 6] for index, ids in enumerate(drawn)]
    kl = sequence_kl(loaded, prompt_ids, drawn, tokenizer.pad_token_id, settings(temperature=temperature))
    for prompt, completion, measured in zip(prompt_ids, drawn, kl, strict=True):
        by_role = {}
        for role in ("base", "tuned"):
            with torch.no_grad():
                logits = plain[role](torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits.double() / temperature).log_softmax(-1)
            by_role[role] = logprobs[range(len(completion)), completion].sum().item()
        assert measured == pytest.approx(by_role["tuned"] - by_role["base"], abs=1e-5)


@pytest.fixture(scope="module")
def handful(tmp_path_factory) -> dict[str, str]:
    """Two models of five tokens, so that every completion can be listed."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    paths = {}
    for seed, role in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        size = {"vocab_size": 5, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = GPT2Config(**size, eos_token_id=1, bos_token_id=1, pad_token_id=0, initializer_range=0.3)
        paths[role] = str(tmp_path_factory.mktemp(role))
        GPT2LMHeadModel(config).save_pretrained(paths[role])
        tokenizer.save_pretrained(paths[role])
    return paths


def exact_kl(loaded: dict, prompt: list[int], steps: int) -> float:
    """KL by the chain rule: the divergence of the next token, then that of each continuation, by its chance."""
    with torch.no_grad():
        base, tuned = (
            loaded[role](torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for role in ("base", "tuned")
        )
    here = (tuned.exp() * (tuned - base)).sum().item()
    if steps == 1:
        return here
    onward = [tuned[token].exp().item() * exact_kl(loaded, [*prompt, token], steps - 1) for token in (0, 2, 3, 4)]
    return here + sum(onward)


def test_the_kl_of_all_completions_weighted_by_their_chance_is_the_exact_kl(handful):
    loaded = {role: loading.load_model(path) for role, path in handful.items()}
    exact = exact_kl(loaded, [2, 3], 3)
    every = {tuple(loading.cut_after_eos(list(ids), [1])) for ids in itertools.product(range(5), repeat=3)}
    every = [list(ids) for ids in sorted(every)]
    with torch.no_grad():
        logprobs = [loaded["tuned"](torch.tensor([[2, 3, *ids]])).logits[0].double().log_softmax(-1) for ids in every]
    chances = [
        logprob[range(1, 1 + len(ids)), ids].sum().exp().item() for logprob, ids in zip(logprobs, every, strict=True)
    ]
    kl = sequence_kl(loaded, [[2, 3]] * len(every), every, 0, settings(batch_size=32))
    assert sum(chances) == pytest.approx(1)
    assert np.dot(chances, kl) == pytest.approx(exact, abs=1e-5)


def test_the_mean_kl_of_samples_lies_near_the_exact_kl(handful, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a b"}\n' * 600)
    argv = ["--base", handful["base"], "--tuned", handful["tuned"], "--prompts", str(tmp_path / "test.jsonl")]
    argv += ["--reward", f"letters={__name__}:letters", "--output", str(tmp_path / "out"), "--n_prompts", "600"]
    estimate = compare.main([*argv, "--max_new_tokens", "3", "--batch_size", "300"])["metrics"]["kl"]["tuned"]
    exact = exact_kl({role: loading.load_model(path) for role, path in handful.items()}, [2, 3], 3)
    assert exact > 0.05
    assert estimate["mean"] == pytest.approx(exact, abs=2 * (estimate["high"] - estimate["low"]))
    assert estimate["high"] - estimate["low"] < exact


# --- Sampling ---------------------------------------------------------------------------------------------------


def test_a_model_against_itself_differs_in_nothing_and_has_a_kl_of_zero(run, gpt2_path):
    results, _ = run(gpt2_path)
    for name, metric in estimates(results["metrics"]).items():
        if name in ("kl", "kl_per_token"):
            assert (metric["tuned"]["mean"], metric["tuned"]["low"], metric["tuned"]["high"]) == (0, 0, 0)
        elif name.endswith("win_rate"):
            assert metric["tuned"]["mean"] == 0.5
        else:
            assert metric["difference"]["mean"] in (0, None)
            assert metric["base"] == metric["tuned"]
    assert all(sample["tuned"]["kl"] == 0 for sample in results["samples"])


def test_the_same_seed_gives_the_same_results_and_another_seed_others(run, tuned_path, finished):
    first, _ = run(tuned_path, "--seed", "3")
    again, _ = run(tuned_path, "--seed", "3")
    other, _ = run(tuned_path, "--seed", "4")
    assert first["metrics"] == again["metrics"]
    assert first["samples"] == again["samples"]
    assert first["samples"] != other["samples"]


def test_a_models_own_generation_settings_do_not_leak_into_sampling(run, gpt2_path, tmp_path):
    shutil.copytree(gpt2_path, tmp_path, dirs_exist_ok=True)
    own = json.loads((tmp_path / "generation_config.json").read_text())
    own |= {"do_sample": True, "top_k": 1, "top_p": 0.1, "suppress_tokens": list(range(100, 200))}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    results, _ = run(str(tmp_path))
    assert all(sample["base"]["completion"] == sample["tuned"]["completion"] for sample in results["samples"])


def test_completions_end_with_the_first_of_any_declared_eos_token(gpt2_path, tokenizer):
    model = loading.load_model(gpt2_path)
    model.generation_config.eos_token_id = list(range(1, 100))
    eos = loading.stop_ids([model.generation_config], tokenizer)
    assert eos == list(range(1, 100))
    drawn = generation.generate(model, tokenizer, tokenizer(PROMPTS)["input_ids"], eos, settings(), "")
    assert any(len(ids) < 6 for ids in drawn)
    for ids in drawn:
        assert not set(ids[:-1]) & set(eos)
        assert ids[-1] in eos or len(ids) == 6


def test_a_lora_adapter_compares_like_the_model_it_merges_into(run, gpt2_path, tmp_path):
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2_path), config).save_pretrained(tmp_path / "adapter")
    shutil.copytree(gpt2_path, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_path), tmp_path / "adapter")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapter, _ = run(str(tmp_path / "adapter"))
    merged, _ = run(str(tmp_path / "merged"))
    assert adapter["metrics"]["kl"]["tuned"]["mean"] != 0
    assert adapter["samples"] == merged["samples"]
    assert adapter["models"]["tuned"]["adapter_of"] == adapter["models"]["base"]


def test_cut_prompts_begin_the_originals_at_lengths_that_only_seed_and_index_decide(tokenizer):
    texts = ["the movie was good and i loved it"] * 40
    cut = prompts.cut_prompts(texts, tokenizer, 2, 4, seed=0)
    lengths = [len(tokenizer(text)["input_ids"]) for text in cut]
    assert set(lengths) == {2, 3, 4}
    assert all(texts[0].startswith(text) for text in cut)
    assert prompts.cut_prompts(texts[:7], tokenizer, 2, 4, seed=0) == cut[:7]
    assert prompts.cut_prompts(texts, tokenizer, 2, 4, seed=1) != cut


# --- Metrics and provenance -------------------------------------------------------------------------------------


def test_the_metrics_summarise_the_samples_beside_them(finished):
    results, _ = finished
    for role in ("base", "tuned"):
        sides = [sample[role] for sample in results["samples"]]
        for name, metric in results["metrics"]["rewards"].items():
            scores = [side["scores"][name] for side in sides]
            assert metric["mean"][role]["mean"] == pytest.approx(np.mean(scores))
            assert metric["median"][role]["mean"] == pytest.approx(np.median(scores))
            assert metric["share_positive"][role]["mean"] == pytest.approx(np.mean(np.array(scores) > 0))
        assert results["metrics"]["length"][role]["mean"] == pytest.approx(np.mean([s["tokens"] for s in sides]))
        assert results["metrics"]["missing_eos"][role]["mean"] == np.mean([not s["ended"] for s in sides])
    kls = [sample["tuned"]["kl"] for sample in results["samples"]]
    assert results["metrics"]["kl"]["tuned"]["mean"] == pytest.approx(np.mean(kls))


def test_a_classifier_reward_scores_the_prompt_with_the_completion(finished, bert_path):
    from trl_ppo import RewardModel

    results, _ = finished
    sample = results["samples"][4]
    alone = RewardModel(bert_path, label="POSITIVE")([sample["prompt"]], [sample["tuned"]["completion"]])
    assert sample["tuned"]["scores"]["judge"] == pytest.approx(alone[0], abs=1e-5)


def test_rewards_receive_the_other_columns_of_their_rows(run, gpt2_path):
    results, _ = run(gpt2_path, "--n_prompts", "7", reward=f"stars={__name__}:echo_column")
    assert [sample["base"]["scores"]["stars"] for sample in results["samples"]] == list(range(7))
    assert [sample["prompt"] for sample in results["samples"]] == PROMPTS[:7]


def test_the_results_say_what_made_them(finished, run, gpt2_path, tuned_path):
    results, output = finished
    assert results == json.loads((output / "results.json").read_text())
    hashes = {role: results["models"][role]["sha256"] for role in ("base", "tuned")}
    assert hashes["base"] != hashes["tuned"]
    assert hashes["base"] == provenance.describe_source(shutil.copytree(gpt2_path, output / "copy"))["sha256"]
    assert results["versions"]["torch"] == torch.__version__
    assert tuned_path in results["command"]
    shorter, _ = run(gpt2_path, "--n_prompts", "3")
    assert shorter["prompts"]["sha256"] != results["prompts"]["sha256"]
    assert (shorter["prompts"]["n"], results["prompts"]["n"]) == (3, len(PROMPTS))


def test_the_commit_is_marked_dirty_when_files_differ_and_absent_outside_git(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True, text=True)

    assert provenance.git_commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "x", "--no-verify")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert provenance.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("new")
    assert provenance.git_commit(tmp_path) == commit + "-dirty"
    (tmp_path / "inside").mkdir()
    assert provenance.git_commit(tmp_path / "inside") is None  # a folder of someone else's repository


# --- The report -------------------------------------------------------------------------------------------------


def cells(markdown: str) -> list[list[str]]:
    """The text of every table's cells by row, as CommonMark with tables shows it."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and token.level > 3 and rows:
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_the_report_has_every_metric_with_value_interval_and_n(finished):
    results, output = finished
    rows = {row[0]: row[1:] for row in cells((output / "report.md").read_text())}
    labels = [f"{name}: {label}" for name in ("letters", "judge") for label in tables.REWARD_LABELS.values()]
    labels += [label for name, label in tables.METRIC_LABELS.items() if name in results["metrics"]]
    for label, metric in zip(labels, estimates(results["metrics"]).values(), strict=True):
        value = metric["tuned"]
        assert rows[label][1] == f"{value['mean']:z.3f} [{value['low']:z.3f}, {value['high']:z.3f}]"
        assert rows[label][3] == str(len(PROMPTS))


def test_the_report_is_rendered_again_byte_for_byte_from_the_json_alone(finished, tmp_path):
    _, output = finished
    shutil.copy(output / "results.json", tmp_path)
    again = report.main([str(tmp_path / "results.json")])
    assert [path.name for path in again] == ["report.md", "report.html"]
    for path in again:
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_the_report_shows_the_first_samples_by_index_and_then_the_five_lowest(finished):
    results, output = finished
    shown = [line for line in (output / "report.md").read_text().splitlines() if line.startswith("### ")]
    assert shown[:3] == ["### 0", "### 1", "### 2"]
    lowest = sorted(results["samples"], key=lambda sample: sample["tuned"]["scores"]["letters"])[:5]
    assert shown[3:] == [f"### {sample['index']}" for sample in lowest]


@pytest.mark.parametrize("role", ["prompt", "base", "tuned"])
def test_hostile_text_in_a_sample_shows_as_text(finished, role):
    results = copy.deepcopy(finished[0])
    sample = results["samples"][0]
    if role == "prompt":
        sample["prompt"] = HOSTILE
    else:
        sample[role]["completion"] = HOSTILE
    markdown = report.render(results)
    assert "<script" not in markdown
    assert next(row[1] for row in cells(markdown) if row[0] == role) == HOSTILE
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    children = [child.type for token in tokens for child in token.children or []]
    assert not {"html_inline", "link_open", "image", "em_open", "strong_open", "s_open"} & set(children)
    assert "html_block" not in [token.type for token in tokens]


@pytest.mark.parametrize("text", [HOSTILE, "https://example.org", "www.example.org", "someone@example.org"])
def test_escaped_text_reads_back_as_it_was_and_holds_no_address_that_github_would_link(text):
    escaped = report.escape(text)
    assert html.unescape(escaped) == text
    assert not any(sign in escaped for sign in ("://", "www.", "@"))


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\u2028", "\x0b"])
def test_a_line_break_in_a_sample_starts_no_new_line(finished, line_break):
    results = copy.deepcopy(finished[0])
    plain = report.render(results).splitlines()
    results["samples"][0]["base"]["completion"] = f"one{line_break}{line_break}# two\x1b[31m\u202e"
    changed = report.render(results)
    assert len(changed.splitlines()) == len(plain)
    assert not {"\x1b", "\u202e"} & set(changed)


def test_a_metric_without_a_value_shows_a_dash(finished):
    results = copy.deepcopy(finished[0])
    nothing = {"mean": None, "low": None, "high": None, "n": 12}
    results["metrics"]["distinct_trigrams"] = dict.fromkeys(("base", "tuned", "difference"), nothing)
    rows = {row[0]: row for row in cells(report.render(results))}
    assert rows["share of distinct trigrams"][1:] == ["–", "–", "–", "12"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema_version": 99}', '{"schema_version": 2}'])
def test_a_results_file_that_cannot_be_read_ends_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "results.json")])
    assert "results.json" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "report.md").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        report.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- Bad input --------------------------------------------------------------------------------------------------

BEFORE_MODELS = {
    "a missing prompts folder": (["--prompts", "{tmp}/nowhere"], ["--prompts", "nowhere"]),
    "an empty prompt file": (["--prompts", "{tmp}/empty"], ["--prompts", "empty"]),
    "a prompts folder without files": (["--prompts", "{tmp}/hollow"], ["--prompts", "hollow"]),
    "a broken prompt file": (["--prompts", "{tmp}/broken"], ["--prompts", "broken"]),
    "an empty prompt": (["--prompts", "{tmp}/blank"], ["'prompt'", "row 1"]),
    "more tokens than positions": (["--max_new_tokens", "64"], ["prompt 0", "64 positions"]),
    "models of different vocabularies": (["--base", "{handful}"], ["5 tokens", "vocabulary"]),
    "a single prompt": (["--n_prompts", "1"], ["--n_prompts", "at least 2"]),
    "an unknown split": (["--split", "validation"], ["--prompts", "validation"]),
    "a missing column": (["--prompt_column", "text"], ["column text", "prompt, stars"]),
    "a missing tuned model": (["--tuned", "{tmp}/nowhere"], ["--tuned", "nowhere"]),
    "a missing base model on the Hub": (["--base", "nobody/nothing"], ["--base", "nobody/nothing"]),
    "a model folder without a model": (["--tuned", "{tmp}/hollow"], ["--tuned", "hollow"]),
    "an adapter without its base model": (["--tuned", "{tmp}/orphan"], ["--tuned", "gone"]),
    "a reward without a name": (["--reward", "letters"], ["--reward letters", "NAME="]),
    "a reward without a spec": (["--reward", "x="], ["--reward x=", "NAME="]),
    "two rewards of one name": (["--reward", "letters=a:b"], ["letters"]),
    "an unknown module": (["--reward", "x=no_such_module:f"], ["--reward x", "no_such_module"]),
    "an unknown function": (["--reward", "x=rewards:no_such_function"], ["--reward x", "no_such_function"]),
    "a value for a function": (["--reward", "x=math:pi"], ["--reward x", "math:pi"]),
    "a missing classifier": (["--reward", "x={tmp}/nowhere#GOOD"], ["--reward x", "nowhere"]),
    "an unknown label": (["--reward", "x={bert}#GOOD"], ["--reward x", "GOOD", "POSITIVE"]),
    "a zero temperature": (["--temperature", "0"], ["--temperature", "above 0"]),
    "prompt lengths the wrong way round": (["--prompt_tokens", "8", "2"], ["--prompt_tokens 8 2"]),
    "an unknown option": (["--temprature", "1"], ["--temprature"]),
    "an output folder that is a file": (["--output", "{tmp}/file"], ["--output", "file"]),
}
AFTER_MODELS = {
    "too few scores": (["--reward", f"x={__name__}:too_few"], ["reward function 'x'", "4", "5"]),
    "a score that is not a number": (
        ["--reward", f"x={__name__}:sometimes_nan"],
        ["reward function 'x'", "nan", "sample 5"],
    ),
    "a model without its head": (["--tuned", "{headless}"], ["headless", "lm_head.weight"]),
}


@pytest.fixture
def scene(tmp_path, bert_path, llama_path, handful):
    """Fills the places in the options above, with bad files to point at."""
    for name, content in {
        "empty": "",
        "broken": '{"prompt": "a"',
        "blank": '{"prompt": "a"}\n{"prompt": ""}\n',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(content)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "orphan").mkdir()
    orphan = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps(orphan))
    (tmp_path / "file").write_text("mine")
    shutil.copytree(llama_path, tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    return {"tmp": tmp_path, "headless": tmp_path / "headless", "bert": bert_path, "handful": handful["base"]}


def assert_one_line(run, gpt2_path, scene, capsys, options, words):
    """One line of error, status 2, and nothing in the output folder but completions to go on from."""
    output = scene["tmp"] / "out"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(gpt2_path, *(option.format(**scene) for option in options), output=output)
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert errors[-1].startswith("eval.compare: error: ")
    assert sum("error" in line for line in errors) == 1
    for word in words:
        assert word in errors[-1]
    assert not output.exists() or [path.name for path in output.iterdir()] == ["completions"]


@pytest.mark.parametrize("case", BEFORE_MODELS)
def test_bad_input_ends_in_one_line_before_a_model_loads(case, run, gpt2_path, scene, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda path: pytest.fail("a model was loaded"))
    assert_one_line(run, gpt2_path, scene, capsys, *BEFORE_MODELS[case])


@pytest.mark.parametrize("case", AFTER_MODELS)
def test_bad_models_and_scores_end_in_one_line(case, run, gpt2_path, scene, capsys):
    assert_one_line(run, gpt2_path, scene, capsys, *AFTER_MODELS[case])


def test_results_are_replaced_only_when_asked(run, gpt2_path, tmp_path, capsys):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(SystemExit):
        run(gpt2_path, output=tmp_path)
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "precious"
    results, _ = run(gpt2_path, "--overwrite", output=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_command_prints_its_error_and_nothing_else(tmp_path):
    argv = ["--base", "x", "--tuned", "x", "--prompts", "x", "--reward", "x", "--output", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}  # of which TRL would tell
    command = [sys.executable, "-m", "eval.compare", *argv]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert "--reward x" in ran.stderr


def test_long_prompts_are_left_out_with_their_columns_and_counted(tokenizer, capsys):
    texts = ["a film", "a great film with a wonderful cast and a terrible plot", "the movie"]
    given = prompts.Prompts(texts, {"topic": [0, 1, 2]}, tokenizer(texts)["input_ids"], references=["x", "y", "z"])
    most = max(len(given.ids[0]), len(given.ids[2]))
    kept = prompts.leave_out_long(given, most)
    assert (kept.texts, kept.columns, kept.references) == (["a film", "the movie"], {"topic": [0, 2]}, ["x", "z"])
    assert kept.ids == [given.ids[0], given.ids[2]]
    assert capsys.readouterr().out == f"1 of 3 prompts have more than {most} tokens: left out\n"
    with pytest.raises(loading.UserError, match="--max_prompt_tokens 0: 0 of 3 prompts"):
        prompts.leave_out_long(given, 0)


def test_the_table_and_the_path_of_the_report_are_printed(run, gpt2_path, capsys):
    _, output = run(gpt2_path)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Report: {output / 'report.md'} {output / 'report.html'}"
    labels = [label for name, label in tables.METRIC_LABELS.items() if not name.startswith("rouge")]
    assert all(label in printed for label in labels)


def test_shuffled_prompts_are_drawn_from_all_rows_by_the_seed_with_their_references(tmp_path):
    rows = [{"prompt": f"row {i}", "reference": str(i), "label": i // 50} for i in range(100)]  # sorted, as IMDB is
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = (
        prompts.load_prompts(str(tmp_path), "test", "prompt", 20, "reference", shuffle=seed) for seed in (None, 0, 0, 1)
    )
    assert first.texts == [f"row {i}" for i in range(20)]
    assert others[0].texts == others[1].texts != others[2].texts
    assert 4 < sum(others[0].columns["label"]) < 16
    assert others[0].texts == [f"row {reference}" for reference in others[0].references]
