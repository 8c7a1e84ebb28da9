"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(builtin_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "sky" in capsys.readouterr().out
    assert names["state"].emitted.min() > 1


def test_ci_finds_the_two_commands():
    """`.ci/run` takes them from here by how the lines begin."""
    lines = README.splitlines()
    assert 'pip install -e ".[test]" && pytest' in lines
    assert any(line.startswith("pip install -e . && python serve.py generate --prompt") for line in lines)
