"""Models by name, weights from files: what exists is built, what does not fit is named."""

import dataclasses
import os
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import ModelError
from compress.models import cifar
from compress.models.cost import macs, parameters
from compress.models.factory import Arch, create, resolve
from compress.models.source import make_model
from compress.models.state import fitting, load_state
from compress.models.weights import published_weights, read_weights

SHARED = Path(__file__).resolve().parents[2] / "shared"


def problem(factory, kwargs=None):
    with pytest.raises(ModelError) as caught:
        create(Arch(factory, kwargs or {}), seed=0)
    return str(caught.value)


# CIFAR ResNets


@pytest.mark.parametrize(
    ("depth", "millions", "exact", "mega_macs"),
    [
        (20, 0.27, 269_722, 40.8),
        (32, 0.46, 464_154, 69.1),
        (44, 0.66, 658_586, 97.4),
        (56, 0.85, 853_018, 125.8),
        (110, 1.7, 1_727_962, 253.1),
    ],
)
def test_cifar_resnets_are_the_papers(depth, millions, exact, mega_macs):
    model = create(Arch(f"cifar:resnet{depth}"), seed=0).eval()
    assert parameters(model) == exact
    assert round(exact / 1e6, 1 if depth == 110 else 2) == millions
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) + 1 == depth  # the paper counts the linear layer too
    assert macs(model, (torch.zeros(1, 3, 32, 32),)) / 1e6 == pytest.approx(mega_macs, rel=0.01)


def test_cifar_resnets_take_other_sizes_channels_and_classes():
    model = create(Arch("cifar:resnet20", {"num_classes": 4, "in_channels": 1}), seed=0).eval()
    assert model(torch.zeros(2, 1, 12, 8)).shape == (2, 4)


def test_the_shortcut_subsamples_and_pads_with_zeros_on_both_sides():
    x = torch.randn(2, 4, 6, 9)
    padded = cifar.ZeroPadShortcut(2)(x)
    assert padded.shape == (2, 8, 3, 5)
    assert torch.equal(padded[:, 2:6], x[:, :, ::2, ::2])
    assert not padded[:, :2].any()
    assert not padded[:, 6:].any()


# Factories


@pytest.mark.parametrize(
    ("factory", "kind"),
    [
        ("cifar:resnet20", "CifarResNet"),
        ("torchvision:squeezenet1_1", "SqueezeNet"),
        ("timm:test_vit", "VisionTransformer"),
        ("networks:Residual", "Residual"),
    ],
)
def test_every_kind_of_name_is_resolved(factory, kind):
    assert type(create(Arch(factory), seed=0)).__name__ == kind


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (create(Arch("cifar:resnet20"), seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


USER = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Size:
    width: int

def make_small(width=3, classes=2):
    return nn.Linear(Size(width).width, classes)

def number():
    return 3

def fails(kind):
    raise KeyError(kind)

constant = 5
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "nets.v2.py"
    path.write_text(USER)
    return path


def test_a_file_of_the_users_own(user_file):
    model = create(Arch(f"{user_file}:make_small", {"width": 5}), seed=0)
    assert model.in_features == 5
    assert not Arch("cifar:resnet20").is_code()
    assert Arch(f"{user_file}:make_small").is_code()


@pytest.mark.parametrize("factory", ["resnet20", ":resnet20", "cifar:", "", ":"])
def test_names_of_another_form_are_refused_with_the_forms_that_exist(factory):
    assert problem(factory).startswith("model.factory: must look like 'cifar:resnet56', 'package.module:callable'")


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("cifar:resnet65", "there is no 'cifar:resnet65'; did you mean 'resnet56'?"),
        ("torchvision:resnet_18", "there is no 'torchvision:resnet_18'; did you mean 'resnet18'?"),
        ("torchvision:fasterrcnn_resnet50_fpn", "there is no 'torchvision:fasterrcnn_resnet50_fpn'"),
        ("timm:resnet18x", "there is no 'timm:resnet18x'; did you mean 'resnet18'?"),
        ("networks:Residul", "networks has no callable 'Residul'; did you mean 'Residual'?"),
        ("networks:CLASSES", "networks has no callable 'CLASSES'"),
        ("torchvison:resnet18", "No module named 'torchvison'; did you mean 'torchvision'?"),
        ("no_such_package.models:make", "No module named 'no_such_package'"),
    ],
)
def test_what_does_not_exist_is_named_with_its_nearest(factory, expected):
    assert expected in problem(factory)


