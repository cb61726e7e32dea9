"""The inverses of the Kronecker blocks, one file for each."""

from kfac2.fine.base import Damping, Fields, FineSolver, ObservingSolver
from kfac2.fine.ekfac import EKFAC
from kfac2.fine.exact import Exact
from kfac2.fine.tikhonov import Tikhonov

SOLVERS: dict[str, type[FineSolver]] = {"cholesky": Tikhonov, "eigh": Exact, "ekfac": EKFAC}
"""The solver of each value of the option `inverse`."""

__all__ = ["EKFAC", "SOLVERS", "Damping", "Exact", "Fields", "FineSolver", "ObservingSolver", "Tikhonov"]
