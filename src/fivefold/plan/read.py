"""What a model is, from its configuration and the headers of its files: without torch, and without loading anything."""

from __future__ import annotations

import contextlib
import difflib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fivefold.errors import InputError, first_line
from fivefold.plan.config import Decoder, read_decoder, recognised
from fivefold.plan.files import measure, packed_bits
from fivefold.plan.layers import UnknownLayersError, layer_shapes, layer_types, state_is_known
from fivefold.plan.shape import LayerShape, ModelShape
from fivefold.plan.weights import Weights, count_weights

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_ATTENDED = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "moe", "mlp"}
_OWN_WAY = {
    "diffllama": "they attend to other keys and values than they give to the cache",
    "doge": "their attention masks are of a shape of their own",
    "minimax": "their lightning attention is computed in code of its own",
}


def read_model(source: str) -> ModelShape:
    """The shape of a model.

    source: a folder with a config.json (whose safetensors files are counted if they are there), a config.json, the name
    of a built-in shape (`known_names`), or a model of the Hub ("owner/name"), of which the configuration alone is
    fetched. Raises `InputError`.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return _shape(source, _load(path / "config.json", source), path)
    if path.is_file():
        return _shape(source, _load(path, source), path.parent if path.name == "config.json" else None)
    if (known := _known().get(source.strip().lower())) is not None:
        return replace(_shape(source, known, None), config="")  # how it turns keys is not in the list
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")) and all(source.split("/")):
        path = _from_hub(source)
        return _shape(source, _load(path, source), path.parent)
    raise InputError(
        f"there is no model {source!r}: give a folder with a config.json, an id of the Hub (owner/name), or a built-in "
        f"shape such as {_nearest(source)}."
    )


def known_names() -> list[str]:
    """The names of the built-in shapes."""
    return list(_known())


@cache
def _known() -> dict[str, dict[str, Any]]:
    text = files("fivefold.plan").joinpath("known.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def _nearest(source: str) -> str:
    name = source.strip().lower().rpartition("/")[2]
    found = difflib.get_close_matches(name, _known(), 3, 0.4) or ["llama-3.1-8b", "qwen3-8b", "gemma-3-12b"]
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]


def _from_hub(name: str) -> Path:
    """The configuration of a model of the Hub, from the cache of huggingface_hub or fetched into it."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found)
        _reach_hub()
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:
        raise InputError(
            f"the configuration of {name!r} could not be fetched from the Hub ({first_line(error)}): give a folder "
            f"with its config.json, or a built-in shape such as {_nearest(name)}."
        ) from None


