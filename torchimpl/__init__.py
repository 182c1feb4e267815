"""The operators and models of refimpl in PyTorch: the same names and arguments, for training, on any device.

Every function takes tensors of float64, float32, bfloat16 or float16 and returns the dtype of its first floating
argument. In 16 bits, what would overflow or stall there is formed in float32: norms, scores and their kernels, running
states, angles (float64 where the device has it). Nothing waits for the device, so values are not looked at: shapes and
dtypes are checked, NaN and infinity are not. What a function means stands in the docstring of its namesake in refimpl.
"""
