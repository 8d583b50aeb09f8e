"""Files of the run folder of a job on a cluster: a pod that mounts the claim read-only, and a tar over exec.

Exec, and not a port of the pod: nothing else in the cluster can ask for the files, and no NetworkPolicy keeps them from
the API server. Read run_files.py first; pod.py and claim.py are pure.
"""
