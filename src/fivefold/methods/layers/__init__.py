"""How many layers hold a cache."""
