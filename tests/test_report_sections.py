"""The report's charts and its sections on quality, changed samples and layers; what the terminal says."""

from __future__ import annotations

import functools
import re

import pytest
from report_cases import example_cases
from report_examples import STAGES, example_repeat, example_results, example_training

from compress.report.charts.cost import draw_costs
from compress.report.charts.training import draw_training
from compress.report.charts.waterfall import Step, draw_waterfalls, steps
from compress.report.html import render_html
from compress.report.summary import summarize
from compress.terminal.console import make_console, results_table

CASES = example_cases()
WHOLE = CASES["whole"]


@functools.cache
def page_of(name):
    return render_html(summarize(CASES[name]), CASES[name])


def drawings(page):
    """The drawings of a page by name."""
    return {re.search(r'aria-labelledby="(.*?)-title', svg)[1]: svg for svg in re.findall(r"(?s)<svg.*?</svg>", page)}


def drawn(panels):
    return drawings("".join(panels))


def named(svg, stage):
    """Whether a text of the drawing names a stage."""
    return any(stage in words.split(", ") for words in re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def replaced(results, index, **changes):
    rows = list(results.rows)
    rows[index] = rows[index].model_copy(update=changes)
    return results.model_copy(update={"rows": tuple(rows)})


# Charts


def test_chart_names_every_row_and_leaves_latency_out_where_it_was_not_measured():
    shown = drawn(draw_costs(replaced(WHOLE, 3, latency=())).drawings)
    for stage in STAGES:
        assert named(shown["size"], stage)
        assert named(shown["latency"], stage) == (stage != "prune")
    assert ">quantize, export</text>" in shown["size"]  # whose marks are one to the eye
    assert list(drawn(draw_costs(CASES["no-latency"]).drawings)) == ["size"]


def test_a_name_in_a_chart_is_never_taken_for_a_formula():
    run = replaced(WHOLE, 3, stage="$x^2$")
    shown = drawn((*draw_costs(run).drawings, *draw_waterfalls(run)))
    assert list(shown) == ["latency", "size", "bytes-steps", "time-steps"]
    assert all(">$x^2$</text>" in svg for svg in shown.values())


def test_steps_of_a_waterfall_lead_from_the_reference_to_the_result():
    assert steps([("a", 10.0), ("b", 4.0), ("c", 5.0)], "end") == [
        Step("a", 0.0, 10.0, is_total=True),
        Step("b", 10.0, 4.0),
        Step("c", 4.0, 5.0),
        Step("end", 0.0, 5.0, is_total=True),
    ]


def test_waterfalls_tell_each_change():
    shown = drawn(draw_waterfalls(WHOLE))
    told = shown["bytes-steps"]
    for words in ("3.42 MB", "−2.34 MB", "−611 KB", "−260 KB", "+1.40 KB", "149 KB"):
        assert f">{words}</text>" in told
    assert "train: 3.42 MB; distill: −2.34 MB" in told  # for readers that do not see it
    assert ">source</text>" not in told  # what came before the reference is no step
    assert "var(--warm" in told  # export adds
    assert "train: 1.424 ms; distill: −0.959 ms" in shown["time-steps"]
    gap = drawn(draw_waterfalls(replaced(WHOLE, 3, latency=())))
    assert ">prune</text>" in gap["bytes-steps"]
    assert ">prune</text>" not in gap["time-steps"]
    assert draw_waterfalls(CASES["source-alone"]) == ()


def test_every_trained_stage_has_its_curves():
    page = page_of("whole")
    shown = drawings(page)
    assert [name for name in shown if name.startswith("training")] == [f"training-{index}" for index in range(1, 5)]
    assert "12 epochs, 50 s" in page
    epochs = WHOLE.rows[1].training
    best = max(epoch.validation_percent for epoch in epochs)
    assert f"After 12 epochs: training loss {epochs[-1].loss:.3g}" in shown["training-1"]
    assert f"best {best:.2f} %." in shown["training-1"]
    assert 'id="training"' not in page_of("source-alone")


@pytest.mark.parametrize(
    "epochs",
    [
        example_training(1),
        example_training(2),
        example_training(300, floor=1e-6),
        tuple(epoch.model_copy(update={"loss": 0.0, "validation_loss": 0.0}) for epoch in example_training(5)),
        tuple(epoch.model_copy(update={"validation_percent": 100.0}) for epoch in example_training(5)),
        tuple(epoch.model_copy(update={"validation_loss": float("nan")}) for epoch in example_training(5)),
    ],
    ids=["one epoch", "two", "many", "no loss", "always right", "not a number"],
)
def test_curves_of_odd_trainings(epochs):
    told = draw_training("one", "train", epochs)
    assert ">Validation accuracy</text>" in told
    assert ">nan" not in told


def test_losses_above_one_are_inside_their_panel():
    # Distilled losses carry the square of the temperature.
    epochs = tuple(epoch.model_copy(update={"loss": 4.0 - epoch.epoch / 10}) for epoch in example_training(5))
    told = draw_training("one", "train", epochs)
    assert ">training</text>" in told
    lines = re.findall(r'<path d="([^"]*)"[^>]*clip-path|<path d="(M [^"]*)"', told)
    heights = [float(y) for pair in lines for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", "".join(pair))]
    assert heights
    assert min(heights) >= 0


def test_a_row_far_below_both_ends_does_not_squeeze_the_others():
    # Pruned and not yet recovered.
    ruined = WHOLE.rows[3].accuracy.validation.model_copy(
        update={"correct": 115, "percent": 31.9, "low": 29.0, "high": 35.0}
    )
    run = replaced(WHOLE, 3, accuracy=WHOLE.rows[3].accuracy.model_copy(update={"validation": ruined}))
    told = drawn(draw_costs(run).drawings)["size"]
    assert ">prune, 31.90 %</text>" in told  # a triangle at the edge, with its figure
    assert ">40 %</text>" not in told
    assert "A triangle at the lower edge" in draw_costs(run).caption


# Quality


def overall(results):
    table = summarize(results).answers.overall
    assert all(len(line.cells) == len(table.columns) - 1 for line in table.lines)
    return table.columns, {line.label: [cell.figure for cell in line.cells] for line in table.lines}


def test_quality_before_and_after_on_both_splits():
    columns, lines = overall(WHOLE)
    assert columns == ("Measure", "train, validation", "export, validation", "train, test", "export, test")
    before, after = WHOLE.reference_row().quality.validation, WHOLE.rows[-1].quality.validation
    assert lines["F1, mean of the classes"][:2] == [f"{before.f1:.2f} %", f"{after.f1:.2f} %"]
    assert lines["Calibration error, points"][1] == f"{after.calibration_error:.2f}"
    compared = WHOLE.difference
    assert lines["Same answer as the reference"][:2] == ["—", f"{compared.agreement:.2f} %"]
    assert lines["Right only in the reference"][1] == str(compared.only_reference_correct)
    assert "Top-5 accuracy" in lines
    assert f"same answer as the reference on {compared.agreement:.2f} %" in summarize(WHOLE).answers.sentence


def test_quality_of_one_model_alone_and_of_two_classes():
    columns, lines = overall(CASES["source-alone"])
    assert columns == ("Measure", "source, validation", "source, test")
    assert "Same answer as the reference" not in lines
    assert "Top-5 accuracy" not in overall(CASES["two-classes"])[1]


def test_confusions_before_and_after_sum_to_the_samples():
    matrices = summarize(WHOLE).answers.matrices
    assert [matrix.caption.partition(":")[0] for matrix in matrices] == ["train", "export"]
    for matrix, row in zip(matrices, (WHOLE.reference_row(), WHOLE.rows[-1]), strict=True):
        cells = [cell for _, line in matrix.lines for cell in line]
        assert len(cells) == 100
        assert sum(cell.count for cell in cells) == 360
        assert sum(cell.count for cell in cells if cell.is_right) == row.accuracy.validation.correct
        assert all((cell.strength > 0) == (cell.count > 0) and cell.strength <= 40 for cell in cells)
    assert '<td class="wrong" style="--heat:' in page_of("whole")


def test_of_many_classes_those_that_lost_most_come_first():
    answers = summarize(CASES["fifty-classes"]).answers
    assert answers.matrices == ()
    assert len(answers.classes.lines) == 12
    assert len(answers.all_classes.lines) == 50
    run = CASES["fifty-classes"]
    before, after = (row.quality.validation.classes for row in (run.reference_row(), run.rows[-1]))
    worst = min(range(50), key=lambda index: after[index].f1 - before[index].f1)
    assert answers.classes.lines[0].label == run.classes[worst] or (
        answers.classes.lines[0].cells[3].details == (f"−{before[worst].f1 - after[worst].f1:.1f} points",)
    )
    counts = [int(line.cells[-1].figure) for line in answers.confusions.lines]
    assert counts == sorted(counts, reverse=True)
    wrong = [cell for cell in run.rows[-1].quality.validation.confusion if cell[0] != cell[1]]
    assert counts[0] == max(samples for _, _, samples in wrong)


def test_confusions_of_a_thousand_classes_are_not_drawn_nor_listed():
    run = CASES["thousand-classes"]
    answers = summarize(run).answers
    assert (answers.matrices, answers.confusions) == ((), None)
    assert len(answers.all_classes.lines) == 1000
    assert len(page_of("thousand-classes")) < 2_000_000


# Changed samples


def test_lost_samples_are_counted_in_all_and_shown_with_both_answers():
    run = CASES["worse"]
    changed = summarize(run).changed
    lost = run.difference.only_reference_correct
    assert lost > 24
    assert changed.counted.startswith(f"{lost} validation samples of 360 are answered right by the reference")
    assert changed.shown.startswith("Here are the 24 of them")
    first, sample = changed.pictures[0], run.changed[0]
    assert first.before == f"{sample.truth} ({100 * sample.confidence_before:.0f}\u00a0%)"
    assert first.after == f"{sample.answer} ({100 * sample.confidence_after:.0f}\u00a0%)"
    assert first.alternative == f"Validation sample {sample.index}, class {sample.truth}, answered as {sample.answer}"
    page = page_of("worse")
    assert page.count("<img ") == 24
    assert f'alt="{first.alternative}"' in page


def test_nothing_lost_and_nothing_compared():
    assert summarize(CASES["source-alone"]).changed is None
    same = example_results(stages=("source", "train", "prune"), more_wrong=-100)
    assert same.difference.only_reference_correct == 0
    changed = summarize(same).changed
    assert changed.counted.startswith("0 validation samples of 360 are")
    assert (changed.shown, changed.pictures) == ("", ())


def test_samples_without_pictures_are_still_told():
    bare = tuple(sample.model_copy(update={"image": None}) for sample in CASES["worse"].changed)
    run = CASES["until-prune"].model_copy(update={"changed": bare})
    page = render_html(summarize(run), run)
    assert "<img" not in page
    assert f"Sample {bare[0].index}" in page


# Layers


def test_groups_are_ranked_by_what_they_lose_and_say_what_was_removed():
    (found,) = summarize(example_results()).groups
    assert len(found.table.lines) == 10
    first = found.table.lines[0]
    assert first.label == "layer1.3.conv1"
    assert [cell.figure for cell in first.cells] == ["16", "−3.75", "−15.00", "−33.75", "0"]
    assert found.table.rest == "2 further groups lose less."
    assert [line.label for line in found.all.lines] == [f"layer1.{index}.conv1" for index in range(12)]
    assert found.all.lines[2].cells[-1].figure == "8"
    assert found.all.lines[2].cells[-1].part == 0.5


def test_runs_that_measured_no_groups_have_no_such_section():
    results = example_results(stages=("source", "train", "quantize"))
    assert summarize(results).groups == ()
    assert "What each group of channels costs" not in render_html(summarize(results), results)


def test_layers_are_ranked_and_the_rest_is_summed():
    layers = summarize(WHOLE).layers
    sizes = sorted((layer.size_bytes for layer in WHOLE.rows[-1].size.layers), reverse=True)
    assert len(layers.sizes.lines) == 10
    assert len(layers.all_sizes.lines) == len(sizes) == 21
    assert layers.sizes.rest.startswith("11 further layers: ")
    assert [line.cells[-1].part for line in layers.sizes.lines] == [size / 148_702 for size in sizes[:10]]
    assert "The graph around the weights: 8.92 KB of 149 KB." in layers.sizes.rest


def test_times_by_operator_and_what_fell_back_to_float():
    layers = summarize(WHOLE).layers
    assert [bar.label for bar in layers.bars] == ["train", "export"]
    assert list(layers.bars[1].milliseconds) == ["int8", "float", "convert"]
    _, operators = layers.operators[1]
    assert operators.lines[0].label == "QLinearConv"
    assert operators.lines[0].tags == ("int8",)
    nodes = WHOLE.rows[-1].profile.nodes
    total = sum(node.milliseconds for node in nodes)
    share = sum(node.milliseconds for node in nodes if node.operator == "QLinearConv") / total
    assert operators.lines[0].cells[2].part == pytest.approx(share)
    assert [line.label for line in layers.fallback.lines] == ["pool"]
    assert layers.said[1].startswith("These fell back to float: 1 node, ")
    assert layers.said[2].startswith("Quantizing, dequantizing and reordering costs: 2 nodes, ")
    assert "export: int8 " in drawings(page_of("whole"))["kinds"]
    assert summarize(CASES["until-prune"]).layers.fallback is None  # fp32 falls back to nothing


def test_nothing_profiled_leaves_the_sizes():
    layers = summarize(CASES["no-latency"]).layers
    assert (layers.bars, layers.operators, layers.said) == ((), (), ())
    assert layers.sizes is not None
    assert "kinds" not in drawings(page_of("no-latency"))


# What the terminal says below its table


def told_by_terminal(run, capsys):
    make_console().print(results_table(run))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (
            WHOLE,
            [
                "23.0× smaller",
                "7.3× faster (7.11× to 7.40×) at batch 1 with 1 thread",
                "7.3× faster (7.11× to 7.40×) at batch 1 with 2 threads",
            ],
        ),
        (
            example_results(size_factor=46.0, time_factor=14.5, loads=((1, 1),)),
            ["2.0× larger", "2.0× slower (1.96× to 2.04×) at batch 1 with 1 thread"],
        ),
        (CASES["no-latency"], ["23.0× smaller"]),
        (
            example_results(time_factor=7.2, loads=((1, 1),)),
            ["23.0× smaller", "no clear difference (0.99× to 1.03×) at batch 1 with 1 thread"],
        ),
    ],
    ids=["better", "worse", "not timed", "unclear"],
)
def test_the_terminal_compares_with_the_reference(capsys, run, told):
    line = next(line for line in told_by_terminal(run, capsys) if line.startswith("against 'train': "))
    *parts, points = line.removeprefix("against 'train': ").split(", ")
    assert parts == told
    assert points.endswith(" points on test")


def test_the_terminal_calls_nothing_faster_that_equal_things_are_too(capsys):
    run = example_results(time_factor=7.0, loads=((1, 1),))
    told = "1.04× faster (1.02× to 1.06×) at batch 1 with 1 thread"
    assert any(told in line for line in told_by_terminal(run, capsys))
    noisy = run.model_copy(update={"repeats": (example_repeat(is_noisy=True),)})
    told = "no clear difference (1.02× to 1.06×) at batch 1 with 1 thread"
    assert any(told in line for line in told_by_terminal(noisy, capsys))


def test_the_terminal_tells_the_reference_against_itself(capsys):
    lines = told_by_terminal(WHOLE, capsys)
    assert lines[-1] == (
        "'train' against itself: 1.005× (0.993× to 1.017×) at batch 1 with 1 thread; "
        "1.005× (0.993× to 1.017×) at batch 1 with 2 threads"
    )
    noisy = told_by_terminal(CASES["noisy"], capsys)
    assert ", too noisy" in noisy[-2]
    assert noisy[-1].startswith("caution: ")
    assert not any("itself" in line for line in told_by_terminal(CASES["no-latency"], capsys))
