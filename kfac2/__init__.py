"""Two-Level K-FAC Preconditioning for Deep Learning (Tselepidis, Kohler, Orvieto, 2020), for PyTorch."""

from kfac2._library import build_info  # loads the native ops before anything that uses them

from kfac2 import ops, reference  # isort: skip
from kfac2.curvature import Curvature
from kfac2.optimizer import KFAC
from kfac2.preconditioner import Preconditioner

__version__: str = build_info()["version"]
__all__ = ["KFAC", "Curvature", "Preconditioner", "build_info", "ops", "reference"]
