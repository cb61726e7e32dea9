"""Several processes train as one on the whole batch: real processes on loopback, one thread each."""

import pytest
from together import Batches, assert_alike, assert_replicas_are_equal, size, spawn, train

CASES = {
    "as it comes": ({}, {}),
    "DDP": ({}, {"wrap": True}),
    "eigh": ({"inverse": "eigh"}, {}),
    "ekfac": ({"inverse": "ekfac"}, {}),
    "two levels": ({"levels": 2}, {}),
    "two levels of ekfac": ({"levels": 2, "inverse": "ekfac"}, {}),
    "directions": ({"coarse": "directions"}, {}),
    "directions with DDP": ({"coarse": "directions", "cov_every": 3}, {"wrap": True}),
    "empirical": ({"fisher": "empirical"}, {}),
    "empirical with DDP": ({"fisher": "empirical", "levels": 2}, {"wrap": True}),
    "exact": ({"fisher": "exact"}, {}),
    "accumulation": ({"levels": 2}, {"micro": 2}),
    "accumulation with DDP": ({}, {"micro": 3, "wrap": True}),
    "other intervals": ({"cov_every": 3, "inv_every": 7, "momentum": 0.9, "burn_in": 2}, {}),
    "the paper's": (
        {"burn_in": 0, "relative_damping": False, "damping": 1e-2, "kl_bound": None, "max_change": None, "levels": 2,
         "rest": "sgd", "lr": 0.05},
        {},
    ),
}  # fmt: skip
UNEVEN = {2: (9, 3), 4: (5, 1, 4, 2)}
EMPTY = {2: (12, 0), 4: (6, 0, 0, 6)}


def _compare(settings, how, steps, **batches):
    one, _ = train(Batches(**batches), settings, steps, alone=True, **how)
    together, opt = train(Batches(**batches), settings, steps, alone=False, **how)
    assert_replicas_are_equal(together)
    assert_alike(together, one)
    return opt


def _many(steps):
    for name, (settings, how) in CASES.items():
        try:
            _compare(settings, how, steps)
            if name in ("two levels", "empirical", "directions"):
                for sizes in (UNEVEN, EMPTY):
                    _compare(settings, how, steps // 2, sizes=sizes[size()])
        except Exception as error:
            error.add_note(f"in the case {name!r}") if hasattr(error, "add_note") else None
            raise


def _few(steps):
    for name in ("as it comes", "two levels of ekfac", "directions with DDP", "empirical with DDP"):
        _compare(*CASES[name], steps)
    for model in ("conv2d", "grouped", "transposed2d", "tokens", "sequence"):
        _compare({"levels": 2}, {}, 5, name=model)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "work", "steps"), [(2, _many, 40), (4, _few, 20)])
def test_processes_train_as_one_on_the_whole_batch(processes, work, steps):
    spawn(processes, work, steps)
