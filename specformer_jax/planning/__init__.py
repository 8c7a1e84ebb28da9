"""What a decode step costs and is expected to commit, and how many drafts that makes worth verifying."""
