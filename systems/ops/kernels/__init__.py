"""Triton kernels of GPUs: neurons over all SNN time steps, norms in what follows them, token shift, and WKV.

A compiler that is given the same arithmetic makes of it a kernel or two for each few steps; here it is one launch each
way, and no more than inputs and outputs go through memory. `systems.spiking.multistep`, `systems.ops.norms`,
`systems.ops.token_shift` and `systems.ops.wkv` define what is computed, and do it themselves where there are no
kernels. Shapes, sizes and layouts are theirs to check.
"""
