"""The report as one HTML page that opens from disk: nothing in it comes from the network.

Prompts and completions are untrusted text. Jinja escapes all of it, and the page's Content-Security-Policy allows the
one script and the one style sheet that it was written with, by their hashes, and nothing else.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from eval.figures import Picture, pictures
from eval.tables import WORDS, facts, label_of, tables, title_of, worst
from eval.verdict import sentences, verdict

TEMPLATES = Path(__file__).resolve().parent / "templates"
WIDE = ("frontier", "overoptimisation", "training")  # pictures of several panels
MOST_SAMPLES = 1000  # in the page; results.json has them all
# Controls but for tab and line feed, and characters that reorder text: they would show as something else.
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TAG = re.compile(r"<[^<>]*>")  # text within a drawing may hold what looks like an attribute
STYLE = re.compile(r'\bstyle="([^"]*)"')


def render_page(results: dict) -> str:
    """The whole report as HTML."""
    drawn = pictures(results)
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    svgs, drawn_style = _as_classes([picture.svg for picture in drawn])
    style, script = style + drawn_style, (TEMPLATES / "page.js").read_text(encoding="utf-8")
    samples = results.get("samples", [])
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = visible
    names = {name: label_of(results, name) for name in results["rewards"]}
    return environment.get_template("page.html").render(
        policy=_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        title=visible(title_of(results)),
        verdict=verdict(results),
        sentences=sentences(results),
        tables=tables(results),
        pictures=_in_a_grid(
            {"name": picture.name, "caption": picture.caption, "svg": _labelled(picture, svg)}
            for picture, svg in zip(drawn, svgs, strict=True)
        ),
        worst={name: worst(results, name) for name in names} if samples else {},
        samples=samples[:MOST_SAMPLES],
        n_samples=len(samples),
        rewards=list(names.values()),
        scores_of=lambda sample: _scores(sample, list(names)),
        numbers_of=_numbers,
        facts=facts(results),
        words=WORDS,
    )


def _in_a_grid(pictures: Iterable[dict]) -> list[dict]:
    """The pictures in two columns, `full` where one takes both: wide ones, and one that would stand alone."""
    pictures, small = list(pictures), 0
    for picture, following in zip(pictures, [*pictures[1:], {"name": WIDE[0]}], strict=True):
        wide = picture["wide"] = picture["name"] in WIDE
        picture["full"] = wide or (small % 2 == 0 and following["name"] in WIDE)
        small = 0 if wide else small + 1
    return pictures


def visible(text: str) -> str:
    """`text` with every control character, and those that reorder what stands around them, shown as �."""
    return INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _scores(sample: dict, names: list[str]) -> str:
    """The sample's scores for the filter, as JSON: by model, in the order of the rewards."""
    return json.dumps({role: [sample[role]["scores"][name] for name in names] for role in ("base", "tuned")})


def _numbers(side: dict) -> str:
    parts = [f"{name} {score:z.3f}" for name, score in side["scores"].items()]
    parts.append(f"{side['tokens']} tokens" + ("" if side["ended"] else ", no EOS"))
    if side["kl"] is not None:
        parts.append(f"log ratio {side['kl']:z.2f} nats")
    return " · ".join(parts)


def _as_classes(svgs: list[str]) -> tuple[list[str], str]:
    """The SVGs with their style attributes, which the policy forbids, as classes; and the style sheet of these."""
    classes: dict[str, str] = {}

    def name_of(match: re.Match) -> str:
        return f'class="{classes.setdefault(match[1], f"d{len(classes)}")}"'

    svgs = [TAG.sub(lambda tag: STYLE.sub(name_of, tag[0]), svg) for svg in svgs]
    return svgs, "".join(f".{name}{{{rule}}}\n" for rule, name in classes.items())


def _labelled(picture: Picture, svg: str) -> Markup:
    """The SVG as an image with a description; the drawing's own text is part of the picture."""
    label = escape(visible(picture.description))
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _policy(script: str, style: str) -> str:
    """Nothing may load, run or be sent but this script and this style sheet."""
    allowed = {name: _hash(text) for name, text in (("script-src", script), ("style-src", style))}
    return (
        f"default-src 'none'; script-src {allowed['script-src']}; style-src {allowed['style-src']}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
