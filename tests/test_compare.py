"""`compress compare`: what is read, what is computed, and its three forms: terminal, page, JSON."""

from __future__ import annotations

import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser, Tab
from report_examples import (
    example_answers,
    example_machine,
    example_repeat,
    example_results,
    example_row,
    example_run,
    example_size,
)
from rich.console import Console

from compress import cli
from compress.comparison.conditions import Unknown, Verdict
from compress.comparison.records import Compared
from compress.comparison.runs import compare, figures_of, read_runs
from compress.errors import CompressError
from compress.measured import Measurement
from compress.packed import pack_answers, pack_confidences
from compress.report.compare import faster_words, render_compare
from compress.results import Results
from compress.terminal.compare import compare_tables
from compress.terminal.console import make_console

HOSTILE = '<script>alert("1")</script> | <img src=x onerror=1> [red]b[/] $x_2$\n# head & \x07'
KEY = {"data": {"settings": {"kind": "digits"}, "content": "1"}, "seed": 0}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def write(folder, results, answers=None, key=KEY):
    """A run on disk; with answers, those of its last row."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(results.model_dump_json())
    if answers is not None:
        row = results.rows[-1]
        measured = Measurement(
            key=key,
            precision=row.precision,
            accuracy=row.accuracy,
            quality=row.quality,
            answers={name: pack_answers(np.array(given)) for name, given in answers.items()},
            confidences={name: pack_confidences(np.ones(len(given))) for name, given in answers.items()},
            parameters=row.parameters,
            macs=row.macs,
            model="model.onnx",
            size=row.size,
            sha256=row.sha256,
        )
        (folder / row.checkpoint).mkdir()
        (folder / row.checkpoint / "metrics.json").write_text(measured.model_dump_json())
    return folder


def compared(**runs):
    """Runs by name, compared from disk."""
    folders = [write(Path("runs") / name, results) for name, results in runs.items()]
    return compare(read_runs(folders))


def one_row(name, wrong, samples=200):
    """A run of one row with these wrong answers on validation; and the answers."""
    pairs = {"validation": example_answers(samples, 10, wrong), "test": example_answers(samples - 1, 10, wrong)}
    row = example_row(
        "source", pairs, [str(n) for n in range(10)], size=example_size(1000 + wrong), sha256=f"{wrong:064d}"
    )
    results = example_run(name, [row], "source", [str(n) for n in range(10)])
    return results, {split: [answer for _, answer in given] for split, given in pairs.items()}


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_answers_on_disk_make_the_comparison_paired():
    (first, first_answers), (second, second_answers) = one_row("a", 10), one_row("b", 14)
    runs = read_runs([write("a", first, first_answers), write("b", second, second_answers)])
    run = compare(runs).runs[1]
    assert run.why_unpaired is None
    assert run.validation.is_paired
    assert run.test.is_paired
    assert run.validation.points == -2.0
    # 'b' fails where 'a' does, and on four samples more: b = 4, c = 0 of 200, by hand.
    centre, spread = -4 / 202, 1.959964 * ((6 / 202 - (4 / 202) ** 2) / 202) ** 0.5
    assert (run.validation.low, run.validation.high) == pytest.approx(
        (100 * (centre - spread), 100 * (centre + spread))
    )
    unpaired = compared(a=first, b=second).runs[1].validation
    assert unpaired.points == run.validation.points
    assert unpaired.low < run.validation.low < run.validation.high < unpaired.high


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda key, answers: ({**KEY, "seed": 1}, answers), "the data, its split or what reads it is not the same"),
        (lambda key, answers: ({**KEY, "data": {"content": "2"}}, answers), "the data, its split"),
        (lambda key, answers: (KEY, {**answers, "test": answers["test"][:-1]}), "the numbers of samples differ"),
        (lambda key, answers: ({"seed": 0}, answers), "the answers of 'b' are not on disk"),
        (lambda key, answers: (KEY, None), "the answers of 'b' are not on disk beside its results"),
    ],
)
def test_answers_to_other_samples_are_not_paired(change, why):
    (first, first_answers), (second, second_answers) = one_row("a", 10), one_row("b", 14)
    key, answers = change(KEY, second_answers)
    runs = read_runs([write("a", first, first_answers), write("b", second, answers, key)])
    run = compare(runs).runs[1]
    assert run.why_unpaired.startswith(why)
    assert not run.validation.is_paired
    assert run.validation.points == -2.0


def test_answers_that_belong_to_another_file_or_are_damaged_do_not_count():
    (first, first_answers), (second, second_answers) = one_row("a", 10), one_row("b", 14)
    one, other = write("a", first, first_answers), write("b", second, second_answers)
    metrics = other / second.rows[-1].checkpoint / "metrics.json"
    whole = metrics.read_text()
    for content in (
        whole.replace(second.rows[-1].sha256, "c" * 64),
        whole[:-20],
        re.sub('"validation":"[^"]*"', '"validation":"AAAA"', whole),
    ):
        metrics.write_text(content)
        assert (
            compare(read_runs([one, other])).runs[1].why_unpaired
            == "the answers of 'b' are not on disk beside its results"
        )
    metrics.write_text(whole)
    assert compare(read_runs([one, other])).runs[1].why_unpaired is None


def test_answers_that_contradict_the_results_are_not_used():
    (first, answers), (second, _) = one_row("a", 10), one_row("b", 14)
    runs = read_runs([write("a", first, answers), write("b", second, answers)])
    assert compare(runs).runs[1].why_unpaired == "the answers contradict the accuracy in the results"


def test_a_run_alone_is_compared_with_its_reference():
    results = example_results()
    found = compared(digits=results)
    run, last, reference = found.runs[0], results.rows[-1], results.reference_row()
    assert found.baseline == "digits/train"
    assert (run.validation.points, run.validation.low) == (
        last.comparison.validation.points,
        last.comparison.validation.low,
    )
    assert run.size_ratio == reference.size_bytes / last.size_bytes
    ratio = next(one for one in last.latency if one.threads == 2).ratio
    assert (run.times[0].setting.threads, run.times[0].speedup, run.times[0].speedup_low) == (2, ratio.value, ratio.low)


# --- latency and machines --------------------------------------------------------------------------------------------


def test_speed_is_the_ratio_of_the_medians_with_the_widest_interval():
    first, second = example_results("a"), example_results("b", time_factor=0.5)
    found = compared(a=first, b=second)
    base, faster = found.runs[0].times[0], found.runs[1].times[0]
    assert base.speedup is None
    assert found.setting == base.setting == faster.setting
    assert (faster.setting.batch_size, faster.setting.threads) == (1, 2)
    assert faster.speedup == pytest.approx(2.0)
    assert faster.speedup_low == pytest.approx(base.low_ms / faster.high_ms)
    assert faster.speedup_high == pytest.approx(base.high_ms / faster.low_ms)


def test_runs_alike_within_what_their_repeats_tell_are_no_faster():
    loads = ((1, 1),)
    quiet = {"time_factor": 0.93, "loads": loads}  # 1 / 0.93 = 1.075, and 2 % of each median: clear on its own
    noisy = example_results("c", **quiet).model_copy(update={"repeats": (example_repeat(is_noisy=True),)})
    found = compared(a=example_results("a", loads=loads), b=example_results("b", **quiet), c=noisy)
    clear, unclear = found.runs[1].times[0], found.runs[2].times[0]
    assert clear.speedup == unclear.speedup == pytest.approx(1 / 0.93)
    assert clear.speedup_low > 1
    reach = max(noisy.repeats[0].ratio.high, 1 / noisy.repeats[0].ratio.low)
    assert (unclear.speedup_low, unclear.speedup_high) == pytest.approx((1 / 0.93 / reach, reach / 0.93))
    assert (faster_words(clear), faster_words(unclear)) == ("1.08× faster", "no clear difference")
    shown = " ".join(Page(render_compare(found)).text)
    assert "against itself (A/A)" in shown
    # The baseline's own repeat counts as much, and that of a run alone.
    other_way = compared(d=noisy, e=example_results("e", time_factor=0.865, loads=loads))
    assert faster_words(other_way.runs[1].times[0]) == "no clear difference"
    alone = example_results("f", time_factor=7.0, loads=loads)
    assert faster_words(compared(f=alone).runs[0].times[0]) == "1.04× faster"
    alone = alone.model_copy(update={"repeats": (example_repeat(is_noisy=True),)})
    assert faster_words(compared(g=alone).runs[0].times[0]) == "no clear difference"


def test_tiny_ratios_keep_their_digits():
    found = compared(a=example_results("a"), b=example_results("b", size_factor=80.0, time_factor=97.0))
    console = make_console()
    with console.capture() as capture:
        console.print(compare_tables(found))
    assert "0.0125 " in capture.get()
    assert "0.0103 [0.0099, 0.0107]" in capture.get()


@pytest.mark.parametrize(
    "change", [{"cpu": "ARM"}, {"host": "f" * 16}, {"versions": {"onnxruntime": "1"}}, {"cores": 4}]
)
def test_times_of_another_machine_are_never_compared(change):
    other = example_results("b", machine=example_machine(**change), time_factor=0.5, more_wrong=5)
    found = compared(a=example_results("a"), b=other)
    run = found.runs[1]
    assert not run.is_same_machine
    assert run.times == ()
    assert all(model.time is None and not model.is_on_latency_front for model in found.models if model.run == "b")
    figures = figures_of(found)["b"]
    assert figures["speedup"] == figures["latency_ms"] == Unknown("its latency was measured on another machine")
    assert isinstance(figures["size_ratio"], float)


def test_only_settings_in_common_are_compared():
    first = example_results("a", loads=((1, 1), (8, 2), (32, 2)))
    second = example_results("b", loads=((32, 2), (8, 2)))
    found = compared(a=first, b=second, c=example_results("c", is_timed=False))
    assert [(time.setting.batch_size, time.setting.threads) for time in found.runs[0].times] == [(8, 2), (32, 2)]
    assert found.runs[2].times == ()
    assert found.setting.batch_size == 8
    assert isinstance(figures_of(found)["c"]["latency_ms"], Unknown)
    nothing = compared(d=first, e=example_results("e", loads=((2, 1),)))
    assert nothing.setting is None
    assert all(model.time is None for model in nothing.models)


# --- fronts ----------------------------------------------------------------------------------------------------------


def test_the_front_is_over_all_rows_of_all_runs():
    found = compared(a=example_results("a"), b=example_results("b", size_factor=0.5, time_factor=2.0))
    by_name = {(model.run, model.stage): model for model in found.models}
    assert len(by_name) == 14
    # 'b' is half as large at equal accuracy, but slower.
    assert by_name["b", "distill"].is_on_size_front
    assert not by_name["a", "distill"].is_on_size_front
    assert by_name["a", "distill"].is_on_latency_front
    assert not by_name["b", "distill"].is_on_latency_front
    assert not by_name["a", "source"].is_on_size_front
    assert [model.stage for model in found.models if model.is_baseline] == ["export"]
    for model in found.models:
        beaten = any(
            (other.size_bytes, -other.accuracy.validation.percent)
            != (model.size_bytes, -model.accuracy.validation.percent)
            and other.size_bytes <= model.size_bytes
            and other.accuracy.validation.percent >= model.accuracy.validation.percent
            for other in found.models
        )
        assert model.is_on_size_front is not beaten


# --- reading ---------------------------------------------------------------------------------------------------------


def test_runs_are_folders_or_their_results_and_have_different_names():
    one, other = write("x/digits", example_results()), write("y/digits", example_results())
    assert [run.name for run in read_runs([one, other / "results.json"])] == ["x/digits", "y/digits"]
    assert [run.name for run in read_runs([one, one])] == ["digits", "digits (2)"]


def test_bad_runs_are_one_message():
    write("runs/digits", example_results())
    for path, message in (
        ("runs/digit", "runs/digit: no such run; did you mean 'digits'?"),
        ("runs", "runs/results.json: no such file; is this the folder of a finished run?"),
    ):
        with pytest.raises(CompressError) as caught:
            read_runs([Path(path)])
        assert str(caught.value) == message
    Path("model.onnx").write_bytes(b"\x08\x07\x12\xff\xfe")
    Path("notes.md").write_text("# notes")
    Path("bench.json").write_text(json.dumps({"kind": "bench", "version": 2}))
    Path("found.json").write_text(compared(a=example_results(), b=example_results()).model_dump_json())
    for path, message in (
        ("model.onnx", "model.onnx: is no results.json; `compress compare` takes runs"),
        ("notes.md", "notes.md: is no results.json; `compress compare` takes runs"),
        ("bench.json", "bench.json: is what `compress bench` wrote; `compress compare` takes runs"),
        ("found.json", "found.json: is what `compress compare` wrote; `compress compare` takes runs"),
    ):
        with pytest.raises(CompressError) as caught:
            read_runs([Path("runs/digits"), Path(path)])
        assert str(caught.value) == message
    Path("runs/digits/results.json").write_text("{")
    with pytest.raises(CompressError, match=r"^runs/digits/results\.json: is not valid JSON: "):
        read_runs([Path("runs/digits")])
    write("runs/again", example_results())
    other = write("runs/other", example_results(classes=("a", "b")))
    with pytest.raises(
        CompressError, match=r"runs/other: its 2 classes are not the 10 of runs/again: accuracy on diff"
    ):
        read_runs([Path("runs/again"), other])


# --- forms -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, text and attributes of a page."""

    def __init__(self, html):
        super().__init__()
        self.attributes, self.elements, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, text):
        self.text.append(text)


