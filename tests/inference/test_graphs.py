"""Steps as they are recorded on GPUs; what recording itself does is seen where there is one."""

import pytest
import torch

from minimind.inference.batched_model import BatchedModel, Part
from minimind.inference.graphs import GraphedModel, graph_inputs, graph_shape
from tests.support.tiny import SHAPES, VOCAB, chunks_of, make, words

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_step_of_all_slots_gives_what_the_texts_in_them_give(shape: str) -> None:
    """Slot 1 has no text, and that of slot 2 is only half read."""
    model = make(**SHAPES[shape])
    plain, stepped = BatchedModel(model, 5, 256), BatchedModel(model, 5, 256)
    stepped.prepare_decode()
    texts, half = {0: words(90, 0), 3: words(130, 3)}, words(200, 2)
    for batch in (plain, stepped):
        batch.forward([], chunks_of(2, half[:128]))
        for slot, ids in texts.items():
            batch.forward([], chunks_of(slot, ids[:70]))
    for at in range(70, 90):
        singles = [Part(slot, at, ids[at : at + 1]) for slot, ids in texts.items()]
        slots, span = graph_shape(stepped, singles)
        assert (slots, span) == (4, 256)
        tokens, positions = torch.tensor(graph_inputs(stepped, singles, slots))
        logits = stepped.decode(tokens, positions, span)
        assert logits.shape == (4, model.config.vocab_size)
        wanted = plain.forward(singles, [])
        torch.testing.assert_close(logits[[0, 3]], wanted, atol=1e-5, rtol=1e-5)
    rest = [Part(2, 128, half[128:192]), Part(2, 192, half[192:])]
    assert torch.equal(stepped.forward([], rest), plain.forward([], rest))


def test_as_many_slots_and_positions_as_a_power_of_two_up_to_all_there_are() -> None:
    batch = BatchedModel(make(max_position_embeddings=2000), 6, 2000)
    assert graph_shape(batch, [Part(0, 0, [1])]) == (1, 256)
    assert graph_shape(batch, [Part(1, 255, [1])]) == (2, 256)
    assert graph_shape(batch, [Part(0, 256, [1]), Part(2, 3, [1])]) == (4, 512)
    assert graph_shape(batch, [Part(5, 1999, [1])]) == (6, 2048)
    short = BatchedModel(make(), 2, 100)
    assert graph_shape(short, [Part(1, 99, [1])]) == (2, 128)
    assert graph_inputs(short, [Part(1, 99, [7])], 2) == [[0, 7], [100, 99]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_waits_for_nothing_on_a_gpu(shape: str) -> None:
    """On torch's meta device, where tensors have no numbers: whoever asks for one, as a graph must
    not, is refused, and mostly who mixes devices. Evidence, not proof: no kernel runs."""
    batch = BatchedModel(make(torch.bfloat16, **SHAPES[shape]).to("meta"), 4, 256)
    batch.prepare_decode()
    tokens, positions = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    logits = batch.decode(tokens, positions, 256)
    assert logits.device.type == "meta" and logits.shape == (4, VOCAB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_graphs_give_what_steps_give(shape: str) -> None:
    model = make(torch.float32, **SHAPES[shape]).to("cuda")
    plain, graphed = BatchedModel(model, 5, 600), GraphedModel(BatchedModel(model, 5, 600))
    texts = {0: words(280, 0), 3: words(290, 3)}
    for batch in (plain, graphed):
        for slot, ids in texts.items():
            batch.forward([], chunks_of(slot, ids[:250]))
    for at in range(250, 280):
        singles = [Part(slot, at, ids[at : at + 1]) for slot, ids in texts.items()]
        chunks = [Part(2, 0, words(9))] if at % 2 else []
        wanted, found = plain.forward(singles, chunks), graphed.forward(singles, chunks)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_without_a_gpu_there_are_none() -> None:
    batch = BatchedModel(make(), 1, 64)
    part = Part(0, 0, [5])
    assert torch.equal(GraphedModel(batch).forward([part], []), batch.forward([part], []))
