"""Answers to train on: read, packed into batches, kept as TFDS files, with the target's hooks."""
