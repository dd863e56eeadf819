"""Before a decoding step: which layers' steps are one call of a kernel each, and room for their newest tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fivefold.attention.picks import Picked
from fivefold.attention.tables import tables_of
from fivefold.attention.watch import unsteady
from fivefold.engine.picks import Reads
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache


def opened(
    stores: dict[int, LayerCache], banks: Sequence[Bank], whys: Mapping[int, str | None], reads: Reads, revocable: int
) -> frozenset[int]:
    """The layers whose steps are a kernel's; every row of theirs has a slot for its newest token now, and tables that
    say so. whys: see `Session.why_not_fused`; revocable: as `Session.revocable`."""
    fused = {index for index, why in whys.items() if why is None}
    steady = not unsteady(stores, revocable)
    if not steady:
        fused -= {index for index, store in stores.items() if store.known}
        for bank in banks:
            bank.settle()
    picked = Picked(reads) if reads.roles else None
    for bank in banks:
        layers = [store for index, store in stores.items() if index in fused and store.bank is bank]
        if layers:
            bank.open(bank.rows_of(layers))
            tables = tables_of(bank)
            tables.follow_step(picked, steady)
            tables.update()
    return frozenset(fused)
