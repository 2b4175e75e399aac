"""Models and weights as people bring them: the whole way goes, or a message says what is in its way."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Workshop, make_workshop, write_arrays
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress import load_checkpoint, load_pipeline, run
from compress.config import ArraysConfig
from compress.data.load import load_data
from compress.errors import ModelError
from compress.models.cost import parameters
from compress.models.factory import Arch, create
from compress.models.source import make_model

NETS = '''
"""What users do in their own files."""

import torch
from torch import nn


class Tied(nn.Module):
    """Two layers share one weight, and each has a bias of its own."""

    def __init__(self, num_classes=4, width=32):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.wide = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        x = self.two(self.one(x).relu()).relu()
        return self.head(self.wide(x).relu())


class Windowed(nn.Module):
    """Needs buffers that are not saved: one that follows from the sizes, one that is drawn anew each time."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.register_buffer("window", torch.hann_window(12).view(1, 1, 12, 1), persistent=False)
        self.register_buffer("offset", torch.randn(1, 1, 12, 8), persistent=False)
        self.conv = nn.Conv2d(1, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x):
        x = self.conv(x * self.window + self.offset).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


class Viewed(nn.Module):
    """Counts on the number of channels before its linear layer."""

    def __init__(self, num_classes=4, in_channels=1):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16 * 4 * 4, num_classes)

    def forward(self, x):
        x = self.pool(self.last(self.first(x).relu()).relu())
        return self.head(x.view(-1, 16 * 4 * 4))


class Plain(nn.Module):
    """A small network for any number of channels and classes."""

    def __init__(self, num_classes=4, in_channels=1, width=16):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head(self.deep(x).relu().mean((2, 3)))
