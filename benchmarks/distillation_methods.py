"""The methods that `distillation.py` compares: stages `distill` with settings from papers, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STUDENT = "cifar:resnet20"
ALONE, PLAIN = "none", "kd"
"""What all methods are compared with: labels only, and soft labels as they are usually used."""

LABELS = {"labels": {"weight": 1.0}}
KD = {"losses": [{"kd": {"temperature": 4.0, "weight": 0.9}}, {"labels": {"weight": 0.1}}]}
STAGES_OF_BOTH = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}
LAST = {"layer3": "layer3"}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    what: str
    stage: Mapping[str, Any]
    """Settings of the stage, but for those that all methods share."""


def _beside_labels(*terms: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    return {"losses": [LABELS, *terms], **settings}


METHODS: Mapping[str, Method] = {
    ALONE: Method("labels only", {"losses": [LABELS]}),
    "entropy": Method("labels, sure answers cost", _beside_labels({"entropy": {"weight": 0.1}})),
    "smoothing": Method("smoothed labels", {"losses": [{"labels": {"weight": 1.0, "smoothing": 0.1}}]}),
    PLAIN: Method("0.9 KD + 0.1 CE, T = 4", KD),
    "kd_sum": Method("CE + 1.0 KD, T = 4", _beside_labels({"kd": {"temperature": 4.0, "weight": 1.0}})),
    "kd_cross_entropy": Method(
        "as kd, cross-entropy",
        {"losses": [{"kd": {"divergence": "cross_entropy", "weight": 0.9}}, {"labels": {"weight": 0.1}}]},
    ),
    "standardize": Method(
        "z-scored logits, T = 2",
        {"losses": [{"kd": {"standardize": True, "temperature": 2.0, "weight": 9.0}}, {"labels": {"weight": 0.1}}]},
    ),
    "temperature_schedule": Method(
        "as kd, T from 8 to 1",
        {
            "losses": [
                {"kd": {"temperature": {"start": 8.0, "end": 1.0, "shape": "cosine"}, "weight": 0.9}},
                {"labels": {"weight": 0.1}},
            ]
        },
    ),
    "share_schedule": Method(
        "teacher's share from 0.9 to 0.1",
        _beside_labels(
            {"kd": {"temperature": 4.0, "weight": 1.0}},
            teacher_share={"start": 0.9, "end": 0.1, "shape": "linear"},
        ),
    ),
    "teacher_labels": Method(
        "the teacher's hard labels, half", _beside_labels({"teacher_labels": {"weight": 1.0}}, teacher_share=0.5)
    ),
    "logit_mse": Method("squared difference of logits", _beside_labels({"logit_mse": {"weight": 0.1}})),
    "dkd": Method("decoupled, beta = 2, T = 4", _beside_labels({"dkd": {"beta": 2.0, "temperature": 4.0}})),
    # The authors' loss has a factor T² = 16, ours none: 32 is their 2.
    "dist": Method("correlations, T = 4", _beside_labels({"dist": {"beta": 32.0, "gamma": 32.0, "temperature": 4.0}})),
    "dist_t1": Method("correlations, T = 1", _beside_labels({"dist": {"beta": 2.0, "gamma": 2.0}})),
    # Half the squared difference here, the whole in the comparison: 200 is its 100.
    "hint": Method("hint at layer2", _beside_labels({"hint": {"layers": {"layer2": "layer2"}, "weight": 200.0}})),
    "attention": Method(
        "attention maps of three layers", _beside_labels({"attention": {"layers": STAGES_OF_BOTH, "weight": 1000.0}})
    ),
    "similarity": Method(
        "which samples look alike at layer3", _beside_labels({"similarity": {"layers": LAST, "weight": 3000.0}})
    ),
    "relational": Method("distances and angles at layer3", _beside_labels({"relational": {"layers": LAST}})),
    "kd_attention": Method(
        "kd and attention", {"losses": [*KD["losses"], {"attention": {"layers": STAGES_OF_BOTH, "weight": 1000.0}}]}
    ),
    "kd_similarity": Method(
        "kd and similarity", {"losses": [*KD["losses"], {"similarity": {"layers": LAST, "weight": 3000.0}}]}
    ),
    "kd_mixup": Method("kd on blended images", {**KD, "mixup": 0.2}),
    "kd_cutmix": Method("kd on images with a box of another", {**KD, "cutmix": 1.0}),
    "peers": Method(
        "two students teach each other, T = 1",
        _beside_labels({"kd": {"from": "peers", "temperature": 1.0, "weight": 1.0}}, peers=[{"factory": STUDENT}]),
    ),
    "ema": Method(
        "its own moving average teaches, T = 1",
        _beside_labels({"kd": {"from": "ema", "temperature": 1.0, "weight": 1.0}}, ema_teacher=0.999),
    ),
    "ensemble": Method("kd from ResNet-56 and ResNet-20", {**KD, "ensemble": {"others": "to be named"}}),
}
