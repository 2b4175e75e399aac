"""What the trainings of `distillation.py` say together: a table, and a line for each method card."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillation_methods import ALONE, METHODS, PLAIN
from scipy.stats import t as student_t

from compress.files import write_file
from compress.methods.statistics import CONFIDENCE

NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval by Student's t; ends are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From at least one value."""
        mean, n = statistics.fmean(values), len(values)
        if n == 1:
            return cls(mean, None, None, n)
        half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / n**0.5
        return cls(mean, mean - half, mean + half, n)

    def told(self, *, signed: bool = False) -> str:
        """Such as '91.20 [90.85, 91.55]'."""
        form = "{:+.2f}" if signed else "{:.2f}"
        if self.low is None or self.high is None:
            return form.format(self.mean)
        return f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"


def by_seed(records: Sequence[Mapping[str, Any]], method: str, name: str) -> dict[int, float]:
    """What the finished trainings of a method say, by seed."""
    return {one["seed"]: one[name] for one in records if one["method"] == method and "failed" not in one}


def difference(records: Sequence[Mapping[str, Any]], method: str, base: str) -> Estimate | None:
    """Points of test accuracy above `base`, seed by seed; None where they have no seed in common."""
    mine, theirs = by_seed(records, method, "test_percent"), by_seed(records, base, "test_percent")
    common = sorted(mine.keys() & theirs.keys())
    return Estimate.of([mine[seed] - theirs[seed] for seed in common]) if common and method != base else None


def markdown(found: Mapping[str, Any]) -> str:
    """The table for benchmarks/README.md, with budget and machine above it, and below it what failed."""
    records = found["records"]
    heads = [
        "method",
        "",
        "test %",
        f"points over `{ALONE}`",
        f"points over `{PLAIN}`",
        "validation %",
        "seeds",
        "s an epoch",
    ]
    lines = [*_budget_lines(found), "", f"| {' | '.join(heads)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for method, known in METHODS.items():
        tests = by_seed(records, method, "test_percent")
        if not tests:
            continue
        over = [difference(records, method, base) for base in (ALONE, PLAIN)]
        validation = Estimate.of(list(by_seed(records, method, "validation_percent").values())).mean
        waited = any(by_seed(records, method, "views_computed").values())
        seconds = statistics.median(by_seed(records, method, "epoch_seconds").values())
        cells = [f"`{method}`", known.what, Estimate.of(list(tests.values())).told()]
        cells += ["–" if one is None else one.told(signed=True) for one in over]
        cells += [f"{validation:.2f}", str(len(tests)), f"{seconds:.1f}{' †' if waited else ''}"]
        lines.append(f"| {' | '.join(cells)} |")
    if any("failed" not in one and one["views_computed"] for one in records):
        lines += ["", "† a teacher of its own answered while it trained."]
    failed = [f"- `{one['method']}`, seed {one['seed']}: {one['failed']}" for one in records if "failed" in one]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return "\n".join(lines)


def _budget_lines(found: Mapping[str, Any]) -> Iterator[str]:
    budget = found["budget"]
    done = [one for one in found["records"] if "failed" not in one]
    samples = f"{done[0]['train_samples']:,} training and {done[0]['test_samples']:,} test images" if done else "–"
    yield (
        f"ResNet-20 from scratch, {budget['epochs']} epochs on {samples}, batch {budget['batch_size']}, one cycle to "
        f"{budget['learning_rate']:g}, {budget['precision']}; teacher ResNet-56; mean over seeds of the epoch best on "
        f"{budget['validation']:,} validation images. Brackets: 95 % intervals by Student's t over seeds, of differences seed by "
        f"seed. {budget['device']}, threads: {budget['threads']}, torch {found['machine']['versions'].get('torch', '?')}."
    )
    if budget["views"] < budget["epochs"]:
        yield (
            f"Methods that keep the teacher's answers see {budget['views']} augmented versions of each image, all others "
            f"{budget['epochs']}."
        )
    if found["seconds_per_view"] is not None:
        yield (
            f"The teacher's answers were computed once, {found['seconds_per_view']:.1f} s for each of {budget['views']} views; "
            "that is not in the seconds."
        )
    if len({one["code"] for one in done}) > 1:
        yield "The trainings were made by several versions of the code."


_MARKS = re.compile(r"<!-- measured: ([a-z0-9_ ]+) -->\n.*?<!-- end -->", re.DOTALL)


def with_results(card: str, found: Mapping[str, Any] | None) -> str:
    """A method card with what was measured between its marks `<!-- measured: METHOD … -->` and `<!-- end -->`."""

    def told(mark: re.Match[str]) -> str:
        lines = [line for method in mark[1].split() for line in _card_line(method, found)]
        text = "\n".join(lines) or NOT_MEASURED
        return f"<!-- measured: {mark[1]} -->\n{text}\n<!-- end -->"

    return _MARKS.sub(told, card)


def _card_line(method: str, found: Mapping[str, Any] | None) -> Iterator[str]:
    records = found["records"] if found else []
    tests = by_seed(records, method, "test_percent")
    if not tests:
        return
    over = [(base, difference(records, method, base)) for base in (ALONE, PLAIN)]
    against = "".join(
        f", {one.told(signed=True)} points over {'labels only' if base == ALONE else 'soft labels'}"
        for base, one in over
        if one is not None
    )
    seeds = f"{len(tests)} seed{'s' if len(tests) > 1 else ''}"
    yield f"- {METHODS[method].what}: {Estimate.of(list(tests.values())).told()} % of test ({seeds}){against}"


def known_results(path: Path) -> dict[str, Any] | None:
    """What is in the file of results; None where there is none."""
    return json.loads(path.read_bytes()) if path.is_file() else None


def write_cards(folder: Path, found: Mapping[str, Any] | None) -> None:
    """Put the results into all method cards of a folder."""
    for path in sorted(folder.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_results(before, found)
        if after != before:
            write_file(path, after.encode())
