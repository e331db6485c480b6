"""Properties of `data_prep/summaries.py` and `data_prep/sampled_pairs.py`, on small posts and on real ones."""

from collections import Counter, defaultdict

import pytest

from data_helpers import fails_in_one_line, files_under, left_out, rows_of, run, write_rows
from data_prep import sampled_pairs, summaries

pytestmark = pytest.mark.usefixtures("own_cache")
COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey")


def summary_of(n: int) -> str:
    """A sentence of 5 to 9 words that differs from post to post."""
    return (
        " ".join(["My", f"cat{n}", "likes", COLOURS[n % 7], "boxes", "very", "much", "in", "winter"][: 5 + n % 5]) + "."
    )


def post(n: int, **changes) -> dict:
    body = f"Post {n} says that my cat is {COLOURS[n % 7]}. It sleeps in a box all day and all night long."
    prompt = f"SUBREDDIT: r/cats\n\nTITLE: A title of post {n}\n\nPOST: {body}\n\nTL;DR:"
    return {"prompt": prompt, "completion": summary_of(n)} | changes


@pytest.fixture
def source(tmp_path):
    """Writes a source of 200 posts of train and 20 of validation, with more of them; returns the arguments."""

    def make(train=(), validation=()) -> list:
        write_rows(tmp_path / "in" / "train.jsonl.gz", [*map(post, range(200)), *train])
        write_rows(tmp_path / "in" / "validation.jsonl", [*map(post, range(1000, 1020)), *validation])
        return ["--source", tmp_path / "in", "--output", tmp_path / "out"]

    return make


def texts(folder, kind: str, side: str) -> list[str]:
    return [row.get("text") or row["prompt"] for row in rows_of(folder / kind / f"{side}.jsonl")]


def posts_in(folder, kind: str, side: str) -> set[str]:
    return {text.split("POST: ")[1].split("\n\n")[0] for text in texts(folder, kind, side)}


# --- Which post is in which file ----------------------------------------------------------------------------------


def test_no_post_is_in_two_groups_and_none_of_test_in_train(source, tmp_path):
    again = [post(7, completion="Another summary of it."), post(1003), post(8, prompt=post(8)["prompt"].upper())]
    run(summaries.main, *source(train=again))
    train = {kind: posts_in(tmp_path / "out", kind, "train") for kind in summaries.KINDS}
    test = set.union(*(posts_in(tmp_path / "out", kind, "test") for kind in summaries.KINDS))
    assert train["pretrain"] == train.pop("sft")  # one model's
    everything = [text for group in train.values() for text in group]
    assert len(everything) == len({text.casefold() for text in everything}) == 200
    assert len(test) == 20
    assert not test & set(everything)


def test_a_post_is_in_the_same_group_whatever_else_is_read_and_whatever_is_to_be_written(source, tmp_path):
    run(summaries.main, *source())
    whole = {kind: posts_in(tmp_path / "out", kind, "train") for kind in summaries.KINDS}
    run(summaries.main, *source(), "--target", "title", "--limit", 120, "--output", tmp_path / "part")
    for kind, found in whole.items():
        assert posts_in(tmp_path / "part", kind, "train") <= found


def test_the_title_becomes_what_is_to_be_written_and_the_prompt_holds_it_no_longer(source, tmp_path):
    run(summaries.main, *source(), "--target", "title")
    row = rows_of(tmp_path / "out" / "sft" / "train.jsonl")[0]
    number = row["prompt"].split("Post ")[1].split()[0]
    assert row["completion"] == f" A title of post {number}"
    assert "A title" not in row["prompt"]
    assert row["prompt"].startswith("SUBREDDIT: r/cats\n\nPOST: Post ")
    assert row["prompt"].endswith("\n\nTITLE:")


def test_a_source_whose_completions_are_titles_may_be_asked_for_titles_too(source, tmp_path):
    ready = [post(n, prompt=f"SUBREDDIT: r/cats\n\nPOST: Number {n} purrs.\n\nTITLE:") for n in range(300, 420)]
    run(summaries.main, *source(train=ready), "--target", "title")
    rows = [row for row in rows_of(tmp_path / "out" / "sft" / "train.jsonl") if "Number" in row["prompt"]]
    assert rows
    assert {row["completion"] for row in rows} <= {f" {summary_of(n)}" for n in range(300, 420)}


