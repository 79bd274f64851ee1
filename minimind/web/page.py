"""The page: Streamlit runs this file from top to bottom at each thing that a user does."""

import hmac
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from minimind.environment import KEY_VARIABLE
from minimind.errors import ServiceError
from minimind.web.client import Answer as Stream
from minimind.web.client import Client, ModelInfo
from minimind.web.clipboard import copy_button
from minimind.web.markdown import label, parts_of
from minimind.web.start import TOKEN_VARIABLE, URL_VARIABLE
from minimind.web.store import Answer, Conversation, Store, Turn
from minimind.web.strings import language_of, word

_PAINT_SECONDS = 0.08  # between two looks at a growing answer
_SAVE_SECONDS = 1.0
_LISTED_AT_ONCE = 20  # conversations
_STYLE = """
<style>
.block-container { padding-top: 2.5rem; padding-bottom: 1rem; }
[data-testid="stChatMessage"] { padding: 0.6rem 0.2rem; }
[data-testid="stText"] { white-space: pre-wrap; overflow-wrap: anywhere; font-family: inherit; }
[data-testid="stMarkdownContainer"], .answer { overflow-wrap: anywhere; }
.answer :is(h1, h2, h3, h4, h5, h6) { font-size: 1.15rem; padding: 0.5rem 0 0.25rem; }
.answer :is(code, pre) {
  font-family: "Source Code Pro", monospace; font-size: 0.875em; white-space: pre-wrap;
  background: rgba(128, 128, 128, 0.15); border-radius: 0.25rem; padding: 0.1em 0.3em;
}
.answer pre { padding: 0.6em; }
.answer pre code { background: none; padding: 0; font-size: 1em; }
.answer :is(th, td) { border: 1px solid rgba(128, 128, 128, 0.3); padding: 0.25em 0.5em; }
.answer blockquote { border-left: 3px solid rgba(128, 128, 128, 0.4); padding-left: 1em; }
[class*="st-key-tools-"] { margin-top: -1rem; padding-left: 2.4rem; }
/* Below an answer that is being written stands only what an earlier run has left. */
[class*="st-key-stop-"] ~ * { display: none; }
/* Above the field, also while the answer grows faster than the page scrolls. */
[class*="st-key-stop-"] { position: sticky; bottom: 9rem; z-index: 1; }
@media (max-width: 640px) {
  .block-container { padding-left: 0.8rem; padding-right: 0.8rem; }
}
</style>
"""


