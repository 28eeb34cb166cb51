"""Gives the parts that read what others wrote every kind of input: a right result, or an error of ours.

``make fuzz CASES=1000000`` runs many cases of each property, and counts them; the tests run a few.
"""
