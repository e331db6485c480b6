"""Win rates by a pairwise judge: which of two completions is better, asked in both orders of each prompt's two texts.

A text wins a prompt only if it wins in both orders; where they disagree, and where a reply cannot be read, it is a tie,
which counts half. Two equal texts are a tie without a question. So a judge that always answers "A" gives one half. The
flip rate is the share of prompts, of those answered in both orders, on which the two answers name different texts.

Answers are kept in `answers.jsonl` as they come, so that a comparison which was stopped asks no question again.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from tqdm import tqdm

from eval.intervals import compare_pairs, interval, length_controlled
from eval.judges import OPTION, TOKENS, Function, LanguageModel, Question, Server
from eval.resumable_log import ResumableLog
from eval.scores import FUNCTION
from trl_ppo.inputs import UserError

TEMPLATE = Path(__file__).resolve().parent / "templates" / "pairwise_tldr.txt"
PROBE = (
    "It rained all day, so the match was put off until Sunday.",
    "The match is on Sunday, because of rain.",
    "Cats.",
)
MOST_UNREADABLE = 0.05  # share of replies, and below it always three; beyond, the judge does not understand the task


@dataclass
class Verdicts:
    """One side's results against another, by prompt (n,): 1, ½ or 0; whether the two orders disagree, None where that
    cannot be said; and how many characters longer than the other's its text is."""

    wins: list[float]
    flips: list[bool | None]
    longer: list[int]


class AnswerLog(ResumableLog):
    """A judge's answers by the question's hash, written as they come, in any order and from any thread."""

    holds, item = "a judge's answers", "answer"

    def __init__(self, path: Path, fingerprint: dict, overwrite: bool = False):
        self.answers: dict[str, dict] = {}
        self._lock = Lock()
        super().__init__(path, fingerprint, overwrite)
        self.resumed = len(self.answers)

    def is_line(self, line) -> bool:
        known = isinstance(line, dict) and isinstance(line.get("question"), str)
        return known and isinstance(line.get("reply", ""), str) and line.get("answer", 0) in ("A", "B", "tie", None)

    def take(self, lines: list[dict]) -> None:
        self.answers |= {line["question"]: {k: v for k, v in line.items() if k != "question"} for line in lines}

    def add(self, answers: dict[str, dict]) -> None:
        """Add answers by question; UserError if too many of all so far cannot be read."""
        with self._lock:
            self.write([{"question": key, **answer} for key, answer in answers.items()])
            unreadable = self.unreadable()
            if len(unreadable) > max(3, MOST_UNREADABLE * len(self.answers)):
                raise UserError(
                    f"{len(unreadable)} of {len(self.answers)} replies of the judge are neither A nor B, such as "
                    f"{unreadable[-1].get('reply')!r}; change --judge_prompt or the judge"
                )

    def unreadable(self) -> list[dict]:
        """The answers of which no letter could be read."""
        return [answer for answer in self.answers.values() if answer["answer"] is None]