def test_the_page_is_self_contained_and_draws_both_fronts():
    found = compared(a=example_results("a"), b=example_results("b", size_factor=0.7, time_factor=0.8, more_wrong=2))
    html = render_compare(found, Verdict(("accuracy_drop>0.5 holds",), ("speedup<1 cannot be told",)))
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 2
    assert not {"script", "img", "iframe", "link rel=stylesheet"} & set(tags)
    assert not [
        each for each in page.attributes if each[1] in ("href", "src") and not each[2].startswith(("#", "data:"))
    ]
    assert not re.search(r"url\((?!#)|@import", html)
    dashed = [
        given["d"] for tag, given in page.elements if tag == "path" and "stroke-dasharray" in given.get("style", "")
    ]
    assert len(dashed) == 2
    for path, count in zip(dashed, ("is_on_size_front", "is_on_latency_front"), strict=True):
        corners = [tuple(map(float, at.split())) for at in re.split("[ML]", path) if at.strip()]
        on_front = {m.accuracy.validation.percent for m in found.models if getattr(m, count)}
        assert len({y for _, y in corners}) == len(on_front)
        # A step at a time: along, then up (upwards is down in SVG), from the cheapest to the right edge.
        steps = list(itertools.pairwise(corners))
        assert all(a[0] <= b[0] and a[1] >= b[1] and (a[0] == b[0] or a[1] == b[1]) for a, b in steps)
    assert "#0202" not in html
    for text in ("var(--run-1)", "var(--run-2)", "prefers-color-scheme: dark", "Content-Security-Policy"):
        assert text in html
    words = " ".join(page.text)
    for text in (
        "2 runs compared",
        "Baseline: a/export",
        "accuracy_drop>0.5 holds",
        "speedup<1 cannot be told",
        "1.4× smaller",
    ):
        assert text in words
    assert words.count("size and latency") == sum(m.is_on_size_front and m.is_on_latency_front for m in found.models)


