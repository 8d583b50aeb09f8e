"""`distill`, and `kubectl distill`: every command, on this machine and on a cluster.

It starts fast: what a command needs beyond rich and click (the Kubernetes client, the workers) is imported when it
runs. Read main.py first, then commands/, then what they share: job_state.py and run_folder.py, which make a
snapshot.py; views/, which show it; cluster.py, the API server; reader/, which brings files of its volumes.
"""
