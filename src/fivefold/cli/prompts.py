"""`fivefold generate --prompts`: many prompts at once, by continuous batching, with results as they finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from fivefold.cli.files import writable
from fivefold.cli.generating import encode, end_tokens, has_template
from fivefold.cli.models import load_model, model_name, require_embedded
from fivefold.cli.prompt_file import Line, read
from fivefold.cli.result_file import Name, ResultFile
from fivefold.cli.terminal import err, progress_bars, stop_request
from fivefold.errors import InputError
from fivefold.tables import Facts

if TYPE_CHECKING:
    from fivefold.engine.prefix import PrefixStore
    from fivefold.generation import Event, Result, Scheduler
    from fivefold.recipe import Recipe

FAILED = 1
"""Exit code where some requests have failed, and the others have results."""
# Prompts that have so much text in common are worth a hint.
_ALIKE = 4096


@dataclass(frozen=True)
class Options:
    """Options of the command. defaults: settings of requests that have none of their own."""

    recipe: str
    model: str | None
    dtype: str
    device: str
    cap: int | None
    chat: bool | None
    defaults: dict[str, Any]
    seed: int
    chunk: int
    max_batch: int
    share: bool
    restart: bool


@dataclass
class _Asked:
    """A request under way. texts: what ends it; count: tokens so far; found: where one of the texts begins."""

    line: Line
    texts: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass
class _Tally:
    """What has been done so far, for the bar and the table."""

    total: int
    before: int
    start: float = field(default_factory=time.perf_counter)
    done: int = 0
    failed: int = 0
    read: int = 0
    written: int = 0
    preemptions: int = 0
    held: int = 0
    peak: int = 0
    exact_peak: int = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def amount(self) -> str:
        rate = self.written / self.seconds
        done = self.before + self.done + self.failed
        return f"{done} of {self.total} requests, {rate:,.1f} tokens/s, {self.held / 2**20:.1f} MiB of cache"


def generate_all(prompts: str, out: str, options: Options) -> None:
    """Generate for every line of `prompts` that has no result in `out` yet."""
    path = writable(out)
    if prompts != "-" and path.exists() and Path(prompts).exists() and path.samefile(prompts):
        raise InputError(f"--out {out!r} is the file of prompts itself: give another file for what is written.")
    with err.status("Preparing"):
        from fivefold.engine.prefix import PrefixStore
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(options.recipe)
        why = PrefixStore.why_not(parsed) if options.share else None
        share = options.share and why is None
        same = {"chat": options.chat, "dtype": options.dtype, "chunk": options.chunk, "share": share}
        lines = read(prompts, options.defaults, options.seed, same)
        about = {"recipe": str(parsed), "model": model_name(options.model)}
        results = ResultFile(path, out, about, options.restart)
        found = results.done(lines)
    if why is not None:
        err.print(f"Note: {why}", soft_wrap=True)
    if len(found) == len(lines):
        err.print(f"All {len(lines):,} results are in {out}: give --restart to write them anew.", soft_wrap=True)
        return
    require_embedded(options.model)
    with err.status("Loading the model"):
        network, tokenizer = load_model(options.model, options.dtype, options.device)
        _check_template(lines, tokenizer, options.chat)
        from fivefold.generation import Scheduler

        store = PrefixStore() if share else None
        scheduler = Scheduler(network, parsed, options.max_batch, options.cap, store, chunk=options.chunk)
    with scheduler, results.opened(lines) as found, stop_request() as stopped:
        if not options.share and why is None and PrefixStore.why_not(parsed) is None and _alike(lines):
            err.print("Note: prompts begin alike: --share-prefixes reads that once.")
        tally = _Tally(len(lines), len(found))
        try:
            _work(scheduler, network, tokenizer, lines, found, results, options.chat, tally, stopped)
        finally:
            err.print(_table(parsed, tally, store, scheduler.batch.cache.decoding), crop=False)
        if tally.before + tally.done + tally.failed < tally.total:
            kept = tally.before + tally.done
            err.print(
                f"{kept:,} of {tally.total:,} results are in {out}: the same command goes on there.", soft_wrap=True
            )
            raise KeyboardInterrupt
    if tally.failed:
        requests = "1 request has" if tally.failed == 1 else f"{tally.failed:,} requests have"
        err.print(f'{requests} failed ("error" in {out}): the same command tries again.', soft_wrap=True)
        raise typer.Exit(FAILED)


def _check_template(lines: Iterable[Line], tokenizer: Any, chat: bool | None) -> None:
    if has_template(tokenizer):
        return
    if chat:
        raise InputError("this model's tokenizer has no chat template: drop --chat.")
    for line in lines:
        if not isinstance(line.prompt, str):
            raise InputError(f"{line.where}: this model's tokenizer has no chat template: give 'prompt', a text.")


def _work(
    scheduler: Scheduler,
    model: Any,
    tokenizer: Any,
    lines: list[Line],
    found: dict[Name, str],
    results: ResultFile,
    chat: bool | None,
    tally: _Tally,
    stopped: Callable[[], bool],
) -> None:
    """Submit requests as there is room for them, and write results, until all have ended or a stop is asked for."""
    from fivefold.generation import Request

    ends = end_tokens(model, tokenizer)
    names = tokenizer.get_added_vocab()
    todo = iter([line for line in lines if line.name not in found])
    exact = _exact_bytes(scheduler)
    with progress_bars() as bars:
        bar = bars.add_task("Writing", total=tally.total, completed=tally.before, amount="")
        open_ended = True
        while not stopped():
            while open_ended and scheduler.unfinished < scheduler.batch.most:
                line = next(todo, None)
                if line is None:
                    open_ended = False
                    break
                try:
                    ids = encode(tokenizer, line.prompt, chat)
                except InputError as error:
                    results.add(line, {"error": str(error)})
                    tally.failed += 1
                    continue
                # A token that has a name of its own is not in the text that is searched.
                named = {names[text] for text in line.stop_texts if text in names}
                asked = _Asked(line, tuple(text for text in line.stop_texts if text not in names))
                stop = sorted(ends | named | set(line.stop_ids))
                scheduler.submit(Request(ids, stop=stop, id=asked, **line.settings))
            if scheduler.idle and not open_ended:
                break
            events = scheduler.step()
            for event in events:
                _hear(event, scheduler, tokenizer, results, tally)
            tally.held = _held(scheduler)
            tally.peak = max(tally.peak, tally.held)
            alive = {event.handle: event.handle.request for event in events if event.token is not None}
            held = sum(exact(len(request.prompt) + len(request.id.tokens)) for request in alive.values())
            tally.exact_peak = max(tally.exact_peak, held)
            bars.update(bar, completed=tally.before + tally.done + tally.failed, amount=tally.amount())


def _hear(event: Event, scheduler: Scheduler, tokenizer: Any, results: ResultFile, tally: _Tally) -> None:
    """A request has one more token, or it has ended."""
    asked: _Asked = event.handle.request.id
    if event.token is not None and not asked.ended:
        asked.tokens.append(event.token)
        tally.written += 1
        if asked.texts:
            # Each token is at least a byte of text, or belongs to a character of at most four.
            tail = asked.tokens[-max(len(text.encode()) for text in asked.texts) - 4 :]
            if _first(asked.texts, _decode(tokenizer, tail)) is not None:
                asked.ended = True
                scheduler.cancel(event.handle)
    if event.result is not None:
        tally.preemptions += event.result.preemptions
        row = _row(asked, event.result, tokenizer)
        results.add(asked.line, row)
        if "error" in row:
            tally.failed += 1
        else:
            tally.done += 1
            tally.read += len(event.result.request.prompt) - event.result.shared


def _row(asked: _Asked, result: Result, tokenizer: Any) -> dict[str, Any]:
    if result.error is not None:
        return {"error": result.error, "prompt_tokens": len(result.request.prompt)}
    by_token = result.finish_reason == "stop" and not asked.ended
    text = _decode(tokenizer, asked.tokens[:-1] if by_token else asked.tokens)
    if asked.ended:
        text = text[: _first(asked.texts, text)]
    return {
        "text": text,
        "tokens": len(asked.tokens),
        "finish_reason": "stop" if asked.ended else result.finish_reason,
        "prompt_tokens": len(result.request.prompt),
        "shared_tokens": result.shared,
        "seconds_to_first_token": round(result.first_token or 0, 4),
        "seconds": round(result.total, 4),
    }


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _first(texts: Iterable[str], text: str) -> int | None:
    """Where the first of some texts begins in a text; None if none is in it."""
    return min((place for one in texts if (place := text.find(one)) >= 0), default=None)


def _alike(lines: list[Line]) -> bool:
    """Whether any two prompts have a long beginning in common."""
    heads = [text[:_ALIKE] for text in (str(line.prompt) for line in lines) if len(text) >= _ALIKE]
    return len(set(heads)) < len(heads)


def _held(scheduler: Scheduler) -> int:
    """Bytes of the cache now, of all sequences and of the prefix store."""
    budget = scheduler.root.session.pools.budget
    # Without a cap nobody has them charged.
    beside = scheduler.batch.cache.session.charged if budget.limit is None else sum(budget.charged.values())
    return budget.used + beside


def _exact_bytes(scheduler: Scheduler) -> Callable[[int], int]:
    """A function from the length of a sequence to the bytes that `DynamicCache` needs for it, without padding."""
    specs = [store.spec for store in scheduler.root.session.stores.values()]
    sizes = [2 * spec.kv_heads * spec.head_dim * spec.dtype.itemsize for spec in specs]
    beside: Any = scheduler.root.session.companions
    windows = [] if beside is None else beside.windows.values()
    return lambda tokens: sum(sizes) * tokens + sizes[0] * sum(min(tokens, window - 1) for window in windows)


def _table(recipe: Recipe, tally: _Tally, store: PrefixStore | None, decoding: str) -> Facts:
    table = Facts()
    table.add_row("recipe", Text(str(recipe)))
    others = [f"{tally.failed:,} failed"] * bool(tally.failed) + [f"{tally.before:,} earlier"] * bool(tally.before)
    table.add_row("requests", ", ".join([f"{tally.done:,} of {tally.total:,} done", *others]))
    table.add_row("tokens", f"{tally.read:,} read, {tally.written:,} written in {tally.seconds:.1f} s")
    table.add_row("speed", f"{tally.written / tally.seconds:,.1f} tokens/s")
    ratio = f"{tally.peak / tally.exact_peak:.3f}x of " if tally.exact_peak else ""
    table.add_row(
        "cache",
        f"{tally.peak / 2**20:.2f} MiB at its peak, {ratio}the exact cache's {tally.exact_peak / 2**20:.2f} MiB",
    )
    table.add_row("decoding", Text(decoding))
    if store is not None:
        known = store.statistics
        table.add_row(
            "prefixes",
            f"{known.hits:,} of {known.hits + known.misses:,} prompts began with one, {known.tokens_shared:,} tokens "
            f"were not read again; {known.nbytes / 2**20:.2f} MiB held for them",
        )
    if tally.preemptions:
        table.add_row("preemptions", f"{tally.preemptions:,} times a sequence waited in host memory for want of room")
    return table
