"""The tables in benchmarks/README.md are what the committed results say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


MEASURED = [
    name
    for name in ("surgery", "recovery", "pruning_peer", "pruning_cost")
    if (BENCHMARKS / "results" / f"{name}.json").is_file()
]


@pytest.mark.parametrize("name", MEASURED)
def test_the_table_is_that_of_the_results(name):
    found = json.loads((BENCHMARKS / "results" / f"{name}.json").read_bytes())
    script = importlib.import_module(name)
    rendered = script.markdown(found if name == "pruning_cost" else found["records"])
    rows = [line for line in rendered.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    shown = (BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in shown] == []
