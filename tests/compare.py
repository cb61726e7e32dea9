"""How the tests compare numbers: the relative error of a whole output."""

import torch


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    assert x.shape == reference.shape, f"shape {tuple(x.shape)} where {tuple(reference.shape)} was expected"
    x, reference = x.detach().double(), reference.detach().double()
    norm = reference.norm()
    return ((x - reference).norm() / norm if norm > 0 else x.norm()).item()


def assert_equal(x: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-9) -> None:
    difference = error(x, reference)
    assert difference <= tolerance, f"relative error {difference:.3g}, at most {tolerance:.3g} was expected"
