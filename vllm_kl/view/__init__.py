"""Scored samples, in a file of JSON lines, and the page that shows them."""
