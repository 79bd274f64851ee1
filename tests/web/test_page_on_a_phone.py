"""The page in Chinese, on a phone."""

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.browser import Browser


def test_chinese_page_on_a_phone(url: str, store: Store) -> None:
    talk = Conversation(models=["tiny"], settings={"max_tokens": 5})
    words = ["长" * 300, "a" * 300]
    talk.turns = [Turn(word, [Answer("tiny", word), Answer("other", word)]) for word in words]
    store.save(talk)
    phone = Browser("zh-CN", width=390)
    try:
        phone.open(f"{url}&c={talk.id}")
        phone.wait(lambda: len(phone.messages()) == 6)
        [box] = phone.find('[data-testid="stChatInputTextArea"]')
        assert box.get_attribute("placeholder") == "输入消息"
        assert "重新生成" in phone.driver.page_source
        wide = "return document.documentElement.scrollWidth"
        assert phone.driver.execute_script(wide) <= 390  # no horizontal overflow
        for message in phone.find('[data-testid="stChatMessage"]'):
            assert message.size["width"] <= 390
    finally:
        phone.driver.quit()
