"""What every part of the GPU report gets: settings, directories, and a record that is saved."""

import json
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_OUTPUT = 12_000  # characters


@dataclass
class Context:
    """Settings of the report and the record of one part.

    work: temporary files of all parts. tiny: sizes that a CPU runs in seconds. texts, chats: data
    files of the pretraining and fine-tuning parts. seconds: duration of the pretraining run.
    """

    part: str
    work: Path
    device: str
    tiny: bool
    texts: list[str]
    chats: list[str]
    seconds: float
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def record_file(self) -> Path:
        return self.work / f"{self.part}.json"

    def save(self, key: str, value: Any, *, show: bool = True) -> None:
        """Add a result to the record and write the record; `show` prints it to the log too."""
        self.record[key] = value
        temporary = self.record_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.record_file)
        if show:
            print(key, json.dumps(value, ensure_ascii=False)[:2000], flush=True)

    def run_command(self, command: list[str]) -> None:
        """Save the end of the command's output as it comes, then the exit status."""
        end = b""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            assert child.stdout
            while chunk := child.stdout.read1():
                print(chunk.decode(errors="replace"), end="", flush=True)
                end = (end + chunk)[-4 * _MAX_OUTPUT :]
                self.save("output", end.decode(errors="replace")[-_MAX_OUTPUT:], show=False)
        self.save("exit_status", child.returncode)

    def measure(self, key: str, work: Callable[[], Any]) -> Any:
        """Save the result of `work`, or the traceback of its failure; return the result or None."""
        result = None
        with self.isolated(key):
            result = work()
            self.save(key, result)
        self.free_memory()
        return result

    @contextmanager
    def isolated(self, key: str) -> Iterator[None]:
        """Record a failure of the block instead of raising it."""
        try:
            yield
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            lines = traceback.format_exc().strip().splitlines()
            self.save(key, {"error": f"{type(error).__name__}: {error}"[:1000], "at": lines[-9:]})

    def free_memory(self) -> None:
        """Return the memory of finished work to the device."""
        import torch

        from minimind.training.memory import release_unused

        torch._dynamo.reset()
        release_unused(torch.device(self.device))
