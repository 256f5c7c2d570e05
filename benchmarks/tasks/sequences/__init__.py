"""Language models and forecasters in float32, float16 or few bits, and their data."""