def test_names_from_outside_stay_text_everywhere():
    results = example_results("a")
    rows = (*results.rows[:-1], results.rows[-1].model_copy(update={"stage": HOSTILE}))
    hostile = Results.model_validate(
        {**results.model_dump(), "name": HOSTILE, "rows": [row.model_dump() for row in rows]}
    )
    found = compare(read_runs([write("a", results), write("b", hostile)]))
    page = Page(render_compare(found))
    assert "script" not in [tag for tag, _ in page.elements]
    assert not [each for each in page.attributes if each[1].startswith("on")]
    console = make_console()
    with console.capture() as capture:
        console.print(compare_tables(found))
    assert "\x07" not in capture.get()
    assert '<script>alert("1")</script>' in capture.get()


@pytest.mark.parametrize(
    "runs",
    [
        {"a": {}},
        {"a": {"is_timed": False}},
        {"a": {"stages": ("source",)}},
        {"a": {"stages": ("source",), "is_timed": False}, "b": {}},
        {f"run{number}": {"more_wrong": number} for number in range(8)},
        {"a": {"samples": 360}, "b": {"samples": 90, "machine": example_machine(cpu="other")}},
    ],
)
def test_all_shapes_of_runs_have_a_page_and_tables(runs):
    found = compared(**{name: example_results(name, **changes) for name, changes in runs.items()})
    page = Page(render_compare(found))
    assert [tag for tag, _ in page.elements].count("svg") == (2 if found.setting else 1)
    console = make_console()
    with console.capture() as capture:
        console.print(compare_tables(found))
    assert all(name in capture.get() for name in runs)
    assert ("Latency" in capture.get()) == any(run.times for run in found.runs)


