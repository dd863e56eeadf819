"""Ctrl-C between any two lines of the engine: what was under way has happened or not, and no page is lost or has an
owner too many. A real signal is raised, where Python looks for one next."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import KERNELS
from conversations import Conversation
from fivefold.interrupts import Uninterrupted, uninterrupted
from recipes import RECIPES, SHAPE, written
from test_transactions import STEPS, busiest, held, spread
from test_written_over import shown

pytestmark = pytest.mark.usefixtures("one_thread", "ctrl_c")
SOURCE = Path(fivefold.__file__).parent
# It raises where it should itself; what is below it has no state that anybody would miss.
NOT_IN = (str(SOURCE / "interrupts.py"), str(SOURCE / "kernels"))
POINTS, LAST = 12, 40
"""How many lines of a forward are tried, and how many of the last ones, where it is committed."""


class Interrupts:
    """Ctrl-C at a line of the engine, counted from 1; at None lines are only counted."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.raised = at, 0, ""

    def __enter__(self) -> Interrupts:
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def called(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self.line if name.startswith(str(SOURCE)) and not name.startswith(NOT_IN) else None

    def line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.raised = f"{Path(frame.f_code.co_filename).relative_to(SOURCE)}:{frame.f_lineno}"
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self.line


def points(count: int, seed: str) -> list[int]:
    """Lines to try, the last ones first."""
    return sorted({*spread(count, POINTS, seed), *range(max(1, count - LAST), count + 1)}, reverse=True)


def held_pages(*caches: Any) -> list[int]:
    """How many owners the pages of each pool have, all together."""
    pools = {id(pool): pool for cache in caches for pool in cache.session.pools}
    return [sum(int(slab.references.sum()) for _, slab in pool._live()) for pool in pools.values()]


@pytest.mark.parametrize("name", RECIPES)
def test_ctrl_c_in_a_step(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    recipe, talk = written(name, model), Conversation.of(158, *[1] * STEPS, 1)
    at = busiest(model, recipe, talk)

    def before() -> Any:
        cache = fivefold.compress(model, recipe)
        for number in range(at):
            talk.give(number, model, cache)
        shown(talk, at, model, cache)
        return cache

    good, bad, wrong, late = before(), before(), list[str](), 0
    said = shown(talk, at, model, good)
    want = talk.give(at, model, good, counting := Interrupts())
    assert counting.count > 200
    for point in points(counting.count, name):
        fault, then = Interrupts(point), (held(bad), held_pages(bad))
        try:
            found = talk.give(at, model, bad, fault)
        except KeyboardInterrupt:
            assert bad.session.change is None, f"{fault.raised}: the change is under way still"
            if bad.get_seq_length() != sum(talk.sizes[:at]):
                wrong.append(f"{fault.raised}: the token is stored")
                bad = before()
            elif (held(bad), held_pages(bad)) != then:
                wrong.append(f"{fault.raised}: {then} -> {held(bad), held_pages(bad)}")
            elif not torch.equal(shown(talk, at, model, bad), said):
                wrong.append(f"{fault.raised}: committed tokens have changed")
        else:
            assert torch.equal(found, want)
            if fault.raised:  # too late for this one, it stops the next; else there were fewer lines
                late += 1
                with pytest.raises(KeyboardInterrupt):
                    talk.give(at + 1, model, bad)
            assert torch.equal(talk.give(at + 1, model, bad), shown(talk, at + 1, model, good))
            bad = before()
    assert not wrong, "\n".join(wrong)
    assert late
    assert torch.equal(talk.give(at, model, bad), want)
    for cache in (good, bad):
        cache.free()
        assert not any(held_pages(cache))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h2o", "duo+kivi"])
def test_ctrl_c_in_a_step_as_a_graph(tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A first step, which is captured, and one that is launched before it is begun."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model, talk = tiny(**SHAPE), Conversation.of(158, 1, 1, 1, 1, lengths=(158, 158))

    def before(at: int) -> Any:
        cache = fivefold.compress(model, written(name, model), cuda_graph=True)
        for number in range(at):
            talk.give(number, model, cache)
        return cache

    for at in (1, 3):
        good, bad = before(at), before(at)
        want = talk.give(at, model, good, counting := Interrupts())
        after = talk.give(at + 1, model, good)
        for point in points(counting.count, name)[::8]:
            fault, then = Interrupts(point), held_pages(bad)
            try:
                found = talk.give(at, model, bad, fault)
            except KeyboardInterrupt:
                assert bad.session.change is None, fault.raised
                assert bad.get_seq_length() == sum(talk.sizes[:at]), fault.raised
                # Those that were taken ahead may be given back.
                assert all(now <= old for now, old in zip(held_pages(bad), then)), fault.raised
            else:
                assert torch.equal(found, want), fault.raised
                uninterrupted._late = None
                assert torch.equal(talk.give(at + 1, model, bad), after), fault.raised
                bad = before(at)
        assert torch.equal(talk.give(at, model, bad), want)
        assert torch.equal(talk.give(at + 1, model, bad), after)
        for cache in (good, bad):
            cache.free()
            assert not any(held_pages(cache))
    fivefold.restore(model)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "fork": lambda cache, other: cache.fork(),
    "reorder": lambda cache, other: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache, other: cache.batch_repeat_interleave(2),
    "join": lambda cache, other: cache.join(other),
    "take": lambda cache, other: cache.take([1]),
    "drop": lambda cache, other: cache.drop([0]),
    "offload": lambda cache, other: cache.offload(),
    "restore": lambda cache, other: (cache.offload(), cache.restore()),
    "reset": lambda cache, other: cache.reset(),
}


@pytest.mark.parametrize("name", ["kivi-residual", "h2o+kivi", "minicache"])
@pytest.mark.parametrize("change", CHANGES)
def test_ctrl_c_in_another_change(tiny: Any, change: str, name: str) -> None:
    model = tiny(**SHAPE)
    recipe, talk = written(name, model), Conversation.of(158, 1, lengths=(158, 120))

    def two() -> tuple[Any, Any]:
        cache = fivefold.compress(model, recipe)
        talk.give(0, model, cache)
        return cache, cache.fork()

    both = two()
    with Interrupts() as counting:
        made = CHANGES[change](*both)  # not let go of here, which would be lines, too
    reached = 0
    for point in points(counting.count, change)[::4]:
        cache, other = two()
        before, fault, made = (cache.batch, other.batch), Interrupts(point), None
        try:
            with fault:
                made = CHANGES[change](cache, other)
        except KeyboardInterrupt:
            pass
        reached += bool(fault.raised)
        uninterrupted._late = None
        if cache.offloaded:
            cache.restore()
        batch = cache.batch + other.batch + (made.batch if change == "take" and made is not None else 0)
        if made is None and change not in ("drop", "repeat", "reset", "take"):
            assert batch == sum(before), fault.raised
        for one in (cache, other):
            if one.batch:
                with torch.inference_mode():
                    model(torch.full((one.batch, 1), 5), past_key_values=one)
        del made
        cache.free()
        other.free()
        assert not any(held_pages(cache, other)), fault.raised
    assert reached > 3


# -- what does it -------------------------------------------------------------------------------------------


def test_it_waits_and_comes_behind_the_outermost() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), uninterrupted:
        with uninterrupted:
            signal.raise_signal(signal.SIGINT)
            steps.append("inner")
        steps.append("outer")
    assert steps == ["inner", "outer"]


def test_it_comes_where_nothing_is_half_done() -> None:
    with uninterrupted:
        uninterrupted.passing()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            uninterrupted.passing()
        uninterrupted.passing()


def test_what_comes_too_late_stops_the_next() -> None:
    with uninterrupted.call():
        with uninterrupted:
            uninterrupted.done()
        signal.raise_signal(signal.SIGINT)  # the call has not returned
    with pytest.raises(KeyboardInterrupt):
        uninterrupted.begin()
    uninterrupted.begin()


def test_somebody_elses_handler_is_asked_once() -> None:
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        with uninterrupted:
            signal.raise_signal(signal.SIGINT)
            uninterrupted.done()
            assert not asked
        assert asked == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with uninterrupted:
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_pass_through() -> None:
    """Only the main thread may set a handler."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with uninterrupted, uninterrupted.call():
                uninterrupted.passing()
                uninterrupted.done()
            uninterrupted.begin()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_failure_gives_the_handler_back() -> None:
    one = Uninterrupted()
    with pytest.raises(ValueError, match="x"), one.call(), one:
        one.done()
        raise ValueError("x")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
