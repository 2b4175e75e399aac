"""The report: its figures, its safety against hostile text, and that it is one quiet, repeatable file."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest

from compress.console import make_console, results_table
from compress.errors import CompressError
from compress.report import text, write_report
from compress.report.labels import Box, place
from compress.report.markdown import escape, fenced
from compress.report.summary import Cell, headline, summarize
from compress.results import (
    Accuracy,
    Artifact,
    Budget,
    Latency,
    Machine,
    PairedDifference,
    Results,
    Row,
    SplitAccuracy,
)

HOSTILE = '<script>alert("1")</script> | `rm` <img src=x onerror=1> *b* $x_2$ [l](u)\n# head & \x07'
VOID = {"meta", "link", "br", "img", "input", "hr"}


def accuracy(correct, n=400):
    percent = 100 * correct / n
    return Accuracy(correct=correct, n=n, percent=percent, low=max(0.0, percent - 1.5), high=min(100.0, percent + 1.2))


def latency(threads, median_ms, precision="fp32", spread=0.02, batch_size=1):
    return Latency(
        device="cpu",
        backend="onnxruntime",
        provider="CPUExecutionProvider",
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        median_ms=median_ms,
        low_ms=median_ms * (1 - spread),
        high_ms=median_ms * (1 + spread),
        p90_ms=median_ms * 1.2,
        p99_ms=median_ms * 1.5,
        runs=200,
    )


def row(stage, correct, size_bytes, times_ms=None, precision="fp32", seconds=30.0, **more):
    return Row(
        stage=stage,
        accuracy=SplitAccuracy(validation=accuracy(correct), test=accuracy(max(0, correct - 3))),
        parameters=size_bytes // 4,
        macs=40 * size_bytes,
        sha256="0" * 64,
        size_bytes=size_bytes,
        seconds=seconds,
        latency=tuple(latency(threads, time, precision) for threads, time in (times_ms or {}).items()),
        checkpoint=f"00-{stage}-0123abcd",
        digest="ab" * 32,
        precision=precision,
        **more,
    )


ROWS = (
    row("source", 40, 3_450_000, {1: 1.19, 2: 0.73}, seconds=0.0),
    row("train", 397, 3_450_000, {1: 1.19, 2: 0.73}, seconds=214.0),
    row("distill", 396, 1_100_000, {1: 0.39, 2: 0.25}, warnings=("still rising at the last epoch",)),
    row("prune", 394, 620_000, notes=("2 groups left alone",)),  # latency not measured
    row("factorize", 393, 585_000, {1: 0.27, 2: 0.19}),
    row("quantize", 394, 182_000, {1: 0.17, 2: 0.122}, "int8"),
    row("export", 395, 180_000, {1: 0.168, 2: 0.12}, "int8"),
)
DIFFERENCE = PairedDifference(
    points=-0.5, low=-1.31, high=0.42, n=400, only_reference_correct=4, only_artifact_correct=2
)


def results(rows=ROWS, reference="train", difference=DIFFERENCE, **more):
    content = {
        "name": "resnet_mobile",
        "created": "2026-07-01T12:00:00Z",
        "seed": 7,
        "command": "compress run resnet_mobile.yaml",
        "settings": {"name": "resnet_mobile", "stages": [{"train": {"epochs": 12}}]},
        "machine": Machine(
            cpu="Some CPU",
            cores=2,
            architecture="x86_64",
            instruction_sets=("avx2", "avx512_vnni"),
            cuda_device=None,
            system="Linux",
            python="3.11.7",
            versions={"torch": "2.15.0", "onnxruntime": "1.31.0"},
        ),
        "reference": reference,
        "classes": ("cat", "dog"),
        "rows": rows,
        "difference": difference,
        "budget": None if difference is None else Budget(accuracy_drop=1.0, difference=difference, met=True),
        "artifact": Artifact(
            files={"model.int8.onnx": 180_000, "card.md": 912},
            sha256={"model.int8.onnx": "cd" * 32, "card.md": "ef" * 32},
            model="model.int8.onnx",
            max_error=3.1e-6,
            agreement=0.9975,
        ),
    }
    return Results(**{**content, **more})


CASES = {
    "whole": results(),
    "no latency": results(tuple(one.model_copy(update={"latency": ()}) for one in ROWS)),
    "source alone": results(ROWS[:1], "source", None, artifact=None),
    "until prune": results(ROWS[:4], difference=None, artifact=None),
    "zero accuracy": results((row("source", 0, 1000), row("export", 0, 0)), "source", None),
    "all right": results((row("source", 400, 900_000, {1: 2.0}), row("export", 400, 90_000, {1: 1.0})), "source"),
    "missed": results(budget=Budget(accuracy_drop=0.25, difference=DIFFERENCE, met=False)),
    "twice": results((*ROWS[:4], row("prune-2", 390, 500_000), *ROWS[4:])),
    "hostile": results(
        (*ROWS[:2], row(HOSTILE, 390, 500_000, warnings=(HOSTILE,), notes=(HOSTILE,))),
        name=HOSTILE,
        classes=(HOSTILE,),
        command=f"run ``` {HOSTILE}",
        settings={HOSTILE: "```"},
        warnings=(HOSTILE,),
        artifact=Artifact(files={HOSTILE: 5}, sha256={}, model="no", max_error=None, agreement=None),
    ),
}


class Page(HTMLParser):
    """Checks that tags balance; collects text, attributes, ids and the cells of the table of rows."""

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


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return CASES[request.param]


def test_both_forms_hold_every_word_of_the_summary(case, tmp_path):
    markdown, page = written(case, tmp_path)
    shown = Page(page).words
    summary = summarize(case)
    facts = [*summary.checks, *summary.warnings, *summary.notes, *summary.machine, *summary.definitions]
    facts += summary.conditions
    words = [summary.name, summary.headline, *summary.columns, *(value for fact in facts for value in fact)]
    for line in summary.lines:
        words += [line.label, *(part for cell in line.cells for part in (cell.figure, *cell.details))]
    for file in summary.files:
        words += [file.name, file.size, file.sha256]
    if summary.verdict:
        words += [summary.verdict.title, summary.verdict.explanation]
    for word in words:
        assert any(word in part for part in shown), word
        assert escape(word) in markdown, word
    assert summary.command in markdown
    assert summary.settings_json in markdown
    assert html.escape(summary.command).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page


def test_page_is_sound_and_asks_for_nothing(case, tmp_path):
    page = written(case, tmp_path)[1]
    parsed = Page(page)
    assert "://" not in page
    assert not {"script", "img", "iframe", "object", "b"} & set(parsed.tags)
    assert all(tag != "link" or 'href="data:,"' in page for tag in parsed.tags)
    for name, value in parsed.attributes:
        assert name != "src"
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href") or value == "data:," or value.startswith("#")
        assert "url(" not in (value or "") or "url(#" in value
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)
        elif name == "href" and value.startswith("#"):
            assert value[1:] in ids
    for needed in ("h1", "h2", "caption", "figcaption", "title", "desc", "main"):
        assert needed in parsed.tags
    assert ("lang", "en") in parsed.attributes
    assert ("scope", "row") in parsed.attributes


def test_report_is_the_same_byte_for_byte(tmp_path):
    assert written(CASES["whole"], tmp_path / "a") == written(CASES["whole"], tmp_path / "b")


def test_readers_matplotlib_settings_change_nothing(tmp_path):
    import matplotlib as mpl

    first = written(CASES["whole"], tmp_path)
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "axes.linewidth": 9}):
        assert written(CASES["whole"], tmp_path) == first


def test_hostile_text_is_text(tmp_path):
    markdown, page = written(CASES["hostile"], tmp_path)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    prose = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", markdown)  # without code blocks
    assert "<script" not in prose.lower()
    assert "<img" not in prose
    assert not re.search(r"(?<!\\)`", prose)
    assert not re.search(r"(?m)^# head", prose)
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables}
    assert widths == {len(summarize(CASES["hostile"]).columns) + 1, 3}


def test_fence_outgrows_its_content():
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"
    assert escape("resnet_mobile _a_ `b|c`") == r"resnet_mobile \_a\_ \`b\|c\`"


def test_every_row_and_its_ratios():
    summary = summarize(CASES["whole"])
    assert [line.label for line in summary.lines] == [one.stage for one in ROWS]
    assert [line.is_reference for line in summary.lines] == [one.stage == "train" for one in ROWS]
    at = summary.columns.index
    size, one, two = at("Size"), at("Latency, batch 1, 1 thread"), at("Latency, batch 1, 2 threads")
    last = summary.lines[-1].cells
    assert last[size] == Cell("180 KB", (f"{3450 / 180:.1f}× smaller",))
    assert last[one].figure == "0.168 ms"
    assert last[one].details[-1] == f"{1.19 / 0.168:.1f}× faster"
    assert last[two].details == ("[0.118, 0.122]", f"{0.73 / 0.12:.1f}× faster")
    validation = last[at("Validation accuracy")]
    assert validation == Cell("98.75 %", ("[97.25, 99.95]", "395 of 400", "−0.50 points", "paired −1.31 to +0.42"))
    distill = summary.lines[2].cells
    assert distill[size].details == (f"{3450 / 1100:.1f}× smaller",)
    assert distill[0].details[-1] == "−0.25 points"
    assert summary.lines[3].cells[one] == Cell(text.MISSING)
    # What came before the reference is no result, so it is not compared.
    assert summary.lines[0].cells[size] == Cell("3.45 MB")


LOST = "0.50 points lost on validation (95 % interval −1.31 to +0.42)"


@pytest.mark.parametrize(
    ("case_name", "expected"),
    [
        ("whole", f"19.2× smaller, 6.1× faster (batch 1, 2 threads), {LOST}"),
        ("no latency", f"19.2× smaller, latency not compared, {LOST}"),
        (
            "source alone",
            "Nothing compressed yet: source measures 3.45 MB, 10.00 % on validation, 0.730 ms (batch 1, 2 threads)",
        ),
        (
            "until prune",
            (
                "Not exported, up to prune: 5.6× smaller, latency not compared, "
                "0.75 points lost on validation (paired interval not known)"
            ),
        ),
        (
            "zero accuracy",
            "size not compared, latency not compared, no points lost on validation (paired interval not known)",
        ),
    ],
)
def test_headline(case_name, expected):
    assert headline(CASES[case_name]) == expected


def test_headline_says_gained_slower_and_larger():
    rows = (row("source", 380, 100_000, {1: 1.0}), row("export", 384, 150_000, {1: 2.0}))
    gained = DIFFERENCE.model_copy(update={"points": 1.0, "low": 0.2, "high": 1.8})
    assert headline(results(rows, "source", gained)) == (
        "1.5× larger, 2.0× slower (batch 1, 1 thread), 1.00 points gained on validation (95 % interval +0.20 to +1.80)"
    )


def test_overlapping_latencies_claim_no_ratio():
    rows = (row("source", 380, 100_000, {1: 1.0}), row("export", 380, 100_000, {1: 0.98}))
    assert "same size, no clear difference (batch 1, 1 thread)" in headline(results(rows, "source", None))


def test_headline_setting_is_the_smallest_batch_and_most_threads_both_were_measured_in():
    source = row("source", 380, 100_000).model_copy(
        update={"latency": (latency(1, 3.0), latency(2, 2.0), latency(8, 9.0, batch_size=64))}
    )
    export = row("export", 380, 50_000).model_copy(
        update={"latency": (latency(4, 0.1), latency(2, 1.0), latency(8, 1.0, batch_size=64))}
    )
    assert "2.0× faster (batch 1, 2 threads)" in headline(results((source, export), "source", None))


def test_budget_missed_and_unsure(tmp_path):
    missed = summarize(CASES["missed"]).verdict
    assert missed is not None
    assert (missed.met, missed.title) == (False, "Budget missed")
    assert "at most 0.25 points" in missed.explanation
    assert "−0.50 points (paired 95 % interval −1.31 to +0.42, n = 400; 4 samples right only" in missed.explanation
    assert "too few to be sure" in missed.explanation
    clear = Budget(accuracy_drop=2.0, difference=DIFFERENCE, met=True)
    assert "too few" not in summarize(results(budget=clear)).verdict.explanation
    assert 'class="verdict missed"' in written(CASES["missed"], tmp_path)[1]


def test_chart_names_every_row_and_leaves_latency_out_where_it_was_not_measured(tmp_path):
    drawings = re.findall(r"(?s)<svg.*?</svg>", written(CASES["whole"], tmp_path)[1])
    assert len(drawings) == 2
    for one in ROWS:
        assert re.search(rf"<text[^>]*>{one.stage}(, 10.00 %)?</text>", drawings[1])
        assert bool(re.search(rf"<text[^>]*>{one.stage}(, 10.00 %)?</text>", drawings[0])) == bool(one.latency)
    assert written(CASES["no latency"], tmp_path)[1].count("<svg") == 1


def test_a_name_in_the_chart_is_never_taken_for_a_formula(tmp_path):
    page = written(results((*ROWS[:2], row("$x^2$", 390, 500_000)), difference=None), tmp_path)[1]
    assert ">$x^2$</text>" in page


def test_the_drawings_style_nothing_else(tmp_path):
    assert Page(written(CASES["whole"], tmp_path)[1]).tags.count("style") == 1


def test_names_in_the_chart_do_not_cover_each_other():
    anchors = [(50.0, 50.0), (52.0, 50.0), (54.0, 49.0), (120.0, 50.0), (195.0, 50.0)]
    sizes = [(40.0, 11.0)] * len(anchors)
    boxes = []
    for (x, y), (width, height), offset in zip(
        anchors, sizes, place(anchors, sizes, [], Box(0, 0, 200, 200)), strict=True
    ):
        left = x + offset.dx - {"left": 0.0, "center": width / 2, "right": width}[offset.horizontal]
        boxes.append(Box(left, y + offset.dy - height / 2, left + width, y + offset.dy + height / 2))
    assert sum(a.shared(b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    assert all(box.left >= 0 and box.right <= 200 for box in boxes)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.size(0), "0 bytes"),
        (text.size(999), "999 bytes"),
        (text.size(1000), "1.00 KB"),
        (text.size(180_224), "180 KB"),
        (text.size(999_499), "999 KB"),
        (text.size(999_500), "1.00 MB"),
        (text.size(3_452_000), "3.45 MB"),
        (text.size(5 * 10**15), "5,000 TB"),
        (text.count(855_770), "856 k"),
        (text.count(41_000_000), "41.0 M"),
        (text.milliseconds(0.1234), "0.123 ms"),
        (text.milliseconds(12.34), "12.3 ms"),
        (text.milliseconds(1234.4), "1234 ms"),
        (text.milliseconds(0.0), "0.00 ms"),
        (text.duration(3.14), "3.1 s"),
        (text.duration(59.7), "1 min 00 s"),
        (text.duration(3599.8), "1 h 00 min"),
        (text.times(5.13, "smaller", "larger", "same size"), "5.1× smaller"),
        (text.times(0.5, "smaller", "larger", "same size"), "2.0× larger"),
        (text.times(1.04, "smaller", "larger", "same size"), "1.04× smaller"),
        (text.times(1.001, "smaller", "larger", "same size"), "same size"),
        (text.times(1234.0, "smaller", "larger", "same size"), "1,234× smaller"),
        (text.times(None, "smaller", "larger", "same size"), "—"),
        (text.signed(-0.001), "0.00"),
        (text.change(0.28), "0.28 points gained"),
        (text.plain(" a\n b\x00"), "a b\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_figures_as_text(shown, expected):
    assert shown == expected


def test_colours_are_readable_in_both_themes():
    style = resources.files("compress.report").joinpath("report.css").read_text(encoding="utf-8")

    def luminance(colour):
        channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split("prefers-color-scheme")[:2])
    for theme in (light, dark):
        for paper in ("page", "panel", "tint"):
            for ink in ("ink", "quiet", "mark", "good", "bad"):
                bright, dim = sorted((luminance(theme[paper]), luminance(theme[ink])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (paper, ink)  # WCAG AA


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_report(call, tmp_path, monkeypatch):
    before = written(CASES["whole"], tmp_path)

    def fail(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CompressError, match=r"report\.md: cannot be written: No space left"):
            write_report(CASES["missed"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert before == tuple((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))


def test_importing_the_report_imports_no_framework():
    code = "import sys, compress.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "compress.report.chart" in loaded
    assert not loaded & {"torch", "torchvision", "onnx", "onnxruntime", "accelerate", "matplotlib.pyplot"}


# What the terminal says below its table


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (
            row("export", 395, 180_000, {1: 0.24, 2: 0.1}, "int8"),
            ["19.2× smaller", "5.0× faster at batch 1 with 1 thread", "7.3× faster at batch 1 with 2 threads"],
        ),
        (
            row("export", 395, 6_900_000, {1: 2.38, 2: 0.73}),
            ["2.0× larger", "2.0× slower at batch 1 with 1 thread", "no clear difference at batch 1 with 2 threads"],
        ),
        (row("export", 395, 3_450_000, {4: 1.0}), ["same size"]),
    ],
)
def test_the_terminal_says_slower_and_larger_where_it_is(capsys, last, told):
    make_console().print(results_table(results((*ROWS[:2], last))))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("against 'train': "))
    *parts, points = line.removeprefix("against 'train': ").split(", ")
    assert parts == told
    assert points.endswith(" points on test")
