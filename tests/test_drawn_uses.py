"""Drawn batches against the equations: padded, partial, repeated, flattened, time-major, masked, thrown away.

A *plan* is a small network and its batches. It is run twice: by modules that kfac2 watches, and by plain products that
note for each row of each use which token of which sample it is. From these the factors and the coarse sums are formed
densely. A difference is allowed only where a warning names the layer.

`KFAC2_EXAMPLES=10000 pytest tests/test_drawn_uses.py` draws as many plans as one likes.
"""

import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import error
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import KFAC, Curvature
from torch.distributions import Categorical, Normal

from kfac2 import reference

EXAMPLES = int(os.environ.get("KFAC2_EXAMPLES", "150"))
D = 3  # features everywhere
DERANDOMIZED = "KFAC2_EXAMPLES" not in os.environ


@dataclass
class Plan:
    """What is drawn.

    Attributes:
        N: samples.
        S: tokens of each.
        form: how the body sees tokens.
        times: how often it is used.
        again: the form of its second and third use.
        experts: by expert, which tokens it gets, by their number; in slots of which some stay empty, or not.
        slots: how many rows each expert has, or None: as many as it has tokens.
        conv: whether a convolution over tokens follows.
        pool: how tokens become samples, or `none`: a token loss.
        padded: (N, S), the tokens that are data.
        says_mask: whether `mask=` says so, too.
        normal: whether the likelihood is Normal.
        micro: the number of micro-batches.
        thrown: whether a batch is thrown away before.
        names_axis: whether `batch_dim=1` is said of a time-major body.
    """

    N: int
    S: int
    form: str
    times: int
    again: str
    experts: list
    slots: int | None
    conv: bool
    pool: str
    padded: torch.Tensor
    says_mask: bool
    normal: bool
    micro: int
    thrown: bool
    names_axis: bool
    seed: int


@st.composite
def plans(draw):
    N, S = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    count = N * S
    forms = ["3d", "3d", "flat", "packed", "4d", "time"]
    bits = draw(st.lists(st.booleans(), min_size=count, max_size=count)) if draw(st.booleans()) else [True] * count
    padded = torch.tensor(bits).reshape(N, S)
    padded[draw(st.integers(0, N - 1)), draw(st.integers(0, S - 1))] = True
    chosen = st.lists(st.integers(0, count - 1), max_size=count, unique=True)
    experts = draw(st.lists(chosen, max_size=3))
    form = draw(st.sampled_from(forms))
    pool = draw(st.sampled_from(["none", "none", "mean", "max", "first"]))
    again = draw(st.sampled_from(forms)) if form != "time" else "time"
    times, conv = draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans())
    names_axis = form == "time" and draw(st.booleans())
    if "time" in (form, again) and not names_axis:
        # Where most uses are time-major, or whole samples are padding, the axis has to be named: nobody could tell one
        # sample of two tokens from two samples of one.
        padded[:], times, conv, experts = True, 1, True, []
    if names_axis and pool == "none":  # the head sees samples first: not another axis than the body
        pool = "mean"
    return Plan(
        N,
        S,
        form,
        times,
        again,
        experts,
        draw(st.sampled_from([None, None, 7, 8])),
        conv,
        pool,
        padded,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([1, 1, 2])),
        draw(st.booleans()),
        names_axis,
        draw(st.integers(0, 2**20)),
    )


# -- the network, by whatever does the products -----------------------------------------------------------------


def network():
    net = {name: nn.Linear(D, D) for name in ("a", "e0", "e1", "e2", "head")}
    return nn.ModuleDict({**net, "conv": nn.Conv1d(D, D, 3, padding=1)}).double()


def rearranged(plan, form, t, mask):
    """Bring (N, S, ...) into a form, and back again."""
    N, S = plan.N, plan.S
    if form == "flat":
        return t.flatten(0, 1), lambda u: u.reshape(N, S, *u.shape[1:])
    if form == "packed":
        return t[mask], lambda u: u.new_zeros(N, S, *u.shape[1:]).masked_scatter(mask[..., None], u)
    if form == "4d":
        return t.unsqueeze(1), lambda u: u.squeeze(1)
    if form == "time":
        return t.transpose(0, 1), lambda u: u.transpose(0, 1)
    return t, lambda u: u


