"""Checkpoints: the same bits back, the first bad byte named, nothing of a stranger's run."""

import ast
import copy
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from networks import CLASSES, Tied, edits_for, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress import checkpoint, manifest, surgery
from compress.checkpoint import Draft
from compress.data.base import Input
from compress.edits import Factor, Keep
from compress.errors import CheckpointError, CompressError, ModelError
from compress.manifest import FILE_NAME, WEIGHTS, HistoryEntry
from compress.methods.lowrank import split
from compress.models.factory import Arch, create

pytestmark = pytest.mark.usefixtures("one_thread")

RESNET = Arch("cifar:resnet20", {"num_classes": CLASSES})
TIED = "networks:Tied"
EXAMPLE = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
INPUTS = (Input("input", (3, 16, 24), mean=(0.5,) * 3, std=(0.25,) * 3),)


def save(path, draft, stage="source", seconds=0.0):
    history = (HistoryEntry(stage=stage, parent=None, settings={}, seconds=seconds),)
    return checkpoint.save(path, draft, inputs=INPUTS, classes=tuple("abcdefg"), history=history, key={"stage": stage})


def source(arch=RESNET, layout=torch.contiguous_format):
    return Draft(arch, (), randomise(create(arch, seed=0)).to(memory_format=layout))


class Masked(nn.Linear):
    """A mask that is saved."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))


def factorize(model, **ranks):
    """Split layers of `model` in place and fill them, as the factorize stage does."""
    edits = tuple(Factor(module=name.replace("__", "."), rank=rank) for name, rank in ranks.items())
    for edit in edits:
        layer = model.get_submodule(edit.module)
        first, second = split(layer.weight.detach(), edit.rank)
        surgery.apply(model, edit)
        pair = model.get_submodule(edit.module)
        with torch.no_grad():
            pair[0].weight.copy_(first)
            pair[1].weight.copy_(second.reshape(pair[1].weight.shape))
            if layer.bias is not None:
                pair[1].bias.copy_(layer.bias)
    return edits


def prune(model, removed, example=EXAMPLE):
    edits = edits_for(model, example, removed)
    surgery.apply_all(model, edits)
    return edits


def answers(model, example=EXAMPLE):
    with torch.no_grad():
        return model.eval()(example)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint with every kind of file; tests that change it copy it first."""
    arch = Arch("cifar:resnet20")
    draft = dataclasses.replace(
        source(arch),
        form="int8",
        quantization={"version": 1, "ranges": {"input": [-1.5, 2.0]}},
        files={"model.onnx": bytes(range(256))},
    )
    return save(tmp_path_factory.mktemp("saved") / "checkpoint", draft).path


