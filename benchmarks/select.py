"""Runs the benchmark of the select stage, which is in ``select_rows.py``: ``python benchmarks/select.py --help``.

A script's folder comes first where Python looks for modules, so in this folder the file would stand for the standard
library's ``select``, which sockets and processes need. Hence it makes way for that one whenever it is imported.
"""

import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_found_in = sys.path[:]
sys.path[:] = [path for path in _found_in if os.path.abspath(path) != _FOLDER]

if __name__ == "__main__":
    import runpy

    runpy.run_path(os.path.join(_FOLDER, "select_rows.py"))["main"]()
else:
    import importlib

    del sys.modules[__name__]
    importlib.import_module(__name__)
    sys.path[:] = _found_in
