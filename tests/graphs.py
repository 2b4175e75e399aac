"""ONNX graphs made by hand, for tests of what files hold and cost."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, MICROSOFT = TensorProto.FLOAT, "com.microsoft"


def tensor(name, shape, kind=np.float32, value=1):
    return numpy_helper.from_array(np.full(shape, value, kind), name)


def model_of(nodes, inputs, outputs, constants=(), functions=()):
    """A model; inputs and outputs are (name, shape) in float32 or (name, shape, type)."""
    ends = [
        [helper.make_tensor_value_info(name, (*kind, FLOAT)[0], shape) for name, shape, *kind in each]
        for each in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "net", *ends, list(constants))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def write(path, *parts, **options):
    path.write_bytes(model_of(*parts, **options).SerializeToString())
    return path


def node(operator, inputs, outputs=("y",), **attributes):
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)
