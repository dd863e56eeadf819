"""What fits, how fast, and at what quality, before anything is loaded."""
