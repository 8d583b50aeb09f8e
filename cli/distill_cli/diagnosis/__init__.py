"""What `distill doctor` observes of a cluster, and how it judges it: one collection, then pure checks, each a finding.

May import cluster and failure, and nothing else of the command line.
"""
