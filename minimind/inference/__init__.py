"""Decoding: sampling, generation with a KV cache, streaming text."""
