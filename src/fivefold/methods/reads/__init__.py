"""What a decoding step reads (what is stored stays)."""
