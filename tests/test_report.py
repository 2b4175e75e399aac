"""The report: its figures, its safety against hostile text, and that it is one quiet, repeatable file."""

from __future__ import annotations

import functools
import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest
from report_cases import example_cases
from report_examples import (
    STAGES,
    example_answers,
    example_latency,
    example_repeat,
    example_row,
    example_run,
    example_size,
)

from compress.errors import CompressError
from compress.measured import Ratio
from compress.report import text, write_report
from compress.report.html import render_html
from compress.report.markdown import escape, render_markdown
from compress.report.sections.changed import png_size
from compress.report.sections.parts import Cell
from compress.report.summary import summarize
from compress.results import Budget

VOID = {"meta", "link", "br", "img", "input", "hr"}
CASES = example_cases()
WHOLE = CASES["whole"]
CLASSES = ("a", "b", "c")


def pair(reference_wrong, result_wrong, *, before=(3_450_000, ()), after=(180_000, ()), n=400, own=0, **changes):
    """A run of a reference and a result: wrong answers, and of each model its bytes and latencies."""
    answers = [
        {split: example_answers(n, 3, wrong, own_errors) for split in ("validation", "test")}
        for wrong, own_errors in ((reference_wrong, 0), (result_wrong, own))
    ]
    rows = (
        example_row("train", answers[0], CLASSES, size=example_size(before[0]), latency=before[1]),
        example_row("export", answers[1], CLASSES, answers[0], size=example_size(after[0]), latency=after[1]),
    )
    return example_run("pair", rows, "train", CLASSES, **changes)


def replaced(results, index, **changes):
    """A run of which one row is changed."""
    rows = list(results.rows)
    rows[index] = rows[index].model_copy(update=changes)
    return results.model_copy(update={"rows": tuple(rows)})


