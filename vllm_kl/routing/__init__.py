"""Cuts a call into parts, and says which replica or server each part goes to. It knows neither.

affinity  which replica or server gets a prompt
shards    cuts the requests of a call, whole prompts together
"""
