"""Print what the project needs with some extras: ``python deploy/requirements.py cpu train``.

Images install it in a layer of its own, which a change of the code leaves as it is.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