def test_what_a_users_file_lacks_is_named_with_its_nearest(user_file):
    assert "has no callable 'make_smal'; did you mean 'make_small'?" in problem(f"{user_file}:make_smal")
    assert "has no callable 'constant'" in problem(f"{user_file}:constant")
    near = user_file.with_name("nets.v3.py")
    assert f"'{near}:make_small': no such file; did you mean 'nets.v2.py'?" in problem(f"{near}:make_small")
    assert "no such file" in problem("/nowhere/nets.py:make")
    user_file.write_text("import torch\n1 / 0\n")
    assert f"{user_file}: ZeroDivisionError: division by zero" in problem(f"{user_file}:make_small")


def test_a_factory_that_gives_no_model_or_fails_is_named(user_file):
    assert f"'{user_file}:number' returns a int, not a torch.nn.Module" in problem(f"{user_file}:number")
    assert "fails with kwargs {'kind': 'x'}: KeyError: 'x'" in problem(f"{user_file}:fails", {"kind": "x"})


@pytest.mark.parametrize(
    ("factory", "kwargs", "expected"),
    [
        (
            "cifar:resnet20",
            {"num_clases": 3},
            "unexpected keyword argument 'num_clases' (it takes num_classes, in_channels); did you mean 'num_classes'?",
        ),
        ("cifar:resnet20", {"depth": 3}, "'cifar:resnet20' refuses its kwargs"),
        ("cifar:resnet20", {"num_classes": "ten"}, "'cifar:resnet20' refuses its kwargs"),
        ("cifar:resnet20", {"num_classes": -1}, "'cifar:resnet20' fails with kwargs {'num_classes': -1}"),
        ("torchvision:resnet18", {"num_clases": 3}, "unexpected keyword argument 'num_clases'"),
        ("torchvision:resnet18", {"width_per_group": 32}, "BasicBlock only supports"),
        ("timm:test_vit", {"num_clases": 3}, "unexpected keyword argument 'num_clases'"),
    ],
)
def test_arguments_that_a_factory_refuses_are_explained(factory, kwargs, expected):
    assert expected in problem(factory, kwargs)


def test_no_list_of_arguments_where_the_factory_hands_them_on():
    assert "it takes" not in problem("torchvision:resnet18", {"num_clases": 3})


@pytest.mark.parametrize(
    ("factory", "argument"), [("torchvision:resnet18", "weights"), ("timm:resnet18", "pretrained")]
)
def test_weights_are_not_smuggled_in_as_arguments(factory, argument):
    assert f"model.kwargs: '{argument}' fetches or reads weights; name them in model.weights" in problem(
        factory, {argument: "DEFAULT"}
    )


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert problem("timm:resnet18") == "model.factory: 'timm:resnet18' needs timm: pip install 'compress[timm]'"


def test_torchvision_builders_come_without_weights():
    assert resolve("torchvision:resnet18").keywords == {"weights": None}


# Weights from files


def small():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 2)))


