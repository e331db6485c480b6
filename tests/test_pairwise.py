"""Win rates by a pairwise judge: an HTTP server on loopback, a language model, a function; and when it is stopped."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from eval import compare, intervals, judges, pairwise
from eval.loading import load_model, load_tokenizer
from eval.pairwise import PairwiseJudge, measure_verdicts
from judge_server import TEMPLATE, JudgeServer, completion
from test_eval import PROMPTS, changed_copy
from trl_ppo.inputs import UserError

KEY = "sk-planted-key-0123456789"


def letters(prompts, completions, **columns):
    return [len(completion) - 10.5 for completion in completions]


def longer_wins(prompts, pairs):
    return [int(len(b) > len(a)) if len(a) != len(b) else -1 for a, b in pairs]


def says_maybe(prompts, pairs):
    return ["maybe" for _ in pairs]


def says_too_little(prompts, pairs):
    return [0]


def breaks(prompts, pairs):
    raise KeyError("no such judge")


def takes_one(prompts):
    return []


@pytest.fixture
def serve():
    """Starts a server that judges by a function; they end with the test."""
    servers = []

    def serve(behave, port=0) -> JudgeServer:
        servers.append(JudgeServer(behave, port))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Makes the options of a judge, whose waits are short."""
    monkeypatch.setattr(judges, "BACKOFF", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "prompt.txt").write_text(TEMPLATE)

    def options(spec: str, **changes):
        given = {
            "pairwise_judge": spec,
            "judge_prompt": tmp_path / "prompt.txt",
            "judge_concurrency": 4,
            "judge_timeout": 5.0,
            "judge_key_env": "OPENAI_API_KEY",
            "judge_settings": {"temperature": 0},
            "batch_size": 8,
            "output": tmp_path / "out",
            "overwrite": False,
        }
        return SimpleNamespace(**given | changes)

    return options


def texts(n: int, seed: int = 0, shift: int = 0) -> list[str]:
    """Texts of different lengths, all different."""
    lengths = np.random.default_rng(seed).integers(5, 60, n) + shift
    return [f"{index} ".ljust(length, "ab"[seed % 2]) for index, length in enumerate(lengths)]


def a_wins(a, b, number):
    return "A"


def by_length(a, b, number):
    return "A" if len(a) > len(b) else "B"


def figures(verdicts) -> dict:
    return {
        key.removeprefix("judged_base"): found["tuned"]
        for key, found in measure_verdicts({}, {"base": verdicts}, 0).items()
    }


# --- What comes out -------------------------------------------------------------------------------------------------


def test_a_judge_that_always_says_a_comes_out_at_one_half_and_flips_on_every_prompt(serve, options):
    judge = PairwiseJudge(options(serve(a_wins).spec))
    verdicts = judge.compare(["p"] * 30, texts(30), texts(30, 1), "t")
    assert verdicts.wins == [0.5] * 30
    assert verdicts.flips == [True] * 30
    found = figures(verdicts)
    assert found[""] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 30}
    assert found["_lc"]["mean"] == pytest.approx(0.5, abs=1e-9)
    assert found["_flips"]["mean"] == 1


def test_a_perfect_judge_gives_the_wins_that_are_there_in_whichever_order_it_is_asked(serve, options):
    ours = ["good" if index % 4 else "bad" for index in range(40)]
    theirs = ["bad" if index % 4 else "good" for index in range(40)]
    server = serve(lambda a, b, number: "Preferred: **B**" if b == "good" else "A.")
    judge = PairwiseJudge(options(server.spec))
    verdicts = judge.compare([f"p{index}" for index in range(40)], ours, theirs, "t")
    assert verdicts.wins == [float(index % 4 > 0) for index in range(40)]
    assert not any(verdicts.flips)
    assert len(server.asked) == 1 + 2 * 40  # the easy question, and each prompt in both orders
    described = judge.describe()
    assert (described["questions"], described["prompt_tokens"], described["completion_tokens"]) == (81, 567, 81)


