"""Method cards: one per loss, with YAML that runs as written, defaults as they are, results as they were measured."""

import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import Workshop, write_arrays
from ruamel.yaml import YAML
from test_shipped_pipelines import patterns

from compress import load_pipeline
from compress.config import DistillConfig, LossEntry, TeacherCacheConfig, TeacherConfig
from compress.config.losses import ScheduleConfig
from compress.config.training import AdversarialConfig, EnsembleConfig, NoiseConfig

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import distillation_table  # noqa: E402
from distillation_methods import METHODS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = REPOSITORY / "docs" / "methods"
CARDS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md")) if path.stem != "README"}
LOSSES = {
    kind: next(one for one in field.annotation.__args__ if one is not type(None))
    for kind, field in LossEntry.model_fields.items()
}
SETTINGS = {
    **{kind: (config,) for kind, config in LOSSES.items()},
    "standardize": (LOSSES["kd"],),
    "teacher_share": (DistillConfig, ScheduleConfig),
    "peers": (DistillConfig,),
    "ema_teacher": (DistillConfig,),
    "ensemble": (EnsembleConfig, TeacherConfig),
    "mixing": (DistillConfig,),
    "perturb": (AdversarialConfig, NoiseConfig),
    "cache": (TeacherCacheConfig,),
}
"""What the defaults on a card are those of."""
PARTS = [
    "**Formula.**",
    "**Paper.**",
    "**In a pipeline.**",
    "Defaults: ",
    "**Cost.**",
    "**Helps",
    "**Hurts",
    "**Measured here",
]
HEAD = 'name: card\ndevice: cpu\nthreads: 1\ndata: {kind: digits}\nmodel: {factory: "cifar:resnet56"}\nstages:\n'


def blocks(card):
    return re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)


BLOCKS = [pytest.param(block, id=f"{name}-{n}") for name, card in CARDS.items() for n, block in enumerate(blocks(card))]


def stage_of(block, folder):
    """The stage of a block, as the stages of a pipeline file; named weights stand beside it."""
    path = folder / "card.yaml"
    path.write_text(HEAD + "".join(f"  {line}\n" for line in block.splitlines()))
    (stage,) = load_pipeline(path).stages
    return stage.distill


def test_every_loss_has_a_card_and_every_card_is_of_something():
    assert CARDS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_its_parts_in_order(name):
    places = [CARDS[name].find(part) for part in PARTS]
    assert -1 not in places, PARTS[places.index(-1)]
    assert places == sorted(places)
    assert "arXiv:" in CARDS[name]
    assert blocks(CARDS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_a_card_of_a_loss_uses_it(name, tmp_path):
    used = {entry.kind for block in blocks(CARDS[name]) for entry in stage_of(block, tmp_path).losses}
    assert name in used


@pytest.mark.parametrize("name", CARDS)
def test_the_defaults_on_a_card_are_those_of_the_settings(name):
    sentence = re.search(r"^Defaults: (.*?)(?:\.\s|\.$|\n\n)", CARDS[name], re.MULTILINE | re.DOTALL).group(1)
    told = re.findall(r"`(\w+): ([^`]+)`", sentence)
    assert told
    for key, value in told:
        fields = [
            field
            for config in SETTINGS[name]
            for field_name, field in config.model_fields.items()
            if key in (field_name, field.alias)
        ]
        assert fields, f"there is no setting '{key}'"
        number = re.fullmatch(r"\d+/\d+", value)
        expected = float(Fraction(value)) if number else YAML(typ="safe", pure=True).load(value)
        for field in fields:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert (default, type(default)) == (expected, type(expected)), key


@pytest.mark.parametrize("name", LOSSES)
def test_a_card_of_a_loss_tells_all_defaults(name):
    (config,) = SETTINGS[name]
    sentence = CARDS[name].partition("Defaults: ")[2].partition("\n\n")[0]
    told = {key for key, _ in re.findall(r"`(\w+): ([^`]+)`", sentence)}
    optional = {field.alias or key for key, field in config.model_fields.items() if not field.is_required()}
    assert optional - told <= {"smoothing" if name == "labels" else ""} | ({"from"} if name == "kd" else set())


# --- the YAML runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A teacher with random numbers for weights, and few tiny images."""
    from safetensors.torch import save_file

    from compress.config import ArraysConfig
    from compress.data.load import load_data
    from compress.models.factory import Arch, create

    root, shape = tmp_path_factory.mktemp("cards"), (8, 8, 3)
    data = write_arrays(root / "data", train=patterns(10, 2, shape), test=patterns(10, 2, shape))
    settings = {"kind": "arrays", "root": str(data), "validation": {"from": "test", "size": 10}}
    dataset = load_data(ArraysConfig.model_validate_json(json.dumps(settings)), 0)
    save_file(create(Arch("cifar:resnet20"), seed=2).state_dict(), root / "cifar10_resnet20.safetensors")
    made = Workshop(root / "checkpoints", dataset, "cifar:resnet56")
    return made, made.source(), root


@pytest.mark.parametrize("block", BLOCKS)
def test_the_yaml_of_a_card_runs(block, shop):
    made, teacher, root = shop
    stage = stage_of(block, root)
    short = {"epochs": 1, "batch_size": 20, "learning_rate": 0.001}
    given = json.loads(stage.model_dump_json(by_alias=True, exclude_unset=True)) | short
    if stage.cache is not None:
        given["cache"] = {"views": 1}  # no more than epochs
    draft, context = made.draft(teacher, "distill", **given)
    assert draft.arch.factory == "cifar:resnet20"
    assert len(draft.training) == 1
    assert math.isfinite(draft.training[0]["loss"])
    assert not context.warnings


# --- what was measured -------------------------------------------------------------------------------------------------


def test_cards_name_methods_of_the_table_and_all_of_them():
    named = {
        method
        for card in CARDS.values()
        for mark in re.findall(r"measured: ([a-z0-9_ ]+) -->", card)
        for method in mark.split()
    }
    assert named == METHODS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_is_in_the_results(name):
    found = distillation_table.known_results(REPOSITORY / "benchmarks" / "results" / "distillation.json")
    assert distillation_table.with_results(CARDS[name], found) == CARDS[name], (
        "python benchmarks/distillation.py --render --cards docs/methods"
    )


# --- the index ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*FOLDER.glob("*.md")], ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_the_index_names_every_card():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == CARDS.keys()
