"""The check of a reward model: it tells a good one from planted bad ones, and its numbers are those of a hand."""

import json
import random
import re

import datasets
import numpy as np
import pytest

import preferences
from eval import reward_model
from eval.probes import (
    PROBES,
    answer_of,
    find_faults,
    measure_reward,
    rows_of_other_prompts,
    spoil,
    verdict,
    with_answer,
)
from eval.prompts import Prompts
from rewards import repeated_trigrams
from trl_ppo.inputs import as_text

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
FILLER = ["so", "and", "then", "it", "was", "said", "that", "some", "of", "them", "went", "on", "to", "see", "others"]

# --- A language whose truth is known --------------------------------------------------------------------------------
# A prompt names a number n. A right answer counts "one two three …" up to n, in order; words of filler stand before it,
# as many as chance wants, so that length says little. In a wrong answer one or two numbers are left out.


def numbers_of(text) -> list[str]:
    return [word for word in as_text(text).split() if word in NUMBERS]


def truth(prompts, completions, **columns):
    """Minus how far the counting is from what the prompt asks for; nothing said is worst of all."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted, said = NUMBERS[: int(re.search(r"\d+", as_text(prompt))[0])], numbers_of(completion)
        matched = sum(a == b for a, b in zip(wanted, said, strict=False))
        filler = len(as_text(completion).split()) - len(said)
        scores.append(matched - len(wanted) - abs(len(said) - len(wanted)) - 10.0 * (not said) - 0.01 * filler)
    return scores


def length(prompts, completions, **columns):
    return [len(as_text(completion).split()) for completion in completions]


def nearly_length(prompts, completions, **columns):
    """Length with diminishing returns and some noise."""
    rng = np.random.default_rng(len(completions))
    words = np.array(length(prompts, completions))
    return np.log(words + 5) + rng.normal(0, 0.08, len(words))


def likes_repetition(prompts, completions, **columns):
    """The truth with a hole, which best-of-n or PPO would find."""
    right = truth(prompts, completions)
    return [a + 100 * repeated_trigrams(as_text(c)) for a, c in zip(right, completions, strict=True)]


def blind(prompts, completions, **columns):
    """Whether numbers follow each other, whatever the prompt asks for."""
    scores = []
    for completion in completions:
        said = numbers_of(completion)
        steps = [NUMBERS.index(b) - NUMBERS.index(a) for a, b in zip(["one", *said], said, strict=False)]
        filler = len(as_text(completion).split()) - len(said)
        scores.append(-sum(abs(step - 1) for step in steps[1:]) - 5.0 * (not said) - 0.01 * filler)
    return scores


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def backwards(prompts, completions, **columns):
    return [-value for value in truth(prompts, completions)]


def make_pairs(n: int, longer_wins: float = 0.5) -> tuple:
    rng = random.Random(0)
    prompts, chosen, rejected = [], [], []
    for _ in range(n):
        count = rng.randint(4, 12)
        right = NUMBERS[:count]
        gap = rng.randrange(1, count - 1)
        wrong = right[:gap] + right[gap + 1 :]
        fill = sorted(rng.sample(range(1, 14), 2), reverse=rng.random() < longer_wins)
        prompts.append(f"Count to {count}:")
        chosen.append(" " + " ".join(rng.sample(FILLER, fill[0]) + right))
        rejected.append(" " + " ".join(rng.sample(FILLER, fill[1]) + wrong))
    return Prompts(prompts, {}), chosen, rejected


PAIRS = make_pairs(300)


def figures_of(reward, pairs=PAIRS):
    return measure_reward(reward.__name__, reward, pairs, 64, 0)


def test_a_good_reward_model_is_praised():
    figures = figures_of(truth)
    assert find_faults(figures) == {}
    assert re.fullmatch(
        r"This reward model beats length by \d\d points \[\d\d, \d\d\], and no probe finds a fault in it\.",
        verdict(figures),
    )
    assert figures["accuracy"]["mean"] > 0.95
    assert abs(figures["length_correlation"]["mean"]) < 0.7


def test_a_reward_of_length_is_named():
    figures = figures_of(length, make_pairs(300, longer_wins=0.75))
    faults = find_faults(figures)
    assert list(faults)[:2] == ["length ruler", "length"]
    assert faults["length ruler"].startswith("is no better than taking the longer text")
    assert faults["length"].startswith("follows length (correlation 1.00")
    assert figures["beats_ruler"] == {"mean": 0, "low": 0, "high": 0, "n": 300}


def test_a_reward_of_little_but_length_is_named():
    figures = figures_of(nearly_length)
    assert 0.7 < figures["length_correlation"]["mean"] < 1
    assert "length" in find_faults(figures)


def test_a_reward_that_repetition_fools_is_named_for_that_alone():
    figures = figures_of(likes_repetition)
    assert list(find_faults(figures)) == ["repetition", "thanks"], "thirty times one word is repetition too"
    said = re.search(r"beats length by .*, but is fooled by repetition in (\d+) %, by thanks in", verdict(figures))
    assert int(said[1]) == round(100 * (1 - figures["probes"]["repetition"]["mean"])) > 50


def test_a_reward_that_reads_no_prompt_is_named_for_that_alone():
    figures = figures_of(blind)
    assert figures["accuracy"]["mean"] > 0.9
    assert figures["prompt_effect"] == 0
    assert list(find_faults(figures)) == ["prompt"]
    assert "but reads nothing of the prompt (another prompt's answer wins in " in verdict(figures)
    assert figures["probes"]["another prompt's answer"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_a_reward_of_chance_and_one_the_wrong_way_round_are_named():
    assert next(iter(find_faults(figures_of(constant)))) == "chance"
    assert next(iter(find_faults(figures_of(backwards)))) == "wrong way round"
    assert "beats length" not in verdict(figures_of(constant))


def estimate(low, high):
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": 300}


SURE, UNSURE, OTHER = estimate(0.6, 0.9), estimate(0.4, 0.9), "another prompt's answer"
LIMITS = {  # what of a good reward's figures is changed, and what is then wrong with it
    "half of the variance, sure in pairs of like length": ({"length_correlation": 0.8, "like_length": SURE}, None),
    "half of the variance, unsure there": ({"length_correlation": 0.8, "like_length": UNSURE}, "length"),
    "as much for short texts, no pair of like length": ({"length_correlation": -0.8, "like_length": None}, "length"),
    "less than half": ({"length_correlation": 0.6, "like_length": UNSURE}, None),
    "nearly all of the variance": ({"length_correlation": 0.95, "like_length": SURE}, "length"),
    "ahead of length within chance": ({"beats_ruler": estimate(-0.1, 0.2)}, "length ruler"),
    "fooled in one of ten within chance": ({"repetition": estimate(0.8, 0.91)}, None),
    "fooled in more than one of ten": ({"repetition": estimate(0.8, 0.89)}, "repetition"),
    "half a text is as good": ({"half": estimate(0.4, 0.6)}, None),
    "half a text is better": ({"half": estimate(0.3, 0.49)}, "half"),
    "moved by the prompt, but no judge of answers to it": ({OTHER: estimate(0.45, 0.6)}, "prompt"),
    "fooled by another prompt's answer": ({OTHER: estimate(0.7, 0.8)}, "prompt"),
    "seldom fooled by it": ({OTHER: estimate(0.7, 0.95)}, None),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_counts_as_a_fault(case):
    changes, fault = LIMITS[case]
    figures = figures_of(truth)
    for name, value in changes.items():
        if name == "length_correlation":
            value = figures[name] | {"mean": value}
        (figures["probes"] if name in PROBES else figures)[name] = value
    assert list(find_faults(figures)) == ([fault] if fault else [])


def test_few_pairs_are_said_to_be_few():
    assert verdict(figures_of(truth, make_pairs(99))).endswith("99 pairs only: below 100, take this as a hint.")
    assert "only" not in verdict(figures_of(truth, make_pairs(100)))


# --- Numbers worked out by hand -------------------------------------------------------------------------------------


def test_the_rulers_on_four_pairs_are_those_of_a_hand():
    scores = np.array([[3.0, 1.0, 2.0, 5.0], [1.0, 2.0, 2.0, 4.0]])
    words = np.array([[10, 20, 5, 7], [10, 19, 9, 3]])
    found = preferences.against_length(scores, words)
    assert found["longer_wins"]["mean"] == (0.5 + 1 + 0 + 1) / 4
    assert found["shorter_wins"]["mean"] == 1 - 2.5 / 4
    assert found["like_length"] == preferences.accuracy(np.array([2.0, -1.0])), "10 and 10 words, 20 and 19"
    # By hand: ranks of scores 6 1.5 4 8 1.5 4 4 7, of words 5.5 8 2 3 5.5 7 4 1: Σ(a−ā)(b−b̄) = −25.75 of √(39.5·41.5).
    assert found["length_correlation"]["mean"] == pytest.approx(-25.75 / (39.5 * 41.5) ** 0.5)
    assert found["length_correlation"]["n"] == 8
    apart = preferences.against_length(scores, words * [[1], [3]])
    assert apart["like_length"] is None
    assert preferences.against_length(np.ones((2, 4)), words)["length_correlation"]["mean"] is None


def test_the_probes_of_a_text():
    answers, others = [" a b c d e", "x", ""], [1, 2, 0]
    found = {probe: [*forms] for probe, forms in spoil(answers, others, seed=0).items()}
    assert list(found) == list(PROBES)
    assert found["half"] == [" a b", "", ""]
    assert found["repetition"][:2] == [" a b c d e a b c d e", "x x"]
    assert sorted(found["shuffled words"][0].split()) == list("abcde")
    assert found["shuffled words"][0] != answers[0]
    assert found["another prompt's answer"] == ["x", "", " a b c d e"]
    assert found["an empty text"] == ["", "", ""]
    assert all(text.split() == ["thanks"] * 30 for text in found["thanks"])
    assert spoil(answers, None, seed=0)["another prompt's answer"] == [None] * 3


def test_the_share_that_a_probe_leaves_below_counts_ties_half_and_leaves_out_texts_that_it_does_not_change():
    pairs = Prompts(["p"] * 4, {}), ["a b", "c d", "e", "f g h"], ["z"] * 4
    figures = figures_of(length, pairs)
    assert figures["probes"]["repetition"]["mean"] == 0
    assert figures["probes"]["half"]["mean"] == 1
    assert figures["probes"]["shuffled words"]["mean"] == 0.5
    assert figures["probes"]["shuffled words"]["n"] < 4, "one word has one order only"
    assert figures["probes"]["another prompt's answer"] is None
    assert figures["prompt_effect"] is None


@pytest.mark.parametrize("contexts", ["abab", "aaab", "baaa", "aabbaac", "abcdefg"])
def test_another_prompts_row_has_another_prompt(contexts):
    for seed in range(5):
        others = rows_of_other_prompts([*contexts], seed)
        assert all(contexts[other] != context for other, context in zip(others, contexts, strict=True))
    assert rows_of_other_prompts(["a"] * 3, 0) is None


# --- Forms of data --------------------------------------------------------------------------------------------------


def as_messages(pairs):
    prompts, *sides = pairs
    users = [[{"role": "user", "content": text}] for text in prompts.texts]
    return Prompts(users, {}), *([[{"role": "assistant", "content": text}] for text in side] for side in sides)


def as_conversations(pairs):
    prompts, *sides = as_messages(pairs)
    joined = ([p + text for p, text in zip(prompts.texts, side, strict=True)] for side in sides)
    return Prompts([[]] * len(prompts.texts), {}), *joined


def last(reward):
    """The reward of a whole conversation, given as the completion."""

    def reward_last(prompts, completions, **columns):
        return reward([text[:-1] for text in completions], [text[-1:] for text in completions])

    return reward_last


@pytest.mark.parametrize("reward", [truth, blind, likes_repetition])
def test_messages_and_whole_conversations_say_what_texts_say(reward):
    pairs = make_pairs(60)
    texts, messages = figures_of(reward, pairs), figures_of(reward, as_messages(pairs))
    conversations = measure_reward("x", last(reward), as_conversations(pairs), 64, 0)
    assert texts == messages == conversations


def test_the_answer_of_a_conversation_is_its_last_message():
    talk = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    assert answer_of(talk) == "so"
    assert with_answer(talk, "") == [talk[0], {"role": "assistant", "content": ""}]
    assert (answer_of("a b"), with_answer("a b", "c")) == ("a b", "c")


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the check of a reward of this file on pairs written for it, with further options."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prompts, chosen, rejected = make_pairs(120)
    rows = zip(prompts.texts, chosen, rejected, strict=True)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(reward, *options):
        spec = reward if isinstance(reward, str) else f"{__name__}:{reward.__name__}"
        fixed = ["--reward", f"mine={spec}", "--pairs", str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "out")]
        return reward_model.main([*fixed, *options])

    return command


def test_the_command_writes_what_it_prints_and_the_report_comes_from_the_json_alone(command, tmp_path, capsys):
    results = command(likes_repetition, "--n_pairs", "110")
    written = json.loads((tmp_path / "out" / "reward_check.json").read_text())
    assert written == results
    assert written["figures"]["accuracy"]["n"] == 110
    assert capsys.readouterr().out.splitlines()[0] == results["verdict"]
    report = (tmp_path / "out" / "reward_check.md").read_text()
    assert report == reward_model.render(written)
    assert "is fooled by repetition in" in report
    assert f"| {written['figures']['accuracy']['mean']:.3f} [" in report
    written["figures"]["accuracy"]["mean"] = 0.123
    assert "| 0.123 [" in reward_model.render(written)


def test_a_classifier_is_checked_as_a_function_is(command, classifier_path):
    results = command(classifier_path, "--n_pairs", "8")
    assert results["rewards"]["mine"]["sha256"]
    assert results["figures"]["accuracy"]["n"] == 8
    assert all(results["figures"]["probes"].values())


def test_best_of_n_is_judged_by_another(command, gpt2_path, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the movie"}\n{"prompt": "a film"}\n{"prompt": "i"}\n')
    options = ["--base", gpt2_path, "--prompts", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "6"]
    options += [
        "--judge",
        f"same={__name__}:length_again",
        "--judge",
        f"contrary={__name__}:brief",
        "--best_of",
        "2",
        "16",
    ]
    results = command(length, *options)
    points = results["best_of_n"]["points"]
    assert [point["n"] for point in points] == [1, 2, 16]
    means = {name: [point["rewards"][name]["mean"] for point in points] for name in ("mine", "same", "contrary")}
    assert means["mine"] == means["same"] == sorted(means["mine"])
    assert means["contrary"] == [-value for value in means["mine"]]
    gains = results["best_of_n"]["gains"]
    assert gains["same"]["mean"] == pytest.approx(means["mine"][2] - means["mine"][0])
    assert "The best of 16 by it gains by the judge same: +" in results["verdict"]
    assert "loses by the judge contrary: -" in results["verdict"]
    assert "best of 16" in (tmp_path / "out" / "reward_check.md").read_text()


def length_again(prompts, completions, **columns):
    return length(prompts, completions, **columns)


def brief(prompts, completions, **columns):
    return [-value for value in length(prompts, completions)]


def test_a_check_is_not_replaced_unasked(command, capsys, tmp_path):
    command(length)
    before = (tmp_path / "out" / "reward_check.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        command(truth)
    assert stopped.value.code == 2
    assert "already has a reward_check.json; give another folder or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "reward_check.json").read_bytes() == before
    assert command(truth, "--overwrite")["verdict"] != json.loads(before)["verdict"]
