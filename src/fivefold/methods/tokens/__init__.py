"""How many tokens each head holds."""