@pytest.fixture
def copied(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def forge(path, **changes):
    """Change a manifest as somebody who knows the format would, with fresh digests."""
    content = json.loads((path / FILE_NAME).read_bytes())
    content = {key: value for key, value in {**content, **changes}.items() if key not in ("digest", "checksum")}
    record = manifest.Manifest.model_validate_json(json.dumps({**content, "digest": "", "checksum": ""}))
    (path / FILE_NAME).write_bytes(manifest.dump(manifest.seal(record.model_dump(exclude={"digest", "checksum"}))))


# The same model back


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_form_of_a_layer_comes_back_to_the_bit(layout, tmp_path):
    draft = source(layout=layout)
    model = draft.model
    edits = (
        Factor(module="layer2.0.conv1", rank=9, split="spatial"),
        Factor(module="layer3.0.conv2", rank=16, split="tucker", rank_in=8, bias=True),
    )
    surgery.apply_all(model, edits)
    with torch.no_grad():
        for edit in edits:
            for part in model.get_submodule(edit.module):
                part.weight.normal_(std=0.1)
    saved = save(tmp_path / "forms", Draft(RESNET, edits, model))
    loaded = checkpoint.load(saved.path)
    assert loaded.edits == edits
    assert torch.equal(answers(loaded.build()), answers(model))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pruned_and_factorized_model_comes_back_to_the_bit_and_can_be_pruned_again(layout, tmp_path):
    draft = source(layout=layout)
    model = draft.model
    whole = answers(model)
    edits = prune(model, {"layer1.0.conv1": [0, 3, 15], "layer3.2.conv1": list(range(10, 40))})
    edits += factorize(model, layer2__0__conv1=9, layer3__0__conv2=16, linear=3)
    first = save(tmp_path / "first", Draft(RESNET, edits, model))
    expected = answers(model)
    reloaded = checkpoint.load(first.path)
    assert reloaded == first
    built = reloaded.build()
    assert torch.equal(answers(built), expected)
    assert not torch.allclose(expected, whole)
    assert not built.training
    assert {k: v.stride() for k, v in built.state_dict().items()} == {
        k: v.stride() for k, v in model.state_dict().items()
    }

    again = built
    more = prune(again, {"layer2.0.conv1.1": [1, 30], "layer2.0.conv1.0": [4], "layer1.0.conv1": [0]})
    second = save(tmp_path / "second", Draft(RESNET, (*reloaded.edits, *more), again))
    assert torch.equal(answers(checkpoint.load(second.path).build()), answers(again))
    assert sum(map(torch.numel, again.parameters())) < sum(map(torch.numel, model.parameters()))
    assert torch.equal(answers(reloaded.build()), expected)  # the first is as it was


def test_a_torchvision_model_of_double_precision_comes_back(tmp_path):
    arch = Arch("torchvision:resnet18", {"num_classes": CLASSES, "width_per_group": 64})
    model = randomise(create(arch, seed=0)).double()
    edits = prune(model, {"layer4.0.downsample.0": list(range(400)), "layer4.1.conv1": list(range(500))})
    built = save(tmp_path / "c", Draft(arch, edits, model)).build()
    assert torch.equal(answers(built, EXAMPLE.double()), answers(model, EXAMPLE.double()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tied_weights_and_hidden_buffers_come_back(layout, tmp_path):
    arch = Arch(TIED, {"width": 8})
    torch.manual_seed(7)
    model = randomise(Tied(8)).to(memory_format=layout)
    hidden = model.noise.clone()
    example = torch.randn(2, 3, 5, 7)
    axes = tuple((f"{name}.weight", axis) for name in ("one", "two") for axis in (0, 1))
    edits = [Keep(size=8, kept=(0, 1, 2, 5, 7), axes=(*axes, ("two.bias", 0), ("stem.weight", 0), ("stem.bias", 0)))]
    edits.append(Keep(size=8, kept=(0, 1, 2, 5, 7), axes=(("head.weight", 1),)))
    surgery.apply_all(model, edits)
    saved = save(tmp_path / "c", Draft(arch, tuple(edits), model))
    assert saved.manifest.aliases == {"two.weight": "one.weight"}
    assert "two.weight" not in load_file(saved.path / WEIGHTS)
    built = checkpoint.load(saved.path).build({TIED})
    assert built.two.weight is built.one.weight
    assert torch.equal(built.noise, hidden)
    assert built.noise is not hidden
    assert "noise" not in built.state_dict()  # as in the original
    assert torch.equal(answers(built, example), answers(model, example))
    assert saved.digest == save(tmp_path / "d", Draft(arch, tuple(edits), built)).digest


def test_a_constructor_that_computes_with_its_parameters_is_built_on_the_cpu(tmp_path, monkeypatch):
    (tmp_path / "eager_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Eager(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(3, 7)\n"
        "        self.norm = self.head.weight.detach().norm().item()\n"
        "        self.register_buffer('mask', torch.full((3,), float('-inf')), persistent=False)\n"
        "    def forward(self, x):\n"
        "        return self.head(x.mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arch = Arch("eager_model:Eager")
    model = create(arch, seed=3)
    built = save(tmp_path / "c", Draft(arch, (), model)).build({arch.factory})
    assert torch.equal(answers(built), answers(model))
    assert torch.equal(built.mask, model.mask)


def test_building_leaves_the_random_state_alone(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checkpoint.load(saved).build()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_layout_throughout_whatever_the_surgery_left(tmp_path):
    model = source(layout=torch.channels_last).model
    edits = prune(model, {"layer1.0.conv1": [2]})  # what was cut is contiguous now, the rest is not
    built = save(tmp_path / "c", Draft(RESNET, edits, model)).build()
    assert torch.equal(answers(built), answers(model))


# Digests


def test_the_digest_knows_no_time_and_no_place_but_every_bit(tmp_path):
    first = save(tmp_path / "here", source())
    second = save(tmp_path / "deep" / "there", source(), stage="train", seconds=12.5)
    assert first.digest == second.digest
    assert (first.path / WEIGHTS).read_bytes() == (second.path / WEIGHTS).read_bytes()
    assert str(tmp_path) not in (first.path / FILE_NAME).read_text()
    changed = source()
    bits = changed.model.linear.weight.data.view(torch.int32)
    bits[0, 0] ^= 1
    digests = {first.digest, save(tmp_path / "bit", changed).digest}
    digests.add(save(tmp_path / "layout", source(layout=torch.channels_last)).digest)
    renamed = source()
    surgery.apply_all(renamed.model, edits := (Factor(module="linear", rank=2),))
    digests.add(save(tmp_path / "edited", dataclasses.replace(renamed, edits=edits)).digest)
    digests.add(save(tmp_path / "more", dataclasses.replace(source(), files={"model.onnx": b"x"})).digest)
    assert len(digests) == 5


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, "quantization.json", "model.onnx"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_byte_in_a_file_is_named(copied, name, place):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: is damaged: its SHA-256")):
        checkpoint.load(copied)


def test_any_flipped_byte_in_the_manifest_is_named(copied):
    path = copied / FILE_NAME
    content = path.read_bytes()
    for flip in (0x01, 0x80):
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                manifest.read(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "quantization.json", "model.onnx"])
def test_missing_and_truncated_files_are_named(copied, name):
    path = copied / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    expected = f"{path}: is damaged: {len(content) - 1} bytes, expected {len(content)}"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        checkpoint.load(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: is missing")):
        checkpoint.load(copied)


def test_a_truncated_missing_or_oversized_manifest_is_named(copied, monkeypatch):
    path = copied / FILE_NAME
    content = path.read_bytes()
    monkeypatch.setattr(manifest, "_MAX_BYTES", len(content) - 1)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: is too large")):
        checkpoint.load(copied)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: is damaged")):
        checkpoint.load(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{copied}: is no checkpoint")):
        checkpoint.load(copied)
    path.mkdir()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoint.load(copied)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.load(copied / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "has format version .*; this program reads version 2") for text in ("[]", "null", '"x"', "{}")),
        ("NaN", r"is damaged \(no valid JSON\)"),
        ('{"version": "2"}', "has format version '2'; this program reads version 2"),
        ("[" * 100_000, "no valid JSON"),
        (
            '{"version": 1}',
            "written by an older version of this program, in format version 1; this program reads version 2: run its pipe",
        ),
        (
            '{"version": 3}',
            "written by a newer version of this program, in format version 3; .*: install the newer one",
        ),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused(copied, text, message):
    (copied / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(copied)


def test_a_file_that_the_manifest_does_not_list_is_not_part_of_it(copied):
    (copied / "stray.onnx").write_bytes(b"?")
    loaded = checkpoint.load(copied)
    assert loaded.file("stray.onnx") is None
    assert loaded.file("model.onnx") == copied / "model.onnx"


def test_weights_that_the_manifest_does_not_list_are_refused(copied):
    record = manifest.read(copied)
    forge(copied, files={n: f.model_dump() for n, f in record.files.items() if n != WEIGHTS})
    with pytest.raises(CheckpointError, match=f"lists no {re.escape(WEIGHTS)}"):
        checkpoint.load(copied)


def rewrite(path, change):
    """Other tensors under a manifest that vouches for them."""
    tensors = load_file(path / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    files = {name: record.model_dump() for name, record in manifest.read(path).files.items()}
    forge(path, files={**files, WEIGHTS: manifest.describe_file(path / WEIGHTS).model_dump()})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("bn1.weight"), "1 tensors are missing, first 'bn1.weight' (16,)"),
        (lambda t: t.update(extra=torch.ones(2)), "1 tensors have no place in the model, first 'extra' (2,)"),
        (
            lambda t: t.update({"linear.bias": torch.ones(3)}),
            "1 tensors have another shape, first 'linear.bias' (model (10,), file (3,))",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(copied, change, expected):
    rewrite(copied, change)
    loaded = checkpoint.load(copied)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        loaded.build()


def test_weights_that_are_no_safetensors_are_named(copied):
    (copied / WEIGHTS).write_bytes(b"junk")
    files = {name: record.model_dump() for name, record in manifest.read(copied).files.items()}
    forge(copied, files={**files, WEIGHTS: manifest.describe_file(copied / WEIGHTS).model_dump()})
    with pytest.raises(CheckpointError, match=re.escape(f"{copied / WEIGHTS}: cannot be read")):
        checkpoint.load(copied).build()


# Strangers


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, reachable as file and by name."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\ndef make(**kwargs):\n    raise SystemExit\n"
    (tmp_path / "compress_test_trap.py").write_text(code)
    (tmp_path / "cifar:").mkdir()
    (tmp_path / "cifar:" / "trap.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield mark
    assert not mark.exists()
    assert "compress_test_trap" not in sys.modules


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "compress_test_trap:make",
        "compress_test_trap.py:make",
        "./compress_test_trap.py:make",
        "cifar:trap.py:make",
        "cifar:/trap.py:make",
        "timm:compress_test_trap:make",
        "timm:hf-hub:somebody/model",
        "torchvision.models:resnet18",
        "builtins:exec",
        ":make",
        "make",
        "",
    ],
)
def test_a_strangers_code_is_not_run(copied, trap, factory):
    forge(copied, arch={"factory": factory, "kwargs": {}})
    loaded = checkpoint.load(copied)  # reading is safe
    with pytest.raises(CheckpointError, match="which is code; it is not run unless you say so"):
        loaded.build()
    with pytest.raises(CheckpointError, match="which is code"):
        loaded.build({"another:factory"})


@pytest.mark.parametrize(
    ("factory", "argument"),
    [
        ("torchvision:resnet18", "weights"),
        ("timm:resnet18", "pretrained"),
        ("timm:resnet18", "checkpoint_path"),
        ("timm:resnet18", "pretrained_cfg"),
        ("timm:resnet18", "pretrained_cfg_overlay"),
        ("cifar:resnet20", "weights"),
    ],
)
def test_a_stranger_cannot_make_built_in_factories_read_files(copied, factory, argument):
    forge(copied, arch={"factory": factory, "kwargs": {"num_classes": 3, argument: "/etc/passwd"}})
    with pytest.raises(CheckpointError, match=f"the argument '{argument}', which may fetch or read files"):
        checkpoint.load(copied).build()


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "sub/file", "sub/../model.onnx", ".", "", "a\0b"])
def test_file_names_that_lead_out_of_the_folder_are_refused(copied, name):
    files = {key: record.model_dump() for key, record in manifest.read(copied).files.items()}
    forge(copied, files={**files, name: files["model.onnx"]})
    with pytest.raises(CheckpointError, match=re.escape(f"{copied}: the manifest names the file")):
        checkpoint.load(copied)


def test_links_are_refused(copied, tmp_path):
    elsewhere = (copied / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (copied / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"names the file 'model.onnx', which is not a file of this folder"):
        checkpoint.load(copied)


@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        ({"linear.forward": "linear.weight"}, "ties 'linear.forward' to 'linear.weight'|no place"),
        ({"linear.weight": "linear.forward"}, "ties 'linear.weight' to 'linear.forward'"),
        ({"nowhere.weight": "linear.weight"}, "nowhere.weight"),
        ({"bn1.running_mean": "bn1.weight"}, "ties 'bn1.running_mean' to 'bn1.weight'"),
    ],
)
def test_ties_between_other_things_than_tensors_are_refused(copied, aliases, expected):
    forge(copied, aliases=aliases)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load(copied).build()


def test_edits_that_do_not_fit_the_architecture_are_refused(copied):
    edit = {"edit": "keep", "size": 16, "kept": [0], "axes": [["conv9.weight", 0]]}
    forge(copied, edits=[edit])
    with pytest.raises(CheckpointError, match=re.escape("'conv9'")):
        checkpoint.load(copied).build()


def test_edits_and_weights_must_tell_the_same_story(copied):
    edit = {"edit": "keep", "size": 16, "kept": [0], "axes": [["conv1.weight", 0]]}
    forge(copied, edits=[edit])
    with pytest.raises(CheckpointError, match=re.escape("'conv1.weight' (model (1, 3, 3, 3), file (16, 3, 3, 3))")):
        checkpoint.load(copied).build()


def test_a_changed_manifest_without_its_checksum_is_refused(copied):
    path = copied / FILE_NAME
    content = json.loads(path.read_bytes())
    content["history"][0]["seconds"] = 1e9
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its content does not match its checksum"):
        checkpoint.load(copied)


def test_a_checkpoint_from_before_a_field_was_added_is_whole(copied):
    path = copied / FILE_NAME
    content = json.loads(path.read_bytes())
    for entry in content["history"]:
        del entry["sensitivity"]
    del content["checksum"]
    plain = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**content, "checksum": hashlib.sha256(plain).hexdigest()}))
    assert checkpoint.load(copied).history[0].sensitivity is None


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_json(word, copied):
    path = copied / FILE_NAME
    content = json.loads(path.read_bytes())
    content["history"][0]["seconds"] = float(word)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is damaged \\(no valid JSON\\)"):
        checkpoint.load(copied)