def test_a_judge_that_goes_by_length_wins_plainly_but_not_at_equal_length(options):
    ours, theirs = texts(300, 0, shift=20), texts(300, 1)
    verdicts = PairwiseJudge(options(f"{__name__}:longer_wins")).compare(["p"] * 300, ours, theirs, "t")
    found = figures(verdicts)
    assert found[""]["low"] > 0.7
    assert abs(found["_lc"]["mean"] - 0.5) < 0.12
    assert found["_lc"]["low"] < 0.5 < found["_lc"]["high"]


def test_a_win_that_has_nothing_to_do_with_length_stays_when_length_is_controlled():
    rng = np.random.default_rng(0)
    wins, longer = (rng.random(2000) < 0.7).astype(float), rng.normal(10, 20, 2000)
    found = intervals.length_controlled(wins, longer)
    assert found["low"] < 0.7 < found["high"]
    assert found["mean"] == pytest.approx(wins.mean(), abs=0.03)


def test_the_length_controlled_win_rate_is_where_the_likelihood_is_highest():
    rng = np.random.default_rng(1)
    longer = rng.normal(30, 25, 200)
    wins = rng.choice([0, 0.5, 1], 200, p=[0.2, 0.2, 0.6]) * (longer > 0)
    x = np.tanh(longer / longer.std())

    def minus_log_posterior(at):
        logits = at[0] + at[1] * x
        return (np.logaddexp(0, logits) - wins * logits).sum() + at[1] ** 2 / 2

    alpha = minimize(minus_log_posterior, [0, 0]).x[0]
    assert intervals.length_controlled(wins, longer)["mean"] == pytest.approx(1 / (1 + np.exp(-alpha)), abs=1e-5)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_at_equal_length_a_model_that_wins_or_loses_all_does_so_too(won):
    found = intervals.length_controlled([won] * 50, np.arange(50) - 10.0)
    assert found["mean"] == pytest.approx(won, abs=1e-6)
    assert intervals.length_controlled([won] * 50, [3] * 50)["mean"] is None, "no difference of lengths to control for"


def test_equal_texts_are_a_tie_without_a_question_and_equal_questions_are_asked_once(serve, options):
    server = serve(a_wins)
    verdicts = PairwiseJudge(options(server.spec)).compare(["p"] * 6, ["a", "b", "b"] * 2, ["a", "c", "c"] * 2, "t")
    assert verdicts.flips == [None, True, True] * 2
    assert PairwiseJudge(options(server.spec)).compare(["p "], [" b"], ["c\n"], "t").flips == [True]
    assert sum(server.asked.values()) == 1 + 2


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        (" b. ", "B"),
        ("**B**", "B"),
        ("Summary A", "A"),
        ("Better summary: (B)", "B"),
        ("B is shorter, A says more.\n\nPreferred: A\n", "A"),
        ("A is better than B", None),
        ("Neither", None),
        ("Both are bad", None),
        ("C", None),
        ("", None),
    ],
)
def test_a_letter_is_read_where_it_is_the_answer_and_not_where_it_is_a_word(reply, letter):
    assert judges.read_letter(reply) == letter


def test_braces_in_the_texts_are_no_placeholders():
    assert judges.fill("{prompt}|{a}|{b}|{c}", ("{a}", "{b}", "{prompt} {x}")) == "{a}|{b}|{prompt} {x}|{c}"


@pytest.mark.parametrize(
    "template", sorted(pairwise.TEMPLATE.parent.glob("pairwise_*.txt")), ids=lambda path: path.stem
)
def test_every_template_of_the_project_shows_the_texts_and_asks_for_a_letter(template):
    text = judges.fill(pairwise.read_template(template), ("THE PROMPT", "FIRST", "SECOND"))
    assert text.index("THE PROMPT") < text.index("FIRST") < text.index("SECOND") < text.index("A or B")


