"""An inverse of the Kronecker blocks: what is kept of it, how it is computed and applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kfac2.layout import Batch, Layout, Stacks
from kfac2.padding import padded_zeros
from kfac2.statistics import Pass, Sums, Use

Fields = dict[str, Stacks]
"""Fields of the inverses by name."""


class Damping(NamedTuple):
    """How blocks are damped.

    Attributes:
        value: λ, or c; a float64 tensor on the device where c follows the spread of the factors, see `kfac2.spread`.
        relative: whether λ of a block is c times the mean of its own eigenvalues, (tr A / d_in)(tr G / d_out). Then the
            damping follows the Fisher wherever that goes, as layers deepen or their weights grow.
    """

    value: float | Tensor
    relative: bool = False

    def is_as_set(self, value: float | str, relative: bool) -> bool:
        """Tell whether this is what the options say, new numbers of which take effect at once; of `"auto"` any is."""
        if isinstance(self.value, Tensor) or isinstance(value, str):
            return isinstance(self.value, Tensor) and isinstance(value, str)
        return (self.value, self.relative) == (value, relative)

    def to(self, device: torch.device) -> Damping:
        """Return the damping with its value on a device."""
        return self._replace(value=self.value.to(device)) if isinstance(self.value, Tensor) else self

    def of(self, eigenvalues: Tensor) -> Tensor:
        """Return λ of each block, (blocks, 1, 1), given its eigenvalues (blocks, d_out, d_in)."""
        scale = eigenvalues.mean((1, 2), keepdim=True) if self.relative else torch.ones_like(eigenvalues[:, :1, :1])
        return self.value * torch.where(scale > 0, scale, 1.0)


class FineSolver(ABC):
    """The first level: inverts the damped block of every layer, and multiplies gradients by it.

    A subclass in a file of its own is one value of the option `inverse`.
    """

    fields: ClassVar[dict[str, str]]
    """The fields that are kept and saved, each with the shape of one block's entry: a letter for each axis, `'i'` of
    length d_in, `'o'` of length d_out."""
    derived: ClassVar[dict[str, str]] = {}
    """Those that `derive` returns, likewise."""
    copies: ClassVar[int]
    """How many times the memory of factors `invert` needs for them at most, its results among it."""

    padded: ClassVar[tuple[str, ...]]
    """Those that `apply` multiplies with what pads the rows of gradients, too."""
    symmetric: ClassVar[tuple[str, ...]] = ()
    """The fields that hold symmetric matrices, of which half is enough to be sent."""

    @abstractmethod
    def invert(self, A: Stacks, G: Stacks, damping: Damping) -> tuple[Fields, Stacks]:
        """Invert the blocks of all batches.

        Args:
            A: factors, (blocks, d_in, d_in) for each batch, which may be written over.
            G: factors, (blocks, d_out, d_out), likewise.
            damping: λ of each block.

        Returns:
            The fields; and by batch the status of each block, (blocks,), not 0 where its entries hold no meaning.
        """

    @abstractmethod
    def mend(self, A: Tensor, G: Tensor, damping: Damping) -> dict[str, Tensor] | None:
        """Invert the blocks of one layer in float64, eigenvalues floored at 0; None where a factor is not finite.

        Args:
            A: (blocks, d_in, d_in).
            G: (blocks, d_out, d_out).
            damping: λ of each block.
        """

    @abstractmethod
    def apply(self, fields: Fields, gradients: Stacks, work: Stacks, out: Stacks) -> None:
        """Multiply by the inverses.

        Args:
            fields: those kept and those derived, in memory as `zeros` makes it.
            gradients: ∇, (blocks, d_out, row_length) for each batch, rows padded by zeros.
            work: memory of the same shapes.
            out: of the same shapes: where the result is written, padded by zeros, too.
        """

    @abstractmethod
    def gains(self, fields: Fields, damping: Damping) -> Stacks:
        """Return a bound of |v| / |∇| of each block, (blocks,), given its fields."""

    def derive(self, fields: Fields, damping: Damping) -> Fields:
        """Return further fields that follow from those that are kept, and are not saved."""
        return {}

    def carry_over(self, new: Fields, last: Fields, had: Sequence[Tensor]) -> Fields:
        """Return new fields with what goes on of the last ones: here, nothing.

        Args:
            new: fields of this update.
            last: fields of the last one.
            had: by batch, (blocks,): whether a block had an inverse.
        """
        return new

    def shape(self, field: str, batch: Batch) -> tuple[int, ...]:
        """Return the shape of one block's entry of a field."""
        return tuple({"i": batch.d_in, "o": batch.d_out}[axis] for axis in {**self.fields, **self.derived}[field])

    def zeros(self, layout: Layout, fields: Iterable[str] | None = None) -> Fields:
        """Make fields, by default those that are kept, of zeros, in the dtype of the matrices that they multiply.

        Those in `padded` lie in padded memory along d_in, as the matrices do.
        """
        letters = {**self.fields, **self.derived}

        def stack(name: str, batch: Batch) -> Tensor:
            axes = [axis for axis, letter in enumerate(letters[name], start=1) if letter == "i" and name in self.padded]
            return padded_zeros((batch.blocks, *self.shape(name, batch)), axes, layout.dtype, layout.device)

        names = self.fields if fields is None else fields
        return {name: [stack(name, batch) for batch in layout.batches] for name in names}

    def moved(self, fields: Fields, old: Layout, new: Layout) -> Fields:
        """Copy fields that are kept to where another layout says."""
        zeros = self.zeros(new)
        return {name: new.moved(stacks, old, zeros[name]) for name, stacks in fields.items()}

    def derived_of(self, layout: Layout, fields: Fields, damping: Damping) -> Fields:
        """Return what `derive` does, in memory as `zeros` makes it."""
        result = self.zeros(layout, self.derived)
        for name, stacks in self.derive(fields, damping).items():
            for kept, value in zip(result[name], stacks, strict=True):
                kept.copy_(value)
        return result


class ObservingSolver(FineSolver):
    """A solver that also looks at the rows of each statistics update, with the inverses in use."""

    @abstractmethod
    def observe(self, layout: Layout, fields: Fields, passed: Pass, uses: Sequence[Use]) -> Tensor:
        """Return what is seen of the rows of one layer, `Sums.squares` of it.

        Args:
            layout: of the layers.
            fields: those that are kept.
            passed: the pass, whose sizes count.
            uses: of the layer in it, all of them, with their gradients.
        """

    @abstractmethod
    def averaged(
        self, layout: Layout, fields: Fields, known: Sequence[bool], sums: Sums, kept: float
    ) -> tuple[Fields, tuple[bool, ...]]:
        """Average in what was observed.

        Args:
            layout: of the layers.
            fields: those that are kept.
            known: by layer, whether it was observed before.
            sums: of the iteration.
            kept: ε.

        Returns:
            The fields that are others now, and by layer whether it has been observed.
        """


def decomposed_in_float64(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return eigenvalues, floored at 0, and eigenvectors of both factors; None where that is impossible.

    Args:
        A: (blocks, d_in, d_in).
        G: (blocks, d_out, d_out).
    """
    if not (bool(A.isfinite().all()) and bool(G.isfinite().all())):
        return None
    try:
        (A_values, A_vectors), (G_values, G_vectors) = torch.linalg.eigh(A.double()), torch.linalg.eigh(G.double())
    except torch.linalg.LinAlgError:
        return None
    return A_values.clamp(min=0), A_vectors, G_values.clamp(min=0), G_vectors
