"""Whole lists of prompts answered in batches of ragged rows."""
