"""The weights of a model in safetensors files, counted from the files' headers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fivefold.errors import InputError

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LOOKED_UP = re.compile(
    r"(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embed_tokens_per_layer|wpe|embed_positions"
    r"|backbone\.embeddings?)\.weight$"
)
_POSITIONS = re.compile(r"(wpe|embed_positions|embed_tokens_per_layer)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_OF_PICTURES = re.compile(r"(^|\.)(vision|visual|audio|image|vision_tower|audio_tower|vision_model)[\w]*\.")
_ROUTED = re.compile(r"\.experts\.|block_sparse_moe\.(in|out)put_linear\.")
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
_NO_WEIGHT = re.compile(  # how packed weights are unpacked, and buffers of old files
    r"(scales?|scale_inv|weight_scale_2|zeros|zero_point|g_idx|absmax|quant_map|SCB|weight_format|weight_shape"
    r"|weight_scale|quant_state\.\w+|inv_freq|masked_bias|attn\.bias)$"
)
_MOST = 100 << 20  # a header longer than that is none


@dataclass(frozen=True)
class Measured:
    """parameters, embedding, routed, routed_bytes, nbytes: as in `ModelShape`. dtype: of most weights that are not
    packed; None if all are."""

    parameters: int
    embedding: int
    routed: int
    routed_bytes: int
    nbytes: int
    dtype: str | None


def measure(folder: Path, layers: int, tied: bool, quantized: Mapping[str, Any]) -> Measured | None:
    """Count the weights in a folder; None if its safetensors files are not all there. tied: whether the configuration
    says that the output layer is the embedding. quantized: its `quantization_config`. Raises `InputError`."""
    files = _files(folder)
    if not files:
        return None
    bits = packed_bits(quantized) or 8
    total = embedding = looked_up = output = routed = routed_bytes = nbytes = 0
    dtypes: Counter[str] = Counter()
    for name, dtype, shape, size in (entry for path in files for entry in _header(path)):
        layer, pictures = _LAYER.search(name), _OF_PICTURES.search(name)
        if name.startswith("mtp.") or (layer and not pictures and int(layer[3]) >= layers):
            continue  # heads that guess several tokens ahead, which transformers does not load
        nbytes += size
        routed_bytes += size if _ROUTED.search(name) else 0
        if _NO_WEIGHT.search(name):
            continue
        count = prod(shape) * (8 * size // max(1, prod(shape)) // bits if quantized and dtype in ("I32", "U8") else 1)
        total += count
        dtypes[dtype] += size
        routed += count if _ROUTED.search(name) else 0
        if pictures:
            continue
        if _POSITIONS.search(name):
            looked_up += count
        elif _LOOKED_UP.search(name):
            embedding += count
        elif _OUTPUT.search(name):
            output += count
            if tied:  # written twice, loaded once
                total, nbytes = total - count, nbytes - size
    most = max((x for x in dtypes if x in _FLOATS), key=dtypes.__getitem__, default=None)
    own = embedding if output and not tied else 0
    return Measured(total, looked_up + own, routed, routed_bytes, nbytes, _FLOATS[most] if most else None)


def packed_bits(quantized: Mapping[str, Any]) -> int | None:
    """Bits of a packed weight. quantized: a `quantization_config`; None if it says nothing that is known."""
    method = str(quantized.get("quant_method") or "")
    groups = [one.get("weights") or {} for one in (quantized.get("config_groups") or {}).values()]
    told = [quantized.get("bits"), quantized.get("w_bit"), *(weights.get("num_bits") for weights in groups)]
    if quantized.get("load_in_4bit") or method == "mxfp4":
        told.append(4)
    if quantized.get("load_in_8bit") or "fp8" in method:
        told.append(8)
    return min((int(x) for x in told if x), default=None)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index} lists no weights: fetch it anew.") from None
        found = [folder / str(name) for name in names]
    else:
        one = folder / "model.safetensors"
        found = [one] if one.is_file() else sorted(folder.glob("model*.safetensors"))
    return found if all(path.is_file() for path in found) else []


def _header(path: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and bytes of each tensor of a file."""
    try:
        with path.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if not 0 < length <= _MOST:
                raise ValueError
            tensors = json.loads(data.read(length))
        for name, entry in tensors.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                yield name, entry["dtype"], entry["shape"], last - first
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no safetensors file: fetch it anew.") from None
