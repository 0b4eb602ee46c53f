"""README and the guides: each block runs alone, and what they name is there."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

import pytest
from absl.testing import parameterized

import towers
import towers.__main__

ROOT = pathlib.Path(towers.__file__).parent.parent
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *GUIDES]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
# Above a block that needs what is not here.
EXCUSE = re.compile(r"<!-- Not run here: .*-->\n$")
LONG = re.compile(r" \\\n *")


def blocks(path, *languages):
    """(line, what is above it, text) of each block in one of the languages."""
    text = path.read_text()
    start = rf"^```(?:{'|'.join(languages)})\n"
    for match in re.finditer(rf"{start}(.*?)^```$", text, re.S | re.M):
        above = text[: match.start()]
        yield above.count("\n") + 2, above, match[1]


class BlocksTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_python_compiles_and_is_run_or_says_why_not(self, name):
        for line, _, block in blocks(ROOT / name, "python", "py"):
            compile("\n" * (line - 1) + block, name, "exec")
        for line, above, _ in blocks(ROOT / name, "py"):
            self.assertRegex(above, EXCUSE, f"{name}:{line}")

    @parameterized.parameters(*NAMES)
    def test_links_and_pictures_lead_to_files(self, name):
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if not target.startswith("https://"):
                self.assertTrue((path.parent / target).exists(), target)

    @parameterized.parameters(*NAMES)
    def test_files_that_are_named_are_there(self, name):
        named = r"\b(?:examples|tests|towers)/[\w/]+\.\w+"
        for target in re.findall(named, (ROOT / name).read_text()):
            self.assertTrue((ROOT / target).exists(), target)

    @parameterized.parameters(*NAMES)
    def test_commands_have_such_flags(self, name):
        whole, _ = towers.__main__.parser()
        for _, _, block in blocks(ROOT / name, "sh"):
            for line in LONG.sub(" ", block).splitlines():
                start, *rest = line.split("python -m towers ")
                if not start and rest:
                    whole.parse_args(shlex.split(rest[0], comments=True))

    def test_readme_leads_to_each_guide_and_is_short(self):
        text = (ROOT / "README.md").read_text()
        for guide in GUIDES:
            self.assertIn(f"(examples/guides/{guide.name})", text)
        self.assertNotEmpty(GUIDES)
        self.assertLess(text.count("\n"), 160)

    @pytest.mark.rare
    def test_each_block_runs_in_a_process_of_its_own(self):
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        files = []
        for path, name in zip(PAGES, NAMES):
            for line, _, block in blocks(path, "python"):
                # So that errors name the page's line.
                files.append(folder / f"{name.replace('/', '_')}_{line}.py")
                files[-1].write_text("\n" * (line - 1) + block)
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "tests/programs/forked.py"),
                *(json.dumps([[str(file)] for file in files]), "2"),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            cwd=folder,
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        data = json.loads(done.stdout.splitlines()[-1])
        self.assertNotEmpty(files)
        for file, (status, _, err) in zip(files, data, strict=True):
            with self.subTest(block=file.name):
                self.assertEqual(status, 0, err)
                self.assertNotIn("Warning: ", err)
