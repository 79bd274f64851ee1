"""Stored conversations on the page: reload, list, invalid files."""

from minimind.web.store import Conversation, Store, Turn
from tests.support.browser import Browser, long_conversation


def test_answers_survive_a_reload(url: str, browser: Browser, store: Store) -> None:
    browser.open(url)
    browser.ask("长江有多长？")
    browser.wait_until_finished()
    browser.wait(lambda: len(browser.messages()) == 2)
    question, answer = browser.messages()
    assert question == "长江有多长？"
    assert "other · " in answer  # the first model
    [kept] = saved_in(store)
    assert kept.turns[0].answers[0].text
    assert kept.turns[0].answers[0].tokens > 0
    # The answer is random, and one token has no rate.
    assert ("tokens/s" in answer) == (kept.turns[0].answers[0].tokens > 1)
    address = browser.driver.current_url
    assert kept.id in address
    browser.driver.refresh()
    browser.wait(lambda: browser.messages() == [question, answer])
    browser.ask("然后呢？")
    browser.wait(lambda: len(browser.messages()) == 4)
    browser.wait_until_finished()
    assert browser.messages()[:2] == [question, answer]
    # A new conversation, and back.
    next(b for b in browser.find("button") if "New conversation" in b.text).click()
    browser.wait(lambda: not browser.messages())
    browser.button(f".st-key-open-{kept.id}").click()
    browser.wait(lambda: len(browser.messages()) == 4)


def test_a_deleted_conversation_is_gone(url: str, browser: Browser, store: Store) -> None:
    browser.open(url)
    browser.ask("长江有多长？")
    browser.wait_until_finished()
    browser.wait(lambda: len(browser.messages()) == 2)
    next(b for b in browser.find("button") if "Delete" in b.text).click()
    browser.wait(lambda: not browser.messages())
    assert store.ids() == []
    browser.ask("然后呢？")
    browser.wait_until_finished()
    browser.wait(lambda: len(browser.messages()) == 2)
    assert browser.messages()[0] == "然后呢？"


def saved_in(store: Store) -> list[Conversation]:
    found = [store.load(id) for id in store.ids()]
    return [conversation for conversation in found if conversation]


def test_an_invalid_conversation_is_reported_and_quarantined(
    url: str, browser: Browser, store: Store
) -> None:
    talk = long_conversation(store)
    path = store._folder / f"{talk.id}.json"
    path.write_text('{"turns": [{"question": 5}]}')
    browser.open(f"{url}&c={talk.id}")
    [alert] = browser.wait(lambda: browser.find('[data-testid="stAlert"]'))
    [quarantined] = store.quarantined()
    assert alert.text == f"A conversation could not be read. Its file was kept as: {quarantined}"
    assert quarantined.read_text() == '{"turns": [{"question": 5}]}'
    browser.ask("你好")
    browser.wait_until_finished()


def test_stored_settings_are_clamped(url: str, browser: Browser, store: Store) -> None:
    settings = {"temperature": 99, "top_p": -1.0, "top_k": 2.5, "max_tokens": 5, "seed": -3}
    talk = Conversation(models=["tiny"], settings=settings, turns=[Turn("你好", [])])
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 1)
    browser.button('[class*="st-key-again-"]').click()
    browser.wait(lambda: "5 tokens" in browser.messages()[-1])


def test_conversations_are_listed_in_pages(url: str, browser: Browser, store: Store) -> None:
    talks = [Conversation(turns=[Turn(f"第{number}个")]) for number in range(45)]
    for talk in talks:
        store.save(talk)

    def titles() -> list[str]:
        return [b.text for b in browser.find('[class*="st-key-open-"] button')]

    newest = [talk.title for talk in reversed(talks)]
    browser.open(url)
    browser.wait(lambda: titles() == newest[:20])
    browser.press(".st-key-more")
    browser.wait(lambda: titles() == newest[:40])
    browser.press(".st-key-more")
    browser.wait(lambda: titles() == newest)
    assert not browser.find(".st-key-more")
    browser.press(f".st-key-open-{talks[0].id}")
    browser.wait(lambda: browser.messages() == ["第0个"])
