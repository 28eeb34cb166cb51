"""Engines: where token ids become log-probs. ``base`` is the seam; each other module implements it once."""
