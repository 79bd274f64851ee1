"""Text to token ids and back."""

from minimind.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from minimind.tokenizer.chat import encode_chat, validate_messages
from minimind.tokenizer.train import train_tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "encode_chat", "train_tokenizer", "validate_messages"]
