"""Decode steps as CUDA graphs capture them; capture itself is tested on a GPU only."""

import pytest
import torch

from minimind.inference.batched_model import BatchedModel, Part
from minimind.inference.graphs import GraphedModel, graph_inputs, graph_shape
from tests.support.tiny import SHAPES, VOCAB, chunks_of, make_tiny, random_tokens

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_decoding_all_slots_equals_decoding_the_used_ones(shape: str) -> None:
    """Slot 1 is unused, and the prompt of slot 2 is only half prefilled."""
    model = make_tiny(**SHAPES[shape])
    plain, captured = BatchedModel(model, 5, 256), BatchedModel(model, 5, 256)
    captured.prepare_decode()
    sequences, half = {0: random_tokens(90, 0), 3: random_tokens(130, 3)}, random_tokens(200, 2)
    for batch in (plain, captured):
        batch.forward([], chunks_of(2, half[:128]))
        for slot, ids in sequences.items():
            batch.forward([], chunks_of(slot, ids[:70]))
    for at in range(70, 90):
        decode = [Part(slot, at, ids[at : at + 1]) for slot, ids in sequences.items()]
        slots, span = graph_shape(captured, decode)
        assert (slots, span) == (4, 256)
        tokens, positions = torch.tensor(graph_inputs(captured, decode, slots))
        logits = captured.decode(tokens, positions, span)
        assert logits.shape == (4, model.config.vocab_size)
        expected = plain.forward(decode, [])
        torch.testing.assert_close(logits[[0, 3]], expected, atol=1e-5, rtol=1e-5)
    rest = [Part(2, 128, half[128:192]), Part(2, 192, half[192:])]
    assert torch.equal(captured.forward([], rest), plain.forward([], rest))


def test_graphs_have_powers_of_two_of_slots_and_positions() -> None:
    batch = BatchedModel(make_tiny(max_position_embeddings=2000), 6, 2000)
    assert graph_shape(batch, [Part(0, 0, [1])]) == (1, 256)
    assert graph_shape(batch, [Part(1, 255, [1])]) == (2, 256)
    assert graph_shape(batch, [Part(0, 256, [1]), Part(2, 3, [1])]) == (4, 512)
    assert graph_shape(batch, [Part(5, 1999, [1])]) == (6, 2048)
    short = BatchedModel(make_tiny(), 2, 100)
    assert graph_shape(short, [Part(1, 99, [1])]) == (2, 128)
    assert graph_inputs(short, [Part(1, 99, [7])], 2) == [[0, 7], [100, 99]]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_never_syncs_with_the_device(shape: str, slots: int) -> None:
    """Tensors of the meta device have no values, so reading one fails, as it would during capture.

    Mixing devices mostly fails too. This is evidence, not proof: no kernel runs.
    """
    batch = BatchedModel(make_tiny(torch.bfloat16, **SHAPES[shape]).to("meta"), slots, 256)
    batch.prepare_decode()
    tokens, positions = torch.zeros(2, slots, dtype=torch.int64, device="meta")
    logits = batch.decode(tokens, positions, 256)
    assert logits.device.type == "meta" and logits.shape == (slots, VOCAB)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_graphs_equal_plain_decoding(shape: str) -> None:
    model = make_tiny(torch.float32, **SHAPES[shape]).to("cuda")
    plain, graphed = BatchedModel(model, 5, 600), GraphedModel(BatchedModel(model, 5, 600))
    sequences = {0: random_tokens(280, 0), 3: random_tokens(290, 3)}
    for batch in (plain, graphed):
        for slot, ids in sequences.items():
            batch.forward([], chunks_of(slot, ids[:250]))
    for at in range(250, 280):
        decode = [Part(slot, at, ids[at : at + 1]) for slot, ids in sequences.items()]
        prefill = [Part(2, 0, random_tokens(9))] if at % 2 else []
        expected, actual = plain.forward(decode, prefill), graphed.forward(decode, prefill)
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_without_a_gpu_there_are_no_graphs() -> None:
    batch = BatchedModel(make_tiny(), 1, 64)
    part = Part(0, 0, [5])
    assert torch.equal(GraphedModel(batch).forward([part], []), batch.forward([part], []))
