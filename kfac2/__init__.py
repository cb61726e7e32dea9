"""Two-Level K-FAC Preconditioning for Deep Learning (Tselepidis, Kohler, Orvieto, 2020), for PyTorch."""

from kfac2 import _library, ops, reference

__all__ = ["ops", "reference"]
