"""A kind of layer: how the tensors of one use become rows, and where its parameters lie in its gradient matrix."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.window import Window


class Rows(NamedTuple):
    """Rows, not yet formed: the window takes one from each place of the tensor.

    Attributes:
        tensor: (N, C, *spatial), up to three spatial axes.
        window: how rows are taken from it, for each block.
    """

    tensor: Tensor
    window: Window


class Call(NamedTuple):
    """How a weight was used: a call of one of torch's functions.

    Attributes:
        function: `F.linear`, say.
        bias: the bias that it was called with.
        geometry: its further arguments, by name.
    """

    function: Callable[..., Tensor]
    bias: Tensor | None
    geometry: tuple[tuple[str, Any], ...] = ()

    def repeated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Call the function again with another input, weight and bias."""
        return self.function(x, weight, bias, **dict(self.geometry))


@dataclass(frozen=True)
class Part:
    """Where the gradient of a parameter, or a slice of it, lies in the matrix of its layer.

    Attributes:
        parameter: the weight or the bias.
        row: of the matrix, blocks one below the other, that its first element lies in.
        column: likewise.
        view: makes of the parameter's gradient a view whose first axis counts the rows of the matrix; None where
            the gradient is one already.
    """

    parameter: Tensor
    row: int = 0
    column: int = 0
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """A handled layer, described once and never changed. A kind of layer is a subclass in a file of its own.

    Attributes:
        name: the module's name in the model.
        module: the module.
        bias: its bias where that is trained, else None (a frozen bias is no part of ā).
        most_maps: a layer of more blocks gives the coarse space one map, the sum over its blocks.
    """

    name: str
    module: nn.Module
    bias: Tensor | None
    most_maps: int

    modules: ClassVar[tuple[type[nn.Module], ...]]
    """The module classes of this kind."""
    functions: ClassVar[tuple[Callable[..., Tensor], ...]]
    """The functions of torch that use a weight of this kind."""
    arguments: ClassVar[tuple[str, ...]]
    """The names of their arguments, in order: input, weight and bias first."""
    has_tokens: ClassVar[bool] = False
    """Whether the loss may leave out places of a use, as padding."""
    is_mirrored: ClassVar[bool] = False
    """Whether its rows come in the opposite order of the places."""

    @classmethod
    def read_call(
        cls, function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any, Call]:
        """Return the input, the weight, and what else a call was made with."""
        given = {**dict(zip(cls.arguments, args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        return x, weight, Call(function, bias, tuple(given.items()))

    def reason_against(self, call: Call) -> str | None:
        """Return why a use of the weight gives no rows, or None where it does."""
        if self.bias is not None and call.bias is not self.bias:
            return "it is used without its bias, or with another"
        return None

    def __post_init__(self) -> None:
        """Note the parameters that it is made for, and whether each is trained."""
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        trained = (p is not None and p.requires_grad for p in (weight, bias))
        object.__setattr__(self, "_made_for", (weight, bias, *trained))

    @property
    def title(self) -> str:
        """The name, for people."""
        return self.name or "the model"

    @property
    def weight(self) -> Tensor:
        """The module's weight; one that takes its place makes another layer."""
        return self._made_for[0]  # type: ignore[attr-defined]

    def is_current(self) -> bool:
        """Tell whether weight and bias are still the module's, and trained or not as they were."""
        own = self.module._parameters
        weight, bias, weight_is_trained, bias_is_trained = self._made_for  # type: ignore[attr-defined]
        return (  # each step asks
            own.get("weight") is weight
            and own.get("bias") is bias
            and weight.requires_grad is weight_is_trained  # type: ignore[union-attr]
            and (bias is None or bias.requires_grad is bias_is_trained)
        )

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors are kept in: float64 for a float64 layer, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def blocks(self) -> int:
        """Kronecker blocks: the groups of a convolution, else 1."""
        return 1

    @property
    def maps(self) -> int:
        """Scalar maps that it gives to the coarse space: one for each block, or a single summed one."""
        return self.blocks if self.blocks <= self.most_maps else 1

    @property
    @abstractmethod
    def matrix_shape(self) -> tuple[int, int, int]:
        """Shape of the gradient as matrices: (blocks, d_out, d_in), the bias column included."""

    @abstractmethod
    def rows(self, x: Tensor, g: Tensor, call: Call) -> tuple[Rows, Rows]:
        """Return the rows ā and g of one use, both at the same places in the same order.

        Args:
            x: the input, as the weight was used with it.
            g: the gradient at the output.
            call: how it was used.
        """

    def input_map_rows(self, x: Tensor, g: Tensor, call: Call, rows: Rows) -> Rows:
        """Return the rows whose sums are the coarse space's maps of inputs, at the places of the output as they lie.

        Args:
            x: as in `rows`.
            g: as in `rows`; its shape counts.
            call: as in `rows`.
            rows: what `rows` made of x.
        """
        return self._for_maps(rows)

    def grad_map_rows(self, g: Tensor, rows: Rows) -> Rows:
        """Return the rows whose sums are the maps of output gradients, at the places of the output as they lie.

        Args:
            g: as in `rows`.
            rows: what `rows` made of g.
        """
        return self._for_maps(rows)

    def rows_at(self, rows: Rows, reached: Tensor) -> Rows:
        """Return the rows of those samples and places that the loss reaches.

        Args:
            rows: ā or g of one use.
            reached: bool, (samples, places), places in the order of the rows.
        """
        samples = reached.any(1)
        rows, kept = Rows(rows.tensor[samples], rows.window), reached[samples].flatten()
        return rows if bool(kept.all()) else _formed_at(rows, kept)

    def samples_first(self, x: Tensor, batch_dim: int) -> Tensor:
        """Bring the axis of samples of an input, or of an output's gradient, to the front."""
        return x

    def samples_last(self, g: Tensor, batch_dim: int) -> Tensor:
        """Undo `samples_first`."""
        return g

    def _for_maps(self, rows: Rows) -> Rows:
        """With too many groups, sum all of them into one map.

        The channels of all groups then count as one row, and the bias of each group adds its 1.
        """
        return rows if self.maps == self.blocks else Rows(rows.tensor, of_all_groups(rows.window))

    def parts(self) -> list[Part]:
        """Return where weight and bias lie in the matrix: here, the weight row by row, the bias in the last column."""
        parts = [Part(self.weight)]
        if self.bias is not None:
            parts.append(Part(self.bias, column=self.matrix_shape[2] - 1))
        return parts


# The same few windows are asked for at every statistics update; each encodes itself once.
places = functools.cache(Window.places)
of_all_groups = functools.cache(Window.of_all_groups)


def formed(rows: Rows, block: int) -> Tensor:
    """Form the rows of one block.

    Args:
        rows: of a layer.
        block: which of its groups.

    Returns:
        (N, T, d): channel slowest, then kernel offsets, then the bias 1.
    """
    x, window = rows
    channels, rank = x.shape[1] // window.groups, len(window.kernel_size)
    part = x[:, block * channels : (block + 1) * channels]
    if any(zeros != (0, 0) for zeros in window.padding):
        part = F.pad(part, [number for zeros in reversed(window.padding) for number in zeros])
    for axis, (k, step, d) in enumerate(zip(window.kernel_size, window.stride, window.dilation, strict=True)):
        part = part.unfold(2 + axis, d * (k - 1) + 1, step)[..., ::d]
    patches = part.movedim(1, 1 + rank).reshape(x.shape[0], -1, window.row_length(x.shape[1]) - window.bias)
    return F.pad(patches, (0, window.bias), value=1.0)


def _formed_at(rows: Rows, kept: Tensor) -> Rows:
    """Return some of the rows, (rows, d) side by side for all blocks."""
    groups, bias = rows.window.groups, rows.window.bias
    plain = Rows(rows.tensor, dataclasses.replace(rows.window, bias=0))
    return Rows(torch.cat([formed(plain, q).flatten(0, 1)[kept] for q in range(groups)], 1), places(0, groups, bias))