def test_a_number_too_large_for_one_is_damage(copied):
    path = copied / FILE_NAME
    text = path.read_text()
    path.write_text(re.sub(r'"seconds": [0-9.e+-]+', '"seconds": 1e999', text))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(copied)


def test_unknown_keys_are_refused_by_name(copied):
    path = copied / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "factory": "os:system"}))
    with pytest.raises(CheckpointError, match="is damaged: factory"):
        checkpoint.load(copied)


# Saving


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer2.1.conv2.weight", "bn1.running_var"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad, name):
    draft = source()
    draft.model.state_dict()[name].view(-1)[-1] = bad
    with pytest.raises(ModelError, match=re.escape(f"'{name}'")):
        save(tmp_path / "c", draft)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_of_infinities_is_kept(tmp_path):
    draft = source(Arch("test_checkpoint:Masked"))
    again = save(tmp_path / "c", draft).build({"test_checkpoint:Masked"})
    assert torch.equal(again.mask, torch.tensor([0.0, -float("inf")]))
    draft.model.mask[0] = float("nan")
    with pytest.raises(ModelError, match="'mask'"):
        save(tmp_path / "d", draft)


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ModelError, match="'_extra_state' is a dict, not a tensor"):
        save(tmp_path / "c", Draft(RESNET, (), Stateful(2, 2)))


