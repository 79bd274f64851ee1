"""Text to token ids and back: byte-level BPE, chat format, third-party tokenizers."""

from minimind.tokenizer.chat import encode_chat, validate_messages
from minimind.tokenizer.format import SPECIAL_TOKENS
from minimind.tokenizer.tokenizer import Tokenizer
from minimind.tokenizer.train import train_tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "encode_chat", "train_tokenizer", "validate_messages"]