def test_dialogsums_own_columns_become_a_prompt(tmp_path):
    rows = [{"dialogue": f"#Person1#: Hello {n}.\n#Person2#: Good bye.", "summary": summary_of(n)} for n in range(240)]
    write_rows(tmp_path / "in" / "train.jsonl", rows[:200])
    write_rows(tmp_path / "in" / "test.jsonl", rows[200:])
    run(summaries.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    prompts = texts(tmp_path / "out", "sft", "train")
    assert all(text.startswith("#Person1#: Hello") and text.endswith("\n\nTL;DR:") for text in prompts)


def test_long_malformed_and_repeated_rows_are_counted_and_left_out(source, capsys):
    bad = [post(0, completion=" "), post(0, prompt="no cue"), post(0, prompt="POST: \n\nTL;DR:"), post(0, prompt=3)]
    bad += [post(3), post(0, prompt=f"POST: {'word ' * 201}\n\nTL;DR:"), post(300, completion="word " * 33)]
    run(summaries.main, *source(train=bad))
    assert left_out(capsys.readouterr().out) == {
        "train: malformed": 4,
        "train: already in train": 1,
        "train: post of over 200 words": 1,
        "train: summary of over 32 words": 1,
    }


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(summaries.main, *source(), "--output", tmp_path / name, "--seed", seed)
    first, second, other = (files_under(tmp_path / name) for name in "abc")
    assert len(first) == 10
    assert first == second
    assert first["pairs/train.jsonl"] != other["pairs/train.jsonl"]


# --- Pairs --------------------------------------------------------------------------------------------------------


def test_a_rejected_summary_is_spoilt_in_the_way_that_its_source_names(source, tmp_path):
    run(summaries.main, *source(), "--pairs_per_post", 5)
    written = {row["completion"] for row in map(post, range(200))}
    seen = Counter()
    for row in rows_of(tmp_path / "out" / "pairs" / "train.jsonl"):
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
        good, bad = (text.casefold().replace(".", "").split() for text in (chosen, rejected))
        body = row["prompt"].split("POST: ")[1].casefold().replace(".", "").split()
        assert chosen in written
        assert chosen != rejected
        holds = {
            "other": rejected in written,
            "lead": bad == body[: len(good)] and rejected.endswith("."),
            "shuffled": sorted(bad) == sorted(good) and rejected.endswith("."),
            "truncated": len(bad) < len(good) and good[: len(bad)] == bad,
            "repeated": len(bad) > len(good) and bad[: len(good)] == good and set(bad) == set(good),
        }
        assert holds[row["source"]], row
        seen[row["source"]] += 1
    assert set(seen) == {"other", "lead", "shuffled", "truncated", "repeated"}


def ruler(rows: list[dict], size) -> dict[str, float]:
    """The share of pairs in which the chosen text is longer, ties counting half, by source and in all."""
    longer = defaultdict(list)
    for row in rows:
        more = size(row["chosen"]) - size(row["rejected"])
        for name in (row["source"], "all"):
            longer[name].append((more > 0) + 0.5 * (more == 0))
    return {name: sum(found) / len(found) for name, found in longer.items()}


@pytest.mark.parametrize("name", ["reddit_tldr_2013", "dialogsum"])
def test_on_real_posts_length_alone_does_not_tell_chosen_from_rejected(name, shared_data, tmp_path):
    if not (shared_data / name).is_dir():
        pytest.skip(f"no real data: {shared_data / name} does not exist (set RLHF_TEST_DATA)")
    run(summaries.main, "--source", shared_data / name, "--output", tmp_path, "--limit", 4000, "--pairs_per_post", 5)
    pairs = rows_of(tmp_path / "pairs" / "train.jsonl") + rows_of(tmp_path / "judge_pairs" / "train.jsonl")
    assert len(pairs) > 1500
    words = ruler(pairs, lambda text: len(text.split()))
    assert words["all"] == pytest.approx(0.5, abs=0.03)
    assert words["other"] == pytest.approx(0.5, abs=0.08)  # of about 400
    assert words["shuffled"] == 0.5


def test_real_comparisons_join_the_pairs_and_their_posts_leave_the_other_files(source, tmp_path):
    def compared(n):
        return {"prompt": post(n)["prompt"], "chosen": f" good {n}", "rejected": f"bad {n}", "margin": 0.5}

    same = compared(3) | {"rejected": " Good  3"}
    write_rows(tmp_path / "real" / "train.jsonl", [*map(compared, range(0, 60)), compared(1001), same])
    write_rows(tmp_path / "real" / "test.jsonl", [compared(500)])
    run(summaries.main, *source(), "--comparisons", tmp_path / "real")
    found = {kind: rows_of(tmp_path / "out" / kind / "train.jsonl") for kind in summaries.PAIRS}
    real = {kind: {r["prompt"] for r in rows if r["source"] == "comparison"} for kind, rows in found.items()}
    assert len(real["pairs"]) + len(real["judge_pairs"]) == len(real["pairs"] | real["judge_pairs"]) == 60
    assert min(map(len, real.values())) > 10
    assert {"chosen": " good 2", "rejected": " bad 2"}.items() <= next(
        row for rows in found.values() for row in rows if row["prompt"] == post(2)["prompt"]
    ).items()
    others = {text for kind in ("sft", "prompts") for text in texts(tmp_path / "out", kind, "train")}
    assert not others & (real["pairs"] | real["judge_pairs"])
    assert post(500)["prompt"] in texts(tmp_path / "out", "judge_pairs", "test")


# --- Sampled summaries --------------------------------------------------------------------------------------------


def test_a_models_samples_become_rejected_beside_the_reference_of_their_prompt(source, tmp_path, capsys):
    run(summaries.main, *source())
    pairs = {side: rows_of(tmp_path / "out" / "pairs" / f"{side}.jsonl") for side in ("train", "test")}
    first, other = pairs["train"][0], pairs["test"][0]
    samples = [
        {"prompt": first["prompt"], "completion": "a sample"},
        {"prompt": other["prompt"], "completion": " of test"},
        {"prompt": first["prompt"], "completion": first["chosen"].upper()},
        {"prompt": "POST: unknown\n\nTL;DR:", "completion": "x"},
        {"prompt": first["prompt"], "completion": " "},
    ]
    file = write_rows(tmp_path / "samples.jsonl", samples)
    folder = ["--pairs", tmp_path / "out" / "pairs", "--output", tmp_path / "more"]
    run(sampled_pairs.main, *folder, "--samples", file)
    assert left_out(capsys.readouterr().out)["samples: malformed"] == 3
    for side, row, text in (("train", first, " a sample"), ("test", other, " of test")):
        rows = rows_of(tmp_path / "more" / f"{side}.jsonl")
        added = {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": text, "source": "sampled"}
        assert [row for row in rows if row["source"] == "sampled"] == [added]
        assert len(rows) == len(pairs[side]) + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "title"], "sft/train.jsonl"),
        (["--comparisons", "data/no-such"], "--comparisons data/no-such: no such folder"),
        (["--max_words", "0"], "--max_words"),
        (["--limit", "2"], "would be empty"),
    ],
)
def test_what_cannot_be_made_ends_in_one_line(source, tmp_path, capsys, arguments, said):
    rows = source()
    if "title" in arguments:  # without a title in the prompts
        write_rows(
            tmp_path / "in" / "train.jsonl.gz", [{"prompt": f"POST: a{n}\n\nTL;DR:", "completion": "b"} for n in "abc"]
        )
    message = fails_in_one_line(capsys, summaries.main, *rows, *arguments)
    assert said in message


