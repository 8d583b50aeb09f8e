"""What a run tells: metrics and progress while it goes on, metrics.jsonl, samples.jsonl, trackers, and the report.

May import evaluation and what lies below; decides nothing.
"""
