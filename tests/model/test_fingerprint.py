from pathlib import Path

from minimind.model import fingerprint

_SIZE = 5_000_000


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(_SIZE))
    return folder


def test_every_byte_and_every_file_name_changes_the_fingerprint(tmp_path: Path) -> None:
    model, copy = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    assert fingerprint(model) == fingerprint(copy)
    fingerprints = {fingerprint(copy)}
    for offset in (0, 70_000, 1_234_567, _SIZE - 1):
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(offset)
            file.write(b"\1")
        fingerprints.add(fingerprint(copy))
    (copy / "chat_template.jinja").write_text("x")
    fingerprints.add(fingerprint(copy))
    (copy / "config.json").rename(copy / "other.json")
    fingerprints.add(fingerprint(copy))
    assert len(fingerprints) == 7
    assert len({fingerprint(model, copy), fingerprint(copy, model), fingerprint(model)}) == 3


def test_unrelated_files_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a")
    before = fingerprint(model)
    for name in (".DS_Store", "._config.json", "README.md", "model.safetensors.part"):
        (model / name).write_text("x")
    (model / "checkpoints.json").mkdir()
    assert fingerprint(model) == before
