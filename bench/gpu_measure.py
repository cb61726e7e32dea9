"""All measurements of `make gpu-check`, one failing without the others: prints one line of JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import gpu_kernels
import gpu_steps
import torch
from gpu_kernels import Measured

import kfac2


def measurements(device: torch.device, small: bool) -> list[Callable[[], list[Measured]]]:
    """What is measured, in order.

    Args:
        device: where.
        small: tiny sizes, which say nothing but that the measurements run.
    """
    rounds, batch = (3, 4) if small else (25, 128)
    timer = gpu_kernels.Timer(device, rounds)
    steps = [
        lambda build=build: gpu_steps.measure_steps(build, device, 2 if small else 15)
        for build in gpu_steps.networks(device, small)
    ]
    return [
        lambda: gpu_kernels.measure_sums(timer, device, 2 if small else batch),
        lambda: gpu_kernels.measure_cross_layer_sums(timer, device, batch),
        lambda: gpu_kernels.measure_covariances(timer, device, batch),
        lambda: gpu_kernels.measure_statistics(timer, device, batch, 1 if small else 18),
        lambda: gpu_steps.measure_inverses(timer, device, small),
        lambda: gpu_steps.measure_eigendecompositions(timer, device, small),
        *steps,
    ]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: only see that it runs")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    lines: list[Measured] = []
    for measurement in measurements(device, arguments.small):
        try:
            lines += measurement()
        except Exception as error:  # one that fails must not lose the others
            lines.append(Measured("a measurement failed", 0.0, None, "", f"{type(error).__name__}: {error}"[:300]))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "build": kfac2.build_info()}
    print("RESULT" + json.dumps({**record, "measured": [asdict(line) for line in lines]}))


if __name__ == "__main__":
    main()
