"""report.html without a browser: it escapes what models wrote, loads nothing, and says what its pictures show."""

import base64
import copy
import hashlib
import html
import itertools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import ROOT
from eval import figures, page
from eval.report import SCHEMA_VERSION
from eval.tables import tables
from eval.verdict import sentences, verdict
from page_results import HOSTILE, make_results, make_runs_results

REPORTS = sorted((ROOT / "eval" / "reports").glob("*/results.json"))
VOID = {"meta", "br", "input", "link", "img", "hr"}


class Elements(HTMLParser):
    """Every start tag with its attributes, text by element, and whether all elements are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def rendered(results) -> SimpleNamespace:
    text = page.render_page(results)
    return SimpleNamespace(text=text, elements=Elements(text))


def test_every_element_is_closed_and_no_id_occurs_twice(rendered):
    assert rendered.elements.open == []
    ids = [attributes["id"] for _, attributes in rendered.elements.tags if "id" in attributes]
    assert len(ids) > 50
    assert len(ids) == len(set(ids))


def test_links_and_references_lead_to_an_id_of_the_page(rendered):
    ids = {attributes["id"] for _, attributes in rendered.elements.tags if "id" in attributes}
    links = [a[key] for _, a in rendered.elements.tags for key in ("href", "xlink:href") if key in a]
    links += re.findall(r'="url\((#[^)]+)\)"', rendered.text)
    assert len(links) > 20
    assert {link.removeprefix("#") for link in links} <= ids


def test_nothing_is_loaded_from_anywhere(rendered):
    for _, attributes in rendered.elements.tags:
        for key in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert attributes.get(key, "#").startswith("#")
    assert not {"link", "img", "iframe", "object", "embed", "base", "foreignobject"} & {
        tag for tag, _ in rendered.elements.tags
    }
    style = "".join(rendered.elements.text["style"])
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_one_script_and_the_one_style_sheet_by_hash(rendered):
    [policy] = [meta["content"] for meta in rendered.elements.named("meta") if "http-equiv" in meta]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    for tag in ("script", "style"):
        assert len(rendered.elements.named(tag)) == 1
        source = "".join(rendered.elements.text[tag])
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert directives[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not any("style" in attributes for _, attributes in rendered.elements.tags)
    assert not any(key.startswith("on") for _, attributes in rendered.elements.tags for key in attributes)


def with_hostile_texts(results: dict) -> int:
    """Puts hostile text wherever text stands that no command line checks; returns at how many places it shows."""
    sample = results["samples"][1]
    sample["prompt"] = sample["reference"] = sample["base"]["completion"] = sample["tuned"]["completion"] = HOSTILE
    results["models"]["tuned"] = {"path": HOSTILE, "sha256": None}
    results["sweep"][0]["name"] = results["training"]["source"] = results["command"] = HOSTILE
    return 4 + 3 + 3 + 1  # the sample; title, heading, fact; table, picture, fact; caption


def with_hostile_names(results: dict) -> int:
    """The same for the name of a reward, as a results file that this program did not write may have."""
    renamed = [results["rewards"], results["metrics"]["rewards"], results["pairs"]["rewards"]]
    renamed += [run["metrics"]["rewards"] for run in results["sweep"][:-1]]  # the last one's are the results'
    renamed += [point["rewards"] for point in results["best_of_n"]["points"]] + [results["best_of_n"]["judges"]]
    renamed += [sample[role]["scores"] for sample in results["samples"] for role in ("base", "tuned")]
    for names in renamed:
        names[HOSTILE] = names.pop("judge")
    return 2 * len(results["samples"])


@pytest.mark.parametrize("change", [with_hostile_texts, with_hostile_names])
def test_hostile_text_shows_as_text_wherever_it_stands(results, rendered, change):
    hostile = copy.deepcopy(results)
    places = change(hostile)
    elements = Elements(page.render_page(hostile))
    assert elements.open == []
    assert {tag for tag, _ in elements.tags} == {tag for tag, _ in rendered.elements.tags}
    assert len(elements.named("script")) == 1
    assert not any(key.startswith("on") or key == "style" for _, attributes in elements.tags for key in attributes)
    shown = [text for texts in elements.text.values() for text in texts if HOSTILE in text]
    assert len(shown) >= places


def test_a_completion_shows_whole_and_its_controls_as_replacement_characters(results):
    changed = copy.deepcopy(results)
    changed["samples"][0]["tuned"]["completion"] = "one\n\ttwo\x00\x1b[31m\u202e & <b>"
    text = page.render_page(changed)
    assert html.escape("one\n\ttwo\ufffd\ufffd[31m\ufffd & <b>") in text
    assert not set("\x00\x1b\u202e") & set(text)


def test_every_picture_has_a_description_a_caption_and_colours_of_the_page_only(results, rendered):
    drawn = figures.pictures(results)
    names = {picture.name for picture in drawn}
    assert {"score-reward", "score-judge", "length", "kl-reward", "frontier", "training", "calibration"} <= names
    labelled = [svg for svg in rendered.elements.named("svg") if svg.get("role") == "img"]
    assert [svg["aria-label"] for svg in labelled] == [picture.description for picture in drawn]
    for picture in drawn:
        assert ElementTree.fromstring(picture.svg).tag.endswith("svg")
        assert len(picture.description) > 30
        assert picture.caption
        colours = set(re.findall(r"#[0-9a-f]{6}\b", picture.svg)) | set(
            re.findall(r"(?:fill|stroke): (\w+)", picture.svg)
        )
        assert colours <= {"none", "currentColor", "var"}, picture.name


@pytest.mark.parametrize("values", [[0.25] * 40, [7.0] * 40, [1e-9 * i for i in range(39)] + [1e9], range(40)])
def test_a_histogram_counts_every_sample_once_in_few_bins_whatever_the_values(values):
    edges = figures._edges(np.array(values, dtype=float))
    assert 2 <= len(edges) <= 41
    assert np.histogram(values, edges)[0].sum() == 40
    assert (np.diff(edges) > 0).all()


def test_the_same_results_give_the_same_page(results, rendered):
    assert page.render_page(results) == rendered.text


def test_the_page_is_accessible_by_its_structure(rendered):
    elements = rendered.elements
    assert elements.named("html")[0]["lang"] == "en"
    assert elements.text["title"]
    assert len(elements.named("h1")) == 1
    levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in header for header in elements.named("th"))
    inside_labels = re.findall(r"<label>.*?</label>", rendered.text, re.DOTALL)
    controls = len(elements.named("input")) + len(elements.named("select"))
    assert sum(label.count("<input") + label.count("<select") for label in inside_labels) == controls == 4


def test_without_a_script_every_sample_shows_and_the_filter_does_not(rendered, results):
    articles = [a for a in rendered.elements.named("article") if a["id"].startswith("sample-")]
    assert len(articles) == len(results["samples"])
    assert not any("hidden" in article for article in articles)
    assert "hidden" in rendered.elements.named("form")[0]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_every_committed_results_file_renders_and_says_where_it_comes_from(path):
    results = json.loads(path.read_text())
    assert results["schema_version"] == SCHEMA_VERSION
    assert re.fullmatch(r"[0-9a-f]{40}", results["git_commit"]), "made from a commit, nothing changed"
    assert " /" not in results["command"], "no path of somebody's machine"
    assert page.render_page(results).count("<svg") >= 3
    assert results["command"].startswith("python -m eval.compare")


def test_a_page_of_several_runs_has_a_row_for_each_and_no_samples():
    results = make_runs_results()
    elements = Elements(page.render_page(results))
    assert elements.open == []
    rows = "".join(elements.text["th"])
    assert all(run["name"] in rows for run in results["runs"])
    assert elements.named("script") == []
    assert len([svg for svg in elements.named("svg") if svg.get("role") == "img"]) == len(results["rewards"]) + 3


# --- The verdict --------------------------------------------------------------------------------------------------


def test_the_verdict_says_in_words_what_changed_and_whether_the_judge_agrees():
    results = make_results()
    metrics = results["metrics"]
    for name, (base, tuned, low, high) in {"reward": (0.53, 0.98, 0.4, 0.5), "judge": (0.5, 0.4, -0.2, -0.1)}.items():
        metrics["rewards"][name]["share_positive"] |= {"base": {"mean": base}, "tuned": {"mean": tuned}}
        metrics["rewards"][name]["mean"]["difference"] |= {"low": low, "high": high}
    first, _, second, *_ = (text.replace("\N{NO-BREAK SPACE}", " ") for text in verdict(results))
    assert first == "On 40 prompts, by reward, 98 % of the tuned model's completions score above 0, 53 % of the base's."
    assert second.startswith("The judge, marked as one that training never saw, does not agree: 40 % of the tuned")
    metrics["rewards"]["judge"]["mean"]["difference"] |= {"low": -0.1, "high": 0.1}
    assert "never saw, cannot tell the two apart on these prompts: " in verdict(results)[2]
    metrics["rewards"]["judge"]["mean"]["difference"] |= {"low": 0.1, "high": 0.2}
    assert "never saw, agrees: " in verdict(results)[2]
    assert "wrong way round" not in " ".join(verdict(results))
    metrics["rewards"]["reward"]["mean"]["difference"] |= {"low": -0.2, "high": -0.1}
    assert "wrong way round" in verdict(results)[2]


@pytest.mark.parametrize(("n", "hint"), [(99, True), (100, False)])
def test_the_verdict_begins_with_the_number_of_prompts_and_says_where_they_are_few(n, hint):
    results = make_results()
    results["prompts"]["n"] = n
    first, second, *_ = verdict(results)
    assert first.startswith(f"On {n} prompts, by reward, ")
    assert (second == f"{n} prompts are few: take all of this as a hint.") is hint


def test_a_win_rate_whose_interval_holds_one_half_is_not_praised():
    results = make_results()
    results["metrics"]["judged_base"] = {"tuned": {"mean": 0.57, "low": 0.45, "high": 0.69}}
    for key in ("_lc", "_flips"):
        results["metrics"][f"judged_base{key}"] = results["metrics"]["judged_base"]
    assert "57\N{NO-BREAK SPACE}% of the time, which 40 prompts cannot tell from 50 %." in " ".join(verdict(results))
    results["metrics"]["judged_base"]["tuned"]["low"] = 0.51
    assert "of the time, where 50 % would be no difference." in " ".join(verdict(results))


def test_the_verdict_names_what_looks_like_an_exploited_reward_and_says_so_where_nothing_does():
    results = make_results()
    metrics = results["metrics"]
    fine = {
        "kl": {"tuned": {"mean": 5.0}},
        "length": {"base": {"mean": 20.0}, "tuned": {"mean": 21.0}},
        "distinct_trigrams": {"base": {"mean": 0.9}, "tuned": {"mean": 0.85}},
        "perplexity": {"base": {"mean": 4.0}, "tuned": {"mean": 5.0}},
    }
    metrics |= fine
    for name in ("reward", "judge"):
        metrics["rewards"][name]["mean"]["difference"] |= {"low": 0.1, "high": 0.2}
        metrics["rewards"][name]["share_positive"] = {"base": {"mean": 0.5}, "tuned": {"mean": 0.9}}
    assert verdict(results)[-2].startswith("No figure here looks like a reward that is exploited")
    metrics["rewards"]["judge"]["share_positive"]["tuned"]["mean"] = 0.6
    assert "exploited: reward and judge differ by 30 points in the share above 0 (" in verdict(results)[-2]
    metrics["rewards"]["judge"]["share_positive"]["tuned"]["mean"] = 0.9
    wrong = {
        "kl": ({"tuned": {"mean": 15.1}}, "a KL above 15 nats"),
        "length": ({"base": {"mean": 20.0}, "tuned": {"mean": 26.0}}, "a length that changed"),
        "distinct_trigrams": ({"base": {"mean": 0.9}, "tuned": {"mean": 0.6}}, "far fewer distinct trigrams"),
        "perplexity": ({"base": {"mean": 4.0}, "tuned": {"mean": 9.0}}, "a perplexity twice"),
    }
    for name, (value, words) in wrong.items():
        metrics |= fine | {name: value}
        assert verdict(results)[-2].startswith(f"Look for a reward that is exploited: {words}")
    metrics |= fine
    metrics["rewards"]["judge"]["mean"]["difference"] |= {"low": -0.1}
    assert "exploited: a judge that does not rise with the reward (" in verdict(results)[-2]
    metrics["rewards"]["reward"]["mean"]["difference"] |= {"low": -0.1}
    assert "exploited" not in " ".join(verdict(results)), "the reward itself did not rise"
    metrics["rewards"]["reward"]["mean"]["difference"] |= {"low": 0.1}
    del metrics["rewards"]["judge"]
    assert verdict(results)[-2].startswith("No judge was given (--judge), so nothing here can show")


def test_rouge_is_no_witness_of_a_run_that_was_rewarded_for_it():
    results = make_results()
    assert "ROUGE-1 against" in " ".join(verdict(results))
    assert "no independent witness" not in " ".join(verdict(results))
    results["training"]["curves"]["rewards/rouge1"] = [[1, 0.1], [2, 0.2]]
    assert "training logged it as a reward, so it is no independent witness" in " ".join(verdict(results))


def test_several_runs_are_said_to_be_averaged():
    assert "is a mean over 3 runs, which should differ in their seed alone" in " ".join(verdict(make_runs_results()))


def test_the_verdict_says_how_many_scores_are_exactly_0_where_they_are_many():
    results = make_results()
    assert "exactly 0" not in " ".join(verdict(results))
    for sample in results["samples"][::2]:
        sample["base"]["scores"]["judge"] = 0.0
    first, _, second, *_ = (text.replace("\N{NO-BREAK SPACE}", " ") for text in verdict(results))
    assert "exactly 0" not in first
    assert second.endswith("(exactly 0: 0 % and 50 %).")


def test_the_verdict_names_every_reward_and_says_where_the_bases_language_is_poor():
    results = make_results()
    results["rewards"]["judge"]["judge"] = False
    first, _, second, *_ = verdict(results)
    assert first.startswith("On 40 prompts, by reward, ")
    assert second.startswith("By judge, ")
    assert "its language is poor" not in " ".join(verdict(results))
    results["metrics"]["perplexity"]["base"]["mean"] = 168.0
    assert "(perplexity 168): its language is poor" in " ".join(verdict(results))


def test_best_of_n_is_compared_by_the_judge_too_and_on_the_same_prompts():
    results = make_results()
    best = results["best_of_n"]
    few = [sample["tuned"] for sample in results["samples"][: best["n_prompts"]]]
    mean = f"{sum(side['scores']['judge'] for side in few) / len(few):.3f}"
    *_, last = next(table for table in tables(results) if table.title == "Best-of-n").rows
    assert last[0].startswith("tuned")
    assert last[-1].startswith(mean)
    for verdict_of_judge, words in {"ahead": "the tuned model is ahead of", "level": "the tuned model and"}.items():
        best["judges"]["judge"]["verdict"] = verdict_of_judge
        assert f"By judge, which picked nothing, {words} best-of-" in sentences(results)[-1]
    against = f"{best['judges']['judge']['best_of_n']['mean']:.3f}"
    assert f"{mean} tuned, {against} best-of-n, difference " in sentences(results)[-1]


def test_the_verdict_gives_means_where_every_score_is_on_one_side_of_0():
    results = make_results()
    results["metrics"]["rewards"]["reward"] |= {
        "share_positive": {"base": {"mean": 0.0}, "tuned": {"mean": 0.0}},
        "mean": {"base": {"mean": -14.24}, "tuned": {"mean": -8.06}, "difference": {"low": 5.0, "high": 7.0}},
    }
    assert verdict(results)[0] == (
        "On 40 prompts, by reward, the tuned model's completions score -8.06 on average, and the base's -14.24."
    )


def test_the_verdict_warns_of_answers_that_are_cut_off_longer_or_alike():
    results = make_results()
    metrics = results["metrics"]
    quiet = {
        "length": {"base": {"mean": 20.0}, "tuned": {"mean": 21.0}},
        "missing_eos": {"base": {"mean": 0.05}, "tuned": {"mean": 0.0}},
        "distinct_trigrams": {"base": {"mean": 0.9}, "tuned": {"mean": 0.85}},
    }
    metrics |= quiet
    said = len(verdict(results))
    loud = {
        "length": ({"base": {"mean": 20.0}, "tuned": {"mean": 26.0}}, "longer: 26.0 tokens instead of 20.0"),
        "missing_eos": (
            {"base": {"mean": 1.0}, "tuned": {"mean": 1.0}},
            "All completions of both models are cut off by the",
        ),
        "distinct_trigrams": ({"base": {"mean": 0.9}, "tuned": {"mean": 0.7}}, "resemble each other more: 70"),
    }
    for name, (values, words) in loud.items():
        metrics |= quiet | {name: values}
        assert len(verdict(results)) == said + 1
        assert words in " ".join(verdict(results))


# --- Pictures in a grid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "full"),
    [
        ("ab", ""),
        ("abc", "c"),
        ("ab frontier c", "frontier c"),
        ("abc training", "c training"),
        ("training", "training"),
    ],
)
def test_no_picture_stands_alone_in_its_row(names, full):
    names = [each for word in names.split() for each in ([word] if word in page.WIDE else word)]
    found = [picture["name"] for picture in page._in_a_grid({"name": name} for name in names) if picture["full"]]
    assert found == full.split()


def test_lengths_that_are_all_the_same_are_not_drawn():
    results = make_results()
    assert "length" in [picture.name for picture in figures.pictures(results)]
    for sample in results["samples"]:
        sample["base"]["tokens"] = sample["tuned"]["tokens"] = 24
    assert "length" not in [picture.name for picture in figures.pictures(results)]
