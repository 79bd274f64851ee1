"""Reports on run directories: read runs and results, draw curves, write HTML and Markdown.

Reading order: `runs.py` (what is on disk), `report.py` (the page), `curves.py`, `scaling.py` and
`evaluation_tables.py` (its sections), `page.py` and `render.py` (how it becomes HTML).
"""
