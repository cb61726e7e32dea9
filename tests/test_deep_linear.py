"""The whole, on the paper's deep linear network: what the second level is for."""

import statistics
from dataclasses import replace

import pytest
from experiments.runs import run
from experiments.settings import recipe


@pytest.mark.slow
def test_two_levels_end_lower_than_one():
    """Medians over seeds of the tenth epoch's mean training loss, at the paper's settings.

    About one run in five starts so roughly that it has not yet recovered by then, another one after each change of
    the last bit: hence nine seeds, and a bound well above the 0.5 that is usual.
    """
    one, two = (
        statistics.median(
            run(replace(recipe("deep-linear", optimizer), seed=seed, epochs=10)).values("train_loss")[-1]
            for seed in range(9)
        )
        for optimizer in ("kfac1", "kfac2")
    )
    assert two <= 0.9 * one, (one, two)
