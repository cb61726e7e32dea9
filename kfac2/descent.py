"""Steps of SGD with momentum and of AdamW, through torch's fused kernels where they fit, and of directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

State = Mapping[Tensor, dict[str, Any]]
Rate = float | Tensor

_FULL = (torch.float32, torch.float64)


def times(lr: Rate, *factors: Rate) -> Rate:
    """Multiply a rate; a factor of 1 leaves the number that it is."""
    for factor in factors:
        lr = lr if isinstance(factor, float) and factor == 1 else lr * factor
    return lr


def sgd_step(params: Sequence[Tensor], state: State, group: Mapping[str, Any], lr: Rate, found: Tensor | None) -> None:
    """Take a step of SGD with weight decay and momentum.

    Args:
        params: parameters, all with a gradient.
        state: the optimizer's, whose `momentum_buffer` is used.
        group: `momentum`, `weight_decay` and `nesterov`.
        lr: η.
        found: on the device, 1 where the step is to be skipped; None where it is not.
    """

    def take(some: list[Tensor], fused: bool) -> None:
        states = [state[parameter] for parameter in some]
        momentum = group["momentum"]
        if fused and momentum != 0:  # the fused step would leave new buffers undefined where it is skipped
            for parameter, own in zip(some, states, strict=True):
                if own.get("momentum_buffer") is None:
                    own["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [own.get("momentum_buffer") for own in states]
        grads = _gradients(some)
        sgd(
            some,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=not fused,
            fused=fused,
            found_inf=found if fused else None,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=lr if fused else float(lr),  # type: ignore[arg-type]
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )
        if not fused and momentum != 0:
            for own, buffer in zip(states, buffers, strict=True):
                own["momentum_buffer"] = buffer

    _by_fusion(params, state, ("momentum_buffer",), found, take)


def next_steps(params: Sequence[Tensor], state: State, group: Mapping[str, Any]) -> list[Tensor]:
    """Return η times what `sgd_step` would move each parameter along; changes nothing.

    Args:
        params: parameters, all with a gradient.
        state: the optimizer's.
        group: `lr`, `momentum`, `weight_decay` and `nesterov`.
    """
    if not params:
        return []
    steps, momentum, lr = _gradients(params), group["momentum"], group["lr"]
    if group["weight_decay"]:
        steps = list(torch._foreach_add(steps, list(params), alpha=group["weight_decay"]))
    buffers = [state[parameter].get("momentum_buffer") if momentum else None for parameter in params]
    with_buffer = [i for i, buffer in enumerate(buffers) if buffer is not None]
    if with_buffer:
        gradients = [steps[i] for i in with_buffer]
        moved = torch._foreach_add(gradients, [b for b in buffers if b is not None], alpha=momentum)
        if group["nesterov"]:
            moved = torch._foreach_add(gradients, moved, alpha=momentum)
        for i, step in zip(with_buffer, moved, strict=True):
            steps[i] = step
    return [step * lr for step in steps] if isinstance(lr, Tensor) else list(torch._foreach_mul(steps, lr))


def adamw_step(
    params: Sequence[Tensor], state: State, group: Mapping[str, Any], lr: Rate, found: Tensor | None
) -> None:
    """Take a step of AdamW; a sparse gradient is taken as a dense one.

    Args:
        params: parameters, all with a gradient.
        state: the optimizer's: `step`, `exp_avg` and `exp_avg_sq`.
        group: `betas`, `eps` and `weight_decay`.
        lr: its rate.
        found: on the device, 1 where the step is to be skipped; None where it is not.
    """
    for parameter in params:
        own = state[parameter]
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        if "step" not in own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def take(some: list[Tensor], fused: bool) -> None:
        states = [state[parameter] for parameter in some]
        adamw(
            some,
            _gradients(some),
            [own["exp_avg"] for own in states],
            [own["exp_avg_sq"] for own in states],
            [],
            [own["step"] for own in states],
            foreach=not fused,
            fused=fused,
            capturable=not fused and some[0].is_cuda,
            found_inf=found.reshape(()) if fused and found is not None else None,  # steps count in its shape
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr if fused or some[0].is_cuda else float(lr),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    _by_fusion(params, state, ("exp_avg", "exp_avg_sq"), found, take)


def directed_step(
    params: Sequence[Tensor],
    state: State,
    lr: float | Tensor,
    weight_decay: float,
    coefficients: Sequence[tuple[Rate, Rate]],
    found: Tensor | None,
) -> None:
    """Take D ← αv + βD, W ← W - η(D + weight decay W), with v in `.grad` and D the momentum buffer.

    Args:
        params: parameters, all with a gradient.
        state: the optimizer's.
        lr: η.
        weight_decay: of the group.
        coefficients: α and β of each parameter; on a CUDA device tensors there.
        found: on the device, 1 where the step is to be skipped; None where it is not.
    """
    for parameter in params:
        if state[parameter].get("momentum_buffer") is None:
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    buffers = [state[parameter]["momentum_buffer"] for parameter in params]
    gradients = [parameter.grad.to(parameter.dtype) for parameter in params if parameter.grad is not None]
    alphas, betas = zip(*coefficients, strict=True)
    if found is not None:  # all gradients are 0 then
        betas = tuple(torch.where(found.reshape(()) > 0, 1.0, beta) for beta in betas)
        lr = lr * (found.reshape(()) == 0)
    torch._foreach_mul_(buffers, betas)
    torch._foreach_add_(buffers, torch._foreach_mul(gradients, alphas))
    moves = torch._foreach_add(buffers, list(params), alpha=weight_decay) if weight_decay else buffers
    if isinstance(lr, Tensor):
        torch._foreach_sub_(list(params), [move * lr.to(move.device) for move in moves])
    else:
        torch._foreach_add_(list(params), list(moves), alpha=-lr)


def _by_fusion(
    params: Sequence[Tensor],
    state: State,
    names: Sequence[str],
    found: Tensor | None,
    take: Callable[[list[Tensor], bool], None],
) -> None:
    """Step those that the fused kernel takes, then the others, unless the step is to be skipped."""
    can = [_can_be_fused(p, [p.grad, *map(state[p].get, names)]) for p in params]
    for fused in (True, False):
        some = [parameter for parameter, takes in zip(params, can, strict=True) if takes == fused]
        if some and (fused or found is None or not found.item()):
            take(some, fused)


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in params if parameter.grad is not None]


def _can_be_fused(parameter: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Tell whether torch's fused kernel takes a parameter: one launch for all, which a flag on the device can skip.

    It walks the memory of parameter, gradient and state side by side, so that they must lie alike, without gaps. On a
    CPU it leaves out most elements of 16-bit parameters (torch 2.12 and 2.13).
    """
    stride, dtype = parameter.stride(), parameter.dtype
    if dtype in _FULL and parameter.is_contiguous():
        for other in others:
            if other is not None and (other.is_sparse or other.dtype is not dtype or other.stride() != stride):
                break
        else:
            return True  # nearly always
    if dtype not in _FULL and not (parameter.is_cuda and dtype in (torch.float16, torch.bfloat16)):
        return False
    if not (parameter.is_contiguous() or _is_channels_last(parameter)):
        return False
    return all(
        other.dtype == dtype and other.device == parameter.device and _lie_alike(parameter, other)
        for other in others
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
