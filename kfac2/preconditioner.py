"""The iterations of two-level K-FAC: statistics as the schedule wants them, and gradients rewritten in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac2.change_limit import ChangeLimit
from kfac2.curvature import Curvature
from kfac2.descent import Rate
from kfac2.groups import rates_of
from kfac2.health import is_capturing
from kfac2.kinds import Layer
from kfac2.likelihood import Prediction
from kfac2.meetings import Meetings
from kfac2.options import Options
from kfac2.own_passes import Passes, Predict
from kfac2.processes import WORLD
from kfac2.readings import Readings
from kfac2.schedule import Schedule
from kfac2.update import Update


class Preconditioner(Readings):
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
        model: the model; handled are `nn.Linear`, `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d` whose weight
            requires grad.
        params: the parameters that are trained; by default all of `model`.
        skip: full names of modules, or regular expressions that match them in full, left alone.
        options: checked options to share, in place of the following.
        process_group, share: as in `KFAC`.
        **settings: `damping`, `kl_clip`, `levels`, `coarse`, `inverse`, `fisher`, `stat_decay`, `cov_every`,
            `inv_every`, `burn_in`, `relative_damping`, `downsample`, `coarse_weight`, `coarse_damping`,
            `coarse_max_groups`, `inverse_dtype`, `cases`, `samples`, `batch_dim`, `check_every`, `step_precision`
            and, here by default None, `max_change`, as in `KFAC`.

    Attributes:
        options: the options; those that state does not depend on may be set during training.
        curvature: the statistics and inverses that this is a schedule of.
        schedule: what each iteration wants.
        meetings: of the processes that train one model.
        took_statistics: whether the last step was of an iteration of statistics.

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
        options: Options | None = None,
        process_group: object = WORLD,
        share: str | float = "auto",
        **settings: Any,
    ) -> None:
        self.options = Options.of(settings) if options is None else options
        self.curvature = Curvature(
            model, params=params, skip=skip, options=self.options, process_group=process_group, share=share
        )
        self.curvature.scheduled = True
        self.curvature.dropping = self.check
        self.schedule = Schedule(self.curvature, self.options)
        self.took_statistics = False
        self._passes = Passes(self.curvature, self.schedule)
        self._update = Update(self.curvature, self.options, self.schedule)
        self.meetings = Meetings(self.curvature, self.schedule)
        self.iteration = 0
        if options is None:  # else who shares them tells it
            self._log_summary()

    @property
    def _statistics(self) -> Curvature:
        return self.curvature

    @property
    def scale(self) -> Tensor:
        """On the device, ν of the last step, and the sum that it bounds."""
        return self._update.scale

    @property
    def change_limit(self) -> ChangeLimit:
        """The limit of each layer's direction."""
        return self._update.change_limit

    @property
    def needs_fisher(self) -> bool:
        """Whether this iteration wants `accumulate_fisher`.

        Each `cov_every`-th does, each one while there is nothing yet, and one whose forward pass used a layer that has
        no statistics so far; with `coarse="directions"` each one while these pay.
        """
        return self.options.fisher != "empirical" and (self.schedule.wants_statistics or self.schedule.wants_rows)

    @property
    def iteration(self) -> int:
        """k, calls of `step` so far."""
        return self.schedule.iteration

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self.schedule.go_on_at(iteration)

    # -- an iteration -----------------------------------------------------------------------------------------

    def accumulate_fisher(
        self, distribution: Prediction | Predict, mask: Tensor | None = None, samples: int | None = None
    ) -> None:
        """Take statistics from the model's own predictive distribution; does nothing unless `needs_fisher`.

        Draws labels with `.sample()` and differentiates -log_prob with respect to the layers' outputs only:
        no weight gradient is computed, `.grad` stays as it is, and the graph is kept for the loss. Call it
        after the forward pass and before or after `backward()` (then with `retain_graph=True`). Several calls
        in one iteration add up, as micro-batches of one mean loss. Where a distribution is large (a language model's
        words), make it only `if opt.needs_fisher`: torch normalises it as it is made.

        In iterations of statistics what torch.compile has compiled runs as it was written.

        The training loss must be the mean of -log_prob up to a constant, or λ means something else: for
        `Normal(mean, 1)` that is ½ `F.mse_loss`; `Independent(Normal(...), 1)` has one case for each sample
        where `Normal` has one for each number, and differs by the dimension.

        Statistics count once the loss of their own forward pass has gone backward, so that a batch that is thrown away
        in between takes them with it.

        A function in place of the distribution makes a forward pass of its own, of some of the samples: it is called
        with a `slice` of them, with grad enabled, and returns the distribution,

            opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=len(x))

        Batch norm then takes the statistics of these samples, and leaves its running ones as they are. How many there
        are is up to `coarse_samples` with `coarse="directions"`; else it is all of them, and costs a forward pass. No
        other forward pass is looked at from then on, and what the function has brought counts in any case.

        Args:
            distribution: any `torch.distributions.Distribution` whose parameters carry the graph; a list of them, one
                for each head, whose Fishers add up (two calls are two micro-batches of one); or log-probabilities of
                labels that you drew from the model. `Normal(log ψ, 1)` gives quantum Monte Carlo's ⟨∂ log ψ ∂ log ψ⟩,
                λ then being in its units.
            mask: bool, (N, S): which tokens are data, where positions mix. By default those that the loss can reach.
                With a function: of all N samples.
            samples: N, how many samples there are; needed, and only taken, with a function.

        Raises:
            TypeError: if `distribution` is none, or `samples` no int where it is needed.
            ValueError: if it carries no graph, or none that holds a handled layer's output; or if `mask` fits none.
        """
        if not callable(distribution) and samples is not None:
            raise TypeError(f"samples must be left out with a distribution, got {samples!r}: it says how many itself")
        if self.needs_fisher:
            self._passes.collect(distribution, mask, samples)

    def step(self, lr: Rate | Mapping[str, float] | None = None) -> bool:
        """Precondition the gradients in place: statistics, inverses, both levels, KL clip, limits.

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
        done = self.precondition(rates_of(lr, self.layers, self.schedule.now("kl_clip") is not None))
        if not done:
            for parameter in self.curvature.handled.params:
                parameter.grad = None
        return done

    @torch.no_grad()
    def precondition(self, rates: Callable[[Layer], Rate]) -> bool:
        """Do the work of `step`; on False the gradients hold no meaning.

        Args:
            rates: gives η_i of a layer; asked once it is known which there are.

        Returns:
            False where a NaN or an infinity came up, and the host knows.

        Raises:
            RuntimeError: if statistics are missing, or a CUDA graph is captured in an iteration that wants
                statistics or inverses.
        """
        curvature, schedule = self.curvature, self.schedule
        capturing = is_capturing(curvature.layout.device)
        if capturing:
            self._check_capture()
        took, meets = schedule.wants_statistics, schedule.waits_for_others
        self.took_statistics = took
        bad = self.meetings.take()
        if took and (bad is not None or not curvature.iteration.sums.A):  # else the update looks
            self._update.look()
            if bad is None and curvature.layout.layers:
                self._report_missing()
        if any(layer.weight.grad is not None for layer in curvature.estimates.layers_that(seen=False)):
            schedule.look_again()
        step = curvature.prepared()
        gathered = step.gather([parameter.grad for parameter in step.parameters])
        of_layers = [rates(layer) for layer in curvature.layout.layers]
        if bad is None:
            bad = self._update.run(step, gathered, of_layers, capturing)
        if bad is not None:
            curvature.health.skip(self.iteration, bad)
        elif curvature.health.found is None:  # and the host has looked
            curvature.health.went_on()
        if bad is None and took:
            schedule.own_steps.decide()
        if meets:
            self.meetings.settle_next()
        curvature.iteration.discard()
        if not schedule.own_steps.reads_gradients:
            step.let_go()
        self.iteration += not capturing
        return bad is None

    def _report_missing(self) -> None:
        call = "accumulate_fisher" if self.options.fisher != "empirical" else "backward() with grad enabled"
        if not self.curvature.averages.updates:
            raise RuntimeError(f"there are no statistics at all: call {call} before step(), got none in this iteration")
        self.curvature.health.warn_once(
            "missing", f"{call} was not called in an iteration that wants statistics; older ones are used"
        )

    # -- what an ordinary step leaves to later ---------------------------------------------------------------

    @property
    def found(self) -> Tensor | None:
        """On the device, 1 where the last step came upon a NaN or an infinity that the host does not know of."""
        return self.curvature.health.found

    @property
    def ordinary(self) -> bool:
        """Whether a CUDA graph of an ordinary step may stand in for this iteration.

        It may where neither statistics nor inverses are due, unless something that the graph has fixed is no longer
        so: a layer was dropped or left the coarse space. Then capture the step again, in an iteration of which
        `needs_fisher` is False.
        """
        held = (self.curvature.prepared(), self.curvature.averages.in_coarse)
        return not self.curvature.health.is_stale(held) and self.schedule.is_ordinary

    def _check_capture(self) -> None:
        if not (division := self.curvature.solvers.division).holds_all:
            raise RuntimeError(f"share must be 'all' or 'inverses' to capture a step, got {division.share!r}")
        if not self.schedule.is_ordinary:
            raise RuntimeError(
                f"only an ordinary step can be captured in a CUDA graph, got iteration {self.iteration}, which wants "
                "statistics or inverses: capture where `ordinary` is True"
            )

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
        count = self._update.look()
        self.curvature.health.tell_skipped()
        return count

    def watch(self, params: Iterable[nn.Parameter]) -> None:
        """Look for NaNs and infinities in the gradients of further parameters, which joined the optimizer later."""
        self.curvature.train([*self.curvature.handled.params, *params])

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self, gathers: bool = True) -> dict[str, Any]:
        """Return everything that training goes on from; see `Curvature.state_dict`."""
        self.check()
        state = self.curvature.state_dict(gathers)
        bounds = {"weight_norms": self.change_limit.state(self.curvature.layout)}
        return {"iteration": self.iteration, **state, "bounds": bounds}

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a state fits this model and these options; a ValueError names what does not."""
        self.curvature.check_state_dict(state_dict, ("iteration",))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Options that may change during training are restored as well.

        Args:
            state_dict: what `state_dict` returned, for the same model and structural options.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
        self.check_state_dict(state_dict)
        self.curvature.load_state_dict(state_dict)
        norms = state_dict.get("bounds", {}).get("weight_norms")
        self.change_limit.load(norms, self.curvature.layout, self.options.max_change, self.curvature.averages.seen)
        self.meetings.begin_at(state_dict["iteration"])
        self.iteration = state_dict["iteration"]
        self.schedule.look_again()

    def close(self) -> None:
        """Look at no forward pass any more; steps go on with the statistics that there are."""
        self.curvature.close()