class Page:
    """One run of this file."""

    def __init__(self) -> None:
        self.client = Client(os.environ[URL_VARIABLE], os.environ.get(KEY_VARIABLE))
        self.store = Store()
        self.language = language_of(st.context.locale)

    def say(self, key: str) -> str:
        """A phrase in the language of the browser."""
        return word(self.language, key)

    def show(self) -> None:
        """Everything, from top to bottom."""
        st.set_page_config(page_title="MiniMind", page_icon="💬", layout="centered")
        st.html(_STYLE)
        if not self._is_allowed():
            st.error(self.say("no token"))
            return
        try:
            models = {model.name: model for model in self.client.models()}
        except ServiceError as error:
            st.error(label(str(error)))
            st.button(self.say("again"))
            return
        if not models:
            st.error(self.say("no models"))
            return
        conversation = self._current()
        chosen = self._sidebar(conversation, models)
        self._talk(conversation, chosen)

    def _is_allowed(self) -> bool:
        """Whether the address holds the token; asked anew at each run, so nothing outlives it."""
        given = st.query_params.get("token", "")
        return hmac.compare_digest(given.encode(), os.environ[TOKEN_VARIABLE].encode())

    def _set_address(self, id: str | None) -> None:
        """Name a conversation in the address, or none; the token stays in it."""
        named = {} if id is None else {"c": id}
        st.query_params.from_dict({"token": os.environ[TOKEN_VARIABLE]} | named)

    def _current(self) -> Conversation:
        """The conversation that the address names; a new one where it names none."""
        wanted = st.query_params.get("c", "")
        found = self.store.load(wanted)
        if found is not None:
            return found
        fresh = st.session_state.get("fresh")
        if fresh is None or wanted or self.store.load(fresh.id):
            fresh = st.session_state["fresh"] = Conversation()
            self._set_address(None)
        return fresh

    # The sidebar

    def _sidebar(self, conversation: Conversation, models: dict[str, ModelInfo]) -> list[ModelInfo]:
        with st.sidebar:
            if st.button(self.say("new"), icon=":material/add:", width="stretch", type="primary"):
                st.session_state.pop("fresh", None)
                self._set_address(None)
                st.rerun()
            chosen = self._choose_models(conversation, list(models))
            key = conversation.id
            conversation.system = st.text_area(
                self.say("system"),
                conversation.system,
                key=f"system {key}",
                placeholder=self.say("system hint"),
                height=80,
            )
            conversation.models = chosen
            is_ours = all(models[name].is_ours for name in chosen)
            with st.expander(self.say("sampling"), icon=":material/tune:"):
                conversation.settings = self._settings(conversation, is_ours)
            self._list_conversations(conversation)
        return [models[name] for name in chosen]

    def _choose_models(self, conversation: Conversation, names: list[str]) -> list[str]:
        key = conversation.id
        known = [name for name in conversation.models if name in names] or names[:1]
        first = st.selectbox(self.say("model"), names, names.index(known[0]), key=f"model {key}")
        if len(names) < 2:
            return [first]
        both = st.toggle(self.say("side by side"), len(known) > 1, key=f"both {key}")
        if not both:
            return [first]
        others = [name for name in names if name != first]
        place = others.index(known[-1]) if known[-1] in others else 0
        second = st.selectbox(self.say("second model"), others, place, key=f"second {key}")
        return [first, second]

    def _settings(self, conversation: Conversation, is_ours: bool) -> dict[str, Any]:
        key, was = conversation.id, conversation.settings  # whose file may be written by hand

        def slide(name: str, most: float, default: float, least: float = 0.0) -> float:
            hint = self.say("temperature hint") if name == "temperature" else None
            at = was.get(name)
            at = default if at is None else float(min(max(at, least), most))
            return st.slider(self.say(name), least, most, at, 0.05, key=f"{name} {key}", help=hint)

        def whole(name: str, least: int, most: int, default: int | None) -> int | None:
            at = was.get(name, default)
            at = None if at is None else int(min(max(at, least), most))
            return st.number_input(self.say(name), least, most, at, key=f"{name} {key}")

        found: dict[str, Any] = {
            "temperature": slide("temperature", 2.0, 0.7),
            "top_p": slide("top_p", 1.0, 0.9, 0.05),
        }
        if is_ours:
            found["min_p"] = slide("min_p", 1.0, 0.0)
            found["top_k"] = whole("top_k", 0, 100_000, 0)
            found["repetition_penalty"] = slide("repetition_penalty", 2.0, 1.0, 0.5)
        found["max_tokens"] = whole("max_tokens", -1, 100_000, 512)
        found["seed"] = whole("seed", 0, 2**31, None)
        if found["max_tokens"] == 0 or (found["max_tokens"] == -1 and not is_ours):
            found["max_tokens"] = None
        return found

    def _list_conversations(self, conversation: Conversation) -> None:
        saved = self.store.ids()
        listed = st.session_state.get("listed", _LISTED_AT_ONCE)
        titles = {id: self.store.title(id) for id in saved[:listed]}
        for path in self.store.put_aside():
            st.warning(f"{self.say('put aside')} {label(str(path))}")
        if not saved:
            return
        st.subheader(self.say("conversations"), anchor=False)
        for id, title in titles.items():
            if title is not None and st.button(
                label(title) or "…",
                key=f"open {id}",
                width="stretch",
                type="secondary" if id == conversation.id else "tertiary",
            ):
                self._set_address(id)
                st.rerun()
        if len(saved) > listed and st.button(
            self.say("more"), icon=":material/expand_more:", key="more", width="stretch"
        ):
            st.session_state["listed"] = listed + _LISTED_AT_ONCE
            st.rerun()
        if not conversation.turns:
            return
        st.download_button(
            self.say("export"),
            conversation.as_training_data(),
            f"conversation-{conversation.id[:8]}.jsonl",
            "application/jsonl",
            icon=":material/download:",
            width="stretch",
        )
        if st.button(self.say("delete"), icon=":material/delete:", width="stretch"):
            self.store.delete(conversation.id)
            self._set_address(None)
            st.rerun()

    # The conversation

    def _talk(self, conversation: Conversation, models: Sequence[ModelInfo]) -> None:
        asked = st.chat_input(self.say("say"), key="question")
        if asked and asked.strip():
            st.session_state.pop("editing", None)
            conversation.turns.append(Turn(asked.strip()))
            self._keep(conversation)
            st.session_state["answer"] = conversation.turns[-1].id
        wanted = st.session_state.get("answer")
        if not conversation.turns:
            st.markdown(f"### {self.say('empty')}")
        is_writing = any(turn.id == wanted for turn in conversation.turns)
        for number, turn in enumerate(conversation.turns):
            self._question(conversation, number)
            if turn.id == wanted:
                self._write(conversation, number, models)
            else:
                self._answers(conversation, number, is_writing)

    def _keep(self, conversation: Conversation) -> None:
        self.store.save(conversation)
        self._set_address(conversation.id)

    def _question(self, conversation: Conversation, number: int) -> None:
        turn = conversation.turns[number]
        with st.chat_message("user"):
            if st.session_state.get("editing") != turn.id:
                st.text(turn.question)
                return
            with st.form(f"edit {turn.id}", border=False):
                text = st.text_area(
                    self.say("edit"), turn.question, label_visibility="collapsed", height="content"
                )
                with st.container(horizontal=True):
                    sent = st.form_submit_button(self.say("send"), type="primary")
                    cancelled = st.form_submit_button(self.say("cancel"))
        if cancelled or (sent and not text.strip()):
            st.session_state.pop("editing", None)
            st.rerun()
        if sent:
            st.session_state.pop("editing", None)
            # What came after was said to something else.
            conversation.turns[number:] = [Turn(text.strip())]
            self._ask_again(conversation, number)

    def _ask_again(self, conversation: Conversation, number: int) -> None:
        conversation.turns[number].answers = []
        self._keep(conversation)
        st.session_state["answer"] = conversation.turns[number].id
        st.rerun()

    def _answers(self, conversation: Conversation, number: int, is_writing: bool) -> None:
        turn = conversation.turns[number]
        for side, place in enumerate(_places(len(turn.answers))):
            with place, st.chat_message("assistant"):
                answer = turn.answers[side]
                _paint(answer.text)
                if answer.error:
                    st.error(label(answer.error))
                if answer.left_out:
                    st.caption(self.say("left out"))
                st.caption(self._figures(answer))
        self._tools(conversation, number, is_writing)

    def _tools(self, conversation: Conversation, number: int, is_writing: bool) -> None:
        """What can be done with a turn: all but copying would break off an answer."""
        turn = conversation.turns[number]
        with st.container(horizontal=True, gap="small", key=f"tools-{turn.id}"):
            for side, answer in enumerate(turn.answers):
                if answer.text:
                    title = self.say("copy") + (f" {side + 1}" if len(turn.answers) > 1 else "")
                    copy_button(title, answer.text, key=f"copy-{side}-{turn.id}")
            if st.button(
                self.say("edit"),
                icon=":material/edit:",
                type="tertiary",
                key=f"edit-{turn.id}",
                disabled=is_writing,
            ):
                st.session_state["editing"] = turn.id
                st.rerun()
            if number < len(conversation.turns) - 1:
                st.empty()  # in the place of the button that stood here when this turn was the last
            elif st.button(
                self.say("regenerate"),
                icon=":material/refresh:",
                type="tertiary",
                key=f"again-{turn.id}",
            ):
                self._ask_again(conversation, number)

    def _figures(self, answer: Answer) -> str:
        figures = [label(answer.model), f"{answer.tokens:,} {self.say('tokens')}"]
        if answer.tokens > 1 and answer.seconds > 0:
            figures.append(f"{answer.tokens / answer.seconds:,.0f} {self.say('tokens/s')}")
        if answer.finish_reason is None and not answer.error:
            figures.append(self.say("stopped"))
        if answer.finish_reason == "length":
            figures.append(self.say("length"))
        return " · ".join(figures)

    # Writing

    def _write(self, conversation: Conversation, number: int, models: Sequence[ModelInfo]) -> None:
        """Show the answers while they come. Whatever a user does meanwhile ends them here."""
        turn = conversation.turns[number]
        turn.answers = [Answer(model.name) for model in models]
        places = []
        for place in _places(len(models)):
            with place, st.chat_message("assistant"):
                places.append(st.empty())
        st.button(self.say("stop"), icon=":material/stop_circle:", key=f"stop-{turn.id}")
        writers = [
            _Writer(self.client, model, conversation.messages(number, side), conversation.settings)
            for side, model in enumerate(models)
        ]
        try:
            # Not before: a run that is broken off up to here is to be made good by the next one.
            del st.session_state["answer"]
            self._follow(conversation, turn, writers, places)
        finally:
            for side, writer in enumerate(writers):
                writer.close()
                turn.answers[side] = writer.answer()
            self._save_answers(conversation, turn)
        st.rerun()

    def _follow(
        self,
        conversation: Conversation,
        turn: Turn,
        writers: Sequence["_Writer"],
        places: Sequence[DeltaGenerator],
    ) -> None:
        saved = time.monotonic()
        while True:
            going = any(writer.is_going for writer in writers)
            for side, (writer, place) in enumerate(zip(writers, places, strict=True)):
                turn.answers[side] = writer.answer()
                with place.container():
                    _paint(turn.answers[side].text + (" ▍" if writer.is_going else ""))
            if not going:
                return
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._save_answers(conversation, turn)
                saved = time.monotonic()
            time.sleep(_PAINT_SECONDS)

    def _save_answers(self, conversation: Conversation, turn: Turn) -> None:
        """Into the file as it is now: another window may have gone on, or done away with it."""
        found = self.store.load(conversation.id)
        if found is None:
            return
        for other in found.turns:
            if other.id == turn.id:
                other.answers = turn.answers
                self.store.save(found)


