"""Verification that is not seed-exact: what it is called, and its rules as pure functions over probabilities."""
