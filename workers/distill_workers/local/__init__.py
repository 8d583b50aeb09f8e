"""What `distill run`, `evaluate` and `export` do on this machine.

The top layer beside the entry points: may import everything.
"""
