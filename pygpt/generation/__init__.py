"""From requests to tokens: the engine, samplers, stop conditions and prefix caches."""
