"""The terminal's tables of `compress bench`: what is clear, what is not known, and digits."""

from __future__ import annotations

import pytest
from report_examples import example_latency, example_machine, example_repeat, example_results

from compress.measured import Ratio
from compress.results import BenchResults, Target
from compress.terminal.bench import bench_tables
from compress.terminal.console import make_console


def bench(ratio=None, repeat=None, **size):
    """Two models of which the second has a ratio; `size` changes what is known of its file."""
    first, second = example_results(stages=("train", "export"), loads=((1, 1),)).rows
    timed = [example_latency(2.0), example_latency(1.9)]
    if ratio is not None:
        timed[1] = timed[1].model_copy(update={"ratio": Ratio(against="a", **ratio)})
    targets = [
        Target(
            name=name,
            file=f"{name}.onnx",
            sha256="a" * 64,
            precision=row.precision,
            size=row.size.model_copy(update=size if row is second else {}),
            accuracy=row.accuracy,
            quality=row.quality,
            comparison=row.comparison,
            latency=(latency,),
        )
        for name, row, latency in zip("ab", (first, second), timed, strict=True)
    ]
    return BenchResults(
        created="2026-07-01T12:00:00Z",
        command="compress bench",
        git_revision=None,
        machine=example_machine(),
        rounds=10,
        seconds=0.05,
        targets=targets,
        repeats=() if repeat is None else (example_repeat("a").model_copy(update=repeat),),
    )


def shown(results):
    console = make_console()
    with console.capture() as capture:
        console.print(bench_tables(results))
    return capture.get()


STRAYED = {"ratio": Ratio(against="a", value=1.022, low=1.012, high=1.023)}


@pytest.mark.parametrize(
    ("ratio", "repeat", "cell"),
    [
        ({"value": 1.022, "low": 1.012, "high": 1.023}, STRAYED, "~1.02 [1.01, 1.02]"),
        ({"value": 1.022, "low": 1.012, "high": 1.023}, {**STRAYED, "backend": "torch"}, " 1.02 [1.01, 1.02]"),
        ({"value": 1.022, "low": 1.012, "high": 1.023}, {**STRAYED, "threads": 2}, " 1.02 [1.01, 1.02]"),
        ({"value": 1.022, "low": 1.012, "high": 1.023}, None, " 1.02 [1.01, 1.02]"),
        ({"value": 1.03, "low": 1.025, "high": 1.04}, STRAYED, " 1.03 [1.02, 1.04]"),
        ({"value": 1.1, "low": 0.9, "high": 1.3}, None, "~1.10 [0.90, 1.30]"),
        ({"value": 0.0101, "low": 0.01, "high": 0.0103}, STRAYED, " 0.0101 [0.0100, 0.0103]"),
    ],
)
def test_what_is_not_clear_is_marked(ratio, repeat, cell):
    told = shown(bench(ratio, repeat))
    assert cell in told
    assert told.count("~ no clear difference: ") == 1


def test_what_is_not_known_is_a_dash():
    results = bench(macs=None, activation_peak_bytes=None)
    last = results.targets[1]
    unknown = last.quality.validation.model_copy(update={"samples_per_second": None})
    quality = last.quality.model_copy(update={"validation": unknown})
    changed = last.model_copy(update={"quality": quality, "precision": "fp16"})
    results = results.model_copy(update={"targets": (results.targets[0], changed)})
    lines = [line.split() for line in shown(results).splitlines() if line.split()[:1] == ["b"]]
    times, size, accuracy = lines
    assert times[8] == "—"  # no ratio
    assert (size[1], size[-2:]) == ("fp16", ["—", "—"])
    assert accuracy[-1] == "—"
    assert "None" not in shown(results)


def test_digits_of_what_was_measured_once_and_of_small_ratios():
    results = bench(size_bytes=400_000_000)
    lines = [line.split() for line in shown(results).splitlines() if line.split()[:1] == ["b"]]
    assert lines[0][-2] == "50"  # 12 + 20 x 1.9 ms of a cold start
    assert lines[1][3] == "0.00856"
    assert "cold: loading and the first answer, once" in shown(results)
    assert "not zero and MACs are of the file" in shown(results)
