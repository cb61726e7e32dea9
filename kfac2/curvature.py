"""The curvature of a model: running averages of its Kronecker factors and their damped inverses, without a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac2 import state
from kfac2.averaging import averaged
from kfac2.coarse import coarse_space
from kfac2.collector import Collector
from kfac2.division import Division, check_share
from kfac2.fine import SOLVERS, Damping, ObservingSolver
from kfac2.health import Health
from kfac2.inverses import InPlace, Inverses, Solvers, inverted
from kfac2.iteration import Iteration
from kfac2.joint import Joint
from kfac2.kinds import Layer
from kfac2.layers import Found, find_layers, why_it_left
from kfac2.layout import Layout
from kfac2.likelihood import NotFiniteError, Prediction
from kfac2.mending import mended, observed
from kfac2.options import CurvatureOptions, check_damping
from kfac2.processes import WORLD, check_plain, processes_of, unwrapped
from kfac2.readings import Readings
from kfac2.shared_inverses import inverted_together, of_own
from kfac2.solve import checked_gradients, solve_in_place
from kfac2.statistics import Averages, Pass, Use, kept_share
from kfac2.step import Step
from kfac2.summary import warn_of_large_factors


class Curvature(Joint, Readings):
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
        own: ids of the parameters whose layers may be handled, if they are among those that are trained.
        collector: captures forward passes with grad enabled, until `close`.
        dropping: called before a layer is dropped, while what was found still has its names.
        moment: gives the number that labels are drawn with, where there are several processes.

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
        share: str = "auto",
        **settings: Any,
    ) -> None:
        skip = [skip] if isinstance(skip, str) else list(skip)
        self.options = CurvatureOptions.of(settings) if options is None else options
        check_share(share, self.options.inverse)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model = unwrapped(model, self.options.fisher != "empirical")
        self.params = list(model.parameters() if params is None else params)
        check_plain(self.params)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.own = {id(parameter) for parameter in self.params}
        self._is_regrouped = False
        self._find_layers = lambda is_first: find_layers(
            model, [p for p in self.params if id(p) in self.own], skip, self.options.coarse_max_groups, is_first
        )
        self.found = self._find_layers(True)
        layers = self.found.layers
        if not layers:
            raise ValueError(
                "model must have a Linear or Conv layer that K-FAC can handle (trainable weight, not skipped), "
                f"got none in {type(model).__name__}"
            )
        self.layout = Layout(layers, layers[0].weight.device)
        processes = processes_of(process_group, self.layout.device)
        self.solvers = Solvers(
            SOLVERS[self.options.inverse](),
            coarse_space(self.options.space, self.options.downsample),
            processes,
            Division(processes, share, self.layout),
        )
        warn_of_large_factors(self.layout, self.solvers.fine)
        self.health = Health(self.layout.device)
        self.averages = Averages.none(self.layout)
        self.inverses: Inverses | None = None
        self.dropped: dict[str, str] = {}
        self.dropping: Callable[[], object] = lambda: None
        is_empirical = self.options.fisher == "empirical"
        is_by_sample = self.options.space is not None or self.options.inverse == "ekfac"
        self.collector = Collector(
            layers,
            is_empirical,
            self.drop,
            self.options.batch_dim,
            self.options.check_every,
            is_by_sample,
            self.solvers.processes,
        )
        self.collector.captures.turn(True)
        self.moment: Callable[[], int] = lambda: self.averages.updates
        self.iteration = Iteration(
            lambda: self.layout,
            self.collector,
            self.solvers.coarse,
            self.options,
            self._observe if isinstance(self.solvers.fine, ObservingSolver) else None,
            self.health.warn_once,
            lambda number: self.solvers.processes.labels(self.moment(), number),
            lambda: self.looks_at_once or not self.scheduled,
        )
        self._step: Step | None = None
        self.scheduled = False
        self._solved: tuple[Averages, float, float | None, Inverses] | None = None
        if not self.solvers.processes.is_alone:
            self.solvers.processes.check_alike(self.described())
        if options is None:  # else who shares them tells it
            self._log_summary()

    @property
    def _statistics(self) -> Curvature:
        return self

    @property
    def looks_at_once(self) -> bool:
        """Whether the host looks at each number as it comes: on a CPU; and else one process might before others."""
        return self.health.at_once or not self.solvers.processes.is_alone

    @property
    def _parts(self) -> Curvature:
        return self

    def layers_and_seen(self) -> list[tuple[Layer, bool]]:
        """Return the layers, and whether each has had rows."""
        return list(zip(self.layout.layers, self.averages.seen, strict=True))

    def layers_with_statistics(self) -> list[Layer]:
        """Return the layers that have had rows."""
        return [layer for layer, seen in self.layers_and_seen() if seen]

    def has_unseen_gradient(self) -> bool:
        """Tell whether a layer that has no statistics yet has a gradient."""
        if all(self.averages.seen):
            return False
        return any(layer.weight.grad is not None for layer, seen in self.layers_and_seen() if not seen)

    def uses_new_layer(self) -> bool:
        """Tell whether a layer that has no statistics yet is used in a forward pass of this iteration.

        Several processes do not look, since another may have no such use: it waits for the next statistics.
        """
        captures = self.collector.captures
        if all(self.averages.seen) or not captures.count or not self.solvers.processes.is_alone:
            return False
        return any(captures.uses(layer) for layer, seen in self.layers_and_seen() if not seen)

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
            bad = self.take("accumulate", must_go_backward=False) or self.iteration.sums.not_finite()
            if bad is not None:
                raise NotFiniteError(bad)
            if not self.iteration.sums.A:
                raise RuntimeError("there is nothing to accumulate: got no distribution and no backward pass")
            self.commit(*self.refreshed(None))
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

    def _observe(self, passed: Pass, uses: Sequence[Use]) -> Tensor | None:
        """Let the solver that observes see all rows of a layer, in the basis that what it sees is averaged in."""
        fine = self.solvers.fine
        if not isinstance(fine, ObservingSolver) or self.inverses is None:
            return None
        self.mend()
        return fine.observe(self.layout, self.inverses.fields, passed, uses)

    def close(self) -> None:
        """Look at no forward pass any more, for good. What was found goes on to be used."""
        self.iteration.discard()
        self.collector.captures.close()

    def drop(self, layer: Layer, reason: str = "") -> None:
        """Leave a layer alone from now on; what this iteration has summed so far is discarded with it."""
        if reason:
            self.health.warn(f"{layer.title} leaves K-FAC, and takes its plain gradient: {reason}")
        self.dropping()
        old, self.layout = self.layout, self.layout.without(layer)
        coarse = self.solvers.coarse.without(old, self.averages.coarse, old.number(layer))
        self.averages = self.averages.moved(old, self.layout, coarse)
        self.dropped[layer.name] = reason or "it had left K-FAC in the state that was loaded"
        self.collector.follow(self.layout.layers)
        self.iteration.forget()
        self.iteration.drop_kept()
        self.inverses = self._step = None

    # -- inverses -------------------------------------------------------------------------------------------

    def refreshed(
        self, damping: Callable[[Averages], Damping] | None, place: InPlace | None = None
    ) -> tuple[Averages, Inverses | None]:
        """Return averages and inverses with what this iteration has collected; commit neither.

        Args:
            damping: of new inverses of these averages; None: the inverses in use go on.
            place: new inverses take the place of those in use, as nothing will come up for which the step is skipped.
        """
        averages, inverses = self.averages, self.inverses
        if self.iteration.sums.A:
            sums = self.iteration.sums
            averages = averaged(self.layout, averages, sums, self.options.stat_decay, self.options.follows_spread)
            kept = kept_share(averages.updates, self.options.stat_decay)
            averages = replace(averages, coarse=self.solvers.coarse.averaged(self.layout, averages, sums, kept))
            if inverses is not None:
                inverses = observed(self.layout, inverses, self.solvers.fine, sums, self.options.stat_decay)
        if damping is not None and averages.updates and self.layout.layers:
            inverses = self._inverted(averages, inverses, damping(averages), place)
        return averages, inverses

    def _inverted(
        self, averages: Averages, last: Inverses | None, damping: Damping, place: InPlace | None = None
    ) -> Inverses:
        options = self.options
        arguments = (averages, last, self.solvers, damping, options.coarse_damping, options.inverse_dtype)
        if self.solvers.division.is_everyones:
            new = inverted(self.layout, *arguments, place)
        else:
            new = inverted_together(self.layout, *arguments, self.health.warn_once)
        return self._mended(averages, new) if self.looks_at_once else new

    def _mended(self, averages: Averages, inverses: Inverses) -> Inverses:
        return mended(self.layout, averages, inverses, self.solvers, self.health.warn_once)

    def mend(self) -> None:
        """Look at the inverses in use, and mend those that failed."""
        if self.inverses is not None:
            self.inverses = self._mended(self.averages, self.inverses)

    def commit(self, averages: Averages, inverses: Inverses | None) -> None:
        """Go on with these; a CUDA graph finds the inverses where it has read the last ones."""
        self.averages = averages
        if inverses is not None and inverses is not self.inverses:
            pinned = self.health.is_captured and self.inverses is not None
            self.inverses = self.inverses.holding(inverses) if pinned else inverses  # type: ignore[union-attr]

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
        named = {self._names[id(p)]: p for p in self.params if id(p) in self._names}
        solutions = checked_gradients(gradients, named)
        if not self.layout.layers:
            return solutions
        settings = (damping, self.options.coarse_damping)
        if self._solved is None or self._solved[0] is not self.averages or self._solved[1:3] != settings:
            inverses = self._inverted(self.averages, self.inverses, Damping(damping))
            inverses = self._mended(self.averages, inverses)
            if not self.scheduled:
                self.commit(self.averages, inverses)
            self._solved = (self.averages, *settings, inverses)
        step = self.prepared()
        own = [solutions.get(self._names.get(id(p), "")) for p in step.parameters]
        arguments = self._solved[3], self.solvers, self.averages.in_coarse, self.options.coarse_weight
        if (bad := solve_in_place(step, own, *arguments, self.options.step_precision)) is not None:
            raise ValueError(f"gradients must be finite, got a NaN or an infinity in {self.source(bad)}")
        return solutions

    def prepared(self) -> Step:
        """Return the step for the layers as they are, made anew where they have moved."""
        self._follow()
        if self._step is None:
            own = {id(parameter) for layer in self.layout.layers for parameter in (layer.weight, layer.bias)}
            self._step = Step(self.layout, [parameter for parameter in self.params if id(parameter) not in own])
        return self._step

    def _follow(self) -> None:
        """Lay everything out anew where layers are others now, or elsewhere."""
        if self._is_regrouped or self.found.has_changed():
            self.dropping()
            self._is_regrouped = False
            self.found = self._found_anew()
            layers = [layer for layer in self.found.layers if layer.name not in self.dropped]
            self.collector.follow(layers)
            self._lay_out(layers)
        else:
            self._move()

    def _move(self) -> None:
        """Lay everything out anew where the layers have changed their device or dtype."""
        if not self.layout.fits():
            self.dropping()
            self._lay_out(self.layout.layers)

    def _lay_out(self, layers: Sequence[Layer]) -> None:
        old = self.layout
        self.layout = Layout(layers, layers[0].weight.device if layers else old.device)
        is_same = self.layout.layers == old.layers
        coarse = tuple(tensor.to(self.layout.device) for tensor in self.averages.coarse) if is_same else ()
        self.averages = self.averages.moved(old, self.layout, coarse)
        if self.inverses is not None:
            held = self.solvers.division.held(old), self.solvers.division.held(self.layout)
            self.inverses = self.inverses.moved(*held, self.solvers.fine) if is_same else None
        self._step = None
        if not is_same:  # what was summed is of other layers
            self.iteration.forget()
            self.iteration.drop_kept()
        if old.device != self.layout.device:
            self.health.move(self.layout.device)

    def _found_anew(self) -> Found:
        """Find the layers again; one whose parameters are the same is the same."""
        found = self._find_layers(False)
        known = {(layer.name, id(layer.bias)): layer for layer in self.found.layers if layer.is_current()}
        still = {key for layer in found.layers for key in (layer.name, id(layer.weight))}  # it may have another name
        for layer in self.layout.layers:
            if not still & {layer.name, id(layer.weight)}:
                self.health.warn(f"{layer.title} leaves K-FAC{why_it_left(layer, found)}")
        return found._replace(layers=[known.get((layer.name, id(layer.bias)), layer) for layer in found.layers])

    def train(self, params: Iterable[nn.Parameter]) -> None:
        """Go on with these parameters, since others joined or left the optimizer: a layer leaves with its weight."""
        self.dropping()  # what was found has the numbers of now
        self.params, self._step, self._is_regrouped = list(params), None, True

    def source(self, number: int) -> str:
        """Name what was not finite, by the number of a parameter of the step; what is behind them all is the result."""
        parameters = (self._step or self.prepared()).parameters
        if number >= len(parameters):
            return "the preconditioned gradients"
        return f"the gradient of {self._names.get(id(parameters[number]), 'a parameter outside the model')}"

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that statistics and inverses go on from, loadable with `torch.load(weights_only=True)`.

        Factors, sums and inverses keep their own dtype. On CUDA, grouped convolutions are the exception to bit
        for bit: torch adds their blocks up in no fixed order. Labels are drawn from torch's global generator: to
        resume bit for bit, save and restore its state too. Several processes draw theirs by a seed that is in the
        state, and have the same state; it may be loaded by another number of them. With `share="gradients"` all have to
        call this together, since each has the inverses of its own layers only.
        """
        self._follow()
        self.mend()
        in_coarse = zip(self.layers, self.averages.in_coarse, strict=True)
        return {
            "options": self.options.as_dict(),
            "layers": {name: {"in_coarse": inside} for name, inside in in_coarse},
            "dropped": list(self.dropped),
            "statistics": state.from_averages(self.layout, self.averages, self.solvers),
            "inverses": state.from_inverses(self.layout, self._whole_inverses()),
            "seed": self.solvers.processes.seed,
        }

    def check_state_dict(self, state_dict: Mapping[str, Any], keys: Iterable[str] = ()) -> None:
        """Check that a state fits this model and these options, with further keys; a ValueError names what does not."""
        self._follow()
        names = self.solvers.coarse.names
        state.check(state_dict, [*keys, *state.KEYS], self.layout, list(self.dropped), self.options, names)

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
        inverses = state.to_inverses(state_dict["inverses"], self.layout, self.solvers)
        if inverses is not None and self.solvers.division.share == "gradients":
            inverses = of_own(inverses, self.layout, self.solvers)
        self.commit(state.to_averages(state_dict, self.layout, self.solvers), inverses)
        if inverses is None:  # what comes next will not lie where a CUDA graph reads
            self.inverses = self._step = None
