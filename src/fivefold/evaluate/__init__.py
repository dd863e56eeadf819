"""What compression costs, measured on real text."""
