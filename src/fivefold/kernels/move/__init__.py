"""Numbers from and to many places in memory. `triton.py` needs Triton and is imported only where it is used."""
