"""Everything that touches a model library."""
