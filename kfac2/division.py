"""Who inverts what, of several processes that train one model, and who holds and applies what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac2.fine import Fields, FineSolver
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.options import NUMBER, check_option
from kfac2.processes import Part, Processes

SHARES = ("auto", "all", "inverses", "gradients")
Share = str | float


class Division:
    """Which layers each process inverts: the largest first, each to the one that has least to do so far.

    The processes are a grid (KAISA, Pauloski et al. 2021), row after row: of c columns, rank r stands in row r // c
    and column r % c. A *column* are the holders of a layer's inverse: its owner, who inverts it, sends it along the
    column. In each *row* the holder there multiplies the layer's gradient by it, and sends the result along the row.
    With one column all hold everything; with one row, nobody what another does. Processes of a row have ranks that
    follow each other, so that what is sent at each step may stay within a machine.

    Args:
        processes: that share the work.
        share: `'all'`: each process inverts everything, and nothing is sent. `'inverses'`: one column. `'gradients'`:
            one row. A number: the part of all processes that a column has; 1 and 1/W are the last two. `'auto'`: the
            first or the second, as `settle` is told.

    Attributes:
        share: one of these; a number only where it is none of the words.
        columns: of the grid.
        why: what a sentence about it ends with.

    Raises:
        ValueError: if a number does not split the processes into columns of one size.
    """

    def __init__(self, processes: Processes, share: Share) -> None:
        self._processes = processes
        self.share: Share = "all" if processes.is_alone else _named(share, processes.size)
        self.columns, self.why = 1, ""
        self._column: Part = None
        self._row: Part = None
        # Of the last layout: that itself, what each owner of this column inverts, what each column holds.
        self._known: tuple[Layout, dict[int, Layout], dict[int, Layout]] | None = None

    def settle(self, share: Share, why: str) -> None:
        """Fix who inverts, and make the groups that this needs; all processes call it together, with the same."""
        self.share, self.why = share, why
        size = self._processes.size
        self.columns = _columns(share, size)
        if 1 < self.columns < size:
            ranks = range(size)
            rows = [ranks[begin : begin + self.columns] for begin in range(0, size, self.columns)]
            self._column = self._processes.parts([list(ranks[c :: self.columns]) for c in range(self.columns)])
            self._row = self._processes.parts([list(row) for row in rows])

    def __str__(self) -> str:
        if self._processes.is_alone:
            return ""
        return f"of {self._processes.size} processes {self.holders} hold each inverse, share={self.share!r}: {self.why}"

    @property
    def is_everyones(self) -> bool:
        """Whether each process inverts everything."""
        return self.share == "all"

    @property
    def holds_all(self) -> bool:
        """Whether each process has the inverses of all layers."""
        return self.columns == 1

    @property
    def holders(self) -> int:
        """How many processes have the inverse of a layer."""
        return self._processes.size // self.columns

    @property
    def column(self) -> int:
        """The column of this process."""
        return self._processes.rank % self.columns

    def held(self, layout: Layout) -> Layout:
        """Return the layout of the layers whose inverses this process has."""
        return layout if self.holds_all else self.held_by(layout)[self.column]

    def held_by(self, layout: Layout) -> dict[int, Layout]:
        """Return the layout of the layers that each column holds."""
        return self._layouts(layout)[1]

    def owned_by(self, layout: Layout) -> dict[int, Layout]:
        """Return the layout of the layers that each owner of this process's column inverts, by rank."""
        return self._layouts(layout)[0]

    def _layouts(self, layout: Layout) -> tuple[dict[int, Layout], dict[int, Layout]]:
        if self._known is None or self._known[0] is not layout:
            owners = owners_of([work_of(layer) for layer in layout.layers], self._processes.size)
            mine = [r for r in sorted(set(owners)) if r % self.columns == self.column]
            owned = {r: [layer for layer, o in zip(layout.layers, owners, strict=True) if o == r] for r in mine}
            held = {
                c: [layer for layer, o in zip(layout.layers, owners, strict=True) if o % self.columns == c]
                for c in range(self.columns)
            }
            owned_layouts, held_layouts = (
                {key: Layout(layers, layout.device) for key, layers in own.items()} for own in (owned, held)
            )
            self._known = layout, owned_layouts, held_layouts
        return self._known[1:]

    def send_along_column(self, flat: Tensor, owner: int) -> Callable[[], None]:
        """Begin to send fields of an owner's layers to the others of this column, see `Processes.send`."""
        return self._processes.send("inverses", flat, owner, self._column)

    def send_to_all(self, flat: Tensor, column: int) -> Callable[[], None]:
        """Begin to send fields of all layers that a column holds to all processes, see `Processes.send`."""
        return self._processes.send("inverses", flat, column)  # from the first row

    def apply_held(
        self, layout: Layout, fine: FineSolver, fields: Fields, matrices: Tensor, directions: Tensor
    ) -> None:
        """Multiply by the inverses that each process holds, and bring the directions to all of its row.

        Args:
            layout: of all layers.
            fine: the solver.
            fields: that this process holds, and what is derived of them.
            matrices: gradients of all layers.
            directions: where the result is written.
        """
        parts = self.held_by(layout)
        mine = parts[self.column]
        gradients, work, out = (torch.zeros(mine.size, dtype=mine.dtype, device=mine.device) for _ in range(3))
        if mine.layers:
            _copy_matrices(mine, gradients, layout, matrices, back=True)
            fine.apply(fields, *(mine.of_batches(m) for m in (gradients, work, out)))
        first = self._processes.rank - self.column
        flats, waits = {}, []
        for column, part in parts.items():
            if part.layers:
                empty = torch.empty(part.size, dtype=part.dtype, device=part.device)
                flats[column] = out if part is mine else empty
                waits.append(self._processes.send("preconditioned gradients", flats[column], first + column, self._row))
        for wait in waits:
            wait()
        for column, flat in flats.items():
            _copy_matrices(parts[column], flat, layout, directions)


