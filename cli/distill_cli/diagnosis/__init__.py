"""What `distill doctor` looks at and how it judges it: pure checks of findings.

May import nothing else of the command line.
"""
