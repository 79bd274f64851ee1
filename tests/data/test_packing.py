import numpy as np

from minimind.data.packing import IGNORED, ChatSequences, MixedDataset, PairSequences, TextSequences
from minimind.data.store import Shard

PAD = 0


def _chat_shard(lengths: list[int], answers: list[int]) -> Shard:
    """Return conversations; the last `answers[i]` of `lengths[i]` tokens are supervised."""
    tokens, masks = [], []
    for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        tokens.append(np.arange(length, dtype=np.uint16) + 100 * (number + 1))
        masks.append((np.arange(length) >= length - answer).astype(np.uint8))
    return Shard(np.concatenate(tokens), np.concatenate(masks), np.cumsum(lengths))


def test_text_sequences_cover_the_stream_once_and_labels_are_the_next_token() -> None:
    shards = [
        Shard(np.arange(101), None, np.array([101])),
        Shard(np.arange(35), None, np.array([])),
    ]
    sequences = TextSequences(shards, seq_len=10)
    assert len(sequences) == 10 + 3
    tokens = [sequences.sequence(i)[0].tolist() for i in range(len(sequences))]
    assert [t for row in tokens[:10] for t in row] == list(range(100))
    assert [t for row in tokens[10:] for t in row] == list(range(30))
    for index in range(len(sequences)):
        inputs, labels, segments = sequences.sequence(index)
        assert (labels == inputs + 1).all() and segments is None


def test_each_conversation_is_packed_once_and_only_answers_are_labels() -> None:
    lengths = [12, 20, 7, 9, 15, 5, 18, 11]
    shard = _chat_shard(lengths, [4] * len(lengths))
    sequences = ChatSequences([shard], seq_len=32, pad=PAD, seed=3)
    labels_seen: list[int] = []
    for index in range(len(sequences)):
        tokens, labels, segments = sequences.sequence(index)
        supervised = labels != IGNORED
        labels_seen += labels[supervised].tolist()
        assert (labels[supervised] == tokens[supervised] + 1).all()
        assert (np.diff(segments) >= 0).all()
        for segment in np.unique(segments):
            here = tokens[segments == segment]
            contiguous = (here == PAD).all() or (np.diff(here) == 1).all()
            assert contiguous, "a segment is one conversation, or padding"
    expected = [
        token
        for number, length in enumerate(lengths)
        for token in range(100 * (number + 1) + length - 4, 100 * (number + 1) + length)
    ]
    assert sorted(labels_seen) == sorted(expected)
    assert sequences.report.items == len(lengths)
    assert sequences.report.truncated == sequences.report.unsupervised == 0


def test_long_conversations_are_truncated_and_counted() -> None:
    shard = _chat_shard([50, 50, 10, 10], [45, 5, 4, 0])
    sequences = ChatSequences([shard], seq_len=16, pad=PAD, seed=0)
    assert sequences.report.truncated == 2
    assert sequences.report.unsupervised == 2  # answer truncated, or without an answer
    assert len(sequences) == 2
    kept = [sequences.sequence(index) for index in range(2)]
    assert sum(int((labels != IGNORED).sum()) for _, labels, _ in kept) == 12 + 4


def test_packing_efficiency_is_high() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 200, 2000).tolist()
    tokens = np.ones(sum(lengths), np.uint16)
    shard = Shard(tokens, np.ones(len(tokens), np.uint8), np.cumsum(lengths))
    report = ChatSequences([shard], seq_len=256, pad=PAD, seed=0).report
    assert report.packing_efficiency > 0.97


def test_a_mixed_dataset_is_a_pure_function_of_the_position() -> None:
    shard = Shard(np.arange(1001), None, np.array([1001]))
    mix = MixedDataset([TextSequences([shard], 10), TextSequences([shard], 10)], [1.0, 2.0], seed=1)
    expected = mix.batch(0, 50).tokens
    pieces = np.concatenate([mix.batch(start, 10).tokens for start in range(0, 50, 10)])
    assert (expected == pieces).all()


def _pair_shard(pairs: list[tuple[int, int, int]], identical: set[int] = frozenset()) -> Shard:
    """Return pairs from the lengths of prompt and answers; the sides of some are `identical`."""
    tokens, masks = [], []
    for number, (prompt, *answers) in enumerate(pairs):
        for side, answer in enumerate(answers):
            start = 1000 * (number + 1) + (500 * side if number not in identical else 0)
            prompt_ids = np.arange(prompt) + 1000 * (number + 1)
            tokens.append(np.concatenate([prompt_ids, np.arange(answer) + start + prompt]))
            masks.append(np.arange(prompt + answer) >= prompt)
    ends = np.cumsum([len(document) for document in tokens])
    ids = np.concatenate(tokens).astype(np.uint16)
    return Shard(ids, np.concatenate(masks).astype(np.uint8), ends)


