"""Where the bytes lie and where the time goes, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from compress.measured import Layer, Profile
from compress.operators import by_kind, by_operator
from compress.report import figures, text
from compress.report.charts.kinds import Bar
from compress.report.sections.parts import Cell, Line, Table
from compress.results import Results, Row

TOP = 10
"""Layers, operators and nodes that are named before the rest is summed."""
MOST = 1000
"""Lines of a table of everything; what a page can hold."""


@dataclass(frozen=True)
class Layers:
    """Sizes and times within the models."""

    sizes: Table | None
    """The largest layers of the last row; None where no layer holds anything."""
    all_sizes: Table | None
    """All of them, where `sizes` does not have room."""
    bars: tuple[Bar, ...]
    """Time by kind, of the reference and the last row where they were profiled."""
    operators: tuple[tuple[str, Table], ...]
    """Model, and its operators by time."""
    fallback: Table | None
    """Nodes of a quantized model that compute in float, slowest first."""
    said: tuple[str, ...]
    """What the times mean, in sentences."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return self.sizes is None and not self.bars


def layers(results: Results) -> Layers:
    """The layers of the last row, and the nodes of the reference and of the last row."""
    last, label = results.rows[-1], figures.labels(results)[-1]
    profiled = _profiled(results)
    of_last = last.profile if last.profile is not None and last.profile.nodes else None
    is_quantized = of_last is not None and last.precision == "int8"
    return Layers(
        sizes=_sizes(last, label, TOP),
        all_sizes=_sizes(last, label, MOST) if len(last.size.layers) > TOP else None,
        bars=tuple(Bar(name, _kinds(profile)) for name, profile in profiled),
        operators=tuple((name, _operators(name, profile)) for name, profile in profiled),
        fallback=_fallback(of_last) if of_last is not None and is_quantized else None,
        said=_said(of_last, label) if of_last is not None and is_quantized else (),
    )


def _profiled(results: Results) -> list[tuple[str, Profile]]:
    """The reference and the last row, once where they are the same, as far as they were profiled."""
    labels, at = figures.labels(results), figures.reference_index(results)
    indices = sorted({at, len(labels) - 1})
    found = ((labels[index], results.rows[index].profile) for index in indices)
    return [(label, profile) for label, profile in found if profile is not None and profile.nodes]


def _sizes(row: Row, label: str, most: int) -> Table | None:
    ranked = sorted(row.size.layers, key=lambda layer: -layer.size_bytes)
    if not ranked:
        return None
    times: dict[str, float] = {}
    for node in row.profile.nodes if row.profile is not None else ():
        times[node.name] = times.get(node.name, 0.0) + node.milliseconds
    is_timed = 2 * sum(layer.name in times for layer in ranked) > len(ranked)  # names survive the optimiser, mostly
    lines = tuple(
        _layer(layer, row.size.size_bytes, times.get(layer.name), is_timed=is_timed) for layer in ranked[:most]
    )
    rest = ranked[most:]
    left = sum(layer.size_bytes for layer in rest)
    graph = row.size.size_bytes - row.size.weight_bytes
    said = f"{text.plural(len(rest), 'further layer')}: {text.size(left)}. " if rest else ""
    said += f"The graph around the weights: {text.size(max(0, graph))} of {text.size(row.size.size_bytes)}."
    columns = (
        "Layer",
        "Operator",
        "Output",
        "Parameters",
        "MACs",
        *(("Time, profiled",) if is_timed else ()),
        "Size",
        "Share",
    )
    return Table(f"Layers of {label}, the largest first.", columns, lines, words=("Operator", "Output"), rest=said)


def _layer(layer: Layer, whole: int, milliseconds: float | None, *, is_timed: bool) -> Line:
    shape = text.MISSING if layer.output is None else " × ".join(map(str, layer.output[1:]))
    time = Cell(text.MISSING if milliseconds is None else text.profiled(milliseconds))
    return Line(
        text.plain(layer.name) or text.MISSING,
        (
            Cell(text.plain(layer.operator)),
            Cell(shape),
            Cell(text.count(layer.parameters)),
            Cell(text.count(layer.macs)),
            *((time,) if is_timed else ()),
            Cell(text.size(layer.size_bytes)),
            Cell(text.share(layer.size_bytes, whole), part=layer.size_bytes / max(1, whole)),
        ),
    )


def _total(profile: Profile) -> float:
    return sum(node.milliseconds for node in profile.nodes)


def _kinds(profile: Profile) -> dict[str, float]:
    """Milliseconds by kind, those that occur."""
    return {share.kind: share.milliseconds for share in by_kind(profile) if share.count}


def _operators(label: str, profile: Profile) -> Table:
    ranked, total = by_operator(profile), _total(profile)
    lines = [
        Line(
            text.plain(share.operator),
            (
                Cell(f"{share.count:,}"),
                Cell(text.profiled(share.milliseconds)),
                Cell(text.share(share.share, 1), part=share.share),
            ),
            tags=(share.kind,),
        )
        for share in ranked[:TOP]
    ]
    rest = ranked[TOP:]
    said = ""
    if rest:
        left = sum(share.milliseconds for share in rest)
        said = f"{text.plural(len(rest), 'further operator')}: {text.profiled(left)}, {text.share(left, total)}."
    caption = (
        f"{label}: {text.plural(len(profile.nodes), 'node')}, {text.profiled(total)} in sum, "
        f"{figures.load_words(profile.batch_size, profile.threads)}."
    )
    return Table(caption, ("Operator", "Nodes", "Time", "Share"), tuple(lines), rest=said)


def _fallback(profile: Profile) -> Table | None:
    slow = sorted((node for node in profile.nodes if node.kind == "float"), key=lambda node: -node.milliseconds)
    if not slow:
        return None
    total = _total(profile)
    lines = tuple(
        Line(
            text.plain(node.name) or text.MISSING,
            (
                Cell(text.plain(node.operator)),
                Cell(text.profiled(node.milliseconds)),
                Cell(text.share(node.milliseconds, total), part=node.milliseconds / total if total > 0 else None),
            ),
        )
        for node in slow[:TOP]
    )
    rest = slow[TOP:]
    left = sum(node.milliseconds for node in rest)
    said = f"{text.plural(len(rest), 'further node')}: {text.profiled(left)}." if rest else ""
    columns = ("Node", "Operator", "Time", "Share")
    return Table("Nodes that fell back to float, the slowest first.", columns, lines, words=("Operator",), rest=said)


def _said(profile: Profile, label: str) -> tuple[str, ...]:
    starts = {
        "int8": f"Of the nodes of {label}, these compute in int8",
        "float": "These fell back to float",
        "convert": "Quantizing, dequantizing and reordering costs",
    }
    return tuple(
        f"{starts[share.kind]}: {text.plural(share.count, 'node')}, {text.profiled(share.milliseconds)}, "
        f"{text.share(share.share, 1)} of the time."
        for share in by_kind(profile)
    )
