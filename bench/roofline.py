"""A model of the time of every op of kfac2 on a CUDA device, from bytes, operations and launches: nothing is run.

For ResNet-110 (CIFAR, batch 128), ResNet-50 (batch 256, 224 x 224) and GPT-2 small (8 x 1024 tokens), on an H100 SXM
and an H200. All times are predictions; `--record` puts what `report.py --device cuda` or `gpu_check.py` measured beside
them. What an op moves, computes and launches is counted in `roofline_ops`, torch's way in `roofline_library`; the
constants are in `roofline_time`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import roofline_calls as calls
import roofline_library as library
import roofline_ops as ops
from networks import NETWORKS
from output import table, write
from roofline_calls import Op
from roofline_nets import Net, grads_of, inputs_of, known, published
from roofline_ops import ELEMENT
from roofline_time import DEVICES, PRODUCT_SHARE, SHARES, SOURCES, Device, duration, floor, in_step, seconds

Row = dict[str, Any]
PRECISIONS = tuple(ELEMENT)


# -- what is predicted --------------------------------------------------------------------------------------------


def op_row(op: Op, net: Net, device: Device, measured: dict[str, float]) -> Row:
    """Predict one op, in microseconds; `measured` has milliseconds by the titles of cases, which are in fp32."""
    own, found = op.alone.own, measured.get(f"{op.name}, {net.title}")
    row: Row = {
        "op": op.name, "when": op.when,
        "launches": own.launches, "launches_in_step": sum(call.own.launches for call in op.in_step),
        "bytes": own.least_bytes, "flop": own.least_flop,
        "moved": sum(stage.bytes for stage in own.stages), "computed": sum(stage.flop for stage in own.stages),
        "floor": 1e6 * floor(own, device),
        "kfac2": {p: 1e6 * duration(op.alone, device, p) for p in PRECISIONS},
        "library": {p: 1e6 * duration(op.alone, device, p, True) for p in PRECISIONS} if op.alone.library else None,
        "in_step": {p: 1e6 * in_step(op, device, p) for p in PRECISIONS},
        "measured": None if found is None else 1e3 * found,
    }  # fmt: skip
    return row | {"verdict": verdict(row["kfac2"]["fp32"], row["measured"])}


def verdict(predicted: float, measured: float | None) -> str:
    """Say where a measurement and its prediction are more than a factor of 2 apart."""
    if measured is None or 0.5 <= measured / predicted <= 2:
        return ""
    over = measured / predicted
    return f"{over:.1f} times the prediction" if over > 1 else f"{1 / over:.1f} times faster than predicted"


def parts_of_step(net: Net, found: Sequence[Op], device: Device, way: str, precision: str, paper: bool) -> Row:
    """Sum up what K-FAC adds to a step, in milliseconds: to every one, at statistics, at inverses; mean at 10/100."""
    added = {"every": 0.0, "statistics": 0.0, "inverses": 0.0}
    for op in found:
        if op.paper if paper else op.default:
            added[op.when] += 1e3 * in_step(op, device, precision, way)
    element = ELEMENT[precision]
    added["statistics"] += 1e3 * seconds(calls.sampled_backward(net, element), device, precision)
    mean = added["every"] + added["statistics"] / 10 + added["inverses"] / 100
    model = 1e3 * seconds(calls.forward_backward(net, element), device, precision)
    adamw, sgd = (1e3 * seconds(stages, device) for stages in (calls.adamw(net), calls.sgd(net)))
    return {"model": model, "adamw": adamw, **added, "mean": mean, "over_adamw": (model + sgd + mean) / (model + adamw)}


def step_rows(net: Net, device: Device) -> list[Row]:
    """Predict the kinds of steps, by kfac2 and by the library."""
    found, ways = calls.ops_of(net), {"kfac2": "kfac2 as it is", "library": "library", "faster": "the faster, op by op"}
    return [
        {"method": method, "way": f"{name}, {p}", **parts_of_step(net, found, device, way, p, method != "KFAC(model)")}
        for method in ("KFAC(model)", "the paper's two levels")
        for way, name in ways.items()
        for p in PRECISIONS
    ]


def largest(net: Net, device: Device, count: int = 5) -> list[Row]:
    """Return the ops that cost most in a mean step of `KFAC(model)` at 10/100 in TF32, in milliseconds."""
    often = {"every": 1.0, "statistics": 0.1, "inverses": 0.01}
    rows: list[Row] = []
    for op in calls.ops_of(net):
        if op.default:
            own = {p: in_step(op, device, p) for p in PRECISIONS}
            over = {p: own[p] / in_step(op, device, p, "library") for p in PRECISIONS if op.alone.library}
            mean = {p: 1e3 * often[op.when] * own[p] for p in PRECISIONS}
            rows.append({"net": net.title, "device": device.name, "op": op.name, "mean": mean, "over": over})
    return sorted(rows, key=lambda row: -row["mean"]["tf32"])[:count]


def route_rows(net: Net, device: Device) -> list[Row]:
    """Predict both ways that kfac2 has for covariances, for each kind of rows: in a call of at least 8 alike."""
    kinds = Counter([*inputs_of(net.shapes), *grads_of(net.shapes)])
    rows: list[Row] = []
    for source, count in kinds.items():
        alike = max(count, 8)
        native = 1e6 * seconds(ops.covariances([source] * alike).stages, device) / alike
        products = {p: library.gram_matrices([source] * alike, p) for p in PRECISIONS}
        by_library = {p: 1e6 * seconds(stages, device, p) / alike for p, stages in products.items()}
        shape = "x".join(map(str, (source.batch, source.channels, *source.extent)))
        window = source.window
        name = shape + (f", {'x'.join(map(str, window.kernel_size))}" if max(window.kernel_size, default=1) > 1 else "")
        name += f", stride {max(window.stride)}" if max(window.stride, default=1) > 1 else ""
        name += ", bias" if window.bias else ""
        taken = ", ".join(p for p in PRECISIONS if calls.are_wide([source] * alike, p)[0])
        rows.append({"rows": name, "count": count, "native": native, "library": by_library, "taken": taken})
    return sorted(rows, key=lambda row: -row["count"] * row["native"])[:8]


# -- what was measured --------------------------------------------------------------------------------------------


def median(spread: Any) -> float:
    """Read a `timing.Spread`: in a record a list, in older ones a mapping."""
    return float(spread["median"] if isinstance(spread, dict) else spread[0])


def net_of(title: str, nets: Sequence[Net]) -> Net | None:
    """Find or make the network of a title, `<network>, batch <samples>`."""
    for net in nets:
        if net.title == title:
            return net
    words, _, batch = title.rpartition(", batch ")
    names = [name for name, network in NETWORKS.items() if network.title == words]
    return known(names[0], int(batch)) if names and batch.isdigit() else None


def case_rows(record: Row, device: Device, nets: list[Net]) -> list[Row]:
    """Put the prediction of each case of a record beside it; a case that the model does not know says so."""
    rows = []
    for result in record["kernels"]:
        title, milliseconds = result["case"], result["milliseconds"]
        call = calls.single(title)
        name, _, rest = title.partition(", ")
        if call is None and (net := net_of(rest, nets)) is not None:
            nets.append(net)
            call = next((op.alone for op in calls.ops_of(net) if op.name == name), None)
        row: Row = {
            "case": title,
            "measured": 1e3 * median(milliseconds["kfac2"]),
            "predicted": None,
            "verdict": "unknown",
        }
        if call is not None:
            row["predicted"] = 1e6 * duration(call, device)
            row["library_measured"] = 1e3 * median(milliseconds["torch"])
            row["library_predicted"] = 1e6 * duration(call, device, by_library=True)
            row["verdict"] = verdict(row["predicted"], row["measured"])
        rows.append(row)
    return rows


def whole_rows(record: Row, device: Device, nets: list[Net]) -> list[Row]:
    """Put predictions of whole steps beside those of a record: in fp32, or in what a network is cast to."""
    rows = []
    for result in record["steps"]:
        net = net_of(f"{NETWORKS[result['net']].title}, batch {result['batch']}", nets)
        assert net is not None
        precision = "fp32" if NETWORKS[result["net"]].autocast is None else "bf16"
        found, model = calls.ops_of(net), calls.forward_backward(net, ELEMENT[precision])
        sgd, fused = (seconds([*model, *calls.sgd(net, fused=own)], device, precision) for own in (False, True))
        added = parts_of_step(net, found, device, "kfac2", precision, paper=True)
        predicted = {("sgd", "c"): 1e3 * sgd, ("kfac2-2", "c"): 1e3 * fused + added["every"]}
        predicted["kfac2-2", "a"] = predicted["kfac2-2", "c"] + added["statistics"]
        predicted["kfac2-2", "b"] = predicted["kfac2-2", "a"] + added["inverses"]
        for (name, kind), value in predicted.items():
            if kind in (kinds := result["optimizers"].get(name, {}).get("kinds", {})):
                measured = median(result["sgd_milliseconds"]) * median(kinds[kind]["whole"])
                rows.append({"case": f"step, {name}, {kind}, {net.title}", "predicted": 1e3 * value,
                             "measured": 1e3 * measured, "verdict": verdict(value, measured)})  # fmt: skip
    return rows


def read_record(path: Path) -> tuple[Row, Device]:
    """Read what `report.py` or `gpu_check.py` wrote, and find the device that it was measured on."""
    lines = path.read_text()
    if path.suffix == ".jsonl":  # of gpu_check.py: a stage in each line, with what its report found
        found = [each for line in lines.splitlines() for each in json.loads(line).get("found", [])]
        record: Row = {part: [result for each in found for result in each[part]] for part in ("kernels", "steps")}
        record["machine"] = found[0]["machine"] if found else {}
    else:
        record = json.loads(lines)
    name = record.get("machine", {}).get("device", "none")
    for device in DEVICES:
        if device.name.split()[0] in name.replace("-", " ").split():
            return record, device
    raise ValueError(f"the record must be of {' or '.join(d.name for d in DEVICES)}, got one of {name!r}: {path}")


# -- for people ---------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Write three digits, and a group of digits as it is."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ops_table(rows: Sequence[Row]) -> str:
    header = ["op", "when", "launches", "MB", "GFLOP", "floor", "kfac2 fp32", "TF32", "bf16", "library fp32", "TF32",
              "bf16", "in a step, TF32", "measured, fp32", "note"]  # fmt: skip
    lines = []
    for row in rows:
        others = row["library"] or dict.fromkeys(PRECISIONS)
        times = [row["floor"], *row["kfac2"].values(), *others.values(), row["in_step"]["tf32"], row["measured"]]
        work = [str(row["launches"]), number(row["bytes"] / 1e6), number(row["flop"] / 1e9)]
        lines.append([row["op"], row["when"], *work, *map(number, times), row["verdict"]])
    return table(header, lines)


def largest_table(rows: Sequence[Row]) -> str:
    header = ["network", "device", "op", "ms fp32", "TF32", "bf16", "over the library fp32", "TF32", "bf16"]
    lines = []
    for row in rows:
        times = [*row["mean"].values(), *(row["over"].get(p) for p in PRECISIONS)]
        lines.append([row["net"], row["device"], row["op"], *map(number, times)])
    return table(header, lines)


def routes_table(rows: Sequence[Row]) -> str:
    header = ["rows", "tensors", "native", "library fp32", "TF32", "bf16", "library is taken in"]
    times = [[row["native"], *row["library"].values()] for row in rows]
    lines = [[r["rows"], str(r["count"]), *map(number, t), r["taken"]] for r, t in zip(rows, times, strict=True)]
    return table(header, lines)


def steps_table(rows: Sequence[Row]) -> str:
    keys = ["model", "adamw", "every", "statistics", "inverses", "mean", "over_adamw"]
    header = ["method", "way", "forward, backward", "AdamW", "every step", "at statistics", "at inverses",
              "mean at 10/100", "step / AdamW's step"]  # fmt: skip
    return table(header, [[row["method"], row["way"], *(number(row[key]) for key in keys)] for row in rows])


def cases_table(rows: Sequence[Row]) -> str:
    keys = ["predicted", "measured", "library_predicted", "library_measured"]
    header = ["case", "predicted", "measured", "torch, predicted", "torch, measured", "note"]
    return table(header, [[row["case"], *(number(row.get(key)) for key in keys), row["verdict"]] for row in rows])


READING = """\
All times are **predictions** from bytes, operations and launches (`make roofline`); *measured* is empty until a record
is given: `make roofline ARGS="--record FILE"`. Ops in microseconds, steps in milliseconds.

