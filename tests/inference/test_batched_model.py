"""The forward pass of many texts, held against the model's own and against itself."""

import random

import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.errors import ResourceError
from minimind.inference import matmul
from minimind.inference.batched_model import CHUNK, BatchedModel, Part
from minimind.model import apply_lora
from tests.support.tiny import SHAPES, chunks_of, make, words


@pytest.mark.numeric
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_are_those_of_the_model(shape: str) -> None:
    model, ids = make(**SHAPES[shape]), words(200)
    batch = BatchedModel(model, 3, 256)
    wanted = model.logits(model(torch.tensor([ids])))[0]
    assert wanted.std() > 0.1
    read = batch.forward([], chunks_of(1, ids[:150]))
    torch.testing.assert_close(read, wanted[[63, 127, 149]], atol=1e-4, rtol=1e-4)
    for at in range(150, 200):
        written = batch.forward([Part(1, at, ids[at : at + 1])], [])
        torch.testing.assert_close(written[0], wanted[at], atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
@torch.inference_mode()
def test_logits_are_those_that_are_wanted() -> None:
    """Of a text whose chunks begin anywhere, and of another that has none to give."""
    model, ids = make(), words(150)
    batch = BatchedModel(model, 3, 256)
    wanted = model.logits(model(torch.tensor([ids])))[0]
    parts = [
        Part(1, 0, ids[:30], logits_for_last=0),
        Part(0, 0, ids[:64], logits_for_last=0),
        Part(1, 30, ids[30:90], logits_for_last=60),
        Part(1, 90, ids[90:100], logits_for_last=3),
    ]
    read = batch.forward([], parts)
    torch.testing.assert_close(read, wanted[[*range(30, 90), 97, 98, 99]], atol=1e-4, rtol=1e-4)
    nothing = batch.forward([], [Part(1, 100, ids[100:120], logits_for_last=0)])
    assert nothing.shape == (0, model.config.vocab_size)
    written = batch.forward(
        [Part(1, 120, [ids[120]])], [Part(0, 64, ids[64:128], logits_for_last=2)]
    )
    torch.testing.assert_close(written, wanted[[120, 126, 127]], atol=1e-4, rtol=1e-4)


@pytest.mark.numeric
@torch.inference_mode()
def test_an_adapter_in_training_counts() -> None:
    model = apply_lora(make(), LoRASettings(rank=4, targets=["all"]))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    ids = words(20)
    wanted = model.logits(model(torch.tensor([ids])))[0, -1]
    found = BatchedModel(model, 1, 64).forward([], chunks_of(0, ids))[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def trace(batch: BatchedModel, slot: int, ids: list[int], prompt: int) -> list[torch.Tensor]:
    """Logits of one text on its own: of its prompt, read in chunks, and of each token then."""
    rows = [batch.forward([], [part])[0] for part in chunks_of(slot, ids[:prompt])][-1:]
    return rows + [
        batch.forward([Part(slot, at, [ids[at]])], [])[0] for at in range(prompt, len(ids))
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["llama", "experts", "wide"])
def test_a_text_comes_to_the_same_bits_whoever_is_beside_it(
    shape: str, kind: str, threads: int
) -> None:
    wide = dict(hidden_size=256, intermediate_size=1408, head_dim=32, num_attention_heads=8)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = make(dtype, **(wide if shape == "wide" else SHAPES[shape]))
    rng, slots = random.Random(1), 9
    texts = {slot: words(rng.randrange(70, 100), slot) for slot in range(slots)}
    prompts = {slot: rng.randrange(1, 90) for slot in range(slots)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Each alone, in a slot that is not the one it has in company.
        lonely = BatchedModel(model, slots, 256, int8=kind == "int8")
        alone = {s: trace(lonely, (s + 4) % slots, ids, prompts[s]) for s, ids in texts.items()}
        together = BatchedModel(model, slots, 256, int8=kind == "int8")
        assert together.batch_invariant
        seen: dict[int, list[torch.Tensor]] = {slot: [] for slot in range(slots)}
        at = dict.fromkeys(range(slots), 0)
        while open_slots := [slot for slot in range(slots) if at[slot] < len(texts[slot])]:
            singles, reading = [], []
            for slot in open_slots:
                if rng.random() < 0.3:  # not everybody takes part in every step
                    continue
                ids, start = texts[slot], at[slot]
                if start >= min(prompts[slot], len(ids)):
                    singles.append(Part(slot, start, ids[start : start + 1]))
                else:
                    end = min(start + CHUNK, prompts[slot], len(ids))
                    reading.append(Part(slot, start, ids[start:end]))
            if not singles + reading:
                continue
            logits = together.forward(singles, reading)
            for part, row in zip(singles + reading, logits, strict=True):
                at[part.slot] += len(part.tokens)
                if at[part.slot] >= min(prompts[part.slot], len(texts[part.slot])):
                    seen[part.slot].append(row)
        for slot in range(slots):
            assert len(seen[slot]) == len(alone[slot])
            assert all(map(torch.equal, seen[slot], alone[slot])), slot
    finally:
        torch.set_num_threads(before)


@pytest.mark.numeric
@torch.inference_mode()
def test_attention_text_by_text_gives_the_same_logits() -> None:
    """What is done where company would change its bits."""
    texts = [words(length, length) for length in (70, 40, 130)]
    seen = []
    for apart in (False, True):
        batch = BatchedModel(make(), 3, 256)
        batch._attend_separately = apart
        for slot, ids in enumerate(texts):
            batch.forward([], chunks_of(slot, ids))
        singles = [Part(slot, len(ids), [5]) for slot, ids in enumerate(texts)]
        assert len(batch._attention_groups(singles, [])) == (3 if apart else 1)
        seen.append(batch.forward(singles, []))
    torch.testing.assert_close(*seen)


@pytest.mark.numeric
@torch.inference_mode()
def test_where_no_range_of_rows_holds_there_is_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    promised = BatchedModel(make(), 3, 256)
    assert promised.batch_invariant
    assert promised.invariance_note == "an answer does not depend on other requests, to the bit"
    monkeypatch.setattr(matmul, "find_row_range", lambda *shape: None)
    model, ids = BatchedModel(make(), 3, 256), words(100)
    assert not model.batch_invariant
    assert model.invariance_note == "other requests may change the last bits of an answer"
    found, wanted = (batch.forward([], chunks_of(0, ids)) for batch in (model, promised))
    torch.testing.assert_close(found, wanted)


def test_a_copied_prefix_is_the_prefix() -> None:
    batch, ids = BatchedModel(make(), 3, 256), words(200)
    wanted = trace(batch, 0, ids, 150)
    batch.cache.copy_prefix(0, 2, 2 * CHUNK)
    rest = Part(2, 2 * CHUNK, ids[2 * CHUNK : 150])
    found = [batch.forward([], [rest])[0]]
    found += [batch.forward([Part(2, at, [ids[at]])], [])[0] for at in range(150, 200)]
    assert all(map(torch.equal, found, wanted))


@pytest.mark.numeric
def test_integers_are_close_to_the_weights() -> None:
    model, ids = make(), words(60)
    exact, rounded = (BatchedModel(model, 1, 64, int8=int8) for int8 in (False, True))
    wanted, found = (batch.forward([], chunks_of(0, ids))[0] for batch in (exact, rounded))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


def test_room_that_no_machine_has_is_told() -> None:
    model = make(max_position_embeddings=10**12)
    with pytest.raises(ResourceError, match=r"16 × 1,000,000,000,000 tokens needs [\d.]+ GB"):
        BatchedModel(model, 16, 10**12)


def test_memory_is_taken_as_it_is_used() -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    before = process.memory_info().rss
    batch = BatchedModel(make(max_position_embeddings=2**20), 16, 2**20)  # 8 GB if all is used
    batch.forward([], chunks_of(0, words(64)))
    assert process.memory_info().rss - before < 100 << 20
