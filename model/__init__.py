"""Tensors: the model, its schedule, objective, masks, encoders, sampler and weight files."""
