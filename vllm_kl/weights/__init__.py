"""Loads new weights and adapters into engines, and tracks the version of the weights."""
