"""Training data: the rows of files and data sets, prompts made of them, and samples, the one type of ragged data.

May import the leaf modules (failures, metrics, model_folder) alone.
"""
