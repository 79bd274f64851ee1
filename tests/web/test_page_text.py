"""Text on the page is shown verbatim, and copied verbatim."""

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.browser import Browser

INJECTIONS = [
    "<script>document.title='bad'</script>",
    "<img src=x onerror=document.title='bad'>",
    "<svg onload=document.title='bad'>",
    "<svg><script>document.title='bad'</script></svg>",
    "<iframe src=javascript:document.title='bad'></iframe>",
    "<body onload=document.title='bad'>",
    "<a href=javascript:document.title='bad'>a</a>",
    "<details open ontoggle=document.title='bad'>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//bad.example/a.css>",
    "<meta http-equiv=refresh content=0;url=//bad.example>",
    "<base href=//bad.example/>",
    "<form action=//bad.example><input autofocus onfocus=document.title='bad'>",
    "<math><mtext><img src=x onerror=document.title='bad'></mtext></math>",
    "<!--><script>document.title='bad'</script>",
    "</div></body></html><script>document.title='bad'</script>",
    "\"><script>document.title='bad'</script>",
    "'-document.title='bad'-'",
    "javascript:document.title='bad'",
    "[a](javascript:document.title='bad')",
    "[a](data:text/html,<script>document.title='bad'</script>)",
    "![a](http://bad.example/a.png)",
    "![a](x\"onerror=\"document.title='bad')",
    "[a]: javascript:document.title='bad'",
    "<http://bad.example>",
    "&lt;script&gt;document.title='bad'&lt;/script&gt;",
    "$\\href{javascript:document.title='bad'}{a}$",
    ":material/home: :red[a] :smile:",
    "{{constructor.constructor('document.title=1')()}}",
    "%3Cscript%3Edocument.title='bad'%3C/script%3E",
]


def test_copy_writes_to_the_clipboard(url: str, browser: Browser, store: Store) -> None:
    texts = ["一 <b>x</b>\n\n- 二 [a](b)\n", "</script>\"'`${1}"]
    talk = Conversation(models=["tiny", "other"])
    talk.turns = [Turn("你好", [Answer("tiny", texts[0]), Answer("other", texts[1])])]
    store.save(talk)
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    browser.open(f"{url}&c={talk.id}")
    for side, text in enumerate(texts):
        css = f".st-key-copy-{side}-{talk.turns[0].id}"
        button = browser.wait(lambda css=css: browser.shadow_buttons(css))[0]
        assert button.text.endswith(f"Copy {side + 1}")
        button.click()
        browser.wait(lambda button=button: button.text.startswith("check"))
        read = "navigator.clipboard.readText().then(arguments[0])"
        assert browser.driver.execute_async_script(read) == text


def test_injections_are_shown_as_text(url: str, browser: Browser, store: Store) -> None:
    assert len(INJECTIONS) == 30
    talk = Conversation(models=["tiny"], system=INJECTIONS[0], settings={"max_tokens": 2})
    talk.turns = [Turn(text, [Answer(text, text, error=text)]) for text in INJECTIONS]
    store.save(talk)
    for text in INJECTIONS:  # titles in the sidebar
        store.save(Conversation(turns=[Turn(text)]))
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 60)
    browser.requested_hosts()
    shown = browser.messages()
    for place, text in enumerate(INJECTIONS):
        assert shown[2 * place] == text
        assert shown[2 * place + 1].count(text) >= 1
    browser.press(".st-key-more")
    browser.wait(lambda: len(browser.find('[class*="st-key-open-"] button')) == 31)
    titles = {b.text for b in browser.find('[class*="st-key-open-"] button')}
    assert titles == {Conversation(turns=[Turn(text)]).title for text in INJECTIONS}
    # The same inside formatted text.
    talk.turns = [
        Turn("x", [Answer("tiny", f"**a** `b {text}`\n\n{text}\n\n- c {text}")])
        for text in INJECTIONS
    ]
    talk.turns.append(Turn("x", [Answer("tiny", "```\n" + "\n".join(INJECTIONS) + "\n```")]))
    store.save(talk)
    browser.driver.refresh()
    browser.wait(lambda: len(browser.messages()) == 62 and browser.find("code"))
    shown = browser.messages()
    for place, text in enumerate(INJECTIONS):  # completely visible
        assert shown[2 * place + 1].count(text) == 3, text
    assert browser.driver.title == "MiniMind"
    inside = '[data-testid="stChatMessageContent"]'
    for what in ("script", "img", "iframe", "a[href]", "style", "link", "form:not(.x)", "base"):
        assert not browser.find(f"{inside} {what}"), what
    host = url.split("/")[2]
    assert browser.requested_hosts() <= {host}
    # Typed text is rendered like stored text.
    browser.ask(INJECTIONS[1])
    browser.wait(lambda: INJECTIONS[1] in browser.messages())
    assert browser.driver.title == "MiniMind"


CODE = r"""**Code** in `x[0] < y`, `C:\Users\me`, `a  b` and `![i](u)`:

1. first

   ```python
   if x[0] < y:
       print("$x$ **a**\n")
   ```
2. second

Prose.

    indented[0] = "\t"
      deeper

```

def f(*a: int) -> None: ...
```
"""
RENDERED_CODE = [
    "x[0] < y", r"C:\Users\me", "a  b", "![i](u)",
    'if x[0] < y:\n    print("$x$ **a**\\n")',
    'indented[0] = "\\t"\n  deeper',
    "\ndef f(*a: int) -> None: ...",
]  # fmt: skip


def test_code_is_rendered_verbatim(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(turns=[Turn("?", [Answer("tiny", CODE)])])
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    script = (
        "return [...document.querySelectorAll('[data-testid=stChatMessageContent] code')]"
        ".map(e => e.innerText)"
    )

    def rendered_code() -> list[str]:
        return [text.removesuffix("\n") for text in browser.driver.execute_script(script)]

    browser.wait(lambda: len(rendered_code()) == len(RENDERED_CODE))
    assert rendered_code() == RENDERED_CODE
    assert {e.text for e in browser.find(".answer strong")} == {"Code"}
    assert browser.find(".answer li pre")
