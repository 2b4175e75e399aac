"""Starts a worker of this package, `compress.bench.<name>`, as a program of its own, out of the package it belongs to itself.

A clone may be running while another version is installed, or none is. The package is found by its place and not by a
search path: a path to it, put first, would let its neighbours hide modules of the standard library.

    python -P worker_start.py latency_worker
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main(worker: str) -> None:
    """Make `compress` mean this package, and run the worker's `main`.

    Args:
        worker: Name of a module beside this one.
    """
    folder = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "compress", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["compress"] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"compress.bench.{worker}").main()


if __name__ == "__main__":
    main(sys.argv[1])
