"""How many numbers a token takes."""
