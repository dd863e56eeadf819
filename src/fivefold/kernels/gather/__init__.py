"""Exact pages of rows into dense keys and values. `triton.py` needs Triton and is imported only where it is used."""
