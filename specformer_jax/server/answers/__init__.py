"""From the engine back to a client: the choices of one answer, and the objects that show them."""
