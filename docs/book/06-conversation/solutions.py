# --8<-- [start:empty-answer]
empty = {"role": "assistant", "content": ""}
ids, mask = encode_chat(tokenizer, [question, empty])
assert sum(mask) == 1
assert ids[mask.index(1)] == tokenizer.im_end
# --8<-- [end:empty-answer]

# --8<-- [start:shift]
ids, mask = encode_chat(tokenizer, [question, answer])
tokens, labels = labels_of(ids, mask)
last = len(prompt) - 1  # the position of the line break after "assistant"
assert labels[last - 1] == IGNORED
assert tokens[last] == prompt[-1]
assert labels[last] == tokenizer.encode(answer["content"])[0]
# --8<-- [end:shift]

# --8<-- [start:exclude]
from minimind.tokenizer.chat import encode_chats

[(ids, mask)] = encode_chats(tokenizer, [conversation], unsupervised=[{1}])
_, everything = encode_chat(tokenizer, conversation)
_, first_turn = encode_chat(tokenizer, conversation[:2])
assert sum(mask) == sum(everything) - sum(first_turn)
assert sum(mask[: len(first_turn)]) == 0
# --8<-- [end:exclude]

# --8<-- [start:truncate]
from minimind.inference.truncation import truncate_chat

request = conversation[:3]  # the second question, with the first turn before it
full, _ = encode_chat(tokenizer, request, add_generation_prompt=True)
alone, _ = encode_chat(tokenizer, request[2:], add_generation_prompt=True)
assert truncate_chat(tokenizer, request, len(full)) == (full, 0)
assert truncate_chat(tokenizer, request, len(full) - 1) == (alone, 2)
# --8<-- [end:truncate]
