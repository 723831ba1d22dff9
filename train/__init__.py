"""Training of NHA language models."""
