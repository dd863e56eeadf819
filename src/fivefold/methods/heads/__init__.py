"""How many heads hold the whole context."""
