"""Pipeline files: what is accepted, and what a user is told about everything that is not."""

from __future__ import annotations

import copy
import json
import os
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import load_pipeline
from compress.config import STAGE_CONFIGS, Pipeline
from compress.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = 'name: a\ndata: {kind: digits}\nmodel: {factory: "cifar:resnet20"}\n'
DISTILL = "{student: {factory: 'cifar:resnet20'}}"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as the file `p.yaml` of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text=BASE, *overrides):
        Path("p.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_pipeline("p.yaml", overrides)

    return load


@pytest.fixture
def refuse(load):
    """The lines that a user sees."""

    def refuse(text=BASE, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
        return str(caught.value).splitlines()

    return refuse


def stages(*lines):
    return BASE + "stages:\n" + "".join(f"  - {line}\n" for line in lines)


def test_minimal_file_has_all_defaults(load):
    pipeline = load()
    assert (pipeline.seed, pipeline.stages, pipeline.budget) == (0, (), None)
    assert pipeline.data.validation.source == "train"
    assert pipeline.bench.latency is not None


def test_every_problem_at_once_in_file_order_with_line_and_key(refuse):
    text = """\
name: 3
sed: 1
data:
  kind: digit
model: {factory: "cifar:resnet20", kwarg: {}}
stages:
  - trian: {}
  - prune: {criterion: l3, target: {mac: 0.5}, multiple: "4", recovery: {epochs: 0}}
  - quantize:
  - factorize:
  - train: {schedule: one-cycle, epochs: 1.5, channels_last: yes}
budget: {accuracy_drop: 101}
bench:
  latency: {threads: 1}
"""
    keys = "(allowed: name, seed, device, threads, data, model, stages, budget, bench, trackers)"
    kinds = "digits, arrays, image_folder, torchvision, python"
    names = "train, distill, prune, factorize, quantize, export"
    after = "'quantize' (stages.2, line 9)"
    takes = "it takes a float model and gets an int8 one"
    schedules = "'one_cycle', 'cosine', 'step' or 'constant'"
    criteria = "'l1', 'l2', 'fpgm', 'lamp', 'bn_scale', 'taylor', 'hessian', 'activation' or 'random'"
    assert sorted(refuse(text, "budget.acuracy_drop=1")) == sorted(
        [
            "p.yaml:1: name: must be text, got 3",
            f"p.yaml:2: sed: unknown key {keys}; did you mean 'seed'?",
            f"p.yaml:4: data.kind: must be one of {kinds}, got \"digit\"; did you mean 'digits'?",
            "p.yaml:5: model.kwarg: unknown key (allowed: factory, kwargs, weights); did you mean 'kwargs'?",
            f"p.yaml:7: stages.0.trian: unknown stage (there are: {names}); did you mean 'train'?",
            f'p.yaml:8: stages.1.prune.criterion: must be {criteria}, got "l3"',
            "p.yaml:8: stages.1.prune.target.mac: unknown key (allowed: macs, parameters, latency, ratio); did you mean 'macs'?",
            "p.yaml:8: stages.1.prune.multiple: must be a whole number or 'auto', got \"4\"",
            "p.yaml:8: stages.1.prune.recovery.epochs: must be greater than or equal to 1, got 0",
            f"p.yaml:10: stages.3: 'factorize' cannot come after {after}: {takes}; put 'factorize' before it",
            f"p.yaml:11: stages.4: 'train' cannot come after {after}: {takes}; put 'train' before it",
            f"p.yaml:11: stages.4.train.schedule: must be {schedules}, got \"one-cycle\"; did you mean 'one_cycle'?",
            "p.yaml:11: stages.4.train.epochs: must be a whole number, got 1.5",
            'p.yaml:11: stages.4.train.channels_last: must be true or false, got "yes"',
            "p.yaml:12: budget.accuracy_drop: must be less than or equal to 100, got 101",
            "p.yaml:14: bench.latency.threads: must be a list, got 1",
            "--set: budget.acuracy_drop: unknown key (allowed: accuracy_drop); did you mean 'accuracy_drop'?",
        ]
    )


def test_problems_come_in_the_order_of_the_file_and_those_of_the_command_line_last(refuse):
    lines = refuse("name: a/b\nseed: x\nmodel: 3\n", "device=gpu")
    assert [line.split(": ")[0] for line in lines] == ["p.yaml:1", "p.yaml:1", "p.yaml:2", "p.yaml:3", "--set"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: x", 'p.yaml:4: seed: must be a whole number, got "x"'),
        ("seed: 1.0", "p.yaml:4: seed: must be a whole number, got 1.0"),
        ("seed: true", "p.yaml:4: seed: must be a whole number, got true"),
        ("seed: -1", "p.yaml:4: seed: must be greater than or equal to 0, got -1"),
        ("seed: 99999999999999999999", "p.yaml:4: seed: is too large for a whole number"),
        (f"seed: 0x{'f' * 5000}", "p.yaml:4: seed: is too large for a whole number"),
        (f"seed: {'x' * 300}", f'p.yaml:4: seed: must be a whole number, got "{"x" * 56}…'),
        ("device: gpu", "p.yaml:4: device: must be 'auto', 'cpu' or 'cuda', got \"gpu\""),
        ("stages:", "p.yaml:4: stages: must be a list, got null"),
        ("stages: {prune: {}}", 'p.yaml:4: stages: must be a list, got {"prune": {}}'),
        ("budget: 1.0", "p.yaml:4: budget: must be a mapping, got 1.0"),
        ("budget: {}", "p.yaml:4: budget.accuracy_drop: is missing"),
        ("budget: {accuracy_drop: }", "p.yaml:4: budget.accuracy_drop: must be a number, got null"),
        ("budget: {accuracy_drop: '1'}", 'p.yaml:4: budget.accuracy_drop: must be a number, got "1"'),
        ("budget: {accuracy_drop: true}", "p.yaml:4: budget.accuracy_drop: must be a number, got true"),
        (
            "budget: {accuracy_drop: -0.1}",
            "p.yaml:4: budget.accuracy_drop: must be greater than or equal to 0, got -0.1",
        ),
        (
            "budget: {accuracy_drop: 100.5}",
            "p.yaml:4: budget.accuracy_drop: must be less than or equal to 100, got 100.5",
        ),
        ("budget: {accuracy_drop: .nan}", "p.yaml:4: budget.accuracy_drop: must be a finite number, got nan"),
        ("budget: {accuracy_drop: .inf}", "p.yaml:4: budget.accuracy_drop: must be a finite number, got inf"),
        ("budget: {accuracy_drop: 1e999}", "p.yaml:4: budget.accuracy_drop: must be a finite number, got inf"),
        (
            "bench: {latency: {batch_sizes: []}}",
            "p.yaml:4: bench.latency.batch_sizes: must have at least 1 item, got []",
        ),
        (
            "bench: {latency: {threads: [0, 1]}}",
            "p.yaml:4: bench.latency.threads.0: must be greater than or equal to 1, got 0",
        ),
        ("3: x", "p.yaml:4: 3: the key must be text; put it in quotes"),
        ("~: x", "p.yaml:4: None: the key must be text; put it in quotes"),
        (
            '"a\\e[31m\\nb": 3',
            'p.yaml:4: "a\\u001b[31m\\nb": unknown key (allowed: name, seed, device, threads, data, ',
        ),
        ('"\\ud800": 3', 'p.yaml:4: "\\ud800": the key holds a character that is no text'),
        ("seed: !!binary aGVsbG8=", "p.yaml:4: seed: must be text, a number, a list or a mapping, got bytes"),
        ("seed: !!python/object/apply:os.system [ls]", "p.yaml:4: seed: the YAML tag !!python/object/apply:os.system"),
        ("budget: !!python/object:a.b {accuracy_drop: 1}", "p.yaml:4: budget: the YAML tag !!python/object:a.b is not"),
        ("stages: !mine []", "p.yaml:4: stages: the YAML tag !mine is not allowed"),
        (
            "seed: 2024-01-02",
            "p.yaml:4: seed: must be text, a number, a list or a mapping, got the date 2024-01-02; put it in quotes",
        ),
    ],
)
def test_one_bad_line_gives_one_message(refuse, line, message):
    found = refuse(f"{BASE}{line}\n")
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "model: must be a mapping, got null"),
        ("cifar:resnet20", 'model: must be a mapping, got "cifar:resnet20"'),
        ("{}", "model.factory: is missing"),
        ("{factory: resnet20}", "model.factory: must be like 'cifar:resnet56'"),
        ("{factory: ':x'}", "model.factory: must be like 'cifar:resnet56'"),
        ("{factory: 'a:b', weights: ''}", 'model.weights: must have at least 1 character, got ""'),
        ("{factory: 'a:b', weights: \"a\\0/b.pth\"}", "model.weights: holds a character that is no text"),
        ("{factory: 'a:b', kwargs: {x: .nan}}", "model.kwargs.x: must be a finite number, got nan"),
        (
            "{factory: 'a:b', kwargs: {x: 2024-01-02}}",
            "model.kwargs.x: must be text, a number, a list or a mapping, got",
        ),
        ("{factory: 'a:b', kwargs: {1: 2}}", "model.kwargs.1: the key must be text; put it in quotes"),
        ('{factory: "\\ud800:b"}', "model.factory: holds a character that is no text"),
    ],
)
def test_bad_models(refuse, model, message):
    found = refuse(f"name: a\ndata: {{kind: digits}}\nmodel: {model}\n")
    assert found[0].startswith(f"p.yaml:3: {message}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "data: must be a mapping, got null"),
        ("digits", 'data: must be a mapping, got "digits"'),
        ("{image_size: 32}", "data.kind: is missing: one of digits, arrays, image_folder, torchvision, python"),
        ("{kind: }", "data.kind: is missing: one of digits"),
        ("{kind: image-folder}", "data.kind: must be one of digits, arrays, image_folder, torchvision, python, got"),
        ("{kind: digits, root: x}", "data.root: unknown key (allowed: "),
        ("{kind: digits, image_siz: 8}", "data.image_siz: unknown key (allowed: "),
        ("{kind: digits, channels: 2}", "data.channels: must be 1 or 3, got 2"),
        ("{kind: arrays}", "data.root: is missing"),
        ("{kind: arrays, root: 3}", "data.root: must be text, got 3"),
        (
            "{kind: python, callable: f}",
            "data.callable: must be like 'package.module:function' or 'path/to/file.py:function'",
        ),
        (
            "{kind: digits, validation: {size: 1.5}}",
            "data.validation.size: must be a whole number or less than 1, got 1.5",
        ),
        ("{kind: digits, validation: {size: x}}", 'data.validation.size: must be a number, got "x"'),
        ("{kind: digits, validation: {size: 0}}", "data.validation.size: must be greater than 0, got 0"),
        ("{kind: digits, validation: {from: trian}}", "data.validation.from: must be 'train', 'test' or 'given', got"),
        ("{kind: digits, validation: {source: test}}", "data.validation.source: unknown key (allowed: from, size)"),
        (
            "{kind: digits, validation: {from: given}}",
            "data.validation: there is none to be given with this kind of data",
        ),
        (
            "{kind: torchvision, name: MNIST, root: x, validation: {from: given}}",
            "data.validation: there is none to be given with this kind of data; use from: train or from: test",
        ),
        (
            "{kind: digits, normalize: {mean: [0.5], std: [1, 1]}}",
            "data.normalize: mean has 1 values and std 2; they must",
        ),
        ("{kind: digits, normalize: {mean: [0.5], std: [0]}}", "data.normalize.std.0: must be greater than 0, got 0"),
    ],
)
def test_bad_data(refuse, data, message):
    found = refuse(f"name: a\n\ndata: {data}\nmodel: {{factory: 'cifar:resnet20'}}\n")
    assert len(found) == 1
    assert found[0].startswith(f"p.yaml:3: {message}")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("", "stages.0: must be a mapping, got null"),
        ("3", "stages.0: must be a mapping, got 3"),
        ("[prune]", 'stages.0: must be a mapping, got ["prune"]'),
        ("prune", "stages.0: must be a mapping, got \"prune\"; write '- prune:' with a colon, or '- prune: {…}'"),
        (
            "{}",
            "stages.0: must have exactly one of the keys train, distill, prune, factorize, quantize, export; got none",
        ),
        ("{train: {}, prune: {}}", "stages.0: must have exactly one of the keys train, distill, prune, factorize, "),
        (
            "prun:",
            "stages.0.prun: unknown stage (there are: train, distill, prune, factorize, quantize, export); did you",
        ),
        ("svd: {}", "stages.0.svd: unknown stage (there are: train, distill, prune, factorize, quantize, export)"),
        ("distill:", "stages.0.distill.student: is missing"),
        ("train: {losses: []}", "stages.0.train.losses: must have at least 1 item, got []"),
        (
            "distill: {student: {factory: 'cifar:resnet20'}, losses: [{hint: {layers: {}}}]}",
            "stages.0.distill.losses.0.hint.layers: must have at least 1 item or 'auto', got {}",
        ),
        ("train: {losses: [labels]}", 'stages.0.train.losses.0: must be a mapping, got "labels"'),
        ("train: {losses: [{kd: {}}]}", "stages.0.train.losses: 'train' has no teacher, so 'kd' cannot be used; use"),
        ("train: {learning_rate: .inf}", "stages.0.train.learning_rate: must be a finite number, got inf"),
        ("prune: {target: 0.5}", "stages.0.prune.target: must be a mapping, got 0.5"),
        ("prune: {target: {macs: 1.5}}", "stages.0.prune.target.macs: must be less than 1, got 1.5"),
        ("prune: {target: {macs: 0.5, ratio: 0.5}}", "stages.0.prune.target: must have exactly one of the keys macs, "),
        (
            "prune: {target: {macs: }}",
            "stages.0.prune.target: must have exactly one of the keys macs, parameters, latency, ratio",
        ),
        ("prune: {budget: {}}", "stages.0.prune.budget.accuracy_drop: is missing"),
        ("prune: {budget: 1.0}", "stages.0.prune.budget: must be a mapping, got 1.0"),
        (
            "factorize: {budget: {accuracy_drop: -1}}",
            "stages.0.factorize.budget.accuracy_drop: must be greater than or",
        ),
        (
            "prune: {budget: {accuracy_drop: 1, confidence: 95}}",
            "stages.0.prune.budget.confidence: must be less than or equal to 0.999, got 95",
        ),
        (
            "prune: {budget: {accuracy_drop: 1, trials: 0}}",
            "stages.0.prune.budget.trials: must be greater than or equal",
        ),
        ("prune: {budget: {accuracy_drops: 1, accuracy_drop: 1}}", "stages.0.prune.budget.accuracy_drops: "),
        ("prune: {budget: {accuracy_drop: 1, against: teacher}}", "stages.0.prune.budget.against: must be 'input' or"),
        ("train: {budget: {accuracy_drop: 1}}", "stages.0.train.budget: "),
        ("quantize: {target: x86}", "stages.0.quantize.target: must be 'auto', 'x86-vnni', 'x86-avx2' or 'arm64', got"),
        ("export: {agreement: -0.1}", "stages.0.export.agreement: must be greater than or equal to 0, got -0.1"),
    ],
)
def test_bad_stages(refuse, stage, message):
    found = refuse(stages(stage))
    assert len(found) == 1
    assert found[0].startswith(f"p.yaml:5: {message}")