def forward(plan, use, x, mask):
    """Run the network; `use(name, input, ids)` applies a layer, ids (n, s) naming the token of each row."""
    ids = torch.stack(torch.meshgrid(torch.arange(plan.N), torch.arange(plan.S), indexing="ij"), -1)
    h = x
    for number in range(plan.times):
        form = plan.form if number == 0 else plan.again
        rows, back = rearranged(plan, form, h, mask)
        h = torch.tanh(back(use("a", rows, rearranged(plan, form, ids, mask)[0])))
    if plan.experts:
        flat, out = h.flatten(0, 1), h.flatten(0, 1)
        for number, tokens in enumerate(plan.experts):
            index = torch.tensor(tokens, dtype=torch.long)
            rows, named = flat[index], ids.flatten(0, 1)[index]
            empty = 0 if plan.slots is None else max(0, plan.slots - len(tokens))
            rows = F.pad(rows, (0, 0, 0, empty))
            got = use(f"e{number}", rows, F.pad(named, (0, 0, 0, empty), value=-1))[: len(tokens)]
            out = out.index_add(0, index, torch.tanh(got))
        h = out.unflatten(0, (plan.N, plan.S))
    if plan.conv:
        h = h + torch.tanh(use("conv", h.transpose(1, 2), ids)).transpose(1, 2)
    if plan.pool == "none":
        out = use("head", h, ids)[mask]
    else:
        if plan.pool == "mean":
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        elif plan.pool == "max":
            h = h.masked_fill(~mask[..., None], -2.0).amax(1)
        else:
            h = h[:, 0]
        named = ids[:, 0].clone()
        named[:, 1] = -1
        out = use("head", h, named)
    return Normal(out, 1.0) if plan.normal else Categorical(logits=out)


def batches(plan):
    generator = torch.Generator().manual_seed(plan.seed)
    for _ in range(plan.micro):
        yield torch.randn(plan.N, plan.S, D, generator=generator, dtype=torch.float64), plan.padded


def mask_of(plan):
    """`mask=` is said where a layer has rows of its shape: of the tokens (N, S), or of flattened ones."""
    fits = plan.conv or plan.pool == "none" or {plan.form, plan.again if plan.times > 1 else plan.form} & {"3d", "flat"}
    return plan.padded if plan.says_mask and fits else None


# -- the same from the equations --------------------------------------------------------------------------------


@dataclass
class Noted:
    """A use, its rows laid out (leading size, places, features): g is 0 and `counts` False where a row does not count."""

    name: str
    a: torch.Tensor
    out: torch.Tensor
    ids: torch.Tensor
    g: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    tokens: bool = True
    rank: int = 0  # axes of its grid

    @property
    def key(self):
        return tuple(self.a.shape[:2])


def noted_pass(plan, model, x, mask):
    """Run the plan by plain products; return its uses that have gradients, and the log-probabilities."""
    noted = []
    parameters = {name: (m.weight.detach(), m.bias.detach()) for name, m in model.items()}

    def use(name, x, ids):
        weight, bias = parameters[name]
        if name == "conv":
            rows, _ = reference.patches(x, 3, padding=1, bias=True)
            out = (rows[..., :-1] @ weight.flatten(1).T + bias).requires_grad_()
            noted.append(Noted(name, rows, out, ids, tokens=False, rank=1))
            return out.transpose(1, 2)
        out = (x @ weight.T + bias).requires_grad_()
        noted.append(Noted(name, F.pad(x, (0, 1), value=1.0), out, ids, rank=min(x.dim() - 2, 1)))
        return out

    distribution = forward(plan, use, x, mask)
    torch.manual_seed(plan.seed)
    log_prob = distribution.log_prob(distribution.sample())
    gradients = torch.autograd.grad(-log_prob.sum(), [n.out for n in noted], allow_unused=True)
    uses = []
    for one, g in zip(noted, gradients, strict=True):
        if g is None or not g.numel():
            continue
        parts = [t.detach() for t in (one.a, g, one.ids)]
        if plan.names_axis and parts[0].dim() > 2 and one.tokens:
            parts = [t.movedim(1, 0) for t in parts]
        one.a, one.g, one.ids = (t.reshape(len(t), -1, t.shape[-1]) for t in parts)
        uses.append(one)
    return uses, log_prob


def leading_size(uses, log_prob):
    """N, by the documented rule: what most uses share; of two the log-probabilities', then the last use's."""
    counts = Counter()
    for use in uses:
        counts[len(use.a)] += float((use.g != 0).flatten(1).any(1).double().mean())
    shared = [size for size in counts if counts[size] > max(counts.values()) - 1e-9]
    return next(size for size in (log_prob.shape[0], *(len(use.a) for use in reversed(uses))) if size in shared)


