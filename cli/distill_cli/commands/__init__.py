"""The commands of `distill`, a module for each group; what they show is beside them.

May import everything here but main.
"""
