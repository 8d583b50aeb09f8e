"""What is made from the models: the CRDs, the API reference and the page of metrics.

The top of the contract: may import all of it.
"""
