"""Cython twins and primitives; `portway._accel` is the only module that imports them."""
