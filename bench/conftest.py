"""Options of `pytest bench`, the layer sets, and how a case is timed."""

import argparse
from functools import lru_cache

import pytest
import torch
from arguments import device_name, positive, some_of
from kernels import SETS
from layer_sets import LayerSet
from measure import Clock
from networks import NETWORKS

OPTIONS = {
    "--device": (device_name, "cpu", "where to measure (default: cpu)"),
    "--threads": (positive, "1", "CPU threads of torch (default: 1)"),
    "--batch": (positive, "128", "samples of the layer sets (default: 128)"),
    "--sets": (some_of(list(NETWORKS)), ",".join(SETS), "layer sets, with commas"),
}


def pytest_addoption(parser):
    for name, (_, default, words) in OPTIONS.items():
        parser.getgroup("kfac2").addoption(name, default=default, help=words)


def pytest_configure(config):
    config.measured = {}
    for name, (read, _, _) in OPTIONS.items():
        try:
            config.measured[name] = read(config.getoption(name))
        except argparse.ArgumentTypeError as error:
            raise pytest.UsageError(f"argument {name}: {error}") from error


def pytest_generate_tests(metafunc):
    if "layer_set" in metafunc.fixturenames:
        metafunc.parametrize("layer_set", metafunc.config.measured["--sets"], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _threads(device, pytestconfig):
    before = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.measured["--threads"])
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.measured["--device"]


@pytest.fixture(scope="session")
def batch(pytestconfig):
    return pytestconfig.measured["--batch"]


@pytest.fixture(scope="session")
def layer_set(request, device, batch):
    """One set at a time: pytest runs all tests of a set before it makes the next."""
    return LayerSet(request.param, batch, device)


@lru_cache(maxsize=1)
def checked(build, *arguments):
    """Build a case and check it, once for the functions that are timed after one another."""
    case = build(*arguments)
    case.check()
    return case


@pytest.fixture
def compare(benchmark, device, pytestconfig):
    """Check, then time one function of a case; a sample's time is for the reader to scale, as its name says."""

    def run(how, build, *arguments):
        case = checked(build, *arguments)
        benchmark.group = case.title + (f" ({case.note})" if case.note else "")
        benchmark.name = how if how not in case.scale else f"{how} (times {case.scale[how]:.4g})"
        benchmark.extra_info["scale"] = case.scale.get(how, 1.0)
        clock = Clock(device, pytestconfig.measured["--threads"])
        function = case.functions[how]
        begin = clock()
        function()
        slow = clock() - begin > 0.3

        def finished():
            function()
            if device != "cpu":
                torch.cuda.synchronize()

        if slow:
            benchmark.pedantic(finished, rounds=3)
        else:
            benchmark(finished)

    return run
