"""Tensordicts <-> rows of token ids and numbers: keys, chat templates, masks, alignment, layouts. Knows no engine and no model."""
