"""The student in Megatron: built from, and written back as, a Hugging Face checkpoint.

parallel       ranks and their groups            architecture   what each supported model_type looks like
model          the GPTModel                      hf             reading and writing Hugging Face checkpoints
batch          samples to micro-batches          logprobs       log-probs without [tokens, vocabulary] in memory
context        sequences split over ranks        logits         blocks of logits, and the gradient of their head
state          exact checkpoints                 tensor_file    safetensors files, read in place
stages         where parameters are, stages      student        the trainer's only door to all of it
"""
