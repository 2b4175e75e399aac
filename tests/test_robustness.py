"""`compress robustness`: planted models whose weaknesses are known, options, tables, JSON and the page."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser, Tab
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from compress import cli, load_pipeline
from compress.config.robustness import RobustnessConfig
from compress.data.load import load_data
from compress.errors import CompressError
from compress.events import Silent
from compress.methods.corruptions import FAMILIES, VALUE_FAMILIES
from compress.methods.robustness import mean_difference, mean_share
from compress.methods.statistics import Z, paired_difference
from compress.report.robustness import render_robustness
from compress.robustness import RobustnessSettings, measure_robustness
from compress.robustness_results import RobustnessResults
from compress.terminal.console import make_console
from compress.terminal.robustness_tables import robustness_tables

# Of two classes the whole image is dark or bright, and one pixel in its corner is the other way round.
PLANTED = '''
import torch
from torch import nn


class Reads(nn.Module):
    """Sure of the second class where what it reads is brighter than grey; a pixel is 0.25 x + 0.5."""

    def __init__(self, sign, gain=8.0):
        super().__init__()
        self.scale = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.scale.weight.copy_(torch.tensor([[-sign * gain], [sign * gain]]))

    def forward(self, x):
        return self.scale(self.read(x))


class Brightness(Reads):
    def read(self, x):
        return x.mean((2, 3))


class Corner(Reads):
    def read(self, x):
        return x[:, :, 0, 0]


class Blind(Brightness):
    """Its answers have no gradient."""

    def forward(self, x):
        return super().forward((x * 100).round() / 100)


class Sums(nn.Module):
    """Of four features, of which the last is idle."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0, -1.0, -1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))

    def forward(self, x):
        return self.head(x)


def brightness():
    return Brightness(1.0)


def corner():
    return Corner(-1.0)


def blind():
    return Blind(1.0)


