"""The state for `torch.distributed.checkpoint`: each process hands in, and reads, only what it holds."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac2.checkpoint import out_of_groups
from kfac2.estimates import Estimates
from kfac2.handled import Handled
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.shared_inverses import whole
from kfac2.state import from_inverses, to_inverses
from kfac2.triangles import packed_shape


class HasState(Protocol):
    """What has a state: a `KFAC`, a `Preconditioner` or a `Curvature`."""

    @property
    def _statistics(self) -> Parts: ...

    def state_dict(self, gathers: bool = True) -> dict[str, Any]:
        """Return it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""


class Parts(Protocol):
    """What the state is of: a `Curvature`."""

    handled: Handled
    estimates: Estimates


class ShardedState:
    """A state that torch.distributed.checkpoint saves, and loads in another number of processes.

    Names and shapes are those of layers and parameters, whatever there is of them yet: so what a new optimizer's
    `state_dict` returns says what is to be read. Where there is nothing, it has zeros.

    Args:
        of: what has the state.
    """

    def __init__(self, of: HasState) -> None:
        self._of = of
        self._handled, self._estimates = of._statistics.handled, of._statistics.estimates

    def state_dict(self) -> dict[str, Any]:
        """Copy what this process holds.

        Returns:
            `factors` by layer, the same in all processes; `inverses` of the layers whose inverses are here;
            `optimizer`, what `torch.optim` keeps of each parameter, by its number; and `rest`. The last two are bytes,
            which nothing can tell the shapes of before the first step.
        """
        rest = self._of.state_dict(gathers=False)
        optimizer = {}
        if "param_groups" in rest:
            rest = out_of_groups(rest)
            kept = rest.pop("state")
            numbers = [number for group in rest["param_groups"] for number in group["params"]]
            optimizer = {str(number): _written(kept.get(number)) for number in numbers}
        kfac, layout, division = rest.get("kfac", rest), self._estimates.layout, self._estimates.solvers.division
        gone = [layer for layer in self._handled.found.layers if layer not in layout.layers]  # others have it
        factors, fine = {}, {}
        if kfac["statistics"] is not None:  # in dicts that were made for this copy
            factors = kfac["statistics"].pop("factors")
        if kfac["inverses"] is not None:
            fine = kfac["inverses"].pop("fine")
        held = [*division.held(layout).layers, *gone]
        return {
            "factors": _filled(factors, [*layout.layers, *gone], _no_factors),
            "inverses": _filled(fine, held, self._no_inverses),
            "optimizer": optimizer,
            "rest": _written({**rest, "with factors": list(factors)}),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` has returned, read anew; see `KFAC.load_state_dict`."""
        rest = _read(state_dict["rest"])
        with_factors, kfac = rest.pop("with factors"), rest.get("kfac", rest)
        if kfac["statistics"] is not None:
            kfac["statistics"]["factors"] = {name: state_dict["factors"][name] for name in with_factors}
        if kfac["inverses"] is not None:
            own = state_dict["inverses"]
            kfac["inverses"]["fine"] = {name: own[name] for name in kfac["inverses"]["usable"] if name in own}
            kfac["inverses"] = self._for_all_layers(kfac["inverses"], kfac["dropped"])
        if "param_groups" in rest:
            kept = {int(number): _read(written) for number, written in state_dict["optimizer"].items()}
            rest["state"] = {number: own for number, own in kept.items() if own is not None}
        self._of.load_state_dict(rest)

    def _for_all_layers(self, state: dict[str, Any], dropped: Iterable[str]) -> dict[str, Any]:
        """Bring the inverses together if layers leave with this state: who holds which is then another question."""
        layout, solvers = self._estimates.layout, self._estimates.solvers
        inverses = None
        if solvers.division.held(layout) is not layout and {layer.name for layer in layout.layers} & {*dropped}:
            inverses = to_inverses(state, layout, solvers)
        return state if inverses is None else from_inverses(layout, whole(inverses, layout, solvers)) or state

    def _no_inverses(self, layer: Layer) -> dict[str, Tensor]:
        fields = self._estimates.solvers.fine.zeros(Layout([layer], self._estimates.layout.device))
        return {name: stacks[0].contiguous() for name, stacks in fields.items()}


def _no_factors(layer: Layer) -> dict[str, Tensor]:
    blocks, d_out, d_in = layer.matrix_shape
    shapes = {"A": (blocks, *packed_shape(d_in)), "G": (blocks, *packed_shape(d_out))}
    return {
        key: torch.zeros(shape, dtype=layer.factor_dtype, device=layer.weight.device) for key, shape in shapes.items()
    }


def _filled(
    found: Mapping[str, dict[str, Tensor]], layers: Iterable[Layer], zeros: Callable[[Layer], dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return what was found of layers, zeros where there is nothing."""
    return {layer.name: found[layer.name] if layer.name in found else zeros(layer) for layer in layers}


def _written(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _read(written: bytes) -> Any:
    return torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)  # written on another's device
