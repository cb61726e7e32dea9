"""Which modules K-FAC handles, and how each one's tensors become rows."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from kfac2.window import Window

logger = logging.getLogger("kfac2")

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class Layer:
    """A handled layer: where its parameters are and how its rows are read.

    Attributes:
        name: the module's name in the model.
        module: the module.
        bias: its bias where it is trained, else None (a frozen bias is no part of ā).
        blocks: Kronecker blocks: the groups of a convolution, else 1.
        maps: scalar maps it gives to the coarse space: one for each block, or a single summed one.
        in_coarse: False once its batch was found not to fit the others'.
    """

    name: str
    module: nn.Linear | Conv
    bias: Tensor | None
    blocks: int
    maps: int
    in_coarse: bool = True
    _windows: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False)

    def encoded(self, kind: str, rank: int) -> list[int]:
        """Return a window as the native ops take it, made once.

        Args:
            kind: `'input'` or `'grad'` for rows, `'input map'` or `'grad map'` for their sums.
            rank: spatial axes of the tensor.
        """
        if (kind, rank) not in self._windows:
            window = self.input_window(rank) if kind.startswith("input") else self.grad_window(rank)
            self._windows[kind, rank] = (self.map_window(window) if kind.endswith("map") else window).encode()
        return self._windows[kind, rank]

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        return self.module.weight

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors are kept in: float64 for a float64 layer, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Shape of the gradient as matrices: (blocks, d_out, d_in), the bias column included."""
        d_out, d_in = self.weight.shape[0] // self.blocks, self.weight[0].numel()
        return self.blocks, d_out, d_in + (self.bias is not None)

    def rows(self, x: Tensor) -> Tensor:
        """View an input or output gradient as (N, C, *spatial); all positions of a Linear layer are one axis."""
        if isinstance(self.module, nn.Linear):
            return _features_second(x)
        return x if x.dim() == len(self.module.kernel_size) + 2 else x.unsqueeze(0)

    def input_window(self, rank: int) -> Window:
        """Return the window of the input rows: one row for each block and place."""
        bias = int(self.bias is not None)
        if isinstance(self.module, nn.Linear):
            return Window.places(rank, bias=bias)
        return Window.of_module(self.module, bias)

    def grad_window(self, rank: int) -> Window:
        """Return the window of the output-gradient rows."""
        return Window.places(rank, self.blocks)

    def map_window(self, window: Window) -> Window:
        """Return a window of rows as one for maps: with too many groups, all of them summed into one.

        The channels of all groups then count as one row, and each group's bias adds its 1.
        """
        if self.maps == self.blocks:
            return window
        return Window(
            window.kernel_size,
            window.stride,
            window.padding,
            window.dilation,
            groups=1,
            bias=window.bias * self.blocks,
        )


def _features_second(x: Tensor) -> Tensor:
    if x.dim() <= 2:
        return x if x.dim() == 2 else x.unsqueeze(0)
    return x.flatten(1, -2).transpose(1, 2)


def find_layers(
    model: nn.Module, trained: Collection[nn.Parameter], skip: Iterable[str], coarse_max_groups: int
) -> list[Layer]:
    """Return the handled layers in the order of `model.named_modules()`; log why others are left to SGD.

    Args:
        model: the model.
        trained: the parameters that the optimizer holds.
        skip: full names of modules, or regular expressions that match them in full.
        coarse_max_groups: above so many groups a convolution gives one summed map.

    Raises:
        TypeError: if `model` is no module, or `skip` is not made of strings.
        ValueError: if an entry of `skip` matches no module, no layer is left, or layers are on two devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patterns = _skip_patterns(model, skip)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    ids = {id(parameter) for parameter in trained}
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS):
            continue
        reason = _why_not(module, owners, ids)
        if any(pattern.fullmatch(name) for pattern in patterns):
            reason = "it is named by skip"
        if reason is None:
            layers.append(_layer(name, module, ids, coarse_max_groups))
        elif module.weight is not None:
            logger.warning("%s (%s) is left to SGD: %s", name or "the model", type(module).__name__, reason)
    if not layers:
        raise ValueError(
            "model must have a Linear or Conv layer that K-FAC can handle (trainable weight, not skipped), "
            f"got none in {type(model).__name__}"
        )
    for layer in layers:
        if layer.weight.device != layers[0].weight.device:
            raise ValueError(
                f"model must have all handled layers on one device, got {layers[0].name} on "
                f"{layers[0].weight.device} and {layer.name} on {layer.weight.device}"
            )
    return layers


def _skip_patterns(model: nn.Module, skip: Iterable[str]) -> list[re.Pattern[str]]:
    entries = [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, _ in model.named_modules()]
    patterns = []
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"skip must hold names or regular expressions, got {entry!r} of type {type(entry).__name__}"
            )
        pattern = re.compile(re.escape(entry) if entry in names else entry)
        if not any(pattern.fullmatch(name) for name in names):
            raise ValueError(
                f"skip must name modules of the model in full, got {entry!r}, which matches none "
                "(to skip what is inside a container, write for example 'encoder\\..*')"
            )
        patterns.append(pattern)
    return patterns


def _why_not(module: nn.Linear | Conv, owners: Counter[int], trained: Collection[int]) -> str | None:
    """Return the reason why a layer is left to SGD, or None where it is handled."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention calls its out_proj without running hooks"
    if is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrised"
    if type(module).forward not in {kind.forward for kind in _KINDS}:
        return "its class has a forward of its own"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight has no shape yet (run the lazy module once before building the optimizer)"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    if id(module.weight) not in trained:
        return "its weight is in no parameter group"
    if owners[id(module.weight)] > 1 or (module.bias is not None and owners[id(module.bias)] > 1):
        return "its parameters are tied to another module's"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} is not built"
    return None


def _layer(name: str, module: nn.Linear | Conv, trained: Collection[int], coarse_max_groups: int) -> Layer:
    bias = module.bias
    if bias is not None and not (bias.requires_grad and id(bias) in trained):
        bias = None
    blocks = 1 if isinstance(module, nn.Linear) else module.groups
    return Layer(name, module, bias, blocks, maps=blocks if blocks <= coarse_max_groups else 1)
