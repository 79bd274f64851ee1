"""The book: chapters whose code, outputs and figures are generated and checked.

Each chapter NN-name has two pages, `docs/en/book/NN-name.md` and `docs/zh/book/NN-name.md`, and a
folder `docs/book/NN-name/` that both share. `docs/en/book/contributing.md` explains how to write
one.

Reading order: `chapters.py` (parts of a chapter), `execute.py` (run its script), `outputs.py` (keep
the outputs fresh), `notebook.py`, `staging.py` (a page of the site), `checks.py`.
"""
