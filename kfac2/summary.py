"""What trains which parameters, and what K-FAC costs, in one table."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfac2.coarse import CoarseSpace
from kfac2.division import Division, work_of
from kfac2.fine import FineSolver
from kfac2.handled import Handled
from kfac2.kinds import KINDS
from kfac2.layers import SKIPPED, UNGROUPED
from kfac2.layout import Batch, Layout
from kfac2.triangles import packed_shape

LARGE = 8192
"""A factor of more rows than this is warned of: its inverse takes gigabytes, and minutes of one core."""

KFAC, UNTRAINED = "K-FAC", "not trained"
_REST = {"adamw": "AdamW", "sgd": "SGD"}
_MOST_ROWS = 20
_HANDLED = tuple(module for kind in KINDS for module in kind.modules)


@dataclass
class Row:
    """Parameters of modules of one class that are treated alike.

    Attributes:
        treatment: `'K-FAC'`; `'AdamW'`, `'SGD'` or `'plain gradient'`; or `'not trained'`.
        kind: the class of the modules.
        reason: why it is not K-FAC; empty where it is.
        names: of the modules.
        parameters: how many numbers; those that several modules share are counted with the first.
    """

    treatment: str
    kind: str
    reason: str
    names: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        names = ", ".join(name or "the model" for name in self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        reason = f", {self.reason}" if self.reason else ""
        return f"{self.treatment}: {len(self.names)} {self.kind}{reason} ({names})"


@dataclass(frozen=True)
class Summary:
    """What trains which parameters, and what K-FAC costs; `str` of it is a table of at most 24 lines.

    Attributes:
        model: the class of the model.
        rows: the parameters, by treatment, class of the modules, and reason; the largest rows of a treatment first.
        factor_bytes: memory of the running averages of all factors.
        inverse_bytes: memory of what this process keeps of their inverses.
        inverse_work: Σ n³ over all factors, to which the time of an inverse update is in proportion.
        unknowns: of the second level; 0: there is none.
        misses_layers: whether a trained weight of a kind that K-FAC handles is left alone without having been named
            by `skip`.
        sharing: of several processes, who inverts and why, and what was measured for that; empty for one alone.
    """

    model: str
    rows: tuple[Row, ...]
    factor_bytes: int
    inverse_bytes: int
    inverse_work: int
    unknowns: int
    misses_layers: bool
    sharing: str = ""

    @property
    def parameters(self) -> int:
        """How many numbers there are in all."""
        return sum(row.parameters for row in self.rows)

    def share(self, treatment: str) -> float:
        """Return the share of all parameters that is treated so, `'K-FAC'` for example."""
        return sum(row.parameters for row in self.rows if row.treatment == treatment) / max(self.parameters, 1)

    def __str__(self) -> str:
        total = max(self.parameters, 1)
        lines = [f"kfac2: {self.model}, {_count(self.parameters)} parameters, {self.share(KFAC):.1%} by K-FAC"]
        # Where there are too many, the smallest are told together.
        shown = sorted(range(len(self.rows)), key=lambda i: -self.rows[i].parameters)[:_MOST_ROWS]
        lines += [
            f"{row.parameters / total:8.1%} {_count(row.parameters):>8}  {row}"
            for i, row in enumerate(self.rows)
            if i in shown
        ]
        others = [row for i, row in enumerate(self.rows) if i not in shown]
        if others:
            count = sum(row.parameters for row in others)
            modules = sum(len(row.names) for row in others)
            lines.append(f"{count / total:8.1%} {_count(count):>8}  in {modules} more modules; `.rows` lists all")
        lines.append(
            f"factors {_bytes(self.factor_bytes)}, inverses {_bytes(self.inverse_bytes)}, "
            f"inverse work {self.inverse_work:.2g} (sum of n³ over factors), "
            + (f"second level of {self.unknowns} unknowns" if self.unknowns else "one level")
        )
        lines += [self.sharing] if self.sharing else []
        return "\n".join(lines)


def summarised(
    handled: Handled, layout: Layout, fine: FineSolver, coarse: CoarseSpace, division: Division, rest: str
) -> Summary:
    """Make the summary.

    Args:
        handled: which layers of the model are handled, which are not, and which parameters are trained.
        layout: of the layers handled now.
        fine: what inverts the factors.
        coarse: the second level.
        division: of the work among processes.
        rest: how the parameters are trained that K-FAC does not handle.
    """
    rest = _REST.get(rest, rest)
    model, trained = handled.model, handled.params
    ids = {id(parameter) for parameter in trained}
    own = {id(parameter) for layer in layout.layers for parameter in (layer.weight, layer.bias)}
    reasons = {**{name: reason for name, _, reason in handled.found.left}, **handled.dropped}
    rows: dict[tuple[str, str, str], Row] = {}
    seen: set[int] = set()
    misses = False

    def add(key: tuple[str, str, str], name: str, parameter: Tensor) -> None:
        row = rows.setdefault(key, Row(*key))
        if row.names[-1:] != [name]:  # those of a module come together
            row.names.append(name)
        if id(parameter) not in seen and not isinstance(parameter, UninitializedParameter):
            seen.add(id(parameter))
            row.parameters += parameter.numel()

    for name, module, label, parameter in _parameters(model):
        kind = type(module).__name__
        if not parameter.requires_grad:
            add((UNTRAINED, kind, "frozen"), name, parameter)
        elif id(parameter) not in ids:
            add((UNTRAINED, kind, "in no parameter group"), name, parameter)
        elif id(parameter) in own:
            add((KFAC, kind, ""), name, parameter)
        else:
            reason = reasons.get(name, "not a Linear or Conv")
            misses |= isinstance(module, _HANDLED) and label != "bias" and reason != SKIPPED
            if reason == UNGROUPED and id(module._parameters.get("weight")) in ids:
                reason = "its weight joined later"
            add((rest, kind, _alike(reason)), name, parameter)
    for number, parameter in enumerate(trained):
        if id(parameter) not in seen and not isinstance(parameter, UninitializedParameter):
            add((rest, "Parameter", "outside the model"), str(number), parameter)

    order = [KFAC, rest, UNTRAINED]
    ordered = sorted(rows.values(), key=lambda row: (order.index(row.treatment), -row.parameters))
    factors = sum(_factor_bytes(batch) for batch in layout.batches)
    held = division.held(layout)
    inverses = sum(_inverse_bytes(batch, held, fine) for batch in held.batches)
    work = sum(map(work_of, layout.layers))
    unknowns = coarse.per_layer * len(layout.layers)
    return Summary(type(model).__name__, tuple(ordered), factors, inverses, work, unknowns, misses, str(division))


def warn_of_large_factors(layout: Layout, fine: FineSolver) -> None:
    """Warn once of all factors of more than `LARGE` rows, and say what they cost and how to do without."""
    large = [batch for batch in layout.batches if max(batch.d_in, batch.d_out) > LARGE]
    if not large:
        return
    names = [layout.layers[i].name for batch in large for i in batch.members]
    size = sum(_factor_bytes(batch) + _inverse_bytes(batch, layout, fine) for batch in large)
    side = max(max(batch.d_in, batch.d_out) for batch in large)
    warnings.warn(
        f"kfac2: factors of up to {side:,} rows take {_bytes(size)} with their inverses, and long to invert: to leave "
        f"{'them' if len(names) > 1 else 'it'} to the plain gradient, give skip={names}",
        RuntimeWarning,
        stacklevel=4,
    )


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """List name, module, label and parameter; what belongs to a parametrisation is its module's."""
    for name, module in model.named_modules():
        owner = re.sub(r"(^|\.)parametrizations\..*$", "", name)
        for label, parameter in module._parameters.items():
            if parameter is not None:
                yield owner, model.get_submodule(owner) if owner != name else module, label, parameter


def _alike(reason: str) -> str:
    """Leave out by how much, so that layers which left for the same reason share a row."""
    return re.sub(r"[\d.]+(e[+-]?\d+)? %", "some %", reason)


def _factor_bytes(batch: Batch) -> int:
    return batch.blocks * sum(math.prod(packed_shape(d)) for d in (batch.d_in, batch.d_out)) * batch.dtype.itemsize


def _inverse_bytes(batch: Batch, layout: Layout, fine: FineSolver) -> int:
    return batch.blocks * sum(math.prod(fine.shape(name, batch)) for name in fine.fields) * layout.dtype.itemsize


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _count(number: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
