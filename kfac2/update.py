"""The step of every iteration (eq. 6, 10), by batches of equal shape, never layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.inverses import FIELDS, Inverses
from kfac2.layers import Layer


class _Batch:
    """The gradient matrices of all layers of one shape, (b, d_out, d_in), with the views to fill and read it."""

    def __init__(self, indices: Sequence[int], layers: Sequence[Layer], dtype: torch.dtype) -> None:
        _, d_out, d_in = layers[indices[0]].matrix_shape
        sizes = [layers[i].blocks for i in indices]
        device = layers[indices[0]].weight.device
        self.indices = indices
        self.grads = torch.zeros(sum(sizes), d_out, d_in, dtype=dtype, device=device)
        self.result = torch.zeros_like(self.grads)
        self.layer_of_block = torch.tensor(
            [i for i, size in zip(indices, sizes, strict=True) for _ in range(size)], device=device
        )
        self.inverse: tuple[Tensor, ...] = ()

    def views(self, matrices: Tensor, layers: Sequence[Layer]) -> dict[int, list[Tensor]]:
        """View each layer's part of `matrices` in the shapes of its weight and, if it has one, its bias."""
        sizes = [layers[i].blocks for i in self.indices]
        result = {}
        for i, part in zip(self.indices, matrices.split(sizes), strict=True):
            shape = layers[i].weight.shape
            if layers[i].bias is None:
                result[i] = [part.unflatten(-1, shape[1:]).flatten(0, 1)]
            else:
                result[i] = [part[..., :-1].unflatten(-1, shape[1:]).flatten(0, 1), part[..., -1].flatten()]
        return result

    def set_inverse(self, inverses: Inverses, layers: Sequence[Layer]) -> None:
        """Stack the inverses of the batch's layers; one that has none keeps a zero gradient, whatever this holds."""
        known = [inverses.fine.get(layers[i]) for i in self.indices]
        example = next((fields for fields in known if fields is not None), None)
        self.inverse = ()
        if example is None:
            return
        sizes = [layers[i].blocks for i in self.indices]
        stacks = []
        for name, value in example.items():
            zeros = [value.new_zeros(size, *value.shape[1:]) for size in sizes]
            parts = [zero if fields is None else fields[name] for fields, zero in zip(known, zeros, strict=True)]
            stacks.append(torch.cat(parts))
            for fields, part in zip(known, stacks[-1].split(sizes), strict=True):
                if fields is not None:
                    fields[name] = part  # the same numbers; so that they are kept once
        self.inverse = tuple(stacks)

    def precondition(self, damping: float) -> Tensor:
        """Return G⁻¹ ∇ A⁻¹, or the same with the exact damped inverse of A ⊗ G."""
        if not self.inverse:
            return torch.zeros_like(self.grads)
        if len(self.inverse) == len(FIELDS["cholesky"]):
            A_inv, G_inv = self.inverse
            return G_inv @ self.grads @ A_inv
        a, V_A, g, V_G = self.inverse
        rotated = V_G.mT @ self.grads @ V_A
        return V_G @ (rotated / (g.unsqueeze(-1) * a.unsqueeze(-2) + damping)) @ V_A.mT


