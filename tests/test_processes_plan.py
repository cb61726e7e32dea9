"""The plan of what processes send is what they send."""

import subprocess
import sys

import processes
import processes_memory
import processes_plan
import pytest
from processes_plan import Device, Link, Work, gradients, messages, plan, taken_part_in

WORK = Work("three layers", [(1, 4, 5), (2, 3, 10), (1, 8, 9)], 4 * 5 + 2 * 3 * 10 + 8 * 9)


def test_a_plan_counts_what_is_sent():
    statistics, new = ([m.size for m in messages(WORK, "inverses", kind, 2)] for kind in ("statistics", "inverses"))
    factors = 4 * (10 + 15 + 2 * (6 + 55) + 36 + 45)
    assert statistics == [64, 8 * 17, factors, 16]
    assert new[:4] == statistics and new[4] == 16 * 3 and sum(new[5:]) == factors
    assert not messages(WORK, "all", "ordinary", 2)
    assert sum(m.size for m in messages(WORK, "gradients", "ordinary", 3)) == 4 * WORK.parameters
    assert gradients(WORK, 4) == 2 * 3 / 4 * 4 * WORK.parameters


def test_a_plan_of_groups_lies_between_the_others():
    """Of four processes two hold each inverse: one receives it, and both send what they make of a gradient to one."""
    ordinary, new = (messages(WORK, 0.5, kind, 4) for kind in ("ordinary", "inverses"))
    assert {m.members for m in ordinary} == {2} and sum(m.size for m in ordinary) == 2 * 4 * WORK.parameters
    assert sum(m.sent(4) for m in ordinary) == 4 * WORK.parameters / 2  # half of the processes receive each matrix
    factors = 4 * (10 + 15 + 2 * (6 + 55) + 36 + 45)
    along_columns = new[5 : len(new) - len(ordinary)]
    assert sum(m.sent(4) for m in along_columns) == factors / 4  # one of four receives each inverse
    assert taken_part_in(ordinary, 4) == 2
    link, device = Link("a link", 1e9, 1e-6), Device(1e9)
    most, some, least = (plan(WORK, share, 4, link, device) for share in ("inverses", 0.5, "gradients"))
    assert most.memory > some.memory >= least.memory
    assert most.sent["ordinary"] == 0 < some.sent["ordinary"] < least.sent["ordinary"]
    assert plan(WORK, 1 / 4, 4, link, device) == least and plan(WORK, 1.0, 4, link, device) == most


def test_more_processes_hold_and_invert_less():
    link, device = Link("a link", 1e9, 1e-6), Device(1e9)
    alike, *others = (plan(WORK, "all", count, link, device) for count in (2, 4))
    assert all(p.inverting == alike.inverting for p in others)
    two, three = (plan(WORK, "gradients", count, link, device) for count in (2, 3))
    assert alike.memory > two.memory >= three.memory and alike.inverting > two.inverting >= three.inverting


@pytest.mark.slow
def test_what_is_counted_is_within_a_twentieth_of_the_plan(tmp_path):
    processes.main(["--out", str(tmp_path), "--counted", "transformer", "--measured", "--processes", "2"])
    text = (tmp_path / "processes.md").read_text()
    assert float(text.split("difference from the plan is ")[1].split("%")[0]) < 5
    assert (tmp_path / "processes.png").stat().st_size > 10_000
    assert processes_plan.SHARES == ("all", "inverses", 0.5, "gradients")


@pytest.mark.slow
def test_what_is_held_is_what_is_planned():
    command = [sys.executable, processes_memory.__file__, "--nets", "deep-linear", "--processes", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:]]
    assert [row[2] for row in rows] == ["all", "inverses", "gradients"]
    for _, _, _, held, planned, ordinary, statistics, _ in rows:
        assert held == planned and 0 < float(held) < float(ordinary) < float(statistics)
    assert float(rows[2][3]) < float(rows[0][3])
