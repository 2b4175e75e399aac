"""Runs of every kind that a report meets, with what strangers may put into one."""

from __future__ import annotations

import base64

from report_examples import STAGES, example_machine, example_pruning, example_results, example_run

from compress.results import Artifact

HOSTILE = '<script>alert("1")</script> | `rm` <img src=x onerror=1> *b* $x_2$ [l](u)\n# head & \x07'


def example_cases():
    """Runs of every kind that a report meets, by name."""
    whole = example_results()
    twice = list(whole.rows)
    twice.insert(
        4, whole.rows[3].model_copy(update={"stage": "prune-2", "warnings": ("still rising at the last epoch",)})
    )
    twice[5] = twice[5].model_copy(update={"notes": ("2 groups left alone",)})
    return {
        "whole": whole,
        "no-latency": example_results(is_timed=False),
        "source-alone": example_results(stages=("source",)),
        "until-prune": example_results(stages=STAGES[:4]),
        "two-classes": example_results(classes=("cat", "dog")),
        "fifty-classes": example_results(classes=50, samples=900, more_wrong=30),
        "thousand-classes": example_results("imagenet", classes=1000, samples=5000, more_wrong=40),
        "many-settings": example_results(loads=((1, 1), (1, 2), (8, 1), (8, 2), (32, 2))),
        "noisy": example_results(is_noisy=True),
        "unclear": example_results(time_factor=7.2),
        "worse": example_results(size_factor=30.0, time_factor=12.0, more_wrong=30),
        "twice": example_run("twice", twice, "train", whole.classes, repeats=whole.repeats, changed=whole.changed),
        "hostile": example_hostile(),
    }


def example_hostile():
    """A run in which every text that comes from outside tries to be markup."""
    classes = tuple(f"{HOSTILE} {index}" for index in range(6))
    base = example_results(
        HOSTILE, classes=classes, more_wrong=12, command=f"run ``` {HOSTILE}", settings={HOSTILE: "```"}
    )
    *rows, last = base.rows
    latency = tuple(one.model_copy(update={"provider": HOSTILE, "precision": HOSTILE}) for one in last.latency)
    named = [group.model_copy(update={"name": HOSTILE}) for group in example_pruning().groups]
    spoilt = last.model_copy(
        update={
            "stage": HOSTILE,
            "pruning": example_pruning().model_copy(update={"groups": tuple(named)}),
            "notes": (HOSTILE,),
            "warnings": (HOSTILE,),
            "latency": latency,
            "checkpoint": HOSTILE,
            "size": last.size.model_copy(
                update={
                    "layers": tuple(
                        layer.model_copy(update={"name": HOSTILE, "operator": HOSTILE}) for layer in last.size.layers
                    )
                }
            ),
            "sensitivity": last.sensitivity.model_copy(
                update={
                    "layers": tuple(
                        layer.model_copy(update={"name": HOSTILE, "operator": HOSTILE})
                        for layer in last.sensitivity.layers
                    )
                }
            ),
            "profile": last.profile.model_copy(
                update={
                    "nodes": tuple(
                        node.model_copy(update={"name": HOSTILE, "operator": HOSTILE}) for node in last.profile.nodes
                    )
                }
            ),
        }
    )
    changed = (
        base.changed[0].model_copy(update={"image": '"><script>alert(1)</script>'}),
        base.changed[1].model_copy(update={"image": base64.b64encode(b"<script>alert(1)</script>").decode()}),
        base.changed[2].model_copy(update={"truth": -1, "answer": 99}),
        *base.changed[3:],
    )
    machine = example_machine(cpu=HOSTILE, system=HOSTILE, versions={HOSTILE: HOSTILE})
    artifact = Artifact(files={HOSTILE: 5}, sha256={}, model="no", max_error=None, agreement=None)
    update = {
        "rows": (*rows, spoilt),
        "changed": changed,
        "machine": machine,
        "artifact": artifact,
        "warnings": (HOSTILE,),
        "git_revision": HOSTILE,
    }
    return base.model_copy(update=update)