# --- A server that fails --------------------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(serve, options):
    times = []

    def limited(a, b, number):
        times.append(time.monotonic())
        return (429, {"Retry-After": 1}, b"slow down") if number == 2 else "A"

    judge = PairwiseJudge(options(serve(limited).spec, judge_concurrency=1))
    assert judge.compare(["p"], ["a"], ["b"], "t").wins == [0.5]
    assert times[2] - times[1] > 0.9
    assert judge.describe()["retries"] == 1


def test_a_server_that_is_slow_once_is_asked_again_and_one_that_is_always_is_an_error(serve, options):
    def slow(a, b, number):
        time.sleep(0.8 if number == 2 or a == "snail" else 0)
        return "A"

    judge = PairwiseJudge(options(serve(slow).spec, judge_timeout=0.3))
    assert judge.compare(["p"], ["a"], ["b"], "t").flips == [True]
    with pytest.raises(UserError, match=r"no answer: .*[Tt]imed? ?out.*goes on from 4 answers"):
        judge.compare(["p"], ["snail"], ["b"], "t")


def test_a_server_that_breaks_off_and_one_that_fails_for_a_while_are_asked_again(serve, options):
    def fails_at_times(a, b, number):
        if number % 3 == 0:
            return 503, {}, b"busy"
        if number % 3 == 1 and number > 1:
            return 200, {"Content-Length": 999, "Connection": "close"}, b'{"choi'
        return by_length(a, b, number)

    judge = PairwiseJudge(
        options(serve(fails_at_times).spec, judge_concurrency=1)
    )  # so that no question meets all failures
    ours, theirs = texts(12, 0), texts(12, 1)
    wins = judge.compare(["p"] * 12, ours, theirs, "t").wins
    assert [win for win, a, b in zip(wins, ours, theirs, strict=True) if len(a) != len(b)] == [
        float(len(a) > len(b)) for a, b in zip(ours, theirs, strict=True) if len(a) != len(b)
    ]


def test_a_server_that_dies_and_comes_back_is_waited_for(serve, options, monkeypatch):
    monkeypatch.setattr(judges, "BACKOFF", 0.1)
    server = serve(a_wins)
    judge = PairwiseJudge(options(server.spec))
    server.stop()
    judge.judge.http.clear()  # a connection that its threads still hold
    timer = threading.Timer(0.5, lambda: serve(a_wins, server.server_address[1]))
    timer.start()
    assert judge.compare(["p"] * 3, ["a", "b", "c"], ["d", "e", "f"], "t").flips == [True] * 3
    assert judge.describe()["retries"] > 0


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": None}, [], {"prompt_tokens": "7"}])
def test_a_server_that_does_not_count_its_tokens_is_a_judge_all_the_same(usage, serve, options):
    body = json.dumps({"choices": [{"message": {"content": "A"}}], "usage": usage}).encode()
    judge = PairwiseJudge(options(serve(lambda *_: (200, {}, body)).spec))
    assert judge.compare(["p"], ["a"], ["b"], "t").flips == [True]
    assert judge.describe()["prompt_tokens"] == 0


def test_one_reply_that_cannot_be_read_is_a_tie_and_is_reported(serve, options):
    garbage = {5: "I cannot say.", 9: (200, {}, b"<html>no JSON</html>")}
    judge = PairwiseJudge(
        options(serve(lambda a, b, n: garbage.get(n) or by_length(a, b, n)).spec, judge_concurrency=1)
    )
    verdicts = judge.compare(["p"] * 10, ["long" + "g" * i for i in range(10)], ["s"] * 10, "t")
    assert sorted(verdicts.wins) == [0.5] * 2 + [1.0] * 8
    assert verdicts.flips.count(None) == 2
    assert (judge.describe()["unreadable"], judge.describe()["unreadable_example"]) == (2, "I cannot say.")


