import numpy as np

from minimind.data.packing import IGNORED, ChatWindows, Mix, TextWindows
from minimind.data.store import Shard

PAD = 0


def _chat_shard(lengths: list[int], answers: list[int]) -> Shard:
    """Conversations of the given lengths; the last `answers[i]` tokens of each are supervised."""
    tokens, masks = [], []
    for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        tokens.append(np.arange(length, dtype=np.uint16) + 100 * (number + 1))
        masks.append((np.arange(length) >= length - answer).astype(np.uint8))
    return Shard(np.concatenate(tokens), np.concatenate(masks), np.cumsum(lengths))


def test_text_windows_cover_the_stream_once_and_labels_are_the_next_token() -> None:
    shards = [
        Shard(np.arange(101), None, np.array([101])),
        Shard(np.arange(35), None, np.array([])),
    ]
    windows = TextWindows(shards, window=10)
    assert len(windows) == 10 + 3
    tokens = [windows.window(i)[0].tolist() for i in range(len(windows))]
    assert [t for row in tokens[:10] for t in row] == list(range(100))
    assert [t for row in tokens[10:] for t in row] == list(range(30))
    for index in range(len(windows)):
        inputs, labels, segments = windows.window(index)
        assert (labels == inputs + 1).all() and segments is None


def test_each_conversation_is_packed_once_and_only_answers_are_labels() -> None:
    lengths = [12, 20, 7, 9, 15, 5, 18, 11]
    shard = _chat_shard(lengths, [4] * len(lengths))
    windows = ChatWindows([shard], window=32, pad=PAD, seed=3)
    learned: list[int] = []
    for index in range(len(windows)):
        tokens, labels, segments = windows.window(index)
        supervised = labels != IGNORED
        learned += labels[supervised].tolist()
        assert (labels[supervised] == tokens[supervised] + 1).all()
        assert (np.diff(segments) >= 0).all()
        for segment in np.unique(segments):
            here = tokens[segments == segment]
            whole = (here == PAD).all() or (np.diff(here) == 1).all()
            assert whole, "a segment is one conversation, or padding"
    expected = [
        token
        for number, length in enumerate(lengths)
        for token in range(100 * (number + 1) + length - 4, 100 * (number + 1) + length)
    ]
    assert sorted(learned) == sorted(expected)
    assert windows.report.conversations == len(lengths)
    assert windows.report.cut == windows.report.unsupervised == 0


def test_long_conversations_are_cut_at_the_end_and_counted() -> None:
    shard = _chat_shard([50, 50, 10, 10], [45, 5, 4, 0])
    windows = ChatWindows([shard], window=16, pad=PAD, seed=0)
    assert windows.report.cut == 2
    assert windows.report.unsupervised == 2  # one whose answer was cut away, one without any
    assert len(windows) == 2
    kept = [windows.window(index) for index in range(2)]
    assert sum(int((labels != IGNORED).sum()) for _, labels, _ in kept) == 12 + 4


def test_packing_wastes_little() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 200, 2000).tolist()
    tokens = np.ones(sum(lengths), np.uint16)
    shard = Shard(tokens, np.ones(len(tokens), np.uint8), np.cumsum(lengths))
    report = ChatWindows([shard], window=256, pad=PAD, seed=0).report
    assert report.fill > 0.97


def test_a_mix_is_a_pure_function_of_the_position() -> None:
    shard = Shard(np.arange(1001), None, np.array([1001]))
    mix = Mix([TextWindows([shard], 10), TextWindows([shard], 10)], [1.0, 2.0], seed=1)
    whole = mix.batch(0, 50).tokens
    pieces = np.concatenate([mix.batch(at, 10).tokens for at in range(0, 50, 10)])
    assert (whole == pieces).all()