class PairwiseJudge:
    """The judge that the options name, checked: a server has answered an easy question. UserError for what is wrong."""

    def __init__(self, args):
        self.template = read_template(args.judge_prompt or TEMPLATE)
        server, function = re.match("https?://", args.pairwise_judge), FUNCTION.fullmatch(args.pairwise_judge)
        self.judge = (Server if server else Function if function else LanguageModel)(args, self.template)
        path = str(args.judge_prompt or TEMPLATE.name)
        print(f"pairwise judge: {args.pairwise_judge}, asked by the prompt {path} (--judge_prompt)")
        self.prompt = {"path": path, "sha256": hashlib.sha256(self.template.encode()).hexdigest()}
        fingerprint = {"judge": self.judge.source, "prompt": self.prompt["sha256"]}
        self.log = AnswerLog(args.output / "answers.jsonl", fingerprint, args.overwrite)
        if server and _key(PROBE) not in self.log.answers:
            [answer] = self.judge.answer([PROBE])
            if answer["answer"] is None:
                raise UserError(
                    f"{OPTION} {args.pairwise_judge}: {answer['reply']!r} is no answer to an easy question, which is A "
                    "or B; change --judge_prompt or the judge"
                )
            self.log.add({_key(PROBE): answer})

    def compare(self, prompts: list[str], ours: list[str], theirs: list[str], title: str) -> Verdicts:
        """Our texts against theirs, each (n,)."""
        differ = [i for i in range(len(prompts)) if ours[i].strip() != theirs[i].strip()]
        questions = [(prompts[i], ours[i], theirs[i]) for i in differ]
        answers = self._ask([*questions, *((prompt, b, a) for prompt, a, b in questions)], f"judge {title}")
        value = {"A": 1, "B": -1, "tie": 0, None: 0}
        wins, flips = [0.5] * len(prompts), [None] * len(prompts)
        for i, first, second in zip(differ, answers[: len(differ)], answers[len(differ) :], strict=True):
            if {first, second} <= {"A", "B"}:
                flips[i] = first == second  # the same place, so different texts
            if value[first] == -value[second]:
                wins[i] = (1 + value[first]) / 2
        return Verdicts(wins, flips, [len(a) - len(b) for a, b in zip(ours, theirs, strict=True)])

    def _ask(self, questions: list[Question], title: str) -> list[str | None]:
        """The answer to each question, from the file where it is there."""
        keys = [_key(question) for question in questions]
        asked = {key: each for key, each in zip(keys, questions, strict=True) if key not in self.log.answers}
        todo, size = list(asked.items()), self.judge.size
        parts = [dict(todo[start : start + size]) for start in range(0, len(todo), size)]

        def ask(part: dict[str, Question]) -> int:
            self.log.add(dict(zip(part, self.judge.answer(list(part.values())), strict=True)))
            return len(part)

        pool = ThreadPoolExecutor(self.judge.workers)
        try:
            with tqdm(total=len(todo), desc=title, unit="question") as bar:
                for done in as_completed([pool.submit(ask, part) for part in parts]):
                    bar.update(done.result())
        except UserError as error:
            kept = len(self.log.answers)
            raise UserError(f"{error}; the same command goes on from {kept} answers" if kept else str(error)) from error
        finally:
            pool.shutdown(cancel_futures=True)  # what is on its way is waited for, and kept
        return [self.log.answers[key]["answer"] for key in keys]

    def describe(self) -> dict:
        """Where the answers come from and what all of them in the file cost, those of earlier calls included."""
        answers, unreadable = self.log.answers.values(), self.log.unreadable()
        return {
            "judge": self.judge.source,
            "prompt": self.prompt | {"text": self.template},
            "questions": len(answers),
            **{name: sum(answer.get(name, 0) for answer in answers) for name in (*TOKENS, "retries")},
            "unreadable": len(unreadable),
            "unreadable_example": unreadable[0].get("reply") if unreadable else None,
        }


def read_template(path: Path) -> str:
    """The prompt for the judge; UserError if it cannot be read or lacks a placeholder."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge_prompt {path}: {getattr(error, 'strerror', None) or 'not utf-8'}") from error
    for name in ("{prompt}", "{a}", "{b}"):
        if name not in text:
            raise UserError(f"--judge_prompt {path}: has no {name}; it needs {{prompt}}, {{a}} and {{b}}")
    return text


def measure_verdicts(base: dict[str, Verdicts], tuned: dict[str, Verdicts], seed: int) -> dict:
    """The metrics of both models' verdicts by opponent: win rate, the same at equal length, and flip rate."""
    found = {}
    for other, ours in tuned.items():
        sides = {"base": base.get(other), "tuned": ours}
        found[f"judged_{other}"] = _each(sides, lambda side: interval(side.wins, seed=seed))
        if sides["base"]:
            found[f"judged_{other}"] = compare_pairs(sides["base"].wins, ours.wins, seed=seed)
        found[f"judged_{other}_lc"] = _each(sides, lambda side: length_controlled(side.wins, side.longer, seed))
        found[f"judged_{other}_flips"] = _each(sides, lambda side: _flip_rate(side.flips, seed))
    return found


def _each(sides: dict[str, Verdicts | None], estimate) -> dict:
    return {role: side and estimate(side) for role, side in sides.items()} | {"difference": None}


def _flip_rate(flips: list[bool | None], seed: int) -> dict:
    known = np.array([flip for flip in flips if flip is not None], dtype=float)
    if len(known) < 2:
        return {"mean": None, "low": None, "high": None, "n": len(known)}
    return interval(known, seed=seed)


def _key(question: Question) -> str:
    """A hash of the question as it is asked: without white space around its texts."""
    return hashlib.sha256(json.dumps([text.strip() for text in question]).encode()).hexdigest()
