"""The student in Megatron: built from, and written back as, a Hugging Face checkpoint.

student        the interface of the trainer      parallel          ranks and their groups
model          the GPTModel                      architecture      the table of supported model types
batch          samples to micro-batches          micro_batch_loss  the loss of a micro-batch
logprobs       log-probs in chunks               logits            blocks of logits, and the gradient of their head
context        context parallelism               pipeline          pipeline stages, and where each parameter is
shards         tensor parallel layouts           lora              low-rank adapters
support_overlap  the student's top-k among the teacher's
checkpoint/    Hugging Face checkpoints, and exact state of every rank
"""