def test_both_sides_of_a_pair_are_in_one_sequence_and_only_answers_are_labels() -> None:
    pairs = [(5, 3, 6), (2, 9, 1), (7, 2, 2), (4, 4, 8), (3, 5, 5), (6, 1, 3)]
    sequences = PairSequences([_pair_shard(pairs[:4]), _pair_shard(pairs[4:])], 40, pad=PAD, seed=3)
    assert sequences.report.items == len(pairs)
    assert (
        sequences.report.truncated
        == sequences.report.unsupervised
        == sequences.report.identical
        == 0
    )
    assert len(sequences) < len(pairs)
    packed_pairs = []
    for index in range(len(sequences)):
        tokens, labels, segments = sequences.sequence(index)
        count = len(sequences.reference[sequences.item_slice(index)])
        assert segments is not None and count == (segments.max() + 1) // 2
        for pair in range(count):
            sides = []
            for segment in (2 * pair, 2 * pair + 1):
                here, targets = tokens[segments == segment], labels[segments == segment]
                answer = targets[targets != IGNORED]
                assert (targets[-len(answer) :] == answer).all(), "the end of the conversation"
                prompt = here[: len(here) + 1 - len(answer)].tolist()
                sides.append((prompt, len(answer)))
            assert sides[0][0] == sides[1][0], "both sides begin with the same prompt"
            packed_pairs.append((len(sides[0][0]), sides[0][1], sides[1][1]))
    assert sorted(packed_pairs) == sorted(pairs)


def test_unsupervised_and_identical_pairs_are_left_out_and_long_ones_truncated() -> None:
    pairs = [
        (5, 10, 10),  # fits
        (5, 4, 60),  # the rejected side is truncated to what the chosen one leaves
        (5, 60, 60),  # both are truncated to half a sequence
        (70, 5, 5),  # both answers are truncated away
        (5, 6, 6),  # both sides are the same
        (30, 40, 3),  # the prompts take most of the sequence
        (5, 40, 50),  # identical after truncation
        (30, 3, 0),  # an empty answer
    ]
    sequences = PairSequences([_pair_shard(pairs, identical={4, 6})], 64, pad=PAD, seed=0)
    report = sequences.report
    assert (report.items, report.identical, report.unsupervised) == (8, 2, 2)
    assert report.truncated == 5
    kept = {}
    for index in range(len(sequences)):
        tokens, labels, segments = sequences.sequence(index)
        for segment in range(2 * len(sequences.reference[sequences.item_slice(index)])):
            here = segments == segment
            number = int(tokens[here][0]) // 1000 - 1
            kept.setdefault(number, []).append(int((labels[here] != IGNORED).sum()))
    assert kept == {0: [10, 10], 1: [4, 52], 2: [28, 28], 5: [3, 3]}
    assert len(sequences.reference) == 4 and np.isnan(sequences.reference).all()


def test_pair_ids_are_unique_in_a_batch_and_match_their_reference() -> None:
    pairs = [(5, 3, 6), (2, 9, 1), (7, 2, 2), (4, 4, 8), (3, 5, 5), (6, 1, 3)]
    sequences = PairSequences([_pair_shard(pairs)], 40, pad=PAD, seed=1)
    sequences.reference[:] = np.arange(12).reshape(6, 2)
    for epochs in (range(3), range(3, 6)):
        batch = MixedDataset([sequences], [1.0], seed=2).batch(
            epochs.start * len(sequences), len(sequences)
        )
        assert batch.pairs is not None and batch.segments is not None
        assert sorted(batch.pairs.reference.flatten()) == list(range(12))
        supervised = batch.labels != IGNORED
        numbers = batch.pairs.side_ids[supervised]
        assert sorted(set(numbers.tolist())) == list(range(12))
        assert (np.diff(numbers) >= 0).all(), "in the order of sequences and segments"
        for row, (_, index) in enumerate(
            MixedDataset([sequences], [1.0], seed=2).order.locate(
                epochs.start * len(sequences), len(sequences)
            )
        ):
            first = int(batch.pairs.side_ids[row][batch.segments[row] == 0][0]) // 2
            expected = sequences.reference[sequences.item_slice(index)]
            assert (batch.pairs.reference[first : first + len(expected)] == expected).all()
