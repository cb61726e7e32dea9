"""K-FAC as the equations state it, on dense matrices: the optimizer's oracle.

Every A_qr and G_qr of every pair of blocks is formed and averaged, every Kronecker product is formed, every
layer is solved for vec(∇), and the SGD step is written out. It shares nothing with kfac2 but the rows and
dense functions of kfac2.reference.
"""

import math

import torch

from kfac2 import reference


def is_transposed(module):
    return isinstance(module, torch.nn.modules.conv._ConvTransposeNd)


def spread(module, x, g, bias):
    """Rows of a transposed convolution: what each element of the kernel brings to each place of the output.

    One-hot kernels, transposed by torch: nothing is known here of strides, padding or the order of offsets.
    """
    channels, places = x.shape[1], math.prod(module.kernel_size)
    kernels = torch.eye(channels * places, dtype=x.dtype).reshape(channels, places, channels * places)
    kernels = kernels.transpose(1, 2).reshape(channels, channels * places, *module.kernel_size)
    convolve = getattr(torch.nn.functional, f"conv_transpose{len(module.kernel_size)}d")
    shortest = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(
            x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size, strict=True
        )
    ]
    extra = tuple(size - short for size, short in zip(g.shape[2:], shortest, strict=True))
    rows = convolve(x, kernels, None, module.stride, module.padding, extra, 1, module.dilation)
    rows = rows.flatten(2).transpose(1, 2)
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
    return rows, tuple(g.shape[2:])


def blocks_of(module, x, g, bias):
    """Rows of each Kronecker block: (input rows, grid), (gradient rows, grid)."""
    if isinstance(module, torch.nn.Linear):
        if x.dim() > 2:  # all positions are one axis
            x, g = x.flatten(1, -2).transpose(1, 2), g.flatten(1, -2).transpose(1, 2)
        rank = x.dim() - 2
        return [(reference.patches(x, (1,) * rank, bias=bias), reference.grad_rows(g))]
    if is_transposed(module):
        parts = zip(x.chunk(module.groups, 1), g.chunk(module.groups, 1), strict=True)
        return [(spread(module, xq, gq, bias), reference.grad_rows(gq)) for xq, gq in parts]
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation, bias)
    parts = zip(x.chunk(module.groups, 1), g.chunk(module.groups, 1), strict=True)
    return [(reference.patches(xq, *geometry), reference.grad_rows(gq)) for xq, gq in parts]


def on_samples(rows, grid, samples):
    """Rows (N·r, T, d) as (N, r·T, d), with r as one more grid axis."""
    r = rows.shape[0] // samples
    if r == 1:
        return rows, grid
    return rows.reshape(samples, -1, rows.shape[2]), (r, *grid)


