"""Pallas kernels, a leaf package: it takes arrays and callables, imports jax alone, and knows nothing of jaxlong.

A kernel is a folder with `ref.py` (its float32 oracle), `twin.py` (its algorithm in jax.numpy), `gpu.py` (Hopper),
`tpu.py` and an `__init__.py` with the entry, which tells why it does not take arguments or a machine. `jaxlong.ops`
tries entries in order and falls through to plain JAX. `flash` is attention over the tiles of a `plan.MaskPlan`.
Which kernels a program gets is asked while it is traced: `machine` tells what device it is for.
"""
