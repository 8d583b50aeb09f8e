"""Files of the trainer's weights: Hugging Face checkpoints, and exact state of every rank.

May import the modules beside it and run_folder's atomic files.
"""
