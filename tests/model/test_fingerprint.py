from pathlib import Path

from minimind.model import fingerprint

_SIZE = 5_000_000


def make(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(_SIZE))
    return folder


def test_every_byte_and_every_name_counts(tmp_path: Path) -> None:
    model, copy = make(tmp_path / "a"), make(tmp_path / "b")
    assert fingerprint(model) == fingerprint(copy)
    seen = {fingerprint(copy)}
    for place in (0, 70_000, 1_234_567, _SIZE - 1):
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        seen.add(fingerprint(copy))
    (copy / "chat_template.jinja").write_text("x")
    seen.add(fingerprint(copy))
    (copy / "config.json").rename(copy / "other.json")
    seen.add(fingerprint(copy))
    assert len(seen) == 7
    assert len({fingerprint(model, copy), fingerprint(copy, model), fingerprint(model)}) == 3


def test_files_that_are_no_part_of_a_model_do_not_count(tmp_path: Path) -> None:
    model = make(tmp_path / "a")
    before = fingerprint(model)
    for name in (".DS_Store", "._config.json", "README.md", "model.safetensors.part"):
        (model / name).write_text("x")
    (model / "checkpoints.json").mkdir()
    assert fingerprint(model) == before
