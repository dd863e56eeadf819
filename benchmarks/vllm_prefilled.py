"""A KV connector for vLLM that spares a benchmark the prefill: every token of a prompt but the last counts as computed,
and the whole cache is filled once with random tokens: numbers as they are, or as Fivefold's packed pages. A prompt
whose first token is 1 is computed as ever. Prompts of 32 * n + 1 tokens leave no group of 32 open.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import decode_bench_connector as bench

COMPUTED = 1
"""The first token of a prompt that is to be computed."""


def packed(config: Any, memory: torch.Tensor) -> torch.Tensor:
    """Pages of random tokens, int8 `[64, bytes]`."""
    from fivefold.kernels.pack import pack_pages
    from fivefold.serving.vllm.options import Options

    model = config.model_config
    form = Options.parse(config.additional_config["fivefold"]).pages(model.get_head_size(), model.dtype).form
    assert memory.shape[3] == form.nbytes
    keys, values = (torch.randn(64, form.tokens, form.head_dim, device=memory.device) for _ in range(2))
    fields = pack_pages(form, keys.to(model.dtype), values.to(model.dtype), 0, None)
    return torch.cat([x.reshape(64, -1).view(torch.int8) for x in fields], 1)


class Worker(bench.DecodeBenchConnectorWorker):
    filled = False

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, kv_cache_config)
        self.config = vllm_config

    def start_fill_kv(self, metadata: Any) -> None:
        if self.filled or not metadata.reqs_to_fill:
            return
        self.filled = True
        pages = None
        for name, memory in self.kv_caches.items():
            if name.startswith("fivefold."):
                continue  # the same blocks
            blocks = len(memory)
            if memory.dtype == torch.int8:
                pages = packed(self.config, memory) if pages is None else pages
                some = torch.arange(memory.shape[1] * memory.shape[2] * 64, device=memory.device) % 64
                made = pages[some].view(64, *memory.shape[1:])
            else:
                made = torch.randn((min(64, blocks), *memory.shape[1:]), device=memory.device) * 0.5
                if memory.dtype == torch.uint8:
                    made = made.to(torch.float8_e4m3fn).view(torch.uint8)
                made = made.to(memory.dtype)
            for first in range(0, blocks, len(made)):
                part = memory[first : first + len(made)]
                part.copy_(made[: len(part)])
        torch.cuda.synchronize()
        print("FILLED", len(self.kv_caches), tuple(memory.shape), memory.stride(), memory.dtype, flush=True)


class Prefilled(bench.DecodeBenchConnector):
    packed_blocks = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_worker is not None:
            self.connector_worker = Worker(vllm_config, kv_cache_config)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.prompt_token_ids[0] == COMPUTED:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
