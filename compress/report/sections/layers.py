"""Where the bytes lie, where the time goes and what int8 costs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from compress.measured import Int8Effect, Layer, LayerSensitivity, Profile, Sensitivity
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
    """Sizes, times and sensitivities within the models."""

    sizes: Table | None
    """The largest layers of the last row; None where no layer holds anything."""
    all_sizes: Table | None
    """All of them, where `sizes` does not have room."""
    sensitivities: Table | None
    """The layers that lose most in int8; None where that was not measured."""
    all_sensitivities: Table | None
    """All of them, where `sensitivities` does not have room."""
    advice: str
    """What to do about the first of them; empty where there is none."""
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
        return self.sizes is None and self.sensitivities is None and not self.bars


def layers(results: Results) -> Layers:
    """The layers of the last row, and the nodes of the reference and of the last row."""
    last, label = results.rows[-1], figures.labels(results)[-1]
    profiled = _profiled(results)
    of_last = last.profile if last.profile is not None and last.profile.nodes else None
    is_quantized = of_last is not None and last.precision == "int8"
    return Layers(
        sizes=_sizes(last, label, TOP),
        all_sizes=_sizes(last, label, MOST) if len(last.size.layers) > TOP else None,
        sensitivities=_sensitivities(last, label, TOP),
        all_sensitivities=_sensitivities(last, label, MOST) if _quantized_layers(last) > TOP else None,
        advice=_advice(last),
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
    times = _times(row)
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


def _times(row: Row) -> dict[str, float]:
    """Milliseconds by name of the node."""
    times: dict[str, float] = {}
    for node in row.profile.nodes if row.profile is not None else ():
        times[node.name] = times.get(node.name, 0.0) + node.milliseconds
    return times


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


def _quantized_layers(row: Row) -> int:
    return 0 if row.sensitivity is None else len(row.sensitivity.layers)


def _ranked(found: Sensitivity) -> list[LayerSensitivity]:
    """The layers that lose most first: by the change of the logits, which tells layers apart that change no answer."""
    return sorted(found.layers, key=lambda layer: (-layer.error_percent, -layer.changed))


def _sensitivities(row: Row, label: str, most: int) -> Table | None:
    found = row.sensitivity
    if found is None or not found.layers:
        return None
    ranked, times = _ranked(found), _times(row)
    sizes = {layer.name: layer.size_bytes for layer in row.size.layers}
    is_timed = 2 * sum(layer.name in times for layer in ranked) > len(ranked)
    squares = sum(layer.error_percent**2 for layer in ranked)
    lines = []
    for layer in ranked[:most]:
        time = times.get(layer.name)
        timed = (Cell(text.MISSING if time is None else text.profiled(time)),) if is_timed else ()
        size = Cell(text.size(sizes[layer.name]) if layer.name in sizes else text.MISSING)
        square = layer.error_percent**2
        lines.append(
            Line(
                text.plain(layer.name) or text.MISSING,
                (
                    Cell(text.plain(layer.operator)),
                    *timed,
                    size,
                    Cell(f"{layer.changed:,}"),
                    _accuracy(layer),
                    Cell(_error(layer)),
                    Cell(text.share(square, squares), part=square / squares if squares > 0 else None),
                ),
            )
        )
    rest = f"{text.plural(len(ranked) - most, 'further layer')} lose less. " if len(ranked) > most else ""
    if found.together is not None:
        rest += (
            f"The whole file: {text.plural(found.together.changed, 'answer')} changed, error {_error(found.together)}."
        )
    caption = (
        f"Layers of {label} that lose most in int8: each alone in int8, all others in float, against the float graph on "
        f"{text.plural(found.n, 'sample')} of {found.split}."
    )
    columns = (
        "Layer",
        "Operator",
        *(("Time, profiled",) if is_timed else ()),
        "Size",
        "Answers changed",
        "Right answers",
        "Relative error",
        "Share",
    )
    return Table(caption, columns, tuple(lines), words=("Operator",), rest=rest.strip())


def _error(effect: Int8Effect) -> str:
    return f"{text.rough(effect.error_percent)} %" if effect.error_percent else "0 %"


def _accuracy(effect: Int8Effect) -> Cell:
    """Right answers gained or lost."""
    lost, won = effect.only_float_correct, effect.only_int8_correct
    details = (f"{lost:,} lost, {won:,} gained",) if lost and won else ()
    return Cell(text.signed(won - lost, 0), details)


def _advice(row: Row) -> str:
    """How to keep layers in float, with the name of the first one."""
    if row.sensitivity is None or not row.sensitivity.layers:
        return ""
    first = _ranked(row.sensitivity)[0]
    if first.error_percent == 0:
        return "No layer changes anything in int8."
    name = text.plain(first.name).replace("'", "''")
    return (
        f"To keep a layer in float, name it in the stage quantize: keep_float: ['{name}']. It then takes the bytes and the "
        "time of a float layer. Between two layers in int8, ONNX Runtime quantizes the weights of a Conv or Gemm itself when "
        "it loads the file: there, name the layer behind it too. What it helped shows when the whole file is measured again."
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