def _copy_matrices(part: Layout, matrices: Tensor, whole: Layout, target: Tensor, back: bool = False) -> None:
    """Copy the matrices of some layers to where they lie among all; or `back` from there."""
    here = [part.padded_matrix(matrices, i) for i in range(len(part.layers))]
    there = [whole.padded_matrix(target, whole.number(layer)) for layer in part.layers]
    torch._foreach_copy_(*((here, there) if back else (there, here)))


def check_share(share: object, inverse: str) -> None:
    """Check `share=`, see `KFAC`, as far as that is possible without knowing how many processes there are."""
    words = ", ".join(map(repr, SHARES))
    check_option(
        "share",
        share,
        (str, *NUMBER),
        lambda v: v in SHARES if isinstance(v, str) else 0 < v <= 1,
        f"one of {words}, or a number above 0 and at most 1: the part of the processes that hold each inverse",
    )
    if inverse == "ekfac" and (share == "gradients" or (not isinstance(share, str) and share != 1)):
        raise ValueError(
            f"share must be 'all', 'inverses' or 1 with inverse='ekfac', got {share!r}: each process looks at its rows "
            "in the eigenbases of all layers"
        )


def _named(share: Share, size: int) -> Share:
    """Return the word for a number that is one, and check the number."""
    if isinstance(share, str):
        return share
    holders = round(share * size)
    if abs(share * size - holders) > 1e-6 * size or not holders or size % holders:
        wanted = ", ".join(f"{h / size:.4g}" for h in range(1, size + 1) if size % h == 0)
        raise ValueError(
            f"share must be a part of the {size} processes that splits them into groups of one size, one of {wanted}, "
            f"got {share!r}"
        )
    return {1: "gradients", size: "inverses"}.get(holders, holders / size)


def _columns(share: Share, size: int) -> int:
    if isinstance(share, str):
        return size if share == "gradients" else 1
    return size // round(share * size)


def work_of(layer: Layer) -> int:
    """Return n³ of both factors of a layer, over all its blocks."""
    blocks, d_out, d_in = layer.matrix_shape
    return blocks * (d_in**3 + d_out**3)


def owners_of(work: Sequence[float], size: int) -> list[int]:
    """Return the rank that each piece of work goes to: the largest first, to the one that has least so far."""
    loads, owners = [0.0] * size, [0] * len(work)
    for number in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += work[number]
    return owners
