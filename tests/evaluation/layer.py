"""Lay an environment over this one: `python layer.py FOLDER` lets FOLDER's Python find what this one has, behind its own.

What is installed into FOLDER comes first there, and this environment stays as it is.
"""

import site
import sys
from pathlib import Path

folder = Path(sys.argv[1])
(target,) = folder.glob("lib/python3*/site-packages")
ours = [path for path in site.getsitepackages() if path.endswith("site-packages")]
lines = "; ".join(f"site.addsitedir({path!r})" for path in ours)
(target / "over_fusedvlm.pth").write_text(f"import site; {lines}\n")
