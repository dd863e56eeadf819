"""The model that a command works with: loaded, or, if it is the embedded one, fetched with bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import TaskID

from fivefold.cli.terminal import progress_bars
from fivefold.errors import InputError, first_line

_STAGES = {
    "wait": "Waiting for another fetch",
    "download": "Downloading",
    "verify": "Checking",
    "convert": "Converting",
    "write": "Writing",
}


def fetch_embedded(source: str = "auto", force: bool = False) -> tuple[int, Path]:
    """Fetch the embedded model with a bar for each stage; returns how many there were, and its folder."""
    from fivefold.models import embedded

    with progress_bars() as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), amount="")
            if not total:
                amount = ""
            elif stage == "convert":
                amount = f"{done} of {total} tensors"
            else:
                amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
            bars.update(tasks[stage], completed=done, total=total or None, amount=amount)

        folder = embedded.fetch(source, progress, force)
    return len(tasks), folder


def fetch_if_missing(model: str | None) -> None:
    """Fetch the embedded model if a command works with it (`model` None) and it is not here."""
    from fivefold.models import embedded

    if model is None and not embedded.is_fetched():
        fetch_embedded()


def require_embedded(model: str | None) -> None:
    """Raise the loader's own sentence, before any heavy import, if the embedded model is missing."""
    from fivefold.models import embedded

    if model is None and not embedded.is_fetched():
        embedded.load()


def model_name(model: str | None) -> str:
    """What tells a model from others, in a file of results: of a folder, where it is."""
    from fivefold.models import embedded

    if model is None:
        return embedded.MODEL_NAME
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _not_loaded(name: str, error: Exception) -> InputError:
    return InputError(
        f"the model {name!r} cannot be loaded ({first_line(error)}): give a folder with a model of transformers, or "
        "the name of one on the Hub, which must be reachable or have been downloaded before."
    )


def load_model(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer; `name` None is the embedded one."""
    import torch

    silence()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"the device {device!r} cannot be used here ({first_line(error)}): use auto or cpu, or cuda on a "
            "machine with a GPU."
        ) from None
    if name is None:
        from fivefold.models import embedded

        model, tokenizer = embedded.load(None if dtype == "auto" else getattr(torch, dtype))
        return model.to(place), tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fivefold.models.huggingface import check_model

    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1):
        raise InputError(f"there is no model folder {name!r}: give one that exists, or the name of a model on the Hub.")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(name, error) from error
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _not_loaded(name, error) from error
    check_model(shape)  # before the weights, which may take minutes
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(name, error) from error
    return model.to(place).eval(), tokenizer


def silence() -> None:
    """No bars or warnings of transformers and the hub client: the commands have their own."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    disable_progress_bars()
