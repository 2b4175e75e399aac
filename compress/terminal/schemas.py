"""The documents that have a JSON schema, each with the class that describes it."""

from __future__ import annotations

import importlib
from typing import Any, Final, Literal, TypeAlias

Document: TypeAlias = Literal["pipeline", "results", "bench", "compare", "robustness"]
_CLASSES: Final[dict[Document, tuple[str, str]]] = {
    "pipeline": ("compress.config", "Pipeline"),
    "results": ("compress.results", "Results"),
    "bench": ("compress.results", "BenchResults"),
    "compare": ("compress.comparison.records", "Compared"),
    "robustness": ("compress.robustness_results", "RobustnessResults"),
}


def json_schema(of: Document) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a document, every field described."""
    module, name = _CLASSES[of]
    described: dict[str, Any] = getattr(importlib.import_module(module), name).model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