def prefixed(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


def parameterised(state):
    return {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()}


WRAPPINGS = {
    "plain.pth": lambda state: state,
    "ordered.pt": OrderedDict,
    "wrapped.pth": lambda state: {"state_dict": state, "epoch": 3},
    "named.bin": lambda state: {"model_state_dict": state},
    "model.pth": lambda state: {"model": state, "optimizer": {}, "lr": 0.1},
    "parallel.pth": prefixed,
    "both.pth": lambda state: {"state_dict": prefixed(state)},
    "parameters.pth": parameterised,
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_pth_files_are_read_whatever_wraps_them(tmp_path, name):
    source, target = small(), small()
    nn.init.constant_(source.conv.weight, 2.5)
    torch.save(WRAPPINGS[name](source.state_dict()), tmp_path / name)
    state = fitting(read_weights(tmp_path / name), target.state_dict())
    assert state.keys() == source.state_dict().keys()
    load_state(target, state, "here")
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_safetensors_are_read_and_their_prefix_taken_off(tmp_path):
    state = small().state_dict()
    save_file(prefixed(state), tmp_path / "w.safetensors")
    found = fitting(read_weights(tmp_path / "w.safetensors"), state)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_model_whose_own_names_begin_like_the_prefix_keeps_them(tmp_path):
    state = {"module.weight": torch.ones(2), "head": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert fitting(read_weights(tmp_path / "w.pth"), state).keys() == state.keys()
    own = {"module.weight": torch.ones(2), "module.bias": torch.ones(2)}
    assert fitting(own, own).keys() == own.keys()


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"state_dict": {}, "extra": bad}])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, zipped, wrap):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    torch.save(wrap(Malicious(mark)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="holds Python objects besides tensors, which could run code; save the state"):
        read_weights(path)
    assert not mark.exists()


def test_a_bare_malicious_pickle_is_refused_and_nothing_runs(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(ModelError, match=re.escape(f"model.weights: {path}: ")):
        read_weights(path)
    assert not mark.exists()


def test_a_whole_pickled_model_is_refused_with_the_remedy(tmp_path):
    torch.save(small(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=re.escape("torch.save(model.state_dict(), …)")):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"\x80\x02junk"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"model.weights: {tmp_path / name}: ")):
        read_weights(tmp_path / name)


def test_truncated_files_are_named(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    save_file(small().state_dict(), tmp_path / "w.safetensors")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ModelError, match=re.escape(f"model.weights: {path}: ")):
            read_weights(path)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": 1}, {"state_dict": {"a": [1]}}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="is no state dict"):
        read_weights(tmp_path / "w.pth")


def test_a_missing_file_is_named_with_its_nearest(tmp_path):
    (tmp_path / "resnet20.safetensors").touch()
    with pytest.raises(ModelError, match=r"resnet2O\.safetensors: no such file; did you mean 'resnet20\.safetensors'"):
        read_weights(tmp_path / "resnet2O.safetensors")
    with pytest.raises(ModelError, match=r"no such file$"):
        read_weights(tmp_path / "nowhere" / "w.pth")
    with pytest.raises(ModelError, match="no such file"):
        read_weights(tmp_path)


def test_weights_of_another_architecture_name_the_first_differences(tmp_path):
    state = small().state_dict()
    state["head.weight"] = torch.ones(10, 4)
    state["neck.weight"] = torch.ones(3)
    del state["conv.bias"]
    save_file(state, tmp_path / "w.safetensors")
    before = small()
    model = small()
    with pytest.raises(ModelError) as caught:
        load_state(model, read_weights(tmp_path / "w.safetensors"), "model.weights: w.safetensors")
    assert str(caught.value) == (
        "model.weights: w.safetensors: does not fit the model: 1 tensors are missing, first 'conv.bias' (4,); "
        "1 tensors have no place in the model, first 'neck.weight' (3,); "
        "1 tensors have another shape, first 'head.weight' (model (2, 4), file (10, 4))"
    )
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in model.state_dict().items())  # nothing half done


def test_only_the_first_differences_are_listed():
    with pytest.raises(ModelError, match="97 tensors are missing") as caught:
        load_state(create(Arch("cifar:resnet20"), seed=0), {}, "here")
    assert len(str(caught.value)) < 300


def test_weights_from_before_batches_were_counted_fit():
    model, state = small(), small().state_dict()
    del state["norm.num_batches_tracked"]
    load_state(model, state, "here")
    assert model.norm.num_batches_tracked == 0


