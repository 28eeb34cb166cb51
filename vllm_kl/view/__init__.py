"""Keeps scored samples in a file of JSON lines, and writes the page that shows them."""