- *MB*, *GFLOP*: what the equation of the op asks for, each number moved once, nothing computed twice. *floor*: these at
  the peaks of memory and fp32. *launches*: of kfac2, tables included; a test holds them against the emulated kernels.
- *kfac2*: its kernels as they are, each at a share of the peaks that was estimated from its compiled code, or as slow
  as its chains of loads; its products by the library (wide covariances, `precondition`) in strict fp32, with TF32
  allowed, or with bf16 activations and TF32. *library*: all of it by torch (shifted planes and one product, Cholesky by
  size, batched products) in fp32, TF32 and bf16.
- An op is one call as `bench/cases.py` makes it; *in a step* are the calls that a step makes: both kinds of maps a
  few samples at a time, a quarter of the samples, but at least 32, for `directional_derivatives`, no stacking for
  `precondition`.
- Steps: what K-FAC adds to *every step*, *at statistics* (the backward pass of sampled labels included), *at inverses*;
  the model runs in the precision that is named; AdamW is torch's own (foreach).
- Where the host takes longer to launch (5 us for each launch of an eager call) than the device to work, that counts."""


COSTS = """\
Milliseconds of a mean step of `KFAC(model)` with statistics every 10 steps and inverses every 100; *over the library*:
times as long as torch's way in the same precision."""


