"""The optimizer: two-level K-FAC, then SGD with weight decay and momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from kfac2.curvature import Curvature
from kfac2.options import NUMBER, Options, check_option
from kfac2.preconditioner import Preconditioner
from kfac2.readings import Readings


class KFAC(Readings, Optimizer):
    """Two-level K-FAC (Tselepidis, Kohler, Orvieto, 2020) with an SGD step.

    For layer i with gradient matrix ∇_i (bias in the last column) and Kronecker factors A_i, G_i:

        v_i = (G_i + √λ/π_i I)⁻¹ ∇_i (A_i + π_i √λ I)⁻¹ + ω c_i 1 1ᵀ,
        c   = (F_coarse + λ_c I)⁻¹ y,    y_i = the sum of all elements of ∇_i,

    scaled by ν = min(1, √(κ / Σ_i η_i² |v_i · ∇_i|)). Then weight decay is added, and momentum takes its step.
    Parameters that K-FAC does not handle take a plain SGD step.

    ```python
    opt = kfac2.KFAC(model, lr=1e-2, momentum=0.9, weight_decay=1e-3, damping=1e-3, kl_clip=1e-2)
    for x, y in loader:
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))  # does nothing except every cov_every steps
        F.cross_entropy(out, y).backward()
        opt.step()
    ```

    The mean of -log_prob of the distribution must be the training loss up to a constant: the damping λ is
    relative to the Fisher of that loss (see `accumulate_fisher`).

    Args:
        model: the model; handled are `nn.Linear`, `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d` whose weight
            requires grad at construction. Why another is left to SGD is logged to `kfac2`.
        lr: η, the learning rate; default 1e-2.
        params: parameters or groups as in `torch.optim` (lr, momentum, weight_decay, nesterov for each); by
            default all of `model` in one group.
        momentum: μ; default 0.9.
        weight_decay: added to the preconditioned gradient; default 0.
        nesterov: Nesterov's momentum; default False.
        damping: λ > 0, in units of the Fisher of the mean loss; default 1e-3.
        kl_clip: κ > 0, bounds the change of the predictions of one step; None switches it off. Default 1e-2.
        levels: 2, or 1 for plain K-FAC.
        inverse: `'cholesky'` for factored Tikhonov damping (eq. 8, 9), `'eigh'` for the exact damped inverse
            of A ⊗ G + λI, `'ekfac'` for EKFAC (George et al. 2018): the same eigenbasis, with the diagonal that the
            Fisher has in it, estimated anew at each statistics update.
        fisher: `'mc'` for the true Fisher, labels drawn from the model (call `accumulate_fisher`);
            `'empirical'` for the gradients of the ordinary backward passes (no call needed), whose losses must
            add up to the mean over their cases; not with a loss that is scaled (GradScaler), since its scale
            would count, nor with other gradients taken through the layers in the same iteration.
        stat_decay: bound of ε in the running averages; default 0.95.
        cov_every: iterations between statistics; default 10.
        inv_every: iterations between inverses; default 100.
        downsample: `'nearest'` or `'area'`, how maps of different grids meet.
        coarse_weight: ω, the weight of the coarse step; default 1 (the paper).
        coarse_damping: λ_c > 0; by default λ (the paper).
        coarse_max_groups: a convolution with more groups than this gives the coarse space one map, the sum
            over its groups, in place of one for each; an approximation that counts products across groups as
            well. Default 32.
        inverse_dtype: `torch.float64` inverts float32 factors in float64 and rounds the result; by default each
            factor is inverted in its own dtype.
        cases: M for the empirical Fisher, the number of terms that the mean loss averages over; by default
            the batch size.
        skip: full names of modules, or regular expressions that match them in full, left to SGD.

    Attributes:
        options: the K-FAC options; `opt.options.damping = ...` sets one during training.
        preconditioner: the schedule, whose gradients it steps along.
        curvature: the statistics and inverses.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a hyper-parameter is out of its range, `skip` matches nothing, or the model has no
            layer to handle.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,  # η in the paper
        *,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        momentum: float = 0.9,  # μ
        weight_decay: float = 0.0,
        nesterov: bool = False,
        damping: float = 1e-3,  # λ
        kl_clip: float | None = 1e-2,  # κ
        levels: int = 2,
        inverse: str = "cholesky",
        fisher: str = "mc",
        stat_decay: float = 0.95,  # ε is at most this
        cov_every: int = 10,
        inv_every: int = 100,
        downsample: str = "nearest",
        coarse_weight: float = 1.0,  # ω
        coarse_damping: float | None = None,  # λ_c
        coarse_max_groups: int = 32,
        inverse_dtype: torch.dtype | None = None,
        cases: int | None = None,  # M
        skip: Iterable[str] = (),
    ) -> None:
        arguments = dict(locals())  # the options go on under their own names
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(model.parameters() if params is None else params, defaults)
        self.preconditioner = Preconditioner(
            model,
            params=[parameter for group in self.param_groups for parameter in group["params"]],
            skip=skip,
            **{name: arguments[name] for name in Options.__dataclass_fields__},
        )
        self.options, self.curvature = self.preconditioner.options, self.preconditioner.curvature

    @property
    def _statistics(self) -> Curvature:
        return self.curvature

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim`; its layers, if new, are left to SGD.

        Args:
            param_group: `params`, and what differs from the defaults.

        Raises:
            TypeError: if a value has the wrong type.
            ValueError: if a value is out of its range.
        """
        settings = {**self.defaults, **param_group}
        for name in ("lr", "momentum", "weight_decay"):
            value = settings[name].item() if isinstance(settings[name], Tensor) else settings[name]
            check_option(name, value, NUMBER, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        if not isinstance(settings["nesterov"], bool):
            raise TypeError(f"nesterov must be True or False, got {settings['nesterov']!r}")
        if settings["nesterov"] and settings["momentum"] == 0:
            raise ValueError("nesterov must be False without momentum, got nesterov=True with momentum=0")
        super().add_param_group(param_group)
        if hasattr(self, "preconditioner"):
            self.preconditioner.watch(param_group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Precondition the gradients in place and take an SGD step.

        Where a NaN or an infinity came up, nothing but the iteration count moves, and a warning names the
        layer.

        Args:
            closure: reevaluates the model (calling `accumulate_fisher`) and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: if statistics are missing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = {id(parameter): group["lr"] for group in self.param_groups for parameter in group["params"]}
        layers = self.curvature.layout.layers
        if self.preconditioner.precondition({layer.name: rates[id(layer.weight)] for layer in layers}):
            for group in self.param_groups:
                self._sgd(group)
        return loss

    def _sgd(self, group: dict[str, Any]) -> None:
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in params]
        can = [_can_be_fused(p, p.grad, state.get("momentum_buffer")) for p, state in zip(params, states, strict=True)]
        if all(can):
            self._sgd_of(params, states, group, True)
            return
        for fused in (True, False):
            some = [i for i, takes in enumerate(can) if takes == fused]
            found = self.preconditioner.found
            if some and (fused or found is None or not found.item()):
                self._sgd_of([params[i] for i in some], [states[i] for i in some], group, fused)

    def _sgd_of(self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], fused: bool) -> None:
        momentum = group["momentum"]
        if fused and momentum != 0:  # the fused step would leave new buffers undefined where it is skipped
            for parameter, state in zip(params, states, strict=True):
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state.get("momentum_buffer") for state in states]
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=not fused,
            fused=fused,
            found_inf=self.preconditioner.found if fused else None,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"] if fused else float(group["lr"]),
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )
        if not fused and momentum != 0:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled whole: the hooks belong to the model's own modules."""
        raise TypeError(
            "a KFAC is copied by state_dict() and load_state_dict() of a new one, built from the copied model; "
            "got copy.deepcopy or pickle of the optimizer itself"
        )

    def accumulate_fisher(self, distribution: Distribution) -> None:
        """See `Preconditioner.accumulate_fisher`."""
        self.preconditioner.accumulate_fisher(distribution)

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

    def state_dict(self) -> dict[str, Any]:
        """Return `torch.optim`'s state dict with K-FAC's state beside it, under `'kfac'`."""
        return {**super().state_dict(), "kfac": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; see `Preconditioner.load_state_dict`.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
        if "kfac" not in state_dict:
            raise ValueError(f"state_dict must be one of kfac2.KFAC, got one with the keys {sorted(state_dict)}")
        self.preconditioner.check_state_dict(state_dict["kfac"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        self.preconditioner.load_state_dict(state_dict["kfac"])


_FULL = (torch.float32, torch.float64)


def _can_be_fused(parameter: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Tell whether torch's fused SGD takes a parameter: one kernel for all, which a flag on the device can skip.

    It walks the memory of all three side by side, so that they must lie alike, without gaps. On a CPU it leaves
    out most elements of 16-bit parameters (torch 2.12 and 2.13).
    """
    stride, dtype = parameter.stride(), parameter.dtype
    alike = not grad.is_sparse and grad.dtype is dtype and grad.stride() == stride
    alike = alike and (buffer is None or (buffer.dtype is dtype and buffer.stride() == stride))
    if alike and dtype in _FULL and parameter.is_contiguous():
        return True  # nearly always
    full = dtype in _FULL
    if not full and not (parameter.is_cuda and parameter.dtype in (torch.float16, torch.bfloat16)):
        return False
    if not (parameter.is_contiguous() or _is_channels_last(parameter)):
        return False
    return all(
        other.dtype == parameter.dtype and other.device == parameter.device and _lie_alike(parameter, other)
        for other in (grad, buffer)
        if other is not None
    )


def _is_channels_last(tensor: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.dim() in formats and tensor.is_contiguous(memory_format=formats[tensor.dim()])


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    if b.is_sparse:
        return False
    strides = a.stride(), b.stride()
    return strides[0] == strides[1] or all(
        s == t
        for size, s, t in zip(a.shape, *strides, strict=True)
        if size > 1  # others say nothing
    )
