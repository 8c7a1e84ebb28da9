"""What a step costs and is expected to commit, and how many tokens that makes it worth reading."""
