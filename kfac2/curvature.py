"""The curvature of a model: running averages of its Kronecker factors and their damped inverses, without a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac2 import state
from kfac2.coarse import coarse_space
from kfac2.collector import Collector
from kfac2.division import Division, check_share
from kfac2.estimates import Estimates
from kfac2.fine import SOLVERS, ObservingSolver
from kfac2.followed import Followed
from kfac2.handled import Handled
from kfac2.health import Health
from kfac2.inverses import Inverses, Solvers
from kfac2.iteration import Iteration
from kfac2.joint import Joint
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.likelihood import NotFiniteError, Prediction
from kfac2.measured_share import settle_share
from kfac2.options import CurvatureOptions, check_damping
from kfac2.processes import WORLD, check_plain, processes_of, unwrapped
from kfac2.readings import Readings
from kfac2.solve import checked_gradients, solve_in_place
from kfac2.statistics import Averages
from kfac2.step import Step
from kfac2.summary import warn_of_large_factors


class Curvature(Readings):
    """The two-level K-FAC approximation of a model's Fisher: statistics and inverses, used as you like.

    ```python
    curvature = kfac2.Curvature(model)
    for x, _ in loader:
        curvature.accumulate(Categorical(logits=model(x)))
    A, G = curvature.factors("0")
    gradients = {name: p.grad for name, p in model.named_parameters()}
    natural = curvature.solve(gradients, damping=1e-2)
    ```

    `Preconditioner` is a schedule over it, and `KFAC` an SGD step behind that.

    Args:
        model: the model; handled are `nn.Linear`, `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d` whose weight
            requires grad. Why another is left alone is in `summary()`, which is logged to `kfac2`.
        params: the parameters that are trained; by default all of `model`.
        skip: full names of modules, or regular expressions that match them in full, left alone.
        options: checked options to share, in place of the following.
        process_group, share: as in `KFAC`. All processes call `accumulate`, each with its own part of the batch, and
            `solve`.
        **settings: `levels`, `inverse`, `fisher`, `stat_decay`, `downsample`, `coarse_weight`, `coarse_damping`,
            `coarse_max_groups`, `inverse_dtype`, `cases`, `samples`, `batch_dim`, `check_every` and
            `step_precision`, as in `KFAC`.

    Attributes:
        options: the options; those that state does not depend on may be set at any time.
        model: the model, without DistributedDataParallel around it.
        handled: which layers of the model these are, and which parameters are trained.
        collector: captures forward passes with grad enabled, until `close`.
        solvers: the inverse, the coarse space and the processes, which make estimates.
        estimates: the averages and inverses.
        iteration: what the passes of this iteration have found.
        health: what was found not to be finite, and who knows.
        joint: what is done together with other processes.
        dropping: called before a layer is dropped, while what was found still has its names.
        moment: gives the number that labels are drawn with, where there are several processes.
        scheduled: whether a `Preconditioner` is its schedule: inverses that `solve` makes are then not those in use.

    Raises:
        TypeError: if an argument has the wrong type, or an option is unknown.
        ValueError: if an option is out of its range, `skip` matches nothing, the model has no layer to
            handle, or its layers are on two devices; if parameters are DTensors, or models or options differ between
            processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[nn.Parameter] | None = None,
        skip: Iterable[str] = (),
        options: CurvatureOptions | None = None,
        process_group: object = WORLD,
        share: str | float = "auto",
        **settings: Any,
    ) -> None:
        skip = [skip] if isinstance(skip, str) else list(skip)
        self.options = chosen = CurvatureOptions.of(settings) if options is None else options
        check_share(share, chosen.inverse)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        is_empirical = chosen.fisher == "empirical"
        self.model = model = unwrapped(model, not is_empirical)
        params = list(model.parameters() if params is None else params)
        check_plain(params)
        self.handled = Handled(model, params, skip, chosen.coarse_max_groups)
        layers = self.handled.layers
        layout = Layout(layers, layers[0].weight.device)
        processes = processes_of(process_group, layout.device)
        fine, coarse = SOLVERS[chosen.inverse](), coarse_space(chosen.space, chosen.downsample)
        self.solvers = Solvers(fine, coarse, processes, Division(processes, share))
        warn_of_large_factors(layout, fine)
        self.health = Health(layout.device)
        self.estimates = Estimates(layout, chosen, self.solvers, self.health)
        self.dropping: Callable[[], object] = lambda: None
        is_by_sample = chosen.space is not None or chosen.inverse == "ekfac"
        followed = Followed(layers, is_empirical, self.drop, chosen.batch_dim, chosen.check_every, processes)
        self.collector = Collector(followed, is_by_sample)
        self.collector.captures.turn(True)
        self.moment: Callable[[], int] = lambda: self.averages.updates
        self.iteration = Iteration(
            lambda: self.layout,
            self.collector,
            coarse,
            chosen,
            self.estimates.observe if isinstance(fine, ObservingSolver) else None,
            self.health.warn_once,
            lambda number: processes.labels(self.moment(), number),
            lambda: self.estimates.looks_at_once or not self.scheduled,
        )
        self._step: Step | None = None
        self.scheduled = False
        self.joint = Joint(self)
        processes.check_alike(self.joint.facts)
        settle_share(self.solvers, layout, chosen.inverse_dtype)
        if options is None:  # else who shares them tells it
            self._log_summary()

    @property
    def _statistics(self) -> Curvature:
        return self

    @property
    def layout(self) -> Layout:
        """Where the layers lie now."""
        return self.estimates.layout

    @property
    def averages(self) -> Averages:
        """The running averages."""
        return self.estimates.averages

    @property
    def inverses(self) -> Inverses | None:
        """The inverses in use."""
        return self.estimates.inverses

    # -- statistics -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self, *distributions: Prediction) -> None:
        """Average one batch into the statistics.

        Args:
            *distributions: the model's predictive distributions, whose parameters carry the graph; those of several
                passes add up, as micro-batches of one mean loss. None with `fisher="empirical"`, which takes the
                gradients of the ordinary backward passes since the last call.

        Raises:
            TypeError: if an argument is no distribution.
            ValueError: if one carries no graph, or none that holds a handled layer's output; if there is one with
                `fisher="empirical"`; or if something is not finite. Nothing is changed then.
            RuntimeError: with `fisher="empirical"`, if no backward pass has come by.
        """
        if distributions and self.options.fisher == "empirical":
            raise ValueError(
                "distributions must be left out with fisher='empirical', whose gradients are those of backward(); "
                f"got {len(distributions)}"
            )
        try:
            for distribution in distributions:
                self.collect(distribution)
            bad = self.joint.take("accumulate", must_go_backward=False) or self.iteration.sums.not_finite()
            if bad is not None:
                raise NotFiniteError(bad)
            if not self.iteration.sums.A:
                raise RuntimeError("there is nothing to accumulate: got no distribution and no backward pass")
            self.estimates.commit(*self.estimates.averaged(self.iteration.sums))
        finally:
            self.iteration.drop_kept()
            self.iteration.discard()

    @torch.no_grad()
    def collect(
        self, prediction: Prediction, mask: Tensor | None = None, has_loss: bool = True, is_summed: bool = True
    ) -> None:
        """Sum up one pass of this iteration, see `Iteration.collect`."""
        self._follow()
        if self.layout.layers:
            self.iteration.collect(prediction, mask, has_loss, is_summed)

    @torch.no_grad()
    def collect_backward(self) -> None:
        """Sum up the ordinary backward passes of this iteration (the empirical Fisher)."""
        self._follow()
        self.iteration.collect_backward()

    def close(self) -> None:
        """Look at no forward pass any more, for good. What was found goes on to be used."""
        self.iteration.discard()
        self.collector.captures.close()

    def drop(self, layer: Layer, reason: str = "") -> None:
        """Leave a layer alone from now on; what this iteration has summed so far is discarded with it."""
        if reason:
            self.health.warn(f"{layer.title} leaves K-FAC, and takes its plain gradient: {reason}")
        self.dropping()
        self.estimates.drop(layer)
        self.handled.dropped[layer.name] = reason or "it had left K-FAC in the state that was loaded"
        self.collector.follow(self.layout.layers)
        self.iteration.forget()
        self.iteration.drop_kept()
        self._step = None

    # -- solves and steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def solve(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Multiply gradients by the damped inverse of the Fisher: both levels, no clip.

        Waits for the device. With the same statistics and damping the inverses are those of the last call.

        Args:
            gradients: by name of the parameter, as in `model.named_parameters()`, shaped as these.
            damping: λ > 0, in units of the Fisher of the mean loss.

        Returns:
            By the same names. A parameter that K-FAC does not handle, or whose layer has no statistics, keeps its
            gradient; a layer whose weight has none has no part in the coarse system.

        Raises:
            TypeError: if `damping` is no number.
            ValueError: if `damping` is not above 0, a gradient has another shape than its parameter, or one or its
                solution is not finite.
            KeyError: if a name is none of a parameter.
            RuntimeError: if there are no statistics yet.
        """
        check_damping(damping)
        if not self.averages.updates:
            raise RuntimeError("there are no statistics yet: call accumulate first")
        solutions = checked_gradients(gradients, self.handled.named())
        if not self.layout.layers:
            return solutions
        inverses = self.estimates.inverted_for_solves(damping, commits=not self.scheduled)
        step = self.prepared()
        own = [solutions.get(self.handled.name_of(p) or "") for p in step.parameters]
        arguments = inverses, self.solvers, self.averages.in_coarse, self.options.coarse_weight
        if (bad := solve_in_place(step, own, *arguments, self.options.step_precision)) is not None:
            raise ValueError(f"gradients must be finite, got a NaN or an infinity in {self.source(bad)}")
        return solutions

    def prepared(self) -> Step:
        """Return the step for the layers as they are, made anew where they have moved."""
        self._follow()
        if self._step is None:
            self._step = Step(self.layout, self.handled.others())
        return self._step

    def _follow(self) -> None:
        """Lay everything out anew where layers are others now, or elsewhere."""
        if self.handled.has_changed():
            self.dropping()
            for left in self.handled.find_again():
                self.health.warn(left)
            self.collector.follow(self.handled.layers)
            self._lay_out(self.handled.layers)
        elif not self.layout.fits():
            self.dropping()
            self._lay_out(self.layout.layers)

    def _lay_out(self, layers: Sequence[Layer]) -> None:
        before = self.layout.device
        is_same = self.estimates.move(Layout(layers, layers[0].weight.device if layers else before))
        self._step = None
        if not is_same:  # what was summed is of other layers
            self.iteration.forget()
            self.iteration.drop_kept()
        if before != self.layout.device:
            self.health.move(self.layout.device)

    def train(self, params: Iterable[nn.Parameter]) -> None:
        """Go on with these parameters, since others joined or left the optimizer: a layer leaves with its weight."""
        self.dropping()  # what was found has the numbers of now
        self.handled.train(params)
        self._step = None

    def source(self, number: int) -> str:
        """Name what was not finite, by the number of a parameter of the step; what is behind them all is the result."""
        parameters = (self._step or self.prepared()).parameters
        if number >= len(parameters):
            return "the preconditioned gradients"
        return f"the gradient of {self.handled.name_of(parameters[number]) or 'a parameter outside the model'}"

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self, gathers: bool = True) -> dict[str, Any]:
        """Return everything that statistics and inverses go on from, loadable with `torch.load(weights_only=True)`.

        Factors, sums and inverses keep their own dtype. On CUDA, grouped convolutions are the exception to bit
        for bit: torch adds their blocks up in no fixed order. Labels are drawn from torch's global generator: to
        resume bit for bit, save and restore its state too. Several processes draw theirs by a seed that is in the
        state, and have the same state; it may be loaded by another number of them. Where not all have all inverses
        (`share="gradients"`, or a part) all have to call this together.

        Args:
            gathers: whether these are brought together; else each has a state of its own, see `sharded_state`.
        """
        self._follow()
        self.estimates.mend()
        held = self.layout if gathers else self.solvers.division.held(self.layout)
        return {
            "options": self.options.as_dict(),
            "dropped": list(self.handled.dropped),
            **self.estimates.state(held, self.joint.whole_inverses() if gathers else self.inverses),
            "seed": self.solvers.processes.seed,
        }

    def check_state_dict(self, state_dict: Mapping[str, Any], keys: Iterable[str] = ()) -> None:
        """Check that a state fits this model and these options, with further keys; a ValueError names what does not."""
        self._follow()
        known = self.layout, list(self.handled.dropped), self.options, self.solvers.coarse.names
        state.check(state_dict, [*keys, *state.KEYS], *known)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Options that may change during training are restored as well.

        Args:
            state_dict: what `state_dict` returned, for the same model and structural options.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
        self.check_state_dict(state_dict)
        for layer in [layer for layer in self.layout.layers if layer.name in state_dict["dropped"]]:
            self.drop(layer)
        vars(self.options).update(self.options.with_saved(state_dict["options"]))
        self.iteration.discard()
        self.health.forget()
        if state_dict.get("seed") is not None:
            self.solvers.processes.seed = state_dict["seed"]
        self.estimates.load(state_dict)
        if self.inverses is None:  # what comes next will not lie where a CUDA graph reads
            self._step = None
