"""EleutherAI's lm-evaluation-harness (lm-eval), from the extra `lm-eval`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind.errors import UsageError, install_line
from minimind.evaluation.runner import file_name, read_object
from minimind.files import write_atomically
from minimind.model import resolve_adapter_directory
from minimind.model.device import choose_device


def run_harness(
    name: str,
    model: str,
    directory: Path,
    folder: Path,
    *,
    identity: Mapping[str, Any],
    adapter: Path | None = None,
    device: str = "auto",
    limit: int | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run lm-eval's task `name` on the model in `directory` and return its metrics.

    Metrics of an earlier run with the same settings are read from `folder`. lm-eval downloads the
    data and uses the task's own number of few-shot examples. Raises UsageError if lm-eval is not
    installed or has no such task.
    """
    settings = {"task": f"lm-eval:{name}", "limit": limit, **identity, "dtype": "float32"}
    path = folder / f"{file_name(f'lm-eval:{name}')}.json"
    if not fresh and (stored := read_object(path)).get("settings") == settings:
        return stored | {"model": model}
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"lm-eval is not installed ({error}); {install_line('lm-eval')}, then run the same "
            "command again"
        ) from error
    manager = TaskManager()
    if not manager.match_tasks([name]):
        raise UsageError(f"lm-eval has no task {name}; `lm-eval ls tasks` lists all tasks")
    arguments = {"pretrained": str(directory), "dtype": "float32", "trust_remote_code": False}
    if adapter:
        arguments["peft"] = str(resolve_adapter_directory(adapter))
    output = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[name],
        device=str(choose_device(device)),
        batch_size=8,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    several = len(output["results"]) > 1
    metrics = {
        f"{task}/{metric}" if several else metric: value
        for task, values in output["results"].items()
        for metric, value in ((key.removesuffix(",none"), v) for key, v in values.items())
        if isinstance(value, int | float) and "stderr" not in metric
    }
    summary = {"task": f"lm-eval:{name}", "model": model, "settings": settings}
    summary |= {"metrics": metrics, "results": output["results"]}
    write_atomically(path, json.dumps(summary, ensure_ascii=False, indent=1, default=str) + "\n")
    return summary
