"""Whole steps of kfac-jax against plain SGD in JAX, in a process of its own: ratios within one framework.

The networks have the shapes of those in `networks.py`; their norms use the batch's statistics and keep no running
averages. Prints one line of JSON: for SGD and each kind of kfac-jax's step the seconds of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from arguments import above_zero, positive

# One CPU thread, as for torch; read when jax is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

KINDS = {"b": 100, "a": 10, "c": 1}  # iterations of each kind, with statistics each 10 and inverses each 100
Params = dict[str, Any]


def _normal(random: Any, *shape: int) -> Any:
    fan_in = 1
    for extent in shape[:-1]:
        fan_in *= extent
    return random.standard_normal(shape).astype("float32") * (2 / fan_in) ** 0.5


def _norm(x: Any, scale: Any, offset: Any) -> Any:
    import jax.numpy as jnp

    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5) * scale + offset


class Net:
    """A network written with functions; parameters are made in the order in which they are used.

    Args:
        depth: hidden layers of the deep linear network, or blocks of each stage of a ResNet.
        random: a numpy generator.
    """

    def __init__(self, depth: int, random: Any) -> None:
        import numpy

        self._depth, self._random, self._numpy = depth, random, numpy
        self.params: Params = {}

    def _parameter(self, params: Params, name: str, *shape: int) -> Any:
        if name not in params:
            params[name] = _normal(self._random, *shape)
        return params[name]

    def _norm(self, params: Params, name: str, x: Any) -> Any:
        for part, fill in (("scale", 1.0), ("offset", 0.0)):
            if f"{name}_{part}" not in params:
                params[f"{name}_{part}"] = self._numpy.full(x.shape[-1], fill, "float32")
        return _norm(x, params[f"{name}_scale"], params[f"{name}_offset"])

    def deep_linear(self, params: Params, x: Any) -> Any:
        """Return logits (N, 1)."""
        for i in range(self._depth):
            x = self._norm(params, f"norm{i}", x @ self._parameter(params, f"w{i}", x.shape[-1], x.shape[-1]))
        return x @ self._parameter(params, "head", x.shape[-1], 1)

    def _conv(self, params: Params, name: str, x: Any, kernel: int, out: int, stride: int) -> Any:
        from jax import lax

        weight = self._parameter(params, name, kernel, kernel, x.shape[-1], out)
        pad = [(kernel // 2, kernel // 2)] * 2
        x = lax.conv_general_dilated(x, weight, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return self._norm(params, f"{name}_norm", x)

    def resnet(self, params: Params, x: Any) -> Any:
        """Return logits (N, 10)."""
        import jax

        x = jax.nn.relu(self._conv(params, "first", x, 3, 16, 1))
        for stage in range(3):
            for block in range(self._depth):
                name, out, stride = f"{stage}_{block}", 16 * 2**stage, 2 if stage and not block else 1
                body = jax.nn.relu(self._conv(params, f"{name}_one", x, 3, out, stride))
                body = self._conv(params, f"{name}_two", body, 3, out, 1)
                short = x if stride == 1 else self._conv(params, f"{name}_short", x, 1, out, stride)
                x = jax.nn.relu(body + short)
        head, bias = self._parameter(params, "head", x.shape[-1], 10), self._parameter(params, "bias", 10)
        return x.mean((1, 2)) @ head + bias


def network(name: str, batch: int) -> tuple[Params, tuple[Any, Any], Callable[[Params, Any], Any]]:
    """Return parameters, a batch, and the loss with its tag for kfac-jax."""
    import jax
    import jax.numpy as jnp
    import kfac_jax
    import numpy

    random = numpy.random.default_rng(0)
    linear = name == "deep-linear"
    net = Net(64 if linear else (int(name.partition("-")[2]) - 2) // 6, random)
    forward = net.deep_linear if linear else net.resnet
    shape = (batch, 10) if linear else (batch, 32, 32, 3)
    x, y = random.standard_normal(shape).astype("float32"), random.integers(0, 2 if linear else 10, batch)
    params: Params = {}
    forward(params, x)

    def loss(params: Params, data: tuple[Any, Any]) -> Any:
        x, y = data
        logits = forward(params, x)
        if linear:
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, y[:, None])
            return jnp.mean(jax.nn.softplus(logits[:, 0]) - y * logits[:, 0])
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    return jax.tree.map(jnp.asarray, params), (jnp.asarray(x), jnp.asarray(y)), loss


def sgd_step(loss: Callable[[Params, Any], Any], params: Params, data: Any) -> Callable[[], None]:
    """Return a step of SGD with momentum and weight decay, compiled."""
    import jax

    @jax.jit
    def update(params: Params, velocity: Params, data: Any) -> tuple[Params, Params]:
        grads = jax.grad(loss)(params, data)
        velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-3 * p, velocity, grads, params)
        return jax.tree.map(lambda p, v: p - 1e-4 * v, params, velocity), velocity

    held = [params, jax.tree.map(lambda p: 0 * p, params)]

    def step() -> None:
        held[:] = jax.block_until_ready(update(*held, data))

    return step


def kfac_steps(loss: Callable[[Params, Any], Any], params: Params, data: Any) -> dict[str, Callable[[], None]]:
    """Return for each kind a step of kfac-jax."""
    import jax
    import jax.numpy as jnp
    import kfac_jax

    optimizer: Any = kfac_jax.Optimizer(
        jax.value_and_grad(loss), l2_reg=1e-3, estimation_mode="fisher_gradients", num_burnin_steps=0,
        curvature_update_period=10, inverse_update_period=100,
    )  # fmt: skip
    params = jax.tree.map(jnp.array, params)
    held: list[Any] = [params, optimizer.init(params, jax.random.key(0), data)]
    settings = {"learning_rate": jnp.asarray(1e-4), "momentum": jnp.asarray(0.9), "damping": jnp.asarray(1e-2)}

    def step(iteration: int) -> None:
        params, state = held
        state.step_counter = jnp.asarray(iteration)
        key = jax.random.key(iteration)
        params, state, _ = optimizer.step(params, state, key, batch=data, global_step_int=iteration, **settings)
        held[:] = jax.block_until_ready([params, state])

    return {kind: partial(step, iteration) for kind, iteration in KINDS.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", required=True, choices=["deep-linear", "resnet-8", "resnet-20", "resnet-56"])
    parser.add_argument("--batch", type=positive, required=True)
    parser.add_argument("--rounds", type=positive, required=True, help="at most")
    parser.add_argument("--seconds", type=above_zero, default=300.0, help="then no further round starts (default: 300)")
    args = parser.parse_args()
    try:
        import kfac_jax  # noqa: F401
    except ImportError:
        sys.exit("kfac-jax is not installed")
    params, data, loss = network(args.net, args.batch)
    steps = {"sgd": sgd_step(loss, params, data), **kfac_steps(loss, params, data)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # compiles
    start = time.monotonic()
    while len(times["sgd"]) < args.rounds and (not times["sgd"] or time.monotonic() - start < args.seconds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
