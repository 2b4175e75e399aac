"""What layers take whole and split, asked once: equal layers share an answer, and a killed stage reads its own again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from compress.factorization.calls import Call
from compress.factorization.faster import Times
from compress.factorization.forms import Form
from compress.files import readable_json, write_file
from compress.surgery import factor_pair

_FILE = "layer_times.json"

Timer = Callable[[Mapping[str, tuple[nn.Module, tuple[int, ...]]]], Mapping[str, float]]
"""Milliseconds, 0 or more, of each of these modules on an input of that shape, the batch first; by name."""


@dataclass
class Clock:
    """Asks a timer what it does not know yet, and writes down what it knows."""

    model: nn.Module
    """With whole layers."""
    calls: Mapping[str, Call]
    biased: frozenset[str]
    """Layers whose last part gets a bias that the layer has not."""
    timer: Timer
    scratch: Path
    """Folder for what a killed stage needs to go on: another answer might be another choice, which its training would not fit."""
    known: dict[tuple[str, str], Times] = field(default_factory=dict)
    """By what the layer is and what it is split into."""

    def __post_init__(self) -> None:
        if (path := self.scratch / _FILE).is_file():
            self.known |= {(whole, split): Times(*found) for whole, split, *found in json.loads(path.read_bytes())}

    def times(self, forms: Mapping[str, Form]) -> dict[str, Times]:
        """Of each of these layers, whole and in that form."""
        asked: dict[str, tuple[str, str]] = {}
        wanted: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
        for name, form in forms.items():
            shape, pair = self.calls[name].shape, (self.model.get_submodule(name), self._split(name, form))
            whole, split = (f"{' '.join(repr(module).split())} on {shape}" for module in pair)
            asked[name] = whole, split
            if (whole, split) not in self.known:  # both anew, because the machine drifts
                wanted |= {whole: (pair[0], shape), split: (pair[1], shape)}
        if wanted:
            found = self.timer(wanted)
            self.known |= {
                pair: Times(*(found[each] for each in pair)) for pair in asked.values() if pair not in self.known
            }
            self._write()
        return {name: self.known[pair] for name, pair in asked.items()}

    def _split(self, name: str, form: Form) -> nn.Module:
        layer = self.model.get_submodule(name)
        parts = factor_pair(layer, form.rank, split=form.split, rank_in=form.rank_in, bias=name in self.biased)
        assert parts is not None, "forms are those that the layer can have"
        return parts

    def _write(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        rows = [[*pair, found.whole_ms, found.split_ms] for pair, found in self.known.items()]
        write_file(self.scratch / _FILE, readable_json(rows))
