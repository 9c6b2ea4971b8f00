"""Arithmetic on logits: the formula, policies, sampling. Pure functions of tensors."""
