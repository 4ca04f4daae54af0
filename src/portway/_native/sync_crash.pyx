# cython: boundscheck=False, wraparound=False, binding=False
"""`sync` with crash points between any two stores, for tests; built by PORTWAY_CRASH_POINTS=1 only."""

include "sync.pyx"
