"""What a run and `compress bench` agree on when they take times."""

from __future__ import annotations

from compress.config.pipeline import LatencyConfig
from compress.machine import cores
from compress.measured import by_threads


def main_setting(config: LatencyConfig) -> tuple[int, int]:
    """Batch size and threads at which nodes are timed: the setting of the report's headline."""
    return min(config.batch_sizes), min(config.threads, key=lambda threads: by_threads(threads, cores()))


def crowding(config: LatencyConfig) -> str | None:
    """What results must say where more threads were asked for than there are cores; None where there are enough."""
    threads, available = max(config.threads), cores()
    if threads <= available:
        return None
    return f"latency was measured with {threads} threads on {available} core(s), where the threads wait for each other"
