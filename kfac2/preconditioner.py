"""Two-level K-FAC without the SGD step: statistics, inverses, and gradients rewritten in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from kfac2 import ops, state
from kfac2.collector import Collector
from kfac2.inverses import Inverses, invert, layer_of_block, mend
from kfac2.layers import Layer, find_layers
from kfac2.options import Options, check_option
from kfac2.statistics import Statistics, updated, without
from kfac2.update import Gathered, Update, is_capturing


class Preconditioner:
    """Rewrites gradients by two-level K-FAC, for any optimizer to follow.

    ```python
    preconditioner = kfac2.Preconditioner(model, kl_clip=None)
    adam = torch.optim.AdamW(model.parameters())
    for x, y in loader:
        adam.zero_grad()
        out = model(x)
        preconditioner.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        preconditioner.step()
        adam.step()
    ```

    Args:
        model: the model; handled are `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` whose weight
            requires grad.
        params: the parameters that are trained; by default all of `model`.
        skip: full names of modules, or regular expressions that match them in full, left alone.
        **options: `damping`, `kl_clip`, `levels`, `inverse`, `fisher`, `stat_decay`, `cov_every`,
            `inv_every`, `downsample`, `coarse_weight`, `coarse_damping`, `coarse_max_groups`, `inverse_dtype` and
            `cases`, as in `KFAC`.

    Attributes:
        options: the options; those that state does not depend on may be set during training.
        iteration: k, calls of `step` so far.

    Raises:
        TypeError: if an argument has the wrong type, or an option is unknown.
        ValueError: if an option is out of its range, `skip` matches nothing, the model has no layer to
            handle, or its layers are on two devices.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[nn.Parameter] | None = None,
        skip: Iterable[str] = (),
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(Options.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"{unknown[0]} is no option of kfac2; the options are {', '.join(Options.__dataclass_fields__)}"
            )
        self.options = Options(**options)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._params = list(model.parameters() if params is None else params)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._layers = find_layers(model, self._params, skip, self.options.coarse_max_groups)
        self._dropped: list[str] = []
        self._collector = Collector(self._layers, self.options, self._wants_statistics, self._drop)
        self._statistics: Statistics | None = None
        self._inverses: Inverses | None = None
        self._update: Update | None = None
        self._graph_lost = False  # a captured CUDA graph belongs to an update that is gone
        self._unread = False  # on a CUDA device, from the first step on: ordinary steps read nothing back
        self._found: Tensor | None = None
        self._warned: set[str] = set()
        self.iteration = 0

    # -- what the user reads --------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """The handled modules' names, in the order of `model.named_modules()`."""
        return [layer.name for layer in self._layers]

    @property
    def needs_fisher(self) -> bool:
        """Whether this iteration wants `accumulate_fisher`: each `cov_every`-th, and while there is nothing yet."""
        return self.options.fisher == "mc" and self._wants_statistics()

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
        layer = next((layer for layer in self._layers if layer.name == name), None)
        if layer is None:
            raise KeyError(f"name must be one of the handled layers {self.layers}, got {name!r}")
        if self._statistics is None or layer not in self._statistics.A:
            raise RuntimeError(f"{name} has no statistics yet: call accumulate_fisher and step first")
        A, G = self._statistics.A[layer].clone(), self._statistics.G[layer].clone()
        return (A, G) if layer.blocks > 1 else (A[0], G[0])

    def coarse_sums(self) -> tuple[Tensor, Tensor]:
        """Copy the running averages of the two matrices of sums.

        Returns:
            The sums of A and the sums of G over every pair of blocks, (B, B) each: entry (q, r) is the sum of
            all elements of A_qr, or G_qr. A layer is one block, a convolution of q groups q of them (one,
            with more than `coarse_max_groups`).

        Raises:
            RuntimeError: with `levels=1`, or if there are no statistics yet.
        """
        if self.options.levels == 1:
            raise RuntimeError("there are no coarse sums with levels=1: build with levels=2")
        if self._statistics is None or self._statistics.input_sums is None or self._statistics.grad_sums is None:
            raise RuntimeError("there are no statistics yet: call accumulate_fisher and step first")
        return self._statistics.input_sums.clone(), self._statistics.grad_sums.clone()

    def coarse_fisher(self) -> Tensor:
        """Return F_coarse, (L, L), from the current running averages (eq. 7), layers as in `layers`.

        Raises:
            RuntimeError: with `levels=1`, or if there are no statistics yet.
        """
        return ops.coarse_fisher(*self.coarse_sums(), layer_of_block(self._layers))

    # -- statistics -----------------------------------------------------------------------------------------

    def accumulate_fisher(self, distribution: Distribution) -> None:
        """Take statistics from the model's own predictive distribution; does nothing unless `needs_fisher`.

        Draws labels with `.sample()` and differentiates -log_prob with respect to the layers' outputs only:
        no weight gradient is computed, `.grad` stays as it is, and the graph is kept for the loss. Call it
        after the forward pass and before or after `backward()` (then with `retain_graph=True`). Several calls
        in one iteration add up, as micro-batches of one mean loss.

        A forward pass with grad enabled in an iteration that wants statistics keeps its graph until `step`:
        evaluate under `torch.no_grad()`.

        The training loss must be the mean of -log_prob up to a constant, or λ means something else: for
        `Normal(mean, 1)` that is ½ `F.mse_loss`; `Independent(Normal(...), 1)` has one case for each sample
        where `Normal` has one for each number, and differs by the dimension.

        Args:
            distribution: any `torch.distributions.Distribution` whose parameters carry the graph.

        Raises:
            TypeError: if `distribution` is none.
            ValueError: if it carries no graph, or none that holds a handled layer's output.
        """
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"distribution must be a torch.distributions.Distribution, got {type(distribution).__name__}"
            )
        if not self.needs_fisher:
            return
        self._collector.sample(distribution)

    def _wants_statistics(self) -> bool:
        return bool(self._layers) and (self._statistics is None or self.iteration % self.options.cov_every == 0)

    def _drop(self, layer: Layer) -> None:
        """Leave a layer to SGD from now on; what this iteration has summed so far is discarded with it."""
        self.check()
        self._graph_lost |= self._update is not None and self._update.captured
        kept = [other for other in self._layers if other is not layer]
        if self._statistics is not None:
            self._statistics = without(self._statistics, self._layers, layer)
        self._layers = kept
        self._dropped.append(layer.name)
        self._collector.forget(layer)
        self._inverses = self._update = None

    # -- the step -------------------------------------------------------------------------------------------

    def step(self, lr: float | Tensor | Mapping[str, float] | None = None) -> bool:
        """Precondition the gradients in place: statistics, inverses, both levels, KL clip.

        Parameters that K-FAC does not handle keep their gradients.

        Args:
            lr: η for the KL clip: one number, or one for each layer by name. Needed unless `kl_clip=None`.

        Returns:
            True; or False where a NaN or an infinity came up. Then nothing but the iteration count has
            moved, a warning has named the layer, and all gradients are None, so that the optimizer that
            follows leaves the parameters alone. On a CUDA device an ordinary step reads nothing back: it returns
            True, and where a NaN or an infinity came up all gradients are 0; the warning comes with the next
            statistics, or from `check`.

        Raises:
            RuntimeError: if statistics are missing.
            ValueError: if `lr` is missing or negative.
            TypeError: if `lr` is no number.
            KeyError: if a mapping lacks a layer.
        """
        done = self.precondition(self._rate_of(lr))
        if not done:
            for parameter in self._params:
                parameter.grad = None
        return done

    def _rate_of(self, lr: float | Tensor | Mapping[str, float] | None) -> Callable[[Layer], float | Tensor]:
        if lr is None:
            if self.options.kl_clip is not None:
                raise ValueError("lr must be given, since the KL clip depends on it; got None (or set kl_clip=None)")
            return lambda layer: 1.0
        if isinstance(lr, Tensor):
            return lambda layer: lr
        rates = {name: lr[name] for name in self.layers} if isinstance(lr, Mapping) else dict.fromkeys(self.layers, lr)
        for rate in rates.values():
            check_option("lr", rate, (int, float), lambda v: v >= 0, "a number of at least 0")
        return lambda layer: rates[layer.name]

    def watch(self, params: Iterable[nn.Parameter]) -> None:
        """Look for NaNs and infinities in the gradients of further parameters, too.

        Args:
            params: parameters that joined the optimizer later.
        """
        self._params += list(params)
        if self._update is not None:
            self._update.watch(self._others())

    @property
    def found(self) -> Tensor | None:
        """On the device, 1 where the last step came upon a NaN or an infinity that the host does not know of."""
        return self._found

    @property
    def ordinary(self) -> bool:
        """Whether a CUDA graph of an ordinary step may stand in for this iteration.

        It may where neither statistics nor inverses are due, unless something that the graph has fixed is no longer
        so: a layer was dropped or left the coarse space, or layers have got inverses that had none. Then
        capture the step again, in an iteration of which `needs_fisher` is False.
        """
        stale = self._graph_lost or (self._update is not None and self._update.stale)
        return not stale and self._is_ordinary()

    def _is_ordinary(self) -> bool:
        return not (self._wants_statistics() or self._wants_inverses())

    def replayed(self) -> None:
        """Count an iteration whose step was the replay of a CUDA graph.

        Raises:
            RuntimeError: if this iteration wants statistics or inverses, which no graph holds.
        """
        if not self.ordinary:
            raise RuntimeError(
                f"replayed() counts an ordinary iteration, got iteration {self.iteration}, which wants statistics or "
                "inverses: run it without the graph"
            )
        self.iteration += 1

    @torch.no_grad()
    def check(self) -> int:
        """Wait for the device, warn of what it has found since the last report, and mend inverses that failed.

        Does nothing on a CPU, where each step reports for itself. Statistics updates do it by themselves.

        Returns:
            How many steps were skipped because of a NaN or an infinity since the last report.
        """
        if not self._unread or self._update is None:
            return 0
        count, first = self._update.skipped.tolist()
        if count:
            self._update.skipped.zero_()
            warnings.warn(
                f"kfac2: {count} steps before iteration {self.iteration} were skipped; the first for a NaN or an "
                f"infinity in {self._source_name(self._update, first)}",
                RuntimeWarning,
                stacklevel=2,
            )
        for layer in self._update.failures():
            assert self._statistics is not None and self._inverses is not None
            fields = mend(self._statistics, layer, self.options, self._warn_once)
            if not self._update.replace(layer, fields):
                del self._inverses.fine[layer]
        if self._inverses is not None:
            self._inverses.status = None
        return count

    @torch.no_grad()
    def precondition(self, rate_of: Callable[[Layer], float | Tensor]) -> bool:
        """Do the work of `step`; on False gradients stay as they are.

        Args:
            rate_of: gives η_i of a layer.

        Returns:
            False where a NaN or an infinity came up, and the host knows.

        Raises:
            RuntimeError: if statistics are missing, or a CUDA graph is captured in an iteration that wants
                statistics or inverses.
        """
        capturing = is_capturing(self._device)
        self._graph_lost &= not capturing
        if capturing and not self._is_ordinary():
            raise RuntimeError(
                f"only an ordinary step can be captured in a CUDA graph, got iteration {self.iteration}, which wants "
                "statistics or inverses: capture where `ordinary` is True"
            )
        if self._wants_statistics():
            self._take_statistics()
        update = self._prepared()
        gathered = update.gather()
        name = self._collector.poisoned
        if name is None and self._may_read(gathered):
            name = self._collector.raw.not_finite() or self._not_finite(gathered)
        if name is None:
            name = self._write(update, gathered, *self._refreshed(), rate_of)
        if name is not None:
            warnings.warn(
                f"kfac2: a NaN or an infinity in {name} at iteration {self.iteration}; the step is skipped",
                RuntimeWarning,
                stacklevel=3,
            )
        self._collector.clear()
        self.iteration += not capturing
        return name is None

    def _take_statistics(self) -> None:
        self.check()
        if self.options.fisher == "empirical":
            self._collector.take_backward()
        if self._layers and not self._collector.raw.A and self._collector.poisoned is None:
            self._report_missing()

    def _prepared(self) -> Update:
        if self._update is None or not self._update.fits():
            self._unread |= self._device.type == "cuda"
            self._update = Update(self._layers, self._others(), self._device)
            self._update.adopt(self._inverses)
        return self._update

    @property
    def _device(self) -> torch.device:
        return (self._layers[0].weight if self._layers else self._params[0]).device

    def _others(self) -> list[Tensor]:
        own = {id(parameter) for layer in self._layers for parameter in (layer.weight, layer.bias)}
        return [parameter for parameter in self._params if id(parameter) not in own]

    def _report_missing(self) -> None:
        call = "accumulate_fisher" if self.options.fisher == "mc" else "backward() with grad enabled"
        if self._statistics is None:
            raise RuntimeError(f"there are no statistics at all: call {call} before step(), got none in this iteration")
        self._warn_once(
            "missing",
            f"kfac2: {call} was not called in an iteration that wants statistics; older ones are used",
        )

    def _may_read(self, gathered: Gathered) -> bool:
        """Whether this step reads back from the device: statistics are averaged in for good, so they are looked at."""
        return not self._unread or bool(self._collector.raw.A) or bool(gathered.elsewhere)

    def _not_finite(self, gathered: Gathered) -> str | None:
        """Name the first gradient that is not finite."""
        for parameter in gathered.elsewhere:
            grad = parameter.grad
            values = grad.coalesce().values() if grad is not None and grad.is_sparse else grad
            if values is not None and not values.isfinite().all():
                return self._gradient_name(parameter)
        first, update = int(gathered.first_bad), self._prepared()
        return None if first >= update.none_bad else self._source_name(update, first)

    def _source_name(self, update: Update, first: int) -> str:
        parameter = update.parameter(first)
        return "the preconditioned gradients" if parameter is None else self._gradient_name(parameter)

    def _gradient_name(self, parameter: Tensor) -> str:
        return f"the gradient of {self._names.get(id(parameter), 'a parameter outside the model')}"

    def _wants_inverses(self) -> bool:
        return self._inverses is None or self.iteration % self.options.inv_every == 0

    def _refreshed(self) -> tuple[Statistics | None, Inverses | None]:
        """Return statistics and inverses as of this iteration; commit neither."""
        statistics, inverses = self._statistics, self._inverses
        if self._collector.raw.A:
            statistics = updated(statistics, self._collector.raw, self._layers, self.options.stat_decay)
        if statistics is not None and self._wants_inverses():
            inverses = invert(statistics, self._layers, inverses, self.options, self._warn_once, self._unread)
        return statistics, inverses

    def _write(
        self,
        update: Update,
        gathered: Gathered,
        statistics: Statistics | None,
        inverses: Inverses | None,
        rate_of: Callable[[Layer], float | Tensor],
    ) -> str | None:
        """Compute the new gradients; write them and commit the state only if all are finite."""
        self._found = None
        if statistics is None or inverses is None or not self._layers:
            return self._not_finite(gathered)  # nothing to precondition: plain SGD
        rates = [rate_of(layer) for layer in self._layers]
        step = update.compute(gathered, inverses, self.options.coarse_weight, self.options.kl_clip, rates)
        if self._unread and not gathered.elsewhere:
            self._found = step.found
        elif step.found.item():
            update.skipped[0] -= 1  # reported here
            return "the preconditioned gradients"
        update.write(gathered, step)
        self._statistics, self._inverses = statistics, inverses
        return None

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from, loadable with `torch.load(..., weights_only=True)`.

        Factors, sums and inverses keep their own dtype. On CUDA, grouped convolutions are the exception to bit
        for bit: torch adds their blocks up in no fixed order. Labels are drawn from torch's global generator: to
        resume bit for bit, save and restore its state too.
        """
        self.check()
        return {
            "iteration": self.iteration,
            "options": self.options.as_dict(),
            "layers": {layer.name: {"in_coarse": layer.in_coarse} for layer in self._layers},
            "dropped": list(self._dropped),
            "statistics": state.from_statistics(self._statistics),
            "inverses": state.from_inverses(self._inverses),
        }

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a state fits this model and these options; changes nothing.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: naming what does not fit.
        """
        state.check(state_dict, self._layers, self._dropped, self.options)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Options that may change during training are restored as well.

        Args:
            state_dict: what `state_dict` returned, for the same model and structural options.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
        self.check_state_dict(state_dict)
        for layer in [layer for layer in self._layers if layer.name in state_dict["dropped"]]:
            self._drop(layer)
        for layer in self._layers:
            layer.in_coarse = state_dict["layers"][layer.name]["in_coarse"]
        for name, value in state_dict["options"].items():
            setattr(self.options, name, value)
        self.iteration = state_dict["iteration"]
        self._statistics = state.to_statistics(state_dict["statistics"], self._layers)
        self._inverses = state.to_inverses(state_dict["inverses"], self._layers)
        self._collector.clear()
        if self._update is not None:
            self._update.adopt(self._inverses)