def _reach_hub() -> None:
    """Raise OSError if there is no way to the Hub: its client would try for half a minute."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(urllib.error.HTTPError):  # it answers
            urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()


def _load(path: Path, source: str) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"the folder {source!r} has no config.json: give that of a model for transformers.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): give a model's config.json.") from None
    if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
        raise InputError(f"{path} names no model_type: give the config.json of a model for transformers.")
    return given


def _shape(source: str, given: Mapping[str, Any], folder: Path | None) -> ModelShape:
    family = given["model_type"]
    try:
        decoder = read_decoder(given)
        types = layer_types(decoder.values)
        layers = layer_shapes(decoder.values, types)
        weights = count_weights(decoder.values, layers, types, decoder.tied)
        signature, config = recognised(decoder, types)
    except UnknownLayersError:
        raise InputError(
            f"the configuration of {source!r} does not say which of its layers are of which type, and the rule of the "
            f"family {family!r} is not known: load it with transformers' AutoConfig and save it again."
        ) from None
    except KeyError as error:
        raise InputError(
            f"the configuration of {source!r} (family {family!r}) has no {error.args[0]}: add it to its config.json."
        ) from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError, AttributeError) as error:
        raise InputError(
            f"the configuration of {source!r} (family {family!r}) has a value that fits none ({first_line(error)}): "
            "correct it in its config.json."
        ) from None
    values = decoder.values
    found = measure(folder, len(layers), decoder.tied, decoder.quantized) if folder is not None else None
    dtype = found.dtype if found is not None and found.dtype and not _told(given) else decoder.dtype
    known_state = state_is_known(values, types)
    return ModelShape(
        name=source,
        family=values["model_type"],
        layers=layers,
        hidden=values["hidden_size"],
        intermediate=_intermediate(values),
        vocabulary=values["vocab_size"],
        parameters=found.parameters if found else weights.parameters,
        embedding=found.embedding if found else weights.embedding,
        routed=found.routed if found and weights.experts else weights.routed,
        routed_bytes=found.routed_bytes if found and weights.experts else _bytes(decoder, weights)[1],
        experts=weights.experts,
        chosen=weights.chosen,
        weight_bytes=found.nbytes if found else _bytes(decoder, weights)[0],
        dtype=dtype,
        context=values.get("max_position_embeddings"),
        measured=found is not None,
        counted=known_state and (found is not None or (weights.exact and decoder.alone)),
        signature=signature,
        config=config,
        why_not=_why_not(given, decoder, types, layers),
    )


def _intermediate(values: Mapping[str, Any]) -> int:
    """The width of what a token goes through in its widest MLP."""
    widths = values.get("intermediate_size") or values.get("moe_intermediate_size") or 4 * values["hidden_size"]
    return max(widths) if isinstance(widths, list | tuple) else widths


def _told(given: Mapping[str, Any]) -> bool:
    parts = [given, *(x for x in given.values() if isinstance(x, Mapping))]
    return any(part.get(name) for part in parts for name in ("dtype", "torch_dtype"))


def _bytes(decoder: Decoder, weights: Weights) -> tuple[int, int]:
    """Of all weights, and of those of routed experts. An estimate: packed weights have 24 bits of scale and zero for
    128 of them (MXFP4: 8 for 32, and only experts are packed); words are not packed."""
    each = BYTES.get(decoder.dtype, 2)
    bits = packed_bits(decoder.quantized) if decoder.quantized else None
    if bits is None:
        return weights.parameters * each, weights.routed * each
    if decoder.quantized.get("quant_method") == "mxfp4":
        packed, cost = weights.routed, bits + 8 / 32
    else:
        words = decoder.values["vocab_size"] * decoder.values["hidden_size"] * (1 if decoder.tied else 2)
        packed, cost = max(0, weights.parameters - words), bits + (24 / 128 if bits < 8 else 0)
    return int(packed * cost / 8 + (weights.parameters - packed) * each), int(weights.routed * cost / 8)


def _why_not(
    given: Mapping[str, Any], decoder: Decoder, types: list[str], layers: tuple[LayerShape, ...]
) -> str | None:
    """Why Fivefold cannot compress what a model keeps: what `models.specs.check_model` asks of the modules."""
    values, family = decoder.values, decoder.family
    if given.get("is_encoder_decoder") or values.get("is_encoder_decoder"):
        return "they are encoder-decoder models, whose cross-attention has a cache of another kind"
    if "type_vocab_size" in values:
        return "they are encoders, which keep nothing of what they have read"
    if values.get("kv_lora_rank"):
        return "their attention (MLA) keeps a compressed latent instead of keys and values"
    if family is None:
        return "this version of transformers does not know them"
    if values["model_type"] in _OWN_WAY:
        return _OWN_WAY[values["model_type"]]
    if not family.attends:
        return "none of their layers has attention that goes through transformers' AttentionInterface"
    strange = sorted({kind for kind in types if kind not in _ATTENDED})
    if strange:
        return f"they have layers of the type {strange[0]}"
    value = values.get("v_head_dim")
    if value and values.get("head_dim") and value != values["head_dim"]:
        return f"they have values of {value} channels beside keys of {values['head_dim']}"
    if not any(layer.kind in ("full", "sliding") and not layer.chunked for layer in layers):
        return "none of their layers keeps keys that can be compressed"
    return None
