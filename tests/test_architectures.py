"""The networks people have: pruned, split, saved, read, exported and made int8, all weights random.

Fresh weights would prove nothing: heads that begin at zero and layer scales of a millionth hide what is wrong.
"""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Workshop, write_arrays

from compress.config import ArraysConfig, ModelConfig
from compress.data.load import load_data
from compress.edits import Factor
from compress.errors import StageError
from compress.manifest import FP32_ONNX, INT8_ONNX
from compress.methods.silence import randomise
from compress.models.cost import parameters
from compress.stages import source

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 10
# Size of the images, and what the factory needs besides the number of classes.
QUICK = {
    "cifar:resnet20": (32, {}),
    "classic:lenet5": (32, {}),
    "classic:alexnet": (32, {}),
    "torchvision:squeezenet1_1": (64, {}),
}
SLOW = {
    "torchvision:resnet18": (64, {}),
    "torchvision:mobilenet_v2": (64, {}),
    "torchvision:mobilenet_v3_small": (64, {}),
    "timm:mobilenetv3_small_050": (64, {}),
    "torchvision:efficientnet_b0": (64, {}),
    "torchvision:vgg11_bn": (64, {}),
    "torchvision:densenet121": (64, {}),
    "torchvision:convnext_tiny": (64, {}),
    "torchvision:resnext50_32x4d": (64, {}),
    "torchvision:regnet_y_400mf": (64, {}),
    "torchvision:vit_b_16": (64, {"image_size": 64}),
    "timm:vit_tiny_patch16_224": (64, {"img_size": 64, "num_heads": 8}),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Noise of a colour of its own per image, in a size: pure noise looks all the same to a network that pools."""
    known = {}

    def make(size):
        if size not in known:
            rng = np.random.default_rng(size)

            def images(n):
                colours = rng.uniform(0, 255, (n, 1, 1, 3)) + rng.normal(0, 60, (n, size, size, 3))
                return colours.clip(0, 255).astype(np.uint8), np.arange(n) % CLASSES

            root = write_arrays(
                tmp_path_factory.mktemp(f"images{size}"), train=images(40), validation=images(20), test=images(20)
            )
            settings = {"kind": "arrays", "root": str(root), "validation": {"from": "given"}}
            known[size] = load_data(ArraysConfig.model_validate(settings, strict=False), 0)
        return known[size]

    return make


def _logits(model, inputs):
    with torch.no_grad():
        return model(inputs)


def _run_file(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": inputs.numpy()})[0]


def _random_source(shop, name, kwargs):
    draft = source.make(ModelConfig(factory=name, kwargs={"num_classes": CLASSES, **kwargs}), 0)
    randomise(draft.model)
    return shop._keep(draft, ())


def _check(name, size, kwargs, dataset, folder):
    shop = Workshop(folder, dataset(size), name)
    inputs = next(iter(shop.dataset.test.batches(8))).inputs[0]
    whole = _random_source(shop, name, kwargs)
    before = _logits(whole.build(), inputs)
    assert before.isfinite().all()
    assert (before[0] - before[1]).abs().max() > 1e-2 * before.abs().max()

    draft, context = shop.draft(whole, "prune", target={"ratio": 0.3}, recovery=None)
    pruned = shop._keep(draft, ())
    assert parameters(draft.model) <= 0.8 * parameters(whole.build())
    assert torch.equal(_logits(draft.model, inputs), _logits(pruned.build(), inputs))
    assert not context.warnings  # nothing is left alone but what is the output, and what has too few channels

    draft, context = shop.draft(pruned, "factorize", target={"ratio": 0.5}, multiple=1, min_saving=0.1)
    split = shop._keep(draft, ())
    assert any(isinstance(edit, Factor) for edit in split.edits)
    assert parameters(draft.model) < parameters(pruned.build())
    assert torch.equal(_logits(draft.model, inputs), _logits(split.build(), inputs))
    assert not context.warnings

    exported = shop.run(shop.run(split, "quantize", calibration={"samples": 8}), "export", agreement=0.0)
    expected = _logits(split.build(), inputs).numpy()
    floats, ints = (_run_file(exported.file(file), inputs) for file in (FP32_ONNX, INT8_ONNX))
    assert np.abs(floats - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.isfinite(ints).all()
    assert len(np.unique(ints, axis=0)) > 1, (expected, ints)
    assert exported.file(INT8_ONNX).stat().st_size < 0.7 * exported.file(FP32_ONNX).stat().st_size


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_network_through_the_whole_chain(name, dataset, tmp_path):
    _check(name, *QUICK[name], dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_network_through_the_whole_chain(name, dataset, tmp_path):
    _check(name, *SLOW[name], dataset, tmp_path)


def test_a_network_that_shuffles_its_channels_is_refused_with_a_reason(dataset, tmp_path):
    shop = Workshop(tmp_path, dataset(64), "torchvision:shufflenet_v2_x0_5")
    whole = _random_source(shop, shop.factory, {})
    with pytest.raises(StageError, match="torch-pruning cannot trace the dependencies of this model"):
        shop.draft(whole, "prune", recovery=None)
