"""The HTTP surface of the engine: an OpenAI-compatible API, metrics and a page to try it. Extra `serve`."""
