"""The page in a real browser: that it renders, asks for nothing, and is readable at any width, in any theme, by anyone."""

from __future__ import annotations

import itertools

import pytest
from browser import CHROMIUM, Browser, Tab
from report_cases import example_cases

from compress.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: Debian's package 'chromium'")

CASES = tuple(example_cases())
WIDTHS = (360, 1280)

# Elements that stick out of the window, those aside that scroll within a box of their own.
STICKING_OUT = """
[...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.scroll, pre, svg'))
  .filter(e => { const r = e.getBoundingClientRect(); return r.width > 0 && (r.right > innerWidth + 1 || r.left < -1); })
  .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40))
"""

# Of each drawing: its size, how many marks have one, names that are cut, and pairs of names that cover each other.
DRAWINGS = """
[...document.querySelectorAll('main svg')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const shapes = [...svg.querySelectorAll('path, use')].map(e => e.getBoundingClientRect());
  const names = [...svg.querySelectorAll('text')].map(e => ({words: e.textContent, box: e.getBoundingClientRect()}));
  const covered = [];
  names.forEach((one, index) => names.slice(0, index).forEach(other => {
    const width = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
    const height = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
    if (width > 2 && height > 4) covered.push(one.words + ' / ' + other.words);
  }));
  const outside = b => b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1
    || b.bottom > frame.bottom + 1;
  return {
    name: svg.getAttribute('aria-labelledby'), width: frame.width, height: frame.height,
    marks: shapes.filter(b => b.width > 1 && b.height > 1).length,
    smallest: Math.min(...names.map(one => one.box.height)),
    cut: names.filter(one => outside(one.box)).map(one => one.words), covered: covered,
  };
})
"""

# Text whose contrast with what lies behind it is below WCAG's 4.5 : 1.
FAINT = """
(() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map(value => value / 255);
  };
  const behind = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, [r, g, b, a]) =>
      [r * a + under[0] * (1 - a), g * a + under[1] * (1 - a), b * a + under[2] * (1 - a)], [1, 1, 1]);
  };
  const light = colour => {
    const [r, g, b] = colour.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const seen = {count: 0, faint: []};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('title, desc, style')) continue;
    const style = getComputedStyle(element);
    const ink = light(rgba(element.closest('svg') ? style.fill : style.color).slice(0, 3)), paper = light(behind(element));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    seen.count += 1;
    if (contrast < 4.5) seen.faint.push(walker.currentNode.data.trim().slice(0, 40) + ' ' + contrast.toFixed(2));
  }
  return seen;
})()
"""

