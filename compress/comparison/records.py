"""What `compress compare` finds, and writes as JSON: the last rows of runs against a baseline, and all rows as points.

The first run's last row is the baseline. A run alone is compared with its own reference. Plain data, no torch.
"""

from __future__ import annotations

from typing import Final, Literal

from compress.measured import Record, SplitAccuracy

VERSION: Final = 1


class Setting(Record):
    """How latency was measured: rows are compared within one setting only."""

    device: str
    backend: str
    provider: str
    batch_size: int
    threads: int


class Difference(Record):
    """Accuracy minus the baseline's, points, with its 95 % interval."""

    points: float
    low: float
    high: float
    is_paired: bool
    """Whether the answers to the same samples were compared one by one, which makes the interval narrower."""


class Time(Record):
    """Latency of a run's last row in one setting, milliseconds, and how many times faster than the baseline it is."""

    setting: Setting
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float | None
    """None for the baseline itself."""
    speedup_low: float | None
    speedup_high: float | None


class RunFigures(Record):
    """The last row of a run."""

    name: str
    """Different from the names of the other runs."""
    stage: str
    precision: str
    created: str
    git_revision: str | None
    cpu: str
    is_same_machine: bool
    """Whether its machine, libraries included, is the first run's: other times are not compared."""
    accuracy: SplitAccuracy
    validation: Difference | None
    """Against the baseline; None for the baseline itself."""
    test: Difference | None
    why_unpaired: str | None
    """Why the answers were not compared one by one; None where they were, and for the baseline itself."""
    size_bytes: int
    gzip_bytes: int
    size_ratio: float | None
    """Times smaller than the baseline; None for the baseline itself."""
    parameters: int
    macs: int
    times: tuple[Time, ...]
    """In the settings that all runs on the machine have in common, the main one first; none where it is another machine."""
    is_budget_met: bool | None
    """None where the run has no budget."""


class ModelFigures(Record):
    """One row of one run, for the Pareto fronts."""

    run: str
    stage: str
    precision: str
    is_baseline: bool
    accuracy: SplitAccuracy
    size_bytes: int
    time: Time | None
    """In the main setting; None where it was not measured there, or on another machine. Without a speed-up."""
    is_on_size_front: bool
    """Whether no other row is as small or smaller and as accurate or more so, on validation."""
    is_on_latency_front: bool
    """The same with latency; False where it was not measured."""


class Compared(Record):
    """What `compress compare` finds; the content of its JSON file."""

    kind: Literal["compare"] = "compare"
    version: Literal[1] = VERSION
    created: str
    """UTC, ISO 8601."""
    baseline: str
    """Run and stage of the row that the others are compared with."""
    cpu: str
    """Of the first run's machine."""
    setting: Setting | None
    """The main one: smallest batch, then most threads, of those in common; None where there is none."""
    runs: tuple[RunFigures, ...]
    models: tuple[ModelFigures, ...]
