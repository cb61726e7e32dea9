"""What each kind of step asks of torch beyond SGD's, by line of kfac2: counted on a CPU, with tensors that are nothing.

An op of torch is a launch on a device, or a few; a native call of kfac2 is one op here. Views, memory and shapes
without numbers are no launches, and are counted apart. The host looks at nothing before the end of a step, as on a
device. What depends on sizes is that of small tensors: gradients share native calls, and no product is the library's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arguments import add_some, positive
from networks import CLASSES, GPT2, ResNet
from output import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac2

KFAC2 = str(Path(kfac2.__file__).parent)
KINDS = {4: "inverses and statistics", 5: "ordinary", 6: "statistics"}  # by iteration
EVERY: dict[str, Any] = {"cov_every": 2, "inv_every": 4, "burn_in": 1}
MODEL, SECOND_BACKWARD = "the model", "the second backward pass"


class Dispatches(TorchDispatchMode):
    """Counts ops by the innermost line of kfac2 that runs.

    Attributes:
        launches: ops that compute or move numbers, by line.
        others: views and memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    @property
    def added(self) -> int:
        """Launches of kfac2, but for the second backward pass."""
        return sum(count for line, count in self.launches.items() if line not in (MODEL, SECOND_BACKWARD))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the op, and count it."""
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        without_numbers = isinstance(first, Tensor) and first.device.type == "meta"
        name = func.overloadpacket.__name__
        is_none = func.is_view or without_numbers or "empty" in name or name in ("_unsafe_view", "scalar_tensor")
        (self.others if is_none else self.launches)[_line()] += 1
        return result


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(KFAC2):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename.endswith("/watch.py"):
        return MODEL
    if frame.f_code.co_name == "_differentiated":
        return SECOND_BACKWARD
    return f"{frame.f_code.co_filename[len(KFAC2) + 1 :]}: {frame.f_code.co_name}"


def counted(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Dispatches]:
    """Count what each kind of step of `KFAC(model, **settings)` dispatches.

    Args:
        model: gives logits.
        x: its inputs.
        y: labels.
        **settings: of the optimizer.
    """
    optimizer = kfac2.KFAC(model, lr=1e-2, **EVERY, **settings)
    optimizer.curvature.health.at_once = False  # as on a device
    found = {}
    for iteration in range(max(KINDS) + 1):
        with Dispatches() as dispatches:
            optimizer.zero_grad()
            out = model(x)
            if optimizer.needs_fisher:
                optimizer.accumulate_fisher(CLASSES.distribution(out))
            CLASSES.loss(out, y).backward()
            optimizer.step()
        if iteration in KINDS:
            found[KINDS[iteration]] = dispatches
    return found


def sgd(model: nn.Module, x: Tensor, y: Tensor) -> Dispatches:
    """Count what a step of SGD dispatches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.5, foreach=True)
    for _ in range(2):
        with Dispatches() as dispatches:
            optimizer.zero_grad()
            CLASSES.loss(model(x), y).backward()
            optimizer.step()
    return dispatches


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-110 on two images of 8 x 8."""
    return ResNet(110), torch.randn(2, 3, 8, 8), torch.arange(2)


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """GPT-2 small with a width of 16, on 2 x 8 words of 64."""
    return GPT2(width=16, heads=2, words=64, places=8), torch.arange(16).view(2, 8), torch.arange(16).view(2, 8)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"resnet-110": images, "gpt2-small": tokens}


def report(name: str, lines: int) -> str:
    """Write a table of launches by kind of step, those of SGD beside them, and of the lines that have most."""
    torch.manual_seed(0)
    plain, kinds = sgd(*NETS[name]()), counted(*NETS[name]())
    header = [name, "SGD", *kinds]
    columns = [plain, *kinds.values()]
    rows = [["all", *(str(c.launches.total()) for c in columns)]]
    rows.append(["views, memory", *(str(c.others.total()) for c in columns)])
    most = sum((c.launches for c in kinds.values()), Counter[str]())
    own = [line for line, _ in most.most_common() if line != MODEL]
    rows.append(["of kfac2, but for the second backward pass", "", *(str(c.added) for c in kinds.values())])
    rows += [[line, "", *(str(c.launches[line] or "") for c in kinds.values())] for line in own[:lines]]
    return table(header, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=positive, default=12, help="of kfac2 in each table (default: 12)")
    add_some(parser, "--nets", NETS, list(NETS))
    arguments = parser.parse_args()
    print("\n\n".join(report(name, arguments.lines) for name in arguments.nets))


if __name__ == "__main__":
    main()
