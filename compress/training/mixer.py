"""Mixup and CutMix of a step's batch, from random numbers of that step alone."""

from __future__ import annotations

import torch

from compress.config import TrainingConfig
from compress.data.base import Batch
from compress.errors import StageError
from compress.methods.mixing import cutmix, draw_box, draw_share, mixup
from compress.seeds import derive_seed


class Mixer:
    """Mixes batches as the settings say: the same for the same seed, epoch and step, whatever was drawn before."""

    def __init__(self, config: TrainingConfig, classes: int, seed: int) -> None:
        """Take the settings, the number of classes, and the seed of the training."""
        alphas = (("mixup", config.mixup), ("cutmix", config.cutmix))
        self._ways = [(way, alpha) for way, alpha in alphas if alpha is not None]
        self._classes, self._seed = classes, seed

    def mix(self, batch: Batch, epoch: int, step: int) -> Batch:
        """The batch with mixed inputs, and labels (n, classes) that are probabilities; unchanged where nothing is to be mixed.

        Args:
            batch: on any device.
            epoch: from 0.
            step: of the epoch, from 0.

        Raises:
            StageError: where the inputs cannot be mixed: no floats, or no images.
        """
        if not self._ways:
            return batch
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "mixing", epoch, step))
        way, alpha = self._ways[int(torch.randint(len(self._ways), (), generator=generator))]
        share = draw_share(alpha, generator)
        partners = torch.randperm(len(batch.labels), generator=generator).to(batch.labels.device)
        try:
            if way == "mixup":
                inputs, labels = mixup(batch.inputs, batch.labels, self._classes, share, partners)
            else:
                height, width = (1, 1, *batch.inputs[0].shape)[-2:]  # `cutmix` refuses what is no image
                box = draw_box(share, height, width, generator)
                inputs, labels = cutmix(batch.inputs, batch.labels, self._classes, box, partners)
        except StageError as error:
            raise StageError(f"{way}: {error}") from None
        return batch._replace(inputs=inputs, labels=labels)
