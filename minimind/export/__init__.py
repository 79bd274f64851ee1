"""Models in the formats of other programs. Reading order: tensors, gguf, gguf_adapter, ollama."""
