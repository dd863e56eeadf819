"""`python -m fivefold`: the same as the command `fivefold`."""

from fivefold.cli import main

if __name__ == "__main__":
    main()
