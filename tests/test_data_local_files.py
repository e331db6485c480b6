"""Properties of `data_prep/local_files.py`, on small files of every type and, where it exists, on real text."""

import csv
from pathlib import Path

import datasets
import pytest

from data_helpers import fails_in_one_line, files_under, left_out, rows_of, run, write_rows
from data_prep import local_files
from models_and_data import load_split
from trl_ppo.inputs import UserError

pytestmark = pytest.mark.usefixtures("own_cache")
REVIEWS = [{"review": f'review {i}, "quoted"\nsecond line', "stars": i % 5} for i in range(40)]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


WRITERS = {"csv": write_csv, "jsonl": write_rows, "jsonl.gz": write_rows, "parquet": write_parquet}


def prepare(tmp_path, *arguments) -> dict[str, int]:
    return run(local_files.main, "--output", tmp_path / "out", *arguments)


def both(tmp_path, kind: str) -> list[dict]:
    return [row for side in ("train", "test") for row in rows_of(tmp_path / "out" / kind / f"{side}.jsonl")]


@pytest.mark.parametrize("ending", WRITERS)
def test_every_type_of_file_gives_the_users_texts_unchanged(tmp_path, ending):
    source = WRITERS[ending](tmp_path / f"reviews.{ending}", REVIEWS)
    counts = prepare(tmp_path, "--source", source, "--kind", "sft", "--columns", "text=review", "--keep", "stars")
    assert counts == {"sft/train.jsonl": 36, "sft/test.jsonl": 4}
    number = str if ending == "csv" else int
    expected = {(row["review"], number(row["stars"])) for row in REVIEWS}
    assert {(row["text"], row["stars"]) for row in both(tmp_path, "sft")} == expected


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_spreadsheets_separator_is_seen_in_the_header(tmp_path, separator):
    source = tmp_path / "a.csv"
    lines = [f"review{separator}stars", *(f"a film, with a comma {i}{separator}{i % 5}" for i in range(20))]
    source.write_text("\n".join(lines))
    prepare(tmp_path, "--source", str(source), "--kind", "sft", "--columns", "text=review", "--keep", "stars")
    assert {row["text"] for row in both(tmp_path, "sft")} == {f"a film, with a comma {i}" for i in range(20)}


def test_a_file_that_is_not_utf_8_is_said_to_be_that(tmp_path):
    source = tmp_path / "a.csv"
    source.write_bytes("review\ncafé\n".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"is not UTF-8 .*; save it as UTF-8"):
        prepare(tmp_path, "--source", str(source), "--kind", "sft", "--columns", "text=review")


@pytest.mark.parametrize("row", ["good food, nice staff,5", "good food,5,"])
@pytest.mark.parametrize("first", [True, False])
def test_a_row_of_more_fields_than_the_header_is_refused_with_its_line(tmp_path, row, first):
    rows = [row, "a film,1"] if first else ["a film,1", row]
    (tmp_path / "a.csv").write_text("\n".join(["review,stars", *rows]))
    line = 2 if first else 3
    with pytest.raises(SystemExit, match=rf"line {line} of .*a.csv has 3 fields, the header 2: .* in quotation marks"):
        prepare(tmp_path, "--source", str(tmp_path / "a.csv"), "--kind", "sft", "--columns", "text=review")
    with pytest.raises(UserError, match=rf"line {line} of .*a.csv has 3 fields"):
        load_split(str(tmp_path / "a.csv"), "train", ["review"])


def test_a_text_with_two_labels_stands_in_one_pair_alone_and_never_before_the_judge_too(tmp_path, capsys):
    rows = [
        {"review": f"review {i}", "stars": stars} for i in range(200) for stars in (4 - 3 * (i % 2), 5 - 3 * (i % 2))
    ]
    rows += [{"review": f"review {i}", "stars": 1 + i % 2} for i in range(0, 40, 2)]
    options = ["--kind", "pairs", "--columns", "text=review", "--good", "stars=4,5", "--bad", "1,2"]
    prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), *options, "--judge_share", "0.4")
    files = [tmp_path / "out" / kind / "train.jsonl" for kind in ("pairs", "judge_pairs")]
    texts = [[text for pair in rows_of(file) for text in pair.values()] for file in files]
    assert all(len(each) > 20 for each in texts)
    together = texts[0] + texts[1]
    assert len(together) == len({*together})
    assert "the same text with another stars: " in capsys.readouterr().out


