"""The chat page. Streamlit runs this script from top to bottom on each user interaction.

Widgets have keys with the id of their conversation or turn, so that each keeps its own state.
"""

import hmac
import os
import time
from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from minimind.environment import KEY_VARIABLE
from minimind.errors import ServiceError
from minimind.web.client import Client, ModelInfo
from minimind.web.clipboard import copy_button
from minimind.web.markdown import label, parts_of
from minimind.web.start import TOKEN_VARIABLE, URL_VARIABLE
from minimind.web.store import Answer, Conversation, Store, Turn
from minimind.web.stream_reader import StreamReader
from minimind.web.strings import language_of, text

_REFRESH_SECONDS = 0.08  # between updates of a growing answer
_SAVE_SECONDS = 1.0  # between saves of a growing answer
_PAGE_SIZE = 20  # conversations listed before "show more"
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
/* Elements below a growing answer are left over from an earlier run of the script. */
[class*="st-key-stop-"] ~ * { display: none; }
/* Keeps Stop visible above the input while the answer grows faster than the page scrolls. */
[class*="st-key-stop-"] { position: sticky; bottom: 9rem; z-index: 1; }
@media (max-width: 640px) {
  .block-container { padding-left: 0.8rem; padding-right: 0.8rem; }
}
</style>
"""


class Page:
    """The page, created anew in each run of the script."""

    def __init__(self) -> None:
        self.client = Client(os.environ[URL_VARIABLE], os.environ.get(KEY_VARIABLE))
        self.store = Store()
        self.language = language_of(st.context.locale)

    def text(self, key: str) -> str:
        """Return a text in the language of the browser."""
        return text(self.language, key)

    def show(self) -> None:
        """Render the page."""
        st.set_page_config(page_title="MiniMind", page_icon="💬", layout="centered")
        st.html(_STYLE)
        if not self._is_allowed():
            st.error(self.text("no token"))
            return
        try:
            models = {model.name: model for model in self.client.models()}
        except ServiceError as error:
            st.error(label(str(error)))
            st.button(self.text("retry"))
            return
        if not models:
            st.error(self.text("no models"))
            return
        conversation = self._current_conversation()
        chosen = self._sidebar(conversation, models)
        self._show_conversation(conversation, chosen)

    def _is_allowed(self) -> bool:
        """Check the token in the address, on every run: sessions do not outlive it."""
        token = st.query_params.get("token", "")
        return hmac.compare_digest(token.encode(), os.environ[TOKEN_VARIABLE].encode())

    def _set_address(self, id: str | None) -> None:
        """Put a conversation's id into the address, or none, and keep the token."""
        conversation = {} if id is None else {"c": id}
        st.query_params.from_dict({"token": os.environ[TOKEN_VARIABLE]} | conversation)

    def _current_conversation(self) -> Conversation:
        """Return the conversation in the address, or a new one."""
        id = st.query_params.get("c", "")
        if (conversation := self.store.load(id)) is not None:
            return conversation
        new = st.session_state.get("new")
        if new is None or id or self.store.load(new.id):
            new = st.session_state["new"] = Conversation()
            self._set_address(None)
        return new

    # The sidebar

    def _sidebar(self, conversation: Conversation, models: dict[str, ModelInfo]) -> list[ModelInfo]:
        with st.sidebar:
            if st.button(self.text("new"), icon=":material/add:", width="stretch", type="primary"):
                st.session_state.pop("new", None)
                self._set_address(None)
                st.rerun()
            chosen = self._choose_models(conversation, list(models))
            key = conversation.id
            conversation.system = st.text_area(
                self.text("system"),
                conversation.system,
                key=f"system {key}",
                placeholder=self.text("system hint"),
                height=80,
            )
            conversation.models = chosen
            is_ours = all(models[name].is_ours for name in chosen)
            with st.expander(self.text("sampling"), icon=":material/tune:"):
                conversation.settings = self._settings(conversation, is_ours)
            self._list_conversations(conversation)
        return [models[name] for name in chosen]

    def _choose_models(self, conversation: Conversation, names: list[str]) -> list[str]:
        key = conversation.id
        known = [name for name in conversation.models if name in names] or names[:1]
        first = st.selectbox(self.text("model"), names, names.index(known[0]), key=f"model {key}")
        if len(names) < 2:
            return [first]
        both = st.toggle(self.text("side by side"), len(known) > 1, key=f"both {key}")
        if not both:
            return [first]
        others = [name for name in names if name != first]
        index = others.index(known[-1]) if known[-1] in others else 0
        second = st.selectbox(self.text("second model"), others, index, key=f"second {key}")
        return [first, second]

    def _settings(self, conversation: Conversation, is_ours: bool) -> dict[str, Any]:
        """Show the sampling parameters and return them; some exist only in our service."""
        key, stored = conversation.id, conversation.settings

        # Stored values are clamped, because the file may have been edited.
        def slider(name: str, high: float, default: float, low: float = 0.0) -> float:
            hint = self.text("temperature hint") if name == "temperature" else None
            value = stored.get(name)
            value = default if value is None else float(min(max(value, low), high))
            title = self.text(name)
            return st.slider(title, low, high, value, 0.05, key=f"{name} {key}", help=hint)

        def integer(name: str, low: int, high: int, default: int | None) -> int | None:
            value = stored.get(name, default)
            value = None if value is None else int(min(max(value, low), high))
            return st.number_input(self.text(name), low, high, value, key=f"{name} {key}")

        settings: dict[str, Any] = {
            "temperature": slider("temperature", 2.0, 0.7),
            "top_p": slider("top_p", 1.0, 0.9, 0.05),
        }
        if is_ours:
            settings["min_p"] = slider("min_p", 1.0, 0.0)
            settings["top_k"] = integer("top_k", 0, 100_000, 0)
            settings["repetition_penalty"] = slider("repetition_penalty", 2.0, 1.0, 0.5)
        settings["max_tokens"] = integer("max_tokens", -1, 100_000, 512)
        settings["seed"] = integer("seed", 0, 2**31, None)
        if settings["max_tokens"] == 0 or (settings["max_tokens"] == -1 and not is_ours):
            settings["max_tokens"] = None
        return settings

    def _list_conversations(self, conversation: Conversation) -> None:
        saved = self.store.ids()
        num_listed = st.session_state.get("num_listed", _PAGE_SIZE)
        titles = {id: self.store.title(id) for id in saved[:num_listed]}
        for path in self.store.quarantined():
            st.warning(f"{self.text('unreadable')} {label(str(path))}")
        if not saved:
            return
        st.subheader(self.text("conversations"), anchor=False)
        for id, title in titles.items():
            if title is not None and st.button(
                label(title) or "…",
                key=f"open {id}",
                width="stretch",
                type="secondary" if id == conversation.id else "tertiary",
            ):
                self._set_address(id)
                st.rerun()
        if len(saved) > num_listed and st.button(
            self.text("more"), icon=":material/expand_more:", key="more", width="stretch"
        ):
            st.session_state["num_listed"] = num_listed + _PAGE_SIZE
            st.rerun()
        if not conversation.turns:
            return
        st.download_button(
            self.text("export"),
            conversation.as_training_data(),
            f"conversation-{conversation.id[:8]}.jsonl",
            "application/jsonl",
            icon=":material/download:",
            width="stretch",
        )
        if st.button(self.text("delete"), icon=":material/delete:", width="stretch"):
            self.store.delete(conversation.id)
            st.session_state.pop("new", None)  # perhaps the same conversation
            self._set_address(None)
            st.rerun()

    # The conversation

    def _show_conversation(self, conversation: Conversation, models: Sequence[ModelInfo]) -> None:
        question = st.chat_input(self.text("message"), key="question")
        if question and question.strip():
            st.session_state.pop("editing", None)
            conversation.turns.append(Turn(question.strip()))
            self._save(conversation)
            st.session_state["pending"] = conversation.turns[-1].id
        pending = st.session_state.get("pending")  # id of the turn to be answered
        if not conversation.turns:
            st.markdown(f"### {self.text('empty')}")
        is_generating = any(turn.id == pending for turn in conversation.turns)
        for number, turn in enumerate(conversation.turns):
            self._show_question(conversation, number)
            if turn.id == pending:
                self._generate(conversation, number, models)
            else:
                self._show_answers(conversation, number, is_generating)

    def _save(self, conversation: Conversation) -> None:
        self.store.save(conversation)
        self._set_address(conversation.id)

    def _show_question(self, conversation: Conversation, number: int) -> None:
        turn = conversation.turns[number]
        with st.chat_message("user"):
            if st.session_state.get("editing") != turn.id:
                st.text(turn.question)
                return
            with st.form(f"edit {turn.id}", border=False):
                edited = st.text_area(
                    self.text("edit"), turn.question, label_visibility="collapsed", height="content"
                )
                with st.container(horizontal=True):
                    sent = st.form_submit_button(self.text("send"), type="primary")
                    cancelled = st.form_submit_button(self.text("cancel"))
        if cancelled or (sent and not edited.strip()):
            st.session_state.pop("editing", None)
            st.rerun()
        if sent:
            st.session_state.pop("editing", None)
            # Later turns are dropped: they replied to the old question.
            conversation.turns[number:] = [Turn(edited.strip())]
            self._regenerate(conversation, number)

    def _regenerate(self, conversation: Conversation, number: int) -> None:
        conversation.turns[number].answers = []
        self._save(conversation)
        st.session_state["pending"] = conversation.turns[number].id
        st.rerun()

    def _show_answers(self, conversation: Conversation, number: int, is_generating: bool) -> None:
        turn = conversation.turns[number]
        for side, column in enumerate(_columns(len(turn.answers))):
            with column, st.chat_message("assistant"):
                answer = turn.answers[side]
                _render(answer.text)
                if answer.error:
                    st.error(label(answer.error))
                if answer.left_out:
                    st.caption(self.text("left out"))
                st.caption(self._caption(answer))
        self._show_buttons(conversation, number, is_generating)

    def _show_buttons(self, conversation: Conversation, number: int, is_generating: bool) -> None:
        """Show the buttons of a turn; all but copying would interrupt an answer in progress."""
        turn = conversation.turns[number]
        with st.container(horizontal=True, gap="small", key=f"tools-{turn.id}"):
            for side, answer in enumerate(turn.answers):
                if answer.text:
                    title = self.text("copy") + (f" {side + 1}" if len(turn.answers) > 1 else "")
                    copy_button(title, answer.text, key=f"copy-{side}-{turn.id}")
            if st.button(
                self.text("edit"),
                icon=":material/edit:",
                type="tertiary",
                key=f"edit-{turn.id}",
                disabled=is_generating,
            ):
                st.session_state["editing"] = turn.id
                st.rerun()
            if number < len(conversation.turns) - 1:
                st.empty()  # replaces the button of the run in which this turn was the last
            elif st.button(
                self.text("regenerate"),
                icon=":material/refresh:",
                type="tertiary",
                key=f"again-{turn.id}",
            ):
                self._regenerate(conversation, number)

    def _caption(self, answer: Answer) -> str:
        """Return model, tokens, speed and finish reason of an answer."""
        parts = [label(answer.model), f"{answer.tokens:,} {self.text('tokens')}"]
        if answer.tokens > 1 and answer.seconds > 0:
            parts.append(f"{answer.tokens / answer.seconds:,.0f} {self.text('tokens/s')}")
        if answer.finish_reason is None and not answer.error:
            parts.append(self.text("stopped"))
        if answer.finish_reason == "length":
            parts.append(self.text("length"))
        return " · ".join(parts)

    # Generation

    def _generate(
        self, conversation: Conversation, number: int, models: Sequence[ModelInfo]
    ) -> None:
        """Show the answers while they stream. Any user interaction interrupts them here."""
        turn = conversation.turns[number]
        turn.answers = [Answer(model.name) for model in models]
        slots = []
        for column in _columns(len(models)):
            with column, st.chat_message("assistant"):
                slots.append(st.empty())
        st.button(self.text("stop"), icon=":material/stop_circle:", key=f"stop-{turn.id}")
        readers = [
            StreamReader(
                self.client, model, conversation.messages(number, side), conversation.settings
            )
            for side, model in enumerate(models)
        ]
        try:
            # Only now: if this run is interrupted earlier, the next one answers the turn.
            del st.session_state["pending"]
            self._render_streams(conversation, turn, readers, slots)
        finally:
            for side, reader in enumerate(readers):
                reader.close()
                turn.answers[side] = reader.answer()
            self._save_answers(conversation, turn)
        st.rerun()

    def _render_streams(
        self,
        conversation: Conversation,
        turn: Turn,
        readers: Sequence[StreamReader],
        slots: Sequence[DeltaGenerator],
    ) -> None:
        """Update the growing answers until all are finished."""
        last_save = time.monotonic()
        while True:
            is_streaming = any(reader.is_streaming for reader in readers)
            for side, (reader, slot) in enumerate(zip(readers, slots, strict=True)):
                turn.answers[side] = reader.answer()
                with slot.container():
                    _render(turn.answers[side].text + (" ▍" if reader.is_streaming else ""))
            if not is_streaming:
                return
            if time.monotonic() - last_save > _SAVE_SECONDS:
                self._save_answers(conversation, turn)
                last_save = time.monotonic()
            time.sleep(_REFRESH_SECONDS)

    def _save_answers(self, conversation: Conversation, turn: Turn) -> None:
        """Save answers into the current file: another tab may have changed or deleted it."""
        stored = self.store.load(conversation.id)
        if stored is None:
            return
        for stored_turn in stored.turns:
            if stored_turn.id == turn.id:
                stored_turn.answers = turn.answers
                self.store.save(stored)


def _columns(number: int) -> list[Any]:
    """Return one container per answer: columns if there are several."""
    return list(st.columns(number)) if number > 1 else [st.container() for _ in range(number)]


def _render(answer: str) -> None:
    for part in parts_of(answer):
        if part.kind == "code":
            # Streamlit strips one line break from each end; the content already ends in one.
            st.code(f"\n{part.content}", language=part.language, wrap_lines=True)
        elif part.kind == "html":
            st.html(f'<div class="answer">{part.content}</div>')
        else:
            st.text(part.content)


Page().show()
