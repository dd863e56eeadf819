"""A few prompts through vLLM in a process of its own: `python -m fivefold.serving.vllm.offline < WANTED > FOUND`, JSON
both. `fivefold vllm-check` asks it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

TOP = 20
"""Log-probabilities that are given of a token, at most."""


def generate(wanted: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, and what vLLM says of its capacity.

    wanted: model, recipe (None: vLLM's own cache), prompts (token ids), tokens, settings (of `vllm.LLM`). Returns
    tokens `[prompts][tokens]`, logprobs the same with `[id, log-probability]` pairs of the likeliest `TOP`, capacity
    (tokens), version.
    """
    import vllm
    from vllm import LLM, SamplingParams

    config = {} if wanted["recipe"] is None else {"fivefold": wanted["recipe"]}
    llm = LLM(model=wanted["model"], additional_config=config, enable_prefix_caching=False, **wanted["settings"])
    sampling = SamplingParams(
        temperature=0, max_tokens=wanted["tokens"], ignore_eos=True, logprobs=TOP, detokenize=False
    )
    outs = llm.generate([{"prompt_token_ids": ids} for ids in wanted["prompts"]], sampling, use_tqdm=False)
    first = [out.outputs[0] for out in outs]
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "tokens": [list(one.token_ids) for one in first],
        "logprobs": [[[[i, x.logprob] for i, x in at.items()] for at in one.logprobs or ()] for one in first],
        "capacity": cache.kv_cache_size_tokens,
        "version": vllm.__version__,
    }


def main() -> None:
    """What libraries print to stdout goes to stderr: there stands the answer alone."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = generate(json.load(sys.stdin))
    json.dump(found, answer)
    answer.close()


if __name__ == "__main__":
    main()