def test_a_judges_pairs_of_an_earlier_run_are_not_left_beside_other_pairs(tmp_path):
    rows = [{"review": f"review {i}", "stars": i % 2} for i in range(80)]
    options = ["--kind", "pairs", "--columns", "text=review", "--good", "stars=1"]
    source = write_rows(tmp_path / "a.jsonl", rows)
    prepare(tmp_path, "--source", source, *options, "--judge_share", "0.4")
    before = (tmp_path / "out" / "pairs" / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="judge_pairs holds texts that an earlier run kept apart"):
        prepare(tmp_path, "--source", source, *options)
    assert (tmp_path / "out" / "pairs" / "train.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="--bad 0,1: 1 is in --good too"):
        prepare(tmp_path, "--source", source, *options, "--bad", "0,1", "--judge_share", "0.4")


def test_a_label_that_no_text_has_is_named(tmp_path):
    rows = [{"review": f"review {i}", "stars": i % 5} for i in range(20)]
    options = "--kind", "pairs", "--columns", "text=review", "--good", "stars=4,6", "--bad", "0"
    with pytest.raises(SystemExit, match="no text has 6; stars has 0, 1, 2, 3, 4"):
        prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), *options)


def test_few_pairs_and_rows_that_are_replaced_are_said(tmp_path, capsys):
    rows = [{"review": f"review {i}", "stars": i % 2} for i in range(40)]
    options = "--kind", "pairs", "--columns", "text=review", "--good", "stars=1"
    prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), *options)
    assert "pairs/train.jsonl: 17 pairs are few" in (first := capsys.readouterr().out)
    assert "replaced" not in first
    prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), *options)
    assert "replaced" not in capsys.readouterr().out, "the same rows"
    prepare(tmp_path, "--source", write_rows(tmp_path / "b.jsonl", rows[:30]), *options)
    assert "pairs/train.jsonl: replaced, it held other rows" in capsys.readouterr().out


def test_a_csvs_na_is_text_and_its_empty_cell_is_malformed(tmp_path, capsys):
    rows = [*REVIEWS, {"review": "NA", "stars": 1}, {"review": "12", "stars": 1}, {"review": "", "stars": 1}]
    prepare(tmp_path, "--source", write_csv(tmp_path / "a.csv", rows), "--kind", "sft", "--columns", "text=review")
    texts = {row["text"] for row in both(tmp_path, "sft")}
    assert {"NA", "12"} < texts
    assert len(texts) == 42
    assert left_out(capsys.readouterr().out) == {"train: malformed": 1}


def test_columns_that_have_the_wanted_names_need_no_mention_and_prompt_is_optional_in_pairs(tmp_path):
    rows = [{"question": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    prepare(tmp_path, "--source", source, "--kind", "pairs")
    assert all(list(row) == ["chosen", "rejected"] for row in both(tmp_path, "pairs"))
    prepare(tmp_path, "--source", source, "--kind", "pairs", "--columns", "prompt=question")
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in both(tmp_path, "pairs"))
    prepare(tmp_path, "--source", source, "--kind", "prompts", "--columns", "prompt=question")
    assert {row["prompt"] for row in both(tmp_path, "prompts")} == {f"q{i}" for i in range(10)}


def test_labelled_texts_become_pairs_with_each_text_once_and_none_on_both_sides(tmp_path, capsys):
    rows = [{"review": f"review {i}", "label": i % 3, "id": i} for i in range(60)]
    options = "--kind", "pairs", "--columns", "text=review", "--good", "label=1"
    counts = prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), *options)
    label = {row["review"]: row["label"] for row in rows}
    pairs = both(tmp_path, "pairs")
    assert all(label[pair["chosen"]] == 1 != label[pair["rejected"]] for pair in pairs)
    texts = [text for pair in pairs for text in pair.values()]
    assert len(texts) == len({*texts}) == 2 * sum(counts.values())
    out = left_out(capsys.readouterr().out)
    assert len(texts) + sum(out.values()) == 60
    assert all(reason.endswith("no partner of another label") for reason in out)


def test_several_labels_may_be_good_or_bad_and_texts_without_one_are_left_out(tmp_path, capsys):
    rows = [{"review": f"review {i}", "stars": i % 6 or None} for i in range(60)]  # None, 1, 2, 3, 4, 5
    source = write_rows(tmp_path / "a.jsonl", rows)
    options = "--kind", "pairs", "--columns", "text=review", "--good", "stars=4,5", "--bad", "1,2"
    prepare(tmp_path, "--source", source, *options)
    stars = {row["review"]: row["stars"] for row in rows}
    pairs = both(tmp_path, "pairs")
    assert {stars[pair["chosen"]] for pair in pairs} == {4, 5}
    assert {stars[pair["rejected"]] for pair in pairs} == {1, 2}
    out = capsys.readouterr().out
    assert "chosen: 20 texts with 4, 5; rejected: 20 with 1, 2\n" in out
    counts = left_out(out)
    assert counts["train: stars is empty"] + counts.get("test: stars is empty", 0) == 10
    assert counts["train: stars is 3"] + counts.get("test: stars is 3", 0) == 10


