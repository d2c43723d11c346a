"""Pallas kernels, a leaf package: it takes arrays and callables, imports jax alone, and knows nothing of jaxlong.

A kernel is a folder with `ref.py` (its float32 oracle), `gpu.py`, `tpu.py` and an `__init__.py` with the entry, which
raises NotImplementedError with the reason for shapes and devices that it does not take. `jaxlong.ops` tries entries in
order. No kernel has landed yet: attention runs on `jaxlong.ops.dense` and `jaxlong.ops.blockwise` everywhere.
"""
