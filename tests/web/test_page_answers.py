"""Answers on the page: ask, stop, regenerate, edit, compare two models."""

from pathlib import Path

import httpx2 as httpx

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.browser import Browser, long_conversation, page_of
from tests.support.services import serving, wait_until


def test_a_streaming_answer_can_be_stopped(url: str, browser: Browser, store: Store) -> None:
    talk = long_conversation(store)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 2)
    browser.ask("说长一点")
    begun = browser.wait(lambda: len(browser.messages()) == 4 and browser.messages()[3])
    browser.wait(lambda: len(browser.messages()[3]) > len(begun))  # tokens have arrived
    browser.press('[class*="st-key-stop-"]')
    browser.wait_until_finished()
    browser.wait(lambda: "stopped" in browser.messages()[-1])
    kept = store.load(talk.id)
    assert kept
    said = kept.turns[1].answers[0]
    assert said.finish_reason is None
    assert 0 < said.tokens < 8000  # the context has 8,192


def test_other_buttons_are_disabled_while_an_answer_streams(
    url: str, browser: Browser, store: Store
) -> None:
    talk = long_conversation(store)
    talk.turns.append(Turn("说长一点", [Answer("tiny", "好。", 2, 0.1, "stop")]))
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    # Editing an early question drops the later turns at once.
    browser.button(f".st-key-edit-{talk.turns[0].id}").click()
    [box] = browser.wait(lambda: browser.find('[data-testid="stForm"] textarea'))
    box.send_keys("！")
    next(b for b in browser.find('[data-testid="stForm"] button') if b.text == "Send").click()
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    assert len([m for m in browser.find('[data-testid="stChatMessage"]') if m.is_displayed()]) == 2
    browser.press('[class*="st-key-stop-"]')
    browser.wait_until_finished()
    # A new question disables the buttons of earlier turns until it is answered.
    browser.wait(lambda: browser.num_enabled('[class*="st-key-edit-"]') == 1)
    browser.ask("再说")
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    browser.wait(lambda: len(browser.messages()) == 4)
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    browser.press('[class*="st-key-stop-"]')
    browser.wait(lambda: browser.num_enabled('[class*="st-key-edit-"]') == 2)
    assert browser.num_enabled('[class*="st-key-again-"]') == 1
    # Regenerate does so too.
    browser.press('[class*="st-key-again-"]')
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    browser.press('[class*="st-key-stop-"]')
    browser.wait_until_finished()


def test_stop_and_closing_the_tab_cancel_generation_at_the_service(
    models_dir: Path, tmp_path: Path, browser: Browser
) -> None:
    def running_and_waiting() -> list[int]:
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return [int(float(found[f'minimind_{n}{{model="tiny"}}'])) for n in ("running", "waiting")]

    store = Store(tmp_path / "minimind" / "conversations")
    talks = [long_conversation(store) for _ in range(2)]
    driver = browser.driver
    with (
        serving(models_dir / "tiny", tmp_path / "service.log", "--slots", "1") as service,
        page_of("--url", service.url, home=tmp_path) as (url, _),
    ):
        browser.open(f"{url}&c={talks[0].id}")
        browser.ask("说长一点")
        browser.wait(lambda: running_and_waiting() == [1, 0])
        driver.switch_to.new_window("tab")
        browser.open(f"{url}&c={talks[1].id}")
        browser.ask("说长一点")
        browser.wait(lambda: running_and_waiting() == [1, 1])  # queued
        browser.press('[class*="st-key-stop-"]')
        browser.wait(lambda: running_and_waiting() == [1, 0])
        browser.wait_until_finished()
        driver.switch_to.window(driver.window_handles[0])
        driver.close()
        driver.switch_to.window(driver.window_handles[0])
        wait_until(lambda: running_and_waiting() == [0, 0])
    said = store.load(talks[0].id)
    assert said
    assert said.turns[-1].answers[0].text  # the partial answer is saved


def test_regenerate_and_edit(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(models=["tiny"], settings={"max_tokens": 12, "temperature": 1.5})
    talk.turns = [
        Turn("你好", [Answer("tiny", "旧的", 2)]),
        Turn("再见", [Answer("tiny", "旧的", 2)]),
    ]
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.button('[class*="st-key-again-"]').click()
    browser.wait(lambda: len(browser.messages()) == 4 and "旧的" not in browser.messages()[3])
    browser.wait_until_finished()
    assert "旧的" in browser.messages()[1]
    browser.button(f".st-key-edit-{talk.turns[0].id}").click()
    [box] = browser.wait(lambda: browser.find('[data-testid="stForm"] textarea'))
    box.send_keys("！早上好")
    next(b for b in browser.find('[data-testid="stForm"] button') if b.text == "Send").click()
    browser.wait(lambda: browser.messages()[:1] == ["你好！早上好"])
    # Later turns disappear only when the answer starts: until then the old buttons are visible.
    browser.wait(lambda: len(browser.messages()) == 2 and "tiny · " in browser.messages()[1])
    browser.wait_until_finished()
    kept = store.load(talk.id)
    assert kept
    assert [turn.question for turn in kept.turns] == ["你好！早上好"]  # later turns are dropped
    assert kept.turns[0].answers[0].text not in ("", "旧的")


def test_two_models_side_by_side(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(models=["tiny", "other"], settings={"max_tokens": 10})
    talk.turns = [Turn("你好", [Answer("tiny", "一"), Answer("other", "二")])]
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 3)
    browser.ask("长江呢？")
    browser.wait(lambda: len(browser.messages()) == 6)
    browser.wait_until_finished()
    browser.wait(lambda: "other · " in browser.messages()[-1])
    assert "tiny · " in browser.messages()[-2]
    first, second = browser.find('[data-testid="stChatMessage"]')[-2:]
    assert first.location["y"] == second.location["y"]
    assert first.location["x"] + first.size["width"] <= second.location["x"]
