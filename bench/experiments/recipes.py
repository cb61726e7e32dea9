"""The settings of the paper's experiments."""

from __future__ import annotations

from dataclasses import replace

from experiments.settings import Settings

WINDOWS = ((0, None), (0, 0), (0, 100), (500, None))  # of the coarse step: always, never, at first, later


def deep_linear(optimizer: str, inverse: str = "eigh") -> Settings:
    """The deep linear network of Appendix B.1; its rate for each optimizer alike."""
    settings = Settings("deep-linear", optimizer, seed=0, epochs=50, batch=512, lr=1e-3, layers=64, width=10)
    if not settings.is_kfac:
        return settings
    return replace(settings, damping=1e-2, kl_clip=1e-3, cov_every=10, inv_every=100, inverse=inverse)


def resnet(optimizer: str, inverse: str = "cholesky") -> Settings:
    """ResNet-110, on Fashion-MNIST until another set is asked for."""
    settings = Settings(
        "resnet",
        optimizer,
        seed=0,
        epochs=100,
        batch=64,
        lr=1e-3 if optimizer == "adam" else 1e-2,
        layers=110,
        width=16,
        milestones=(40, 80),
        data="fashion-mnist",
        augment=True,
        shortcut="conv",
    )
    if not settings.is_kfac:
        return settings
    return replace(settings, batch=128, damping=1e-3, kl_clip=1e-2, cov_every=200, inv_every=2000, inverse=inverse)


def coarse(window: tuple[int, int | None]) -> Settings:
    """The deep linear network with two levels, the coarse step taken in a window of steps and measured in all."""
    first, last = window
    return replace(deep_linear("kfac2"), follow=True, coarse_from=first, coarse_until=last)
