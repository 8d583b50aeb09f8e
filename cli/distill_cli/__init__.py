"""`distill`, and `kubectl distill`: every command, on this machine and on a cluster.

Light: what a command needs beyond rich and click (the Kubernetes client, the workers) is imported when it runs. Read in
this order: main.py, then a module for each group of commands (manifests, jobs, watch, logs, doctor, local), then what
they share (cluster.py, moment.py, console.py).
"""
