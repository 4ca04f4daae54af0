"""Conformance tests for what third parties implement: run them on your provider, from any test framework."""

from __future__ import annotations

from .handoff import check_handoff

__all__ = ["check_handoff"]
