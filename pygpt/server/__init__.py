"""Serve models over HTTP: OpenAI's completions API, continuous batching, and a page."""
