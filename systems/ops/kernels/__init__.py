"""Triton kernels for GPUs: neurons over all SNN time steps, fused batch norms, token shift, and WKV.

`torch.compile` would emit several kernels for these loops; here forward and backward are one launch each, and only
inputs and outputs go through memory. `systems.spiking.multistep`, `systems.ops.norms`, `systems.ops.token_shift` and
`systems.ops.wkv` define the operations, compute them where Triton is missing, and check shapes and layouts.

In kernels, `acc_dtype` is the accumulator dtype and `block` the number of elements per program. Shapes name axes of
dense memory: an argument `(T, n)` may have any shape of `T * n` elements.
"""
