"""What K-FAC in several processes costs: a plan for 2 to 1,024 of them, beside bytes counted here at 2 and 4; drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import processes_memory
from output import into_place, table, write
from processes_counted import counted
from processes_plan import (
    FLOAT,
    KINDS,
    SHARES,
    Device,
    Link,
    Message,
    Work,
    gradients,
    held_by,
    messages,
    plan,
    shares_of,
    taken_part_in,
)
from roofline_nets import Net, gpt2_small, linear, resnet_50

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROCESSES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LINKS = (Link("100 Gbit/s", 12.5e9, 10e-6), Link("NVLink", 450e9, 3e-6))
DEVICE = Device(5e12)  # of a batched Cholesky inverse on a large device: a guess, nothing was measured
COUNTED = ("transformer", "resnet-20")
STYLES = {"all": ("#000000", "-"), "inverses": ("#D55E00", "--"), 0.5: ("#009E73", ":"), "gradients": ("#0072B2", "-.")}


def transformer_1b() -> Net:
    """20 blocks of width 2048, as GPT-2's: a billion numbers in their matrices."""
    width, rows = 2048, (8, 1024)
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return Net(
        "transformer, 1 billion parameters", "", 8, [linear(rows, *size) for size in sizes] * 20, [50257 * width]
    )


def work_of(net: Net) -> Work:
    """Return what the plan is made of."""
    layers = [(1, shape.d_out, shape.d_in) for shape in net.shapes]
    return Work(net.title.split(", batch")[0], layers, net.parameters)


def planned(work: Work) -> str:
    """Write the table of a network."""
    rows = []
    for processes in (2, 8, 64, 1024):
        for share in shares_of(processes):
            fast, slow = (plan(work, share, processes, link, DEVICE) for link in reversed(LINKS))
            rows.append([
                str(processes), str(share), *(f"{slow.sent[kind] / 1e6:.4g}" for kind in KINDS),
                f"{gradients(work, processes) / 1e6:.4g}", f"{slow.memory / 1e9:.3g}", f"{slow.inverting * 1e3:.3g}",
                f"{slow.mean() * 1e3:.3g}", f"{fast.mean() * 1e3:.3g}",
            ])  # fmt: skip
    header = ["processes", "share", *(f"{kind}, MB" for kind in KINDS), "DDP's gradients, MB", "memory, GB"]
    header += ["inverting, ms", *(f"mean step over {link.title}, ms" for link in LINKS)]
    return f"### {work.title}\n\n{table(header, rows)}\n"


def refused(works: Sequence[Work]) -> str:
    """Write what EKFAC would send where not all processes hold all inverses, of 8."""
    rows = []
    for work in works:
        bases = Message("broadcast", sum(map(held_by, work.layers)) * FLOAT).sent(8)
        rows.append([work.title, f"{bases / 1e6:.4g}", f"{gradients(work, 8) / 1e6:.4g}"])
    return table(["network", "bases, at each statistics update, MB", "DDP's gradients, at each step, MB"], rows)


def compared(names: Sequence[str], sizes: Sequence[int]) -> tuple[str, float]:
    """Count, and write the table beside the plan; return the largest difference, too."""
    rows, worst = [], 0.0
    for name in names:
        for processes in sizes:
            for share in shares_of(processes):
                found = counted(name, share, processes)
                work = Work(name, [tuple(layer) for layer in found["layers"]], found["parameters"])
                sent = {k: messages(work, share, k, processes) for k in KINDS}
                expected = {k: sum(m.sent(processes) for m in own) for k, own in sent.items()}
                expected["gradients"] = gradients(work, processes)
                for kind, size in expected.items():
                    off = found[kind] / size - 1 if size else 0.0
                    worst = max(worst, abs(off))
                    cells = [f"{found[kind] / 1e3:.5g}", f"{size / 1e3:.5g}", f"{off:+.1%}" if size else ""]
                    ratio = found.get(f"{kind}, time over SGD's")
                    cells.append("" if ratio is None else f"{ratio:.2f}")
                    told = "DDP's gradients" if kind == "gradients" else kind
                    count = str(taken_part_in(sent[kind], processes)) if kind in sent else ""
                    rows.append([name, str(processes), str(share), told, count, *cells])
    header = [
        "network",
        "processes",
        "share",
        "kind of step",
        "messages",
        "counted, kB",
        "planned, kB",
        "off",
        "time / SGD's",
    ]
    return table(header, rows), worst


