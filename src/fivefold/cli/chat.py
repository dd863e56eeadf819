"""`fivefold chat`: a conversation in the terminal, kept in a compressed cache."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from fivefold.cli.app import (
    ChunkOption,
    DeviceOption,
    DtypeOption,
    MaxBytesOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
)
from fivefold.cli.conversation import Conversation, Forgotten, Settings, Turn
from fivefold.cli.generating import cache_report, check_options, has_template
from fivefold.cli.models import load_model, model_name, require_embedded
from fivefold.cli.session import Folder, Held, Reading, dtype_of
from fivefold.cli.terminal import err, stop_request
from fivefold.errors import CacheFullError, FivefoldError, InputError
from fivefold.sizes import parse_bytes

_HELP = {
    "/help": "this list",
    "/report": "what the cache holds",
    "/undo": "forget the last turn",
    "/reset": "forget all turns",
    "/save FOLDER": "keep the conversation as it is now in a folder, for --session",
    "/quit": "end, as Ctrl-D does",
}
_PROMPT = "> "


def chat(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="What the cache keeps: 'kivi(bits=2)'; known to a --session."
        ),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option("--session", "-s", metavar="FOLDER", help="Go on with what is kept there; kept after each turn."),
    ] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="At most so many tokens an answer.")
    ] = 512,
    max_bytes: MaxBytesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    temperature: TemperatureOption = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Only among the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="P", help="Only among those that sum to P.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: tokens that have been there are less likely.")
    ] = 1.0,
    seed: SeedOption = 0,
    chunk: ChunkOption = 1024,
) -> None:
    """Talk with a model. The conversation stays in a compressed cache, and can be kept in a folder.

    Each turn reads only what is new. Ctrl-C stops an answer, Ctrl-D ends; /help lists the commands.
    """
    cap = parse_bytes(max_bytes, "--max-bytes")
    check_options(dtype, temperature)
    folder = None if session is None else Folder(session)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            folder.held()  # what is no session is refused before anything is made there
            stack.enter_context(folder.locked())
        held = None if folder is None else folder.held()
        if recipe is None and held is None:
            raise InputError("there is no recipe: give --recipe, such as 'kivi(bits=4)'.")
        if system is not None and not system.strip():
            raise InputError("the text of --system is empty: write something, or leave it out.")
        model = model if held is None or model is not None else held.model
        require_embedded(model)
        with err.status("Loading the model"):
            from fivefold.api import compress
            from fivefold.generation.request import Request
            from fivefold.recipe import Recipe

            drawing: dict[str, Any] = {
                "temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty
            }  # fmt: skip
            Request((0,), **drawing)
            parsed = Recipe.parse(held.recipe if recipe is None and held is not None else recipe or "")
            if held is not None:
                _check(held, str(parsed), system, session)
            network, tokenizer = load_model(model, dtype, device)
            if not has_template(tokenizer):
                raise InputError(
                    f"the tokenizer of {model_name(model)} has no chat template: use fivefold generate, or a model "
                    "that was made for chat."
                )
            cache = compress(network, parsed, cap)
            settings = Settings(max_new_tokens, drawing, seed, chunk)
            if held is None:
                first = () if system is None else ({"role": "system", "content": system},)
                conversation, reading, resumed = Conversation(network, tokenizer, cache, settings, first), Reading(), ""
            else:
                conversation = Conversation(network, tokenizer, cache, settings, held.messages, held.ids)
                reading, resumed = held.reading, _resume(conversation, folder, held, model)
        _Chat(conversation, folder, model, reading).run(resumed)


def _check(held: Held, recipe: str, system: str | None, session: str | None) -> None:
    if held.recipe != recipe:
        raise InputError(
            f"the conversation in {session!r} is kept with {held.recipe}, and this is {recipe}: leave --recipe out, or "
            "give another --session."
        )
    first = held.messages[0]["content"] if held.messages[0]["role"] == "system" else None
    if system is not None and system != first:
        raise InputError(
            f"the conversation in {session!r} has begun with another text for the system: leave --system out, or give "
            "another --session."
        )


def _resume(conversation: Conversation, folder: Folder | None, held: Held, model: str | None) -> str:
    """Read what a folder holds; what there is to say about it."""
    assert folder is not None
    for what, was, mine in (
        ("model", model_name(held.model), model_name(model)), ("dtype", held.dtype, dtype_of(conversation.model))
    ):  # fmt: skip
        if was != mine:
            raise InputError(
                f"the conversation in {folder.name!r} was held with the {what} {was}, and this is {mine}: give "
                f"--{what} {held.model if what == 'model' and held.model else was}, or another --session."
            )
    cache = conversation.cache
    start = time.perf_counter()
    cache.load(folder.cache)
    seconds = time.perf_counter() - start
    tokens = cache.get_seq_length()
    if not 0 <= len(conversation.ids) - tokens <= 1:
        raise InputError(f"{folder.name!r} holds a cache of other tokens than its conversation: give another folder.")
    estimate = held.reading.estimate(tokens)
    again = "" if estimate is None else f" (reading it again would take about {estimate:.1f} s)"
    turns = f"{conversation.turns:,} turn{'' if conversation.turns == 1 else 's'}"
    size = cache.report().total / 2**20
    return f"resumed: {turns}, {tokens:,} tokens, {size:.2f} MiB, loaded in {seconds:.2f} s{again}"


class _Chat:
    """The loop around a conversation. Answers go to stdout, everything else to stderr."""

    def __init__(self, conversation: Conversation, folder: Folder | None, model: str | None, reading: Reading) -> None:
        self.conversation, self.folder, self.model, self.reading = conversation, folder, model, reading
        self.terminal = sys.stdin.isatty() and err.is_terminal
        self.ended = False

    def run(self, resumed: str) -> None:
        if resumed:
            _dim(resumed)
        if self.terminal:
            # It gives `input` a line that can be edited, and what was written before; not there on every system.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
            recipe = self.conversation.cache.recipe
            _dim(f"{model_name(self.model)} with {recipe}. /help lists the commands, Ctrl-D ends.")
        while not self.ended:
            try:
                line = self._line()
                if line is None:
                    break
                with stop_request() as stopped:
                    self._do(line, stopped)
            except KeyboardInterrupt:
                err.print("\nCtrl-D or /quit ends." if self.terminal else "Ctrl-D or /quit ends.")
            except FivefoldError as error:
                _say(str(error))
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
                    raise
                _say("the device ran out of memory: this turn is forgotten; use a smaller --chunk, or /undo a turn.")

    def _line(self) -> str | None:
        """The next line, without space around it but for a `/` that is to be text; None at the end."""
        try:
            if self.terminal and sys.stdout.isatty():
                text = input(_PROMPT)
                text.encode()
            else:
                if self.terminal:
                    err.print(_PROMPT, end="")
                raw = sys.stdin.buffer.readline()
                if not raw:
                    return None
                text = raw.decode()
        except EOFError:
            err.print()
            return None
        except UnicodeError:
            raise InputError("this line is not UTF-8: it is left out; convert it.") from None
        return text.rstrip()

    def _do(self, line: str, stopped: Callable[[], bool]) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._turn(line.strip(), stopped)
            return
        command, _, rest = line.partition(" ")
        match command, rest.strip():
            case "/help", "":
                for name, what in _HELP.items():
                    err.print(f"{name:<14}{what}")
            case "/report", "":
                err.print(cache_report(self.conversation.cache, []), crop=False)
            case "/undo", "":
                self.conversation.undo()
                self._keep()
                _dim(f"The last turn is forgotten; {self.conversation.cache.get_seq_length():,} tokens are held.")
            case "/reset", "":
                self.conversation.reset()
                self._keep()
                _dim("All turns are forgotten.")
            case "/save", name if name:
                self._save(name)
            case "/quit", "":
                self.ended = True
            case _:
                raise InputError(
                    f"there is no command {line[:40]!r}: /help lists them; a space before it sends it as a message."
                )

    def _turn(self, text: str, stopped: Callable[[], bool]) -> None:
        from transformers import TextStreamer

        streamer = TextStreamer(self.conversation.tokenizer, skip_special_tokens=True)
        begun = False

        def show(token: int) -> None:
            nonlocal begun
            import torch

            begun = True
            streamer.put(torch.tensor([token]))

        try:
            turn = self.conversation.say(text, show, stopped)
        except KeyboardInterrupt:  # a second one
            raise Forgotten("interrupted: this turn is forgotten.") from None
        except CacheFullError:
            raise Forgotten(
                "this turn does not fit under --max-bytes and is forgotten: /undo, /reset, or start with a larger cap."
            ) from None
        finally:
            if begun:
                streamer.end()
        if not turn.written:
            _say("the model answered nothing.")
        self.reading = self.reading.longer(turn)
        try:
            self._keep()
        finally:
            _dim(_summary(self.conversation, turn))

    def _keep(self) -> None:
        if self.folder is not None:
            self.folder.save(self.conversation, self.model, self.reading)

    def _save(self, name: str) -> None:
        folder = Folder(name)
        if not self.conversation.ids:
            raise InputError("there is nothing to save yet: write a message first.")
        if folder.held() is not None:
            raise InputError(f"{name!r} holds a conversation already: give another folder.")
        with folder.locked():
            folder.save(self.conversation, self.model, self.reading)
        _dim(f"Saved: fivefold chat --session {name} goes on from here.")


def _summary(conversation: Conversation, turn: Turn) -> str:
    report = conversation.cache.report()
    anew = f" ({turn.anew:,} of them anew: the chat template changed earlier turns)" if turn.anew else ""
    return (
        f"{report.tokens:,} tokens in {report.total / 2**20:.2f} MiB, {report.ratio:.3f}x of the exact cache "
        f"({report.exact_equivalent / 2**20:.2f} MiB); read {turn.read:,}{anew} in {turn.seconds_reading:.2f} s, wrote "
        f"{turn.written:,} in {turn.seconds_writing:.2f} s"
    )


def _say(sentence: str) -> None:
    err.print(_clean(sentence), soft_wrap=True)


def _dim(text: str) -> None:
    err.print(Text(_clean(text), style="dim"), soft_wrap=True)


def _clean(text: Any) -> str:
    """In one line: no line breaks, no terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