def test_a_setting_beside_its_stage_is_told_to_move(refuse):
    (line,) = refuse(stages("prune:\n    target: {macs: 0.5}"))
    assert (
        line == "p.yaml:6: stages.0.target: is no stage; if it is a setting of 'prune', indent it deeper than 'prune'"
    )


def test_missing_keys_are_all_named(refuse):
    assert refuse("seed: 1\n") == [f"p.yaml:1: {key}: is missing" for key in ("name", "data", "model")]


def test_null_settings_of_a_stage_and_of_a_loss_mean_defaults(load):
    pipeline = load(stages("prune:", "train: {losses: [labels: ]}", "quantize:"))
    assert pipeline.stages == load(stages("prune: {}", "train: {losses: [labels: {}]}", "quantize: {}")).stages


def test_null_where_it_means_none_stays_none(load):
    pipeline = load(BASE.replace('"}', '", kwargs: {a: [{x: }]}}') + "stages:\n  - prune: {recovery: null}\nbudget:\n")
    assert pipeline.stages[0].settings.recovery is None
    assert pipeline.budget is None
    assert pipeline.model.kwargs == {"a": [{"x": None}]}


def test_whole_numbers_do_for_floats_and_nothing_else_is_coerced(load):
    pipeline = load(BASE + "budget: {accuracy_drop: 1}\nstages: [train: {weight_decay: 0, learning_rate: 1e-2}]\n")
    assert pipeline.budget.accuracy_drop == 1.0
    assert pipeline.stages[0].settings.learning_rate == 0.01


