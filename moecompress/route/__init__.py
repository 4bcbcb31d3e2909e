"""Waking fewer experts: tune a policy on text, measure what it costs, write it into a checkpoint, apply it to a model."""

from __future__ import annotations

from moecompress.runtime.skipping import POLICIES, Policy, apply, read_policy, remove

__all__ = ["POLICIES", "Policy", "apply", "read_policy", "remove"]
