"""The verbs of `serve.py` and `train.py`."""
