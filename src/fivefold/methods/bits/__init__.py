"""How many bits a number takes."""
