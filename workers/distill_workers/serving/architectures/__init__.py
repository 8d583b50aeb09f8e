"""The package that SGLang is given as SGLANG_EXTERNAL_MODEL_PACKAGE: it imports the modules in here as it starts, and
its own two hundred and fifty only for a model of another architecture.
"""