class Page(HTMLParser):
    """Checks that tags balance; collects text, attributes, ids and tags."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.tags, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def written(content, folder):
    markdown, page = write_report(content, folder)
    assert (markdown.name, page.name) == ("report.md", "report.html")
    return markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


@functools.cache
def rendered(name):
    """Markdown and page of a case."""
    summary = summarize(CASES[name])
    return render_markdown(summary), render_html(summary, CASES[name])


@pytest.fixture(params=CASES)
def case(request):
    """A run, its summary and both forms of its report."""
    return CASES[request.param], summarize(CASES[request.param]), *rendered(request.param)


def words_of(table):
    """Every word of a table."""
    for line in table.lines:
        yield line.label
        for cell in line.cells:
            yield cell.figure
            yield from cell.details


def test_both_forms_hold_every_word_of_the_summary(case):
    _, summary, markdown, page = case
    shown = "\0".join(Page(page).words)
    facts = [*summary.checks, *summary.warnings, *summary.notes, *summary.definitions]
    facts += [*summary.reproduce.machine, *summary.reproduce.conditions]
    words = [summary.head.name, *(value for fact in facts for value in fact), summary.answers.sentence]
    words += [summary.head.subject, summary.head.trust, summary.head.caution, *summary.stages.table.columns]
    tables = [summary.stages.table, summary.stages.latency, summary.stages.start, summary.stages.repeats]
    tables += [summary.answers.overall, summary.layers.sensitivities, *(table for _, table in summary.layers.operators)]
    tables += [one.table for one in summary.groups]
    words.append(summary.layers.advice)
    words += [word for table in tables if table for word in words_of(table)]
    words += [word for checkpoint in summary.reproduce.checkpoints for word in checkpoint]
    for file in summary.files:
        words += [file.name, file.size, file.sha256]
    if summary.head.verdict:
        words += [summary.head.verdict.title, summary.head.verdict.explanation]
    if summary.changed:
        words.append(summary.changed.counted)
    for word in set(words):
        assert word in shown, word
        assert escape(word) in markdown, word
    assert escape(summary.head.headline) in markdown
    assert summary.reproduce.command in markdown
    assert summary.reproduce.settings_json in markdown
    assert html.escape(summary.reproduce.command).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page


def test_page_holds_what_markdown_leaves_out(case):
    _, summary, _, page = case
    shown = "\0".join(Page(page).words)
    tables = [summary.answers.classes, summary.answers.all_classes, summary.answers.confusions]
    tables += [summary.layers.sizes, summary.layers.all_sizes, summary.layers.fallback]
    tables += [summary.layers.all_sensitivities, *(one.all for one in summary.groups)]
    words = {word for table in tables if table for word in words_of(table)}
    words |= {word for big in summary.head.bigs for word in (big.figure, big.word, *big.details)}
    words |= (
        {word for picture in summary.changed.pictures for word in (picture.index, picture.after)}
        if summary.changed
        else set()
    )
    words |= set(summary.layers.said)
    for word in words:
        assert word in shown, word


def test_page_is_sound_and_asks_for_nothing(case):
    page = case[-1]
    parsed = Page(page)
    assert "://" not in page
    assert not {"script", "iframe", "object", "b", "base", "form"} & set(parsed.tags)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    for name, value in parsed.attributes:
        assert name != "src" or re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", value)
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href") or value == "data:," or value.startswith("#")
        assert "url(" not in (value or "") or "url(#" in value
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        if name in ("aria-labelledby", "aria-describedby"):
            assert set(value.split()) <= set(ids)
        elif name == "href" and value.startswith("#"):
            assert value[1:] in ids
    for needed in ("h1", "h2", "caption", "figcaption", "title", "desc", "main", "nav"):
        assert needed in parsed.tags
    assert parsed.tags.count("caption") == parsed.tags.count("table")
    assert parsed.tags.count("style") == 1  # no drawing styles anything else
    assert parsed.tags.count("h1") == 1
    assert ("lang", "en") in parsed.attributes
    assert ("scope", "row") in parsed.attributes
    assert all(value for name, value in parsed.attributes if name == "alt")


def test_report_is_the_same_byte_for_byte(tmp_path):
    assert written(WHOLE, tmp_path) == rendered("whole")


def test_readers_matplotlib_settings_change_nothing(tmp_path):
    import matplotlib as mpl

    first = rendered("whole")
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "axes.linewidth": 9}):
        assert written(WHOLE, tmp_path) == first


def test_hostile_text_is_text():
    markdown, page = rendered("hostile")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    prose = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", markdown)  # without code blocks
    assert "<script" not in prose.lower()
    assert "<img" not in prose
    assert not re.search(r"(?<!\\)`", prose)
    assert not re.search(r"(?m)^# head", prose)
    tables = re.findall(r"(?m)(?:^\|.*\|$\n?)+", prose)
    assert len(tables) == 12
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_pictures_that_are_none_are_left_out():
    pictures = summarize(CASES["hostile"]).changed.pictures
    assert [picture.image is None for picture in pictures[:4]] == [True, True, False, False]
    assert pictures[2].alternative.endswith("class class -1, answered as class 99")
    page = rendered("hostile")[1]
    assert page.count("<img") == len(pictures) - 2
    image = WHOLE.changed[0].image
    assert png_size(image) == (16, 16)
    assert png_size(image[:20]) is None


# The head


def bigs(results):
    return [(big.figure, big.word) for big in summarize(results).head.bigs]


def timed(median_ms, ratio=None, **more):
    latency = example_latency(median_ms, **more)
    return latency if ratio is None else latency.model_copy(update={"ratio": Ratio(against="train", **ratio)})


FASTER = {"value": 6.1, "low": 5.9, "high": 6.2}
SLOWER = {"value": 0.5, "low": 0.45, "high": 0.55}
UNCLEAR = {"value": 1.1, "low": 0.9, "high": 1.3}


@pytest.mark.parametrize(
    ("run", "sentence", "shown"),
    [
        (
            pair(3, 5, own=2, before=(3_450_000, (timed(0.73),)), after=(180_000, (timed(0.12, FASTER),))),
            "19.2× smaller, 6.1× faster (batch 1, 1 thread), 0.50 points lost on validation (95 % interval −1.19 to +0.19)",
            [("19.2×", "smaller"), ("6.1×", "faster"), ("0.50", "points lost on validation")],
        ),
        (
            pair(9, 3, before=(100_000, (timed(1.0),)), after=(150_000, (timed(2.0, SLOWER),))),
            "1.5× larger, 2.0× slower (batch 1, 1 thread), 1.50 points gained on validation (95 % interval +0.31 to +2.69)",
            [("1.5×", "larger"), ("2.0×", "slower"), ("1.50", "points gained on validation")],
        ),
        (
            pair(3, 3, before=(100_000, (timed(1.0),)), after=(100_000, (timed(0.9, UNCLEAR),))),
            (
                "same size, no clear difference (batch 1, 1 thread), no points lost on validation "
                "(95 % interval 0.00 to 0.00)"
            ),
            [("1.00×", "same size"), ("unclear", "whether faster or slower"), ("0.00", "points lost on validation")],
        ),
        (
            pair(3, 3, artifact=None),
            (
                "Not exported, up to export: 19.2× smaller, latency not compared, no points lost on validation "
                "(95 % interval 0.00 to 0.00)"
            ),
            [("19.2×", "smaller"), (text.MISSING, "latency not compared"), ("0.00", "points lost on validation")],
        ),
        (
            pair(3, 3, before=(0, ()), after=(0, ())),
            ("size not compared, latency not compared, no points lost on validation (95 % interval 0.00 to 0.00)"),
            [
                (text.MISSING, "size not compared"),
                (text.MISSING, "latency not compared"),
                ("0.00", "points lost on validation"),
            ],
        ),
        (
            CASES["source-alone"],
            "Nothing compressed yet: source measures 3.41 MB, 10.00 % on validation, 1.42 ms (batch 1, 2 threads)",
            [("3.41 MB", "ONNX file"), ("1.42 ms", "batch 1, 2 threads"), ("10.00 %", "on validation")],
        ),
    ],
    ids=["better", "worse", "unclear", "not timed", "no bytes", "alone"],
)
def test_head(run, sentence, shown):
    assert summarize(run).head.headline == sentence
    assert bigs(run) == shown


def test_big_figures_carry_their_intervals():
    run = pair(3, 5, own=2, before=(3_450_000, (timed(0.73),)), after=(180_000, (timed(0.12, FASTER),)))
    size, time, accuracy = summarize(run).head.bigs
    assert size.details == ("3.45 MB → 180 KB", "gzipped 3.10 MB → 162 KB")
    assert time.details == ("0.730 ms → 0.120 ms, batch 1, 1 thread", "95 % interval 5.90× to 6.20×")
    assert accuracy.details == (
        "99.25 % → 98.75 %",
        "95 % interval −1.19 to +0.19, n = 400",
        "within what chance explains",
    )
    slower = pair(9, 3, before=(1000, (timed(1.0),)), after=(1000, (timed(2.0, SLOWER),)))
    assert summarize(slower).head.bigs[1].details[1] == "95 % interval 1.82× to 2.22×"
    assert "chance" not in " ".join(summarize(slower).head.bigs[2].details)


# What two processes of one model measured (A/A), and a ratio that its own interval alone would call clear.
STRAYED = {"value": 1.022, "low": 1.012, "high": 1.023}


@pytest.mark.parametrize(
    ("ratio", "headline", "big"),
    [
        (STRAYED, "no clear difference", ("unclear", "whether faster or slower")),
        ({"value": 0.979, "low": 0.978, "high": 0.988}, "no clear difference", ("unclear", "whether faster or slower")),
        ({"value": 1.03, "low": 1.025, "high": 1.04}, "1.03× faster", ("1.03×", "faster")),
        ({"value": 0.95, "low": 0.94, "high": 0.96}, "1.05× slower", ("1.05×", "slower")),
    ],
)
def test_nothing_is_faster_by_less_than_equal_things_differ(ratio, headline, big):
    repeat = example_repeat().model_copy(update={"ratio": Ratio(against="train", **STRAYED)})
    run = pair(3, 3, before=(1000, (timed(1.0),)), after=(1000, (timed(0.98, ratio),)), repeats=(repeat,))
    summary = summarize(run)
    assert f", {headline} (batch 1, 1 thread), " in summary.head.headline
    assert bigs(run)[1] == big
    assert headline in summary.stages.table.lines[1].cells[3].details
    for form in (render_markdown(summary), render_html(summary, run)):
        assert headline in form
        assert "further from 1 than the interval of the reference against itself" in form
    detail = summary.head.bigs[1].details[1]
    assert detail.endswith("no more than the reference against itself") == (big[0] == "unclear")
    # Another setting's repeat says nothing of this one, and without any the interval alone decides.
    for repeats in ((), (repeat.model_copy(update={"threads": 2}),)):
        alone = summarize(run.model_copy(update={"repeats": repeats}))
        assert "unclear" not in [shown.figure for shown in alone.head.bigs]
        assert "no clear difference" not in alone.head.headline


def test_what_is_not_known_is_a_dash_in_both_forms():
    row = WHOLE.rows[-1]
    layers = tuple(layer.model_copy(update={"macs": None}) for layer in row.size.layers)
    unknown = {"samples_per_second": None}
    quality = row.quality.model_copy(
        update={split: getattr(row.quality, split).model_copy(update=unknown) for split in ("validation", "test")}
    )
    size = row.size.model_copy(update={"macs": None, "activation_peak_bytes": None, "layers": layers})
    run = replaced(WHOLE, len(WHOLE.rows) - 1, size=size, quality=quality, precision="bf16")
    summary = summarize(run)
    column = summary.layers.sizes.columns.index("MACs") - 1
    assert {line.cells[column].figure for line in summary.layers.sizes.lines} == {text.MISSING}
    evaluation = next(line for line in summary.answers.overall.lines if line.label.startswith("Evaluation"))
    assert [cell.figure for cell in evaluation.cells] == ["5,120", text.MISSING] * 2
    assert summary.stages.table.lines[-1].tags == ("bf16",)
    assert summary.head.subject.startswith("export (bf16) against train (fp32)")
    assert "None" not in render_markdown(summary)
    assert "None" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", render_html(summary, run), flags=re.DOTALL)


def test_headline_setting_is_the_smallest_batch_and_most_threads_both_were_measured_in():
    before = (timed(3.0, threads=1), timed(2.0, threads=2), timed(9.0, batch_size=64, threads=8))
    after = (
        timed(0.1, threads=4),
        timed(1.0, {"value": 2.0, "low": 1.9, "high": 2.1}, threads=2),
        timed(1.0, FASTER, batch_size=64, threads=8),
    )
    head = summarize(pair(3, 3, before=(1000, before), after=(1000, after))).head
    assert "2.0× faster (batch 1, 2 threads)" in head.headline


def test_threads_that_wait_for_a_core_are_no_headline():
    before = (timed(3.0, threads=1), timed(9.0, threads=2), timed(9.0, threads=4))
    after = (timed(1.0, FASTER, threads=1), timed(1.0, FASTER, threads=2), timed(1.0, FASTER, threads=4))
    run = pair(3, 3, before=(1000, before), after=(1000, after))
    for cores, shown in ((1, "1 thread)"), (2, "2 threads)"), (3, "2 threads)"), (4, "4 threads)")):
        machine = run.machine.model_copy(update={"cores": cores})
        assert f"(batch 1, {shown}" in summarize(run.model_copy(update={"machine": machine})).head.headline


def test_budget_missed_and_unsure(tmp_path):
    run = pair(3, 5, own=2)
    difference = run.budget.difference
    missed = run.model_copy(update={"budget": Budget(accuracy_drop=0.25, difference=difference, met=False)})
    verdict = summarize(missed).head.verdict
    assert (verdict.met, verdict.title) == (False, "Budget missed")
    assert "at most 0.25 points" in verdict.explanation
    assert "−0.50 points (paired 95 % interval −1.19 to +0.19, n = 400; 2 samples right only" in verdict.explanation
    assert "too few to be sure" in verdict.explanation
    clear = run.model_copy(update={"budget": Budget(accuracy_drop=2.0, difference=difference, met=True)})
    assert "too few" not in summarize(clear).head.verdict.explanation
    assert 'class="verdict missed"' in written(missed, tmp_path)[1]


def test_trust_is_the_reference_against_itself():
    head = summarize(WHOLE).head
    assert head.trust == "The reference against itself: 1.00× (95 % interval 0.99× to 1.02×, batch 1, 2 threads)."
    assert head.caution == ""
    unchecked = summarize(WHOLE.model_copy(update={"repeats": ()})).head
    assert unchecked.trust.startswith("Not checked")
    assert summarize(CASES["no-latency"]).head.trust == ""
    noisy = (example_repeat(is_noisy=True), example_repeat(threads=2))
    partly = summarize(WHOLE.model_copy(update={"repeats": noisy})).head.caution
    assert partly.startswith("The machine was too noisy at batch 1, 1 thread: two equal models")
    markdown, page = rendered("noisy")
    assert "**Latency: caution.** The machine" in markdown
    assert 'class="verdict caution"' in page
    assert "too noisy for 5 %" in page
    assert "too noisy in every setting" in summarize(CASES["noisy"]).head.caution


# The staged table


def test_every_row_and_its_ratios():
    table = summarize(WHOLE).stages.table
    assert [line.label for line in table.lines] == list(STAGES)
    assert [line.is_reference for line in table.lines] == [stage == "train" for stage in STAGES]
    assert table.lines[-1].tags == ("int8",)
    last = dict(zip(table.columns[1:], table.lines[-1].cells, strict=True))
    assert last["Size"] == Cell("149 KB", ("23.0× smaller", "134 KB gzipped"))
    assert last["Latency, batch 1, 1 thread"].figure == "0.319 ms"
    assert last["Latency, batch 1, 1 thread"].details == ("[0.313, 0.325]", "7.3× faster", "7.11× to 7.40×")
    assert [title.replace("\N{NO-BREAK SPACE}", " ") for title in table.columns[1:3]] == [
        "Validation accuracy, n = 360",
        "Test accuracy, n = 359",
    ]
    for cell, split in zip(table.lines[-1].cells[:2], ("validation", "test"), strict=True):
        difference = getattr(WHOLE.rows[-1].comparison, split)
        top5 = getattr(WHOLE.rows[-1].quality, split).top5
        assert cell.details[1:] == (
            f"{text.signed(difference.points)} points",
            f"{text.signed(difference.low)} to {text.signed(difference.high)}",
            f"top-5 {top5.percent:.2f} %",
        )
    # Every row after the reference has its paired interval, none before it is compared.
    for line in table.lines:
        stage = STAGES.index(line.label)
        compared = stage > STAGES.index("train")
        assert any(detail.endswith(" points") for detail in line.cells[0].details) == compared
        assert ("faster" in " ".join(line.cells[3].details)) == compared


def test_a_row_that_was_not_timed_has_gaps():
    gap = replaced(WHOLE, 3, latency=())
    table = summarize(gap).stages.table
    column = table.columns.index("Latency, batch 1, 1 thread") - 1
    assert table.lines[3].cells[column] == Cell(text.MISSING)
    assert [line.label for line in summarize(gap).stages.start.lines] == [stage for stage in STAGES if stage != "prune"]


def test_many_settings_get_a_table_of_their_own():
    shown = summarize(CASES["many-settings"]).stages
    assert [title for title in shown.table.columns if title.startswith("Latency")] == ["Latency, batch 1, 2 threads"]
    assert [line.label for line in shown.latency.lines] == [
        "batch 1, 1 thread",
        "batch 1, 2 threads",
        "batch 8, 1 thread",
        "batch 8, 2 threads",
        "batch 32, 2 threads",
    ]
    assert shown.latency.columns == ("Setting", *STAGES)
    assert summarize(WHOLE).stages.latency is None


def test_start_and_memory():
    start = summarize(WHOLE).stages.start
    last = dict(zip(start.columns[1:], (cell.figure for cell in start.lines[-1].cells), strict=True))
    assert last["Cold start"] == "16 ms"  # one sample
    assert "the first answer, once, in a fresh process" in start.caption
    assert last["Peak memory"] == "78.8 MB"
    assert last["Activations"] == "197 KB"
    assert last["90 % of calls"] == "≤ 0.236 ms"
    assert last["Samples per second"] == "5,092"


def test_pruned_weights_are_told_from_stored_ones():
    size = WHOLE.rows[3].size
    # The file's own parameters count: the model's are more, as it is not folded.
    sparse = replaced(WHOLE, 3, parameters=120_000, size=size.model_copy(update={"nonzero_parameters": 58_349}))
    column = summarize(sparse).stages.table.columns.index("Parameters, MACs") - 1
    assert summarize(sparse).stages.table.lines[3].cells[column] == Cell("120 k", ("50 % not zero", "18.1 M MACs"))
    folded = replaced(WHOLE, 3, parameters=120_000)
    assert summarize(folded).stages.table.lines[3].cells[column] == Cell("120 k", ("18.1 M MACs",))
    assert summarize(WHOLE).stages.table.lines[3].cells[column] == Cell("117 k", ("18.1 M MACs",))


# The files


def test_colours_are_readable_in_both_themes():
    style = resources.files("compress.report").joinpath("report.css").read_text(encoding="utf-8")

    def luminance(colour):
        channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split("(prefers-color-scheme")[:2])
    for theme in (light, dark):
        for paper in ("page", "panel", "tint"):
            for ink in ("ink", "quiet", "mark", "good", "bad", "warm"):
                assert contrast(theme[paper], theme[ink]) >= 4.5, (paper, ink)  # WCAG AA, text
        for mark in ("mark", "soft", "warm"):
            assert contrast(theme["panel"], theme[mark]) >= 2.5, mark  # bars, which carry their figures as text


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_report(call, tmp_path, monkeypatch):
    run = CASES["source-alone"]
    before = written(run, tmp_path)

    def fail(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CompressError, match=r"report\.md: cannot be written: No space left"):
            write_report(CASES["no-latency"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert before == tuple((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))


def test_importing_the_report_imports_no_framework():
    code = "import sys, compress.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "compress.report.charts.cost" in loaded
    assert not loaded & {"torch", "torchvision", "onnx", "onnxruntime", "accelerate", "matplotlib.pyplot"}