@pytest.mark.parametrize("labelled", [True, False])
def test_a_judges_share_has_other_rows_of_train_and_the_same_of_test(tmp_path, capsys, labelled):
    if labelled:
        rows = [{"review": f"review {i}", "label": i % 2} for i in range(200)]
        options = "--columns", "text=review", "--good", "label=1"
    else:
        rows, options = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)], ()
    source = write_rows(tmp_path / "a.jsonl", rows)
    counts = prepare(tmp_path, "--source", source, "--kind", "pairs", *options, "--judge_share", "0.3")
    texts = {}
    for kind in ("pairs", "judge_pairs"):
        for side in ("train", "test"):
            found = rows_of(tmp_path / "out" / kind / f"{side}.jsonl")
            texts[kind, side] = {text for row in found for text in (row["chosen"], row["rejected"])}
    assert texts["pairs", "test"] == texts["judge_pairs", "test"]
    assert not texts["pairs", "train"] & texts["judge_pairs", "train"]
    assert not (texts["pairs", "train"] | texts["judge_pairs", "train"]) & texts["pairs", "test"]
    assert 0.15 < counts["judge_pairs/train.jsonl"] / counts["pairs/train.jsonl"] < 0.75
    if labelled:
        used = set().union(*texts.values())
        assert len(used) + sum(left_out(capsys.readouterr().out).values()) == 200


