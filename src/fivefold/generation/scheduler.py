"""Continuous batching: which sequence is read, decoded or set aside next."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from types import TracebackType

import torch
from transformers import PreTrainedModel

from fivefold.api import compress
from fivefold.engine.prefix import PrefixStore, Shelf
from fivefold.errors import CacheFullError, CacheStateError, FivefoldError, InputError
from fivefold.generation.batch import FULL, Batch, Event, Handle, Running, forward, too_small
from fivefold.generation.conversations import Conversations, keep
from fivefold.generation.request import FinishReason, Request, Result, why_not
from fivefold.generation.sampling import pick
from fivefold.models.cache import FivefoldCache
from fivefold.models.huggingface import make_cache, prepare
from fivefold.recipe import Recipe
from fivefold.sizes import parse_bytes

_NOT_FINITE = (
    "the model's logits for this request are not finite: look for the layer that overflows, or load the model in "
    "bfloat16 or float32."
)


class Scheduler:
    """Generates for many requests at once, which come and go between two decoding steps.

    `submit` and `cancel` may be called from any thread; `step` from one at a time, again and again until `idle`. One
    call of `step` reads some chunks of prompts, and decodes one token of every sequence that has been read.
    Sequences of a recipe that chooses tokens by the prompt have it read at once, others in chunks of `chunk` tokens, or
    in blocks of the prefix store. So the tokens are those that each request gets alone, and those of
    `model.generate(..., past_key_values=compress(model, recipe), prefill_chunk_size=chunk)`.

    Where the cap is reached, the prefix store gives way, then the youngest request: its pages are swapped to host
    memory, and come back unchanged before anything new is started. A request that does not fit alone ends with an
    error, as one does whose numbers overflow; the others go on.

    Args:
        model, recipe, max_bytes: as for `fivefold.compress`. The cap holds for all sequences together, and for what
            the prefix store keeps.
        max_batch: how many sequences are decoded together at most.
        prefix: prompts that begin alike are read once.
        conversations: where the caches of conversations wait between their turns. A turn that fails leaves its
            conversation as it was; one that is cancelled too, unless its answer had begun.
        cuda_graph: decoding steps as CUDA graphs, as for `fivefold.compress`.
        chunk: tokens of a prompt that are read at a time.
        reads: so many chunks at most are read between two decoding steps, while there is room in the batch: with more
            of them all end sooner, and each waits longer for its next token.

    Raises `InputError` for a number that is not possible, and what `fivefold.compress` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: str | Recipe = "full()",
        max_batch: int = 32,
        max_bytes: int | str | None = None,
        prefix: PrefixStore | None = None,
        cuda_graph: bool = False,
        chunk: int = 2048,
        conversations: Conversations | None = None,
        reads: int = 1,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("chunk", chunk), ("reads", reads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} is not possible: give a positive whole number.")
        parsed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
        self.model, self.recipe, self.conversations, self.chunk, self.reads = model, parsed, conversations, chunk, reads
        self.whole = parsed.chooser is not None
        """Whether prompts must be read at once, because what is held is chosen then."""
        why = None if prefix is None else prefix.why_not(parsed)
        if why is not None:
            warnings.warn(why, stacklevel=2)
            prefix = None
        self.shelf: Shelf | None = None
        if prefix is None:
            self.root: FivefoldCache = compress(model, parsed, max_bytes, cuda_graph)
        else:
            # Whether steps are graphs is up to each cache that is made of this one.
            identity = f"{parsed} {model.dtype} {model.device}"
            self.shelf = prefix.shelf(model, identity, lambda: make_cache(model, parsed, parse_bytes(max_bytes), True))
            self.root = self.shelf.root
            prepare(model, self.root.absent)
            if (limit := self.root.session.pools.budget.limit) != parse_bytes(max_bytes):
                raise InputError(
                    f"max_bytes={max_bytes} is not what this prefix store was first used with for the model and the "
                    f"recipe, {limit}: give the same, or a prefix store of its own."
                )
        self.batch = Batch(model, self.root.new(cuda_graph=cuda_graph), max_batch)
        self.batch.cache.warn(2)
        self.steps = 0
        """How often `step` was called."""
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._longest: int | None = getattr(model.config, "max_position_embeddings", None)
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])
        self._reading: Running | None = None
        self._aside: list[Running] = []
        """Those that were preempted, or found no room to begin with: the oldest first."""
        self._crowded = False
        """Whether there was no room the last time, and nothing has gone since."""
        self._events: list[Event] = []
        self._stepping = threading.Lock()
        self._closed = False
        self._lock = threading.Lock()
        """Of what other threads change."""
        self._queue: deque[Running] = deque()
        self._refused: list[tuple[Running, str]] = []
        self._cancelled: set[Handle] = set()
        self._number = self._most_tokens = 0

    # -- from any thread ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Put a request into the queue. One that does not fit the model ends with an error in the next step."""
        if not isinstance(request, Request):
            raise InputError(f"a {type(request).__name__} cannot be generated for: give a fivefold.Request.")
        if request.conversation is not None and self.conversations is None:
            raise InputError(
                f"the conversation {request.conversation!r} has nowhere to wait: make the Scheduler with "
                "conversations=Conversations()."
            )
        handle, why = Handle(request), why_not(request, self._longest, self._vocabulary)
        ends = self._ends if request.stop_ids is None else request.stop_ids
        with self._lock:
            if self._closed:
                raise CacheStateError("this scheduler was closed: make a new one.")
            self._number += 1
            sequence = Running(handle, self._number, ends)
            if why is None:
                self._queue.append(sequence)
                self._most_tokens = max(self._most_tokens, len(request.prompt) + request.max_new_tokens)
            else:
                self._refused.append((sequence, why))
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request as "cancelled" before the next step, wherever it is; nothing if it has ended."""
        with self._lock:
            self._cancelled.add(handle)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: every request has ended, and `step` has told of it."""
        with self._lock:
            waiting = self._queue or self._refused or self._events
            return not (waiting or self.batch.sequences or self._reading or self._aside)

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        with self._lock:
            reading = self._reading is not None
            return len(self._queue) + len(self._refused) + len(self._aside) + len(self.batch.sequences) + reading

    # -- a step -------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Read chunks of prompts, and decode one token of each sequence; what has happened, in order.

        What fails for one request ends that request. What is nobody's own fault is raised (an exception in a hook,
        Ctrl-C): the cache is as it was before the forward that it came in, and what happened before is told by the next
        call. Raises `CacheStateError` if another thread is in a step, or after `close`.
        """
        if not self._stepping.acquire(blocking=False):
            raise CacheStateError("step() is running already: call it from one thread only.")
        try:
            if self._closed:
                raise CacheStateError("this scheduler was closed: make a new one.")
            self.steps += 1
            with torch.inference_mode():
                self._end_early()
                self._bring_back()
                for _ in range(self.reads):
                    self._start()
                    self._read()
                self._decode()
            events, self._events = self._events, []
            return events
        finally:
            self._stepping.release()

    def close(self) -> None:
        """Drop all requests, and give all memory back but what a prefix store keeps."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._refused.clear()
        for sequence in (*self._aside, *self.batch.sequences, *([] if self._reading is None else [self._reading])):
            if sequence.cache is not None:
                sequence.cache.free()
            if sequence.before is not None:
                self._put_back(sequence, *sequence.before)
        self.batch.sequences, self._reading, self._aside, self._events = [], None, [], []
        self.batch.cache.free()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- ends ---------------------------------------------------------------------------------------------

    def _end(self, sequence: Running, reason: FinishReason, error: str | None = None) -> None:
        """A sequence is over; whoever is in the batch must still be dropped."""
        now, since = perf_counter(), sequence.submitted
        started, first = sequence.started, sequence.first_token
        result = Result(
            sequence.request,
            tuple(sequence.tokens),
            reason,
            error,
            None if started is None else started - since,
            None if first is None else first - since,
            now - since,
            sequence.shared,
            sequence.preemptions,
            sequence.first_step,
            self.steps,
        )
        self._leave(sequence, reason)
        self._crowded = False
        sequence.handle.result = result
        self._events.append(Event(sequence.handle, result=result))

    def _leave(self, sequence: Running, reason: FinishReason) -> None:
        """What becomes of the cache of a sequence that is over."""
        cache, sequence.cache = sequence.cache, None
        talk = sequence.request.conversation is not None and (sequence.tokens or sequence.before is not None)
        if talk and reason != "error" and sequence.tokens:
            if cache is None:
                self.batch.take(sequence)
                cache, sequence.cache = sequence.cache, None
            assert cache is not None
            if sequence.before is not None:
                sequence.before[0].free()
            self._put_back(sequence, cache, (sequence.tokens[-1],))
            return
        if cache is not None:
            cache.free()
        if sequence.before is not None:
            self._put_back(sequence, *sequence.before)

    def _put_back(self, sequence: Running, cache: FivefoldCache, unread: tuple[int, ...]) -> None:
        assert self.conversations is not None and sequence.request.conversation is not None
        sequence.before = None
        self.conversations.put(sequence.request.conversation, cache, unread)

    def _hand_out(self, sequences: Sequence[Running], tokens: Sequence[int]) -> list[Running]:
        """Each sequence has its next token; those that end with it."""
        ended = []
        for sequence, token in zip(sequences, tokens, strict=True):
            if token < 0:
                self._end(sequence, "error", _NOT_FINITE)
                ended.append(sequence)
                continue
            sequence.tokens.append(token)
            sequence.first_token = sequence.first_token or perf_counter()
            self._events.append(Event(sequence.handle, token))
            if token in sequence.ends:
                self._end(sequence, "stop")
            elif len(sequence.tokens) == sequence.request.max_new_tokens:
                self._end(sequence, "length")
            else:
                continue
            ended.append(sequence)
        return ended

    def _end_early(self) -> None:
        """Those that cannot be served, and those that nobody wants any more."""
        with self._lock:
            refused, self._refused = self._refused, []
            cancelled, self._cancelled = self._cancelled, set()
            gone = [sequence for sequence in self._queue if sequence.handle in cancelled]
            for sequence in gone:
                self._queue.remove(sequence)
        for sequence, why in refused:
            self._end(sequence, "error", why)
        running = [one for one in self.batch.sequences if one.handle in cancelled]
        self.batch.drop(running)
        aside = [one for one in self._aside if one.handle in cancelled]
        self._aside = [one for one in self._aside if one not in aside]
        reading = [one for one in (self._reading,) if one is not None and one.handle in cancelled]
        if reading:
            self._reading = None
        for sequence in (*gone, *running, *aside, *reading):
            self._end(sequence, "cancelled")

    # -- room ---------------------------------------------------------------------------------------------

    def _make_room(self, error: BaseException) -> None:
        """A forward has found no room: what only waits gives way, else the youngest sequence."""
        if self._give_way():
            return
        inside = [*self.batch.sequences, *([] if self._reading is None else [self._reading])]
        youngest = max(inside, key=lambda sequence: sequence.number)
        if youngest is self._reading:
            self._reading = None
        else:
            self.batch.take(youngest)
        # Alone it comes back into memory that is in one piece, and has failed if that does not help.
        progress = youngest.read, len(youngest.tokens)
        if len(inside) == 1 and youngest.stuck == progress:
            self._end(youngest, "error", too_small(youngest, self.root, error))
            return
        youngest.stuck = progress
        self._set_aside(youngest)

    def _give_way(self) -> bool:
        """Those that only wait make room: prefixes, then conversations; whether there was something."""
        if self.shelf is not None and self.shelf.give_up():
            return True
        return self.conversations is not None and self.conversations.make_room()

    def _set_aside(self, sequence: Running) -> None:
        """Swap a sequence that is not in the batch to host memory."""
        cache = sequence.cache
        assert cache is not None
        if cache.batch and not cache.offloaded:
            cache.offload()
            sequence.preemptions += 1
            if sequence.before is not None:
                sequence.before[0].offload()
        if sequence not in self._aside:
            self._aside = sorted([*self._aside, sequence], key=lambda one: one.number)
        self._crowded = True

    def _bring_back(self) -> None:
        """Those that were set aside return, if anything has gone since, or nobody is in their way."""
        while self._aside and len(self.batch.sequences) + (self._reading is not None) < self.batch.most:
            sequence = self._aside[0]
            busy = bool(self.batch.sequences) or self._reading is not None
            if (self._crowded and busy) or (self._reading is not None and not sequence.is_read):
                return
            cache = sequence.cache
            assert cache is not None
            try:
                if cache.offloaded:
                    cache.restore()
                if sequence.is_read:
                    self.batch.join(sequence)
                else:
                    self._reading = sequence
                self._aside.remove(sequence)
            except FULL as error:
                self._crowded = True
                if self._give_way():
                    self._crowded = False
                elif not busy:
                    self._aside.remove(sequence)
                    self._end(sequence, "error", too_small(sequence, self.root, error))
                if cache.batch and not cache.offloaded:
                    cache.offload()

    # -- reading ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """The oldest request of the queue begins, if there is room for one. A turn waits for the one before it."""
        if self._reading is not None or self._aside or len(self.batch.sequences) >= self.batch.most:
            return
        busy = {one.request.conversation for one in self.batch.sequences} - {None}
        with self._lock:
            sequence = next((one for one in self._queue if one.request.conversation not in busy), None)
        if sequence is None:
            return
        sequence.started, sequence.first_step = perf_counter(), self.steps
        try:
            if not self._resume(sequence):
                return
        except FivefoldError as error:
            with self._lock:
                self._queue.remove(sequence)
            self._end(sequence, "error", str(error))
            return
        if self.shelf is not None and sequence.cache is None:
            sequence.digests = self.shelf.digests(sequence.prompt)
            sequence.cache, sequence.read = self.shelf.find(sequence.prompt, sequence.digests)
            sequence.shared = sequence.read
        if sequence.cache is None:
            sequence.cache = self.root.new(cuda_graph=False)
        with self._lock:
            self._queue.remove(sequence)
        self._reading = sequence

    def _resume(self, sequence: Running) -> bool:
        """The cache of a conversation that has been here before; False if there is no room for it now. Raises
        `FivefoldError` where it cannot go on."""
        name, waiting = sequence.request.conversation, self.conversations
        if name is None or waiting is None or name not in waiting:
            return True
        while True:
            try:
                cache, unread = waiting.take(name, self.root.new(cuda_graph=False))
                break
            except FULL as error:
                if not self._give_way():
                    if self.batch.sequences:
                        return False
                    raise CacheFullError(too_small(sequence, self.root, error)) from None
        held = int(cache.lengths()[0]) + len(unread)
        why = why_not(sequence.request, self._longest, self._vocabulary, held)
        if why is not None:
            waiting.put(name, cache, unread)
            raise InputError(why)
        with self._lock:
            self._most_tokens = max(self._most_tokens, held + sequence.length + sequence.request.max_new_tokens)
        sequence.before, sequence.cache, sequence.prompt = (keep(cache), unread), cache, (*unread, *sequence.prompt)
        return True

    def _next_stop(self, sequence: Running) -> int:
        """Where the next piece of a prompt ends. It depends on the prompt alone, so that tokens do."""
        end = len(sequence.prompt)
        if self.whole:
            return end
        piece = self.chunk if self.shelf is None else self.shelf.block
        return min(end, (sequence.read // piece + 1) * piece)

    def _read(self) -> None:
        """Read a chunk of a prompt: with a prefix store, as many blocks of it as fit into one, at least one."""
        left = self.chunk
        sequence = self._reading
        while sequence is not None and self._reading is sequence:
            stop = self._next_stop(sequence)
            if stop - sequence.read > left < self.chunk:
                return
            assert sequence.cache is not None
            try:
                logits = forward(self.model, sequence.cache, [sequence.prompt[sequence.read : stop]])
            except FULL as error:
                self._make_room(error)
                continue
            except FivefoldError as error:
                self._reading = None
                self._end(sequence, "error", str(error))
                return
            left -= stop - sequence.read
            sequence.read = stop
            if self.shelf is not None and sequence.before is None and stop % self.shelf.block == 0:
                with suppress(*FULL):
                    self.shelf.keep(sequence.digests[: stop // self.shelf.block], sequence.cache)
            if sequence.is_read:
                self._reading = None
                if not self._hand_out([sequence], pick(logits, [sequence.picker])):
                    self._admit(sequence)

    def _admit(self, sequence: Running) -> None:
        """A sequence with a cache of its own comes into the batch, or waits until there is room."""
        try:
            self.batch.join(sequence)
        except FULL:
            self._set_aside(sequence)

    # -- decoding -----------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One token of every sequence in the batch."""
        with self._lock:
            longest = self._most_tokens
        while self.batch.sequences:
            try:
                self.batch.cache.reserve(longest)
                tokens = self.batch.step()
            except FULL as error:
                self._make_room(error)
            except FivefoldError:
                self._decode_one_by_one()
                return
            else:
                self.batch.drop(self._hand_out(list(self.batch.sequences), tokens))
                return

    def _decode_one_by_one(self) -> None:
        """A step that failed, of each sequence alone: those that it is not the fault of go on."""
        sequences = list(self.batch.sequences)
        for sequence in sequences:
            self.batch.take(sequence)
        for sequence in sequences:
            assert sequence.cache is not None
            try:
                logits = forward(self.model, sequence.cache, [[sequence.tokens[-1]]])
            except FULL:
                self._set_aside(sequence)
            except FivefoldError as error:
                self._end(sequence, "error", str(error))
            else:
                if not self._hand_out([sequence], pick(logits, [sequence.picker])):
                    self._admit(sequence)
