"""Decoding: from a model directory to a stream of text. Read the files in this order:

1. `load.py`: a model directory as a model and a tokenizer.
2. `requests.py`: requests to the engine and their results.
3. `engine.py`: one step of the engine (schedule, prefill, decode, sample, deliver).
4. `scheduler.py`, `sequences.py`, `prefix_cache.py`: which requests run, and what a step prefills.
5. `batched_model.py`, `packed_layers.py`, `kv_cache.py`: the forward pass of a batch.
6. `sampling.py`, `vocabulary.py`, `grammar.py`: from logits to the next token.
7. `detokenizer.py`, `stop_strings.py`: from tokens to text.
8. `matmul.py`, `graphs.py`, `capacity.py`, `engine_thread.py`: batch invariance, speed and memory.
9. `generate.py`, `truncation.py`, `defaults.py`: helpers for callers.
"""
