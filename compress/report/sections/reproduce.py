"""The artifact, what was remarked, where and how it was measured, and what the figures mean."""

from __future__ import annotations

import json
from dataclasses import dataclass

from compress.errors import listed
from compress.report import figures, text
from compress.report.sections.parts import Facts
from compress.results import Results

DEFINITIONS: Facts = (
    (
        "Accuracy",
        (
            "Share of samples whose most likely class is the right one; top-5: among the five most likely. Stages decide on "
            "validation; test is only reported. The interval is Wilson's 95 % interval for a share of n samples. A quantized "
            "model is measured as the ONNX file that is deployed, never as a simulation."
        ),
    ),
    (
        "Points lost or gained",
        (
            "Accuracy minus the reference's in percentage points, so a loss has a minus sign. The 95 % interval is "
            "paired: it comes from the samples that only one of the two models gets right, and is mostly narrower than two "
            "separate intervals would suggest."
        ),
    ),
    (
        "Precision, recall, F1",
        (
            "Of a class: the right answers of all answers that name it, of all its samples, and the harmonic mean of the two; "
            "over all classes their plain mean (macro)."
        ),
    ),
    (
        "Calibration error",
        (
            "Expected calibration error: how far the confidence of the answers is from their accuracy, in 15 bins of equal "
            "width, weighted by samples (Guo et al. 2017)."
        ),
    ),
    (
        "Size",
        "The ONNX file's bytes, in the type named beside its stage; gzipped at level 6. 1 KB is 1000 bytes.",
    ),
    (
        "Parameters",
        (
            "Of the model as PyTorch counts them. The ONNX file has batch normalisation folded into the weights before it and "
            "so holds fewer: the layers' parameters and the share that is not zero are of the file."
        ),
    ),
    (
        "Latency",
        (
            "Each model in a process of its own, threads pinned to their count, warmed up, all models in alternating rounds, "
            "outliers kept: the time of one call, as the median of the rounds' medians with its 95 % interval from order "
            "statistics, which assumes no distribution. It belongs to the machine named above."
        ),
    ),
    (
        "Times faster",
        (
            "Pair by pair: per round the reference's median over the model's, and of these the median with its 95 % interval. "
            "No ratio is claimed where the interval includes 1, nor where the ratio is no further from 1 than the interval of "
            "the reference against itself reaches in that setting."
        ),
    ),
    (
        "The reference against itself",
        (
            "A/A: the same file measured in a second process as if it were another model. Its ratio should be 1; how far it "
            "strays, and how wide its interval is, shows the smallest difference that this machine can tell."
        ),
    ),
    (
        "Cold start and memory",
        (
            "Loading the model and its first answer in a fresh process whose libraries are imported, measured once, so a single "
            "sample; and the largest resident memory of that process, libraries included."
        ),
    ),
    (
        "Time per node",
        (
            "From ONNX Runtime's profile, the mean of the middle half of the calls. Profiling itself costs time, so the sum "
            "exceeds the latency. Nodes that convert quantize, dequantize or reorder."
        ),
    ),
    (
        "Sensitivity to int8",
        (
            "A layer alone in int8, with the weights and scales of the int8 file, all others in float. Relative error: the norm "
            "of the change of all logits over the norm of the float graph's, each sample's mean taken off. It tells layers "
            "apart that change no answer; its share is that of the squared errors, as errors that are independent add up."
        ),
    ),
    ("MACs", "Multiply-accumulate operations of one sample's forward pass: convolutions and matrix products."),
    ("Reference", "The row that the others are compared with: the model before compression."),
)


@dataclass(frozen=True)
class File:
    """A file to deploy."""

    name: str
    size: str
    sha256: str
    is_model: bool


@dataclass(frozen=True)
class Reproduce:
    """What is needed to get the same again."""

    command: str
    conditions: Facts
    """Revision, seed, classes."""
    settings_json: str
    checkpoints: tuple[tuple[str, str, str], ...]
    """Row, folder and digest."""
    machine: Facts


def reproduce(results: Results) -> Reproduce:
    """How `results` came about."""
    rows = zip(figures.labels(results), results.rows, strict=True)
    return Reproduce(
        command=results.command,
        conditions=_conditions(results),
        settings_json=json.dumps(results.settings, indent=2, ensure_ascii=False),
        checkpoints=tuple((label, text.plain(row.checkpoint), text.plain(row.digest)) for label, row in rows),
        machine=_machine(results),
    )


def files(results: Results) -> tuple[File, ...]:
    """The files to deploy; none where the run did not export."""
    artifact = results.artifact
    if artifact is None:
        return ()
    return tuple(
        File(
            text.plain(name),
            f"{text.size(size)} ({size:,} bytes)" if size >= 1000 else text.size(size),
            text.plain(artifact.sha256.get(name, text.MISSING)),
            name == artifact.model,
        )
        for name, size in artifact.files.items()
    )


def checks(results: Results) -> Facts:
    """What the export was checked for."""
    artifact = results.artifact
    checked: list[tuple[str, str]] = []
    if artifact is not None and artifact.max_error is not None:
        error = f"{artifact.max_error:.1e} of the outputs' magnitude, at most"
        checked.append(("fp32 file against the checkpoint", error))
    if artifact is not None and artifact.agreement is not None:
        agreement = f"same answer on {text.percent(100 * artifact.agreement)} of the validation samples"
        checked.append(("int8 file against its float weights", agreement))
    return tuple(checked)


def warnings(results: Results) -> Facts:
    """Where each warning arose, and what it says."""
    return _remarks(results, [row.warnings for row in results.rows], results.warnings)


def notes(results: Results) -> Facts:
    """Where each note arose, and what it says."""
    return _remarks(results, [row.notes for row in results.rows])


def _remarks(results: Results, per_row: list[tuple[str, ...]], of_run: tuple[str, ...] = ()) -> Facts:
    remarks = [("run", remark) for remark in of_run]
    for label, of_row in zip(figures.labels(results), per_row, strict=True):
        remarks += [(label, remark) for remark in of_row]
    return tuple((where, text.plain(remark)) for where, remark in remarks)


def _conditions(results: Results) -> Facts:
    classes = f"{len(results.classes):,}: {listed(results.classes)}" if results.classes else text.MISSING
    return (
        ("Git revision", text.plain(results.git_revision or "not in a git repository")),
        ("Seed", str(results.seed)),
        ("Classes", text.plain(classes)),
    )


def _machine(results: Results) -> Facts:
    machine = results.machine
    places = sorted({setting.place for setting in figures.settings(results)})
    facts = (
        ("CPU", f"{machine.cpu} ({text.plural(machine.cores, 'core')}, {machine.architecture})"),
        ("Instruction sets", ", ".join(machine.instruction_sets) or text.MISSING),
        ("GPU", machine.cuda_device or "none"),
        ("Latency measured on", "; ".join(places) or text.MISSING),
        ("System", machine.system),
        ("Python", machine.python),
        ("Versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items()) or text.MISSING),
    )
    return tuple((term, text.plain(value)) for term, value in facts)
