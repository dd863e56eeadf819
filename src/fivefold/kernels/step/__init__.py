"""What surrounds attention in a decoding step: norms, skinny products, RoPE, and what is fused with them.

`reference.py` is in torch's operations; `triton.py` reads each weight once, near the rate of a copy; `chunk.py` is for
chunks of a prompt, whose products are torch's.
"""
