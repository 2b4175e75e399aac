"""What layers take whole and split, asked once: equal layers share an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from compress.factorization.calls import Call
from compress.factorization.forms import Form
from compress.methods.times import Timer, Times
from compress.surgery import factor_pair


@dataclass
class Clock:
    """Asks a timer what it does not know yet."""

    model: nn.Module
    """With whole layers."""
    calls: Mapping[str, Call]
    biased: frozenset[str]
    """Layers whose last part gets a bias that the layer has not."""
    timer: Timer
    known: dict[tuple[str, str], Times] = field(default_factory=dict)
    """By what the layer is and what it is split into."""

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
                pair: Times.of(*(found[each] for each in pair)) for pair in asked.values() if pair not in self.known
            }
        return {name: self.known[pair] for name, pair in asked.items()}

    def _split(self, name: str, form: Form) -> nn.Module:
        layer = self.model.get_submodule(name)
        parts = factor_pair(layer, form.rank, split=form.split, rank_in=form.rank_in, bias=name in self.biased)
        assert parts is not None, "forms are those that the layer can have"
        return parts
