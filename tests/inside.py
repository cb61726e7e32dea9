"""What tests look at, or change, inside of a Curvature: views, so that writing into them counts."""

import torch

import kfac2
from kfac2.triangles import packed


def curvature_of(opt):
    preconditioner = getattr(opt, "preconditioner", opt)
    return getattr(preconditioner, "curvature", preconditioner)


def fields(opt, name):
    """The inverse of a layer as it is kept."""
    curvature = curvature_of(opt)
    number = curvature.layout.named(name)
    return {key: curvature.layout.view(stacks, number) for key, stacks in curvature.inverses.fields.items()}


def is_usable(opt, name):
    curvature = curvature_of(opt)
    return bool(curvature.inverses.usable[curvature.layout.named(name)])


def set_factor(opt, name, matrix, factor="A"):
    """Let the next inverse update meet another factor."""
    curvature = curvature_of(opt)
    kept = curvature.layout.view(getattr(curvature.averages, factor), curvature.layout.named(name))
    whole = torch.as_tensor(matrix)
    kept.copy_(packed(whole.reshape(-1, *whole.shape[-2:])))


def directed(model, **options):
    """A KFAC whose steps are in the space of directions from the first one on, which by itself begins with a look."""
    opt = kfac2.KFAC(model, coarse="directions", **options)
    signal = opt._whole_step.directed.signal
    signal.is_new, signal.is_on = False, True
    opt._whole_step.begin()
    return opt
