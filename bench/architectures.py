"""Real architectures: each weight's rows rebuild its gradient, or it is reported; there is no third case.

What is compared is made here: the rows that go into A and G are formed, and Σ g āᵀ of them is held against autograd's
gradient of the same drawn log-likelihood. A package that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architecture_nets import PACKAGES, Example
from output import table, write
from torch import Tensor, nn
from torch.distributions import Categorical

import kfac2
from kfac2.kinds import KINDS, Layer, Rows
from kfac2.reached import batch_size, with_reached
from kfac2.statistics import Use

HERE = Path(__file__).parent / "results"
STEPS, RIGHT = 3, 1e-3  # the largest relative error that float32 explains
Record = dict[str, Any]


def formed(rows: Rows) -> list[Tensor]:
    """Form the rows of each block, (rows, d), by slices of the padded map."""
    x, window = rows
    rank = len(window.kernel_size)
    x = F.pad(x, [zeros for pair in reversed(window.padding) for zeros in pair]).double()
    grid = window.grid(x.shape[2:]) if not any(map(any, window.padding)) else None
    if grid is None:
        spans = zip(x.shape[2:], window.kernel_size, window.stride, window.dilation, strict=True)
        grid = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in spans]
    slices = []
    for offset in (
        torch.cartesian_prod(*map(torch.arange, window.kernel_size)).reshape(-1, rank).tolist() if rank else [[]]
    ):
        part = x
        for axis, o in enumerate(offset):
            start, step = o * window.dilation[axis], window.stride[axis]
            part = part.narrow(2 + axis, start, (grid[axis] - 1) * step + 1)
            part = part[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
        slices.append(part.flatten(2) if rank else part.unsqueeze(2))
    patches = torch.stack(slices, 2)  # (N, C, offsets, T)
    blocks = [part.flatten(1, 2).transpose(1, 2).flatten(0, 1) for part in patches.chunk(window.groups, 1)]
    return [F.pad(block, (0, window.bias), value=1.0) for block in blocks]


def rebuilt(layer: Layer, uses: Sequence[Use]) -> Tensor:
    """Return Σ g āᵀ of the rows that count in the factors, (blocks, d_out, d_in)."""
    total = torch.zeros(layer.matrix_shape, dtype=torch.float64)
    for use in uses:
        inputs, grads = use.counted_inputs(), use.counted_grads()
        total += torch.stack([g.T @ a for a, g in zip(formed(inputs), formed(grads), strict=True)])
    return total


def errors(opt: kfac2.KFAC, log_prob: Tensor) -> dict[str, float]:
    """Return by layer by how much its rows are off its gradient; NaN where it has none, and no rows."""
    collector, layers = opt.curvature.collector, opt.curvature.layout.layers
    found = collector.captures.reached_from(log_prob.grad_fn)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    collector.captures.is_paused = True  # checkpointing runs parts of the model again
    score = log_prob.sum()
    gradients = torch.autograd.grad(
        score,
        [*(edge for _, edge in found), *parameters],  # type: ignore[arg-type]
        retain_graph=True,
        allow_unused=True,
    )
    collector.captures.is_paused = False
    true = {id(p): g for p, g in zip(parameters, gradients[len(found) :], strict=True)}
    uses = [
        Use.of(capture.layer, capture.x, g.reshape(capture.shape), capture.call, capture.order)
        for (capture, _), g in zip(found, gradients, strict=False)
        if g is not None and g.numel() and capture.layer.reason_against(capture.call) is None
    ]
    uses = with_reached(uses, batch_size(uses, log_prob.shape[:1]), None) if uses else []
    return {layer.name: _error(layer, [use for use in uses if use.layer is layer], true) for layer in layers}


def _error(layer: Layer, uses: Sequence[Use], true: Mapping[int, Tensor | None]) -> float:
    if true[id(layer.weight)] is None and not uses:
        return math.nan
    wanted = torch.zeros(layer.matrix_shape, dtype=torch.float64)
    for part in layer.parts():
        gradient = true[id(part.parameter)]
        if gradient is not None:
            rows = gradient.double() if part.view is None else part.view(gradient.double())
            rows = rows.reshape(-1, 1) if part.parameter is layer.bias else rows.flatten(1)
            begin, column = part.row, part.column
            wanted.flatten(0, 1)[begin : begin + len(rows), column : column + rows.shape[1]] = rows
    off, size = (rebuilt(layer, uses) - wanted).norm(), wanted.norm()
    return float(off / size) if size > 0 else float(off)


def steps(example: Example) -> Record:
    """Train, and note what happens to each weight."""
    opt = kfac2.KFAC(
        example.model, fisher=example.fisher, levels=2, check_every=1, cov_every=1, inv_every=1, cases="rows"
    )
    left = {left.name: left.reason for left in opt.curvature.handled.found.left}
    found: dict[str, list[float]] = {name: [] for name in opt.layers}
    texts: list[str] = []
    for _ in range(STEPS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.zero_grad()
            logits = example.logits(example.draw())
            distribution = Categorical(logits=logits)
            if example.fisher != "empirical":
                labels = distribution.sample()
                before = errors(opt, distribution.log_prob(labels))
                opt.accumulate_fisher(distribution)
                for name in opt.layers:  # those that are still trusted
                    found[name] += [before[name]] if before[name] == before[name] else []  # none where it was not used
            F.cross_entropy(logits, torch.randint(logits.shape[1], logits.shape[:1])).backward()
            opt.step()
        texts += [str(w.message) for w in caught]
    dropped = [text for text in dict.fromkeys(texts) if "leaves K-FAC" in text]
    return {
        "errors": {name: max(of_layer) if of_layer else None for name, of_layer in found.items() if name in opt.layers},
        "left behind": dropped,
        "left alone": left,
        "warnings": [text for text in sorted({*texts}) if text not in dropped],
        "others": dict(others(example.model)),
        "without statistics": [layer.name for layer in opt.curvature.estimates.layers_that(seen=False)],
    }


def others(model: nn.Module) -> Counter[str]:
    """Count the matrices in modules of other kinds than K-FAC's."""
    counts: Counter[str] = Counter()
    known = {
        id(p) for m in model.modules() if isinstance(m, sum((k.modules for k in KINDS), ())) for p in m.parameters()
    }
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.dim() > 1 and id(p) not in known]
        if own:
            counts[type(module).__name__] += len(own)
    return counts


