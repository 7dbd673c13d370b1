"""The README's Python runs as it stands."""

import re

from miniature import papers


def test_the_code_blocks_run_in_order():
    text = (papers.root() / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["history"].metric.shape == (5, 60)


def test_every_command_is_known():
    from typer.main import get_command

    from miniature.cli import app

    text = (papers.root() / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"(?:^|`)miniature (\w+)", text, re.M))
    assert used and used <= set(get_command(app).commands)
