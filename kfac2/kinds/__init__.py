"""The kinds of layers that K-FAC handles, one file for each."""

from kfac2.kinds.base import Call, Layer, Part, Rows
from kfac2.kinds.conv import Conv
from kfac2.kinds.conv_transpose import ConvTranspose
from kfac2.kinds.linear import Linear

KINDS: tuple[type[Layer], ...] = (Linear, Conv, ConvTranspose)

__all__ = ["KINDS", "Call", "Layer", "Part", "Rows"]
