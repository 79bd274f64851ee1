import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minimind.errors import ModelError, ResourceError, TokenizerError, UsageError
from minimind.inference.load import load_for_inference
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer, train_tokenizer
from tests.support.commands import fast_python

# Damages a model directory in several hundred ways, loads it and generates two tokens. Prints the
# outcomes, {damage: "fine" or the error}, and the increase of peak memory in bytes. Arguments: the
# directory and the files to damage.
MUTANTS = """
import json, random, struct, sys, warnings
from pathlib import Path
import torch
from minimind.errors import MinimindError
from minimind.inference.engine import Engine
from minimind.inference.load import load_for_inference
from minimind.inference.sampling import Sampling
from minimind.tokenizer import encode_chat

warnings.simplefilter("error")
torch.set_num_threads(1)
directory = Path(sys.argv[1])
rng = random.Random(0)
files = sys.argv[2:]
[weights_name] = [name for name in files if name.endswith(".safetensors")]
others = [name for name in files if name.endswith(("index.json", "_config.json"))]
sound = {name: (directory / name).read_bytes() for name in files}
KEYS = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "max_position_embeddings", "rope_scaling", "layer_types"]
VALUES = [-1, 0, 3, 10**12, 10**30, 1.5, float("nan"), float("inf"), "x", [], {}, [[]], True]
ROPES = [{"rope_type": kind, "factor": factor, key: value} for kind in ("linear", "yarn", "dynamic")
    for factor in (1.5, 0, 1e300, "x") for key, value in [("rope_theta", 1), ("rope_theta", 1e-9),
    ("beta_fast", 1e300), ("original_max_position_embeddings", 10**30), ("x", 1), ([], 2)][:5]]

def dumps(value):
    return json.dumps(value).encode()

def flips(name, start, end, number):
    for _ in range(number):
        damaged, at = bytearray(sound[name]), rng.randrange(start, end)
        damaged[at] ^= 1 << rng.randrange(8)
        yield f"{name} flipped at {at}", name, bytes(damaged)

def header_of(weights):
    size = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]

def with_header(header, data):
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + data

def mutants():
    for name in files:
        for share in range(8):
            yield f"{name} cut at {share}/8", name, sound[name][: len(sound[name]) * share // 8]
        yield f"{name} twice", name, sound[name] * 2
        yield f"{name} of zeros", name, bytes(1000)
        yield f"{name} deeply nested", name, b"[" * 100_000
        yield f"{name} is a list", name, b"[]"
    if "config.json" in files:
        config = json.loads(sound["config.json"])
        for key in KEYS:
            yield f"no {key}", "config.json", dumps({k: v for k, v in config.items() if k != key})
            for value in VALUES:
                yield f"{key} = {value!r}", "config.json", dumps(config | {key: value})
        for rope in ROPES:
            yield f"rope {rope}", "config.json", dumps(config | {"rope_parameters": rope})
        yield from flips("config.json", 0, len(sound["config.json"]), 40)
    for name in others:
        content = json.loads(sound[name])
        for key in content:
            for value in VALUES:
                yield f"{name} {key} = {value!r}", name, dumps(content | {key: value})
    weights = sound[weights_name]
    header, data = header_of(weights)
    length = len(weights) - len(data)
    yield from flips(weights_name, 0, 8, 10)
    yield from flips(weights_name, 8, length, 40)
    yield from flips(weights_name, length, len(weights), 10)
    for size in (0, 2**31, 2**62, 2**64 - 1):
        yield f"header of {size}", weights_name, struct.pack("<Q", size) + weights[8:]
    name = "model.norm.weight"
    for change in ({"shape": [2**40]}, {"shape": [-1]}, {"shape": []}, {"dtype": "F8_E4M3"},
                   {"data_offsets": [0, 2**60]}, {"data_offsets": [0, 128]}, {"dtype": "X"}):
        changed = header | {name: header[name] | change}
        yield f"{name}: {change}", weights_name, with_header(changed, data)
    yield "no tensors", weights_name, with_header({}, b"")
    content = json.loads(sound["tokenizer.json"])
    yield from flips("tokenizer.json", 0, len(sound["tokenizer.json"]), 60)
    for key in content:
        for value in (None, [], {}, "x", 10**30):
            yield f"tokenizer {key} = {value!r}", "tokenizer.json", dumps(content | {key: value})
    vocab = content["model"]["vocab"]
    for change in ({"a": 10**12}, {"a": -1}, {"a": 7}, {"新": 600}, {"a": None}):
        model = content["model"] | {"vocab": vocab | change}
        yield f"vocab: {change}", "tokenizer.json", dumps(content | {"model": model})

def attempt():
    model, tokenizer = load_for_inference(directory, "cpu")
    messages = [{"role": "user", "content": "长江 <|im_end|> a river"}]
    prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    with Engine(model, tokenizer, slots=1) as engine:
        list(engine.stream_text(prompt, max_new_tokens=2, sampling=Sampling(), seed=0))

def peak():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

attempt()
before, outcomes = peak(), {}
for damage, name, content in mutants():
    (directory / name).write_bytes(content)
    try:
        attempt()
        outcomes[damage] = "fine"
    except BaseException as error:
        kind = "" if isinstance(error, MinimindError) else "BUG "
        outcomes[damage] = f"{kind}{type(error).__name__}: {error}"
    (directory / name).write_bytes(sound[name])
attempt()
print(json.dumps({"outcomes": outcomes, "memory": peak() - before}))
"""


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_loaded_model_is_in_eval_mode(model_dir: Path, model: Transformer) -> None:
    loaded, tokenizer = load_for_inference(model_dir.parent, "cpu")
    assert not loaded.training
    assert loaded.head_weight.dtype in (torch.float32, torch.bfloat16)  # depends on the machine
    assert torch.equal(loaded.head_weight, model.head_weight.to(loaded.head_weight.dtype))
    exact, _ = load_for_inference(model_dir, "cpu", dtype=torch.float32)
    assert torch.equal(exact.head_weight, model.head_weight)
    assert tokenizer.vocab_size == loaded.config.vocab_size


