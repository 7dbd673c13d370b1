"""``python -m miniature`` is the command ``miniature``."""

from .cli import app

app()