def test_a_narrow_terminal_folds_names_and_cuts_no_figure():
    found = compared(
        resnet_mobile=example_results("resnet_mobile"), resnet_wide=example_results("resnet_wide", more_wrong=1)
    )
    wide, narrow = make_console(), Console(width=100, highlight=False, emoji=False)
    with wide.capture() as everything:
        wide.print(compare_tables(found))
    with narrow.capture() as capture:
        narrow.print(compare_tables(found))
    assert max(len(line.rstrip()) for line in capture.get().splitlines()) <= 100
    figures = re.findall(r"\S*\d\.\d+\S*|[\d,]{5,}", everything.get())
    assert len(figures) > 50
    assert not [figure for figure in figures if figure not in capture.get()]
    assert "…" not in capture.get()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(tmp_path):
    found = compared(
        a=example_results("a"), b=example_results("b" * 64, size_factor=0.7, time_factor=0.8, more_wrong=2)
    )
    path = tmp_path / "compare.html"
    path.write_text(render_compare(found))
    colours = []
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            with Tab(browser, path, width, scheme=scheme) as tab:
                assert tab.requests() == [path.resolve().as_uri()]
                assert tab.events("Log.entryAdded") == []
                assert tab.run("document.documentElement.scrollWidth") <= width
                # Every mark of a run is drawn in its colour, and has a size.
                drawn = tab.run(
                    "[...document.querySelectorAll('svg use')].filter(mark => mark.getBoundingClientRect().width > 2"
                    " && (mark.getAttribute('style') || '').includes('--run-')).length"
                )
                assert drawn >= 20
                inside = (
                    "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().right <= innerWidth)"
                )
                assert tab.run(inside)
                colours.append(tab.run("getComputedStyle(document.querySelector('.legend span')).color"))
    light, dark, narrow = colours
    assert light == narrow != dark


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["compress", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return command


@pytest.fixture
def two():
    write("runs/before", example_results("before"))
    write("runs/after", example_results("after", more_wrong=4, time_factor=0.5))
    write("runs/elsewhere", example_results("elsewhere", machine=example_machine(cpu="ARM")))
    return "runs/before", "runs/after"


def test_page_and_json_are_written(command, two):
    code, out, err = command(*two, "--html", "new/page.html", "--json", "found.json")
    assert (code, err) == (0, "")
    assert out.endswith("page: new/page.html\njson: found.json\n")
    assert Path("new/page.html").read_text().startswith("<!DOCTYPE html>")
    found = Compared.model_validate_json(Path("found.json").read_text())
    assert [run.name for run in found.runs] == ["before", "after"]
    assert json.loads(Path("found.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("conditions", "code", "message"),
    [
        (["accuracy_drop>1.0"], 1, "failed: accuracy_drop>1 holds for 'after', its accuracy_drop is 1.11111\n"),
        (["accuracy_drop>1.2", "speedup<1.9", "size_ratio<1", "parameters>1e6", "latency_ms>0.2"], 0, ""),
        (["speedup<2.1"], 1, "failed: speedup<2.1 holds for 'after', its speedup is 2\n"),
        (["budget_missed"], 1, "failed: budget_missed holds for 'after'\n"),
        (["macs>=1", "test_accuracy_drop>2"], 1, "failed: macs>=1 holds for 'after', its macs is 16,100,000\n"),
    ],
)
def test_conditions_decide_the_exit_code(command, two, conditions, code, message):
    words = [word for condition in conditions for word in ("--fail-if", condition)]
    found, out, err = command(*two, *words)
    assert (found, err) == (code, message)
    assert "Accuracy" in out


def test_what_cannot_be_told_is_no_success(command, two):
    code, out, err = command("runs/before", "runs/elsewhere", "--fail-if", "speedup<1", "--fail-if", "size_bytes>1")
    assert code == 2
    assert "Accuracy" in out
    assert err.splitlines() == [
        "failed: size_bytes>1 holds for 'elsewhere', its size_bytes is 148,702",
        "error: speedup<1 cannot be told of 'elsewhere': its latency was measured on another machine",
    ]


def test_a_single_run_may_fail_too(command, two):
    assert command("runs/after", "--fail-if", "speedup<7")[0] == 0
    code, _, err = command("runs/after", "--fail-if", "accuracy_drop>1.5")
    assert (code, err) == (1, "failed: accuracy_drop>1.5 holds for 'after', its accuracy_drop is 1.66667\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/before", "--fail-if", "drop>1"), "error: --fail-if drop>1: 'drop' is nothing that is compared"),
        (("runs/befor",), "error: runs/befor: no such run; did you mean 'before'?"),
        (("runs/before", "--html", "runs"), "error: --html runs: is a folder; name a file in it"),
        (
            ("runs/before", "--json", "runs/before/results.json/x"),
            "error: --json runs/before/results.json/x: cannot be",
        ),
    ],
)
def test_user_errors_are_one_line_and_code_2(command, two, words, message):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert len(err.splitlines()) == 1