def markdown(found: Row) -> str:
    lines = ["# Predicted times on CUDA devices", "", READING, "", "Constants:", ""]
    for device in found["devices"]:
        peaks = ", ".join(f"{p} {device[p] / 1e12:.0f} TFLOP/s" for p in PRECISIONS)
        lines.append(f"- {device['name']}: {device['bandwidth'] / 1e12:.2f} TB/s, {peaks} (data sheet), "
                     f"{device['clock'] / 1e9} GHz")  # fmt: skip
    reached = ", ".join(f"{p} {share}" for p, share in PRODUCT_SHARE.items())
    lines.append(f"- Reached by large products: {reached} of the peak; by copies 0.9 of the bandwidth. {SOURCES}")
    lines += ["", "## What costs most", "", COSTS, ""]
    lines.append(largest_table([row for net in found["nets"] for row in net["largest"]]))
    for net in found["nets"]:
        lines += ["", f"## {net['title']}", "", f"{net['layers']} layers, {net['handled']:,} of {net['parameters']:,} "
                  "parameters handled."]  # fmt: skip
        lines += ["", f"{DEVICES[0].name}, covariances of one tensor, us: the costliest kinds of rows", ""]
        lines.append(routes_table(net["routes"]))
        for device, rows in net["ops"].items():
            lines += ["", f"{device}, ops, us", "", ops_table(rows), "", f"{device}, steps, ms", ""]
            lines.append(steps_table(net["steps"][device]))
    if found["record"]:
        lines += ["", f"## Measured on {found['record']['device']}, us", "", cases_table(found["record"]["rows"])]
    return "\n".join(lines) + "\n"


