"""The time in which a caller may take tokens back (assisted decoding), and its end.

transformers says when it begins (`activate_past_recording`) and takes the rejected tokens back after every forward
(`crop`), but it never says that it has done. As long as it may go on, the newest tokens are not packed and no window of
its own slides. So it ends where `generate` begins anew, and where sequences leave.
"""

from __future__ import annotations

from contextlib import suppress

from fivefold.engine.session import REVOCABLE, Session
from fivefold.errors import CacheFullError
from fivefold.interrupts import uninterrupted


def bound(session: Session) -> None:
    """Before a forward: of the tokens of those before it, which nobody took back, only the newest may still go."""
    if session.recording:
        session.settled = max(session.settled, session.length - REVOCABLE)


@uninterrupted
def end(session: Session) -> None:
    """Nobody takes tokens back any more: what was left alone for that is packed and evicted now, as far as the cap has
    room for it."""
    if not session.recording:
        return
    session.check_here()
    session.rollback()
    session.recording = False
    with suppress(CacheFullError), session.atomic():
        session.advance(0)
    if session.companions is not None:
        session.companions.record(False)


@uninterrupted
def crop(session: Session, count: int) -> None:
    """Forget the last `count` tokens in all layers, or raise before any has."""
    session.rollback()
    count = min(count, session.length)
    if count == session.length:
        session.free()
        if session.companions is not None:
            session.companions.reset()
            session.companions.record(session.recording)
        return
    with session.atomic():
        if session.companions is not None:
            session.companions.crop(count, session.length)
        if count:
            for store in session.stores.values():
                store.check_crop(count)
            for store in session.stores.values():
                store.crop(count)
            session.length -= count
    session.settled = session.length
    if session.recording:
        # Without room to pack in, what is due waits for the next chunk.
        with suppress(CacheFullError), session.atomic():
            session.advance(0)
