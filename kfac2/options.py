"""The hyper-parameters of K-FAC, checked when they are set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch

from kfac2.fine import SOLVERS
from kfac2.ops.cross_layer_sums import DOWNSAMPLE

_Rule = tuple[type | tuple[type, ...], Callable[[Any], bool], str]


def _one_of(*words: object) -> _Rule:
    return type(words[0]), lambda value: value in words, "one of " + ", ".join(repr(word) for word in words)


NUMBER = (int, float)
_ABOVE_0: _Rule = (NUMBER, lambda v: 0 < v < math.inf, "a number above 0")
_OPTIONAL = (*NUMBER, type(None))
_RULES: dict[str, _Rule] = {
    "damping": (
        (*NUMBER, str),
        lambda v: v == "auto" if isinstance(v, str) else 0 < v < math.inf,
        "a number above 0, or 'auto'",
    ),
    "kl_clip": (_OPTIONAL, lambda v: v is None or 0 < v < math.inf, "a number above 0, or None"),
    "levels": _one_of(1, 2),
    "coarse": (
        (str, type(None)),
        lambda v: v in (None, "ones", "directions"),
        "'ones', 'directions', or None",
    ),
    "coarse_samples": ((int, type(None)), lambda v: v is None or v >= 1, "an int of at least 1, or None"),
    "inverse": _one_of(*SOLVERS),
    "fisher": _one_of("mc", "exact", "empirical"),
    "stat_decay": (NUMBER, lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "cov_every": (int, lambda v: v >= 1, "an int of at least 1"),
    "inv_every": (int, lambda v: v >= 1, "an int of at least 1"),
    "downsample": _one_of(*DOWNSAMPLE),
    "coarse_weight": (NUMBER, math.isfinite, "a finite number"),
    "coarse_damping": (_OPTIONAL, lambda v: v is None or v > 0, "a number above 0, or None"),
    "coarse_max_groups": (int, lambda v: v >= 1, "an int of at least 1"),
    "inverse_dtype": (
        (torch.dtype, type(None)),
        lambda v: v in (None, torch.float32, torch.float64),
        "torch.float32, torch.float64, or None",
    ),
    "relative_damping": (bool, lambda v: True, "True or False"),
    "max_change": (_OPTIONAL, lambda v: v is None or 0 < v < math.inf, "a number above 0, or None"),
    "burn_in": (int, lambda v: v >= 0, "an int of at least 0"),
    "kl_bound": (_OPTIONAL, lambda v: v is None or 0 < v < math.inf, "a number above 0, or None"),
    "cases": (
        (int, str, type(None)),
        lambda v: v in (None, "rows", "samples") or (isinstance(v, int) and v >= 1),
        "an int of at least 1, 'rows', 'samples', or None",
    ),
    "samples": (int, lambda v: v >= 1, "an int of at least 1"),
    "batch_dim": _one_of(0, 1),
    "check_every": (int, lambda v: v >= 0, "an int of at least 0"),
}
SCHEDULED = ("damping", "kl_clip", "cov_every", "inv_every")  # may be callables of the iteration
STRUCTURAL = ("levels", "coarse", "inverse", "fisher", "downsample", "coarse_max_groups")  # state depends on them

_Any = TypeVar("_Any", bound="CurvatureOptions")


@dataclass
class CurvatureOptions:
    """The options of `Curvature`; see `KFAC` for what each means.

    All but `levels`, `coarse`, `inverse`, `fisher`, `downsample` and `coarse_max_groups` may be set during training; a
    value is checked when it is set.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is out of its range, or a fixed option is set again.
    """

    levels: int = 1
    coarse: str | None = None
    inverse: str = "cholesky"
    fisher: str = "mc"
    stat_decay: float = 0.95
    downsample: str = "nearest"
    coarse_weight: float = 1.0
    coarse_damping: float | None = None
    coarse_max_groups: int = 32
    coarse_samples: int | None = None
    inverse_dtype: torch.dtype | None = None
    cases: int | str | None = None
    samples: int = 1
    batch_dim: int = 0
    check_every: int = 100

    _makes_updates: ClassVar[bool] = False

    @classmethod
    def of(cls: type[_Any], options: Mapping[str, Any]) -> _Any:
        """Make options of keyword arguments; one that is unknown is a TypeError that names those there are."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(f"{unknown[0]} is no option of kfac2; the options are {', '.join(names)}")
        return cls(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        names = [field.name for field in fields(self)]
        if name not in names:
            raise AttributeError(f"kfac2 has no option {name!r}; the options are {', '.join(names)}")
        if not (name in SCHEDULED and callable(value)):
            check_option(name, value, *_RULES[name])
        if name in STRUCTURAL and name in self.__dict__ and self.__dict__[name] != value:
            raise ValueError(f"{name} is fixed at construction ({self.__dict__[name]!r}), got {value!r}")
        self._check_together({**self.__dict__, name: value})
        super().__setattr__(name, value)

    def _check_together(self, values: Mapping[str, Any]) -> None:
        """Check what depends on several values, of those that are there."""
        if values.get("damping") == "auto" and not values.get("relative_damping", True):
            raise ValueError("damping must be a number above 0, or a callable, with relative_damping=False, got 'auto'")
        if values.get("coarse") == "directions" and values.get("levels") == 2:
            raise ValueError(
                "levels must be 1 with coarse='directions', got 2, which is the paper's space, coarse='ones': leave "
                "one of the two out"
            )
        if values.get("coarse") != "directions":
            if values.get("coarse_damping") == math.inf:
                raise ValueError("coarse_damping must be finite, but with coarse='directions', got inf")
        elif not self._makes_updates:
            raise ValueError(
                "coarse must be None or 'ones' without an optimizer, got 'directions', which has the last update in "
                "it: take KFAC, which makes the updates"
            )
        elif values.get("fisher") == "empirical":
            raise ValueError(
                "fisher must be 'mc' or 'exact' with coarse='directions', got 'empirical', whose labels are those that "
                "the step is to fit"
            )

    def with_saved(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options by name with values of a state, callables too; those of other schedules are left out.

        Raises what setting them does; nothing is changed.
        """
        names = self.as_dict()
        known = {name: value for name, value in values.items() if name in names}
        return vars(type(self)(**{**vars(self), **known})).copy()

    @property
    def space(self) -> str | None:
        """The coarse space: `coarse`, or the paper's with `levels=2`."""
        return "ones" if self.coarse is None and self.levels == 2 else self.coarse

    @property
    def follows_spread(self) -> bool:
        """Whether the damping wants the spread of the factors."""
        return False

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class Options(CurvatureOptions):
    """The options of `Preconditioner`: those of `Curvature`, a schedule, and a limit of each layer's direction.

    `damping`, `kl_clip`, `cov_every` and `inv_every` may be callables that take the iteration, from 0.
    """

    damping: float | str | Callable[[int], float] = "auto"
    kl_clip: float | Callable[[int], float | None] | None = 0.1
    cov_every: int | Callable[[int], int] = 5
    inv_every: int | Callable[[int], int] = 10
    burn_in: int = 10
    relative_damping: bool = True
    max_change: float | None = None

    @property
    def follows_spread(self) -> bool:
        """Whether the damping wants the spread of the factors."""
        return self.damping == "auto"

    def at(self, name: str, iteration: int) -> Any:
        """Return the value of an option in an iteration; what a callable returns is checked."""
        value = getattr(self, name)
        if name in SCHEDULED and callable(value):
            value = value(iteration)
            check_option(f"{name}({iteration})", value, *(_ABOVE_0 if name == "damping" else _RULES[name]))
        return value

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name, without those that are callables."""
        return {name: value for name, value in super().as_dict().items() if not callable(value)}


@dataclass
class OptimizerOptions(Options):
    """The options of `KFAC`: those of `Preconditioner`, with a limit of each layer, and a bound on the whole step."""

    _makes_updates: ClassVar[bool] = True

    kl_bound: float | None = 0.5
    max_change: float | None = 0.02


def check_option(
    name: str, value: Any, types: type | tuple[type, ...], allowed: Callable[[Any], bool], wanted: str
) -> None:
    """Check one value; the error names it, says what it got and what would be right."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    if not allowed(value):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_damping(value: Any) -> None:
    """Check λ."""
    check_option("damping", value, *_ABOVE_0)
