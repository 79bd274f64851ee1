"""Small tokenizers with the structure and chat templates of well-known models."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BPE
from tokenizers.trainers import BpeTrainer

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHATML = """\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}\
{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Each user message opens the answer, even without add_generation_prompt.
_MINIMIND2 = """\
{% if messages[0]['role'] == 'system' %}\
{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\
{% else %}{{ '<|im_start|>system\\n你是助手。<|im_end|>\\n' }}{% endif %}\
{% for message in messages %}{% set content = message['content'] %}\
{% if message['role'] == 'user' %}\
{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}\
{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}{% endif %}\
{% endfor %}"""

_THINKS = """\
{%- if tools %}{{- 'tools' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string \
and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

_LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Year: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + \
message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_INST = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}\
{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}\
{% endif %}{% endfor %}"""

_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TAGS = ["<think>", "</think>", "<tool_response>", "</tool_response>"]
_LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
_LLAMA3_TOKENS += ["<|start_header_id|>", "<|end_header_id|>"]

# Template, control tokens, tags that are not marked special, named tokens, EOS tokens.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(
        template=_CHATML,
        special=_IM,
        names=dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"),
        eos=["<|im_end|>"],
    ),
    "minimind2": dict(
        template=_MINIMIND2,
        special=_IM,
        names=dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        eos=["<|im_end|>"],
    ),
    "qwen3": dict(
        template=_THINKS,
        special=_IM,
        tags=_TAGS,
        names=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        eos=["<|im_end|>", "<|endoftext|>"],
        nfc=True,
    ),
    "llama3": dict(
        template=_LLAMA3,
        special=_LLAMA3_TOKENS,
        names=dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        eos=["<|end_of_text|>", "<|eot_id|>"],
        bos="<|begin_of_text|>",
    ),
    "tinyllama": dict(
        template=_ZEPHYR,
        special=["<unk>", "<s>", "</s>"],
        names=dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        eos=["</s>"],
        bos="<s>",
        pieces="each",
    ),
    "llama2": dict(
        template=_INST,
        special=["<unk>", "<s>", "</s>"],
        names=dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        eos=["</s>"],
        bos="<s>",
        pieces="first",
    ),
    "base": dict(
        template=None,
        special=["<s>", "</s>"],
        names=dict(bos_token="<s>", eos_token="</s>"),
        eos=["</s>"],
    ),
    "base with our tokens": dict(
        template=None,
        special=_IM,
        names=dict(eos_token="<|endoftext|>"),
        eos=["<|endoftext|>"],
    ),
}
CHATTING = [name for name, shape in SHAPES.items() if shape["template"]]


def make_tokenizer(name: str, directory: Path, texts: list[str]) -> Path:
    """Write a tokenizer of this shape, in Hugging Face's layout, with at most 600 tokens."""
    shape = SHAPES[name]
    bpe = _pieces(shape, texts) if "pieces" in shape else _byte_level(shape, texts)
    if bos := shape.get("bos"):
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / "tokenizer.json"))
    names = shape["names"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048} | names
    config["clean_up_tokenization_spaces"] = False
    if shape["template"] and name in ("minimind2", "llama3", "tinyllama"):
        config["chat_template"] = shape["template"]
    elif shape["template"]:
        (directory / "chat_template.jinja").write_text(shape["template"], encoding="utf-8")
    ids = [bpe.token_to_id(token) for token in shape["eos"]]
    eos = ids[0] if len(ids) == 1 else ids
    for file, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {key: {"content": token} for key, token in names.items()}),
        ("generation_config.json", {"eos_token_id": eos, "temperature": 0.6}),
    ):
        (directory / file).write_text(json.dumps(content, indent=4), encoding="utf-8")
    return directory


def _byte_level(shape: dict[str, Any], texts: list[str]) -> BPE:
    bpe = BPE(models.BPE())
    if shape.get("nfc"):
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, BpeTrainer(vocab_size=550, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(shape["special"])
    tags = shape.get("tags", [])
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return bpe


def _pieces(shape: dict[str, Any], texts: list[str]) -> BPE:
    """Build a BPE like SentencePiece's, with byte fallback."""
    bpe = BPE(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if shape["pieces"] == "each":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = shape["special"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    lines = [line for text in texts for line in text.splitlines()]  # line breaks stay bytes
    bpe.train_from_iterator(
        lines,
        BpeTrainer(vocab_size=560, special_tokens=[*special, *byte_tokens], show_progress=False),
    )
    content = json.loads(bpe.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    return BPE.from_str(json.dumps(content))
