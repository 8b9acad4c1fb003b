"""`import cosae`: few names, and nothing heavy before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cosae
from cosae.cli import VERBS

HEAVY = ("torch", "numpy", "scipy", "transformers", "numba", "jinja2", "tqdm")


def loaded_after(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has imported after `code`."""
    program = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_import_and_help_do_not_wait_for_torch() -> None:
    assert loaded_after("import cosae.sae.model") >= {"torch", "numpy"}, "the probe sees what is imported"
    assert loaded_after("import cosae; cosae.__version__, dir(cosae), cosae.CosaeError") == set()
    assert loaded_after("from cosae.cli import main; main(['--help'])") == set()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_verbs_help_waits_for_torch(verb: str) -> None:
    assert loaded_after(f"from cosae.cli import main; main([{verb!r}, '--help'])") == set()


def test_dir_shows_the_front_door_and_nothing_else() -> None:
    assert dir(cosae) == sorted(cosae.__all__)
    assert len(cosae.__all__) <= 14
    for name in cosae.__all__:
        assert getattr(cosae, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cosae.nonsense  # type: ignore[attr-defined]
    assert callable(cosae.load_dictionary)


def test_warnings_of_ours_are_one_line_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from cosae.cli import _show
    from cosae.errors import CosaeWarning

    _show(CosaeWarning("text with \x1b[31m colour"), CosaeWarning, "file.py", 3)
    _show(UserWarning("another's"), UserWarning, "file.py", 3)
    ours, others = capsys.readouterr().err.splitlines()[:2]
    assert ours.startswith("cosae: warning: text with ")
    assert "\x1b" not in ours
    assert others.startswith("file.py:3: UserWarning")


def test_on_windows_the_import_says_what_is_needed() -> None:
    code = "import sys; sys.platform = 'win32'; import cosae"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "POSIX" in said
    assert "WSL" in said
