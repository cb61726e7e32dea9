"""Options of `pytest bench`, the layer sets, and how a case is timed."""

from functools import lru_cache

import pytest
import torch
from arguments import device_name, positive
from kernels import SETS
from layer_sets import LayerSet
from networks import NETWORKS
from timing import Clock, configure


def pytest_addoption(parser):
    group = parser.getgroup("kfac2")
    group.addoption("--device", type=device_name, default="cpu", help="where to measure (default: cpu)")
    group.addoption("--threads", type=positive, default=1, help="CPU threads of torch (default: 1)")
    group.addoption("--batch", type=positive, default=128, help="samples of the layer sets (default: 128)")
    group.addoption("--sets", nargs="+", choices=NETWORKS, default=SETS, metavar="NAME", help="layer sets")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its timer
def pytest_configure(config):
    config.clock = Clock(config.getoption("--device"), config.getoption("--threads"))
    config.option.benchmark_timer = f"{config.clock.now.__module__}.{config.clock.now.__name__}"


def pytest_generate_tests(metafunc):
    if "layer_set" in metafunc.fixturenames:
        metafunc.parametrize("layer_set", metafunc.config.getoption("--sets"), indirect=True, scope="session")


@pytest.fixture(scope="session")
def layer_set(request, pytestconfig):
    """One set at a time: pytest runs all tests of a set before it makes the next."""
    return LayerSet(request.param, pytestconfig.getoption("--batch"), pytestconfig.getoption("--device"))


@lru_cache(maxsize=1)
def checked(build, *arguments):
    """Build a case and check it, once for the functions that are timed after one another."""
    case = build(*arguments)
    case.check()
    return case


@pytest.fixture
def compare(benchmark, pytestconfig):
    """Check, then time one function of a case; a sample's time is for the reader to scale, as its name says."""

    def run(how, build, *arguments):
        case = checked(build, *arguments)
        benchmark.group = case.title + (f" ({case.note})" if case.note else "")
        scale = benchmark.extra_info["scale"] = case.scale(how)
        benchmark.name = how if scale == 1 else f"{how} (times {scale:.4g})"
        (once,) = pytestconfig.clock.laps(lambda mark: [mark(), case.functions[how](), mark()])
        if once > 0.3:
            benchmark.pedantic(case.functions[how], rounds=3)
        else:
            benchmark(case.functions[how])

    before = torch.get_num_threads()
    configure(pytestconfig.getoption("--threads"))
    yield run
    torch.set_num_threads(before)