@pytest.mark.parametrize("drop", ["0", "0.0", "100", "1.5"])
def test_budget_takes_points_from_0_to_100(load, drop):
    assert load(f"{BASE}budget: {{accuracy_drop: {drop}}}\n").budget.accuracy_drop == float(drop)


def test_settings_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yaml:1: must be a mapping with keys such as name, data, model, stages"),
        ("# nothing\n", "p.yaml:1: must be a mapping with keys such as name, data, model, stages"),
        ("- a\n", "p.yaml:1: must be a mapping with keys such as name, data, model, stages"),
        (BASE + "name: b\n", "p.yaml:4: key 'name' stands twice"),
        (BASE + "bench:\n  batch_size: 1\n  batch_size: 2\n", "p.yaml:6: key 'batch_size' stands twice"),
        ("name: a\n\tseed: 3\n", "p.yaml:2: is not valid YAML: found character '\\t' that cannot start any token"),
        ("name: a: b\n", "p.yaml:1: is not valid YAML: mapping values are not allowed here"),
        ("name: [a\nb: c", "p.yaml:2: is not valid YAML: expected ',' or ']', but got ':'"),
        ("name: *x\n", "p.yaml:1: is not valid YAML: found undefined alias 'x'"),
        (
            BASE + "---\nname: b\n",
            "p.yaml:4: is not valid YAML: expected a single document in the stream but found another",
        ),
        ("name: a\nseed: \0\n", "p.yaml:2: is not valid YAML: special characters are not allowed (character 0x0)"),
        ("a: " + "[" * 3000 + "]" * 3000, "p.yaml: is not valid YAML: it is nested too deep"),
        (b"name: \xff\xfe\n", "p.yaml: is not UTF-8 text"),
        (BASE.encode("utf-16"), "p.yaml: is not UTF-8 text"),
        (BASE + "#" * (1 << 20), "p.yaml: is larger than 1,048,576 bytes; not a pipeline file"),
        (f"{BASE}x: {'[' * 70}{']' * 70}\n", "p.yaml: holds more than 100,000 values, or values nested over 60 deep"),
    ],
)
def test_unreadable_files(refuse, text, message):
    (line,) = refuse(text)
    assert line.startswith(message)


