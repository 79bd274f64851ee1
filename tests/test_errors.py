from pathlib import Path

from minimind.errors import install_line


def test_an_extra_is_installed_as_the_package_was(tmp_path: Path) -> None:
    assert install_line("wandb") == "pip install -c constraints.txt -e '.[wandb]'"
    wheel = tmp_path / "site-packages" / "minimind"
    assert install_line("wandb", wheel) == "pip install 'minimind[wandb]'"
