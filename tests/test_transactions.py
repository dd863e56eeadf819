"""A forward is a transaction: whatever breaks it off, the cache is as it was before.

A failure is put into one forward of a conversation; then the same input is given again. Everything that follows must
equal, bit for bit, what a cache says that never failed, and hold the same bytes.

FIVEFOLD_FAULT_POINTS: at how many points of a forward each test lets it fail (5).
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fivefold
from conversations import Conversation, text
from fivefold.errors import CacheFullError, FivefoldError, NonFiniteError
from recipes import PACKING, RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = int(os.environ.get("FIVEFOLD_FAULT_POINTS", "5"))
TAIL = (1, 33, 1)  # what follows
STEPS = 36
# Conversations, and the chunk that fails. None: the step that does most, see `busiest`.
SITUATIONS: dict[str, tuple[Conversation, int | None]] = {
    "first-prompt": (Conversation.of(222, *TAIL), 0),
    "second-turn": (Conversation.of(150, 90, *TAIL), 1),
    "step": (Conversation.of(150, 1, *TAIL), 1),
    "packing-step": (Conversation.of(254, *[1] * STEPS, *TAIL), None),
    "ragged-prompt": (Conversation.of(150, 1, 33, lengths=(150, 61, 97)), 0),
    "ragged-second-turn": (Conversation.of(150, 40, 1, 1, lengths=(61, 150, 97)), 1),
}
# What a report says about tokens: none of it may change where a forward fails. Free pages may be more (they are no
# leak), and indices that are worked out from tables may be there or not.
HELD = (
    "tokens", "exact", "codes", "scales", "other", "statistics", "slack", "forks", "sliding", "exact_equivalent",
    "kept_tokens", "bits",
)  # fmt: skip


class Fault(BaseException):
    """As Ctrl-C, which may come anywhere."""


# -- failures ---------------------------------------------------------------------------------------------


class FailsAt(TorchDispatchMode):
    """Raises at a tensor operation, counted from 1; at None none fails, they are only counted."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count, self.raised = at, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            self.raised = str(func)
            raise Fault(self.raised)
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return f"operation {self.at} ({self.raised})"


class FailsInModule(AbstractContextManager):  # type: ignore[type-arg]
    """Raises once, when a module has been called."""

    def __init__(self, module: torch.nn.Module, error: type[BaseException]) -> None:
        self.module, self.error, self.raised = module, error, ""

    def __enter__(self) -> FailsInModule:
        self.raised = ""
        self.hook = self.module.register_forward_hook(self.fail)
        return self

    def fail(self, module: Any, args: Any, out: Any) -> Any:
        self.raised = str(self)
        raise self.error("on purpose")

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def __str__(self) -> str:
        return f"{self.error.__name__} in {type(self.module).__name__}"