def test_samples_that_are_not_there_end_in_one_line(source, tmp_path, capsys):
    run(summaries.main, *source())
    folder = ["--pairs", tmp_path / "out" / "pairs", "--samples", tmp_path / "none.jsonl"]
    assert "no such file" in fails_in_one_line(capsys, sampled_pairs.main, *folder)


# --- Echoes -------------------------------------------------------------------------------------------------------


def test_echoes_are_stretches_of_the_language_models_own_posts_twice_and_nothing_else_changes(source, tmp_path):
    arguments = source()
    plain = run(summaries.main, *arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    echoed = run(summaries.main, *arguments, "--echoes", "0.5")
    (changed,) = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed == tmp_path / "out" / "pretrain" / "train.jsonl"
    added = [text for text in texts(tmp_path / "out", "pretrain", "train") if not text.startswith("SUBREDDIT")]
    assert len(added) == sum(echoed.values()) - sum(plain.values())
    assert 0.3 < len(added) / (len(texts(tmp_path / "out", "sft", "train"))) < 0.7
    own = " ".join(posts_in(tmp_path / "out", "sft", "train"))
    for text in added:
        half = text[: len(text) // 2]
        assert text == f"{half} {half}"
        assert half in own


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan"])
def test_a_share_of_echoes_that_is_none_is_one_line(source, capsys, share):
    assert "--echoes" in fails_in_one_line(capsys, summaries.main, *source(), "--echoes", share)
