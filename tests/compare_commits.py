"""Do two commits train alike? `python tests/compare_commits.py A B` compares parameters after 50 steps, bit for bit.

Both are built in folders of their own, against the torch of this interpreter, and train the models of A's
tests/models.py with both inverses and both levels on the CPU, by the paper's plain method. MKL is told to give the same bits wherever matrices lie
in memory (MKL_CBWR), so that what is compared is the arithmetic.
"""

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEPS = 50


def train(out):
    """In a process of one commit: train everything, and save the parameters."""
    import models  # of the folder that PYTHONPATH names first

    from kfac2 import KFAC

    torch.set_num_threads(1)
    plain = {"burn_in": 0, "relative_damping": False, "kl_bound": None, "max_change": None, "rest": "sgd"}
    plain = {name: value for name, value in plain.items() if name in inspect.signature(KFAC).parameters}
    ends = {}
    for name in models.NAMES:
        for inverse in ("cholesky", "eigh"):
            for levels in (1, 2):
                torch.manual_seed(0)
                task = models.task(name)
                opt = KFAC(
                    task.model, lr=1e-2, momentum=0.9, weight_decay=1e-3, damping=1e-2, kl_clip=1e-2, levels=levels,
                    inverse=inverse, cov_every=5, inv_every=10, **plain,
                )  # fmt: skip
                for step in range(STEPS):
                    torch.manual_seed(step)
                    opt.zero_grad()
                    prediction = task.model(task.x)
                    opt.accumulate_fisher(task.distribution(prediction))
                    task.loss(prediction).backward()
                    opt.step()
                ends[name, inverse, levels] = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    torch.save(ends, out)


def built(commit, folder):
    """Build a commit into a folder; return the path to import it from."""
    tree, site = folder / "tree", folder / "site"
    subprocess.run(["git", "clone", "-q", ".", tree], check=True)
    subprocess.run(["git", "checkout", "-q", commit], cwd=tree, check=True)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, tree], check=True)
    return site


def main():
    """Build, train and compare."""
    first, second = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        ends = []
        folders = [Path(scratch, name) for name in ("first", "second")]
        sites = [built(commit, folder) for commit, folder in zip((first, second), folders, strict=True)]
        for site, folder in zip(sites, folders, strict=True):
            paths = os.pathsep.join(map(str, (site, folders[0] / "tree" / "tests")))
            command = [sys.executable, str(Path(__file__).resolve()), "--train", str(folder / "ends.pt")]
            environment = {**os.environ, "PYTHONPATH": paths, "MKL_CBWR": "COMPATIBLE"}
            subprocess.run(command, cwd=scratch, env=environment, check=True)
            ends.append(torch.load(folder / "ends.pt"))
    same = 0
    for key, before in ends[0].items():
        same += torch.equal(before, ends[1][key])
        if not torch.equal(before, ends[1][key]):
            print(*key, f"relative difference {((before - ends[1][key]).norm() / before.norm()).item():.1e}")
    print(f"{same} of {len(ends[0])} bit for bit after {STEPS} steps, {first} against {second}")


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
        train(sys.argv[2])
    else:
        main()