class Update:
    """Computes the preconditioned gradients of all layers at once.

    Args:
        layers: the handled layers.
        dtypes: for each layer what its factors are kept in.
    """

    def __init__(self, layers: Sequence[Layer], dtypes: Sequence[torch.dtype]) -> None:
        self._layers = layers
        classes: dict[tuple[object, ...], list[int]] = {}
        for i, (layer, dtype) in enumerate(zip(layers, dtypes, strict=True)):
            classes.setdefault((*layer.matrix_shape[1:], dtype), []).append(i)
        self._batches = [_Batch(members, layers, dtypes[members[0]]) for members in classes.values()]
        self._inputs = {i: view for batch in self._batches for i, view in batch.views(batch.grads, layers).items()}
        self._results = {i: view for batch in self._batches for i, view in batch.views(batch.result, layers).items()}
        self._layer_of_block = torch.cat([batch.layer_of_block for batch in self._batches])
        self._inverses: Inverses | None = None

    def compute(
        self,
        inverses: Inverses,
        coarse_weight: float,
        kl_clip: float | None,
        rates: Sequence[float],
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Precondition the gradients that lie in the parameters' `.grad`.

        Args:
            inverses: what to multiply with.
            coarse_weight: ω; with 0, or without a coarse inverse, there is no second level.
            kl_clip: κ, or None.
            rates: η_i by layer; used with `kl_clip` only.

        Returns:
            The `.grad` tensors to be replaced, their new values (until the next call), and Σ_i η_i² |v_i · ∇_i|.
            Nothing is written to `.grad`.
        """
        active = [layer in inverses.fine and layer.weight.grad is not None for layer in self._layers]
        if inverses is not self._inverses:
            for batch in self._batches:
                batch.set_inverse(inverses, self._layers)
            self._inverses = inverses
        grads = self._gather(active)
        directions = [batch.precondition(inverses.damping) for batch in self._batches]
        if coarse_weight != 0 and inverses.coarse is not None:
            self._shift(directions, inverses.coarse, coarse_weight, active)
        total = self._quadratic_form(directions, rates)
        # ν = min(1, √(κ / Σ)); a sum of 0 gives 1
        nu = total.new_ones(()) if kl_clip is None else (kl_clip / total).sqrt().clamp(max=1)
        for batch, direction in zip(self._batches, directions, strict=True):
            torch.mul(direction, nu.to(direction.dtype), out=batch.result)
        values = [
            view for i, is_active in enumerate(active) if is_active for view in self._present(i, self._results[i])
        ]
        return grads, values, total

    def _present(self, i: int, views: list[Tensor]) -> list[Tensor]:
        """Leave out the bias where it has no gradient in this step."""
        bias = self._layers[i].bias
        return views if bias is None or bias.grad is not None else views[:1]

    def _gather(self, active: Sequence[bool]) -> list[Tensor]:
        """Copy the gradients into the batches; what has none is 0 there."""
        grads: list[Tensor] = []
        slots: list[Tensor] = []
        blank: list[Tensor] = []
        for i, (layer, is_active) in enumerate(zip(self._layers, active, strict=True)):
            bias, grad = layer.bias, layer.weight.grad
            if not is_active or grad is None:
                blank += self._inputs[i]
                continue
            grads.append(grad)
            if bias is not None and bias.grad is not None:
                grads.append(bias.grad)
            elif bias is not None:
                blank.append(self._inputs[i][1])
            slots += self._present(i, self._inputs[i])
        if blank:
            torch._foreach_zero_(blank)
        if slots:
            torch._foreach_copy_(slots, grads)
        return grads

    def _by_layer(self, per_block: Sequence[Tensor]) -> Tensor:
        """Add up numbers of blocks by layer."""
        dtype = torch.float64 if any(numbers.dtype == torch.float64 for numbers in per_block) else torch.float32
        numbers = torch.cat([numbers.to(dtype) for numbers in per_block])
        return numbers.new_zeros(len(self._layers)).index_add_(0, self._layer_of_block, numbers)

    def _shift(self, directions: list[Tensor], coarse: Tensor, weight: float, active: Sequence[bool]) -> None:
        """v_i ← v_i + ω c_i on every element, c = (F_coarse + λ_c I)⁻¹ y, y_i the sum of ∇_i."""
        y = self._by_layer([batch.grads.sum((1, 2)) for batch in self._batches])
        takes_part = [
            float(is_active and layer.in_coarse) for is_active, layer in zip(active, self._layers, strict=True)
        ]
        mask = y.new_tensor(takes_part)
        c = weight * mask * (coarse.to(y.dtype) @ (mask * y))
        for batch, direction in zip(self._batches, directions, strict=True):
            direction += c[batch.layer_of_block, None, None].to(direction.dtype)

    def _quadratic_form(self, directions: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
        dots = self._by_layer(
            [(direction * batch.grads).sum((1, 2)) for direction, batch in zip(directions, self._batches, strict=True)]
        )
        return (dots.new_tensor(rates).square() * dots.abs()).sum()