def mark_what_counts(uses, N, mask, fits):
    """Rows that the loss cannot reach do not count: those without gradient in all uses on a grid."""
    for use in uses:
        use.counts = torch.ones(use.key, dtype=torch.bool)
        if mask is not None and use.key in (tuple(mask.shape), (mask.numel(), 1)):
            use.counts = mask.reshape(use.key)
            use.g = use.g * use.counts[..., None]
    dead_samples = torch.stack([(use.g == 0).flatten(1).all(1) for use in uses if len(use.a) == N]).all(0)
    for use in uses:
        if len(use.a) == N:
            use.counts = use.counts & ~dead_samples[:, None]
    for use in uses:
        if use.tokens:
            same = [other for other in uses if other.tokens and other.key == use.key] if fits(use) else [use]
            use.counts = use.counts & ~torch.stack([(other.g == 0).all(2) for other in same]).all(0)


def documented_fit(use, uses, N):
    r, rest = divmod(len(use.a), N)
    places = {other.key[1] for other in uses if len(other.a) == N}
    return not rest and (r == 1 or r * use.key[1] in places or r in places)


def agree(uses, N):
    """Whether rows that are taken together belong together: the same tokens in the same places, or one sample's.

    Nobody can tell whose a row without gradient is. It is counted where other uses of that size have one there.
    """
    by_layer = {}
    for use in uses:
        ids = torch.where((use.counts & (use.g != 0).any(2))[..., None], use.ids, -1).reshape(N, -1, 2)
        by_layer.setdefault(use.name, []).append(ids)
    tables = [torch.cat(parts, 1).tolist() for parts in by_layer.values()]
    return all(rows_agree(one, other) for k, one in enumerate(tables) for other in tables[: k + 1])


def rows_agree(one, other):
    if len(one[0]) == len(other[0]) and all(
        a == b or -1 in (a[0], b[0]) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    ):
        return True
    samples = [[{n for n, _ in block if n >= 0} for block in table] for table in (one, other)]
    return all(len(x | y) <= 1 or not (x and y) for x, y in zip(*samples, strict=True))


def dense(plan, model, passes, outside):
    """A, G and the coarse sums of all passes, the layers `outside` being zero maps.

    Returns None for the coarse sums where rows that are taken together do not belong together.
    """
    names = list(model)
    A, G, rows, cases = {}, {}, Counter(), 0
    sums = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    is_right = True
    for uses, log_prob, N in passes:
        cases += log_prob.numel()
        maps = {}
        for use in uses:
            a, g = use.a[use.counts], use.g[use.counts]
            A[use.name] = A.get(use.name, 0) + a.T @ a
            G[use.name] = G.get(use.name, 0) + g.T @ g
            rows[use.name] += len(a)
        for name in dict.fromkeys(use.name for use in uses):
            own = [use for use in uses if use.name == name]
            if name in outside:
                continue
            parts = [(m * u.counts).reshape(N, -1, u.key[1]) for u in own for m in (u.a.sum(2), u.g.sum(2))]
            if len(own) == 1:
                r, places = len(own[0].a) // N, own[0].key[1]
                grid = (r,) * (r > 1) + (places,) * own[0].rank
                maps[name] = (*(p.reshape(N, -1, 1) for p in parts), grid)
            else:
                joined = [torch.cat([p.flatten(1) for p in parts[i::2]], 1) for i in (0, 1)]
                maps[name] = (*(p.unsqueeze(2) for p in joined), (joined[0].shape[1],))
        inside = [use for use in uses if use.name not in outside]
        is_right &= agree(inside, N)
        index = torch.tensor([names.index(name) for name in maps])
        for side in (0, 1):
            if maps:
                new = reference.cross_layer_sums([m[side] for m in maps.values()], [m[2] for m in maps.values()])
                sums[side][index[:, None], index] += new
    factors = {name: (A[name] / cases, G[name] / rows[name]) for name in A}
    scale = torch.tensor([rows[name] for name in names], dtype=torch.float64).clamp(min=1).rsqrt()
    coarse = sums[0] / cases, sums[1] * scale[:, None] * scale
    return factors, coarse if is_right else None


# -- what is compared -------------------------------------------------------------------------------------------


