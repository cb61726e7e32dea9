"""Several processes train as one on the whole batch: real processes on loopback, one thread each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from together import assert_trains_as_one, size, spawn

from kfac2.division import owners_of

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
    "owners invert": ({"share": "inverses"}, {}),
    "owners invert, two levels of ekfac": ({"share": "inverses", "inverse": "ekfac", "levels": 2}, {"wrap": True}),
    "owners invert, eigh": ({"share": "inverses", "inverse": "eigh", "cov_every": 4, "inv_every": 6, "burn_in": 1}, {}),
    "owners keep": ({"share": "gradients"}, {}),
    "owners keep, two levels of eigh": ({"share": "gradients", "inverse": "eigh", "levels": 2}, {"wrap": True}),
    "owners keep, directions": ({"share": "gradients", "coarse": "directions"}, {}),
    "the paper's": (
        {"burn_in": 0, "relative_damping": False, "damping": 1e-2, "kl_bound": None, "max_change": None, "levels": 2,
         "rest": "sgd", "lr": 0.05},
        {},
    ),
}  # fmt: skip
UNEVEN = {2: (9, 3), 4: (5, 1, 4, 2)}
EMPTY = {2: (12, 0), 4: (6, 0, 0, 6)}


def _many(steps):
    for name, (settings, how) in CASES.items():
        try:
            assert_trains_as_one(settings, how, steps)
            if name in ("two levels", "empirical", "directions"):
                for sizes in (UNEVEN, EMPTY):
                    assert_trains_as_one(settings, how, steps // 2, sizes=sizes[size()])
        except Exception as error:
            error.add_note(f"in the case {name!r}") if hasattr(error, "add_note") else None
            raise


def _few(steps):
    for name in (
        "as it comes",
        "two levels of ekfac",
        "directions with DDP",
        "empirical with DDP",
        "owners invert, eigh",
    ):
        assert_trains_as_one(*CASES[name], steps)
    for model in ("conv2d", "grouped", "transposed2d", "tokens", "sequence"):
        for share in ("all", "inverses", "gradients"):
            assert_trains_as_one({"levels": 2, "share": share}, {}, 5, name=model)


@given(st.lists(st.integers(0, 10**6), max_size=20), st.integers(1, 6))
def test_work_is_shared_out_evenly(work, processes):
    owners = owners_of(work, processes)
    loads = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(processes)]
    assert max(loads) <= sum(work) / processes + (1 - 1 / processes) * max(work, default=0) + 1e-6  # Graham 1969


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "work", "steps"), [(2, _many, 40), (4, _few, 20)])
def test_processes_train_as_one_on_the_whole_batch(processes, work, steps):
    spawn(processes, work, steps)