def test_multiplying_aliases_end_at_once(refuse):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (line,) = refuse("\n".join(lines))
    assert line.startswith("p.yaml: holds more than 100,000 values")


def test_byte_order_mark_and_windows_line_ends_are_fine(load):
    assert load(("\ufeff" + BASE.replace("\n", "\r\n")).encode()).name == "a"


def test_missing_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(BASE)
    for path, message in (
        ("digit.yaml", "digit.yaml: no such file; did you mean 'digits.yaml'?"),
        ("nowhere/p.yaml", "nowhere/p.yaml: no such file"),
        (".", ".: is a folder, not a pipeline file; in it are digits.yaml"),
        ("digits", "digits: no such file; did you mean 'digits.yaml'?"),
        ("../${HERE}s/digits.yml", "../${HERE}s/digits.yml: no such file; did you mean '../${HERE}/digits.yaml'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_pipeline(path.replace("${HERE}", tmp_path.name))
        assert str(caught.value) == message.replace("${HERE}", tmp_path.name)


def test_anchors_aliases_and_merges(load):
    pipeline = load(
        BASE
        + "seed: &n 7\nthreads: *n\n"
        + "stages:\n  - train: &t {epochs: 2, channels_last: &no false}\n  - train: *t\n  - train: {<<: *t, epochs: 3}\n"
    )
    assert pipeline.threads == 7
    assert [stage.settings.epochs for stage in pipeline.stages] == [2, 2, 3]
    assert not any(stage.settings.channels_last for stage in pipeline.stages)


# --- --set -----------------------------------------------------------------------------------------------------------

SET = stages("train: {epochs: 2}", "prune:", "factorize: {recovery: null}", "quantize: {}", "export:")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", lambda p: p.seed == 3),
        (" seed =3", lambda p: p.seed == 3),
        ("name=b", lambda p: p.name == "b"),
        ("budget.accuracy_drop=0.5", lambda p: p.budget.accuracy_drop == 0.5),
        ("stages.0.train.epochs=5", lambda p: p.stages[0].settings.epochs == 5),
        ("stages.train.epochs=5", lambda p: p.stages[0].settings.epochs == 5),
        ("stages.prune.target.macs=0.4", lambda p: p.stages[1].settings.target.macs == 0.4),
        ("stages.prune.target={ratio: 0.3}", lambda p: p.stages[1].settings.target.ratio == 0.3),
        ("stages.prune.recovery=null", lambda p: p.stages[1].settings.recovery is None),
        ("stages.factorize.recovery.epochs=1", lambda p: p.stages[2].settings.recovery.epochs == 1),
        ("stages.train=", lambda p: p.stages[0].settings.epochs == 12),
        ("stages.0={distill: {student: {factory: 'a:b'}}}", lambda p: p.stages[0].kind == "distill"),
        ("stages=[]", lambda p: p.stages == ()),
        ("bench.latency.threads=[4]", lambda p: p.bench.latency.threads == (4,)),
        ("model.kwargs.width=3", lambda p: p.model.kwargs == {"width": 3}),
        ("model.kwargs.x={a: [1, {b: }]}", lambda p: p.model.kwargs == {"x": {"a": [1, {"b": None}]}}),
    ],
)
def test_overrides(load, override, value):
    assert value(load(SET, override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "seed: must look like key.path=value"),
        ("=3", "=3: must look like key.path=value"),
        ("stages..epochs=3", "stages..epochs=3: must look like key.path=value"),
        ("seed=x", 'seed: must be a whole number, got "x"'),
        ("seed.x=1", 'seed: must be a whole number, got {"x": 1}'),
        ("name.x=1", "name.x=1: 'name' is \"a\", which has no keys inside"),
        (
            "nme=b",
            "nme: unknown key (allowed: name, seed, device, threads, data, model, stages, budget, bench, trackers); did you",
        ),
        ("data=digits", 'data: must be a mapping, got "digits"'),
        ("seed=[1", "seed=[1: the value '[1' is not valid YAML"),
        ("seed=2024-01-01", "seed: must be text, a number, a list or a mapping, got the date 2024-01-01"),
        ("seed=!!python/name:os.system", "seed: the YAML tag !!python/name:os.system is not allowed"),
        ("model.kwargs.a=.nan", "model.kwargs.a: must be a finite number, got nan"),
        (
            "model.kwargs.a=&a [*a]",
            "model.kwargs.a=&a [*a]: holds more than 100,000 values, or values nested over 60 deep",
        ),
        ("stages.9.train.epochs=1", "stages.9.train.epochs=1: 'stages' has 5 items, counted from 0"),
        ("stages.-1=x", "stages.-1=x: 'stages' has no item '-1' (it has train, prune, factorize, quantize, export)"),
        ("stages.²=x", "stages.²=x: 'stages' has no item '²' (it has train"),
        (
            "stages.trian.epochs=1",
            "stages.trian.epochs=1: 'stages' has no item 'trian' (it has train, prune, factorize, ",
        ),
        ("stages.0=null", "stages.0: must be a mapping, got null"),
        (
            "stages.prune.nothing=1",
            "stages.1.prune.nothing: unknown key (allowed: target, budget, criterion, reduction, ranking, normalize, ",
        ),
        ("stages.prune.target.macs=4", "stages.1.prune.target.macs: must be less than 1, got 4"),
    ],
)
def test_bad_overrides(refuse, override, message):
    (line,) = refuse(SET, override)
    assert line.startswith(f"--set: {message}")


