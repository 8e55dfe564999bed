"""The README: its first lines run as they stand and print what stands below them."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MOST_LINES = 130


def test_first_lines_run_and_print_what_is_said(tmp_path):
    found = re.search(
        r"<!-- first lines -->\n```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL
    )
    assert found is not None
    code, printed = found.groups()
    script = tmp_path / "first_lines.py"
    script.write_text(code)
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == printed


def test_it_stays_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_links_lead_to_files_and_headings():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        name, _, heading = target.partition("#")
        assert (ROOT / name).exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, target
