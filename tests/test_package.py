"""Wheel and sdist install and import in an environment with nothing but the runtime."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import pages

ROOT = Path(__file__).parent.parent
CHECK = """
import sys
import gradhpo, gradhpo.parallel, gradhpo.cluster
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "import started a backend"
assert not {"ray", "sklearn", "tqdm", "matplotlib", "flax"} & set(sys.modules)
assert all(hasattr(gradhpo, name) for name in gradhpo.__all__)
print(gradhpo.__version__)
"""


def python(executable, *arguments, cwd):
    done = subprocess.run(
        [executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_starts_no_backend_and_needs_no_extra(tmp_path):
    assert python(sys.executable, "-c", CHECK, cwd=tmp_path).strip() == "0.3.0"


@pytest.mark.slow
def test_wheel_and_sdist_in_a_bare_environment(tmp_path):
    python(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = archive.getnames()
    assert [link for link in pages.files("README") if f"gradhpo-0.3.0/{link}" not in held] == []
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gradhpo", "gradhpo-0.3.0.dist-info"}
    assert {"gradhpo/py.typed", "gradhpo/parallel/__init__.py", "gradhpo/page/page.html"} <= set(
        names
    )
    # The wheel was made from the sdist, in an environment that had it alone.
    python(sys.executable, "-m", "venv", "--without-pip", "bare", cwd=tmp_path)
    bare = str(tmp_path / "bare/bin/python")
    # Bytecode of all of JAX and SciPy is most of the time, and the least of it is imported.
    install = ("-m", "pip", "--python", bare, "install", "--quiet", "--no-compile")
    python(sys.executable, *install, str(wheel), cwd=tmp_path)
    assert python(bare, "-c", CHECK, cwd=tmp_path).strip() == "0.3.0"
