"""Instructions of a step, counted by callgrind: for differences that are smaller than the noise of a clock.

Valgrind offers AVX2 at most, so that these are instructions of the code for older processors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.utils.benchmark import Timer

_SETUP = """
import sys
sys.path.insert(0, {folder!r})
import torch
from contenders import prepared
from networks import NETWORKS
torch.set_num_threads(1)
contender, x, y = prepared({name!r}, NETWORKS[{net!r}], {batch}, "cpu")
"""
_STEP = "contender.at[{kind!r}](); contender.step(x, y, lambda: None)"


def instructions(name: str, net: str, batch: int, kind: str, steps: int = 2) -> float:
    """Count the instructions of one step of an optimizer; takes minutes.

    Args:
        name: of the optimizer.
        net: of the network.
        batch: samples.
        kind: of step.
        steps: taken, and averaged over.
    """
    folder = str(Path(__file__).parent)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # what Timer starts
    timer = Timer(_STEP.format(kind=kind), setup=_SETUP.format(folder=folder, name=name, net=net, batch=batch))
    found = timer.collect_callgrind(steps, repeats=None, collect_baseline=False, retain_out_file=False)
    return found.counts() / steps


def second_level_instructions(net: str, batch: int) -> dict[str, float]:
    """Return the extra instructions of two levels over one in each kind of step, as a share of the one-level step."""
    return {
        kind: instructions("kfac2-2", net, batch, kind) / instructions("kfac2-1", net, batch, kind) - 1
        for kind in ("a", "b", "c")
    }
