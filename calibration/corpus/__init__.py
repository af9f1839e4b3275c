"""Parts of ``build.py``: archives, markup, readers and the table of sources of the bundled text."""
