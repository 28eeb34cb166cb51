"""Reads token ids and masks from tensordicts and writes results back. Knows no engine and no model."""
