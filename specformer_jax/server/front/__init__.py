"""What every request passes before a route sees it: its origin, its key, its size, its name in the log."""
