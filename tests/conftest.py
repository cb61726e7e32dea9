import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a machine with a GPU may have pytest and nothing else: tests/gpu does without
    pass
else:
    # Drawn, but the same shapes in each run: a failure in CI is one that everyone sees.
    settings.register_profile(
        "kfac2", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("kfac2")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tests run side by side