'''


PRUNE_AND_EXPORT = ({"prune": {"target": {"ratio": 0.5}, "recovery": None}}, {"export": {}})


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """The file with the users' networks."""
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture
def user(nets, tiny, tiny_data, tmp_path, one_thread):
    """A workshop that trusts one of them."""

    def user(name) -> Workshop:
        workshop = make_workshop(tmp_path / "checkpoints", tiny, tiny_data)
        workshop.factory = f"{nets}:{name}"
        workshop.trusted = frozenset({workshop.factory})
        return workshop

    return user


@pytest.fixture
def go(nets, tmp_path, one_thread):
    """Runs a pipeline from end to end: its results, the folder of the run, and the checkpoint of each row."""

    def go(name, data, stages, **model):
        document = {
            "name": "mine",
            "device": "cpu",
            "threads": 1,
            "data": data,
            "model": {"factory": f"{nets}:{name}", **model},
            "stages": list(stages),
            "bench": {"latency": None},
        }
        (tmp_path / "p.yaml").write_text(json.dumps(document))
        results = run(load_pipeline(tmp_path / "p.yaml"), runs=tmp_path / "runs")
        folder = tmp_path / "runs" / "mine"
        return results, folder, {row.stage: load_checkpoint(folder / row.checkpoint) for row in results.rows}

    return go


def answers(model, workshop):
    batch = next(iter(workshop.dataset.validation.batches(16)))
    with torch.no_grad():
        return model(*batch.inputs)


# Tied weights


def matrices(layer):
    return [parameter for parameter in layer.parameters() if parameter.dim() > 1]


def assert_tied(model):
    one, two = matrices(model.one), matrices(model.two)
    assert one
    assert [id(matrix) for matrix in one] == [id(matrix) for matrix in two]


def test_tied_weights_are_saved_once_and_stay_tied(user):
    workshop = user("Tied")
    source = workshop.source()
    model = workshop.build(source)
    assert_tied(model)
    fresh = create(Arch(workshop.factory), seed=0).eval()
    assert torch.equal(answers(model, workshop), answers(fresh, workshop))
    assert source.manifest.aliases == {"two.weight": "one.weight"}
    assert parameters(model) == parameters(fresh)


@pytest.mark.parametrize(
    "stages",
    [
        [("prune", {"target": {"ratio": 0.5}, "recovery": None})],
        [("factorize", {"target": {"ratio": 0.25}})],
        [("prune", {"target": {"ratio": 0.25}, "recovery": None}), ("factorize", {"target": {"ratio": 0.25}})],
    ],
    ids=["prune", "factorize", "both"],
)
def test_tied_weights_stay_tied_through_surgery(user, stages):
    workshop = user("Tied")
    checkpoint = workshop.source()
    before = parameters(workshop.build(checkpoint))
    for kind, settings in stages:
        draft, _ = workshop.draft(checkpoint, kind, **settings)
        checkpoint = workshop.run(checkpoint, kind, **settings)
        model = workshop.build(checkpoint)
        assert_tied(model)
        assert torch.equal(answers(model, workshop), answers(draft.model, workshop))
    assert parameters(model) < before


# Buffers that are not saved


def test_buffers_that_are_not_saved_come_back(user):
    workshop = user("Windowed")
    source = workshop.source(seed=3)
    fresh = create(Arch(workshop.factory), seed=3).eval()
    assert torch.equal(answers(workshop.build(source), workshop), answers(fresh, workshop))
    draft, context = workshop.draft(source, "prune", target={"ratio": 0.5}, recovery=None)
    pruned = workshop.build(workshop.run(source, "prune", target={"ratio": 0.5}, recovery=None))
    assert pruned.conv.out_channels < 24
    assert torch.equal(pruned.offset, fresh.offset)
    assert torch.equal(answers(pruned, workshop), answers(draft.model, workshop))
    assert not context.warnings


# Code that counts on sizes


def test_a_written_out_view_leaves_its_channels_alone_aloud_and_exports(go, tiny):
    results, folder, checkpoints = go("Viewed", tiny.data, PRUNE_AND_EXPORT)
    pruned = checkpoints["prune"]
    model = pruned.build({pruned.arch.factory})
    assert model.first.out_channels < 16
    assert model.last.out_channels == 16
    (warning,) = [text for text in pruned.history[-1].warnings if "'last'" in text]
    assert "left alone: pruning them breaks the model" in warning
    assert results.artifact is not None
    onnx.checker.check_model(str(folder / "dist" / results.artifact.model))


# Channels and classes


def test_grey_images_for_a_model_of_one_channel_with_an_old_file_of_weights(go, nets, tmp_path):
    kwargs = {"num_classes": 10, "in_channels": 1}
    state = create(Arch(f"{nets}:Plain", kwargs), seed=99).state_dict()
    torch.save({"state_dict": prefixed(state, "module."), "epoch": 9}, tmp_path / "old.pth")
    data = {"kind": "digits", "channels": 1, "image_size": 8}
    _, _, checkpoints = go("Plain", data, (), kwargs=kwargs, weights=str(tmp_path / "old.pth"))
    source = checkpoints["source"]
    built = source.build({source.arch.factory}).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in state.items())
    assert onnxruntime.InferenceSession(source.path / "measured.onnx").get_inputs()[0].shape[1:] == [1, 8, 8]


def arrays_of(root, count, each):
    """Settings of data with `count` classes and `each` samples of each in every split."""
    rng = np.random.default_rng(0)
    labels = np.arange(each * count) % count
    splits = {
        split: (rng.integers(0, 256, (len(labels), 6, 5, 1), dtype=np.uint8), labels)
        for split in ("train", "validation", "test")
    }
    names = [f"class {number:04d}" for number in range(count)]
    root = write_arrays(root, **splits)
    return {"kind": "arrays", "root": str(root), "classes": names, "validation": {"from": "given"}}


def test_two_classes_through_training_pruning_and_factorization(user, tmp_path):
    workshop = user("Plain")
    workshop.dataset = load_data(ArraysConfig.model_validate_json(json.dumps(arrays_of(tmp_path / "data", 2, 12))), 0)
    checkpoint = workshop.source(num_classes=2)
    for kind, settings in (
        ("train", {"epochs": 1, "batch_size": 8}),
        ("prune", {"target": {"ratio": 0.5}, "recovery": None}),
        ("factorize", {"target": {"ratio": 0.5}}),
    ):
        checkpoint = workshop.run(checkpoint, kind, **settings)
        assert answers(workshop.build(checkpoint), workshop).shape == (16, 2)


def test_a_thousand_classes_to_the_artifact(go, tmp_path):
    data = arrays_of(tmp_path / "data", 1000, 2)
    results, folder, checkpoints = go("Plain", data, PRUNE_AND_EXPORT, kwargs={"num_classes": 1000})
    pruned = checkpoints["prune"].build({checkpoints["prune"].arch.factory})
    assert (pruned.conv.out_channels, pruned.head.out_features) == (8, 1000)
    assert list(results.classes) == data["classes"]
    assert json.loads((folder / "dist" / "metadata.json").read_text())["classes"] == data["classes"]
    session = onnxruntime.InferenceSession(folder / "dist" / results.artifact.model)
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 1, 6, 5), np.float32)})
    assert logits.shape == (3, 1000)


# Files of weights from elsewhere


@pytest.fixture(scope="session")
def trained_state(nets):
    """Weights that no seed gives."""
    model = create(Arch(f"{nets}:Plain"), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.norm.num_batches_tracked += 7
    return model.state_dict()


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def beside_an_optimizer(state):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    return {
        "epoch": 30,
        "best_accuracy": 91.5,
        "arch": "plain",
        "args": {"lr": 0.1, "resume": None, "milestones": [10, 20]},
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def averaged(state, nets):
    model = AveragedModel(create(Arch(f"{nets}:Plain"), seed=0))
    model.module.load_state_dict(state)
    return model.state_dict()


def compiled(state, nets):
    model = create(Arch(f"{nets}:Plain"), seed=0)
    model.load_state_dict(state)
    return torch.compile(model).state_dict()


def partly_compiled(state, nets):
    model = create(Arch(f"{nets}:Plain"), seed=0)
    model.load_state_dict(state)
    model.deep = torch.compile(model.deep)
    return model.state_dict()


WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "ema",
    "model_ema",
    "state_dict_ema",
    "student_1",
)
FORMS = {
    **{name: functools.partial(lambda name, state, _: {name: state, "epoch": 3}, name) for name in WRAPPERS},
    "twice wrapped": lambda state, _: {"model": {"state_dict": state, "step": 2}, "epoch": 3},
    "beside an optimizer": lambda state, _: beside_an_optimizer(state),
    "data parallel": lambda state, _: {"net": prefixed(state, "module."), "acc": 91.5, "epoch": 3},
    "compiled": compiled,
    "partly compiled": partly_compiled,
    "compiled, then data parallel": lambda state, nets: prefixed(compiled(state, nets), "module."),
    "data parallel, then compiled": lambda state, _: prefixed(state, "_orig_mod.module."),
    "lightning": lambda state, _: {"state_dict": prefixed(state, "model."), "pytorch-lightning_version": "2.4.0"},
    "averaged": averaged,
    "without counters": lambda state, _: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda state, _: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
    "double": lambda state, _: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_files_of_weights_as_training_scripts_leave_them(nets, trained_state, tmp_path, form, zipped):
    path = tmp_path / "w.pth"
    torch.save(FORMS[form](copy.deepcopy(trained_state), nets), path, _use_new_zipfile_serialization=zipped)
    loaded = make_model(Arch(f"{nets}:Plain"), str(path), seed=0).state_dict()
    for name, tensor in trained_state.items():
        assert loaded[name].dtype == tensor.dtype
        if form != "without counters" or not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_single_and_said(nets, trained_state, tmp_path, dtype):
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained_state.items()}
    torch.save(half, tmp_path / "w.pth")
    notes = []
    model = make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0, note=notes.append)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.deep.weight, half["deep.weight"].float())
    assert notes == [f"w.pth: holds {str(dtype).removeprefix('torch.')}; the weights are loaded as float32"]


def test_the_trained_weights_are_taken_rather_than_their_average_and_said(nets, trained_state, tmp_path):
    other = {name: torch.zeros_like(tensor) for name, tensor in trained_state.items()}
    torch.save({"ema": other, "model": trained_state}, tmp_path / "w.pth")
    notes = []
    model = make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0, note=notes.append)
    assert torch.equal(model.deep.weight, trained_state["deep.weight"])
    assert notes == ["w.pth: the weights under 'model' are taken, not the averaged ones under 'ema'"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["model", "state_dict"], "'state_dict' are taken, not those under 'model'"),
        (["best_model", "model"], "'model' are taken, not those under 'best_model'"),
        (["model", "ema", "a", "b"], "'model' are taken, not those under 'a', 'b', nor the averaged ones under 'ema'"),
        (["model", "counts"], None),
    ],
)  # fmt: skip
def test_of_several_sets_of_weights_the_one_that_is_taken_is_named(nets, trained_state, tmp_path, keys, told):
    taken = "state_dict" if "state_dict" in keys else "model"
    other = prefixed({name: torch.zeros_like(tensor) for name, tensor in trained_state.items()}, "module.")
    content = {key: other for key in keys if key != "counts"} | {
        "counts": {"seen": torch.ones(4)},
        taken: trained_state,
    }
    torch.save(content, tmp_path / "w.pth")
    notes = []
    model = make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0, note=notes.append)
    assert torch.equal(model.deep.weight, trained_state["deep.weight"])
    assert notes == ([f"w.pth: the weights under {told}"] if told else [])


def test_a_name_with_and_without_the_prefix_of_compilation_is_refused(nets, trained_state, tmp_path):
    state = prefixed(trained_state, "_orig_mod.") | {"deep.weight": torch.zeros_like(trained_state["deep.weight"])}
    torch.save(state, tmp_path / "w.pth")
    message = r"model\.weights: w\.pth: holds 'deep\.weight' and, from torch\.compile, '_orig_mod\.deep\.weight', .*; keep one"
    with pytest.raises(ModelError, match=message):
        make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (["criterion.w"], "the weights under 'model.' are taken; left over: criterion.w"),
        (["a.b.w", "c.w", "d.w", "e.w", "loss"], "the weights under 'model.' are taken; left over: a.b.w, c.w, d.w, … (2 more)"),
    ],
)  # fmt: skip
def test_a_loss_beside_the_model_is_left_over_and_said(nets, trained_state, tmp_path, others, told):
    state = {**{name: torch.ones(2) for name in others}, **prefixed(trained_state, "model._orig_mod.net.")}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4.0"}, tmp_path / "w.ckpt")
    notes = []
    model = make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.ckpt"), seed=0, note=notes.append)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained_state.items())
    assert notes == [f"w.ckpt: {told}"]


def test_of_two_networks_in_a_file_the_one_called_model_is_taken_and_no_other_guessed_at(nets, trained_state, tmp_path):
    other = {name: torch.zeros_like(tensor) for name, tensor in trained_state.items()}
    path, arch = tmp_path / "w.pth", Arch(f"{nets}:Plain")
    torch.save(prefixed(other, "averaged.") | prefixed(trained_state, "model."), path)
    notes = []
    assert torch.equal(make_model(arch, str(path), 0, note=notes.append).deep.weight, trained_state["deep.weight"])
    assert "left over: averaged.conv.weight, " in notes[0]
    for content in (
        prefixed(other, "teacher.") | prefixed(trained_state, "student."),
        prefixed(trained_state | {"head.bias": torch.ones(5)}, "model.") | {"criterion.w": torch.ones(2)},
        prefixed(trained_state | {"neck": torch.ones(5)}, "model.") | {"criterion.w": torch.ones(2)},
        prefixed({name: trained_state[name] for name in list(trained_state)[1:]}, "model.") | {"w": torch.ones(2)},
    ):
        torch.save(content, path)
        with pytest.raises(ModelError, match=r"w\.pth: does not fit the model"):
            make_model(arch, str(path), seed=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_of_their_file(nets, trained_state, tmp_path, bad):
    state = copy.deepcopy(trained_state)
    state["norm.running_var"][3] = bad
    torch.save(state, tmp_path / "w.pth")
    message = r"^model\.weights: w\.pth: 'norm\.running_var' holds values that are not finite$"
    with pytest.raises(ModelError, match=message):
        make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0)


# Files of tied weights


@pytest.fixture
def tied_state(nets):
    model = create(Arch(f"{nets}:Tied"), seed=7)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("absent", ["one.weight", "two.weight", None])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_file_may_hold_either_name_of_tied_weights_or_both(nets, tied_state, tmp_path, absent, prefix):
    state = {name: tensor for name, tensor in tied_state.items() if name != absent}
    beside = {"criterion.w": torch.ones(2)} if prefix else {}
    torch.save(prefixed(state, prefix) | beside, tmp_path / "w.pth")
    model = make_model(Arch(f"{nets}:Tied"), str(tmp_path / "w.pth"), seed=0)
    assert_tied(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tied_state.items())


def test_tied_weights_from_safetensors_own_writer(nets, tied_state, tmp_path):
    save_model(create(Arch(f"{nets}:Tied"), seed=7), str(tmp_path / "w.safetensors"))
    model = make_model(Arch(f"{nets}:Tied"), str(tmp_path / "w.safetensors"), seed=0)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tied_state.items())


def test_different_values_for_tied_weights_are_refused(nets, tied_state, tmp_path):
    tied_state["two.weight"][0, 0] += 1
    torch.save(tied_state, tmp_path / "w.pth")
    message = r"^model\.weights: w\.pth: has different values for 'one\.weight' and 'two\.weight', which are one tensor"
    with pytest.raises(ModelError, match=message):
        make_model(Arch(f"{nets}:Tied"), str(tmp_path / "w.pth"), seed=0)


def test_neither_name_of_tied_weights_is_a_missing_tensor(nets, tied_state, tmp_path):
    del tied_state["one.weight"], tied_state["two.weight"]
    torch.save(tied_state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"2 tensors are missing, first 'one\.weight' \(32, 32\), 'two\.weight'"):
        make_model(Arch(f"{nets}:Tied"), str(tmp_path / "w.pth"), seed=0)


def test_several_models_in_a_file_are_not_guessed_at(nets, trained_state, tmp_path):
    torch.save({"generator": trained_state, "critic": trained_state}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"'generator' is a (Ordered)?[dD]ict; it holds generator, critic"):
        make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0)


def test_weights_of_another_kind_are_not_converted(nets, trained_state, tmp_path):
    torch.save({**trained_state, "deep.weight": trained_state["deep.weight"].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"'deep\.weight' is torch\.int8, the model has torch\.float32"):
        make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0)


def test_a_prefix_of_the_models_own_stays(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = nn.Linear(3, 2)\n"
    )
    arch = Arch(f"{tmp_path / 'own.py'}:Own")
    model = create(arch, seed=5)
    for name, state in (("own.pth", model.state_dict()), ("parallel.pth", prefixed(model.state_dict(), "module."))):
        torch.save(state, tmp_path / name)
        assert torch.equal(make_model(arch, str(tmp_path / name), seed=0).module.weight, model.module.weight)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_truncated_files_say_so(nets, trained_state, tmp_path, zipped, keep):
    path = tmp_path / "w.pth"
    torch.save(trained_state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(
        ModelError, match=r"w\.pth: cannot be read; the file is damaged, cut short, or no file of weights"
    ):
        make_model(Arch(f"{nets}:Plain"), str(path), seed=0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_module_is_refused_with_the_remedy(nets, tmp_path, zipped):
    path = tmp_path / "w.pth"
    torch.save({"model": nn.Sequential(nn.Linear(2, 2)), "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModelError, match=r"save the state dict alone: .*\(the first: torch\.nn\.modules\.container\.Sequential"
    ):
        make_model(Arch(f"{nets}:Plain"), str(path), seed=0)


def test_a_script_archive_is_refused_with_the_remedy(nets, tmp_path):
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is giving the format up, but the files are out there
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(ModelError, match="is a TorchScript archive, which holds code; save the state dict alone"):
        make_model(Arch(f"{nets}:Plain"), str(path), seed=0)


def test_a_students_weights_are_told_at_the_student(nets, trained_state, tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "w.pth")
    at = "stages.1.distill.student"
    with pytest.raises(ModelError, match=r"^stages\.1\.distill\.student\.weights: w\.pth: does not fit the model"):
        make_model(Arch(f"{nets}:Plain"), str(tmp_path / "w.pth"), seed=0, at=at)
    with pytest.raises(
        ModelError, match=r"^stages\.1\.distill\.student\.factory: .*has no callable 'Plan'; did you mean 'Plain'"
    ):
        make_model(Arch(f"{nets}:Plan"), None, seed=0, at=at)