def test_sft_takes_prompt_and_completion_where_they_are_named(tmp_path):
    rows = [{"text": "t", "q": f"q{i}", "a": f" a{i}"} for i in range(10)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    prepare(tmp_path, "--source", source, "--kind", "sft", "--columns", "prompt=q", "completion=a")
    assert {(row["prompt"], row["completion"]) for row in both(tmp_path, "sft")} == {(r["q"], r["a"]) for r in rows}


def test_files_called_test_or_validation_become_test_and_other_names_that_start_so_do_not(tmp_path):
    for name in ("test.jsonl", "validation-1.jsonl", "testimonials.jsonl", "developers.jsonl", "more.jsonl"):
        write_rows(tmp_path / "in" / name, [{"text": f"{name} {i}"} for i in range(3)])
    (tmp_path / "in" / "notes.txt").write_text("not data")
    prepare(tmp_path, "--source", tmp_path / "in", "--kind", "sft")
    test = {row["text"].split()[0] for row in rows_of(tmp_path / "out" / "sft" / "test.jsonl")}
    train = {row["text"].split()[0] for row in rows_of(tmp_path / "out" / "sft" / "train.jsonl")}
    assert test == {"test.jsonl", "validation-1.jsonl"}
    assert train == {"testimonials.jsonl", "developers.jsonl", "more.jsonl"}


def test_several_files_are_read_as_one(tmp_path):
    files = [write_rows(tmp_path / f"{i}.jsonl", [{"text": f"{i} {j}"} for j in range(10)]) for i in range(3)]
    counts = prepare(tmp_path, "--source", *files, "--kind", "sft", "--test_share", "0.2")
    assert counts == {"sft/train.jsonl": 24, "sft/test.jsonl": 6}


def test_no_text_of_a_pair_stands_on_both_sides_and_malformed_pairs_are_counted(tmp_path, capsys):
    source = tmp_path / "in"
    write_rows(source / "test.jsonl", [{"chosen": "good test", "rejected": "bad test"}])
    good = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    swapped = [{"chosen": "other", "rejected": " Good  TEST"}]
    bad = [{"chosen": "a", "rejected": "A "}, {"chosen": "a", "rejected": 3}, {"chosen": "a"}]
    write_rows(source / "train.jsonl", [*good, good[0], *swapped, *bad])
    prepare(tmp_path, "--source", source, "--kind", "pairs")
    assert {row["chosen"] for row in rows_of(tmp_path / "out" / "pairs" / "train.jsonl")} == {r["chosen"] for r in good}
    assert left_out(capsys.readouterr().out) == {
        "train: malformed": 3,
        "train: already in train": 1,
        "train: also in test": 1,
    }


def test_a_row_with_more_columns_than_the_first_is_read(tmp_path):
    rows = [{"text": f"t{i}"} | ({"note": "x"} if i == 7 else {}) for i in range(20)]
    prepare(tmp_path, "--source", write_rows(tmp_path / "a.jsonl", rows), "--kind", "sft")
    assert {row["text"] for row in both(tmp_path, "sft")} == {f"t{i}" for i in range(20)}


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    source = write_csv(tmp_path / "reviews.csv", REVIEWS)
    arguments = ("--source", source, "--kind", "sft", "--columns", "text=review", "--limit", 20)
    written = []
    for seed in (4, 4, 5):
        prepare(tmp_path, *arguments, "--seed", seed)
        written.append(files_under(tmp_path / "out"))
    assert written[0] == written[1]
    assert written[0] != written[2]
    assert len(both(tmp_path, "sft")) == 20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kind", "sft"], "text or prompt and completion, but there is only ['review', 'stars']"),
        (["--kind", "sft", "--columns", "text=words"], "'words', only ['review', 'stars']"),
        (["--kind", "sft", "--columns", "label=stars"], "label=stars"),
        (["--kind", "sft", "--columns", "text"], "wanted=yours"),
        (["--kind", "sft", "--columns", "text=review", "text=stars"], "twice"),
        (["--kind", "sft", "--columns", "text=review", "--keep", "rating"], "--keep rating"),
        (["--kind", "sft", "--columns", "text=review", "--test_share", "1.5"], "--test_share"),
        (["--kind", "reviews"], "--kind"),
        (["--kind", "sft", "--columns", "text=review", "--good", "stars=1"], "--good"),
        (["--kind", "pairs", "--columns", "text=review", "--good", "stars=9"], "stars has 0, 1, 2, 3, 4"),
        (["--kind", "pairs", "--columns", "text=review", "--good", "rating=1"], "'rating'"),
        (["--kind", "pairs", "--columns", "text=review", "--bad", "1"], "--bad"),
        (["--kind", "sft", "--columns", "text=review", "--judge_share", "0.2"], "--judge_share"),
        (["--kind", "pairs", "--columns", "text=review", "--good", "stars"], "column=value"),
        ([], "--kind"),
        (["--kind", "sft", "--source", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, arguments, named):
    source = write_csv(tmp_path / "reviews.csv", REVIEWS)
    output = ("--output", tmp_path / "out")
    assert named in fails_in_one_line(capsys, local_files.main, "--source", source, *output, *arguments)
    assert not (tmp_path / "out").exists()


def test_files_of_two_types_a_lone_test_file_and_differing_columns_are_refused(tmp_path, capsys):
    ours = write_csv(tmp_path / "reviews.csv", REVIEWS)
    other = write_rows(tmp_path / "test.jsonl", REVIEWS)
    output = ("--kind", "sft", "--output", tmp_path / "out")
    assert "csv, json" in fails_in_one_line(capsys, local_files.main, "--source", ours, other, *output)
    assert "add a train file" in fails_in_one_line(capsys, local_files.main, "--source", other, *output)
    theirs = write_csv(tmp_path / "test.csv", [{"prompt": "a", "completion": "b"}])
    write_csv(tmp_path / "reviews.csv", [{"text": "a"}])
    assert "same columns" in fails_in_one_line(capsys, local_files.main, "--source", ours, theirs, *output)
    assert not (tmp_path / "out").exists()


def test_a_broken_csv_is_one_line(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,stars\nfine,1\ntoo,many,cells,here\n")
    output = ("--kind", "sft", "--output", tmp_path / "out")
    assert "a.csv" in fails_in_one_line(capsys, local_files.main, "--source", tmp_path / "a.csv", *output)


def test_a_kept_value_that_json_cannot_hold_is_counted(tmp_path, capsys):
    rows = [{"text": f"t{i}", "raw": b"\x00" if i == 3 else None} for i in range(10)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    prepare(tmp_path, "--source", source, "--kind", "sft", "--keep", "raw")
    assert len(both(tmp_path, "sft")) == 9
    assert left_out(capsys.readouterr().out) == {"train: malformed": 1}


def test_real_reviews_are_read_with_their_labels(shared_data, tmp_path):
    source = shared_data / "imdb" / "train.jsonl.gz"
    counts = prepare(tmp_path, "--source", source, "--kind", "sft", "--keep", "label", "--limit", 100)
    assert counts == {"sft/train.jsonl": 90, "sft/test.jsonl": 10}
    assert {row["label"] for row in both(tmp_path, "sft")} == {0, 1}
