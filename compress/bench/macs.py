"""Multiply-accumulates of ONNX nodes: of convolutions, matrix products, attention and recurrent layers.

With |X| for the number of elements of X:

    Conv            |Y| · |W| / W₀            each result sums over one filter W[m] (m < W₀)
    ConvTranspose   |X| · |W| / W₀            each input is spread over one filter W[c]
    Gemm, MatMul    |Y| · k                   k: the size that is summed over
    Einsum          |Y| · ∏ sizes of the letters that the result lacks; of two operands
    RNN, GRU, LSTM  steps · batch · (|W| + |R|)
    Attention       (|Q| + |Y|) · keys        Q·Kᵀ and its product with V; com.microsoft's own projection beside it

and the same for the quantized and the fused kinds of each. Biases, normalisation and element-wise operators are not
counted, as in `compress.models.cost.macs`, which counts the same way in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from compress.bench.graph import Node, Shape

ShapeOf = Callable[[str], Shape | None]


class _UnknownError(Exception):
    """A shape that is needed is not known."""


class _Run:
    """A node and the shapes of what it reads and writes, by slot."""

    def __init__(self, node: Node, shape_of: ShapeOf) -> None:
        self.node, self._shape_of = node, shape_of

    def input(self, slot: int) -> Shape:
        return self._known(self.node.inputs[slot] if self.node.has(slot) else "")

    def output(self) -> Shape:
        return self._known(self.node.outputs[0])

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def _known(self, value: str) -> Shape:
        shape = self._shape_of(value) if value else None
        if shape is None:
            raise _UnknownError
        return shape


Count = Callable[[_Run], int]


def _convolution(slot: int) -> Count:
    return lambda run: math.prod(run.output()) * math.prod(run.input(slot)[1:])


def _transposed(run: _Run) -> int:
    return math.prod(run.input(0)) * math.prod(run.input(1)[1:])


def _gemm(run: _Run) -> int:
    return math.prod(run.output()) * run.input(0)[0 if run.attribute("transA", 0) else 1]


def _matmul(run: _Run) -> int:
    return math.prod(run.output()) * run.input(0)[-2 if run.attribute("transA", 0) else -1]


def _packed_matmul(run: _Run) -> int:
    return math.prod(run.output()) * int(run.node.attributes["K"])


def _einsum(run: _Run) -> int:
    if len(run.node.inputs) != 2:
        return 0 if len(run.node.inputs) < 2 else _unknown()
    equation = run.node.attributes["equation"].decode().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow:  # then the letters that stand once are the result's
        result = "".join(letter for letter in terms if terms.count(letter) == 1)
    sizes: dict[str, int] = {}
    for slot, term in enumerate(terms.split(",")):
        shape, (before, dots, after) = run.input(slot), term.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        if dots and after:
            sizes |= dict(zip(after, shape[-len(after) :], strict=True))
    return math.prod(run.output()) * math.prod(size for letter, size in sizes.items() if letter not in result)


def _recurrent(run: _Run) -> int:
    steps, batch = run.input(0)[:2]  # the two change places with layout 1
    return steps * batch * (math.prod(run.input(1)) + math.prod(run.input(2)))


def _attention(run: _Run) -> int:
    if run.node.domain == "com.microsoft":
        return _projecting_attention(run)
    past = run.input(4)[-2] if run.node.has(4) else 0
    keys = run.input(1)[-2] + past
    return (math.prod(run.input(0)) + math.prod(run.output())) * keys


def _projecting_attention(run: _Run) -> int:
    """Input (batch, tokens, features) and one matrix (features, of queries, keys and values side by side)."""
    if run.node.has(8 if run.node.operator == "QAttention" else 4):
        return _unknown()
    (batch, tokens, features), columns = run.input(0), run.input(1)[1]
    sizes: Sequence[int] = run.attribute("qkv_hidden_sizes", [columns // 3] * 3)
    return batch * tokens * (features * sum(sizes) + tokens * (sizes[1] + sizes[2]))


def _multi_head_attention(run: _Run) -> int:
    query, key, value = (run.input(slot) for slot in range(3))
    if not len(query) == len(key) == len(value) == 3 or run.node.has(6):
        return _unknown()
    return math.prod(query[:2]) * (query[2] + value[2]) * key[1]


def _unknown() -> int:
    raise _UnknownError


_COUNTS: dict[str, Count] = {
    "Attention": _attention,
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "ConvTranspose": _transposed,
    "DeformConv": _convolution(1),
    "DynamicQuantizeLSTM": _recurrent,
    "DynamicQuantizeMatMul": _matmul,
    "Einsum": _einsum,
    "FusedConv": _convolution(1),
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "MatMulNBits": _packed_matmul,
    "MultiHeadAttention": _multi_head_attention,
    "NhwcConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "QAttention": _projecting_attention,
    "QGemm": _gemm,
    "QLinearConv": _convolution(3),
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
}

PRODUCTS = frozenset(_COUNTS)
"""Operators that compute products."""


def macs(node: Node, shape_of: ShapeOf) -> int | None:
    """Multiply-accumulates of one run of a node; None where it computes no products or a shape is not known."""
    count = _COUNTS.get(node.known)
    if count is None:
        return None
    try:
        return count(_Run(node, shape_of))
    except (_UnknownError, IndexError, KeyError, ValueError):
        return None  # a file may leave out what the operator needs