sums = Sums
'''
NORMALIZE = {"mean": [0.5], "std": [0.25]}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch, one_thread):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


class Recorded(Silent):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def planted_images(n, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = np.where(labels, 0.66, 0.34)[:, None, None, None] + rng.uniform(-0.01, 0.01, (n, 10, 8, 1))
    pixels[:, 0, 0, 0] = np.where(labels, 0.34, 0.66)
    return (pixels * 255).round().astype(np.uint8), labels


class Project:
    """A folder with planted models as checkpoints, data, and pipeline files."""

    def __init__(self, root):
        self.root = root
        (root / "planted.py").write_text(PLANTED)
        arrays = {
            "images": {
                "train": planted_images(40, 0),
                "validation": planted_images(30, 1),
                "test": planted_images(60, 2),
            },
            "features": {name: self._features(n, n) for name, n in (("train", 300), ("validation", 50), ("test", 200))},
            "tokens": {
                name: (np.arange(4 * n).reshape(n, 4) % 7, np.arange(n) % 2)
                for name, n in (("train", 20), ("validation", 10), ("test", 10))
            },
        }
        for kind, splits in arrays.items():
            (root / kind).mkdir()
            for name, (inputs, labels) in splits.items():
                np.save(root / kind / f"{name}_images.npy", inputs)
                np.save(root / kind / f"{name}_labels.npy", labels)
        for kind in arrays:
            data = {"kind": "arrays", "root": kind, "classes": ["dark", "bright"], "validation": {"from": "given"}}
            data |= {"normalize": NORMALIZE} if kind == "images" else {"layout": "any"}
            document = {"name": "planted", "data": data, "model": {"factory": "planted.py:brightness"}}
            (root / f"{kind}.yaml").write_text(json.dumps(document))

    def _features(self, n, seed):
        values = np.random.default_rng(seed).normal(0, 1, (n, 4)).astype(np.float32)
        return values, (values[:, :3].sum(1) > 0).astype(np.int64)

    def pipeline(self, kind="images", overrides=()):
        return load_pipeline(self.root / f"{kind}.yaml", overrides)

    def checkpoint(self, name, kind="images"):
        from compress import checkpoint
        from compress.config import ModelConfig
        from compress.manifest import HistoryEntry
        from compress.stages import source

        path = self.root / f"checkpoints/{name}"
        if not path.exists():
            data = load_data(self.pipeline(kind).data, 0)
            draft = source.make(ModelConfig(factory=f"{self.root / 'planted.py'}:{name}"), 0)
            history = (HistoryEntry(stage=name, parent=None, settings={}, seconds=0.0),)
            checkpoint.save(path, draft, inputs=data.inputs, classes=data.classes, history=history, key={})
        return path

    def onnx(self, name, kind="images"):
        from compress import checkpoint
        from compress.data.base import Input
        from compress.onnx_io.convert import serialized, to_onnx

        path = self.root / f"{name}_file.onnx"
        if not path.exists():
            loaded = checkpoint.load(self.checkpoint(name, kind))
            inputs = [Input(each.name, each.shape, each.dtype, each.mean, each.std) for each in loaded.inputs]
            path.write_bytes(serialized(to_onnx(loaded.build({loaded.arch.factory}), inputs)))
        return path


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("planted"))


def settings(project, kind="images", overrides=(), trust_code=True, command="", families=None, attacks=None, **config):
    return RobustnessSettings(
        RobustnessConfig(**config),
        project.pipeline(kind, overrides),
        families,
        attacks,
        trust_code=trust_code,
        command=command,
    )


@pytest.fixture(scope="session")
def measured(project):
    """Both planted models, and the second again as a bare file, under everything."""
    targets = [project.checkpoint("brightness"), project.checkpoint("corner"), project.onnx("corner")]
    import torch

    torch.set_num_threads(1)
    return measure_robustness(targets, settings(project, command="compress x", epsilons=(8.0, 64.0)), Silent())


def percents(results, name, family):
    (target,) = (target for target in results.targets if target.name == name)
    for under in target.corruptions:
        if under.family == family:
            return [level.accuracy.percent for level in under.levels]
    for under in target.attacks:
        if under.attack == family:
            return [level.accuracy.percent for level in under.levels]
    raise AssertionError(family)


def names(results):
    return [target.name for target in results.targets]


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_clean_samples_are_all_answered_right(measured):
    assert names(measured) == ["brightness", "corner", "corner_file"]
    assert [(target.clean.correct, target.clean.n) for target in measured.targets] == [(60, 60)] * 3


def test_a_model_that_reads_the_mean_is_hurt_by_brightness_alone(measured):
    first = names(measured)[0]
    for family in ("missing_pixels", "contrast", "gaussian_noise", "gaussian_blur", "pixelate", "impulse_noise"):
        assert percents(measured, first, family) == [100.0] * 5, family
    # 0.34 + 0.15 is darker than grey, 0.34 + 0.2 is brighter.
    assert percents(measured, first, "brightness") == [100.0, 100.0, 100.0, 50.0, 50.0]


def test_a_model_that_reads_a_pixel_is_hurt_where_that_is_lost(measured):
    """A lost pixel becomes the mean, which here says the opposite."""
    for name in names(measured)[1:]:
        found = percents(measured, name, "missing_pixels")
        assert found == sorted(found, reverse=True)
        assert found[0] == pytest.approx(90, abs=12)
        assert found[-1] == pytest.approx(40, abs=20)
    under = next(under for under in measured.targets[1].corruptions if under.family == "missing_pixels")
    assert under.levels[-1].difference.points == pytest.approx(under.levels[-1].accuracy.percent - 100)
    assert under.levels[-1].difference.high < 0
    assert under.mean.points == pytest.approx(under.mean.percent - 100)
    assert under.mean.points_low < under.mean.points < under.mean.points_high < 0


def test_attacks_move_what_a_model_reads_by_epsilon(measured):
    brightness, corner, _ = measured.targets
    for attack in ("fgsm", "pgd"):
        # 0.66 - 8/255 is still bright, 0.66 - 64/255 is not.
        assert percents(measured, brightness.name, attack) == [100.0, 0.0]
        assert percents(measured, corner.name, attack) == [100.0, 0.0]
    for target in (brightness, corner):
        assert all((under.crafted_on, under.is_transfer) == (target.name, False) for under in target.attacks)


def test_a_file_without_gradients_gets_the_images_that_fool_the_first_model(measured):
    """They make a bright image darker everywhere, which is what the corner of a bright image should be."""
    first, _, file = measured.targets
    assert all((under.crafted_on, under.is_transfer) == (first.name, True) for under in file.attacks)
    assert percents(measured, file.name, "fgsm") == [100.0, 100.0]


def test_all_models_answer_the_same_corrupted_samples(measured):
    """The checkpoint and the file are one model: equal samples give equal answers, sample by sample."""
    _, corner, file = measured.targets
    assert corner.corruptions == file.corruptions
    assert corner.mean == file.mean


def test_means_are_means_and_drops_are_relative_to_clean(measured):
    for target in measured.targets:
        for under in target.corruptions:
            assert under.mean.percent == pytest.approx(np.mean([level.accuracy.percent for level in under.levels]))
            assert under.mean.relative_drop == pytest.approx(100 - under.mean.percent)
            assert under.mean.low <= under.mean.percent <= under.mean.high
        assert target.mean.percent == pytest.approx(np.mean([under.mean.percent for under in target.corruptions]))
    first = measured.targets[0]
    assert (first.difference, first.mean.points, first.corruptions[0].levels[0].difference) == (None, None, None)


def test_results_name_what_was_done(measured):
    assert [info.family for info in measured.families] == list(FAMILIES)
    blur = next(info for info in measured.families if info.family == "gaussian_blur")
    assert blur.strengths == pytest.approx([0.1, 0.15, 0.175, 0.2, 0.25])  # of 8 pixels, a quarter of those of 32
    assert (measured.kind, measured.version, measured.split, measured.samples, measured.seed) == (
        "robustness",
        2,
        "test",
        60,
        0,
    )
    assert RobustnessResults.model_validate_json(measured.model_dump_json()) == measured


# --- what it does not depend on, and what it does --------------------------------------------------------------------


QUICK = ("gaussian_noise", "occlusion")


def test_answers_do_not_depend_on_the_batch_size(project, measured):
    targets = [project.checkpoint("corner")]
    found = measure_robustness(
        targets, settings(project, overrides=["bench.batch_size=7"], epsilons=(8.0, 64.0)), Silent()
    )
    assert [
        [level.accuracy for level in under.levels]
        for under in (*found.targets[0].corruptions, *found.targets[0].attacks)
    ] == [
        [level.accuracy for level in under.levels]
        for under in (*measured.targets[1].corruptions, *measured.targets[1].attacks)
    ]


def test_parts_do_not_change_what_is_found(project, measured, monkeypatch):
    """As where not all samples fit into memory at once."""
    monkeypatch.setattr("compress.bench.robustness._PART_VALUES", 1)
    monkeypatch.setattr("compress.bench.robustness._CRAFTED_TOGETHER", 16)
    found = measure_robustness(
        [project.checkpoint("corner")], settings(project, attacks=("fgsm",), epsilons=(64.0,)), Silent()
    )
    assert found.samples == 60
    assert percents(found, found.targets[0].name, "fgsm") == [0.0]
    for family in FAMILIES:
        assert percents(found, found.targets[0].name, family) == percents(measured, names(measured)[1], family)


@pytest.mark.parametrize(
    ("config", "n"), [({"samples": 20}, 20), ({"samples": 0}, 60), ({"split": "validation"}, 30), ({"samples": 61}, 60)]
)
def test_samples_are_stratified_and_of_the_split_that_was_asked_for(project, config, n):
    found = measure_robustness(
        [project.checkpoint("brightness")],
        settings(project, families=("brightness",), attacks=(), severities=(5,), **config),
        Silent(),
    )
    (target,) = found.targets
    assert (found.samples, target.clean.n) == (n, n)
    assert target.corruptions[0].levels[0].accuracy.percent == 50.0  # exactly half of them are dark
    assert (target.attacks, found.epsilons) == ((), ())


def test_what_was_asked_for_is_what_is_measured(project):
    asked = settings(project, families=QUICK, attacks=("pgd",), severities=(2, 4), epsilons=(64.0,), steps=2)
    found = measure_robustness([project.checkpoint("brightness")], asked, Silent())
    (target,) = found.targets
    assert [under.family for under in target.corruptions] == list(QUICK)
    assert [[level.level for level in under.levels] for under in target.corruptions] == [[2, 4], [2, 4]]
    assert [[level.level for level in under.levels] for under in target.attacks] == [[64.0]]


# --- targets of all kinds --------------------------------------------------------------------------------------------


def test_an_int8_checkpoint_is_attacked_with_its_float_weights(tiny, shared_workshop, trained, tmp_path):
    quantized = shared_workshop.run(trained, "quantize", calibration={"samples": 32})
    asked = RobustnessSettings(
        RobustnessConfig(severities=(1, 5), epsilons=(4.0, 32.0), steps=3, samples=60),
        tiny.pipeline(tmp_path),
        ("gaussian_noise", "missing_pixels"),
        trust_code=True,
    )
    found = measure_robustness([trained.path, quantized.path], asked, Silent())
    float_, int8 = found.targets
    assert (float_.precision, int8.precision) == ("fp32", "int8")
    assert {(under.crafted_on, under.is_transfer) for under in float_.attacks} == {(float_.name, False)}
    assert {(under.crafted_on, under.is_transfer) for under in int8.attacks} == {
        (f"{int8.name}, its float weights", True)
    }
    assert float_.clean.percent > 85
    assert percents(found, float_.name, "pgd")[-1] < 20  # a network really trained, really fooled
    assert percents(found, int8.name, "pgd")[-1] < 30
    assert percents(found, float_.name, "gaussian_noise")[1] <= float_.clean.percent
    assert int8.mean.points_low <= int8.mean.points <= int8.mean.points_high


def test_without_gradients_there_are_no_attacks_and_a_reason(project):
    progress = Recorded()
    asked = settings(project, families=QUICK, trust_code=False, severities=(1,))
    found = measure_robustness([project.onnx("corner")], asked, progress)
    assert found.targets[0].attacks == ()
    assert [each.reason for each in found.missing] == ["ONNX Runtime has no gradients; a checkpoint has"]
    assert progress.warnings == ["no attacks on 'corner_file': ONNX Runtime has no gradients; a checkpoint has"]
    assert found.warnings == tuple(progress.warnings)
    with pytest.raises(CompressError, match="--attack: no target has gradients: ONNX Runtime has no gradients"):
        measure_robustness([project.onnx("corner")], settings(project, attacks=("fgsm",), trust_code=False), Silent())


def test_a_model_whose_answers_have_no_gradient_is_told(project):
    """`round` has a gradient of zero everywhere: nothing moves, and nothing is hidden."""
    asked = settings(project, families=(), attacks=("fgsm",), epsilons=(64.0,))
    found = measure_robustness([project.checkpoint("blind")], asked, Silent())
    assert percents(found, found.targets[0].name, "fgsm") == [100.0]


def test_a_target_that_does_not_run_on_the_data_is_left_out(project):
    progress = Recorded()
    asked = settings(project, families=QUICK, attacks=(), severities=(1,))
    targets = [project.onnx("sums", "features"), project.checkpoint("brightness")]
    found = measure_robustness(targets, asked, progress)
    assert len(found.targets) == 1
    assert progress.warnings[0].startswith(
        "'sums_file' is left out: sums_file.onnx: does not run on the data's inputs: "
    )
    with pytest.raises(CompressError, match="does not run on the data's inputs"):
        measure_robustness(targets[:1], asked, Silent())


def test_a_run_on_digits_brings_its_data(tiny, tmp_path, models_of_a_run):
    from compress import run

    data = {"kind": "digits", "image_size": 8, "channels": 1, "test_size": 0.1}
    pipeline = tiny.pipeline(tmp_path, data=data, model={"factory": tiny.factory, "kwargs": {"num_classes": 10}})
    run(pipeline, runs=tmp_path / "runs")
    asked = RobustnessSettings(RobustnessConfig(severities=(3,), samples=50), None, ("jpeg",), ())
    found = measure_robustness([tmp_path / "runs/tiny"], asked, Silent())
    assert (found.samples, len(found.classes)) == (50, 10)
    with pytest.raises(
        CompressError, match=r"the run 'tiny' does not keep where its data lies: say on which data with"
    ):
        measure_robustness([models_of_a_run[0]], asked, Silent())


# --- inputs that are no images ---------------------------------------------------------------------------------------


def test_measured_values_get_noise_and_gaps_and_no_attacks(project):
    progress = Recorded()
    found = measure_robustness([project.checkpoint("sums", "features")], settings(project, "features"), progress)
    (target,) = found.targets
    assert [under.family for under in target.corruptions] == list(VALUE_FAMILIES)
    for under in target.corruptions:
        accuracies = [level.accuracy.percent for level in under.levels]
        assert target.clean.percent == 100.0
        assert accuracies[0] > accuracies[-1] > 55
    # The answer is the sign of a sum, and the sum with noise of 0.8 deviations correlates with it: arctan(1/0.8) / π + 1/2.
    expected = 100 * (0.5 + math.asin(1 / math.sqrt(1 + 0.8**2)) / math.pi)
    assert percents(found, target.name, "value_noise")[-1] == pytest.approx(expected, abs=8)
    assert progress.notes[-1].startswith(
        "no attacks: attacks change pixels of one image, but the input 'input' is no image"
    )
    assert found.missing == ()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (
            "features",
            {"families": ("jpeg",)},
            "--corruption: 'jpeg' is for images; this data can have value_noise, missing_values",
        ),
        ("images", {"families": ("value_noise",)}, "'value_noise' is for measured values that are no images"),
        (
            "features",
            {"attacks": ("fgsm",)},
            "--attack: attacks change pixels of one image, but the input 'input' is no image",
        ),
        (
            "tokens",
            {},
            "nothing to corrupt: the input 'input' holds whole numbers that stand for something, such as tokens",
        ),
        (
            "images",
            {"families": ("gausian_noise",)},
            "--corruption: there is no 'gausian_noise' (there are gaussian_noise, .*); did you mean 'gaussian_noise'?",
        ),
    ],
)
def test_what_the_data_cannot_have_is_one_message(project, kind, words, message):
    with pytest.raises(CompressError) as caught:
        measure_robustness([project.onnx("corner")], settings(project, kind, **words), Silent())
    assert re.search(message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?"), str(caught.value))
    assert "\n" not in str(caught.value)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["compress", "robustness", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return command


def test_the_command_end_to_end(command, project):
    code, out, err = command(
        project.checkpoint("brightness"),
        project.checkpoint("corner"),
        *("--pipeline", project.root / "images.yaml", "--set", "bench.batch_size=16", "--trust-code"),
        *("--corruption", "missing_pixels,brightness", "--severity", "5,4", "--attack", "fgsm", "--epsilon", "64"),
        *("--samples", 40, "--json", "out/found.json", "--html", "out/page.html"),
    )
    assert code == 0, err
    assert out.endswith("page: out/page.html\njson: out/found.json\n")
    found = RobustnessResults.model_validate_json(Path("out/found.json").read_text())
    assert found.command == (
        "compress robustness brightness corner --samples 40 --corruption missing_pixels,brightness --severity 5,4 "
        "--attack fgsm --epsilon 64 --pipeline images.yaml --set bench.batch_size=16 --trust-code"
    )
    assert found.severities == (4, 5)
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert begins(lines, "brightness", "50.00", "50.00")  # the family, both models
    assert begins(lines, "fgsm, ε = 64/255", "0.00", "0.00")
    assert str(project.root) not in Path("out/found.json").read_text() + Path("out/page.html").read_text()


def begins(lines, *start):
    return any(tuple(line[: len(start)]) == start for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--corruption", "fogg"), "--corruption: there is no 'fogg' (there are gaussian_noise, shot_noise,"),
        (("--corruption", "jpg"), "did you mean 'jpeg'?"),
        (("--attack", "pdg"), "--attack: there is no 'pdg' (there are fgsm, pgd, all, none); did you mean 'pgd'?"),
        (
            ("--attack", "none", "--corruption", "none"),
            "--corruption and --attack are both 'none': there is nothing to",
        ),
        (("--severity", "0,1"), "--severity: must be greater than or equal to 1, got 0"),
        (("--severity", "6"), "--severity: must be less than or equal to 5, got 6"),
        (("--severity", "x"), "--severity: must be whole numbers with commas between them, such as 1,8,32, got 'x'"),
        (("--epsilon", "0"), "--epsilon: must be greater than 0, got 0.0"),
        (("--epsilon", "8/255"), "--epsilon: must be numbers with commas between them, such as 1,2,4,8, got '8/255'"),
        (("--samples", -1), "--samples: must be greater than or equal to 0, got -1"),
        (("--split", "train"), "--split: must be 'test' or 'validation', got train"),
        (("--steps", 0), "--steps: must be greater than or equal to 1, got 0"),
        (("--device", "gpu"), "--device: there is no 'gpu' (there are cpu, cuda)"),
        (("--set", "seed=1"), "--set: changes the file of --pipeline, which is not given"),
        (("--html", "."), "--html .: is a folder; name a file in it"),
        (("--pipeline", "nope.yaml"), "nope.yaml: no such file"),
        ((), "robustness needs data, and no target is a run: say on which data with --pipeline FILE"),
    ],
)
def test_bad_options_are_one_message(command, project, words, message):
    code, out, err = command(project.onnx("corner"), *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_interrupt_is_code_130(command, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.robustness.measure_robustness", stopped)
    code, _, err = command("x.onnx")
    assert (code, err) == (130, "\nstopped; nothing was kept\n")


def test_code_that_is_not_trusted_is_not_run_and_costs_the_attacks_only(command, tiny, models_of_a_run):
    """The rows of a run have their files beside them, which need no code; gradients do."""
    run, pipeline = models_of_a_run
    words = ("--pipeline", pipeline, "--corruption", "contrast", "--severity", 1, "--samples", 20)
    code, out, err = command(run, *words)
    assert code == 0, err
    assert re.search(r"^— no attacks on source: .*model\.py:make.*--trust-code", out, re.MULTILINE)
    assert str(tiny.root) not in out
    code, _, err = command(run, *words, "--attack", "fgsm")
    assert code == 2
    assert re.search(r"error: --attack: no target has gradients: .*--trust-code", err)


@pytest.fixture
def models_of_a_run(tiny, tmp_path):
    from compress import run

    (tmp_path / "other").mkdir()
    run(tiny.pipeline(tmp_path / "other"), runs=tmp_path / "other")
    return tmp_path / "other/tiny", tmp_path / "other/pipeline.yaml"


def test_the_schema_describes_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compress", "schema", "robustness"])
    with pytest.raises(SystemExit):
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert document["properties"]["kind"]["const"] == "robustness"
    assert "transfer" not in document["properties"]
    assert "flattered" in document["$defs"]["UnderAttack"]["properties"]["is_transfer"]["description"]


# --- terminal and page -----------------------------------------------------------------------------------------------


def test_tables_show_every_family_and_who_attacked_whom(measured):
    console = make_console()
    with console.capture() as capture:
        console.print(robustness_tables(measured))
    said = capture.get()
    first, second, file = names(measured)
    for family in FAMILIES:
        assert re.search(rf"^{family} +\d", said, re.MULTILINE)
    assert f"{file}: transfer attack, crafted on {first}" in said
    assert f"{second}: attacked with the gradients of itself" in said
    assert re.search(r"^attack +brightness +corner +points \[95 %\] +corner_file \(transfer\)", said, re.MULTILINE)
    row = next(line for line in said.splitlines() if line.startswith("pgd, ε = 64/255"))
    assert re.split(r"\s{2,}", row)[1:3] == ["0.00", "0.00"]


def test_names_are_shown_as_they_are(measured):
    odd = measured.targets[0].model_copy(update={"name": "[red]x[/] \x1b[31m"})
    console = make_console()
    with console.capture() as capture:
        console.print(robustness_tables(measured.model_copy(update={"targets": (odd, *measured.targets[1:])})))
    assert capture.get().count("[red]x[/] �[31m") >= 4  # all in all, families, attacks, and who attacked it


def test_the_page_holds_every_figure_and_nothing_from_outside(measured):
    evil = measured.targets[0].model_copy(update={"name": "<script>alert(1)</script>"})
    page = render_robustness(measured.model_copy(update={"targets": (evil, *measured.targets[1:])}))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == len(FAMILIES) + 2
    assert "http" not in page.replace("http-equiv", "")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for info in measured.families:
        assert str(escape(info.what)) in page


def test_a_page_without_corruptions_or_attacks_has_no_empty_sections(project, measured):
    bare = measured.targets[0].model_copy(update={"corruptions": (), "mean": None})
    page = render_robustness(measured.model_copy(update={"targets": (bare,), "families": ()}))
    assert (page.count("<svg"), "What is done to the samples" in page) == (2, False)
    calm = measured.targets[0].model_copy(update={"attacks": ()})
    page = render_robustness(measured.model_copy(update={"targets": (calm,), "epsilons": ()}))
    assert page.count("<svg") == len(FAMILIES)
    assert '<h2 id="attacks">' not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: Debian's package 'chromium'")
def test_the_page_in_a_browser_in_both_themes_and_on_a_phone(measured, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render_robustness(measured))
    colours = []
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            with Tab(browser, path, width, scheme=scheme) as tab:
                assert tab.requests() == [path.resolve().as_uri()]
                assert tab.events("Log.entryAdded") == []
                assert tab.run("document.documentElement.scrollWidth") <= width
                inside = (
                    "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().right <= innerWidth)"
                )
                assert tab.run(inside)
                drawn = tab.run(
                    "[...document.querySelectorAll('svg use')].filter(mark => mark.getBoundingClientRect().width > 2"
                    " && (mark.getAttribute('style') || '').includes('--run-')).length"
                )
                assert drawn >= len(FAMILIES) * 3 * 6
                colours.append(tab.run("getComputedStyle(document.querySelector('.legend span')).color"))
    light, dark, narrow = colours
    assert light == narrow != dark


# --- means over levels -----------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_with_one_level_the_mean_has_the_interval_of_agresti_and_coull(correct):
    mean, low, high = mean_share(np.array(correct, dtype=float))
    n, p = len(correct) + Z**2, (sum(correct) + Z**2 / 2) / (len(correct) + Z**2)
    half = Z * math.sqrt(p * (1 - p) / n)
    assert mean == pytest.approx(np.mean(correct))
    assert (low, high) == (pytest.approx(max(0, p - half)), pytest.approx(min(1, p + half)))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_with_one_level_the_difference_is_the_paired_one(pairs):
    reference, other = (np.array(column) for column in zip(*pairs, strict=True))
    assert mean_difference(reference.astype(float), other.astype(float)) == pytest.approx(
        paired_difference(reference, other)
    )


def test_intervals_of_means_hold_the_truth_as_often_as_they_say():
    """Five conditions per image that resemble each other: images are drawn, not answers."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.8, 0.4, (2000, 120))
    mean_of = 0.8 / 1.2
    first = rng.binomial(5, difficulty) / 5
    second = rng.binomial(5, np.clip(difficulty - 0.1, 0, 1)) / 5
    truth = float(np.clip(rng.beta(0.8, 0.4, 2_000_000) - 0.1, 0, 1).mean()) - mean_of
    held = [mean_share(shares)[1] <= mean_of <= mean_share(shares)[2] for shares in first]
    assert 0.93 <= np.mean(held) <= 0.97
    pairs = [mean_difference(a, b) for a, b in zip(first, second, strict=True)]
    assert 0.93 <= np.mean([low <= truth <= high for _, low, high in pairs]) <= 0.98


@pytest.mark.parametrize("shares", [[], [1.2], [-0.1]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="at least one share, all within 0 to 1"):
        mean_share(np.array(shares))
    with pytest.raises(ValueError, match="vectors of one length"):
        mean_difference(np.array(shares), np.zeros(3))
