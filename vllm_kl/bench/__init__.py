"""Measures how fast log-probs are read: the command ``vllm-kl bench``."""
