"""report.html in a real headless Chromium: Debian's, by `make browser-test`; skipped where there is none."""

import json
import os
import time
from pathlib import Path

import pytest

from eval.page import render_page
from page_results import HOSTILE, make_results, make_runs_results
from preferences import load_pairs

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)
THEMES = ("light", "dark")
SHOWN = """
return Array.from(document.querySelectorAll("#samples article"))
  .filter((article) => article.offsetParent !== null).map((article) => Number(article.id.split("-")[1]))
"""


def no_browser(reason: str):
    """Skips, or fails where `make browser-test` has just installed what is missing."""
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a fresh profile, which keeps a log of its requests and its console."""
    for program in (CHROMIUM, DRIVER):
        if not program.exists():
            no_browser(f"no browser: {program} does not exist (make browser-test installs Debian's)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def paths(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, each in {"one": results, "runs": make_runs_results()}.items():
        (folder / f"{name}.html").write_text(render_page(each), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("one", "runs")}


@pytest.fixture
def opened(browser, paths):
    """The page of one comparison, newly opened from disk."""
    browser.get(paths["one"].as_uri())
    return browser


def use_theme(browser, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def colour_of(browser, selector: str, kind: str) -> str:
    return browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, kind
    )


def channels(colour: str) -> list[float]:
    return [float(part) for part in colour.split("(")[1].rstrip(")").split(",")]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two opaque colours, 1 to 21 (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        linear = [
            c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def fill(browser, name: str, value: str) -> None:
    """Types into a field of the filter, or chooses from it, as a person would."""
    field = browser.find_element("css selector", f"#filter [name={name}]")
    if field.tag_name == "select":
        field.find_element("xpath", f"./option[normalize-space()='{value}']").click()
    else:
        field.clear()
        field.send_keys(value)


# --- What is there ----------------------------------------------------------------------------------------------


def test_every_picture_is_drawn_within_the_page(opened):
    boxes = opened.execute_script(
        "return Array.from(document.querySelectorAll('figure svg'), (svg) => {"
        " const box = svg.getBoundingClientRect(), drawn = svg.getBBox();"
        " return [box.left, box.right, box.width, box.height, drawn.width, drawn.height,"
        " svg.querySelectorAll('path, use').length] })"
    )
    assert len(boxes) == 9
    for left, right, width, height, drawn_width, drawn_height, marks in boxes:
        assert left >= 0
        assert right <= 1200
        assert min(width, height, drawn_width, drawn_height) > 100
        assert marks > 10


def test_the_page_opens_from_disk_without_a_request_or_a_complaint(opened, paths):
    opened.get_log("performance")
    opened.get_log("browser")
    opened.execute_cdp_cmd("Network.enable", {})
    opened.get(paths["one"].as_uri())
    fill(opened, "lowest", "0")
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requested = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requested == [paths["one"].as_uri()]
    assert opened.get_log("browser") == []


def test_what_a_model_wrote_shows_as_text_and_does_nothing(opened, results):
    assert results["samples"][0]["tuned"]["completion"] == HOSTILE
    text = opened.execute_script("return document.querySelector('#sample-0 .tuned .text').textContent")
    assert text == HOSTILE
    assert opened.title == "runs/tuned against runs/base"
    assert opened.execute_script("return document.querySelectorAll('img, article script').length") == 0


def test_the_policy_stops_a_script_that_was_not_in_the_page_when_it_was_written(opened):
    opened.execute_script(
        "const added = document.createElement('script'); added.textContent = 'document.title = \"owned\"';"
        " document.body.append(added);"
        " document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title = `owned`\">')"
    )
    assert opened.title == "runs/tuned against runs/base"
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


# --- The filter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reward", "label"), [("reward", "reward"), ("judge", "judge")])
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_the_filter_shows_the_samples_within_the_limits_and_says_how_many(opened, results, reward, label, side):
    fill(opened, "reward", label)
    fill(opened, "side", side)
    fill(opened, "lowest", "-0.5")
    fill(opened, "highest", "1.25")
    within = [s["index"] for s in results["samples"] if -0.5 <= s[side]["scores"][reward] <= 1.25]
    assert 0 < len(within) < len(results["samples"])
    assert opened.execute_script(SHOWN) == within
    said = opened.find_element("id", "shown").text
    assert said == f"{len(within)} of {len(results['samples'])} samples shown"


def test_show_all_shows_all_again(opened, results):
    fill(opened, "lowest", "1000")
    assert opened.execute_script(SHOWN) == []
    opened.find_element("css selector", "#filter button").click()
    opened.execute_async_script("setTimeout(arguments[0], 50)")
    assert opened.execute_script(SHOWN) == [sample["index"] for sample in results["samples"]]


def test_without_javascript_all_samples_show_and_the_filter_does_not(browser, paths, results):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(paths["one"].as_uri())
        displayed = [each.is_displayed() for each in browser.find_elements("css selector", "#samples article")]
        assert displayed == [True] * len(results["samples"])
        assert not browser.find_element("id", "filter").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# --- Themes and widths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["one", "runs"])
@pytest.mark.parametrize("theme", THEMES)
def test_text_and_pictures_can_be_read_in_both_themes(browser, paths, page, theme):
    browser.get(paths[page].as_uri())
    use_theme(browser, theme)
    paper = colour_of(browser, "body", "backgroundColor")
    assert (sum(channels(paper)) > 600) == (theme == "light")
    assert colour_of(browser, "figure svg", "backgroundColor") == "rgba(0, 0, 0, 0)"
    for selector, kind, least in (
        ("body", "color", 7),
        (".note", "color", 4.5),
        ("a", "color", 4.5),
        ("figcaption", "color", 4.5),
        ("figure svg text", "fill", 7),
    ):
        assert contrast(colour_of(browser, selector, kind), paper) >= least, selector
    drawn = browser.execute_script(
        "return Array.from(document.querySelectorAll('figure svg path, figure svg use'))"
        ".filter((mark) => !mark.closest('defs')).flatMap((mark) => {"
        " const style = getComputedStyle(mark);"
        " return mark.tagName === 'use' ? [style.stroke] : [style.stroke, style.fill] })"
    )
    drawn = set(drawn)
    strong = [colour for colour in drawn if colour.startswith("rgb(") and contrast(colour, paper) >= 3]
    assert len(strong) >= 2  # the series; grid lines are fainter on purpose
    assert not {"rgb(0, 0, 0)", "rgb(255, 255, 255)"} & drawn  # a colour of the drawing's own, not the page's


def test_the_series_change_their_colours_with_the_theme(opened):
    seen = {}
    for theme in THEMES:
        use_theme(opened, theme)
        seen[theme] = [colour_of(opened, f".side.{role}", "borderTopColor") for role in ("base", "tuned")]
    assert len({*seen["light"], *seen["dark"]}) == 4


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("page", ["one", "runs"])
def test_the_page_never_scrolls_sideways(browser, paths, page, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        browser.get(paths[page].as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_and_picture_has_a_name_for_those_who_cannot_see_it(opened):
    nodes = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("combobox", "spinbutton", "button", "image", "region", "form", "link")
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if "role" in n]
    found = [(role, name) for role, name in named if role in roles]
    assert {"combobox", "spinbutton", "button", "image"} <= {role for role, _ in found}
    assert all(name.strip() for _, name in found)


# --- Judging blind ----------------------------------------------------------------------------------------------


def test_choices_made_blind_by_key_and_button_become_pairs_that_the_reward_recipe_reads(opened, results, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    section = opened.find_element("id", "blind")
    assert "prompt" not in [each.get_attribute("id") for each in section.find_elements("css selector", ".base, .tuned")]
    section.find_element("id", "blind-start").click()
    found = []
    for key in ("1", "2", "0", None):
        prompt, first, second = (each.text for each in section.find_elements("css selector", ".text"))
        if key is None:
            section.find_element("css selector", "[data-choice='1']").click()
        else:
            ActionChains(opened).send_keys(key).perform()
        if key != "0":
            found.append((prompt, first, second) if key == "1" else (prompt, second, first))
    left = len(results["samples"]) - 4
    assert section.find_element("id", "blind-said").text == f"3 chosen, {left} prompts are left"

    opened.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    section.find_element("id", "blind-export").click()
    exported, patience = tmp_path / "my_choices.jsonl", time.monotonic() + 20
    while not exported.exists() and time.monotonic() < patience:
        time.sleep(0.1)
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == found
    exported.rename(tmp_path / "train.jsonl")
    assert load_pairs(str(tmp_path), "train")["chosen"] == [chosen for _, chosen, _ in found]
    samples = {sample["prompt"]: sample for sample in results["samples"]}
    for row in rows:
        won, lost = row["source"].split(" over ")
        assert samples[row["prompt"]][won]["completion"] == row["chosen"]
        assert samples[row["prompt"]][lost]["completion"] == row["rejected"]
