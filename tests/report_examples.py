"""Example `Results` for the tests of what reads them. Every figure is derived from made-up answers, so that they agree."""

from __future__ import annotations

import base64
import io
import math
from random import Random

from PIL import Image, ImageDraw

from compress.measured import (
    Accuracy,
    ClassScore,
    GroupSensitivity,
    Int8Effect,
    Latency,
    Layer,
    LayerSensitivity,
    OperatorTime,
    PairedDifference,
    Profile,
    PruningSensitivity,
    Quality,
    Ratio,
    Repeat,
    Sensitivity,
    SilencedChannels,
    Size,
    SplitAccuracy,
    SplitQuality,
)
from compress.results import Artifact, Budget, ChangedSample, Comparison, Epoch, Machine, Results, Row

STAGES = ("source", "train", "distill", "prune", "factorize", "quantize", "export")
"""A run with everything; `example_results` takes any of them in this order, 'source' first."""

# Bytes, wrong answers on validation (test has one more), ms with one thread, parameters, MACs, seconds.
_STAGES = {
    "source": (3_412_850, 0.9, 2.310, 853_018, 125_500_000, 0.0),
    "train": (3_424_536, 0.011, 2.314, 853_018, 125_500_000, 61.4),
    "distill": (1_083_866, 0.008, 0.756, 269_722, 40_600_000, 34.0),
    "prune": (472_517, 0.011, 0.489, 116_698, 18_100_000, 22.8),
    "factorize": (407_633, 0.014, 0.475, 100_122, 16_100_000, 8.1),
    "quantize": (147_299, 0.017, 0.317, 100_122, 16_100_000, 2.4),
    "export": (148_702, 0.017, 0.319, 100_122, 16_100_000, 1.2),
}
_INT8 = ("quantize", "export")
_TRAINED = ("train", "distill", "prune", "factorize")


def example_results(
    name="digits",
    *,
    stages=STAGES,
    classes=10,
    samples=360,
    is_timed=True,
    is_noisy=False,
    size_factor=1.0,
    time_factor=1.0,
    more_wrong=0,
    loads=((1, 1), (1, 2)),
    **changes,
):
    """A run. `changes` replace fields of the `Results`.

    Args:
        name: Of the run.
        stages: Some of `STAGES`, in their order; the reference is 'train' where it is among them.
        classes: Their number, or their names.
        samples: Of the validation split; test has one less.
        is_timed: Whether latency, its repeats and the profiles were measured.
        is_noisy: Whether the reference against itself was not told apart to 5 %.
        size_factor: Multiplies the bytes of the rows after the reference.
        time_factor: Multiplies their times.
        more_wrong: Added to their wrong answers on each split.
        loads: Batch size and threads of each setting.
    """
    names = tuple(_names(classes)) if isinstance(classes, int) else tuple(classes)
    reference = "train" if "train" in stages else stages[0]
    splits = {"validation": samples, "test": samples - 1}
    answers = {
        stage: {
            split: example_answers(
                n,
                len(names),
                max(0, round(_STAGES[stage][1] * n) + (more_wrong if _is_after(stage, reference) else 0)),
                _own_errors(stage),
            )
            for split, n in splits.items()
        }
        for stage in stages
    }
    rows = []
    for position, stage in enumerate(stages):
        size_bytes, _, one_thread_ms, parameters, macs, seconds = _STAGES[stage]
        is_after = _is_after(stage, reference)
        size_bytes = round(size_bytes * size_factor) if is_after else size_bytes
        one_thread_ms = one_thread_ms * time_factor if is_after else one_thread_ms
        precision = "int8" if stage in _INT8 else "fp32"
        timed = {
            "latency": tuple(
                example_latency(
                    _load_ms(one_thread_ms, *load),
                    *load,
                    precision=precision,
                    reference=(reference, _load_ms(_STAGES[reference][2], *load)) if stage != reference else None,
                )
                for load in loads
            ),
            "profile": example_profile(1.15 * one_thread_ms, precision),
        }
        rows.append(
            example_row(
                stage,
                answers[stage],
                names,
                answers[reference] if is_after else None,
                size=example_size(size_bytes, parameters, macs),
                precision=precision,
                seconds=seconds,
                training=example_training(12, 0.02) if stage in _TRAINED else (),
                sensitivity=example_sensitivity(example_size(size_bytes)) if stage in _INT8 else None,
                pruning=example_pruning() if stage == "prune" else None,
                checkpoint=f"{position:02d}-{stage}-0123abcd",
                **(timed if is_timed else {}),
            )
        )
    return example_run(
        name,
        rows,
        reference,
        names,
        **{
            "repeats": tuple(example_repeat(reference, *load, is_noisy=is_noisy) for load in loads) if is_timed else (),
            "changed": example_changed(answers[reference]["validation"], answers[stages[-1]]["validation"], len(names)),
            **changes,
        },
    )


