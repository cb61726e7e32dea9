"""What is done to images on the device: padding, normalisation, random crops and flips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data import Images

SIZE = 32  # images of 28×28 are padded to it, as the paper's network wants them
_MARGIN = 4  # of black around an image that is cropped


def padded(images: Images) -> Images:
    """Pad smaller images with black to 32×32, alike on all sides."""
    height, width = images.x.shape[2:]
    down, right = SIZE - height, SIZE - width
    return Images(F.pad(images.x, (right // 2, right - right // 2, down // 2, down - down // 2)), images.y)


@dataclass(frozen=True)
class Normalisation:
    """Turns bytes into numbers of mean 0 and variance 1 by channel; both of shape (C, 1, 1), in units of 255."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(images: Images) -> Normalisation:
        """Take mean and standard deviation of images, exactly: from counts of each byte."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.x.cpu().unbind(1)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ levels
        deviation = (shares @ levels.square() - mean.square()).clamp_min(1e-12).sqrt()
        return Normalisation(mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1))

    def to(self, device: str) -> Normalisation:
        """Copy it to a device."""
        return Normalisation(self.mean.to(device), self.deviation.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise bytes of shape (N, C, H, W)."""
        return (x.float() / 255 - self.mean) / self.deviation


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random out of itself with a margin of 4 black pixels, and flip every second one, at random.

    Args:
        x: (N, C, H, W).
        generator: on the device of `x`; the same state gives the same images.
    """
    count, channels, height, width = x.shape
    device = x.device
    top, left = torch.randint(2 * _MARGIN + 1, (2, count, 1), generator=generator, device=device)
    flip = torch.randint(2, (count, 1), generator=generator, device=device).bool()
    columns = torch.arange(width, device=device).expand(count, -1)
    columns = left + torch.where(flip, width - 1 - columns, columns)  # [N, W]
    rows = top + torch.arange(height, device=device)  # [N, H]
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    wide = F.pad(x, (_MARGIN,) * 4)
    return wide[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
