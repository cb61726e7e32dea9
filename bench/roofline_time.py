"""Seconds from bytes, operations and launches: two devices, and the share of their peaks that each kernel reaches.

Where a share is found to be wrong, or a kernel gets faster, this is what changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from roofline_calls import Call, Op
from roofline_ops import ELEMENT, Count, Stage


@dataclass(frozen=True)
class Device:
    """Peaks of a device, from its data sheet: operations and bytes in a second; cycles in a second (boost)."""

    name: str
    bandwidth: float
    fp32: float = 67e12  # outside of tensor cores
    tf32: float = 494.7e12  # dense: the data sheet's 989 are with sparsity
    bf16: float = 989.4e12
    clock: float = 1.755e9  # sustained; the maximum is 1.98 GHz


DEVICES = [Device("H100 SXM", 3.35e12), Device("H200", 4.8e12)]
# What large matrix products reach: fp32 and TF32 are usual figures of cuBLAS; bf16 was measured at 0.8 for 8192³ on
# random data on both devices, and long, flat products reach less.
PRODUCT_SHARE = {"fp32": 0.75, "tf32": 0.7, "bf16": 0.65}
SOURCES = (
    "These shares, 2.5 us from one kernel to the next and 5 us of the host for a launch are usual figures; copies and "
    "bf16 products were measured. The shares of our own kernels are estimates: none has been measured."
)
LAUNCH = 2.5e-6  # seconds from the end of a kernel to the next one's first work, in a full stream (usual)
ISSUE = 5e-6  # seconds of the host for each launch of an eager call of torch (usual)

# The shares of the peaks of memory and of fp32 that a kernel reaches where it is bound by them. All are estimates from
# the compiled code but the copy, which was measured: 3.0 of 3.35 TB/s, 4.3 of 4.8.
SHARES = {
    "copy": (0.9, 0.1), "rows": (0.3, 0.1),  # a copy that brings channels last: 8 ps a number were measured
    "reduce": (0.8, 0.1), "mm": (0.9, 1.0),
    "cholesky": (0.5, 0.25), "eigh": (0.5, 0.03),  # 16 and 2 TFLOP/s, usual figures of the solver library
    "tables": (0.5, 0.1), "small": (0.3, 0.05),
    "layer_maps": (0.85, 0.1),  # 1,024 threads on a multiprocessor, four 16-byte loads each; 768 and eight: 0.7
    "covariances": (0.8, 0.6),  # its instructions: see `latency`
    "covariances, shares": (0.5, 0.1), "covariances, gather": (0.4, 0.1),  # eight loads in flight, and up to four
    "fold": (0.7, 0.1),  # four loads in flight for each thread, 1,536 threads on a multiprocessor
    "directional_derivatives": (0.8, 0.4), "shares": (0.5, 0.1),
    "cross_layer_sums": (0.5, 0.6),  # its instructions: see `latency`
    "damp": (0.5, 0.1), "eliminate": (0.5, 0.2),
    "update": (0.6, 0.5),  # a tile waits for L2 as long as it multiplies: 64 KB for 64³ multiply-adds
    "eigendecompose": (0.5, 0.2),
    # Four 16-byte loads in flight for each thread; with four of 4 bytes, 0.5 and 0.66 on an H100.
    "gather": (0.76, 0.1), "write": (0.78, 0.1), "sums": (0.76, 0.1),
}  # fmt: skip


READ_ACTIVATIONS = {"layer_maps", "covariances", "directional_derivatives"}


def seconds(stages: Iterable[Stage], device: Device, precision: str = "fp32") -> float:
    """Predict the time of stages: each takes the longest of its bytes, its operations and its chains, and its launches.

    Where the host needs longer for all launches than the device for its work, it is the host's time.
    """
    busy, launches = 0.0, 0
    for stage in stages:
        of_bandwidth, of_peak = SHARES[stage.kernel]
        peak = device.fp32 * of_peak
        if stage.kernel == "mm":
            peak = getattr(device, precision) * PRODUCT_SHARE[precision]
        moving = stage.bytes / (device.bandwidth * of_bandwidth)
        busy += max(moving, stage.flop / peak, stage.latency / device.clock) + stage.launches * LAUNCH
        launches += stage.launches
    return max(busy, launches * ISSUE)


def floor(count: Count, device: Device) -> float:
    """Return the time below which no kernel in fp32 can be: memory and arithmetic at their peaks, nothing launched."""
    return max(count.least_bytes / device.bandwidth, count.least_flop / device.fp32)


def duration(call: Call, device: Device, precision: str = "fp32", by_library: bool = False) -> float:
    """Predict a call by kfac2, or by the library, where that is another way; precision is that of the whole step."""
    element = ELEMENT[precision]
    if by_library and call.library is not None:
        return seconds(call.library(element), device, precision)
    stages, of_products = call.own_at(precision) if call.own_at else (call.own.stages, precision)
    halved = (s._replace(bytes=s.bytes * element / 4) if s.kernel in READ_ACTIVATIONS else s for s in stages)
    return seconds(halved, device, of_products)


def in_step(op: Op, device: Device, precision: str = "fp32", way: str = "kfac2") -> float:
    """Predict the calls of a step by `kfac2`, by the `library`, or by the `faster` of both."""
    if way == "faster":
        return min(in_step(op, device, precision, other) for other in ("kfac2", "library"))
    return sum(duration(call, device, precision, way == "library") for call in op.in_step)
