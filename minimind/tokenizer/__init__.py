"""Text and conversations to token ids and back.

Reading order:

1. `format.py`: control tokens and our chat template.
2. `chat.py`: conversations to token ids and loss masks.
3. `bpe.py`, `tokenizer.py`, `train.py`: byte-level BPE, encoding and decoding, training.
4. `foreign.py`, `template.py`: tokenizers of other projects and their chat templates.
"""

from minimind.tokenizer.chat import encode_chat, validate_messages
from minimind.tokenizer.format import SPECIAL_TOKENS
from minimind.tokenizer.tokenizer import Tokenizer
from minimind.tokenizer.train import train_tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "encode_chat", "train_tokenizer", "validate_messages"]
