# --8<-- [start:uniform]
def uniform(size):
    """Return loss, perplexity and bits per byte of a model that gives all `size` bytes 1/size."""
    nats = -math.log(1 / size)
    return nats, math.exp(nats), nats / math.log(2)


nats, perplexity, bits = uniform(256)
assert round(nats, 3) == 5.545
assert round(perplexity) == 256
assert bits == 8
# --8<-- [end:uniform]

# --8<-- [start:smoothing]
rivers = NGram(b"the river is long. the sea is deep.", order=2)


def unsmoothed(byte, context):
    seen = rivers.followers.get(context[-2:], Counter())
    return seen[byte] / seen.total() if seen else 0


assert (
    unsmoothed(ord("x"), b"th") == 0
)  # its logarithm does not exist: the loss is infinite
assert rivers.probability(ord("x"), b"th") > 0
total = sum(rivers.probability(byte, b"th") for byte in range(256))
assert math.isclose(total, 1)
# --8<-- [end:smoothing]


# --8<-- [start:entropy]
def cross_entropy(truth, guess):
    """Return the expected loss in bits when `truth` draws the word and `guess` predicts it."""
    return -sum(p * math.log2(guess[word]) for word, p in truth.items())


truth = {word: probability(word, "the") for word in followers["the"]}
entropy = cross_entropy(truth, truth)
assert round(entropy, 3) == 1.561
for guess in (
    {"river": 1 / 3, "sea": 1 / 3, "mountain": 1 / 3},
    {"river": 0.9, "sea": 0.05, "mountain": 0.05},
):
    assert cross_entropy(truth, guess) > entropy
# --8<-- [end:entropy]

# --8<-- [start:bytes-per-token]
loss_per_token, bits_per_byte = 5.282, 2.266  # step 280 of the recorded run
bytes_per_token = loss_per_token / math.log(2) / bits_per_byte
assert round(bytes_per_token, 2) == 3.36
# --8<-- [end:bytes-per-token]

# --8<-- [start:arithmetic-coding]
from fractions import Fraction


def interval(words):
    """Return (low, width) of the part of [0, 1) that stands for a sequence of words."""
    low, width = Fraction(0), Fraction(1)
    for word, next_word in zip(["<s>", *words], words, strict=False):
        total = followers[word].total()
        for candidate, count in followers[word].items():
            if candidate == next_word:
                break
            low += width * Fraction(count, total)
        width *= Fraction(followers[word][next_word], total)
    return low, width


def shortest_bits(low, width):
    """Return the fewest binary digits of a number within [low, low + width)."""
    length = 0
    while True:
        number = -(-low * 2**length // 1)  # rounded up
        if number < (low + width) * 2**length:
            return f"{int(number):0{length}b}" if length else ""
        length += 1


sentence = ["the", "sea", "is", "long", "</s>"]
low, width = interval(sentence)
assert width == Fraction(1, 16)  # the probability of the sentence
bits = shortest_bits(low, width)
assert bits == "1"  # 1/2, by luck: four bits are always enough

decoded, value = [], Fraction(int(bits, 2), 2 ** len(bits))
while decoded[-1:] != ["</s>"]:
    for candidate in followers[["<s>", *decoded][-1]]:
        low, width = interval([*decoded, candidate])
        if low <= value < low + width:
            decoded.append(candidate)
            break
assert decoded == sentence
# --8<-- [end:arithmetic-coding]
