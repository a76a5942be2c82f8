"""Serve models over HTTP: OpenAI's completions API, continuous batching, and a page.

The event loop reads requests and writes answers. One other thread steps the engines. The two share a queue of requests in one
direction, and one call to the event loop for each step in the other.
"""
