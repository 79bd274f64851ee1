"""The batched forward pass, compared with the model's own and across batches."""

import random

import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.errors import ResourceError
from minimind.inference import matmul
from minimind.inference.batched_model import CHUNK, BatchedModel, Part
from minimind.model import apply_lora
from tests.support.decoding import enable_native
from tests.support.tiny import SHAPES, chunks_of, make_tiny, random_tokens


@pytest.mark.numeric
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_equal_those_of_the_model(shape: str) -> None:
    model, ids = make_tiny(**SHAPES[shape]), random_tokens(200)
    batch = BatchedModel(model, 3, 256)
    expected = model.logits(model(torch.tensor([ids])))[0]
    assert expected.std() > 0.1
    read = batch.forward([], chunks_of(1, ids[:150]))
    torch.testing.assert_close(read, expected[[63, 127, 149]], atol=1e-4, rtol=1e-4)
    for at in range(150, 200):
        written = batch.forward([Part(1, at, ids[at : at + 1])], [])
        torch.testing.assert_close(written[0], expected[at], atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
@torch.inference_mode()
def test_logits_of_the_last_tokens_of_each_part() -> None:
    """One sequence has parts of any length; no logits are requested for another one."""
    model, ids = make_tiny(), random_tokens(150)
    batch = BatchedModel(model, 3, 256)
    expected = model.logits(model(torch.tensor([ids])))[0]
    parts = [
        Part(1, 0, ids[:30], logits_for_last=0),
        Part(0, 0, ids[:64], logits_for_last=0),
        Part(1, 30, ids[30:90], logits_for_last=60),
        Part(1, 90, ids[90:100], logits_for_last=3),
    ]
    read = batch.forward([], parts)
    torch.testing.assert_close(read, expected[[*range(30, 90), 97, 98, 99]], atol=1e-4, rtol=1e-4)
    empty = batch.forward([], [Part(1, 100, ids[100:120], logits_for_last=0)])
    assert empty.shape == (0, model.config.vocab_size)
    written = batch.forward(
        [Part(1, 120, [ids[120]])], [Part(0, 64, ids[64:128], logits_for_last=2)]
    )
    torch.testing.assert_close(written, expected[[120, 126, 127]], atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
@torch.inference_mode()
def test_an_adapter_in_training_is_merged() -> None:
    model = apply_lora(make_tiny(), LoRASettings(rank=4, targets=["all"]))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    ids = random_tokens(20)
    expected = model.logits(model(torch.tensor([ids])))[0, -1]
    actual = BatchedModel(model, 1, 64).forward([], chunks_of(0, ids))[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def logits_alone(batch: BatchedModel, slot: int, ids: list[int], prompt: int) -> list[torch.Tensor]:
    """Return the logits of a sequence in batches without others, from its last prompt token on."""
    rows = [batch.forward([], [part])[0] for part in chunks_of(slot, ids[:prompt])][-1:]
    return rows + [
        batch.forward([Part(slot, at, [ids[at]])], [])[0] for at in range(prompt, len(ids))
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("decoding", ["torch", "compiled"])
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["llama", "experts", "wide"])
def test_logits_are_batch_invariant(
    shape: str, kind: str, threads: int, decoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoding == "compiled":
        enable_native(monkeypatch)
    wide = dict(hidden_size=256, intermediate_size=1408, head_dim=32, num_attention_heads=8)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = make_tiny(dtype, **(wide if shape == "wide" else SHAPES[shape]))
    rng, slots = random.Random(1), 9
    sequences = {slot: random_tokens(rng.randrange(70, 100), slot) for slot in range(slots)}
    prompts = {slot: rng.randrange(1, 90) for slot in range(slots)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Without others, each sequence has another slot than in the batch.
        single = BatchedModel(model, slots, 256, int8=kind == "int8")
        expected = {
            s: logits_alone(single, (s + 4) % slots, ids, prompts[s])
            for s, ids in sequences.items()
        }
        batched = BatchedModel(model, slots, 256, int8=kind == "int8")
        assert batched.batch_invariant and batched.is_native == (decoding == "compiled")
        logits: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(slots)}
        at = dict.fromkeys(range(slots), 0)
        while open_slots := [slot for slot in range(slots) if at[slot] < len(sequences[slot])]:
            decode, prefill = [], []
            for slot in open_slots:
                if rng.random() < 0.3:  # not every sequence is part of every step
                    continue
                ids, start = sequences[slot], at[slot]
                if start >= min(prompts[slot], len(ids)):
                    decode.append(Part(slot, start, ids[start : start + 1]))
                else:
                    end = min(start + CHUNK, prompts[slot], len(ids))
                    prefill.append(Part(slot, start, ids[start:end]))
            if not decode + prefill:
                continue
            rows = batched.forward(decode, prefill)
            for part, row in zip(decode + prefill, rows, strict=True):
                at[part.slot] += len(part.tokens)
                if at[part.slot] >= min(prompts[part.slot], len(sequences[part.slot])):
                    logits[part.slot].append(row)
        for slot in range(slots):
            assert len(logits[slot]) == len(expected[slot])
            assert all(map(torch.equal, logits[slot], expected[slot])), slot
    finally:
        torch.set_num_threads(before)


@pytest.mark.numeric
@torch.inference_mode()
def test_attention_sequence_by_sequence_gives_the_same_logits() -> None:
    """The fallback for processors on which attention is not batch-invariant."""
    sequences = [random_tokens(length, length) for length in (70, 40, 130)]
    logits = []
    for separately in (False, True):
        batch = BatchedModel(make_tiny(), 3, 256)
        batch._attend_separately = separately
        for slot, ids in enumerate(sequences):
            batch.forward([], chunks_of(slot, ids))
        decode = [Part(slot, len(ids), [5]) for slot, ids in enumerate(sequences)]
        assert len(batch._attention_groups(decode, [])) == (3 if separately else 1)
        logits.append(batch.forward(decode, []))
    torch.testing.assert_close(*logits)


@pytest.mark.numeric
@torch.inference_mode()
def test_without_a_row_range_the_model_is_not_batch_invariant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    invariant = BatchedModel(make_tiny(), 3, 256)
    assert invariant.batch_invariant
    assert invariant.invariance_note == "an answer does not depend on other requests, to the bit"
    monkeypatch.setattr(matmul, "find_row_range", lambda *shape: None)
    model, ids = BatchedModel(make_tiny(), 3, 256), random_tokens(100)
    assert not model.batch_invariant
    assert model.invariance_note == "other requests may change the last bits of an answer"
    actual, expected = (batch.forward([], chunks_of(0, ids)) for batch in (model, invariant))
    torch.testing.assert_close(actual, expected)


def test_a_copied_prefix_gives_the_same_bits() -> None:
    batch, ids = BatchedModel(make_tiny(), 3, 256), random_tokens(200)
    expected = logits_alone(batch, 0, ids, 150)
    batch.cache.copy_prefix(0, 2, 2 * CHUNK)
    rest = Part(2, 2 * CHUNK, ids[2 * CHUNK : 150])
    actual = [batch.forward([], [rest])[0]]
    actual += [batch.forward([Part(2, at, [ids[at]])], [])[0] for at in range(150, 200)]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.numeric
def test_int8_logits_are_close_to_exact_ones() -> None:
    model, ids = make_tiny(), random_tokens(60)
    exact, rounded = (BatchedModel(model, 1, 64, int8=int8) for int8 in (False, True))
    expected, actual = (batch.forward([], chunks_of(0, ids))[0] for batch in (exact, rounded))
    assert 0 < (actual - expected).norm() / expected.norm() < 0.1


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = make_tiny(max_position_embeddings=10**12)
    with pytest.raises(ResourceError, match=r"16 × 1,000,000,000,000 tokens needs [\d.]+ GB"):
        BatchedModel(model, 16, 10**12)


def test_unused_cache_takes_no_memory() -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    before = process.memory_info().rss
    batch = BatchedModel(make_tiny(max_position_embeddings=2**20), 16, 2**20)  # 8 GB when full
    batch.forward([], chunks_of(0, random_tokens(64)))
    assert process.memory_info().rss - before < 100 << 20
