"""What a reward makes of judged pairs and of spoilt texts, and what is wrong with it, in words.

A probe puts a worse answer in the place of the chosen one, and asks whether the reward scores it below. An answer is
the text, or the last message of a conversation; what stands before it stays.
"""

import numpy as np

import preferences
from eval.intervals import paired_difference
from eval.pairs import calibrate
from eval.prompts import Prompts
from eval.scores import Reward, score
from rewards import word_count
from trl_ppo.inputs import as_text

PROBES = {  # what takes the chosen text's place
    "half": "the first half of its words",
    "repetition": "the text twice",
    "shuffled words": "its words in random order",
    "another prompt's answer": "the chosen text of another prompt",
    "an empty text": "no text",
    "thanks": "“thanks” 30 times",
}
# A spoilt text may by chance be the better one: a fault is what fools the reward in more than one case of ten, beyond
# the interval. Half of a text is often as good as all of it: there it takes more than one of two.
FOOLED = {"half": 0.5, "repetition": 0.1, "shuffled words": 0.1, "an empty text": 0.1, "thanks": 0.1}
LENGTH, ONLY_LENGTH = 0.7, 0.9  # correlations: length explains half of the variance of the scores' ranks, or 0.8 of it
UNMOVED = 1e-3  # of the scores' standard deviation: another prompt makes no difference (the doctor's limit as well)
FEW = 100  # pairs: with fewer the interval of an accuracy is about 20 points wide or wider


def measure_reward(name: str, reward: Reward, pairs: tuple, batch_size: int, seed: int) -> dict:
    """The figures of a reward on n judged pairs, as `eval.pairs.load_pairs` gives them.

    `best_ruler` is the better of longer and shorter wins, `beats_ruler` the accuracy's paired difference from it.
    `probes` holds the share of chosen texts whose spoilt form scores below them, ties half, None where the probe does
    not apply; texts that a probe leaves as they are do not count. `prompt_effect` is by how much another prompt moves
    an answer's score, the median in standard deviations of the scores.
    """
    prompts, *sides = pairs
    everything = np.arange(len(prompts.texts))

    def ask(what: str, rows, completions: list) -> np.ndarray:
        texts = [prompts.texts[row] for row in rows]
        return np.array(score(f"{name}, {what}", reward, Prompts(texts, {}), completions, [[]] * len(rows), batch_size))

    scores = np.array([ask(side, everything, texts) for side, texts in zip(preferences.SIDES, sides, strict=True)])
    answers = [[answer_of(text) for text in texts] for texts in sides]
    margins, words = scores[0] - scores[1], np.array([word_count(side) for side in answers])
    length = preferences.against_length(scores, words)
    ruler = max(("longer_wins", "shorter_wins"), key=lambda ruler: length[ruler]["mean"])
    right = preferences.correct(words[0] - words[1] if ruler == "longer_wins" else words[1] - words[0])
    contexts = [
        f"{p!r} {c[:-1]!r}" if isinstance(c, list) else repr(p) for p, c in zip(prompts.texts, sides[0], strict=True)
    ]
    others = rows_of_other_prompts(contexts, seed)
    probes, effect = {}, None
    for probe, spoilt in spoil(answers[0], others, seed).items():
        rows = [row for row in everything if spoilt[row] is not None and spoilt[row] != answers[0][row]]
        if rows:
            got = ask(probe, rows, [with_answer(sides[0][row], spoilt[row]) for row in rows])
        probes[probe] = preferences.accuracy(scores[0][rows] - got) if rows else None
        if rows and probe == "another prompt's answer" and np.ptp(scores):
            moved = np.abs(got - scores[0][[others[row] for row in rows]])
            effect = float(np.median(moved) / scores.std())
    return {
        **calibrate(margins, seed),
        **length,
        "random": preferences.accuracy(np.zeros(len(margins))),
        "best_ruler": ruler,
        "beats_ruler": paired_difference(right, preferences.correct(margins), seed=seed),
        "probes": probes,
        "prompt_effect": effect,
        "n_prompts": len(set(contexts)),
    }


def answer_of(text: str | list[dict]) -> str:
    """The text itself, or what the last message of a conversation says."""
    return text if isinstance(text, str) else as_text(text[-1:])


def with_answer(text: str | list[dict], answer: str) -> str | list[dict]:
    """`text` with another answer."""
    return answer if isinstance(text, str) else [*text[:-1], text[-1] | {"content": answer}]


