"""The book: chapters whose code, outputs and figures are generated and checked.

Each chapter NN-name has a page per language, `docs/en/book/NN-name.md` and `docs/zh/book/NN-name.md`,
and a folder `docs/book/NN-name/` that both share. `docs/en/contributing.md` explains how to write one.

Reading order: `chapters.py` (what a chapter consists of), `execute.py` (runs its script),
`outputs.py` (keeps the outputs fresh), `notebook.py`, `staging.py` (a page of the site), `checks.py`.
"""
