"""Fivefold's pages inside serving engines; a package for each. Nothing of an engine is imported here."""