class FailsToAllocate(AbstractContextManager):  # type: ignore[type-arg]
    """`torch.empty` has no memory when Fivefold calls it, the call `at`, counted from 1; at None calls are counted."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.raised, self.patch = at, 0, "", pytest.MonkeyPatch()

    def __enter__(self) -> FailsToAllocate:
        self.patch.setattr(torch, "empty", self.empty(torch.empty))
        return self

    def empty(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("fivefold."):
                self.count += 1
                if self.count == self.at:
                    self.raised = str(self)
                    raise torch.OutOfMemoryError("on purpose")
            return real(*args, **kwargs)

        return empty

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def __str__(self) -> str:
        return f"allocation {self.at}"


class Overflows(FailsInModule):
    """Makes one number that a module says infinite, once."""

    def fail(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.raised = str(self)
        out = out.clone()
        out[-1, -1, 5] = float("inf")
        return out


# -- conversations with a failure -------------------------------------------------------------------------


@dataclass
class Outcome:
    """Logits of each chunk, the report at the end, and what is wrong in words."""

    logits: list[torch.Tensor] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def held(cache: Any) -> dict[str, Any]:
    report = cache.report().as_dict()
    return {name: report.get(name) for name in HELD}


def run(
    model: Any, recipe: str, talk: Conversation, at: int, faults: Sequence[Any] = (), errors: Any = Fault
) -> Outcome:
    """A conversation whose chunk `at` fails as each of `faults` says, one after another, before it is taken. After
    every second failure the report is looked at; that should be harmless, and is left out else in case it is not."""
    cache, out = fivefold.compress(model, recipe), Outcome()
    empty = unlearned(cache)
    for number in range(len(talk)):
        taken = None
        for turn, fault in enumerate(faults if number == at else ()):
            before = {} if turn % 2 else held(cache)
            try:
                taken = talk.give(number, model, cache, fault)
            except errors:
                if not fault.raised:  # something of its own
                    raise
                if before and held(cache) != before:
                    out.wrong.append(f"after {fault} there is {_changed(before, held(cache))}")
            else:
                if fault.raised:
                    out.wrong.append(f"{fault} was swallowed")
                break
        out.logits.append(talk.give(number, model, cache) if taken is None else taken)
    out.report = cache.report().as_dict()
    cache.free()
    if unlearned(cache) > empty:
        out.wrong.append(f"{unlearned(cache)} bytes are left after free(), and a new cache has {empty}")
    return out


def unlearned(cache: Any) -> int:
    """All bytes but those of what codecs know of a model, for which there is a test of its own."""
    report = cache.report()
    return report.total - getattr(report, "learned", 0)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    parts = [f"{name} {before.get(name)} -> {after.get(name)}" for name in after if before.get(name) != after[name]]
    return ", ".join(parts)


def differences(got: Outcome, want: Outcome) -> list[str]:
    """What is wrong with a conversation in words, against one without a failure."""
    wrong = list(got.wrong)
    for number, (mine, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        if not torch.equal(mine, other):
            wrong.append(f"logits of chunk {number} differ by up to {float((mine - other).abs().max()):.2g}")
            break
    # What was allocated for nothing may stay, to be used; indices that were worked out may be gone, and what the whole
    # process shares is no cache's.
    loose = {"free", "total", "ratio", "process"}
    if got.report.get("tables", 0) < want.report.get("tables", 0):
        loose.add("tables")
    mine, other = ({name: x.report[name] for name in x.report if name not in loose} for x in (got, want))
    if mine != other:
        wrong.append(f"the report has {_changed(other, mine)}")
    return wrong


def spread(count: int, points: int, seed: str) -> list[int]:
    """Numbers from 1 to `count`: one at random in each of equal parts, and the last."""
    if count <= points:
        return list(range(1, count + 1))
    rng, parts = random.Random(seed), max(1, points - 1)
    return sorted({1 + int(count * (part + rng.random()) / parts) for part in range(parts)} | {count})


@dataclass
class Case:
    """What a recipe does in a situation on a model: the conversation, the chunk that fails, of how many operations it
    is, and how all goes without a failure."""

    model: Any
    recipe: str
    talk: Conversation
    at: int
    count: int
    want: Outcome

    def wrong(self, *faults: Any, errors: Any = Fault) -> list[str]:
        """What is wrong, in words, where the chunk fails as `faults` say, one after another."""
        try:
            found = differences(run(self.model, self.recipe, self.talk, self.at, faults, errors), self.want)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        return [f"{', '.join(map(str, faults))}: {what}" for what in found]


_cases: dict[tuple[Any, ...], Case] = {}


def case(model: Any, recipe: str, situation: str) -> Case:
    key = (model, recipe, situation)
    if key not in _cases:
        talk, at = SITUATIONS[situation]
        if at is None:
            at = busiest(model, recipe, talk)
            talk = talk.then(at, *TAIL)
        want = run(model, recipe, talk, at, [mode := FailsAt()])
        _cases[key] = Case(model, recipe, talk, at, mode.count, want)
    assert not _cases[key].want.wrong, _cases[key].want.wrong
    return _cases[key]


def busiest(model: Any, recipe: str, talk: Conversation) -> int:
    """Of the steps in which tokens leave the exact tier, which are packed then or given up, the first of those that do
    most. Where in no step any do, of all steps."""
    cache, counts, exact = fivefold.compress(model, recipe), [], []
    for number in range(STEPS + 1):
        talk.give(number, model, cache, mode := FailsAt())
        counts.append(mode.count)
        exact.append(cache.report().exact)
    steps = range(1, STEPS + 1)
    leave = [step for step in steps if exact[step] < exact[step - 1]] or steps
    return next(step for step in leave if counts[step] >= 0.9 * max(counts[other] for other in leave))


def check_points(case: Case, fault: Callable[[int], Any], count: int, seed: str, errors: Any = Fault) -> None:
    """Let a case fail at points spread over the chunk, of which there are `count`, up to five in one conversation; if
    something is wrong, at each alone. fault(point) is the failure."""
    *points, last = spread(count, POINTS, seed) or [0]
    random.Random(seed).shuffle(points)
    points += [last] if last else []  # once the others have failed, there may be fewer operations, and none fails there
    wrong = []
    for some in (points[first : first + 5] for first in range(0, len(points), 5)):
        found = case.wrong(*map(fault, some), errors=errors)
        alone = [what for point in some for what in case.wrong(fault(point), errors=errors)] if found else []
        wrong += alone or found
    assert not wrong, f"{len(wrong)} faults at {len(points)} points of {count}:\n" + "\n".join(wrong)


# -- the tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_failure_at_any_operation(tiny: Any, name: str, situation: str) -> None:
    model = tiny(**SHAPE)
    cased = case(model, written(name, model), situation)
    assert cased.count > 50
    check_points(cased, FailsAt, cased.count, f"{name} {situation}")


SLIDING: dict[str, dict[str, Any]] = {
    "gemma3": {"family": "gemma3_text"},
    "qwen2": {
        "family": "qwen2", "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("situation", ["first-prompt", "second-turn", "packing-step", "ragged-second-turn"])
@pytest.mark.parametrize("name", ["full", "streaming+kivi", "h2o"])
@pytest.mark.parametrize("shape", SLIDING)
def test_a_failure_beside_sliding_layers(tiny: Any, shape: str, name: str, situation: str) -> None:
    cased = case(tiny(**SLIDING[shape]), RECIPES[name], situation)
    check_points(cased, FailsAt, cased.count, f"{shape} {name} {situation}")


PLACES: tuple[tuple[Callable[[Any], torch.nn.Module], type[BaseException]], ...] = (
    (lambda model: model.model.layers[-1].input_layernorm, KeyboardInterrupt),
    (lambda model: model.model.layers[-1].mlp, RuntimeError),
    (lambda model: model.lm_head, RuntimeError),
)


def check_places(case: Case) -> list[str]:
    """What is wrong, in words, where modules fail one after another; if anything is, where each does alone."""
    faults = [FailsInModule(find(case.model), error) for find, error in PLACES]
    errors = tuple({error for _, error in PLACES})
    found = case.wrong(*faults, errors=errors)
    alone = [what for fault in faults for what in case.wrong(fault, errors=errors)] if found else []
    return alone or found


@pytest.mark.parametrize("name", RECIPES)
def test_a_failure_in_a_module(tiny: Any, name: str) -> None:
    """Behind the last attention, too: the logits have not come, so the tokens must not stay."""
    model, wrong = tiny(**SHAPE), []
    for situation in ("second-turn", "packing-step"):
        found = check_places(case(model, written(name, model), situation))
        wrong += [f"{situation}: {what}" for what in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("shape", SLIDING)
def test_a_failure_in_a_module_beside_sliding_layers(tiny: Any, shape: str) -> None:
    model, wrong = tiny(**SLIDING[shape]), []
    for name in ("full", "streaming+kivi"):
        for situation in ("second-turn", "step"):
            wrong += check_places(case(model, RECIPES[name], situation))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", RECIPES)
def test_memory_that_cannot_be_had(tiny: Any, name: str) -> None:
    model, failures = tiny(**SHAPE), 0
    for situation in ("first-prompt", "packing-step"):
        cased = case(model, written(name, model), situation)
        again = run(model, cased.recipe, cased.talk, cased.at, [counting := FailsToAllocate()])
        assert not differences(again, cased.want), "two caches that never failed differ"
        check_points(cased, FailsToAllocate, counting.count, f"{name} {situation}", torch.OutOfMemoryError)
        failures += counting.count
    assert failures, "Fivefold allocates nothing with torch.empty any more: let something else fail here"


def smallest_cap(model: Any, recipe: str, talk: Conversation) -> int:
    """The smallest cap in bytes, to 8 KiB, that the first chunk gets through under."""
    low, high = 0, 1 << 21
    while high - low > 8192:
        middle = (low + high) // 2
        try:
            talk.give(0, model, fivefold.compress(model, recipe, max_bytes=middle))
            high = middle
        except CacheFullError:
            low = middle
    return high


@pytest.mark.parametrize("name", RECIPES)
def test_a_full_cache(tiny: Any, name: str) -> None:
    """A refused chunk leaves no trace: a cache that was refused things goes on as one that was not, under one cap."""
    model = tiny(**SHAPE)
    recipe, talk = written(name, model), Conversation.of(190, 1, 1, 30, 1)
    cap = smallest_cap(model, recipe, talk) + 40_000
    plain, refused = (fivefold.compress(model, recipe, max_bytes=cap) for _ in range(2))
    turned_away = 0
    for number in range(len(talk)):
        before = held(refused)
        try:
            Conversation.of(sum(talk.sizes[:number]), 1500).give(1, model, refused)
        except CacheFullError:
            turned_away += 1
            assert held(refused) == before
        else:
            assert name.startswith("streaming")  # takes what comes in the room that it has
            return
        try:
            want = talk.give(number, model, plain)
        except CacheFullError:
            break  # the other one may have more room, if what it was refused made it look for some
        assert torch.equal(talk.give(number, model, refused), want), f"chunk {number}"
        assert held(refused) == held(plain)
    assert turned_away
    for cache in (plain, refused):
        cache.free()
        assert unlearned(cache) == unlearned(fivefold.compress(model, recipe))


@pytest.mark.parametrize("name", RECIPES)
def test_free_leaves_what_a_new_cache_has(tiny: Any, name: str) -> None:
    model, talk = tiny(**SHAPE), Conversation.of(190, 1, 30, 1)
    cache, new = (fivefold.compress(model, written(name, model)) for _ in range(2))
    for _ in range(2):
        for number in range(len(talk)):
            talk.give(number, model, cache)
        assert cache.report().total > new.report().total
        cache.free()
        assert cache.report().total == new.report().total and cache.get_seq_length() == 0


def check_overflow(model: Any, recipe: str, situation: str) -> None:
    fault = Overflows(model.model.layers[1].self_attn.k_proj, NonFiniteError)
    wrong = case(model, recipe, situation).wrong(fault, errors=NonFiniteError)
    assert fault.raised
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("situation", ["first-prompt", "second-turn"])
@pytest.mark.parametrize("name", PACKING)
def test_keys_that_are_not_finite(tiny: Any, name: str, situation: str) -> None:
    model = tiny(**SHAPE)
    check_overflow(model, written(name, model), situation)


@pytest.mark.parametrize("recipe", ["kivi(bits=4, residual=0)", "gear(bits=4)"])
def test_a_token_that_is_packed_at_once_and_not_finite(tiny: Any, recipe: str) -> None:
    check_overflow(tiny(family="llama", num_hidden_layers=3), recipe, "packing-step")


# -- forks and copies -------------------------------------------------------------------------------------

SHARED = Conversation.of(190, 40, 1, 1)
Faults = dict[tuple[int, int], list[FailsAt]]


def forked(model: Any, recipe: str, faults: Faults) -> Outcome:
    """A cache and its fork after the first chunk, the others given to both in turn: sides 0 and 1. faults: how a side
    fails at a chunk before it takes it."""
    first, out = fivefold.compress(model, recipe), Outcome()
    empty = unlearned(first)
    SHARED.give(0, model, first)
    sides = (first, first.fork())
    for number in range(1, len(SHARED)):
        for side, cache in enumerate(sides):
            taken, other = None, sides[1 - side]
            for fault in faults.get((side, number), ()):
                before = held(other)
                try:
                    taken = SHARED.give(number, model, cache, fault)
                    break
                except Fault:
                    if held(other) != before:
                        out.wrong.append(f"after {fault} the other side has {_changed(before, held(other))}")
            out.logits.append(SHARED.give(number, model, cache) if taken is None else taken)
    out.report = {side: held(cache) for side, cache in enumerate(sides)}
    for cache in sides:
        cache.free()
    if any(unlearned(cache) > empty for cache in sides):
        out.wrong.append("free() leaves something")
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_a_failure_on_one_side_of_a_fork(tiny: Any, name: str) -> None:
    model, wrong = tiny(**SHAPE), []
    recipe = written(name, model)
    places = ((0, 1), (1, 1), (1, 2))
    counting: Faults = {place: [FailsAt()] for place in places}
    want = forked(model, recipe, counting)
    assert not want.wrong, want.wrong
    for place in places:
        points = spread(counting[place][0].count, max(3, POINTS // 2), f"{name} {place}")
        faults = [FailsAt(point) for point in points]
        try:
            found = differences(forked(model, recipe, {place: faults}), want)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        side = ("the original", "the fork")[place[0]]
        wrong += [f"{side} in chunk {place[1]}, {', '.join(map(str, faults))}: {what}" for what in found]
    assert not wrong, "\n".join(wrong)


def _pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


COPIES: dict[str, Callable[[Any], Any]] = {"pickle": _pickled, "copy": copy.copy, "deepcopy": copy.deepcopy}
COPIED = Conversation.of(190, 1, 1, 1, 33)
# Another way on from the second step.
OTHER = replace(COPIED, ids=torch.cat([COPIED.ids[:, :192], text(34, seed=8)], 1))


@pytest.mark.parametrize("name", RECIPES)
def test_copies_are_equal_or_refused(tiny: Any, name: str) -> None:
    """Both sides go on, each its own way, as a cache that was never copied; and the copy's end is not the other's. Or
    the copy is refused, by a sentence of ours."""
    model, wrong = tiny(**SHAPE), []
    recipe = written(name, model)
    wants = [run(model, recipe, talk, 0).logits for talk in (COPIED, OTHER)]
    for how, copied in COPIES.items():
        cache = fivefold.compress(model, recipe)
        for number in range(3):
            COPIED.give(number, model, cache)
        sides = {"the original": (COPIED, cache, wants[0])}
        try:
            sides = {"the copy": (OTHER, copied(cache), wants[1]), **sides}
        except FivefoldError:
            pass
        except Exception as error:
            wrong.append(f"{how}: {type(error).__name__}: {error}")
        for which, (talk, side, want) in sides.items():
            try:
                for number in range(3, len(talk)):
                    # Where pages lie may differ, and with it in what order numbers are added up.
                    off = float((talk.give(number, model, side) - want[number]).abs().max())
                    if not off < 1e-3:
                        wrong.append(f"{how}: logits of {which} are off by {off:.2g} in chunk {number}")
                        break
                if which == "the copy":
                    side.free()
            except Exception as error:
                wrong.append(f"{how}: {which} raises {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