def test_bad_overrides_are_reported_together(refuse):
    lines = refuse(BASE + "sed: 1\n", "stages.x={", "seed=x", "nme=1")
    assert [line.split(": ")[0] for line in lines] == ["p.yaml:4", "--set", "--set", "--set"]


def test_ambiguous_stage_names_need_a_number(load, refuse):
    text = stages("train: {epochs: 1}", "prune:", "train: {epochs: 1}")
    (line,) = refuse(text, "stages.train.epochs=5")
    assert line == "--set: stages.train.epochs=5: 'train' stands 2 times in 'stages'; write stages.0 or stages.2"
    assert [stage.settings.epochs for stage in load(text, "stages.2.train.epochs=5").stages[::2]] == [1, 5]


def test_stages_without_settings_as_plain_text_are_no_names(refuse):
    lines = refuse(stages("train"), "stages.train.epochs=5")
    assert lines[-1] == "--set: stages.train.epochs=5: 'stages' has no item 'train' (it has 1 items without names)"


def test_overriding_one_alias_leaves_the_other_stage_alone(load):
    text = stages("train: &t {epochs: 2, losses: [labels: {weight: 1}]}", "train: *t")
    pipeline = load(text, "stages.0.train.epochs=7", "stages.0.train.losses.labels.weight=2")
    assert [stage.settings.epochs for stage in pipeline.stages] == [7, 2]
    assert [stage.settings.losses[0].labels.weight for stage in pipeline.stages] == [2, 1]


