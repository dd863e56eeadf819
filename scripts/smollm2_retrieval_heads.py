"""Measure which KV heads of the embedded model look things up, and write the profile that `duo()` uses for it.

A random token sequence is repeated; a head that retrieves attends, from a token of a later copy, to the same token of
an earlier copy (echo) or to the one after it (induction): the two scores of RazorAttention (Tang et al., 2024, section
3.1). A KV head's score is the highest of its query heads', echo and induction added, over all earlier copies.
This is a training-free stand-in for DuoAttention's learned gates.

    python scripts/smollm2_retrieval_heads.py
"""

from pathlib import Path

import torch
from rich.progress import track
from transformers import DynamicCache

from fivefold.calibrate import Profile, config_hash, save_profile, signature
from fivefold.models import embedded

LENGTH, COPIES, SEQUENCES, SEED = 384, 4, 4, 0


def main() -> None:
    model, _ = embedded.load()
    model.set_attn_implementation("eager")
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator().manual_seed(SEED)
    scores = torch.zeros(config.num_hidden_layers, heads)
    for _ in track(range(SEQUENCES), "random sequences"):
        # Ordinary tokens only: the first ones of the vocabulary are special.
        once = torch.randint(100, config.vocab_size, (1, LENGTH), generator=generator)
        with torch.inference_mode():
            ids = once.repeat(1, COPIES)
            out = model(ids, past_key_values=DynamicCache(), output_attentions=True, logits_to_keep=1)
        for layer, weights in enumerate(out.attentions):
            for copies_back in range(1, COPIES):
                for shift in (0, 1):  # echo, induction
                    seen = weights[0].diagonal(-(copies_back * LENGTH - shift), dim1=1, dim2=2)
                    later = seen[:, -(COPIES - copies_back) * LENGTH :]
                    # Mean over all queries of the later copies that have a copy this far back.
                    scores[layer] += later.sum(1) / ((COPIES - 1) * LENGTH) / SEQUENCES
    best = scores.view(config.num_hidden_layers, kv_heads, heads // kv_heads).amax(-1)
    name = signature(config)
    folder = Path(__file__).parents[1] / "src" / "fivefold" / "profiles" / f"duo-{name}"
    settings = {
        "score": "echo + induction attention on repeated random tokens, highest query head of each kv head",
        "length": LENGTH, "copies": COPIES, "sequences": SEQUENCES, "seed": SEED,
    }  # fmt: skip
    save_profile(folder, Profile("duo", name, settings, {"scores": best}, config_hash(config)))
    ranked = best.flatten().sort(descending=True).values
    print(f"{folder}: scores {ranked[0]:.3f} ... {ranked[len(ranked) // 2]:.3f} (median) ... {ranked[-1]:.3f}")


if __name__ == "__main__":
    main()
