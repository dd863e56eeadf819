"""KIVI's pages in the blocks of a serving engine. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.paged_pack.reference import (
    Blocks,
    Tables,
    append_reference,
    exact_tables_reference,
    pack_reference,
    starts_reference,
    tables_reference,
)

__all__ = [
    "Blocks", "Tables", "append_reference", "exact_tables_reference", "pack_reference", "starts_reference",
    "tables_reference",
]  # fmt: skip
