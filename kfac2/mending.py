"""What becomes of inverses in use: those that failed are mended, and what a solver observes is averaged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kfac2.fine import FineSolver, ObservingSolver
from kfac2.inverses import Inverses, Solvers, all_rounded
from kfac2.layout import Layout
from kfac2.statistics import Averages, Sums, kept_share

Warn = Callable[[str, str], None]


def observed(layout: Layout, inverses: Inverses, fine: FineSolver, sums: Sums, decay: float) -> Inverses:
    """Return the inverses with what a solver that observes has seen in this iteration averaged in.

    Args:
        layout: of the layers.
        inverses: in use; they stay as they are.
        fine: the solver.
        sums: of the iteration.
        decay: bound of ε.
    """
    if not isinstance(fine, ObservingSolver) or not sums.squares:
        return inverses
    t = inverses.observations + 1
    changed, known = fine.averaged(layout, inverses.fields, inverses.observed, sums, kept_share(t, decay))
    fields = {**inverses.fields, **all_rounded(changed, layout)}
    has = inverses.usable.tolist()  # without an inverse there was no basis to observe it in
    known = tuple(bool(was and there) for was, there in zip(known, has, strict=True))
    derived = fine.derived_of(layout, fields, inverses.damping)
    return replace(inverses, fields=fields, derived=derived, observations=t, observed=known)


def mended(layout: Layout, averages: Averages, inverses: Inverses, solvers: Solvers, warn: Warn) -> Inverses:
    """Look at what failed, and invert it in float64, in place, with the damping of its update.

    Args:
        layout: of the layers.
        averages: that were inverted.
        inverses: of that update.
        solvers: fine and coarse.
        warn: called with a key and a message for each layer.
    """
    if inverses.failed is None:
        return inverses
    *layers, coarse = inverses.failed.tolist()
    numbers = [i for i, bad in enumerate(layers) if bad]
    known = list(inverses.observed)
    for i in numbers:
        name = layout.layers[i].name
        entry = solvers.fine.mend(*averages.of_layer(layout, i), inverses.damping)
        if entry is None:
            warn(f"not finite {name}", f"a factor of {name} is not finite; its last inverse is kept")
            continue
        for field_name, value in entry.items():
            layout.view(inverses.fields[field_name], i).copy_(value.to(layout.layers[i].factor_dtype))
        inverses.usable[i] = 1
        known[i] = False  # its fields are new, all of them
        warn(
            f"indefinite {name}",
            f"a factor of {name} is not positive definite (or its eigendecomposition did not converge); "
            "it was decomposed in float64, its eigenvalues floored at 0",
        )
    if coarse:
        warn("not finite coarse", "the coarse Fisher is not finite; its last inverse is kept")
    if numbers:
        for name, stacks in solvers.fine.derive(inverses.fields, inverses.damping).items():
            for kept, value in zip(inverses.derived[name], stacks, strict=True):
                kept.copy_(value)
    return replace(inverses, failed=None, observed=tuple(known))
