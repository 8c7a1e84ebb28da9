"""Compiling for chips that are not there: whole programs, what is read off them, and GPUs to compile for."""
