"""Queries, keys and values out of one product, turned by their rotary angles."""