@pytest.mark.parametrize("context", [None, 8])
def test_a_scaling_that_would_have_no_effect_is_refused(
    model_dir: Path, context: int | None
) -> None:
    with pytest.raises(UsageError, match=r"RoPE scaling \(linear\) needs a longer context than"):
        load_for_inference(model_dir, context=context, rope_scaling="linear")


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    train_tokenizer(["长江长江"], vocab_size=273).save(copy)
    with pytest.raises(
        TokenizerError, match="has 273 tokens, but its model has 600, so they do not"
    ):
        load_for_inference(copy)


def test_missing_files_and_devices_are_reported(copy: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ResourceError, match="device cuda:99 is not available"):
        load_for_inference(copy, "cuda:99")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_for_inference(copy)
    tokenizer.save(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors"):
        load_for_inference(copy)
    with pytest.raises(ModelError, match="there is no such directory"):
        load_for_inference(copy / "nowhere")


def damaged(directory: Path, *files: str) -> dict[str, str]:
    """Return the outcome of each damage; none may be an internal error or take memory."""
    done = subprocess.run(
        [*fast_python(), "-c", MUTANTS, directory, *files],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    actual = json.loads(done.stdout)
    outcomes: dict[str, str] = actual["outcomes"]
    assert len(outcomes) > 350
    assert {k: v for k, v in outcomes.items() if v.startswith("BUG")} == {}
    assert actual["memory"] < 200 << 20
    assert sum(outcome != "fine" for outcome in outcomes.values()) > 200
    for name, outcome in outcomes.items():
        if " cut at " in name or "of zeros" in name or "header of" in name:
            assert outcome != "fine", name
    return outcomes


def test_damaged_directories_raise_minimind_errors(copy: Path) -> None:
    outcomes = damaged(copy, "config.json", "model.safetensors", "tokenizer.json")
    assert len(outcomes) > 500
    for name, outcome in outcomes.items():
        assert " = 'x'" not in name or outcome != "fine"


def test_damaged_foreign_directories_raise_minimind_errors(
    copy: Path, foreign_dir: Callable[[str], Path]
) -> None:
    for file in copy.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation")):
            file.unlink()
    for file in foreign_dir("minimind2").iterdir():
        shutil.copy(file, copy)
    (copy / "model.safetensors").rename(copy / "part.safetensors")
    with safe_open(copy / "part.safetensors", framework="pt") as tensors:
        shards = dict.fromkeys(tensors.keys(), "part.safetensors")
    index = "model.safetensors.index.json"
    (copy / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    others = (index, "tokenizer_config.json", "generation_config.json")
    damaged(copy, "part.safetensors", "tokenizer.json", *others)
