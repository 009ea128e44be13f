"""Twins of torch.nn modules: for training (``qat``) and in integers (``quantized``)."""
