"""What a user reads of a curvature, the same for `KFAC`, `Preconditioner` and `Curvature`."""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor

from kfac2.coarse import Ones
from kfac2.estimates import Estimates
from kfac2.handled import Handled
from kfac2.inverses import Solvers
from kfac2.sharded import HasState, ShardedState
from kfac2.summary import Summary, summarised

logger = logging.getLogger("kfac2")


class Statistics(Protocol):
    """What `Readings` read: a `Curvature`."""

    handled: Handled
    estimates: Estimates
    solvers: Solvers


class Readings:
    """Copies of the running averages, and what follows from them."""

    _rest = "plain gradient"  # how the parameters are trained that K-FAC does not handle

    @property
    def _statistics(self) -> Statistics:
        raise NotImplementedError

    @property
    def layers(self) -> list[str]:
        """The handled modules' names, in the order of `model.named_modules()`."""
        return [layer.name for layer in self._statistics.estimates.layout.layers]

    def summary(self) -> Summary:
        """Tell what trains which parameters and why, and what K-FAC costs; `print` it, or read its numbers.

        It is logged to `kfac2` at construction: at WARNING if a trained weight of a kind that K-FAC handles is left
        alone without having been named by `skip`, else at INFO. Layers that have left K-FAC since are in it, too.

        Returns:
            Rows of parameters by treatment, class of the modules and reason; the memory of factors and of inverses;
            and Σ n³ over all factors; of several processes, who inverts.
        """
        of = self._statistics
        solvers = of.solvers.fine, of.solvers.coarse, of.solvers.division
        return summarised(of.handled, of.estimates.layout, *solvers, self._rest)

    def _log_summary(self) -> None:
        summary = self.summary()
        logger.log(logging.WARNING if summary.misses_layers else logging.INFO, "%s", summary)

    def sharded_state(self: HasState) -> ShardedState:
        """Return the state as `torch.distributed.checkpoint` saves it, and loads it in any number of processes.

            checkpoint.save({"model": model, "opt": opt.sharded_state()}, checkpoint_id=new_folder)
            checkpoint.load({"model": model, "opt": opt.sharded_state()}, checkpoint_id=folder)

        All processes call both. Each copies, writes and reads the inverses that it holds: with `share="gradients"` no
        process has them all, as with `state_dict()`. What all have is written by one of them.
        """
        return ShardedState(self)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Copy the current running averages of a layer's Kronecker factors.

        Args:
            name: a name from `layers`.

        Returns:
            A (d_in, d_in), the bias last, and G (d_out, d_out); for a convolution of q groups
            (q, d_in, d_in) and (q, d_out, d_out).

        Raises:
            KeyError: if no handled layer has that name.
            RuntimeError: if the layer has no statistics yet.
        """
        layout, averages = self._statistics.estimates.layout, self._statistics.estimates.averages
        number = layout.named(name)
        if number is None:
            raise KeyError(f"name must be one of the handled layers {self.layers}, got {name!r}")
        if not averages.seen[number]:
            raise RuntimeError(f"{name} has no statistics yet: take some first")
        A, G = averages.of_layer(layout, number)
        return (A, G) if layout.layers[number].blocks > 1 else (A[0], G[0])

    def coarse_sums(self) -> tuple[Tensor, Tensor]:
        """Copy the running averages of the two matrices of sums.

        Returns:
            The sums of A and the sums of G over every pair of blocks, (B, B) each: entry (q, r) is the sum of
            all elements of A_qr, or G_qr. A layer is one block, a convolution of q groups q of them (one,
            with more than `coarse_max_groups`).

        Raises:
            RuntimeError: without the space of ones, or if there are no statistics yet.
        """
        input_sums, grad_sums, _ = self._coarse()
        return input_sums.clone(), grad_sums.clone()

    def coarse_fisher(self) -> Tensor:
        """Return F_coarse, (L, L), from the current running averages (eq. 7), layers as in `layers`.

        Raises:
            RuntimeError: without the space of ones, or if there are no statistics yet.
        """
        return self._coarse()[2].clone()

    def _coarse(self) -> tuple[Tensor, ...]:
        if not isinstance(self._statistics.solvers.coarse, Ones):
            raise RuntimeError("there are no coarse sums without the space of ones: build with levels=2")
        if not self._statistics.estimates.averages.coarse:
            raise RuntimeError("there are no statistics yet: take some first")
        return self._statistics.estimates.averages.coarse