def run(name: str, make: Any) -> Record:
    """Return the record of one architecture; an error is one, too."""
    torch.manual_seed(0)
    try:
        return {"name": name, **steps(make())}
    except (ValueError, TypeError, RuntimeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"name": name, "error": f"{type(error).__name__}: {error}", "from": Path(last.filename).name}


def row(record: Record) -> list[str]:
    """Write one line of the table."""
    if "error" in record:
        return [record["name"], "", "", "", "", "", f"{record['error']}"]
    checked = [e for e in record["errors"].values() if e is not None and not math.isnan(e)]
    unused = len(record["without statistics"])
    rebuild = sum(e <= RIGHT for e in checked)
    largest = f"{max(checked):.1e}" if checked else "by the self-check"
    reasons = Counter(re.sub(r", off by [\d.e+]+ %", "", text.split(": ", 1)[1]) for text in record["left behind"])
    reasons += Counter(record["left alone"].values())
    told = [f"{count} times: {reason}" for reason, count in reasons.items()]
    told += [f"{count} matrices of {kind} are none of its kinds" for kind, count in record["others"].items()]
    told += record["warnings"]
    handled = len(record["errors"]) - unused
    return [
        record["name"], f"{handled}", f"{rebuild}" if checked else f"{handled}", largest, f"{unused}",
        f"{len(record['left behind'])}, {len(record['left alone'])}", "; ".join(told),
    ]  # fmt: skip


def third_cases(record: Record) -> list[str]:
    """Name the weights that neither rebuild their gradient nor are reported."""
    return [
        name
        for name, error in record.get("errors", {}).items()
        if error is not None and error > RIGHT and name not in record["without statistics"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that names of architectures hold")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: bench/results)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records, missing = [], []
    for package, makers in PACKAGES:
        if importlib.util.find_spec(package) is None:
            missing.append(package)
            continue
        for name, make in makers.items():
            if re.search(arguments.only, name):
                records.append(run(name, make))
                print(" | ".join(row(records[-1])), flush=True)
    third = {record["name"]: third_cases(record) for record in records if third_cases(record)}
    header = ["architecture", "handled", "rebuild", "largest error", "unused", "left, alone", "reported"]
    text = [
        "# Real architectures\n",
        f"Three steps of each by `python bench/architectures.py`: torch {torch.__version__}, float32, one thread.",
        "A weight *handled* has statistics; it *rebuilds* where Σ g āᵀ of the rows in its factors is its gradient",
        f"to {RIGHT:g}; *unused*: no part of the loss; *left* at its first statistics, or *alone* from the start. With",
        "the empirical Fisher the rows are compared with `.grad` by kfac2's own check.\n",
        table(header, [row(record) for record in records]),
        f"\nThird cases: {third or 'none'}."
        + (f" Not installed, and left out: {', '.join(missing)}." if missing else ""),
    ]
    write(arguments.out / "architectures.md", "\n".join(text) + "\n")
    write(arguments.out / "architectures.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return 1 if third else 0


if __name__ == "__main__":
    raise SystemExit(main())
