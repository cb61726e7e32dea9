"""The layers of a model that are handled now, as modules and parameters come and go."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from kfac2.kinds import Layer
from kfac2.layers import Found, find_layers, why_it_left


class Handled:
    """Which layers of a model are handled, and what has become of the others.

    Args:
        model: the model.
        params: the parameters that are trained.
        skip: full names of modules, or regular expressions that match them in full, left alone.
        coarse_max_groups: above so many groups a convolution gives one summed map.

    Attributes:
        model: the model.
        params: the parameters that are trained now.
        own: ids of the parameters whose layers may be handled, if they are among those that are trained.
        found: what the model had when it was last looked at.
        dropped: names of layers that were given up, and why.

    Raises:
        ValueError: if there is no layer, and what `find_layers` raises.
    """

    def __init__(
        self, model: nn.Module, params: Iterable[nn.Parameter], skip: Iterable[str], coarse_max_groups: int
    ) -> None:
        self.model = model
        self.params = list(params)
        self.own = {id(parameter) for parameter in self.params}
        self.dropped: dict[str, str] = {}
        self._skip, self._coarse_max_groups = list(skip), coarse_max_groups
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._is_regrouped = False
        self.found = self._find(is_first=True)
        if not self.found.layers:
            raise ValueError(
                "model must have a Linear or Conv layer that K-FAC can handle (trainable weight, not skipped), "
                f"got none in {type(model).__name__}"
            )

    @property
    def layers(self) -> list[Layer]:
        """The layers of the model, as it was when it was last looked at, without those that were given up."""
        return [layer for layer in self.found.layers if layer.name not in self.dropped]

    def train(self, params: Iterable[nn.Parameter]) -> None:
        """Go on with these parameters: a layer leaves with its weight."""
        self.params, self._is_regrouped = list(params), True

    def has_changed(self) -> bool:
        """Tell whether the model is to be looked at again."""
        return self._is_regrouped or self.found.has_changed()

    def find_again(self) -> list[str]:
        """Look at the model again; a layer whose parameters are the same is the same. Return why others have left."""
        self._is_regrouped = False
        before, found = self.layers, self._find(is_first=False)
        known = {(layer.name, id(layer.bias)): layer for layer in self.found.layers if layer.is_current()}
        still = {key for layer in found.layers for key in (layer.name, id(layer.weight))}  # it may have another name
        left = [layer for layer in before if not still & {layer.name, id(layer.weight)}]
        self.found = found._replace(layers=[known.get((layer.name, id(layer.bias)), layer) for layer in found.layers])
        return [f"{layer.title} leaves K-FAC{why_it_left(layer, found)}" for layer in left]

    def name_of(self, parameter: Tensor) -> str | None:
        """Return the name of a parameter in the model; None where it is none of the model's."""
        return self._names.get(id(parameter))

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained by their names in the model."""
        return {self._names[id(parameter)]: parameter for parameter in self.params if id(parameter) in self._names}

    def others(self) -> list[nn.Parameter]:
        """Return the parameters that are trained and are in no layer."""
        own = {id(parameter) for layer in self.layers for parameter in (layer.weight, layer.bias)}
        return [parameter for parameter in self.params if id(parameter) not in own]

    def _find(self, is_first: bool) -> Found:
        trained = [parameter for parameter in self.params if id(parameter) in self.own]
        return find_layers(self.model, trained, self._skip, self._coarse_max_groups, is_first)
