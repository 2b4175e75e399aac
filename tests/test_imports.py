"""What importing costs: planning and help must not wait for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import compress

HEAVY = {
    "torch",
    "torchvision",
    "torch_pruning",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "accelerate",
    "timm",
    "sklearn",
    "scipy",
    "matplotlib",
}
LIST = "; import sys, json; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def modules_after(code):
    """Top-level modules that a fresh interpreter holds after running `code`."""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code + LIST], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "compress",
        "compress.cli",
        "compress.plan",
        "compress.measured",
        "compress.results",
        "compress.report",
        "compress.stages",
        "compress.terminal.console",
    ],
)
def test_imports_neither_torch_nor_anything_as_heavy(module):
    drawing = {"matplotlib"} if module == "compress.report" else set()
    assert not (HEAVY - drawing) & modules_after(f"import {module}")


def test_importing_the_package_takes_only_these_libraries():
    before = modules_after("import argparse, asyncio, decimal, importlib.metadata, zoneinfo, urllib.request, tempfile")
    extra = {name for name in modules_after("import compress") - before if not name.startswith("_")}
    extra -= set(sys.stdlib_module_names)
    allowed = {
        "annotated_types",
        "compress",
        "pydantic",
        "pydantic_core",
        "ruamel",
        "typing_extensions",
        "typing_inspection",
    }
    assert extra <= allowed, extra - allowed


def test_public_names_resolve_and_are_all_there():
    assert compress.__all__ == sorted(compress.__all__)
    for name in compress.__all__:
        assert getattr(compress, name) is not None
    assert callable(compress.run)
    assert callable(compress.load_pipeline)
    assert callable(compress.load_checkpoint)
    assert issubclass(compress.CompressError, Exception)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'compress' has no attribute 'nothing'"):
        _ = compress.nothing


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert compress.__version__ == version("compress")