def example_run(name, rows, reference, classes, **changes):
    """A run of given rows, its budget and artifact fitting the last one. `changes` replace fields of the `Results`."""
    last = rows[-1]
    content = {
        "name": name,
        "created": "2026-07-01T12:00:00Z",
        "seed": 7,
        "command": f"compress run {name}.yaml",
        "git_revision": "0123456789abcdef0123456789abcdef01234567",
        "settings": {"name": name, "stages": [{row.stage: {"epochs": 12}} for row in rows]},
        "machine": example_machine(),
        "reference": reference,
        "classes": tuple(classes),
        "rows": tuple(rows),
        "budget": None
        if last.comparison is None
        else Budget(
            accuracy_drop=1.0,
            difference=last.comparison.validation,
            met=last.comparison.validation.points >= -1.0,
        ),
        "artifact": None
        if last.stage != "export"
        else Artifact(
            files={"model.int8.onnx": last.size_bytes, "model.onnx": 407_633, "card.md": 912},
            sha256={"model.int8.onnx": last.sha256, "model.onnx": "cd" * 32, "card.md": "ef" * 32},
            model="model.int8.onnx",
            max_error=3.1e-6,
            agreement=0.9975,
        ),
    }
    return Results(**{**content, **changes})


def example_row(stage, answers, classes, reference=None, *, size, precision="fp32", **more):
    """A row whose accuracy, quality and comparison follow from the answers per split, the reference's among them."""
    quality = {split: example_quality(given, len(classes)) for split, given in answers.items()}
    compared = (
        None
        if reference is None
        else Comparison(**{split: example_difference(reference[split], given) for split, given in answers.items()})
    )
    content = {
        "stage": stage,
        "accuracy": SplitAccuracy(
            **{split: example_accuracy(_right(given), len(given)) for split, given in answers.items()}
        ),
        "quality": SplitQuality(**quality),
        "comparison": compared,
        "parameters": size.parameters,
        "macs": size.macs,
        "size": size,
        "sha256": "ab" * 32,
        "seconds": 30.0,
        "checkpoint": f"00-{stage}-0123abcd",
        "digest": "ab" * 32,
        "precision": precision,
    }
    return Row(**{**content, **more})


def example_answers(n, classes, wrong, own=0):
    """Pairs of the right class and the answer. Models fail on the same hard samples, but for `own` of their errors."""
    order = list(range(n))
    Random(5).shuffle(order)
    shared = max(0, wrong - own)
    failed = {*order[:shared], *order[shared + 7 * own : shared + 7 * own + wrong - shared]}
    chooser = Random(11)
    pairs = []
    for index in range(n):
        truth = index % classes
        other = (truth + chooser.choice((1, 1, 2, 5))) % classes
        pairs.append((truth, other if index in failed and other != truth else truth))
    return pairs


def example_accuracy(correct, n):
    """Accuracy with its Wilson interval."""
    z, share = 1.959964, correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Accuracy(correct=correct, n=n, percent=100 * share, low=100 * low, high=100 * high)