@pytest.mark.parametrize(
    "garbage", ["Both are nice.", "", (200, {}, b"\xff\x00 no JSON"), (200, {}, b"[1]"), (200, {}, b'{"choices": []}')]
)
def test_a_judge_that_talks_nonsense_is_stopped_after_a_few_replies_with_an_example(garbage, serve, options):
    server = serve(lambda a, b, number: "A" if number == 1 else garbage)
    judge = PairwiseJudge(options(server.spec, judge_concurrency=1))
    with pytest.raises(UserError, match="4 of 5 replies of the judge are neither A nor B, such as"):
        judge.compare(["p"] * 50, texts(50), texts(50, 1), "t")
    assert sum(server.asked.values()) <= 25, "of 100: the thread that asks may be a little ahead of the one that counts"


REFUSALS = {
    "nonsense at once": ("Maybe.", "'Maybe.' is no answer to an easy question"),
    "no key": ((401, {}, b"who are you?"), r"it wants a key; put it into \$OPENAI_API_KEY \(HTTP 401\): who are you"),
    "no such model": ((404, {}, b"what?"), "it has no model 'judge-model', or the URL is another"),
    "a setting that it has not": ((400, {}, b"max_tokens is not supported"), "--judge_settings.*max_tokens is not"),
    "a rate limit without end": ((429, {}, b"no more money"), r"after several retries \(HTTP 429\): no more money"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_server_that_refuses_the_first_question_is_an_error_before_anything_else(case, serve, options, tmp_path):
    given, said = REFUSALS[case]
    with pytest.raises(UserError, match=said):
        PairwiseJudge(options(serve(lambda *_: given).spec))
    assert not (tmp_path / "out").exists()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_dead_server_is_an_error_at_once(options, monkeypatch):
    monkeypatch.setattr(judges, "BACKOFF", 5)  # seconds: it is not asked again and again
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer: .*refused"):
        PairwiseJudge(options(f"http://127.0.0.1:{free_port()}/v1#model"))
    assert time.monotonic() - started < 5


# --- The key --------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_is_never_written_even_if_the_server_repeats_it(serve, options, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    escaped = completion(f"{KEY} it was").replace(b"sk-", b"sk\\u002d")
    server = serve(lambda a, b, number: {1: "A", 2: f"You sent {KEY}"}.get(number) or (200, {}, escaped))
    judge = PairwiseJudge(options(server.spec, judge_key_env="MY_KEY"))
    judge.compare(["p"], ["a"], ["b"], "t")
    assert {headers["Authorization"] for headers in server.headers_seen} == {f"Bearer {KEY}"}
    written = (tmp_path / "out" / "answers.jsonl").read_text()
    assert all(reply in written for reply in ("You sent [key]", "[key] it was"))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()
    assert KEY not in json.dumps(judge.describe())
    refusing = serve(lambda *_: (401, {}, f"wrong key {KEY}".encode()))
    with pytest.raises(UserError, match=r"it refuses the key in \$MY_KEY .* wrong key \[key\]"):
        PairwiseJudge(options(refusing.spec, judge_key_env="MY_KEY", output=tmp_path / "other"))


@pytest.mark.parametrize("url", [f"http://me:{KEY}@localhost/v1#m", f"https://localhost/v1?key={KEY}#m"])
def test_a_key_in_the_url_is_refused_and_not_repeated(url, options):
    with pytest.raises(UserError, match=r"put a key into \$OPENAI_API_KEY") as error:
        PairwiseJudge(options(url))
    assert KEY not in str(error.value)


# --- Other judges ---------------------------------------------------------------------------------------------------


CHAT = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_language_model_gives_the_letter_that_it_finds_likelier(template, gpt2_path, options, tmp_path):
    path, tokenizer = shutil.copytree(gpt2_path, tmp_path / "judge"), load_tokenizer(gpt2_path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    judge = PairwiseJudge(options(str(path), batch_size=3))
    rows = [("the", "film", "plot"), ("a movie so", "good", "b"), ("the cast", "was", "not"), ("x", "y", "z")]
    answers = judge._ask(rows, "t")
    model, space = load_model(gpt2_path), [] if template else tokenizer(" ")["input_ids"]
    [a], [b] = (tokenizer(letter)["input_ids"] for letter in "AB")
    for row, answer in zip(rows, answers, strict=True):
        text = judges.fill(TEMPLATE, row)
        ids = tokenizer(f"[{text}]:" if template else text)["input_ids"] + space
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert answer == ("A" if logits[a] > logits[b] else "B")
    again = PairwiseJudge(options(str(path), batch_size=3))
    again.judge.answer = lambda questions: pytest.fail("asked again")
    assert again._ask(rows, "t") == answers


def test_a_question_that_is_too_long_for_a_language_model_is_an_error(gpt2_path, options):
    judge = PairwiseJudge(options(gpt2_path))
    with pytest.raises(UserError, match="over its 64 positions"):
        judge.compare(["p" * 100], ["a"], ["b"], "t")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("says_maybe", "returned 'maybe', not 0, 1 or -1"),
        ("says_too_little", "returned 1 answers to 6 pairs"),
        ("breaks", "failed: KeyError: 'no such judge'"),
        ("takes_one", r"f\(prompts, pairs\): too many"),
        ("PROMPTS", "is not a function"),
        ("nothing", "cannot import"),
    ],
)
def test_a_function_that_is_no_judge_is_an_error_that_names_it(name, said, options):
    with pytest.raises(UserError, match=rf"--pairwise_judge:? {__name__}:{name}|{name}.*") as error:
        PairwiseJudge(options(f"{__name__}:{name}")).compare(["p"] * 3, ["a", "b", "c"], ["d", "e", "f"], "t")
    assert re.search(said, str(error.value))


# --- Stopped and run again ------------------------------------------------------------------------------------------


def judge_500(given) -> dict:
    judge = PairwiseJudge(given)
    return vars(judge.compare([f"p{i}" for i in range(500)], texts(500), texts(500, 1), "t")) | judge.describe()


def test_500_prompts_in_2_orders_killed_half_way_and_resumed_ask_nothing_twice(serve, options, tmp_path):
    server, killed = serve(by_length), threading.Event()
    unbroken = judge_500(options(server.spec, output=tmp_path / "unbroken"))
    assert len(server.asked) == sum(server.asked.values()) == 1001  # with the easy question

    def stalls_half_way(a, b, number):
        if number > 500:
            killed.wait(60)
        return by_length(a, b, number)

    server.behave = stalls_half_way
    server.asked.clear()
    process = multiprocessing.get_context("fork").Process(target=judge_500, args=[options(server.spec)], daemon=True)
    process.start()
    answers, deadline = tmp_path / "out" / "answers.jsonl", time.monotonic() + 60
    while not answers.exists() or answers.read_bytes().count(b"\n") < 501:  # the first line is the fingerprint
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert sum(server.asked.values()) <= 504  # what was on its way was never answered
    killed.set()
    server.behave = by_length
    server.asked.clear()
    with answers.open("ab") as stream:
        stream.write(b'{"question": "torn')
    resumed = judge_500(options(server.spec))
    assert sum(server.asked.values()) == 1001 - 500
    assert max(server.asked.values()) == 1
    assert resumed == unbroken


def test_answers_by_another_judge_or_prompt_are_refused_and_replaced_when_asked(serve, options, tmp_path):
    spec = serve(a_wins).spec
    PairwiseJudge(options(spec))
    (tmp_path / "other.txt").write_text(TEMPLATE + " ")
    changes = {"judge_prompt": tmp_path / "other.txt"}
    with pytest.raises(UserError, match=r"another prompt .*--overwrite"):
        PairwiseJudge(options(spec, **changes))
    with pytest.raises(UserError, match=r"another judge .*--overwrite"):
        PairwiseJudge(options(spec, judge_settings={"temperature": 1}))
    assert PairwiseJudge(options(spec, overwrite=True)).log.resumed == 1
    assert PairwiseJudge(options(spec, overwrite=True, **changes)).log.resumed == 0
    assert PairwiseJudge(options(spec, **changes)).log.resumed == 1


# --- A whole comparison ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(gpt2_path, tmp_path, options, monkeypatch):
    """Compares the random GPT-2 with a changed copy, with references; returns the results and their folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": prompt, "summary": f"{prompt} very good"} for prompt in PROMPTS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = changed_copy(gpt2_path, tmp_path / "tuned")
    argv = ["--base", gpt2_path, "--prompts", str(tmp_path / "data.jsonl"), "--reference_column", "summary"]
    argv += ["--reward", f"letters={__name__}:letters", "--max_new_tokens", "6", "--batch_size", "5"]
    argv += ["--judge_prompt", str(tmp_path / "prompt.txt")]

    def run(spec, *more):
        more = more or ("--tuned", tuned)
        return compare.main([*argv, "--output", str(tmp_path / "out"), "--pairwise_judge", spec, *more])

    return run


def test_a_comparison_reports_win_rates_against_the_base_and_the_references(serve, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(by_length)
    results = run(server.spec)
    metrics, samples = results["metrics"], results["samples"]
    for role, other in (("tuned", "base"), ("tuned", "reference"), ("base", "reference")):
        against = [sample["base"]["completion"] if other == "base" else sample["reference"] for sample in samples]
        lengths = [(len(s[role]["completion"].strip()), len(t.strip())) for s, t in zip(samples, against, strict=True)]
        wins = [float(a > b) for a, b in lengths if a != b]
        assert [s[role]["judged"][other] for s, (a, b) in zip(samples, lengths, strict=True) if a != b] == wins
        assert metrics[f"judged_{other}"][role]["mean"] == np.mean([s[role]["judged"][other] for s in samples])
    difference = np.subtract(*(metrics["judged_reference"][role]["mean"] for role in ("tuned", "base")))
    assert metrics["judged_reference"]["difference"]["mean"] == pytest.approx(difference)
    assert results["pairwise"]["questions"] == sum(server.asked.values())
    rows = ["pairwise win rate over reference, equal length", "flip rate against base"]
    for text in ((tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()):
        assert all(row in text for row in [*rows, "A pairwise judge, asked in both orders", "judge-model"])
    assert rows[1] in " ".join(capsys.readouterr().out.split())
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


def test_several_runs_have_the_judges_win_rate_in_their_table(run, tmp_path, gpt2_path):
    results = run(f"{__name__}:longer_wins", "--runs", str(tmp_path / "tuned"), gpt2_path)
    rates = [each["metrics"]["judged_base"]["tuned"]["mean"] for each in results["runs"]]
    assert rates[1] == 0.5  # the base against itself
    assert results["over_runs"]["judged_base"]["tuned"]["mean"] == pytest.approx(np.mean(rates))
    assert "pairwise win rate over base" in (tmp_path / "out" / "report.md").read_text()


def test_an_interrupted_comparison_goes_on_and_asks_no_question_again(serve, run, tmp_path, monkeypatch):
    counted = serve(by_length)
    add = pairwise.AnswerLog.add

    def interrupted(log, answers):
        add(log, answers)
        if len(log.answers) == 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise.AnswerLog, "add", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run(counted.spec)
    assert not (tmp_path / "out" / "results.json").exists()
    results = run(counted.spec)
    assert max(counted.asked.values()) == 1
    assert results["pairwise"]["questions"] == len(counted.asked)


def test_a_dead_judge_ends_a_comparison_before_a_model_loads(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda path: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="2"):
        run(f"http://127.0.0.1:{free_port()}/v1#m")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(r"eval.compare: error: --pairwise_judge http.* no answer: .*refused", line)
    assert not (tmp_path / "out").exists()
