"""What clients may send: OpenAI's fields that this server honours, and what it says of the others."""
