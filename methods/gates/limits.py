"""How much data a section may hold: what a service sets for files of strangers."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.platform.errors import DataError


@dataclass(frozen=True)
class Limits:
    """Upper bounds that are compared with what a file declares, before its arrays are read.

    Attributes:
        max_cells: cells or spots of one file.
        max_genes: genes of one file.
        max_values: non-zero counts of one matrix.
        max_bytes: all arrays of one file, decompressed; for a table its decompressed text.
    """

    max_cells: int
    max_genes: int
    max_values: int
    max_bytes: int

    def check_shape(self, shown: str, cells: int, genes: int) -> None:
        """Raise DataError where there are too many cells or genes; `shown` names the file."""
        for given, most, what in ((cells, self.max_cells, "cells"), (genes, self.max_genes, "genes")):
            if given > most:
                raise DataError(f"{shown}: {given} {what}; at most {most} are taken. Keep fewer {what}")

    def check_values(self, shown: str, values: int) -> None:
        """Raise DataError where a matrix has too many non-zero counts."""
        if values > self.max_values:
            raise DataError(
                f"{shown}: {values} non-zero counts; at most {self.max_values} are taken. Keep fewer cells or genes"
            )

    def check_bytes(self, shown: str, size: int) -> None:
        """Raise DataError where decompressing takes too many bytes."""
        if size > self.max_bytes:
            raise DataError(
                f"{shown}: needs {size} bytes or more when decompressed; at most {self.max_bytes} are taken. "
                "Keep fewer cells or genes, and leave out images and other arrays"
            )