BRIGHTNESS = """
getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).reduce((sum, c) => sum + +c / 765, 0)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_report(run, folder / name)[1] for name, run in example_cases().items()}


@pytest.mark.parametrize("case", CASES)
def test_page_renders_and_asks_for_nothing(case, browser, pages):
    with Tab(browser, pages[case]) as tab:
        headings = tab.run("[...document.querySelectorAll('h2')].map(e => e.textContent)")
        assert headings[0] == "Stage by stage"
        assert headings[-1] == "What the figures mean"
        assert tab.run("[...document.querySelectorAll('h2')].every(e => e.getBoundingClientRect().height > 10)")
        addresses = tab.requests()
        assert addresses[0] == pages[case].resolve().as_uri()
        assert all(address.startswith(("file:", "data:")) for address in addresses)
        assert len([address for address in addresses if address.startswith("file:")]) == 1
        assert tab.events("Log.entryAdded") == []  # nothing that the page's own policy stopped, nothing that failed
        assert tab.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
        assert tab.run("document.scripts.length") == 0


def test_a_page_that_asked_for_something_would_be_found(browser, tmp_path):
    page = tmp_path / "loud.html"
    page.write_text('<!DOCTYPE html><img src="http://example.test/x.png" alt=""><p style="width: 500px">wide</p>')
    with Tab(browser, page, 500) as tab:
        assert "http://example.test/x.png" in tab.requests()
        assert tab.run("document.documentElement.scrollWidth") == 508
        assert tab.events("Log.entryAdded")


def test_the_pages_policy_stops_what_strangers_would_add(browser, pages, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    added = '<img src="http://example.test/x.png" alt="x"><script>document.title = "taken"</script></main>'
    spoilt.write_text(pages["whole"].read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    with Tab(browser, spoilt) as tab:
        assert tab.run("document.title") == "digits: compression report"
        assert "http://example.test/x.png" not in [
            event["response"]["url"] for event in tab.events("Network.responseReceived")
        ]
        assert any("Content Security Policy" in event["entry"]["text"] for event in tab.events("Log.entryAdded"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_sticks_out(case, width, browser, pages):
    with Tab(browser, pages[case], width) as tab:
        assert tab.run("innerWidth") == width
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run(STICKING_OUT) == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_charts_have_marks_and_whole_names(case, width, browser, pages):
    with Tab(browser, pages[case], width) as tab:
        drawings = tab.run(DRAWINGS)
        assert drawings
        for drawing in drawings:
            assert drawing["width"] > 250, drawing
            assert drawing["height"] > 60, drawing
            assert drawing["marks"] >= 1, drawing
            assert drawing["smallest"] > 9, drawing
            assert drawing["cut"] == [], drawing["name"]
            assert drawing["covered"] == [], drawing["name"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("case", ["whole", "worse", "noisy", "hostile"])
def test_text_is_readable_in_both_themes(case, scheme, browser, pages):
    with Tab(browser, pages[case], scheme=scheme) as tab:
        tab.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        seen = tab.run(FAINT)
        assert seen["count"] > 300
        assert seen["faint"] == []


def test_dark_is_dark_and_print_is_white(browser, pages):
    with Tab(browser, pages["whole"]) as light, Tab(browser, pages["whole"], scheme="dark") as dark:
        assert light.run(BRIGHTNESS) > 0.9
        assert dark.run(BRIGHTNESS) < 0.15
    with Tab(browser, pages["whole"], scheme="dark", medium="print") as printed:
        assert printed.run(BRIGHTNESS) > 0.95
        assert printed.run("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert printed.run(FAINT)["faint"] == []


def test_nothing_is_cut_on_paper(browser, pages):
    with Tab(browser, pages["whole"], 700, medium="print") as tab:
        assert tab.run("document.documentElement.scrollWidth") == 700
        assert tab.run(STICKING_OUT.replace(".scroll, pre, svg", "svg")) == []


def test_motion_is_reduced_where_asked(browser, pages):
    moves = "getComputedStyle(document.documentElement).scrollBehavior"
    with Tab(browser, pages["whole"]) as tab:
        assert tab.run(moves) == "smooth"
    with Tab(browser, pages["whole"], calm=True) as tab:
        assert tab.run(moves) == "auto"


@pytest.mark.parametrize("width", WIDTHS)
def test_readers_that_do_not_see_it_find_tables_images_and_headings(width, browser, pages):
    with Tab(browser, pages["whole"], width) as tab:
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        told = [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]
        drawings, pictures = tab.run("[document.querySelectorAll('main svg').length, document.images.length]")
        levels = tab.run("[...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
    roles = [role for role, _ in told]
    assert roles.count("table") >= 8
    assert all(name for role, name in told if role in ("table", "region", "image", "img", "link", "heading"))
    assert sum(role in ("image", "img") for role in roles) == drawings + pictures
    # Also where the staged table is laid out as cards.
    assert ("rowheader", "train fp32 reference") in [(role, " ".join(name.split())) for role, name in told]
    assert ("columnheader", "Stage time") in told
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_focus_is_seen(browser, pages):
    outline = "(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle(document.activeElement))"
    with Tab(browser, pages["whole"]) as tab:
        visited = set()
        for _ in range(16):  # past the links of the head, into the first tables
            tab.press_tab()
            visited.add(tab.run("document.activeElement.tagName"))
            style, width = tab.run(outline)
            assert style == "solid"
            assert width >= 2
        assert visited >= {"A", "DIV"}


def test_small_pictures_keep_their_pixels(browser, pages):
    with Tab(browser, pages["whole"]) as tab:
        shown = tab.run(
            "[...document.images].map(e => [getComputedStyle(e).imageRendering, e.getBoundingClientRect().height, e.alt])"
        )
    assert shown
    for rendering, height, words in shown:
        assert rendering == "pixelated"
        assert height > 60
        assert words.startswith("Validation sample ")
