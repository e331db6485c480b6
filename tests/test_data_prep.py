"""Properties of what `data_prep` writes, on tiny folders of our own and, where it exists, on real IMDB."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from conftest import ROOT
from data_helpers import fails_in_one_line, files_under, rows_of
from data_prep import imdb, toy_reviews

pytestmark = pytest.mark.usefixtures("own_cache")


# --- Toy reviews --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews() -> list[toy_reviews.Review]:
    rng = random.Random(1)
    return [toy_reviews.make_review(rng) for _ in range(5000)]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_reviews.main(["--output", str(folder), "--train", "600", "--test", "200"])
    return folder


def score(text: str) -> float:
    return toy_reviews.lexicon_score(prompts=[""], completions=[text])[0]


def positive_share(text: str) -> float:
    """Of the opinion words of a text, the share that is positive."""
    signs = toy_reviews.opinion_signs(text)
    return signs.count(1) / len(signs)


def test_toy_reviews_seldom_repeat(reviews):
    texts = [review.text for review in reviews]
    assert 1 - len(set(texts)) / len(texts) < 0.01


def test_toy_reviews_are_short_and_plain(reviews):
    for review in reviews:
        assert 7 <= len(review.opening.split()) <= 10
        assert 12 <= len(review.text.split()) <= 33
        assert set(review.text) <= set("abcdefghijklmnopqrstuvwxyz .")
        assert "  " not in review.text
        assert review.text == review.text.strip()


def test_toy_labels_are_mixed_40_40_20(reviews):
    shares = Counter(review.label for review in reviews)
    for label, share in ((1, 0.4), (0, 0.4), (None, 0.2)):
        assert shares[label] / len(reviews) == pytest.approx(share, abs=0.03)


def test_toy_scores_agree_with_labels(reviews):
    for review in reviews:
        signs = set(toy_reviews.opinion_signs(review.text))
        assert signs == {1: {1}, 0: {-1}, None: {1, -1}}[review.label]
        if review.label is not None:
            assert (score(review.text) > 0) == (review.label == 1)
            assert abs(score(review.text)) >= 2


def test_toy_openings_hold_no_opinion_and_no_aspect(reviews):
    opinions = toy_reviews.POSITIVE | toy_reviews.NEGATIVE
    for review in reviews:
        words = set(review.opening.rstrip(".").split())
        assert not words & (opinions | set(toy_reviews.ASPECTS))


def test_the_opening_is_drawn_apart_from_the_label():
    openings = {toy_reviews.make_review(random.Random(7), label).opening for label in (1, 0, None, "any")}
    assert len(openings) == 1


def test_no_opening_word_predicts_the_label(reviews):
    """Four standard deviations of a fair coin allow for some 300 words looked at; a leak of any use exceeds them."""
    total, positive = Counter(), Counter()
    for review in reviews:
        if review.label is not None:
            words = set(review.opening.split())
            total.update(words)
            positive.update(words if review.label else ())
    base = sum(r.label == 1 for r in reviews) / sum(r.label is not None for r in reviews)
    assert len(total) > 100
    for word, count in total.items():
        assert abs(positive[word] - base * count) <= 4 * (base * (1 - base) * count) ** 0.5 + 1, word


def test_no_word_of_the_toy_lexicon_is_both_positive_and_negative():
    assert not toy_reviews.POSITIVE & toy_reviews.NEGATIVE
    assert min(len(toy_reviews.POSITIVE), len(toy_reviews.NEGATIVE)) > 20


def test_the_toy_score_counts_whole_words_once_each_in_the_completion_only():
    good, bad = sorted(toy_reviews.POSITIVE)[0], sorted(toy_reviews.NEGATIVE)[0]
    completions = [f"{good}, {good.upper()}. {bad}", f"{good}x x{bad}", "", f" {bad} {bad}."]
    scores = toy_reviews.lexicon_score(prompts=[good] * 4, completions=completions, completion_ids=[[1]] * 4)
    assert scores == [1.0, 0.0, 0.0, -2.0]
    assert all(type(value) is float for value in scores)


def test_a_cut_toy_review_still_shows_its_label(reviews):
    rng = random.Random(2)
    cuts = [(review, toy_reviews.cut(review, rng)) for review in reviews[:500]]
    for review, text in cuts:
        assert (review.text + " ").startswith(text + " ")
        assert set(toy_reviews.opinion_signs(text)) == {1: {1}, 0: {-1}, None: {1, -1}}[review.label]
    assert sum(not text.endswith(".") for _, text in cuts) > 250


def test_toy_pairs_put_the_more_positive_first_and_length_does_not_tell(toy_folder):
    pairs = rows_of(toy_folder / "pairs" / "train.jsonl")
    for pair in pairs:
        assert positive_share(pair["chosen"]) > positive_share(pair["rejected"])
    assert {positive_share(pair["chosen"]) for pair in pairs} > {1.0}, "some chosen reviews are mixed"
    longer = [len(pair["chosen"].split()) > len(pair["rejected"].split()) for pair in pairs]
    shorter = [len(pair["chosen"].split()) < len(pair["rejected"].split()) for pair in pairs]
    assert abs(sum(longer) - sum(shorter)) / len(pairs) < 0.15


def test_toy_prompts_are_openings_cut_at_a_word(toy_folder):
    for split in ("train", "test"):
        prompts = [row["prompt"] for row in rows_of(toy_folder / "prompts" / f"{split}.jsonl")]
        lengths = {len(prompt.split(" ")) for prompt in prompts}
        assert min(lengths) == 3
        assert max(lengths) == 10
        for prompt in prompts:
            assert prompt == prompt.strip()
            assert not toy_reviews.opinion_signs(prompt)


def test_toy_splits_share_no_text(toy_folder):
    for kind in ("sft", "prompts", "pairs"):
        train, test = (
            {text for row in rows_of(toy_folder / kind / f"{split}.jsonl") for text in row.values()}
            for split in ("train", "test")
        )
        assert len(test) >= 200
        assert not train & test


def test_the_same_seed_writes_the_same_toy_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        toy_reviews.main(["--output", str(tmp_path / name), "--seed", str(seed), "--train", "50", "--test", "9"])
    first, second, other = (files_under(tmp_path / name) for name in "abc")
    assert len(first) == 6
    assert first == second
    assert all(first[name] != other[name] for name in first)


def test_toy_reviews_says_how_many_rows_it_wrote(tmp_path, capsys):
    counts = toy_reviews.main(["--output", str(tmp_path), "--train", "50", "--test", "9"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(counts) == 6
    for (name, count), line in zip(counts.items(), printed, strict=True):
        assert count == len(rows_of(tmp_path / name)) == (50 if "train" in name else 9)
        assert f"{name}: {count} rows" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--train", "0"], "--train"), (["--test", "many"], "--test"), (["--sed", "1"], "--sed"), (["--seed", "x"], "x")],
)
def test_toy_reviews_refuses_bad_arguments_in_one_line(tmp_path, capsys, arguments, named):
    message = fails_in_one_line(capsys, toy_reviews.main, "--output", tmp_path / "out", *arguments)
    assert named in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", [toy_reviews.main, imdb.main])
def test_a_file_where_the_output_folder_should_be_is_left_alone(tmp_path, capsys, main):
    (tmp_path / "taken").write_text("mine")
    message = fails_in_one_line(capsys, main, "--output", tmp_path / "taken" / "deeper")
    assert "--output" in message
    assert files_under(tmp_path) == {"taken": b"mine"}


def test_a_write_that_fails_leaves_the_earlier_files_as_they_were(tmp_path):
    toy_reviews.write_files(tmp_path, {"sft/train.jsonl": [{"text": "old"}]})
    before = files_under(tmp_path)
    with pytest.raises(TypeError):
        toy_reviews.write_files(tmp_path, {"sft/train.jsonl": [{"text": "new"}], "sft/test.jsonl": [{"text": {1}}]})
    assert files_under(tmp_path) == before


def test_asking_for_more_rows_than_the_grammar_has_is_an_error():
    with pytest.raises(SystemExit, match="fewer rows"):
        toy_reviews.distinct_rows(lambda: {"text": "the only one"}, 2, set(), "sft")


# --- IMDB ---------------------------------------------------------------------------------------------------------


def make_source(folder: Path, **changes: list[dict] | None) -> Path:
    """A folder in IMDB's schema: every review's words carry its split, label and number; `None` leaves a split out."""

    def reviews(split: str, count: int, labels: tuple[int, ...]) -> list[dict]:
        return [
            {"text": " ".join(f"{split}{number}w{i}l{labels[number % len(labels)]}" for i in range(60)),
             "label": labels[number % len(labels)]}
            for number in range(count)
        ]  # fmt: skip

    splits = {
        "train": reviews("train", 24, (0, 1)),
        "test": reviews("test", 12, (0, 1)),
        "unsupervised": reviews("unsupervised", 8, (-1,)),
    }
    folder.mkdir(parents=True)
    for name, rows in (splits | changes).items():
        if rows is not None:
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def good_rows(source: Path, split: str) -> list[dict]:
    with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare(source: Path, output: Path, *arguments: str) -> dict[str, int]:
    return imdb.main(["--source", str(source), "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def imdb_folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("imdb")
    source = make_source(folder / "source")
    prepare(source, folder / "out")
    return source, folder / "out"


def label_in(text: str) -> str:
    """The one label that the words of a text made by `make_source` carry."""
    (label,) = {word.rpartition("l")[2] for word in text.split()}
    return label


def origin(text: str) -> str:
    """The split and number of the review that a text made by `make_source` is from."""
    (source,) = {word.partition("w")[0] for word in text.split()}
    return source


def test_sft_holds_every_text_of_train_and_unsupervised_or_of_test(imdb_folders):
    source, out = imdb_folders
    for side, splits in (("train", ("train", "unsupervised")), ("test", ("test",))):
        wanted = [row["text"] for split in splits for row in good_rows(source, split)]
        assert sorted(row["text"] for row in rows_of(out / "sft" / f"{side}.jsonl")) == sorted(wanted)


def test_prompts_are_the_first_thirty_words_of_labelled_reviews(imdb_folders):
    source, out = imdb_folders
    for split in ("train", "test"):
        wanted = [" ".join(row["text"].split()[:30]) for row in good_rows(source, split)]
        assert sorted(row["prompt"] for row in rows_of(out / "prompts" / f"{split}.jsonl")) == sorted(wanted)


def test_every_pair_and_snippet_is_positive_over_negative_within_its_split(imdb_folders):
    _, out = imdb_folders
    for kind in ("pairs", "snippets", "judge_snippets"):
        for split in ("train", "test"):
            pairs = rows_of(out / kind / f"{split}.jsonl")
            assert pairs
            for pair in pairs:
                assert (label_in(pair["chosen"]), label_in(pair["rejected"])) == ("1", "0")
                assert all(origin(text).startswith(split) for text in pair.values())


def test_each_labelled_review_is_in_one_pair(imdb_folders):
    source, out = imdb_folders
    for split in ("train", "test"):
        texts = [text for pair in rows_of(out / "pairs" / f"{split}.jsonl") for text in pair.values()]
        assert sorted(texts) == sorted(row["text"] for row in good_rows(source, split))


def test_the_judge_sees_none_of_the_reviews_that_the_snippets_are_from(imdb_folders):
    _, out = imdb_folders
    ours, judges = (
        {origin(text) for pair in rows_of(out / kind / "train.jsonl") for text in pair.values()}
        for kind in ("snippets", "judge_snippets")
    )
    assert len(ours) > 1
    assert len(judges) > 1
    assert not ours & judges
    assert (out / "snippets" / "test.jsonl").read_bytes() == (out / "judge_snippets" / "test.jsonl").read_bytes()


def test_a_test_review_gives_one_snippet_and_a_train_review_as_many_as_asked(imdb_folders, tmp_path):
    source, out = imdb_folders
    prepare(source, tmp_path / "two", "--snippets_per_review", "2")
    for folder, split, most in ((out, "test", 1), (out, "train", 6), (tmp_path / "two", "train", 2)):
        pairs = rows_of(folder / "snippets" / f"{split}.jsonl")
        counts = Counter(origin(text) for pair in pairs for text in pair.values())
        assert max(counts.values()) == most


def test_snippets_are_6_to_40_consecutive_words_and_half_start_the_review():
    rng, words = random.Random(0), [f"w{i}" for i in range(100)]
    snippets = [imdb.make_snippet(" ".join(words), rng).split() for _ in range(2000)]
    starts = [words.index(snippet[0]) for snippet in snippets]
    for start, snippet in zip(starts, snippets, strict=True):
        assert snippet == words[start : start + len(snippet)]
    assert {len(snippet) for snippet in snippets} == set(range(6, 41))
    assert starts.count(0) / len(starts) == pytest.approx(0.5, abs=0.05)
    assert imdb.make_snippet("only five words in it", rng) is None


def test_only_reviews_over_200_characters_give_prompts():
    assert imdb.make_prompt("a" * 200) is None
    assert imdb.make_prompt("a" * 201) == "a" * 201


def test_cleaning_removes_line_breaks_of_both_kinds():
    assert imdb.clean(" one<br /><br />two\n\tthree <BR>four\u0085") == "one two three four"


def test_the_same_seed_writes_the_same_imdb_bytes_and_another_does_not(imdb_folders, tmp_path):
    source, out = imdb_folders
    prepare(source, tmp_path / "again")
    prepare(source, tmp_path / "other", "--seed", "1")
    assert len(files_under(out)) == 10
    assert files_under(tmp_path / "again") == files_under(out)
    assert files_under(tmp_path / "other")["pairs/train.jsonl"] != files_under(out)["pairs/train.jsonl"]


def test_a_limit_takes_both_labels_of_a_source_sorted_by_label(imdb_folders, tmp_path):
    source, _ = imdb_folders
    ordered = {split: sorted(good_rows(source, split), key=lambda row: row["label"]) for split in ("train", "test")}
    counts = prepare(make_source(tmp_path / "sorted", **ordered), tmp_path / "out", "--limit", "10")
    assert counts["sft/train.jsonl"] == 10 + 8
    assert counts["sft/test.jsonl"] == 10
    assert counts["pairs/train.jsonl"] >= 1


def test_plain_jsonl_is_read_as_well_as_gzip(imdb_folders, tmp_path):
    source, out = imdb_folders
    (tmp_path / "plain").mkdir()
    for split in ("train", "test", "unsupervised"):
        text = gzip.decompress((source / f"{split}.jsonl.gz").read_bytes())
        (tmp_path / "plain" / f"{split}.jsonl").write_bytes(text)
    prepare(tmp_path / "plain", tmp_path / "out")
    assert files_under(tmp_path / "out") == files_under(out)


def test_malformed_rows_are_counted_and_reported(imdb_folders, tmp_path, capsys):
    source, out = imdb_folders
    bad = [
        {"text": "", "label": 1},
        {"text": "<br />", "label": 1},
        {"text": 5, "label": 0},
        {"text": None, "label": 0},
        {"text": ["a"], "label": 0},
        {"text": "a", "label": 2},
        {"text": "b", "label": "pos"},
        {"text": "c", "label": True},
        {"text": "no label"},
    ]
    dirty = make_source(tmp_path / "dirty", train=good_rows(source, "train") + bad)
    prepare(dirty, tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if ": malformed" in line]
    assert line.startswith(f"train: malformed: {len(bad)} ")
    good, kept = (
        sorted((folder / "sft" / "train.jsonl").read_text().splitlines()) for folder in (out, tmp_path / "out")
    )
    assert kept == good


def test_repeated_texts_and_test_reviews_known_from_train_are_dropped_and_counted(imdb_folders, tmp_path, capsys):
    source, out = imdb_folders
    train, test, unsupervised = (good_rows(source, split) for split in ("train", "test", "unsupervised"))
    spaced = {"text": train[2]["text"].replace(" ", "<br />"), "label": 0}
    leaky = make_source(
        tmp_path / "leaky", train=[*train, train[0]], test=[*test, train[1], spaced, unsupervised[0], test[0]]
    )
    counts = prepare(leaky, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "train: already in train: 1 " in printed
    assert "test: already in train: 2 " in printed
    assert "test: already in unsupervised: 1 " in printed
    assert "test: already in test: 1 " in printed
    assert counts["sft/train.jsonl"] == len(rows_of(out / "sft" / "train.jsonl"))
    assert counts["sft/test.jsonl"] == len(test)


ONE = [{"text": "fine " * 60, "label": 1}]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"unsupervised": None}, "unsupervised"),
        ({"test": None}, "test"),
        ({"train": [{"text": "a"}]}, "label"),
        ({"test": [{"review": "a", "label": 1}]}, "text"),
        ({"train": []}, "empty"),
        ({"train": ONE}, "pairs/train.jsonl"),
    ],
)
def test_a_source_that_lacks_something_is_refused_by_its_name(tmp_path, capsys, changes, named):
    source = make_source(tmp_path / "source", **changes)
    message = fails_in_one_line(capsys, imdb.main, "--source", source, "--output", tmp_path / "out")
    assert "--source" in message
    assert named in message
    assert not files_under(tmp_path / "out")


def test_a_file_that_is_no_jsonl_is_refused_by_its_name(tmp_path, capsys):
    source = make_source(tmp_path / "source", test=None)
    (source / "test.jsonl").write_text('{"text": "a", "label": 1}\n{oops\n')
    message = fails_in_one_line(capsys, imdb.main, "--source", source, "--output", tmp_path / "out")
    assert "test.jsonl" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_and_a_bad_limit_are_refused(tmp_path, capsys):
    output = ("--output", tmp_path / "out")
    assert "nowhere" in fails_in_one_line(capsys, imdb.main, "--source", tmp_path / "nowhere", *output)
    assert "--limit" in fails_in_one_line(capsys, imdb.main, "--limit", "-3", *output)
    assert not (tmp_path / "out").exists()


def test_an_error_during_the_run_leaves_the_earlier_files_as_they_were(imdb_folders, tmp_path, monkeypatch):
    source, _ = imdb_folders
    prepare(source, tmp_path / "out")
    before = files_under(tmp_path / "out")
    monkeypatch.setattr(imdb, "make_pairs", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(source, tmp_path / "out", "--seed", "5")
    assert files_under(tmp_path / "out") == before


@pytest.mark.parametrize("script", ["toy_reviews.py", "imdb.py"])
def test_a_script_exits_with_one_line_on_stderr(tmp_path, script):
    command = [sys.executable, str(ROOT / "data_prep" / script), "--seed", "zero"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "--seed" in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_importing_the_scripts_is_free():
    code = "import sys; from data_prep import imdb, toy_reviews; print({'datasets', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_real_imdb_gives_every_file(shared_data, tmp_path):
    counts = prepare(shared_data / "imdb", tmp_path / "out", "--limit", "200")
    assert counts["sft/train.jsonl"] == 400
    assert 190 <= counts["sft/test.jsonl"] <= 200
    labels = {
        imdb.clean(row["text"]): row["label"]
        for split in ("train", "test")
        for row in good_rows(shared_data / "imdb", split)
    }
    for split in ("train", "test"):
        pairs = rows_of(tmp_path / "out" / "pairs" / f"{split}.jsonl")
        assert len(pairs) > 50
        assert all((labels[pair["chosen"]], labels[pair["rejected"]]) == (1, 0) for pair in pairs)
    train, test = ({row["text"] for row in rows_of(tmp_path / "out" / "sft" / f"{s}.jsonl")} for s in ("train", "test"))
    assert not train & test
    assert not any("<br" in text for text in train | test)
