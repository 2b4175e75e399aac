"""Losses as pure functions: tensors in, a scalar out. Every loss is a mean over the batch.

`logits` compares answers, `features` what layers give out, `ensemble` makes one teacher of several.
"""

from __future__ import annotations

from compress.methods.losses.logits import label_loss as label_loss
from compress.methods.losses.logits import soft_label_loss as soft_label_loss
