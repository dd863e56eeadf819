"""KIVI's pages in the blocks of a serving engine. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.paged_pack.reference import (
    NULL,
    UNIT,
    Blocks,
    Place,
    Tables,
    append_reference,
    exact_columns,
    gather_reference,
    pack_reference,
    seen_from,
    starts_reference,
    tables_reference,
)

__all__ = [
    "NULL", "UNIT", "Blocks", "Place", "Tables", "append_reference", "exact_columns", "gather_reference",
    "pack_reference", "seen_from", "starts_reference", "tables_reference",
]  # fmt: skip