def noted_passes(plan, model):
    passes = []
    for x, mask in batches(plan):
        uses, log_prob = noted_pass(plan, model, x, mask)
        N = leading_size(uses, log_prob)
        mark_what_counts(uses, N, mask_of(plan), lambda use, uses=uses, N=N: documented_fit(use, uses, N))
        passes.append(([use for use in uses if use.counts.any()], log_prob, N))
    return passes


def warned(caught):
    return {str(w.message).split()[1] for w in caught if "do not belong to" in str(w.message)}


@settings(max_examples=EXAMPLES, deadline=None, derandomize=DERANDOMIZED)
@given(plans())
def test_factors_and_coarse_sums(plan):
    torch.manual_seed(plan.seed)
    model = network()
    opt = KFAC(model, lr=0.0, batch_dim=int(plan.names_axis), check_every=1)

    def use(name, x, ids):
        return model[name](x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if plan.thrown:
            x, mask = next(batches(plan))
            opt.accumulate_fisher(forward(plan, use, 30 * x, mask), mask_of(plan))
            opt.zero_grad()
        for x, mask in batches(plan):
            distribution = forward(plan, use, x, mask)
            torch.manual_seed(plan.seed)
            opt.accumulate_fisher(distribution, mask_of(plan))
            distribution.log_prob(distribution.sample()).sum().backward()
        opt.step()
    assert not [w for w in caught if "do not belong to" not in str(w.message)], [str(w.message) for w in caught]
    passes = noted_passes(plan, model)
    inside = zip(opt.layers, opt.curvature.averages.in_coarse, strict=True)
    outside = {name for name, fits in inside if not fits}
    assert outside <= warned(caught)
    factors, coarse = dense(plan, model, passes, outside)
    for name, (A, G) in factors.items():
        mine = opt.factors(name)
        assert error(mine[0].squeeze(0), A) < 1e-9, f"A of {name}"
        assert error(mine[1].squeeze(0), G) < 1e-9, f"G of {name}"
    assert coarse is not None, "rows of different samples are taken together, and nothing is said"
    own = opt.coarse_sums()
    order = torch.tensor([list(model).index(name) for name in opt.layers])
    for mine, right, what in zip(own, coarse, ("inputs", "gradients"), strict=True):
        right = right[order[:, None], order]
        is_rounding = (mine - right).norm() < 1e-24  # of the sum over a softmax, which is 0
        assert is_rounding or error(mine, right) < 1e-9, f"the coarse sums of {what}"


@settings(max_examples=EXAMPLES, deadline=None, derandomize=DERANDOMIZED)
@given(plans())
def test_the_diagonal_of_ekfac(plan):
    """s = 1/M Σ_n (V_Gᵀ ∇_n V_A)² in the basis at hand, ∇_n the gradient of one sample over all uses that fit."""
    torch.manual_seed(plan.seed)
    model = network()
    curvature = Curvature(model, inverse="ekfac", batch_dim=int(plan.names_axis), check_every=1)

    def predicted():
        x, mask = next(batches(plan))
        distribution = forward(plan, lambda name, x, ids: model[name](x), x, mask)
        torch.manual_seed(plan.seed)
        return distribution

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curvature.accumulate(predicted())
        curvature.solve({name: torch.randn_like(p) for name, p in model.named_parameters()}, 0.1)
        curvature.accumulate(predicted())
    outside, layout = warned(caught), curvature.layout
    uses, log_prob, N = noted_passes(replace(plan, says_mask=False, micro=1), model)[0]
    for name in {use.name for use in uses}:
        number = next(i for i, layer in enumerate(layout.layers) if layer.name == name)
        V_A, V_G, s = (
            layout.view(curvature.inverses.fields[field], number)[0] for field in ("A_vectors", "G_vectors", "diagonal")
        )
        own = [use for use in uses if use.name == name]
        of_sample = {}  # gradients by sample, or by leading entry of each use
        for k, use in enumerate(own):
            count = len(use.a) if name in outside else N
            products = torch.einsum("nto,nti,nt->noi", use.g, use.a, use.counts.double())
            for n, product in enumerate(products):
                key = (k, n) if name in outside else n * count // len(use.a)
                of_sample[key] = of_sample.get(key, 0) + product
        right = sum((V_G.T @ product @ V_A).square() for product in of_sample.values()) / log_prob.numel()
        assert error(s, right) < 1e-9, f"the diagonal of {name}"
