"""What each group of channels costs on validation: measured once for the same model, channels and samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from compress.data.splits import stratified_sample
from compress.files import canonical_json, readable_json, write_file
from compress.measured import PruningSensitivity
from compress.methods.groups import ChannelGroup
from compress.provenance import code_digest, versions
from compress.pruning.sensitivity import RATIOS, sensitivities, silenced_channels
from compress.seeds import derive_seed
from compress.stages.base import Context
from compress.training import evaluate

_BATCH = 64
GroupCosts = Callable[[nn.Module, Sequence[ChannelGroup], Mapping[str, Tensor]], PruningSensitivity]


def group_costs(samples: int, origin: Mapping[str, JsonValue], context: Context) -> GroupCosts:
    """What measures the groups of a model, told the scores of their channels.

    Args:
        samples: of validation, stratified by class; all where there are fewer.
        origin: what tells the architecture from others of the same weights.
        context: data, device, where results are kept, and the other processes, which all learn what the first one found.
    """

    def found(model: nn.Module, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor]) -> PruningSensitivity:
        if not context.group.leads:
            return PruningSensitivity.model_validate(context.group.told())
        result = _found(model, groups, scores, samples, origin, context)
        context.group.told(result.model_dump(mode="json"))
        return result

    return found


def _found(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    samples: int,
    origin: Mapping[str, JsonValue],
    context: Context,
) -> PruningSensitivity:
    validation = context.data.validation
    chosen = validation.take(stratified_sample(validation.labels, samples, derive_seed(context.seed, "group costs")))
    batches = tuple(chosen.batches(_BATCH))
    removed = {
        group.name: [silenced_channels(group, scores[group.name], ratio) for ratio in RATIOS] for group in groups
    }
    path = None
    if context.costs is not None:
        own = "compress.stages.group_costs"
        conditions = {"device": context.device, "code": code_digest(own), "versions": dict(versions(own))}
        asked = hashlib.sha256(canonical_json({**origin, **conditions, "removed": removed}))
        for tensor in (
            *model.state_dict().values(),
            *(each for batch in batches for each in (*batch.inputs, batch.labels)),
        ):
            asked.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        path = context.costs / f"{asked.hexdigest()[:32]}.json"
        try:
            known = PruningSensitivity.model_validate(json.loads(path.read_bytes()))
        except (OSError, ValueError, ValidationError):
            pass  # not there, or damaged: measured again below, and written anew
        else:
            context.progress.note(
                f"what groups of channels cost is known: '{context.costs.name}' in the folder of the run"
            )
            return known
    total, done = 1 + sum(len({len(each) for each in ways} - {0}) for ways in removed.values()), 0

    def percent(variant: nn.Module) -> float:
        nonlocal done
        _, correct = evaluate(variant.to(context.device), chosen, context.device)
        done += 1
        context.progress.work("what each group of channels costs", done, total)
        return 100.0 * correct / len(chosen)

    result = sensitivities(model, groups, scores, RATIOS, percent, len(chosen))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, readable_json(result.model_dump(mode="json")))
    return result
