"""The fetched model and its tokenizer, loaded by transformers and without its talk."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fivefold.errors import ModelUnavailableError, first_line
from fivefold.models.embedded import pins
from fivefold.models.embedded.folder import is_fetched, model_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode on the CPU, and its tokenizer; never touches the network.

    `dtype` None is `torch.float32` (the default is spelt so to keep this module free of heavy imports).
    Raises ModelUnavailableError when the model was not fetched or its files cannot be read.
    """
    folder = model_dir()
    if not is_fetched():
        raise ModelUnavailableError(f"{pins.MODEL_NAME} is not in {folder}; run `fivefold fetch`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32 if dtype is None else dtype, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # Right names and sizes but unreadable: damaged on disk, or written for another transformers.
        raise ModelUnavailableError(
            f"{pins.MODEL_NAME} in {folder} cannot be loaded ({first_line(error)}); run `fivefold fetch --force`."
        ) from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def quiet(tensors_done: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Silence transformers' bars, logs and warnings; `tensors_done` hears of the GGUF conversion instead."""
    from transformers import modeling_gguf_pytorch_utils as gguf_utils
    from transformers.utils import logging

    def loop(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        items = list(tensors)
        for index, item in enumerate(items):
            yield item
            if tensors_done is not None:
                tensors_done(index + 1, len(items))

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # This module uses tqdm directly, past transformers' own switch for bars.
    bar = getattr(gguf_utils, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:
        gguf_utils.tqdm = loop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bar is not None:
            gguf_utils.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
