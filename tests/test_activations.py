"""Memory of activations against counts by hand: channels of 10 elements, 40 bytes each in float."""

import numpy as np
from graphs import node, tensor, write

from compress.bench.size import measure_size


def peak(tmp_path, nodes, constants=(), inputs=(("x", (1, 1, 2, 5)),), outputs=("y",)):
    ends = [(name, None) for name in outputs]
    return measure_size(write(tmp_path / "a.onnx", nodes, list(inputs), ends, constants)).activation_peak_bytes


def filters(name, after, before):
    return tensor(name, (after, before, 1, 1))


def test_the_peak_of_a_chain_is_its_widest_step(tmp_path):
    nodes = [node("Conv", "xa", "p"), node("Conv", "pb", "q"), node("Conv", "qc")]
    constants = [filters("a", 3, 1), filters("b", 4, 3), filters("c", 2, 4)]
    assert peak(tmp_path, nodes, constants) == 40 * (3 + 4)
    assert peak(tmp_path, nodes[:1], constants[:1], outputs="p") == 40 * (1 + 3)


def test_a_shortcut_is_kept_while_the_block_runs(tmp_path):
    nodes = [
        node("Conv", "xa", "p"),
        node("Conv", "pb", "q"),
        node("Relu", "q", "r"),
        node("Conv", "rb", "s"),
        node("Add", "sp", "t"),
        node("Relu", "t", "u"),
        node("Conv", "uc"),
    ]
    constants = [filters("a", 3, 1), filters("b", 3, 3), filters("c", 1, 3)]
    assert peak(tmp_path, nodes, constants) == 40 * (3 + 3 + 3)


def test_elementwise_operators_write_where_nothing_is_read_any_more(tmp_path):
    chain = [node("Conv", "xa", "p"), node("Relu", "p", "q"), node("Add", "qq", "r"), node("Sigmoid", "r")]
    assert peak(tmp_path, chain, [filters("a", 3, 1)]) == 40 * (1 + 3)
    # What is read later, what the caller owns and what it asked for must stay.
    kept = [node("Conv", "xa", "p"), node("Relu", "p", "q"), node("Add", "pq")]
    assert peak(tmp_path, kept, [filters("a", 3, 1)]) == 40 * (3 + 3)
    assert peak(tmp_path, [node("Relu", "x")]) == 40 * 2
    assert peak(tmp_path, chain[:2], [filters("a", 3, 1)], outputs="pq") == 40 * (3 + 3)
    # A smaller input does not hold the result.
    wide = [node("Conv", "xa", "p"), node("Add", "xp")]
    assert peak(tmp_path, wide, [filters("a", 3, 1)]) == 40 * (1 + 3)


def test_views_take_no_memory_and_keep_what_they_show(tmp_path):
    shapes = [tensor("flat", (2,), np.int64, [1, 30])]
    nodes = [node("Conv", "xa", "p"), node("Reshape", ["p", "flat"], "q"), node("Identity", "q")]
    assert peak(tmp_path, nodes, [filters("a", 3, 1), *shapes]) == 40 * (1 + 3)
    nodes = [node("Conv", "xa", "p"), node("Flatten", "p", "q"), node("MaxPool", "p", "m", kernel_shape=[1, 1])]
    nodes += [node("Softmax", "m", "s"), node("Concat", ["q", "f"], axis=1)]
    nodes.insert(4, node("Flatten", "s", "f"))
    assert peak(tmp_path, nodes, [filters("a", 3, 1)]) == 40 * (3 + 3 + 6)


def quantized(number):
    """A pair around the value c{number}: quantized it is q{number}, dequantized d{number}."""
    return [node("QuantizeLinear", [f"c{number}", "s", "z"], [f"q{number}"]), dequantize(number)]


def dequantize(number):
    return node("DequantizeLinear", [f"q{number}", "s", "z"], [f"d{number}"])


SCALE = [tensor("s", ()), tensor("z", (), np.uint8, 0)]


def int8_filters(name, after, before):
    """Constants and node of a quantized weight."""
    made = [tensor(f"{name} int8", (after, before, 1, 1), np.int8), tensor(f"{name} scale", ())]
    return made, node("DequantizeLinear", [f"{name} int8", f"{name} scale"], [name])


def test_pairs_keep_bytes_and_what_falls_back_keeps_floats(tmp_path):
    (first, one), (second, two) = int8_filters("a", 30, 1), int8_filters("b", 20, 30)
    nodes = [one, two, *quantized(0), node("Conv", ["d0", "a"], ["c1"]), *quantized(1)]
    nodes += [node("Conv", ["d1", "b"], ["c2"]), *quantized(2)]
    inputs = [("c0", (1, 1, 2, 5))]
    constants = [*SCALE, *first, *second]
    inner = [*nodes, node("GlobalAveragePool", ["d2"], ["c3"]), *quantized(3)]
    assert peak(tmp_path, inner, constants, inputs, ["d3"]) == 10 * (30 + 20)
    # The answer in float, dequantized at the end.
    assert peak(tmp_path, nodes, constants, inputs, ["d2"]) == 10 * 20 + 40 * 20
    # Softmax has no int8 kernel without a pair behind it: what it reads is a float tensor.
    soft = [*nodes, node("Softmax", ["d2"], ["y"], axis=1)]
    assert peak(tmp_path, soft, constants, inputs, ["y"]) == 40 * (20 + 20)
    # A Relu behind the convolution is part of its kernel.
    limited = [node("Conv", ["d1", "b"], ["l"]) if "c2" in each.output else each for each in inner]
    limited.insert(limited.index(next(each for each in limited if "l" in each.output)) + 1, node("Relu", ["l"], ["c2"]))
    assert peak(tmp_path, limited, constants, inputs, ["d3"]) == 10 * (30 + 20)
    # Read by a float operator too, the convolution's result exists in float: so do its inputs.
    seen = [*inner, node("ReduceMax", ["c2"], ["top"])]
    assert peak(tmp_path, seen, constants, inputs, ["d3", "top"]) == 40 * (30 + 20)