def predicted(record: tuple[Row, Device] | None) -> Row:
    """Predict everything; with a record, beside what it has."""
    nets = published()
    found: Row = {"devices": [asdict(device) for device in DEVICES], "shares": SHARES, "record": None}
    measured: dict[str, dict[str, float]] = {device.name: {} for device in DEVICES}
    if record is not None:
        content, device = record
        measured[device.name] = {r["case"]: median(r["milliseconds"]["kfac2"]) for r in content["kernels"]}
        rows = case_rows(content, device, list(nets)) + whole_rows(content, device, list(nets))
        found["record"] = {"device": content["machine"]["device"], "rows": rows}
    entries = []
    for net in nets:
        known_ops = calls.ops_of(net)
        by_device = {d.name: [op_row(op, net, d, measured[d.name]) for op in known_ops] for d in DEVICES}
        steps = {d.name: step_rows(net, d) for d in DEVICES}
        costs = [row for device in DEVICES for row in largest(net, device)]
        entries.append({"title": net.title, "layers": len(net.shapes), "handled": net.weights,
                        "parameters": net.parameters, "largest": costs,
                        "routes": route_rows(net, DEVICES[0]), "ops": by_device, "steps": steps})  # fmt: skip
    return {**found, "nets": entries}


def rounded(value: Any) -> Any:
    """Round all numbers to four digits, for a file that two machines write alike."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Read the command line, predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="of report.py --device cuda (.json) or gpu_check.py (.jsonl)")
    default = Path(__file__).with_name("results")
    parser.add_argument("--out", type=Path, default=default, help="folder of the results (default: bench/results)")
    args = parser.parse_args()
    try:
        record = None if args.record is None else read_record(args.record)
    except (OSError, ValueError) as error:
        sys.exit(f"--record: {error}")
    found = predicted(record)
    text = markdown(found)
    write(args.out / "roofline.json", json.dumps(rounded(found), indent=1) + "\n")
    write(args.out / "roofline.md", text)
    print(text)


if __name__ == "__main__":
    main()