@pytest.mark.parametrize("where", ["save_file", "manifest.dump", "files"])
def test_a_failing_save_leaves_nothing_behind_and_what_was_there_as_it_was(tmp_path, monkeypatch, where):
    path = tmp_path / "c"
    before = save(path, source()).digest

    def fail(*_):
        raise OSError(28, os.strerror(28))

    draft = source()
    if where == "files":
        draft = dataclasses.replace(draft, files={"no/such/folder.onnx": b"x"})
    else:
        monkeypatch.setattr(f"compress.checkpoint.{where}", fail)
    with pytest.raises(CompressError, match=re.escape(f"{path}: cannot be written")):
        save(path, draft)
    with pytest.raises(CompressError, match="cannot be written"):
        save(tmp_path / "fresh", draft)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert checkpoint.load(path).digest == before


def test_saving_over_a_checkpoint_replaces_it(tmp_path):
    first = save(tmp_path / "c", dataclasses.replace(source(), files={"model.onnx": b"x"}))
    second = save(tmp_path / "c", source())
    assert first.digest != second.digest
    assert sorted(entry.name for entry in second.path.iterdir()) == [FILE_NAME, WEIGHTS]
    assert checkpoint.load(tmp_path / "c") == second


def test_saving_does_not_change_what_the_model_computes(tmp_path):
    draft = source()
    before, state = answers(draft.model), copy.deepcopy(draft.model.state_dict())
    save(tmp_path / "c", draft)
    assert torch.equal(answers(draft.model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in draft.model.state_dict().items())


# No pickle


def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_in_the_package_reads_or_writes_pickle():
    package = Path(compress.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        for name, keywords in _calls(ast.parse(path.read_text())):
            assert not name.startswith(("pickle.", "joblib.", "shelve.", "dill.", "cloudpickle.")), path
            assert name not in ("torch.save", "torch.jit.load", "torch.jit.save", "eval", "exec"), path
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name == "np.load":
                assert keywords.get("allow_pickle") == "False", path