def example_quality(answers, classes):
    """Quality that follows from pairs of right class and answer."""
    cells = {}
    for pair in answers:
        cells[pair] = cells.get(pair, 0) + 1
    truths, answered = [0] * classes, [0] * classes
    for (truth, answer), count in cells.items():
        truths[truth] += count
        answered[answer] += count
    scores = []
    for index in range(classes):
        right = cells.get((index, index), 0)
        precision = 100 * right / answered[index] if answered[index] else 0.0
        recall = 100 * right / truths[index] if truths[index] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        scores.append(ClassScore(precision=precision, recall=recall, f1=f1, n=truths[index]))
    wrong = len(answers) - _right(answers)
    return Quality(
        top5=example_accuracy(len(answers) - wrong // 4, len(answers)) if classes > 5 else None,
        precision=sum(score.precision for score in scores) / classes,
        recall=sum(score.recall for score in scores) / classes,
        f1=sum(score.f1 for score in scores) / classes,
        classes=tuple(scores),
        confusion=tuple(sorted((*pair, count) for pair, count in cells.items())) if classes <= 100 else None,
        calibration_error=1.1 + 20 * wrong / len(answers),
        samples_per_second=5120.0,
    )


def example_difference(reference, answers):
    """One model's answers against another's on the same samples."""
    n = len(answers)
    lost = sum(mine[1] != mine[0] == theirs[1] for theirs, mine in zip(reference, answers, strict=True))
    gained = sum(theirs[1] != mine[0] == mine[1] for theirs, mine in zip(reference, answers, strict=True))
    points = 100 * (gained - lost) / n
    half = 100 * 1.959964 * math.sqrt(max(0.0, lost + gained - (gained - lost) ** 2 / n)) / n
    tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    same = sum(theirs == mine for theirs, mine in zip(reference, answers, strict=True))
    return PairedDifference(
        points=points,
        low=points - half,
        high=points + half,
        n=n,
        only_reference_correct=lost,
        only_artifact_correct=gained,
        p_value=min(1.0, 2 * tail),
        agreement=100 * same / n,
    )


def example_latency(
    median_ms,
    batch_size=1,
    threads=1,
    *,
    precision="fp32",
    reference=None,
    spread=0.02,
    device="cpu",
    provider="CPUExecutionProvider",
):
    """A latency. `reference` is the name and the median, ms, of what it is compared with, in the same setting."""
    ratio = None
    if reference is not None:
        name, base = reference
        ratio = example_ratio(base / median_ms, spread, name)
    return Latency(
        device=device,
        backend="onnxruntime",
        provider=provider,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        median_ms=median_ms,
        low_ms=median_ms * (1 - spread),
        high_ms=median_ms * (1 + spread),
        p90_ms=median_ms * 1.2,
        p99_ms=median_ms * 1.5,
        runs=2000,
        samples_per_second=1000 * batch_size / median_ms,
        cold_start_ms=12 + 20 * median_ms,
        peak_memory_bytes=round(78e6 + 4e6 * median_ms),
        ratio=ratio,
    )


def example_ratio(value, spread=0.02, against="train"):
    """A ratio whose interval is `spread` of it to both sides."""
    return Ratio(against=against, value=value, low=value * (1 - spread), high=value * (1 + spread))


def example_repeat(name="train", batch_size=1, threads=1, *, is_noisy=False):
    """The reference against itself."""
    return Repeat(
        name=name,
        device="cpu",
        backend="onnxruntime",
        precision="fp32",
        batch_size=batch_size,
        threads=threads,
        ratio=example_ratio(1.04, 0.09, name) if is_noisy else example_ratio(1.005, 0.012, name),
        is_noisy=is_noisy,
    )


def example_size(size_bytes, parameters=1000, macs=100_000):
    """Size of a network of 20 convolutions that grow and one linear layer."""
    shares = [1 + index**1.7 for index in range(20)]
    weight_bytes = round(0.94 * size_bytes)
    convolutions = [
        Layer(
            name=f"layer{1 + index // 7}.{index // 2 % 4}.conv{1 + index % 2}",
            operator="Conv",
            parameters=round(0.97 * parameters * share / sum(shares)),
            size_bytes=round(0.97 * weight_bytes * share / sum(shares)),
            macs=macs // 20,
            output=(1, 16 << (index // 7), 32 >> (index // 7), 32 >> (index // 7)),
        )
        for index, share in enumerate(shares)
    ]
    linear = Layer(
        name="fc",
        operator="Gemm",
        parameters=round(0.03 * parameters),
        size_bytes=round(0.03 * weight_bytes),
        macs=640,
        output=(1, 10),
    )
    return Size(
        size_bytes=size_bytes,
        gzip_bytes=round(0.9 * size_bytes),
        weight_bytes=weight_bytes,
        parameters=parameters,
        nonzero_parameters=parameters - 12,
        macs=macs,
        activation_peak_bytes=196_608,
        layers=(*convolutions, linear),
    )


def example_profile(call_ms, precision="fp32"):
    """Where a call's time goes: in int8 one node that fell back to float, and conversions."""
    if precision == "int8":
        shares = [(f"layer1.{index}.conv1", "QLinearConv", "int8", 0.044) for index in range(16)]
        shares += [(f"layer1.{index}.add", "QLinearAdd", "int8", 0.012) for index in range(8)]
        shares += [("input_quantize", "QuantizeLinear", "convert", 0.03), ("pool", "ReduceMean", "float", 0.05)]
        shares += [("fc_dequantize", "DequantizeLinear", "convert", 0.02), ("fc", "QGemm", "int8", 0.03)]
    else:
        shares = [(f"layer1.{index}.conv1", "Conv", "float", 0.052) for index in range(16)]
        shares += [("reorder", "ReorderOutput", "convert", 0.02), ("pool", "ReduceMean", "float", 0.05)]
        shares += [("fc", "Gemm", "float", 0.02)]
    return Profile(
        provider="CPUExecutionProvider",
        batch_size=1,
        threads=1,
        calls=200,
        call_ms=call_ms,
        nodes=tuple(
            OperatorTime(name=name, operator=operator, kind=kind, milliseconds=share * call_ms)
            for name, operator, kind, share in shares
        ),
    )


def example_sensitivity(size, n=256):
    """What the layers of a file lose in int8, the first one most; only that changes answers."""
    errors = [2.5 / (1 + index) for index in range(len(size.layers))]
    layers = [
        LayerSensitivity(
            name=layer.name,
            operator=layer.operator,
            changed=7 if index == 0 else 0,
            only_float_correct=5 if index == 0 else 0,
            only_int8_correct=1 if index == 0 else 0,
            error_percent=error,
        )
        for index, (layer, error) in enumerate(zip(size.layers, errors, strict=True))
    ]
    together = Int8Effect(changed=9, only_float_correct=6, only_int8_correct=2, error_percent=3.21)
    return Sensitivity(split="validation", n=n, together=together, layers=tuple(layers))


def example_pruning(groups=12, n=256):
    """What groups of channels cost, the fourth one most."""
    return PruningSensitivity(
        n=n,
        percent=98.83,
        groups=tuple(
            GroupSensitivity(
                name=f"layer1.{index}.conv1",
                channels=16,
                removed=index % 3 * 4,
                steps=tuple(
                    SilencedChannels(ratio=ratio, silenced=round(16 * ratio), percent=98.83 - loss)
                    for ratio in (0.25, 0.5, 0.75)
                    for loss in [60 * ratio**2 if index == 3 else ratio * index]
                ),
            )
            for index in range(groups)
        ),
    )


def example_training(epochs=12, floor=0.02):
    """Epochs of a training that converges."""
    return tuple(
        Epoch(
            epoch=epoch,
            loss=floor + 2.2 * math.exp(-0.55 * epoch),
            learning_rate=0.05,
            validation_loss=2 * floor + 2.1 * math.exp(-0.5 * epoch) + 0.01 * (epoch % 3),
            validation_percent=99.2 - 85 * math.exp(-0.6 * epoch) - 0.3 * (epoch % 2),
            seconds=4.2,
        )
        for epoch in range(1, epochs + 1)
    )


def example_changed(reference, answers, classes, limit=24):
    """Samples that the reference answers right and the other model wrong, as small pictures of the right class's number."""
    lost = [
        (index, mine)
        for index, (theirs, mine) in enumerate(zip(reference, answers, strict=True))
        if mine[1] != mine[0] == theirs[1]
    ]
    return tuple(
        ChangedSample(
            index=index,
            truth=truth,
            answer=answer,
            confidence_before=0.98 - 0.03 * rank % 0.5,
            confidence_after=0.91 - 0.04 * rank % 0.5,
            image=example_png(str(truth % max(10, classes))),
        )
        for rank, (index, (truth, answer)) in enumerate(lost[:limit])
    )


def example_png(word, side=16):
    """A small grey picture of a word, base64."""
    image = Image.new("L", (side, side), 12)
    ImageDraw.Draw(image).text((side // 3, 1), word, fill=235)
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def example_machine(**changes):
    """A machine."""
    content = {
        "host": "0123456789abcdef",
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "architecture": "x86_64",
        "instruction_sets": ("avx2", "avx512_vnni"),
        "cuda_device": None,
        "system": "Linux",
        "python": "3.11.7",
        "versions": {"torch": "2.15.0", "onnxruntime": "1.31.0"},
    }
    return Machine(**{**content, **changes})


def _names(count):
    return [str(index) for index in range(count)] if count <= 10 else [f"class {index:04d}" for index in range(count)]


def _is_after(stage, reference):
    return STAGES.index(stage) > STAGES.index(reference)


def _own_errors(stage):
    """Wrong answers that a stage does not share with the reference."""
    return {"distill": 1, "prune": 2, "factorize": 2, "quantize": 3, "export": 3}.get(stage, 0)


def _load_ms(one_thread_ms, batch_size, threads):
    return one_thread_ms * batch_size**0.9 / threads**0.7


def _right(answers):
    return sum(truth == answer for truth, answer in answers)
