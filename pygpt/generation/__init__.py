"""Complete requests: the engine, samplers, stop conditions and prefix caches."""
