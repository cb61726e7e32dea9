"""The optimizer: K-FAC, then SGD with momentum; AdamW for what K-FAC does not handle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac2.checkpoint import in_groups_too, is_for_its_state, out_of_groups
from kfac2.curvature import Curvature
from kfac2.descent import Rate
from kfac2.groups import as_groups, check_group, handled_by, settings_of
from kfac2.last_step import LastStep
from kfac2.likelihood import Prediction
from kfac2.options import OptimizerOptions, check_option
from kfac2.own_passes import Predict
from kfac2.preconditioner import Preconditioner
from kfac2.processes import WORLD
from kfac2.readings import Readings
from kfac2.whole_step import WholeStep


class KFAC(Readings, Optimizer):
    """K-FAC (Martens & Grosse 2015) with SGD steps; with `levels=2` two-level K-FAC (Tselepidis et al. 2020).

    For layer i with gradient matrix ∇_i (bias in the last column) and Kronecker factors A_i, G_i:

        v_i = (G_i + √λ/π_i I)⁻¹ ∇_i (A_i + π_i √λ I)⁻¹ + ω c_i 1 1ᵀ,
        c   = (F_coarse + λ_c I)⁻¹ y,    y_i = the sum of all elements of ∇_i,

    (c = 0 with one level), scaled by ν = min(1, √(κ / Σ_i η_i² |v_i · ∇_i|)), and each layer's held to a share of its
    weights, |v_i| ≤ ρ |W_i|. Then weight decay is added, and momentum takes its step d, shortened where the divergence
    that it would bring, measured with the Fisher of the rows at hand, is above K: η² dᵀFd ≤ K. Parameters that K-FAC
    does not handle are trained by AdamW, at a rate of their own.

    With `coarse="directions"` layer i moves by d_i ← α_i v_i + β_i d_i in place of momentum, W_i ← W_i - η d_i. The
    coefficients minimise the quadratic model of the loss, all layers coupled through the Fisher of the rows at hand
    (`kfac2.coarse.directions`), held to η² dᵀFd ≤ ℓ² K/5 and η|d_i| ≤ 0.3 |W_i|, with ℓ from 0.1 to 10 that follows
    how much of a step the next batches confirm (`kfac2.signal_share`); blocks are then damped by c = 0.01 at
    most. `accumulate_fisher` is wanted in each iteration, as long as the next batches confirm such steps. The first is
    one level's, and so are all where they do not, as with small noisy batches; the space is then only looked at, more
    and more rarely. It costs least with a function that makes a forward pass of some samples,
    `opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=len(x))`.

    ```python
    opt = kfac2.KFAC(model)
    for x, y in loader:
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))  # does nothing except every cov_every steps
        F.cross_entropy(out, y).backward()
        opt.step()
    ```

    The mean of -log_prob of the distribution must be the training loss up to a constant: the damping λ is
    relative to the Fisher of that loss (see `accumulate_fisher`).

    The learning rate is a share of the step that these bounds allow: a schedule of η shortens it. The paper's method is
    `burn_in=0, relative_damping=False, kl_bound=None, max_change=None, rest="sgd", levels=2` with its η, μ, λ, κ.

    Args:
        model: the model; handled are `nn.Linear`, `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d` whose weight
            requires grad at construction. Why another is left to `rest`: see `summary`.
        lr: η, the learning rate; default 1.
        params: parameters or groups as in `torch.optim` (lr, momentum, weight_decay, nesterov for each; rest_lr, betas
            and eps for its parameters that K-FAC does not handle); by default all of `model` in one group. Each is
            split in two where both kinds are there: `group["method"]` is `'kfac'` or `'adamw'`.
        momentum: μ; default 0.5.
        weight_decay: added to the preconditioned gradient; decoupled in AdamW. Default 0.
        nesterov: default False.
        damping: c > 0: λ of a block is c times the mean of its own eigenvalues, (tr A/d_in)(tr G/d_out). By default
            `"auto"`: √c is the median relative standard error of the factors, or 0.14 where that is less, taken with
            new inverses (`kfac2.spread`).
        relative_damping: with False the number `damping` is λ itself, in units of the mean loss's Fisher. Default True.
        kl_clip: κ > 0, bounds the change of the predictions of one step as the blocks see it; None: off. Default 0.1.
        kl_bound: K > 0, bounds η² dᵀFd, measured over all layers with a quarter of the samples of each statistics
            update; None: off. Default 0.5.
        max_change: ρ > 0, bounds |v_i| by ρ |W_i|, or 1e-3 an element where that is more; None: off. Default 0.02.
        rest: `'adamw'` for the parameters that K-FAC does not handle, or `'sgd'`, which steps along their plain
            gradients at the rate of their group.
        rest_lr, betas, eps: the rate of AdamW, and its others; default 1e-3, (0.9, 0.999) and 1e-8.
        levels: 1 for plain K-FAC, the default; 2 for two-level K-FAC with the paper's space.
        coarse: the space of the second level: `'ones'` is the paper's, `'directions'` that of v_i and the last update
            d_i of all layers (see above), experimental; by default what `levels` says.
        inverse: `'cholesky'` for factored Tikhonov damping (eq. 8, 9), `'eigh'` for the exact damped inverse
            of A ⊗ G + λI, `'ekfac'` for EKFAC (George et al. 2018): the same eigenbasis, with the diagonal that the
            Fisher has in it, estimated anew at each statistics update. Where eigenvalues are equal (0, of more columns
            than rows) that diagonal is of whatever basis was found: runs on other devices then part ways.
        fisher: `'mc'` for the true Fisher, labels drawn from the model (call `accumulate_fisher`); `'exact'` for all
            directions of a Categorical, Bernoulli or Normal, a backward pass for each number that a sample predicts;
            `'empirical'` for the gradients of the ordinary backward passes (no call needed), whose losses must
            add up to the mean over their cases.
        stat_decay: bound of ε in the running averages; default 0.95.
        cov_every: iterations between statistics; default 5.
        inv_every: iterations between inverses; default 10. A new number for the damping takes effect at once.
        burn_in: for so many statistics updates from the first on, inverses are renewed with each. Default 10.
            `damping`, `kl_clip`, `cov_every` and `inv_every` may also be callables that take the iteration.
        downsample: `'nearest'` or `'area'`, how maps of different grids meet.
        coarse_weight: ω, the weight of the coarse step; default 1 (the paper).
        coarse_damping: λ_c > 0; by default λ (the paper), or with relative damping c tr A_i tr G_i of each layer. With
            `coarse="directions"` τ, from coefficients that are free to a pair that all layers share (infinity);
            default 3.
        coarse_samples: how many samples the space of directions is measured with; default 32 for each layer.
        coarse_max_groups: of a convolution with more groups than this the coarse space has one map, their sum, in place
            of one for each; an approximation that counts products across groups as well. Default 32.
        inverse_dtype: `torch.float64` inverts float32 factors in float64 and rounds the result; by default each
            factor is inverted in its own dtype.
        cases: M for the empirical Fisher, the number of terms that the mean loss averages over, or `'samples'`, or
            `'rows'`, all rows of the last layer (a token loss); needed where these two differ.
        samples: how often labels are drawn for a statistics update with `fisher="mc"`; default 1.
        batch_dim: the axis of samples of inputs with positions: 0, or 1 for time-major models.
        process_group: `"world"`, all processes of torch.distributed where there are several, train one model, each on
            its own part of every batch: their statistics add up. Or a `ProcessGroup`, or None: each by itself.
            Gradients must have been averaged over the processes when `step` is called, as DistributedDataParallel
            does; then all have the same parameters, to the last bit, as one process on the whole batch would.
        share: who inverts. `"all"`: each process everything; `"inverses"`: the owner of a layer, who sends the result;
            `"gradients"`: it keeps that, and sends what it makes of each gradient: least memory. A number h/W, h
            dividing W: of W processes h hold each inverse. `"ekfac"` takes the first two. Default `"auto"`: the one of
            them that takes less time, measured once; name it where two runs must be alike to the last bit.
        check_every: passes of statistics from one self-check to the next, beside those of a set of uses that is new:
            the rows of a weight must rebuild its gradient, or it leaves K-FAC. Default 100; 0: never.
        step_precision: of float32 products of the step on a CUDA device, `'ieee'` or `'tf32'`; default: torch's own.
        skip: full names of modules, or regular expressions that match them in full, left to `rest`.

    Attributes:
        options: the K-FAC options; `opt.options.damping = ...` sets one during training.
        preconditioner: the schedule, whose gradients it steps along.
        curvature: the statistics and inverses.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a hyper-parameter is out of its range, `skip` matches nothing, the model has no layer to handle,
            its parameters are DTensors, or processes that train together were not built alike.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,  # η in the paper
        *,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        momentum: float = 0.5,  # μ
        weight_decay: float = 0.0,
        nesterov: bool = False,
        damping: float | str | Callable[[int], float] = "auto",  # c, or λ
        relative_damping: bool = True,
        kl_clip: float | Callable[[int], float | None] | None = 0.1,  # κ
        kl_bound: float | None = 0.5,  # K
        max_change: float | None = 0.02,  # ρ
        rest: str = "adamw",
        rest_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        levels: int = 1,
        coarse: str | None = None,
        inverse: str = "cholesky",
        fisher: str = "mc",
        stat_decay: float = 0.95,  # ε is at most this
        cov_every: int | Callable[[int], int] = 5,
        inv_every: int | Callable[[int], int] = 10,
        burn_in: int = 10,
        downsample: str = "nearest",
        coarse_weight: float = 1.0,  # ω
        coarse_damping: float | None = None,  # λ_c
        coarse_max_groups: int = 32,
        coarse_samples: int | None = None,
        inverse_dtype: torch.dtype | None = None,
        cases: int | str | None = None,  # M
        samples: int = 1,
        batch_dim: int = 0,
        check_every: int = 100,
        step_precision: str | None = None,
        process_group: object = WORLD,
        share: str | float = "auto",
        skip: Iterable[str] = (),
    ) -> None:
        arguments = dict(locals())  # the options go on under their own names
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_option("rest", rest, str, lambda v: v in ("adamw", "sgd"), "'adamw' or 'sgd'")
        groups = as_groups(model.parameters() if params is None else params)
        self._rest = rest
        self.options = OptimizerOptions.of({field.name: arguments[field.name] for field in fields(OptimizerOptions)})
        self.preconditioner = Preconditioner(
            model,
            params=[parameter for group in groups for parameter in group["params"]],
            skip=skip,
            options=self.options,
            process_group=process_group,
            share=share,
        )
        self.curvature = self.preconditioner.curvature
        self._whole_step = WholeStep(self.preconditioner, self.options, rest)
        self._handled = handled_by(self.curvature.handled.found)
        if rest == "adamw":  # what its groups hold is none of K-FAC's, whatever becomes of it
            self.curvature.handled.own = self._handled
        self._known = {id(parameter) for parameter in self.curvature.handled.params}  # in the groups when last seen
        names = ("lr", "momentum", "weight_decay", "nesterov", "rest_lr", "betas", "eps")
        super().__init__(groups, {**{name: arguments[name] for name in names}, "method": "kfac"})
        self.preconditioner.meetings.agree_on(lambda: settings_of(self.param_groups))
        self._log_summary()

    @property
    def _statistics(self) -> Curvature:
        return self.curvature

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim`; its layers, if new, are left to `rest`.

        Args:
            param_group: `params`, and what differs from the defaults.

        Raises:
            TypeError: if a value has the wrong type.
            ValueError: if a value is out of its range.
        """
        settings = {**self.defaults, **param_group}
        check_group(settings)
        if self.options.coarse == "directions" and settings["nesterov"]:
            raise ValueError("nesterov must be False with coarse='directions', which has no momentum, got True")
        (group,) = as_groups([param_group])
        handled = [p for p in group["params"] if id(p) in self._handled or self._rest == "sgd"]
        others = [p for p in group["params"] if not (id(p) in self._handled or self._rest == "sgd")]
        if handled or not others:
            first = float(group.get("lr", self.defaults["lr"]))  # a schedule's factor is lr over this
            super().add_param_group({**group, "params": handled, "method": "kfac", "first_lr": first})
        if others:
            lr = group.get("rest_lr", self.defaults["rest_lr"])
            super().add_param_group({**group, "params": others, "method": "adamw", "lr": lr})
        if any(id(parameter) not in self._known for parameter in group["params"]):
            self._follow_groups()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Precondition the gradients in place and take a step.

        Where a NaN or an infinity came up, nothing but the iteration count moves, and a warning names the
        layer.

        Args:
            closure: reevaluates the model (calling `accumulate_fisher`) and returns the loss. One that is not finite,
                or above its running mean m by |m| and by 8 times its spread, halves K-FAC's steps from this one on;
                each later one takes back a factor of 1.5. `last_step.rise_factor` shows it.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: if statistics are missing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._whole_step.follow(loss)
        elif is_for_its_state(self.param_groups, self.state):
            self._whole_step.make_state(self.param_groups, self.state, set(self._handled))
            return None
        rates = self._follow_groups()
        self._whole_step.begin()
        if self.preconditioner.precondition(lambda layer: rates[id(layer.weight)]):
            self._whole_step.take(self.param_groups, self.state)
        self.curvature.iteration.drop_kept()
        return loss

    def _follow_groups(self) -> dict[int, Rate]:
        """Return η by id of the parameter; where some joined or left, go on with those there are."""
        rates = {id(parameter): group["lr"] for group in self.param_groups for parameter in group["params"]}
        if rates.keys() != self._known:
            self._known = {*rates}
            self.curvature.train(parameter for group in self.param_groups for parameter in group["params"])
            for gone in [parameter for parameter in self.state if id(parameter) not in rates]:
                del self.state[gone]  # torch.optim cannot save it
        return rates

    @property
    def last_step(self) -> LastStep:
        """What the last step was like: ν, the measured divergence, changes by layer; read when asked for."""
        return self._whole_step.last()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled whole: the hooks belong to the model's own modules."""
        raise TypeError(
            "a KFAC is copied by state_dict() and load_state_dict() of a new one, built from the copied model; "
            "got copy.deepcopy or pickle of the optimizer itself"
        )

    def accumulate_fisher(
        self, distribution: Prediction | Predict, mask: Tensor | None = None, samples: int | None = None
    ) -> None:
        """See `Preconditioner.accumulate_fisher`."""
        if self.needs_fisher:
            self._follow_groups()
            self._whole_step.begin()
        self.preconditioner.accumulate_fisher(distribution, mask, samples)

    def close(self) -> None:
        """See `Preconditioner.close`."""
        self.preconditioner.close()

    @property
    def needs_fisher(self) -> bool:
        """See `Preconditioner.needs_fisher`."""
        return self.preconditioner.needs_fisher

    @property
    def ordinary(self) -> bool:
        """See `Preconditioner.ordinary`."""
        return self.preconditioner.ordinary

    def replayed(self) -> None:
        """See `Preconditioner.replayed`."""
        self.preconditioner.replayed()

    def check(self) -> int:
        """See `Preconditioner.check`."""
        return self.preconditioner.check()

    def state_dict(self, gathers: bool = True) -> dict[str, Any]:
        """Return `torch.optim`'s state dict with K-FAC's beside it, under `'kfac'`; see `Curvature.state_dict`."""
        self._follow_groups()
        state = self.preconditioner.state_dict(gathers)
        self._whole_step.save(state)
        return in_groups_too({**super().state_dict(), "kfac": state})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; see `Preconditioner.load_state_dict`.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
        state_dict = out_of_groups(state_dict)
        self.preconditioner.check_state_dict(state_dict["kfac"])
        first = [group.get("first_lr") for group in self.param_groups]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        for group, lr in zip(self.param_groups, first, strict=True):
            if lr is not None:
                group.setdefault("first_lr", lr)  # states of earlier versions lack it
        self.preconditioner.load_state_dict(state_dict["kfac"])
        self._whole_step.load(state_dict["kfac"])
