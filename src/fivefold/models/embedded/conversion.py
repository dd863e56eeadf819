"""From the GGUF to what `from_pretrained` reads: float32 safetensors, a config and a tokenizer."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

from fivefold.errors import ModelUnavailableError, first_line
from fivefold.models.embedded.folder import Progress, package_version
from fivefold.models.embedded.loading import quiet


def convert(gguf: Path, folder: Path, report: Progress) -> None:
    """Write the GGUF's model and tokenizer into `folder` in the form that `from_pretrained` reads."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet(lambda done, total: report("convert", done, total)):
            where = {"gguf_file": gguf.name, "local_files_only": True}
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
            config = copy.deepcopy(model.config)
            # The weights below are plain float32; left in, this entry would send loaders after the GGUF.
            for name in ("quantization_config", "_model_name_or_path"):
                if hasattr(config, name):
                    delattr(config, name)
            config.architectures = [type(model).__name__]
            # SmolLM2 splits every digit off before byte-level BPE. A GGUF only names that rule
            # (tokenizer.ggml.pre = "smollm") and transformers does not read the name: without this line
            # several spaces before a digit become other tokens than those the model was trained on.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            for name in ("is_local", "local_files_only"):  # how it was loaded, of no meaning to the next loader
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.model_max_length = config.max_position_embeddings
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template")
            config.save_pretrained(str(folder))
            model.generation_config.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
            _write_weights(model, folder / "model.safetensors", report)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the conversion
        if "No space left" in str(error):  # safetensors has its own exception for it
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise ModelUnavailableError(
            f"Converting {gguf.name} with transformers {package_version('transformers')} failed "
            f"({first_line(error)}); try `pip install -U 'fivefold[demo]'`."
        ) from error


def _write_weights(model: Any, path: Path, report: Progress) -> None:
    """The state dict as safetensors, tied tensors once (`save_pretrained` refuses a model from a GGUF)."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if identity not in seen:  # lm_head is the embedding: the config's tie_word_embeddings restores it
            seen.add(identity)
            tensors[name] = tensor.contiguous()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    report("write", 0, total)
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(path.with_name("config.json").stat().st_mode)  # safetensors makes it private, whatever the umask
    report("write", total, total)
