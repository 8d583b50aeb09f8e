"""Rollouts: prompts in, scored samples out, over a pool of engines that get new weights at every step.

May import weight_sync, engine, teacher, rewards, data, objective and run_folder.
"""
