"""Control tokens and the chat template.

    <|im_start|>role
    content<|im_end|>

The format is ChatML, as in Qwen. Control tokens have the first ids of the vocabulary.
"""

# --8<-- [start:control-tokens]
END_OF_TEXT = "<|endoftext|>"  # between documents; also pads
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # around each message
_THINKING_AND_TOOLS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
_THINKING_AND_TOOLS += ["<tool_response>", "</tool_response>"]
_NUM_SPECIAL = 16
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, *_THINKING_AND_TOOLS]
SPECIAL_TOKENS += [f"<|reserved_{i}|>" for i in range(_NUM_SPECIAL - len(SPECIAL_TOKENS))]
# --8<-- [end:control-tokens]

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"  # the role whose messages the model generates

# For other programs, saved beside the tokenizer. `chat.py` encodes messages without it.
# --8<-- [start:chat-template]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{{{- '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{IM_START}{ASSISTANT}\\n' -}}}}{{%- endif -%}}"
)
# --8<-- [end:chat-template]
