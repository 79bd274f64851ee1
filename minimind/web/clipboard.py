"""A copy button that works in the browser alone, without a rerun of the Streamlit script."""

from typing import Any

import streamlit as st

_HTML = """
<button type="button">
  <span class="mark" aria-hidden="true"></span><span class="label"></span>
</button>
"""
# Looks like Streamlit's tertiary buttons; the marks are icon names in its font.
_CSS = """
button {
  display: inline-flex; align-items: center; gap: 0.5rem; min-height: 2.5rem; padding: 0;
  border: none; background: none; cursor: pointer; white-space: nowrap;
  font: inherit; font-size: 0.875rem; color: var(--st-text-color);
}
button:hover, button:focus-visible { color: var(--st-primary-color); }
.mark { font-family: "Material Symbols Rounded"; font-size: 1.25rem; width: 1em; overflow: hidden; }
"""
# The text goes only to the clipboard; it is never inserted into the page.
_JS = """
export default function({ parentElement, data }) {
  const find = (css) => parentElement.querySelector(css);
  const show = (mark) => { find('.mark').textContent = mark; };
  show('content_copy');
  find('.label').textContent = data.label;
  let timer;
  find('button').onclick = async () => {
    try {
      await navigator.clipboard.writeText(data.text);
      show('check');
    } catch {
      show('close');
    }
    clearTimeout(timer);
    timer = setTimeout(() => show('content_copy'), 1500);
  };
  return () => clearTimeout(timer);
}
"""

_button = st.components.v2.component("minimind_copy", html=_HTML, css=_CSS, js=_JS)


def copy_button(title: str, text: str, key: str) -> Any:
    """Show a button that copies `text`: then a tick, or a cross if the browser forbids it."""
    return _button(data={"label": title, "text": text}, key=key, width="content")
