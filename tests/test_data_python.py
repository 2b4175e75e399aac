"""Data from the user's callable: what it may return, and how its mistakes are shown."""

import sys
import textwrap

import numpy as np
import pytest
import torch

from compress.config.data import PythonConfig, Validation
from compress.data.base import Input
from compress.data.load import load_data
from compress.errors import DataError

FROM_TEST = Validation.model_validate({"from": "test", "size": 4})
HEAD = """
import numpy as np, torch
rng = np.random.default_rng(0)
def images(n): return rng.integers(0, 256, (n, 5, 7, 3), dtype=np.uint8)
def labels(n): return np.arange(n) % 2
"""

DATASET = """
class D:
    def __len__(self): return 9
    def __getitem__(self, i): return {}
def load(): return {{"train": D()}}
"""


def config(tmp_path, body, name="load", **settings):
    file = tmp_path / "own.py"
    file.write_text(HEAD + textwrap.dedent(body))
    return PythonConfig(kind="python", callable=f"{file}:{name}", **settings)


def whole(split):
    return torch.cat([batch.inputs[0] for batch in split.batches(7)])


def test_pairs_of_arrays_with_kwargs_and_classes(tmp_path):
    body = """
    def load(n, shuffle=False):
        return {"train": (images(n), labels(n)), "test": (images(10), labels(10)), "classes": ["cat", "dog"]}
    """
    data = load_data(config(tmp_path, body, kwargs={"n": 30}, validation=FROM_TEST), seed=0)
    assert data.classes == ("cat", "dog")
    assert data.inputs[0].shape == (3, 5, 7)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 4, 6)


def test_tensors_lists_and_bfloat16(tmp_path):
    body = """
    def load():
        x = torch.rand(20, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        return {"train": (x.bfloat16(), [i % 2 for i in range(20)])}
    """
    data = load_data(config(tmp_path, body), seed=0)
    assert data.inputs[0].shape == (3, 5, 7)


def test_map_style_dataset(tmp_path):
    body = """
    class Squares(torch.utils.data.Dataset):
        def __len__(self): return 20
        def __getitem__(self, i): return torch.full((3, 5, 7), i / 20), torch.tensor(i % 2)
    def load():
        return {"train": Squares(), "validation": Squares()}
    """
    settings = config(tmp_path, body, validation=Validation.model_validate({"from": "given"}), test_size=0.5)
    data = load_data(settings, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 20, 10)
    back = whole(data.validation) * torch.tensor(data.inputs[0].std).view(3, 1, 1) + torch.tensor(
        data.inputs[0].mean
    ).view(3, 1, 1)
    torch.testing.assert_close(back[:, 0, 0, 0], torch.arange(20) / 20)


def test_layout_any_passes_spectrograms_through(tmp_path):
    body = """
    def load():
        return {"train": (rng.normal(0, 9, (20, 1, 5, 7)), labels(20)), "layout": "any"}
    """
    data = load_data(config(tmp_path, body), seed=0)
    assert data.inputs == (Input("input", (1, 5, 7)),)


def test_mapped_arrays_are_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 5, 7, 3), np.uint8))
    body = f"""
    def load():
        return {{"train": (np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r"), labels(20))}}
    """
    data = load_data(config(tmp_path, body), seed=0)
    assert isinstance(data.train._rows[0].stored.base, np.memmap)


def test_module_on_the_path(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sets.py").write_text(HEAD + 'def load(): return {"train": (images(20), labels(20))}\n')
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data(PythonConfig(kind="python", callable="own_package.sets:load"), seed=0)
    assert len(data.train) + len(data.validation) + len(data.test) == 20
    for name in ("own_package", "own_package.sets"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def load(): return 1 / 0", r"own.py:load raised ZeroDivisionError: division by zero \(.*own.py:6\)"),
        ("def load(x): return {}", r"own.py:load raised TypeError: load\(\) missing 1 required .* 'x'$"),
        ("def laod(): return {}", "own.py has no callable 'load'; did you mean 'laod'"),
        ("import no_such_thing", r"own.py cannot be imported: ModuleNotFoundError: .*no_such_thing.*own.py:6\)"),
        ("def load(: return", "own.py cannot be imported: SyntaxError"),
        ("def load(): return [1]", "returned list, not a mapping with 'train'"),
        ("def load(): return {'test': 1}", "returned no 'train'"),
        ("def load(): return {'train': 1, 'valid': 2}", "the unknown key 'valid' .*did you mean 'validation'"),
        ("def load(): return {'train': images(4)}", "'train' as ndarray, not a pair"),
        ("def load(): return {'train': iter([])}", "'train' as list_iterator, not a pair"),
        ("def load(): return {'train': ('a', labels(4))}", "inputs must be an array or a tensor, got str"),
        ("def load(): return {'train': ([[1], [1, 2]], [0, 1])}", "inputs must be an array or a tensor, got list"),
        ("def load(): return {'train': (images(4), labels(4)), 'layout': 'chw'}", "returned layout 'chw'"),
        ("def load(): return {'train': (images(4), labels(4)), 'classes': 2}", "classes that are not a sequence"),
        (
            "def load(): return {'train': (images(4) * 2.0, labels(4))}",
            r"'train inputs'\[0\] holds values.*return 'layout'",
        ),
        (
            "class D(list):\n    __getitem__ = lambda self, i: 5\ndef load(): return {'train': D([1, 2, 3])}",
            "'train' as D, not a pair",
        ),
        (
            DATASET.format("torch.zeros(3 + i), 0"),
            r"returned 'train'\[1\]: the input is float32 \(4,\), the first is float32 \(3,\)",
        ),
        (
            DATASET.format("torch.zeros(3), 0.5"),
            r"returned 'train'\[0\]: the label is float, not an integer",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, body, message):
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path, body), seed=0)


def test_missing_module_and_file(tmp_path):
    with pytest.raises(DataError, match=r"data.callable: no module 'no_such.thing' with a source file"):
        load_data(PythonConfig(kind="python", callable="no_such.thing:load"), seed=0)
    (tmp_path / "own.py").write_text("")
    with pytest.raises(DataError, match=r"data.callable: no such file: .*owm.py; did you mean 'own.py'"):
        load_data(PythonConfig(kind="python", callable=f"{tmp_path / 'owm.py'}:load"), seed=0)
