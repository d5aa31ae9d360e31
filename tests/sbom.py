"""Write the SBOM of a wheel and its dependencies beside it, in the format CycloneDX: `python tests/sbom.py WHEEL`."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def main() -> None:
    """Install the wheel in a new environment, and list what is in it."""
    wheel = Path(sys.argv[1]).resolve()
    name, version, _ = wheel.name.split("-", 2)
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = str(Path(folder, "bin", "python"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(wheel)], check=True)
        sbom = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--mc-type=library"]
        files = ["--pyproject", str(pyproject), "--output-file", str(wheel.parent / f"{name}-{version}.cdx.json")]
        subprocess.run([*sbom, *files, python], check=True)


if __name__ == "__main__":
    main()