class _Writer:
    """Reads one answer in a thread of its own, so that two can grow at a time."""

    def __init__(
        self,
        client: Client,
        model: ModelInfo,
        messages: list[dict[str, str]],
        settings: dict[str, Any],
    ) -> None:
        self._client, self._model = client, model
        self._messages, self._settings = messages, settings
        self._answer = Answer(model.name)
        self._pieces: list[str] = []
        self._stream: Stream | None = None
        self._closed = False
        self.is_going = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        began = time.monotonic()
        try:
            self._stream = self._client.chat(self._model, self._messages, **self._settings)
            self._answer.left_out = self._stream.left_out
            if self._closed:  # before there was a stream to close
                self._stream.break_off()
            for piece in self._stream:
                self._pieces.append(piece)
                self._answer.seconds = time.monotonic() - began
            self._answer.finish_reason = None if self._closed else self._stream.finish_reason
        except ServiceError as error:
            if not self._closed:
                self._answer.error = str(error)
        finally:
            if self._stream is not None:
                self._stream.close()
            self.is_going = False

    def answer(self) -> Answer:
        """What there is of it so far."""
        self._answer.text = "".join(self._pieces)
        counted = self._stream.tokens if self._stream is not None else None
        self._answer.tokens = len(self._pieces) if counted is None else counted
        return self._answer

    def close(self) -> None:
        """Have no more of it written, and none of it if it is still waiting for its turn."""
        self._closed = True
        if self._stream is not None:
            self._stream.break_off()


def _places(number: int) -> list[Any]:
    """Where answers stand: below their question, or beside each other."""
    return list(st.columns(number)) if number > 1 else [st.container() for _ in range(number)]


def _paint(text: str) -> None:
    for part in parts_of(text):
        if part.kind == "code":
            # Streamlit removes a line break from each end; the code has its own at the end.
            st.code(f"\n{part.content}", language=part.language, wrap_lines=True)
        elif part.kind == "html":
            st.html(f'<div class="answer">{part.content}</div>')
        else:
            st.text(part.content)


Page().show()
