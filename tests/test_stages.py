"""One battery over all stages, then what each promises for itself."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from compress import checkpoint as checkpoints
from compress.config import STAGE_CONFIGS
from compress.edits import Factor, Keep
from compress.errors import ExportError, StageError
from compress.models.cost import macs, parameters
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import TARGETS, quantize
from compress.stages import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}


@pytest.fixture(scope="session")
def settings(tiny):
    """For each stage, settings that take little time."""
    return {
        "train": QUICK,
        "distill": {"student": {"factory": tiny.factory, "kwargs": {"width": 12}}, **QUICK},
        "prune": {"target": {"macs": 0.7}, "recovery": None},
        "factorize": {"target": {"energy": 0.5}, "multiple": 1, "min_saving": 0.05},
        "quantize": {"calibration": {"samples": 32}},
        "export": {"agreement": 0.1},
    }


@pytest.fixture(scope="session")
def made(shared_workshop, trained, settings):
    """The checkpoint of a chain of stages from the trained model; each is made once."""
    known = {(): trained}

    def make(*chain):
        if chain not in known:
            before = make(*chain[:-1])
            torch.set_num_threads(1)
            known[chain] = shared_workshop.run(before, chain[-1], reference=trained, **settings[chain[-1]])
        return known[chain]

    return make


def parent_of(kind, made):
    """A float checkpoint, the quantized one for `export`."""
    return made("quantize") if kind == "export" else made()


def warnings_of(checkpoint):
    return checkpoint.history[-1].warnings


def notes_of(checkpoint):
    return checkpoint.history[-1].notes


def content(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.path.iterdir()}


def examples(data, n=7):
    return next(iter(data.validation.batches(n))).inputs[0]


def answers(model, inputs):
    with torch.no_grad():
        return model(inputs)


def infer(model, inputs):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(inputs)})[0]


def macs_of(model):
    return macs(model, (torch.zeros(1, 1, 12, 8),))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# All stages


def test_the_battery_knows_every_stage(settings):
    assert set(settings) == set(STAGES) == set(STAGE_CONFIGS)


@pytest.mark.parametrize("kind", STAGES)
def test_input_untouched_same_seed_same_digest_reload_same_outputs(kind, made, workshop, settings):
    parent = parent_of(kind, made)
    before = content(parent)
    first = workshop.run(parent, kind, seed=3, **settings[kind])
    assert content(parent) == before
    second = workshop.run(parent, kind, seed=3, **settings[kind])
    assert first.digest == second.digest
    draft, _ = workshop.draft(parent, kind, seed=4, **settings[kind])
    saved = workshop._keep(draft, parent.history)
    inputs = examples(workshop.dataset)
    assert torch.equal(answers(draft.model, inputs), answers(workshop.build(saved), inputs))
    assert (saved.digest == first.digest) == (kind not in ("train", "distill", "quantize"))
    assert first.form == STAGE_CONFIGS[kind].gives
    if kind in ("train", "distill", "prune", "factorize"):
        assert parameters(workshop.build(first)) <= parameters(workshop.build(parent))


def legal_chains():
    """All chains of two stages, and of three where the last is not an export or a quantization of another float chain."""
    for length in (2, 3):
        for chain in itertools.product(STAGES, repeat=length):
            form, legal = "float", True
            for kind in chain:
                legal = legal and form in STAGE_CONFIGS[kind].takes
                form = STAGE_CONFIGS[kind].gives
            converts_once = (
                length == 2 or chain[-1] not in ("quantize", "export") or chain[-2:] == ("quantize", "export")
            )
            if legal and converts_once:
                yield chain


@pytest.mark.parametrize(
    "chain", [*legal_chains(), ("prune", "factorize", "quantize", "export")], ids=lambda chain: "-".join(chain)
)
def test_every_legal_chain(chain, made, shared_workshop):
    parent, result = made(*chain[:-1]), made(*chain)
    reloaded = checkpoints.load(result.path)
    assert reloaded.digest == result.digest
    assert [entry.stage for entry in result.history] == ["source", "train", *chain]
    assert result.history[-1].parent == parent.digest
    model = shared_workshop.build(result)
    inputs = examples(shared_workshop.dataset)
    logits = answers(model, inputs)
    assert logits.shape == (7, 4)
    assert torch.isfinite(logits).all()
    file = result.file("model.onnx") or result.file("model.int8.onnx")
    if file:
        assert infer(file, inputs).shape == (7, 4)
    before = shared_workshop.build(parent)
    if chain[-1] == "distill":
        too_large = parameters(model) >= parameters(before)
        assert any("nothing gets smaller" in text for text in warnings_of(result)) == too_large
    else:
        assert parameters(model) <= parameters(before)
        assert macs_of(model) <= macs_of(before)


@pytest.mark.parametrize("kind", STAGES)
def test_the_source_straight_into_each_stage(kind, workshop, settings):
    result = workshop.run(workshop.source(), kind, **settings[kind])
    assert workshop.build(result) is not None


class Forbidden:
    """Stands for a split that a stage has no reason to read."""

    def __getattr__(self, name):
        raise AssertionError(f"read {name}")


@pytest.mark.parametrize("kind", STAGES)
def test_no_stage_gets_the_test_split(kind, made, workshop, settings):
    data = workshop.dataset.for_decisions()
    assert not hasattr(data, "test")
    result = workshop.run(parent_of(kind, made), kind, data=data, **settings[kind])
    workshop.dataset = dataclasses.replace(workshop.dataset, test=Forbidden())
    assert workshop.run(parent_of(kind, made), kind, **settings[kind]).digest == result.digest


# Doing nothing is loud


@pytest.mark.parametrize(
    ("kind", "target"), [("prune", {"ratio": 0.5}), ("factorize", {"energy": 0.5}), ("factorize", {"ratio": 0.3})]
)
def test_a_stage_that_changes_nothing_says_what_excluded_the_layers(kind, target, made, workshop):
    result = workshop.run(made(), kind, target=target, protect=["*"], recovery=None)
    assert any(f"nothing was {kind}d:" in text and "protected by '*'" in text for text in warnings_of(result))
    assert result.edits == ()
    inputs = examples(workshop.dataset)
    assert torch.equal(answers(workshop.build(result), inputs), answers(workshop.build(made()), inputs))


def test_nothing_to_factorize_at_full_rank_is_said(made, workshop):
    result = workshop.run(made(), "factorize", target={"energy": 0.9999999})
    assert any("nothing was factorized: conv1 (saves less than" in text for text in warnings_of(result))


def test_nothing_to_prune_at_a_tiny_ratio_is_said(made, workshop):
    result = workshop.run(made(), "prune", target={"ratio": 0.01}, recovery=None)
    assert any("no group can lose a multiple of 4 channels" in text for text in warnings_of(result))


@pytest.mark.parametrize(("kind", "key"), [("prune", "protect"), ("factorize", "protect"), ("quantize", "keep_float")])
def test_a_pattern_that_matches_nothing_is_named(kind, key, made, workshop, settings):
    pattern = "conv22" if kind != "quantize" else "nod?_of_nowhere"
    result = workshop.run(made(), kind, **{**settings[kind], key: [pattern]})
    (text,) = [text for text in warnings_of(result) if "matches nothing" in text]
    assert text.startswith(f"{kind}.{key}: '{pattern}' matches nothing")
    assert ("did you mean 'conv2'?" in text) == (kind != "quantize")


@pytest.mark.parametrize("kind", ["prune", "factorize"])
def test_protected_layers_keep_their_shape(kind, made, workshop):
    result = workshop.run(made(), kind, target={"ratio": 0.2}, protect=["conv?"], recovery=None)
    model = workshop.build(result)
    assert [model.get_submodule(name).weight.shape[0] for name in ("conv1", "conv2", "conv3")] == [16, 32, 32]
    assert parameters(model) < parameters(workshop.build(made()))


@pytest.mark.parametrize(
    ("kind", "asked", "named"),
    [
        ("prune", {"target": {"macs": 0.01}}, r"prune.target.macs: 0.01 cannot be reached: 0\.0\d+ remains .* floor"),
        ("prune", {"target": {"parameters": 0.001}}, r"prune.target.parameters: 0.001 cannot be reached: 0\.0\d+ re"),
        ("prune", {"protect": ["conv*"]}, r"0\.\d+ remains .* left alone: .*conv1 \(protected by 'conv\*'\)"),
        ("prune", {"protect": ["*"]}, r"1\.000 remains .* left alone: .*conv1 \(protected by '\*'\)"),
        ("factorize", {"target": {"macs": 0.01}}, r"factorize.target.macs: 0.01 cannot be reached: 0\.\d+ remains"),
        ("factorize", {"protect": ["*"]}, r"1\.000 remains .* left alone: .*conv1 \(protected by '\*'\)"),
    ],
)
def test_a_target_out_of_reach_names_what_can_be_reached(kind, asked, named, made, workshop):
    with pytest.raises(StageError, match=named):
        workshop.run(made(), kind, **{"recovery": None, **asked})


# Prune


@pytest.mark.parametrize("factory", ["make", "separable", "branches"])
@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
def test_prune_meets_a_target_of_macs(factory, target, workshop, tiny):
    source = workshop.source(tiny.named(factory))
    result = workshop.run(source, "prune", target={"macs": target}, multiple=1, recovery=None)
    remains = macs_of(workshop.build(result)) / macs_of(workshop.build(source))
    assert target - 0.1 < remains <= target
    assert f"{100 * remains:.1f} % of the MACs" in notes_of(result)[0]


@pytest.mark.parametrize("factory", ["make", "separable", "branches"])
@pytest.mark.parametrize("target", [0.8, 0.4])
def test_prune_meets_a_target_of_parameters(factory, target, workshop, tiny):
    source = workshop.source(tiny.named(factory))
    result = workshop.run(source, "prune", target={"parameters": target}, multiple=1, recovery=None)
    remains = parameters(workshop.build(result)) / parameters(workshop.build(source))
    assert target - 0.1 < remains <= target


def test_prune_by_ratio(workshop):
    result = workshop.run(workshop.source(), "prune", target={"ratio": 0.25}, recovery=None)
    model = workshop.build(result)
    assert [model.get_submodule(name).weight.shape[0] for name in ("conv1", "conv2", "conv3", "hidden", "head")] == [
        12,
        24,
        24,
        24,
        4,
    ]


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_what_remains_is_a_multiple_and_not_below_the_floor(multiple, workshop):
    floor = 0.3
    result = workshop.run(
        workshop.source(width=18), "prune", target={"ratio": 0.99}, multiple=multiple, floor=floor, recovery=None
    )
    kept = [(edit.size, len(edit.kept)) for edit in result.edits if isinstance(edit, Keep)]
    assert kept
    for size, left in kept:
        assert left % multiple == 0
        assert left >= floor * size
        assert left < floor * size + multiple


def test_the_least_l1_norms_go_and_the_rest_stays_as_it_was(workshop):
    source = workshop.source()
    before = workshop.build(source)
    result = workshop.run(source, "prune", target={"ratio": 0.5}, protect=["conv[23]", "hidden"], recovery=None)
    after = workshop.build(result)
    norms = before.conv1.weight.abs().sum((1, 2, 3)) + before.conv2.weight.abs().sum((0, 2, 3))
    kept = sorted(norms.argsort(descending=True)[:8].tolist())
    assert torch.equal(after.conv1.weight, before.conv1.weight[kept])
    assert torch.equal(after.bn1.running_var, before.bn1.running_var[kept])
    assert torch.equal(after.conv2.weight, before.conv2.weight[:, kept])
    assert torch.equal(after.conv3.weight, before.conv3.weight)


def test_residual_streams_with_option_a_shortcuts_are_pruned(workshop):
    source = workshop.source("cifar:resnet20", num_classes=4, in_channels=1)
    result = workshop.run(source, "prune", target={"macs": 0.5}, recovery=None)
    assert not [text for text in warnings_of(result) if "left alone" in text]
    model = workshop.build(result)
    for stage, channels in zip((model.layer1, model.layer2, model.layer3), (16, 32, 64), strict=True):
        (width,) = {block.conv2.out_channels for block in stage}
        assert width < channels
        assert width % 4 == 0
    for stage, narrow in ((model.layer2, model.layer1), (model.layer3, model.layer2)):
        assert sum(stage[0].shortcut.pad) == stage[0].conv2.out_channels - narrow[0].conv2.out_channels
    assert 0.45 < macs_of(model) / macs_of(workshop.build(source)) <= 0.5


def test_recovery_learns_from_the_reference_and_null_leaves_it_out(made, workshop):
    teacher = made()
    settings = {"target": {"macs": 0.4}}
    recovery = {**QUICK, "epochs": 3, "optimizer": "adamw", "learning_rate": 0.01}
    plain = workshop.run(teacher, "prune", recovery=None, **settings)
    recovered = workshop.run(teacher, "prune", recovery=recovery, **settings)
    assert plain.history[-1].training == ()
    assert any("without recovery training" in text for text in notes_of(plain))
    assert [row["epoch"] for row in recovered.history[-1].training] == [1, 2, 3]
    correct = [
        int(
            (
                answers(workshop.build(one), examples(workshop.dataset, 96)).argmax(1)
                == workshop.dataset.validation.labels
            ).sum()
        )
        for one in (plain, recovered)
    ]
    assert correct[1] > correct[0]
    other = workshop.run(teacher, "prune", recovery=recovery, reference=workshop.source(seed=9), **settings)
    assert other.digest != recovered.digest
    labels = {**recovery, "losses": [{"labels": {}}]}
    alone = [
        workshop.run(teacher, "prune", recovery=labels, reference=reference, **settings).digest
        for reference in (teacher, workshop.source(seed=9))
    ]
    assert alone[0] == alone[1]


def test_recovery_that_only_harms_is_undone(made, workshop):
    harmful = {"epochs": 1, "batch_size": 16, "learning_rate": 5.0, "schedule": "constant", "gradient_clip": 1.0}
    plain = workshop.run(made(), "prune", target={"macs": 0.9}, recovery=None)
    result = workshop.run(made(), "prune", target={"macs": 0.9}, recovery=harmful)
    assert any("the weights before it are kept" in text for text in notes_of(result))
    assert same(workshop.build(plain).state_dict(), workshop.build(result).state_dict())


# Factorize


@pytest.mark.parametrize("target", [{"energy": 0.6}, {"ratio": 0.3}, {"macs": 0.7}])
def test_factorize_splits_only_where_it_saves(target, made, workshop):
    result = workshop.run(made(), "factorize", target=target, batchnorm_samples=0)
    edits = [edit for edit in result.edits if isinstance(edit, Factor)]
    assert edits
    before, after = workshop.build(made()), workshop.build(result)
    for edit in edits:
        whole, pair = before.get_submodule(edit.module), after.get_submodule(edit.module)
        assert sum(layer.weight.numel() for layer in pair) <= 0.7 * whole.weight.numel()  # min_saving: 0.3
        assert edit.rank % 4 == 0
    for name, module in before.named_modules():
        if name and name not in {edit.module for edit in edits}:
            assert same(module.state_dict(), after.get_submodule(name).state_dict())
    assert macs_of(after) < macs_of(before)
    if "macs" in target:
        assert 0.7 - 0.15 < macs_of(after) / macs_of(before) <= 0.7


def test_the_ratio_counts_from_the_full_rank_and_never_gives_rank_zero(made, workshop):
    result = workshop.run(made(), "factorize", target={"ratio": 0.25}, protect=["conv*"])
    assert [(edit.module, edit.rank) for edit in result.edits] == [("hidden", 8)]
    least = workshop.run(made(), "factorize", target={"ratio": 0.001})
    assert {edit.rank for edit in least.edits} == {4}


def test_the_factors_are_the_best_approximation(made, workshop):
    result = workshop.run(made(), "factorize", target={"ratio": 0.25}, truncation="weights", batchnorm_samples=0)
    before, after = workshop.build(made()), workshop.build(result)
    edit = next(edit for edit in result.edits if edit.module == "conv3")
    weight = before.conv3.weight.detach().flatten(1).double().numpy()
    first, second = (layer.weight.detach().flatten(1).double().numpy() for layer in after.conv3)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(second @ first, (u[:, : edit.rank] * s[: edit.rank]) @ vt[: edit.rank], atol=1e-5)
    assert torch.equal(after.conv3[1].bias, before.conv3.bias)


def test_a_factorized_layer_is_not_factorized_again(made, workshop):
    once = workshop.run(made(), "factorize", target={"ratio": 0.25})
    twice = workshop.run(once, "factorize", target={"ratio": 0.5}, multiple=1, min_saving=0.01)
    modules = [edit.module for edit in twice.edits if isinstance(edit, Factor)]
    assert len(modules) == len(set(modules))
    assert not any(module.endswith((".0", ".1")) for module in modules)


def test_grouped_convolutions_are_left_alone(workshop, tiny):
    result = workshop.run(workshop.source(tiny.named("separable")), "factorize", target={"ratio": 0.2})
    assert "depthwise" not in {edit.module for edit in result.edits}
    assert "pointwise" in {edit.module for edit in result.edits}


# Quantize


@pytest.mark.parametrize("target", TARGETS)
def test_the_int8_graph_follows_from_weights_and_record(target, made, workshop):
    settings = {"calibration": {"samples": 64}, "target": target}
    result = workshop.run(made("prune"), "quantize", **settings)
    record = json.loads(result.file("quantization.json").read_bytes())
    assert record["target"] == target
    assert record["activations"] == TARGETS[target].activations
    graph = to_onnx(workshop.build(result), workshop.dataset.inputs)
    ranges = {name: (low, high) for name, (low, high) in record["ranges"].items()}
    again = serialized(quantize(graph, ranges, TARGETS[record["target"]], record["keep_float"]))
    assert again == result.file("model.onnx").read_bytes()
    signed = record["activations"] == "int8"
    for name, scale in record["scales"].items():
        assert scale["scale"] > 0
        assert -128 <= scale["zero_point"] <= 127 if signed else 0 <= scale["zero_point"] <= 255
        low, high = ranges[name.removesuffix("_QuantizeLinear_Input")]  # the output itself keeps its name
        width = 2 * max(abs(low), abs(high)) / 254 if signed else (max(high, 0) - min(low, 0)) / 255
        assert scale["scale"] == pytest.approx(width, rel=0.02)


def test_weights_are_int8_per_channel(made):
    graph = onnx.load(made("quantize").file("model.onnx")).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [array for array in constants.values() if array.dtype == np.int8 and array.ndim == 4]
    assert sorted(array.shape[0] for array in weights) == [16, 32, 32]
    sizes = {node.input[0]: constants[node.input[1]].size for node in graph.node if node.op_type == "DequantizeLinear"}
    for name, array in constants.items():
        if array.dtype == np.int8 and array.ndim == 4:
            assert sizes[name] == array.shape[0]


def test_reduced_range_uses_seven_bits(made, workshop):
    result = workshop.run(made(), "quantize", calibration={"samples": 32}, target="x86-avx2")
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(result.file("model.onnx")).graph.initializer]
    assert max(int(np.abs(array.astype(int)).max()) for array in arrays if array.dtype == np.int8 and array.ndim) <= 64


def test_a_layer_kept_in_float_keeps_its_weights(made, workshop):
    names = [
        node.name
        for node in to_onnx(workshop.build(made()), workshop.dataset.inputs).graph.node
        if node.op_type == "Conv"
    ]
    result = workshop.run(made(), "quantize", calibration={"samples": 32}, keep_float=[names[0]])
    assert json.loads(result.file("quantization.json").read_bytes())["keep_float"] == [names[0]]
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(result.file("model.onnx")).graph.initializer]
    assert sum(array.dtype == np.int8 and array.ndim == 4 for array in arrays) == 2
    assert sum(array.dtype == np.float32 and array.ndim == 4 for array in arrays) == 1


class Watched:
    """A split that remembers which of its samples were taken and in how large batches they were read."""

    name = "train"

    def __init__(self, split):
        self.split, self.labels, self.taken, self.sizes = split, split.labels, [], []

    def __len__(self):
        return len(self.split)

    def take(self, indices):
        self.taken = list(indices)
        other = Watched(self.split.take(indices))
        other.sizes = self.sizes
        return other

    def batches(self, batch_size, *, seed=None, drop_last=False):
        assert seed is None, "calibration must not be augmented"
        for batch in self.split.batches(batch_size, drop_last=drop_last):
            self.sizes.append(len(batch.labels))
            yield batch


def test_calibration_draws_chunks_from_train_alone(made, workshop):
    data = workshop.dataset.for_decisions()
    train = Watched(data.train)
    spied = dataclasses.replace(data, train=train, validation=Forbidden())
    workshop.run(made(), "quantize", data=spied, calibration={"samples": 50, "chunk": 8})
    assert sum(train.sizes) == 50
    assert max(train.sizes) == 8
    assert len(set(train.taken)) == 50
    counts = torch.bincount(train.labels[train.taken])
    assert counts.min() >= 12


def test_chunks_do_not_change_the_ranges(made, workshop):
    found = [
        json.loads(
            workshop.run(made(), "quantize", calibration={"samples": 48, "chunk": chunk})
            .file("quantization.json")
            .read_bytes()
        )["ranges"]
        for chunk in (5, 48)
    ]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5, abs=1e-6)


def test_more_calibration_samples_than_there_are_is_said(made, workshop):
    result = workshop.run(made(), "quantize", calibration={"samples": 1000})
    assert warnings_of(result) == ("calibration uses all 160 training samples; 1000 were asked for",)


def test_a_quantized_model_answers_nearly_as_its_float_weights(made, workshop):
    result = workshop.run(made(), "quantize", calibration={"samples": 160})
    inputs = examples(workshop.dataset, 96)
    float_answers = answers(workshop.build(result), inputs).numpy()
    int8_answers = infer(result.file("model.onnx"), inputs)
    assert np.mean(float_answers.argmax(1) == int8_answers.argmax(1)) > 0.9
    assert np.abs(float_answers - int8_answers).max() < 0.2 * np.abs(float_answers).max()


# Export


@pytest.fixture(params=["float", "int8"])
def exported(request, made):
    return made("export") if request.param == "float" else made("prune", "factorize", "quantize", "export")


def files_of(exported):
    names = set(exported.manifest.files) - {"model.safetensors"}
    return {name: exported.file(name) for name in names}


def test_exported_files(exported):
    expected = {"model.fp32.onnx", "metadata.json"}
    if exported.history[-2].stage == "quantize":
        expected.add("model.int8.onnx")
    assert set(files_of(exported)) == expected


def test_what_a_user_needs_to_know_is_in_every_file(exported, workshop):
    data, parent = workshop.dataset, exported.history[-1].parent
    beside = json.loads(exported.file("metadata.json").read_bytes())
    found = [beside]
    for name, path in files_of(exported).items():
        if name.endswith(".onnx"):
            props = onnx.load(path).metadata_props
            found.append({prop.key.removeprefix("compress."): json.loads(prop.value) for prop in props})
            assert all(prop.key.startswith("compress.") for prop in props)
    assert len(found) == len(files_of(exported))
    for metadata in found:
        assert metadata["classes"] == ["north", "east", "south", "west"]
        (given,), (answer,) = metadata["inputs"], metadata["outputs"]
        assert (given["name"], given["shape"], given["dtype"]) == ("input", ["batch", 1, 12, 8], "float32")
        assert (given["mean"], given["std"]) == (list(data.inputs[0].mean), list(data.inputs[0].std))
        assert given["scaled_to"] == [0.0, 1.0]
        assert answer == {"name": "logits", "shape": ["batch", 4], "dtype": "float32"}
        assert [entry["stage"] for entry in metadata["lineage"]] == [entry.stage for entry in exported.history]
        assert metadata["lineage"][-1]["made_from"] == parent
        assert metadata["accuracy"]["validation"] == {"percent": 90.0}
        assert metadata["model"] == "model.py:make"
    assert beside["verification"]["fp32_max_error"] <= 1e-4


def test_no_local_path_and_no_source_line_inside_any_file(exported, tiny):
    secrets = [str(tiny.root), str(exported.path), str(Path.cwd()), str(Path.home()), "site-packages", '.py"', "self."]
    for name, path in files_of(exported).items():
        found = path.read_bytes()
        for secret in secrets:
            if not (name == "metadata.json" and secret == '.py"'):
                assert secret.encode() not in found, (name, secret)
        if name.endswith(".onnx"):
            graph = onnx.load(path).graph
            assert not any(part.metadata_props or part.doc_string for part in (*graph.node, *graph.initializer))


def test_any_batch_size_gives_the_same_answers(exported, workshop):
    inputs = examples(workshop.dataset, 9)
    expected = answers(workshop.build(exported), inputs).numpy()
    for name, path in files_of(exported).items():
        if not name.endswith(".onnx"):
            continue
        graph = onnx.load(path).graph
        (given,), (given_back,) = graph.input, graph.output
        assert (given.name, given_back.name) == ("input", "logits")
        shapes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (given, given_back)]
        assert shapes == [["batch", 1, 12, 8], ["batch", 4]]
        whole = infer(path, inputs)
        for start, stop in ((0, 1), (0, 9), (2, 5)):
            np.testing.assert_allclose(infer(path, inputs[start:stop]), whole[start:stop], atol=1e-5)
        if "fp32" in name:
            np.testing.assert_allclose(whole, expected, atol=1e-4 * np.abs(expected).max())


def test_the_exported_int8_file_is_the_checkpoints(made, workshop):
    parent, exported = made("prune", "factorize", "quantize"), made("prune", "factorize", "quantize", "export")
    inputs = examples(workshop.dataset, 96)
    file = exported.file("model.int8.onnx")
    np.testing.assert_array_equal(infer(parent.file("model.onnx"), inputs), infer(file, inputs))
    stripped = onnx.load(file)
    stripped.ClearField("metadata_props")
    assert serialized(stripped) == parent.file("model.onnx").read_bytes()


def scaled(graph, factor):
    """The graph with its first weights multiplied."""
    tensor = next(t for t in graph.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return graph


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_float_file_that_computes_something_else_is_not_handed_over(factor, made, workshop, monkeypatch):
    monkeypatch.setattr("compress.stages.export.float_graph", lambda _, *args: scaled(to_onnx(*args), factor))
    with pytest.raises(ExportError, match=r"model.fp32.onnx differs from the checkpoint by .* more than export.tol"):
        workshop.run(made(), "export")
    assert not workshop.folder.exists()


def test_an_invalid_graph_is_not_handed_over(made, workshop, monkeypatch):
    def broken(_, *args):
        graph = to_onnx(*args)
        graph.graph.node[0].op_type = "Convolute"
        return graph

    monkeypatch.setattr("compress.stages.export.float_graph", broken)
    with pytest.raises(ExportError, match=r"export: model.fp32.onnx is no valid ONNX: "):
        workshop.run(made(), "export")
    assert not workshop.folder.exists()


def test_an_int8_file_that_answers_otherwise_is_not_handed_over(made, workshop):
    parent = workshop.run(made(), "quantize", calibration={"samples": 32})
    path = parent.file("model.onnx")
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.int8 and array.ndim == 2:
            tensor.CopyFrom(numpy_helper.from_array(-array, tensor.name))
    path.write_bytes(serialized(graph))
    made_before = sorted(workshop.folder.iterdir())
    with pytest.raises(ExportError, match=r"model.int8.onnx answers as its float weights on .* % of the validation"):
        workshop.run(parent, "export")
    assert sorted(workshop.folder.iterdir()) == made_before


def test_metadata_must_not_change_what_the_int8_file_computes(made, workshop, monkeypatch):
    from compress.stages import export

    def meddling(proto, props):
        described = add_metadata(proto, props)
        for tensor in described.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.int8 and array.ndim == 4:
                tensor.CopyFrom(numpy_helper.from_array(np.roll(array, 1), tensor.name))
        return described

    add_metadata = export.add_metadata
    monkeypatch.setattr(export, "add_metadata", meddling)
    with pytest.raises(ExportError, match=r"model.int8.onnx computes something else than the checkpoint's model.onnx"):
        workshop.run(made("quantize"), "export")
    assert not workshop.folder.exists()
