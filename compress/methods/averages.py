"""How fast a moving average forgets."""

from __future__ import annotations


def decay_after(steps: int, decay: float) -> float:
    """Decay d of the average ← d · average + (1 - d) · weights, after `steps` earlier ones: min(decay, (1 + t) / (10 + t)).

    A fixed decay of 0.999 would leave, after 150 steps, 86 % of the weights that training began with. This one begins at
    1/10 and lets the average cover about the last ninth of the steps until `decay` is reached.

    Source: TensorFlow 1.0, `tf.train.ExponentialMovingAverage`, argument `num_updates`.

    Args:
        steps: t, from 0.
        decay: upper limit, 0 to 1.
    """
    return min(decay, (1 + steps) / (10 + steps))
