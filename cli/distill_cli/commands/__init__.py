"""The commands of `distill`, a module for each group of them.

May import everything of the command line but main: what they show is in views, what they observe in diagnosis.
"""
