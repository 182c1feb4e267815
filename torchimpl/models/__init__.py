"""The models of refimpl as modules to train: one file each, built from the Config of their namesake.

A state_dict has the names and shapes that the namesake's `shapes` gives, kernels (in, out): one safetensors file serves
both.
"""