def test_second_override_of_a_one_of_names_both(refuse):
    (line,) = refuse(stages("prune: {target: {macs: 0.5}}"), "stages.prune.target.ratio=0.3")
    assert line.endswith(
        "stages.0.prune.target: must have exactly one of the keys macs, parameters, latency, ratio; got macs and ratio"
    )


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_in_a_file_are_relative_to_it_and_those_of_the_command_line_to_the_working_directory(
    tmp_path, monkeypatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    text = f"""\
name: a
data: {{kind: arrays, root: ../data}}
model: {{factory: "net.py:make", weights: w.safetensors, kwargs: {{weights: k.pth, root: r}}}}
stages: [distill: {{student: {{factory: "./sub/../net.py:make", weights: {tmp_path}/w.pth}}}}]
"""
    (there / "p.yaml").write_text(text)
    file = Path("../there/p.yaml")

    pipeline = load_pipeline(file)
    assert pipeline.data.root == tmp_path / "data"
    assert pipeline.model.factory == f"{there}/net.py:make"
    assert pipeline.model.weights == f"{there}/w.safetensors"
    assert pipeline.model.kwargs == {"weights": "k.pth", "root": "r"}
    assert pipeline.stages[0].settings.student.factory == f"{there}/net.py:make"
    assert pipeline.stages[0].settings.student.weights == f"{tmp_path}/w.pth"

    pipeline = load_pipeline(file, ["data.root=d", "model.weights=w.pth", "stages.distill.student.factory=n.py:make"])
    assert pipeline.data.root == here / "d"
    assert (pipeline.model.factory, pipeline.model.weights) == (f"{there}/net.py:make", f"{here}/w.pth")
    assert pipeline.stages[0].settings.student.factory == f"{here}/n.py:make"

    pipeline = load_pipeline(file, ["data={kind: python, callable: 'd.py:f'}", "model={factory: 'n.py:make'}"])
    assert (pipeline.data.callable, pipeline.model.factory) == (f"{here}/d.py:f", f"{here}/n.py:make")


def test_names_that_are_no_paths_stay(load):
    pipeline = load(
        "name: a\ndata: {kind: python, callable: 'package.module:f'}\n"
        "model: {factory: 'torchvision:resnet18', weights: DEFAULT}\n"
    )
    assert pipeline.data.callable == "package.module:f"
    assert (pipeline.model.factory, pipeline.model.weights) == ("torchvision:resnet18", "DEFAULT")


def test_home_and_unknown_users(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(BASE, "model.weights=~/w.pth").model.weights == "/home/me/w.pth"
    assert load(BASE, "model.weights=~nobody-of-that-name/w.pth").model.weights.endswith("/~nobody-of-that-name/w.pth")


# --- order of stages -------------------------------------------------------------------------------------------------

FLOAT, INT8, LAST = ("train", "distill", "prune", "factorize"), ("quantize",), ("export",)


def chain(*names):
    return stages(*(f"distill: {DISTILL}" if name == "distill" else f"{name}:" for name in names))


def allowed(before, after):
    return before in FLOAT or (before in INT8 and after in LAST)


def test_the_chains_below_cover_every_stage():
    assert set(FLOAT + INT8 + LAST) == set(STAGE_CONFIGS)


@pytest.mark.parametrize("names", [(name,) for name in STAGE_CONFIGS] + list(product(STAGE_CONFIGS, repeat=2)))
def test_pairs_of_stages(load, refuse, names):
    bad = [(before, after) for before, after in pairwise(names) if not allowed(before, after)]
    if not bad:
        assert [stage.kind for stage in load(chain(*names)).stages] == list(names)
        return
    ((before, after),) = bad
    (line,) = refuse(chain(*names))
    assert line.startswith(
        f"p.yaml:6: stages.1: '{after}' cannot come after '{before}' (stages.0, line 5): it takes a "
    )
    assert line.endswith("leave out one of the two" if before == after else f"put '{after}' before it")


@pytest.mark.parametrize("name", FLOAT)
def test_float_stages_between_quantize_and_export_are_refused(refuse, name):
    (line,) = refuse(chain("train", "quantize", name, "export"))
    assert line.startswith(f"p.yaml:7: stages.2: '{name}' cannot come after 'quantize' (stages.1, line 6)")


def test_all_stages_in_the_usual_order(load):
    assert len(load(chain(*STAGE_CONFIGS)).stages) == len(STAGE_CONFIGS)


# --- shipped files and the schema ------------------------------------------------------------------------------------

SHIPPED = sorted((REPOSITORY / "pipelines").rglob("*.y*ml"))


def test_there_are_shipped_pipelines():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_shipped_pipelines_are_valid_and_say_what_they_do(path):
    assert load_pipeline(path).name
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


SCHEMA = Pipeline.model_json_schema(by_alias=True)


def resolve(node):
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def accepts(node, value):
    """A small JSON schema check: enough of the standard for what the schema uses."""
    node = resolve(node)
    if "anyOf" in node or "oneOf" in node:
        return any(accepts(option, value) for option in node.get("anyOf", node.get("oneOf")))
    if "const" in node:
        return value == node["const"]
    if "enum" in node:
        return value in node["enum"]
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    if "type" in node and not isinstance(value, kinds[node["type"]]):
        return False
    if isinstance(value, dict):
        properties, more = node.get("properties", {}), node.get("additionalProperties", True)
        return (
            all(key in value for key in node.get("required", ()))
            and node.get("minProperties", 0) <= len(value) <= node.get("maxProperties", len(value))
            and all(
                accepts(properties.get(key, more if isinstance(more, dict) else {}), inner)
                and (key in properties or more is not False)
                for key, inner in value.items()
            )
        )
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(accepts(node.get("items", {}), item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            node.get("minimum", value) <= value <= node.get("maximum", value)
            and value > node.get("exclusiveMinimum", value - 1)
            and value < node.get("exclusiveMaximum", value + 1)
        )
    return True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_schema_accepts_shipped_pipelines_and_not_their_ruins(path):
    from ruamel.yaml import YAML

    document = YAML(typ="safe", pure=True).load(path.read_text())
    assert accepts(SCHEMA, document)
    assert not accepts(SCHEMA, {**document, "sed": 1})
    assert not accepts(SCHEMA, {**document, "seed": -1})
    assert not accepts(SCHEMA, {**document, "data": {"kind": "digit"}})
    assert not accepts(SCHEMA, {**document, "stages": [{"trian": {}}]})
    assert not accepts(SCHEMA, {**document, "stages": [{"train": {}, "prune": {}}]})


def described(node):
    return "description" in node or any(
        "description" in resolve(option) for option in (node, *node.get("anyOf", ()), *node.get("oneOf", ()))
    )


def test_schema_describes_every_key():
    assert set(SCHEMA["$defs"]["StageEntry"]["properties"]) == set(STAGE_CONFIGS)
    for name, definition in {"Pipeline": SCHEMA, **SCHEMA["$defs"]}.items():
        if name == "JsonValue":
            continue
        assert definition["description"], name
        assert definition["additionalProperties"] is False, name
        for key, node in definition["properties"].items():
            assert described(node), f"{name}.{key}"


def test_schema_refers_only_to_what_it_holds():
    def references(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for item in node:
                yield from references(item)

    assert {reference.removeprefix("#/$defs/") for reference in references(SCHEMA)} <= set(SCHEMA["$defs"])


# --- nothing but ConfigError -----------------------------------------------------------------------------------------

VALID = {
    "name": "a",
    "seed": 0,
    "threads": 2,
    "data": {
        "kind": "arrays",
        "root": "d",
        "normalize": {"mean": [0.5], "std": [0.2]},
        "augment": {"crop": 2, "flip": True},
        "validation": {"from": "test", "size": 0.2},
        "classes": ["x", "y"],
    },
    "model": {"factory": "net.py:make", "kwargs": {"width": [1, {"a": None}]}, "weights": "w.pth"},
    "stages": [
        {"train": {"epochs": 2, "losses": [{"labels": {"smoothing": 0.1}}]}},
        {"distill": {"student": {"factory": "cifar:resnet20"}, "losses": [{"kd": {}}, {"labels": None}]}},
        {"prune": {"target": {"macs": 0.5}, "protect": ["a*"], "recovery": None}},
        {"factorize": {"recovery": {"epochs": 1}}},
        {"quantize": {"calibration": {"samples": 8}}},
        {"export": None},
    ],
    "budget": {"accuracy_drop": 1},
    "bench": {"latency": {"batch_sizes": [1, 8]}},
}


def places(node, at=()):
    yield at
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*at, key))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["train", "prune", "export", "digits", "python", "given", "macs", "a.py:b", "~x/w.pth", 10**30]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
mutations = st.lists(
    st.tuples(st.sampled_from([at for at in places(VALID) if at]), st.sampled_from("drv"), st.text(max_size=5), values),
    min_size=1,
    max_size=4,
)


def mutate(document, at, how, word, value):
    *above, last = at
    node = document
    for key in above:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return  # an earlier mutation took it away
    if isinstance(node, dict) and last in node:
        old = node.pop(last)
        if how != "d":
            node[last if how == "v" else word] = value if how == "v" else old
    elif isinstance(node, list) and isinstance(last, int) and last < len(node):
        if how == "d":
            del node[last]
        else:
            node[last] = value


@settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutations=mutations, key=st.text(max_size=12), value=st.text(max_size=6))
def test_mutated_files_raise_nothing_but_config_errors(tmp_path, mutations, key, value):
    document = copy.deepcopy(VALID)
    for mutation in mutations:
        mutate(document, *mutation)
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML, but for NaN, which is then text
    for overrides in ([], [f"{key}={value}"], [f"stages.{key}={value}"]):
        try:
            load_pipeline(path, overrides)
        except ConfigError as error:
            assert error.problems  # noqa: PT017
            for problem in error.problems:
                assert problem.message
                assert problem.where == "--set" or problem.where.startswith(str(path))


def test_the_document_of_the_property_is_valid(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(VALID))
    assert load_pipeline(path).data.root == Path(os.path.normpath(tmp_path / "d"))
