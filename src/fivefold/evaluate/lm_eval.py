"""Any task of EleutherAI's lm-evaluation-harness with a recipe: a model class of theirs over our cache.

```python
from fivefold.evaluate.lm_eval import FivefoldLM
import lm_eval

lm = FivefoldLM(model, tokenizer, "kivi(bits=2)")
print(lm_eval.simple_evaluate(lm, tasks=["hellaswag"], limit=100)["results"])
```

Needs `pip install 'fivefold[lmeval]'`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fivefold.api import compress
from fivefold.errors import InputError
from fivefold.evaluate.together import grouped, rows_of
from fivefold.recipe import Recipe

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise InputError(f"lm-evaluation-harness is missing ({error}): pip install 'fivefold[lmeval]'.") from None
from tqdm import tqdm

STRIDE = 32
_BATCH = 32


class FivefoldLM(TemplateLM):
    """A model of transformers whose every answer is read from a compressed cache.

    A prompt is prefilled but for its last token, and compressed; what is scored or written reads the cache as it is
    then. A prompt that many continuations follow (multiple choice) is read once, and the cache forked. A text that is
    scored as a whole (perplexity) is fed `stride` tokens at a time, so that all but the newest is read compressed.

    Args:
        model: a decoder-only model of transformers that `fivefold.compress` supports.
        tokenizer: its tokenizer.
        recipe: what the cache keeps.
        max_length: longest prompt with its answer, in tokens; the model's own limit if not given. What is longer loses
            its beginning, as with the harness's own models.
        max_gen_toks: tokens written at most where a task does not say.
        stride: see above.
        batch: continuations of one prompt that are scored together; results are the same. 32 on a GPU and 1 on a CPU,
            where it is no faster, if not given.

    Raises what `fivefold.compress` raises.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        recipe: str | Recipe = "full()",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        stride: int = STRIDE,
        batch: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
        compress(model, self.recipe)  # what does not fit is said now
        self.max_length = max_length or int(getattr(model.config, "max_position_embeddings", 2048))
        self.max_gen_toks = max_gen_toks
        self.stride = stride
        self.batch = batch or (_BATCH if model.device.type == "cuda" else 1)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a prompt."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {"recipe": str(self.recipe), "model_dtype": str(self.model.dtype)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a text in a chat template has its special tokens already
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        prompts: dict[tuple[int, ...], list[int]] = {}
        for number, (_, prompt, continuation) in enumerate(requests):
            room = max(1, self.max_length - len(continuation) + 1)
            prompts.setdefault(tuple(prompt[-room:]), []).append(number)
        with torch.inference_mode():
            for prompt, numbers in tqdm(prompts.items(), desc="Prompts", disable=disable_tqdm):
                cache = self._read(prompt)
                for group in grouped([len(requests[number][2]) for number in numbers], self.batch):
                    some = [numbers[at] for at in group]
                    scores = self._scores(cache, prompt[-1], [requests[number][2] for number in some])
                    for number, score in zip(some, scores):
                        found[number] = score
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
        return [found[number] for number in range(len(requests))]

    def _read(self, prompt: tuple[int, ...]) -> Any:
        """A cache that holds a prompt but for its last token."""
        cache = compress(self.model, self.recipe)
        if len(prompt) > 1:
            self._feed(cache, prompt[:-1], logits_to_keep=1)
        return cache

    def _feed(self, cache: Any, tokens: tuple[int, ...] | list[int], **kwargs: Any) -> torch.Tensor:
        """Logits `[tokens, vocabulary]`."""
        ids = torch.tensor([tokens], device=self._device)
        return self.model(ids, past_key_values=cache, **kwargs).logits[0]

    def _scores(self, cache: Any, last: int, continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding gives) of continuations of equal length."""
        fork = rows_of(cache, [0] * len(continuations))
        ids = torch.tensor([[last, *continuation] for continuation in continuations], device=self._device)
        logs = self.model(ids[:, :-1], past_key_values=fork).logits.float().log_softmax(-1)
        wanted = ids[:, 1:]
        sums = logs.gather(2, wanted[:, :, None]).sum((1, 2)).tolist()
        return list(zip(sums, (logs.argmax(-1) == wanted).all(1).tolist()))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in tqdm(requests, desc="Texts", disable=disable_tqdm):
            (text,) = request.args
            total = sum(self._windows(self.tok_encode(text, add_special_tokens=False)))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _windows(self, tokens: list[int]) -> Iterator[float]:
        """The log-likelihood of each window of a text."""
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        for before, scored in map(make_disjoint_window, windows):
            with torch.inference_mode():
                fed, cache = [*before, *scored[:-1]], compress(self.model, self.recipe)
                total = 0.0
                for start in range(0, len(fed), self.stride):
                    part = fed[start : start + self.stride]
                    logs = self._feed(cache, part).float().log_softmax(-1)
                    # Position i of what is fed predicts token i + 1 - len(before) of what is scored.
                    for at in range(len(part)):
                        place = start + at + 1 - len(before)
                        if place >= 0:
                            total += float(logs[at, scored[place]])
            yield total

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in tqdm(requests, desc="Answers", disable=disable_tqdm):
            text, settings = request.args
            said = self._generate(text, dict(settings))
            found.append(said)
            self.cache_hook.add_partial("generate_until", request.args, said)
        return found

    def _generate(self, text: str, settings: dict[str, Any]) -> str:
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        limit = settings.pop("max_gen_toks", self.max_gen_toks)
        if not settings.setdefault("do_sample", settings.get("temperature", 0) > 0):
            settings.pop("temperature", None)
        prompt = self.tok_encode(text)[-max(1, self.max_length - limit) :] or [self.prefix_token_id]
        with torch.inference_mode():
            cache = self._read(tuple(prompt))
            ids = torch.tensor([prompt], device=self._device)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=limit,
                pad_token_id=self.eot_token_id,
                **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
                **settings,
            )
        said = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        for stop in stops:
            said = said.split(stop)[0]
        return said