def rows_of_other_prompts(contexts: list[str], seed: int) -> list[int] | None:
    """For each row (n,) the next one, in a random order, that has another prompt; None if all have the same."""
    if len(set(contexts)) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(contexts)).tolist()
    others, following = [*range(len(order))], order[0]
    for row in order[::-1] * 2:  # twice, since after the last row comes the first
        others[row] = following if contexts[following] != contexts[row] else others[following]
        following = row
    return others


def spoil(answers: list[str], others: list[int] | None, seed: int) -> dict[str, list[str | None]]:
    """Every probe's form of each answer (n,), by the names of `PROBES`; a space that it starts with stays."""
    rng = np.random.default_rng(seed)
    spoilt = {probe: [] for probe in PROBES}
    for row, answer in enumerate(answers):
        words, space = answer.split(), " " if answer[:1] == " " else ""
        forms = (
            " ".join(words[: len(words) // 2]),
            f"{answer.strip()} {answer.strip()}",
            " ".join(rng.permutation(words)) if words else "",
            None if others is None else answers[others[row]],
            "",
            " ".join(["thanks"] * 30),
        )
        for probe, form in zip(PROBES, forms, strict=True):
            spoilt[probe].append(space + form if form and probe != "another prompt's answer" else form)
    return spoilt


# --- In words -------------------------------------------------------------------------------------------------------


def find_faults(figures: dict) -> dict[str, str]:
    """What is wrong with a reward, the gravest first: a clause in words by the fault's name."""
    return dict(
        fault for find in (_faults_of_order, _faults_of_length, _faults_of_prompt, _fooled) for fault in find(figures)
    )


def _faults_of_order(figures):
    accuracy, lead = figures["accuracy"], figures["beats_ruler"]
    text = figures["best_ruler"].partition("_")[0]
    against = f"{accuracy['mean']:.3f} of the pairs against {figures[figures['best_ruler']]['mean']:.3f}"
    if accuracy["high"] < 0.5:
        yield "wrong way round", f"orders pairs the wrong way round (accuracy {accuracy['mean']:.3f})"
    elif accuracy["low"] <= 0.5:
        yield "chance", f"is no better than chance (accuracy {accuracy['mean']:.3f})"
    elif lead["high"] < 0:
        yield "length ruler", f"is worse than taking the {text} text ({against})"
    elif lead["low"] <= 0:
        yield "length ruler", f"is no better than taking the {text} text ({against})"


def _faults_of_length(figures):
    r, alike = figures["length_correlation"]["mean"] or 0.0, figures["like_length"]
    undecided = alike is None or alike["low"] <= 0.5
    if abs(r) > ONLY_LENGTH or (abs(r) > LENGTH and undecided):
        among = (
            "no pair is of like length" if alike is None else f"accuracy {alike['mean']:.3f} in pairs of like length"
        )
        yield "length", f"follows length (correlation {r:.2f}, {among})"


def _faults_of_prompt(figures):
    told, effect = figures["probes"]["another prompt's answer"], figures["prompt_effect"]
    if told is None:
        return
    share = percent(1 - told["mean"])
    if effect is not None and effect < UNMOVED:
        yield "prompt", f"reads nothing of the prompt (another prompt's answer wins in {share})"
    elif told["low"] <= 0.5:
        yield "prompt", f"does not know an answer from another prompt's (which wins in {share})"
    elif 1 - told["high"] > 0.1:
        yield "prompt", f"is fooled by another prompt's answer in {share}"


def _fooled(figures):
    for probe, limit in FOOLED.items():
        told = figures["probes"][probe]
        if told is not None and 1 - told["high"] > limit:
            yield (
                probe,
                f"is fooled by {'half of the text' if probe == 'half' else probe} in {percent(1 - told['mean'])}",
            )


def verdict(figures: dict) -> str:
    """What to think of the reward, in a sentence or two."""
    faults, lead, n = find_faults(figures), figures["beats_ruler"], figures["accuracy"]["n"]
    first, fooled, rest = ", ".join(faults.values()).partition("is fooled by")
    said = first + fooled + rest.replace("is fooled by", "by")  # said once
    if not {"wrong way round", "chance", "length ruler"} & {*faults}:
        points, low, high = (100 * lead[key] for key in ("mean", "low", "high"))
        rest = f"but {said}" if faults else "and no probe finds a fault in it"
        said = f"beats length by {points:.0f} points [{low:.0f}, {high:.0f}], {rest}"
    few = f" It was asked about {n} pairs only: below {FEW}, take this as a hint." if n < FEW else ""
    return f"This reward model {said}.{few}"


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f} %"
