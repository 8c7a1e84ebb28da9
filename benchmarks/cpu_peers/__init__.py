"""What a CPU's user could run instead, beside this project."""
