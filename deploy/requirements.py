"""Print the project's requirements with some extras: ``python deploy/requirements.py cpu train``.

The images install them in a layer of their own, which a change of the code leaves cached.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
