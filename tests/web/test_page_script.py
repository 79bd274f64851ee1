"""The page script, run by Streamlit in this process without a browser."""

import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from minimind.environment import KEY_VARIABLE
from minimind.web import start
from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.reads import opens
from tests.support.services import Process

PAGE = Path(start.__file__).with_name("page.py")


@pytest.fixture(autouse=True)
def main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore `__main__`, which AppTest replaces: processes of later tests would run the page."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture
def store(tmp_path: Path, process: Process, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of 60 conversations; the page's token is `right`."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv(start.URL_VARIABLE, process.url)
    monkeypatch.setenv(start.TOKEN_VARIABLE, "right")
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    found = Store()
    for number in range(60):
        found.save(Conversation(turns=[Turn(f"第{number}个", [Answer("tiny", "**好** `a[0]`")])]))
    return found


def test_a_run_reads_only_new_titles_and_the_open_conversation(
    store: Store, tmp_path: Path
) -> None:
    page = AppTest.from_file(str(PAGE), default_timeout=60)
    page.query_params["token"] = "right"
    page.query_params["c"] = store.ids()[3]
    assert opens(page.run, tmp_path) == 20 + 1
    assert [button.label for button in page.sidebar.button][1:21] == [
        f"第{59 - place}个" for place in range(20)
    ]
    assert opens(page.run, tmp_path) == 1
    page.sidebar.button(key="more").click()
    assert opens(page.run, tmp_path) == 20 + 2  # the click runs it twice
    assert not page.exception


@pytest.mark.parametrize("token", ["", "wrong", "righ", "rightt", "长"])
def test_without_the_token_no_file_is_read(store: Store, tmp_path: Path, token: str) -> None:
    page = AppTest.from_file(str(PAGE), default_timeout=60)
    page.query_params["token"] = token
    page.query_params["c"] = store.ids()[0]
    assert opens(page.run, tmp_path) == 0
    assert [error.value[:30] for error in page.error] == ["This page is for the user who "]
    assert not page.button and not page.text and not page.chat_input
    assert not page.exception
