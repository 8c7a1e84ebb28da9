"""kappa by the way drafts are verified: `python -m benchmarks.verifiers`."""
