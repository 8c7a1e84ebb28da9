"""The target's building blocks and the mesh they are split over."""