def draw(works: Sequence[Work], path: Path) -> None:
    """Draw the mean seconds of a step that is spent on inverses and messages, and the memory, over the processes."""
    figure, axes = plt.subplots(2, len(works), figsize=(4 * len(works), 6), sharex=True, squeeze=False)
    for column, work in enumerate(works):
        for share in SHARES:
            plans = [plan(work, share, processes, LINKS[0], DEVICE) for processes in PROCESSES]
            color, line = STYLES[share]
            axes[0, column].plot(PROCESSES, [1e3 * p.mean() for p in plans], line, color=color, label=str(share))
            axes[1, column].plot(PROCESSES, [p.memory / 1e9 for p in plans], line, color=color, label=str(share))
        axes[0, column].set(title=work.title, xscale="log", yscale="log")
        axes[1, column].set(xlabel="processes", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("inverting and sending, ms a step\n(100 Gbit/s, every 5 and 10)")
    axes[1, 0].set_ylabel("factors, inverses, messages, GB")
    axes[0, 0].legend(title="share=")
    figure.tight_layout()
    with into_place(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)


TEXT = """# Several processes: a plan, and bytes counted here

Written by `python bench/processes.py`. MB that one process sends in the mean, by kind of step, beside what
DistributedDataParallel sends for the mean of gradients in each step; memory of factors, inverses and the largest
message, of the process that has most; milliseconds of the slowest process in an update of inverses, at {rate:.0e}
operations a second (a guess, measured nowhere); and of inverting and sending in the mean step, with statistics every 5
and inverses every 10, nothing hidden behind other work. Beyond 8 processes NVLink stands for a network that is as fast.
One process inverts all of a layer: where one layer is most of the work, more processes do not help. `share=0.5`: half
of the processes hold each inverse, and send what they make of gradients to the other half.

![mean time and memory](processes.png)

{tables}
## EKFAC where not all hold all inverses

is refused. Its diagonal is a mean over the rows of all processes, in the eigenbases of all layers. So each process
would need all bases at each statistics update: all at once, which is the memory that was to be saved, or one after the
other, and then keep its rows until the processes meet, since in a backward pass, where they come by layers at different
times or not at all, none may wait for another. Sending rows instead takes more, but for a batch of few rows. What each
of 8 processes would send in the mean beside all else:

{refused}
## Counted here

Bytes over the loopback device (in a network namespace of its own, where there may be one) as gloo sends them, headers
of TCP included, of batches of 16 in each process; the largest difference from the plan is {worst:.1%}. Headers are
about 1 kB for each collective and process: what has messages of a few kB only, as the deep linear network, sends up
to a quarter more than planned. Time is CPU time of a whole iteration over that of DistributedDataParallel with SGD, in
turns in one run, of two or four processes with one thread each on two cores that others used, too.

{counts}

## Memory, measured here

By `python bench/processes_memory.py`: MB of live tensors of the process that has most, of batches of 16 in each
process, with DistributedDataParallel. Factors and inverses as they are held, beside the plan; and the peaks of whole
iterations by kind of step, with the model, its gradients and activations, and the temporaries inside of torch's
functions. Each new inverse takes the place of the last one, whoever inverts it, and messages are bounded: a step with
new inverses needs hardly more than one of statistics. Where not all hold all, the others' are never there.

{memory}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of processes.md and .png")
    parser.add_argument("--counted", nargs="*", default=COUNTED, help="networks to count bytes of")
    parser.add_argument("--measured", nargs="*", default=COUNTED, help="networks to measure memory of")
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4], help="how many of them")
    options = parser.parse_args(arguments)
    works = [work_of(net) for net in (resnet_50(), gpt2_small(), transformer_1b())]
    counts, worst = compared(options.counted, options.processes)
    tables = "\n".join(map(planned, works))
    memory = processes_memory.told(options.measured, options.processes)
    parts = {"tables": tables, "refused": refused(works), "counts": counts, "worst": worst, "rate": DEVICE.rate}
    write(options.out / "processes.md", TEXT.format(**parts, memory=memory))
    draw(works, options.out / "processes.png")
    print(f"{options.out / 'processes.md'}: the largest difference from the plan is {worst:.1%}")


if __name__ == "__main__":
    main()