class Oracle:
    def __init__(
        self,
        model,
        names,
        *,
        lr=1e-2,
        momentum=0.9,
        weight_decay=0.0,
        nesterov=False,
        damping=1e-3,
        kl_clip=1e-2,
        levels=2,
        inverse="cholesky",
        fisher="mc",
        stat_decay=0.95,
        cov_every=10,
        inv_every=100,
        downsample="nearest",
        coarse_weight=1.0,
        coarse_damping=None,
        cases=None,
        rates=None,
        summed=(),
    ):
        vars(self).update(locals())
        self.modules = [model.get_submodule(name) for name in names]
        self.rates = rates or {}
        self.k = self.t = 0
        self.A, self.G, self.buffers = {}, {}, {}
        self.inverses = None

    # -- statistics

    def forward(self, x):
        self.inputs, self.outputs, handles = {}, {}, []
        for i, module in enumerate(self.modules):

            def keep(module, args, output, i=i):
                self.inputs[i], self.outputs[i] = args[0].detach(), output

            handles.append(module.register_forward_hook(keep))
        out = self.model(x)
        for handle in handles:
            handle.remove()
        return out

    def has_bias(self, i):
        bias = self.modules[i].bias
        return bias is not None and bias.requires_grad

    def accumulate(self, mean_loss, cases):
        grads = torch.autograd.grad(mean_loss, list(self.outputs.values()), retain_graph=True)
        rows, self.layer_of_block, samples = [], [], None
        for (i, _), g in zip(self.outputs.items(), grads, strict=True):
            for (a, grid_a), (b, grid_b) in blocks_of(self.modules[i], self.inputs[i], g * cases, self.has_bias(i)):
                samples = a.shape[0] if samples is None else samples
                rows.append((*on_samples(a, grid_a, samples), *on_samples(b, grid_b, samples)))
                self.layer_of_block.append(i)
        self.t += 1
        kept = min(1 - 1 / self.t, self.stat_decay)
        for q, (a_q, grid_aq, g_q, grid_gq) in enumerate(rows):
            for r, (a_r, grid_ar, g_r, grid_gr) in enumerate(rows):
                A = reference.cross_covariance(a_q, grid_aq, a_r, grid_ar, self.downsample) / cases
                G = reference.cross_covariance(g_q, grid_gq, g_r, grid_gr, self.downsample)
                G = G / (samples * math.sqrt(g_q.shape[1] * g_r.shape[1]))
                first = (q, r) not in self.A
                self.A[q, r] = A if first else kept * self.A[q, r] + (1 - kept) * A
                self.G[q, r] = G if first else kept * self.G[q, r] + (1 - kept) * G

    @property
    def size(self):
        return len(self.layer_of_block)

    def coarse_fisher(self):
        """Z F̃ Zᵀ, F̃ formed from all A_qr ⊗ G_qr, Z one row of ones for each layer."""
        B, owners = self.size, self.layer_of_block
        dense = torch.cat([torch.cat([torch.kron(self.A[q, r], self.G[q, r]) for r in range(B)], 1) for q in range(B)])
        widths = [self.A[q, q].shape[0] * self.G[q, q].shape[0] for q in range(B)]
        Z = dense.new_zeros(len(self.modules), dense.shape[0])
        start = 0
        for owner, width in zip(owners, widths, strict=True):
            Z[owner, start : start + width] = 1
            start += width
        return Z @ dense @ Z.T

    def invert(self):
        self.inverses = []
        for q in range(self.size):
            A, G = self.A[q, q], self.G[q, q]
            if self.inverse == "cholesky":
                A, G = (torch.linalg.inv(m) for m in self.damped(A, G))
                self.inverses.append(torch.kron(A, G))
            else:
                fisher = torch.kron(A, G)
                self.inverses.append(torch.linalg.inv(fisher + self.damping * torch.eye(len(fisher)).to(fisher)))
        if self.levels == 2:
            self.coarse = reference.coarse_inverse(self.coarse_fisher(), self.coarse_damping or self.damping)

    def damped(self, A, G):
        trace_a, trace_g = A.trace() / len(A), G.trace() / len(G)
        pi = math.sqrt(trace_a / trace_g) if trace_a > 0 and trace_g > 0 else 1.0
        root = math.sqrt(self.damping)
        return A + pi * root * torch.eye(len(A)).to(A), G + root / pi * torch.eye(len(G)).to(G)

    # -- the step

    def matrices(self, i):
        """∇ of each block of layer i, bias last."""
        module = self.modules[i]
        q = self.layer_of_block.count(i)
        weight = module.weight.grad
        if is_transposed(module):  # (C_in, C_out / q, *kernel): each group's outputs become the rows
            weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(q)])
        matrix = weight.reshape(weight.shape[0], -1)
        if self.has_bias(i):
            matrix = torch.cat([matrix, module.bias.grad.unsqueeze(1)], 1)
        return list(matrix.chunk(q, 0))

    def precondition(self):
        if self.k % self.inv_every == 0:
            self.invert()
        grads = {i: self.matrices(i) for i in range(len(self.modules))}
        steps = {i: [] for i in grads}
        for q, i in enumerate(self.layer_of_block):
            grad = grads[i][len(steps[i])]
            steps[i].append((self.inverses[q] @ grad.T.reshape(-1)).reshape(grad.shape[::-1]).T)
        if self.levels == 2:
            y = torch.stack([sum(m.sum() for m in grads[i]) for i in grads])
            c = self.coarse @ y
            steps = {i: [m + self.coarse_weight * c[i] for m in parts] for i, parts in steps.items()}
        total = 0.0
        for i, parts in steps.items():
            rate = self.rates.get(id(self.modules[i].weight), self.lr)
            total += rate**2 * abs(sum((v * g).sum() for v, g in zip(parts, grads[i], strict=True)))
        self.nu = 1.0 if self.kl_clip is None or total == 0 else min(1.0, math.sqrt(self.kl_clip / total))
        for i, parts in steps.items():
            module, matrix = self.modules[i], torch.cat(parts) * self.nu
            if self.has_bias(i):
                matrix, bias = matrix[:, :-1], matrix[:, -1]
                module.bias.grad = bias.clone()
            if is_transposed(module):
                c_in, c_out, *kernel = module.weight.shape
                parts = matrix.reshape(len(parts), c_out, c_in // len(parts), *kernel)
                matrix = torch.cat([part.transpose(0, 1) for part in parts])
            module.weight.grad = matrix.reshape(module.weight.shape).clone()
        self.k += 1

    @torch.no_grad()
    def sgd(self, settings=None):
        for p in self.model.parameters():
            if p.grad is None:
                continue
            group = {
                "lr": self.lr,
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
                "nesterov": self.nesterov,
                **(settings or {}).get(id(p), {}),
            }
            d = p.grad + group["weight_decay"] * p
            if group["momentum"]:
                first = p not in self.buffers
                self.buffers[p] = d.clone() if first else group["momentum"] * self.buffers[p] + d
                d = d + group["momentum"] * self.buffers[p] if group["nesterov"] else self.buffers[p]
            p -= group["lr"] * d

    def train_step(self, x, distribution_of, loss_of, sgd=None):
        """One iteration; draws labels from torch's global generator, as the optimizer does."""
        self.model.zero_grad()
        out = self.forward(x)
        loss = loss_of(out)
        if self.k % self.cov_every == 0:
            if self.fisher == "mc":
                distribution = distribution_of(out)
                with torch.no_grad():
                    labels = distribution.sample()
                log_prob = distribution.log_prob(labels)
                self.accumulate(-log_prob.mean(), log_prob.numel())
            else:
                self.accumulate(loss, self.cases or x.shape[0])
        loss.backward()
        with torch.no_grad():
            self.precondition()
        (sgd or self.sgd)()
