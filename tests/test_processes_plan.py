"""The plan of what processes send is what they send."""

import processes
import processes_plan
import pytest
from processes_plan import Device, Link, Work, gradients, messages, plan

WORK = Work("three layers", [(1, 4, 5), (2, 3, 10), (1, 8, 9)], 4 * 5 + 2 * 3 * 10 + 8 * 9)


def test_a_plan_counts_what_is_sent():
    statistics, new = ([m.size for m in messages(WORK, "inverses", kind, 2)] for kind in ("statistics", "inverses"))
    factors = 4 * (10 + 15 + 2 * (6 + 55) + 36 + 45)
    assert statistics == [64, 8 * 17, factors, 16]
    assert new[:4] == statistics and new[4] == 16 * 3 and sum(new[5:]) == factors
    assert not messages(WORK, "all", "ordinary", 2)
    assert sum(m.size for m in messages(WORK, "gradients", "ordinary", 3)) == 4 * WORK.parameters
    assert gradients(WORK, 4) == 2 * 3 / 4 * 4 * WORK.parameters


def test_more_processes_hold_and_invert_less():
    link, device = Link("a link", 1e9, 1e-6), Device(1e9)
    alike, *others = (plan(WORK, "all", count, link, device) for count in (2, 4))
    assert all(p.inverting == alike.inverting for p in others)
    two, three = (plan(WORK, "gradients", count, link, device) for count in (2, 3))
    assert alike.memory > two.memory >= three.memory and alike.inverting > two.inverting >= three.inverting


@pytest.mark.slow
def test_what_is_counted_is_within_a_twentieth_of_the_plan(tmp_path):
    processes.main(["--out", str(tmp_path), "--counted", "transformer", "--processes", "2"])
    text = (tmp_path / "processes.md").read_text()
    assert float(text.split("difference from the plan is ")[1].split("%")[0]) < 5
    assert (tmp_path / "processes.png").stat().st_size > 10_000
    assert processes_plan.SHARES == ("all", "inverses", "gradients")
