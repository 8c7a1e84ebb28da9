"""The target's building blocks, the paged cache, and the mesh that both are split over."""
