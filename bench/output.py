"""Files that are written whole or not at all, and Markdown tables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def into_place(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; what is there at the end takes the place of `path` in one move.

    The folder is made where it is missing. After an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with into_place(path) as part:
        part.write_text(text)


def slug(title: str) -> str:
    """Make a title part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace(",", "")).strip("-")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table whose columns are aligned for reading as it is."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
