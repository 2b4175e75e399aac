"""Starts `compress.bench.latency_worker` as a program of its own, out of the package that this file belongs to.

A clone may be running while another version is installed, or none is. The package is found by its place and not by a
search path: a path to it, put first, would let its neighbours hide modules of the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Make `compress` mean this package, and measure."""
    folder = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "compress", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["compress"] = package
    spec.loader.exec_module(package)
    # Only now is there a package to import from.
    from compress.bench import latency_worker

    latency_worker.main()


if __name__ == "__main__":
    main()
