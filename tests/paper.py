"""kfac2 at the settings that most tests were written for: the paper's plain method, whatever the defaults are."""

import kfac2

SCHEDULE = {
    "levels": 2,
    "damping": 1e-3,
    "kl_clip": 1e-2,
    "cov_every": 10,
    "inv_every": 100,
    "burn_in": 0,
    "relative_damping": False,
}
PAPER = {**SCHEDULE, "momentum": 0.9, "kl_bound": None, "max_change": None, "rest": "sgd"}


class KFAC(kfac2.KFAC):
    def __init__(self, model, lr=1e-2, **options):
        super().__init__(model, lr, **{**PAPER, **options})


class Preconditioner(kfac2.Preconditioner):
    def __init__(self, model, **options):
        super().__init__(model, **{**SCHEDULE, **options})


def Curvature(model, **options):
    return kfac2.Curvature(model, **{"levels": 2, **options})
