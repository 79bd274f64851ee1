"""Change config.json of a model directory."""

import json
from pathlib import Path
from typing import Any


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
