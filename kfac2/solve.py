"""A solve outside of training: a step without schedule, rates and clip, on gradients of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac2.inverses import Inverses, Solvers
from kfac2.step import Step


def checked_gradients(gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy gradients; check that names, shapes and, of sparse ones, numbers are what a solve takes.

    Args:
        gradients: by name.
        parameters: by name.

    Raises:
        KeyError: if a name is none of a parameter.
        ValueError: if a shape is another than its parameter's, or a sparse gradient is not finite.
    """
    for name, gradient in gradients.items():
        if name not in parameters:
            raise KeyError(f"gradients must have names of the model's parameters, got {name!r}")
        if gradient.shape != parameters[name].shape:
            wanted = tuple(parameters[name].shape)
            raise ValueError(f"the gradient of {name} must have shape {wanted}, got {tuple(gradient.shape)}")
        if gradient.is_sparse and not gradient.coalesce().values().isfinite().all():
            raise ValueError(f"gradients must be finite, got a NaN or an infinity in the gradient of {name}")
    return {name: gradient.detach().clone() for name, gradient in gradients.items()}


def solve_in_place(
    step: Step,
    gradients: Sequence[Tensor | None],
    inverses: Inverses,
    solvers: Solvers,
    in_coarse: Sequence[bool],
    coarse_weight: float,
    precision: str | None,
) -> int | None:
    """Write the solutions over the gradients of the step's parameters; both levels, no clip; see `Step.write`.

    Returns:
        None; or, where something is not finite, the number of the first parameter whose gradient is not.
    """
    gathered = step.gather(gradients)
    skipped = torch.zeros(2, dtype=torch.int64, device=inverses.usable.device)
    clip, rates = None, [1.0] * len(in_coarse)
    result = step.write(gathered, inverses, solvers, in_coarse, coarse_weight, clip, rates, skipped, None, precision)
    step.let_go()
    return int(skipped[1]) if result.found.item() else None