def test_a_made_model_is_filled_and_in_evaluation(tmp_path):
    arch = Arch("cifar:resnet20", {"num_classes": 3})
    trained = create(arch, seed=9)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    model = make_model(arch, str(tmp_path / "w.safetensors"), seed=0)
    assert not model.training
    assert torch.equal(model.linear.weight, trained.linear.weight)
    assert not torch.equal(make_model(arch, None, seed=0).linear.weight, trained.linear.weight)
    with pytest.raises(ModelError, match=r"model\.weights: w\.safetensors: does not fit the model"):
        make_model(dataclasses.replace(arch, kwargs={}), str(tmp_path / "w.safetensors"), seed=0)


# Published weights; nothing is fetched


def offline(*_args, **_kwargs):
    raise OSError("Name or service not known")


class TransportError(Exception):
    """What a library of the network may raise: no OSError."""


def test_published_names_that_do_not_exist_are_refused_with_the_nearest():
    with pytest.raises(ModelError) as caught:
        published_weights(Arch("torchvision:resnet50"), "IMAGENET1K_V3")
    assert "'torchvision:resnet50' has IMAGENET1K_V1, IMAGENET1K_V2" in str(caught.value)
    assert "not 'IMAGENET1K_V3'; did you mean 'IMAGENET1K_V" in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "allowed"),
    [
        ("cifar:resnet20", "a .safetensors or .pth file"),
        ("networks:Residual", "a .safetensors or .pth file"),
        ("timm:test_vit", "'pretrained'"),
    ],
)
def test_models_without_published_weights_say_what_they_take(factory, allowed):
    with pytest.raises(ModelError, match=re.escape(f"'{factory}' takes {allowed}, got 'best'")):
        published_weights(Arch(factory), "best")


def test_without_a_network_torchvision_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match=r"cannot be fetched: Name or service not known; download the file where"):
        make_model(Arch("torchvision:resnet18"), "IMAGENET1K_V1", seed=0)


@pytest.mark.parametrize("error", [OSError("no route"), TransportError("no route"), RuntimeError("no route")])
def test_without_a_network_timm_says_what_to_do(monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    for name in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{name}", fail)
    with pytest.raises(ModelError, match="'pretrained' of 'timm:test_vit' cannot be fetched: no route; download"):
        make_model(Arch("timm:test_vit"), "pretrained", seed=0)


def test_published_torchvision_files_are_read_without_pickle_and_checked(monkeypatch):
    asked = {}

    def fetch(url, **kwargs):
        asked.update(kwargs)
        return {"fetched": torch.ones(1)}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert published_weights(Arch("torchvision:resnet18"), "DEFAULT").keys() == {"fetched"}
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True


# Real weights on real images

FIRST, ALL = 1000, 10_000


def correct(depth, n):
    weights = SHARED / "weights" / f"cifar10_resnet{depth}.safetensors"
    images, labels = (SHARED / "data" / "cifar10" / f"test_{kind}.npy" for kind in ("images", "labels"))
    for path in (weights, images, labels):
        if not path.is_file():
            pytest.skip(f"there is no {path.name} beside the project")
    model = make_model(Arch(f"cifar:resnet{depth}"), str(weights), seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels, expected = np.load(images, mmap_mode="r")[:n], np.load(labels)[:n]
    found = 0
    with torch.no_grad():
        for start in range(0, n, 250):
            batch = torch.from_numpy(np.array(pixels[start : start + 250])).permute(0, 3, 1, 2).float() / 255
            answers = model((batch - mean) / std).argmax(1).numpy()
            found += int((answers == expected[start : start + 250]).sum())
    return found


@pytest.mark.realdata
def test_the_published_resnet20_recognises_cifar10():
    assert correct(20, FIRST) >= 0.9 * FIRST


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize(("depth", "count"), [(20, 9173), (56, 9339)])
def test_the_published_weights_score_exactly_what_was_published(depth, count):
    assert correct(depth, ALL) == count
